"""Names a method with settings of its own: ``lora:rank=16,lr=0.002``."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from locft.config import parse_augment, parse_preserve
from locft.errors import ConfigError
from locft.methods import METHODS, AnyMethod, Editor, choose_methods
from locft.study.records import Pipeline

_PIPELINES: tuple[Pipeline, ...] = ("depth-first", "breadth-first")
# Numbers that may be 0; others may not.
_MAY_BE_ZERO = ("orthogonality", "box", "decay", "share")
_KINDS: Mapping[str, Callable[[str], Any]] = {
    "lr": float,
    "location": str,
    "pipeline": str,
    "batch_size": int,
    "preserve": str,
    "augment": str,
    "max_drift": float,
}
"""What may be set of every method."""


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A method with settings of its own.

    Attributes:
        text: As it was asked for.
        method: The method.
        settings: All of the method's settings.
        given: What was set of `lr`, `location`, `pipeline`, `batch_size`, `preserve`,
            `augment` and `max_drift`.
    """

    text: str
    method: AnyMethod
    settings: Mapping[str, Any]
    given: Mapping[str, Any] = field(default_factory=dict)


def parse_specs(texts: Sequence[str], varied: Collection[str] = ()) -> tuple[MethodSpec, ...]:
    """Read methods with their settings.

    Args:
        texts: ``NAME`` or ``NAME:KEY=VALUE,KEY=VALUE`` each.
        varied: What may not be set, since a study varies it.

    Returns:
        The methods, in order.

    Raises:
        ConfigError: A method or setting is unknown, a value is of another type, or a text is there
            twice.
    """
    if not texts or len(set(texts)) < len(texts):
        raise ConfigError(f"methods are named once each: expected one or more of {', '.join(METHODS)}")
    return tuple(_parse(text, varied) for text in texts)


def _parse(text: str, varied: Collection[str]) -> MethodSpec:
    name, _, rest = text.partition(":")
    [method] = choose_methods((name,))
    kinds: dict[str, Callable[[str], Any]] = {
        key: kind for key, kind in _KINDS.items() if key not in varied
    }
    for key in _without(method):
        kinds.pop(key, None)
    kinds |= {key: _kind_of(value) for key, value in method.settings.items()}
    values: dict[str, Any] = {}
    for part in rest.split(",") if rest else ():
        key, is_given, value = part.partition("=")
        if key not in kinds:
            raise ConfigError(
                f"method {text!r} has no setting {key!r}: expected some of {', '.join(kinds)}"
            )
        try:
            values[key] = kinds[key](value) if is_given else None
        except ValueError:
            values[key] = None
        if values[key] is None:
            kind = "true|false" if kinds[key] is _truth else getattr(kinds[key], "__name__", "")
            raise ConfigError(f"method {text!r}: {key} is {value!r}: expected {key}={kind.upper()}")
    _refuse_out_of_range(text, values)
    return MethodSpec(
        text=text,
        method=method,
        settings={key: values.get(key, value) for key, value in method.settings.items()},
        given={key: value for key, value in values.items() if key in _KINDS},
    )


def _without(method: AnyMethod) -> tuple[str, ...]:
    """Name what may not be set of a method."""
    if isinstance(method, Editor):
        return ("location", "pipeline", "preserve", "augment", "max_drift")
    return () if method.uses_location else ("location", "preserve")


def _kind_of(value: Any) -> Callable[[str], Any]:
    return _truth if isinstance(value, bool) else type(value)


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


def _refuse_out_of_range(text: str, values: Mapping[str, Any]) -> None:
    try:
        parse_preserve(values.get("preserve", "none"))
        parse_augment(values.get("augment", "none"))
    except ConfigError as error:
        raise ConfigError(f"method {text!r}: {error}") from error
    pipeline = values.get("pipeline")
    if pipeline is not None and pipeline not in _PIPELINES:
        known = " or ".join(_PIPELINES)
        raise ConfigError(f"method {text!r}: pipeline is {pipeline!r}: expected {known}")
    breadth_first_only = [key for key in ("augment", "max_drift") if key in values]
    if pipeline == "depth-first" and breadth_first_only:
        raise ConfigError(f"method {text!r}: {breadth_first_only[0]} is for pipeline=breadth-first")
    for key, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not (value > 0 or (value == 0 and key in _MAY_BE_ZERO)):
            raise ConfigError(f"method {text!r}: {key} is {value}: expected a number over 0")
