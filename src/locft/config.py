"""Run settings: one frozen dataclass, filled from a TOML file and from flags of the same names."""

import difflib
import json
import math
import sys
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from locft.errors import ConfigError

Auto = Literal["auto"]
AUTO: Auto = "auto"
_LONGEST_S = 1e9
PRESERVE_STRENGTH = 3.0
"""How strong ``covariance`` is where that is not said."""
NUM_ANCHORS = 200
"""How many ``anchors`` there are where that is not said."""
NUM_ADDED = 4
"""How many prefixes or rephrases an edit gets where that is not said."""


def _setting(
    default: Any,
    help: str,
    group: str,
    *,
    over: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """Declare a setting with what its flag's help says, and its bounds (`over` is exclusive)."""
    metadata = {"help": help, "group": group, "over": over, "least": least, "most": most}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How one edit run is done. Every field is also a flag and a key of a run file.

    Raises:
        ConfigError: A value has the wrong type or is out of range.
    """

    location: str = _setting(
        "70%.mlp.down",
        "tuning location: LAYER.MODULE or SHARE%%.MODULE, with MODULE one of mlp.down, mlp.up, mlp, "
        "attn, and of a mixture mlp.experts.down, mlp.expert[3].down or mlp.shared.down; LAYER alone is "
        "the entire layer; auto looks for one, as `locft locate` does",
        "method",
    )
    format: Literal["raw", "chat"] = _setting(
        "raw", "train and score on the plain prompt, or inside the model's chat template", "method"
    )
    lr: float | Auto = _setting(
        "auto", "Adam's learning rate; auto follows the size of the tuned weights", "method", over=0
    )
    batch_size: int = _setting(20, "edits per step", "method", over=0)
    epochs: int | Auto = _setting(
        "auto", "most passes over all edits; auto gives few edits more passes", "method", over=0
    )
    stop_loss: float = _setting(
        0.01, "stop when an epoch's mean loss is under this; 0 never stops early", "method", least=0
    )
    loss_mean: Literal["sample", "token"] = _setting(
        "sample",
        "average over each edit's target tokens first (sample) or over all of a batch's (token)",
        "method",
    )
    seed: int = _setting(
        0, "names the order of the edits in every epoch", "method", least=0, most=2**64 - 1
    )
    preserve: str = _setting(
        "none",
        "what training keeps as it is: covariance[:STRENGTH], to change least what ordinary text uses "
        "most; anchors[:N], texts of the model's own that stay as likely as they are; both, joined by "
        "+; or none",
        "method",
    )
    augment: str = _setting(
        "none",
        "further training examples of each edit: prefix[:K], its prompt behind other sentences; "
        "rephrase[:K], other wordings; formats, as a question, a statement and a chat; some of them, "
        "joined by +; or none",
        "method",
    )
    rephraser: Literal["model", "endpoint"] = _setting(
        "model",
        "who writes other wordings where the edits bring none: the unedited model, or the server that "
        "LOCFT_REPHRASER_URL and LOCFT_REPHRASER_MODEL name",
        "method",
    )
    max_drift: float | None = _setting(
        None,
        "the most that training may raise drift to, in nats per token, on ordinary text held back",
        "method",
        over=0,
    )
    neutral_text: str | None = _setting(
        None,
        "ordinary text (.txt or .jsonl) for --preserve, prefixes and --max-drift; without it the model "
        "writes its own",
        "method",
    )
    prefer: Literal["generalization", "balanced", "preservation"] = _setting(
        "balanced", "what makes a location good, where it is looked for", "search"
    )
    budget: str = _setting(
        "10m", "how long to look for a location: seconds, or as 90s, 10m, 1h", "search"
    )
    on_conflict: Literal["error", "keep-last", "keep-first"] = _setting(
        "error", "what to do with edits that contradict each other", "edits"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = _setting(
        "auto",
        "dtype of the frozen weights; auto is the checkpoint's own, float32 for float16 ones",
        "machine",
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = _setting(
        "auto",
        "what training multiplies matrices in; auto is bfloat16 where the processor is made for it",
        "machine",
    )
    compile: Literal["auto", "on", "off"] = _setting(
        "auto", "compile the trained layers with torch.compile; auto does on CUDA", "machine"
    )
    device: str = _setting("auto", "auto, cpu, cuda or mps", "machine")
    eval_batch_size: int = _setting(64, "prompts answered at a time", "machine", over=0)
    drift_text: str | None = _setting(
        None,
        "text (.txt, blank lines between passages, or .jsonl) to measure drift on instead",
        "scores",
    )
    revision: str | None = _setting(None, "branch, tag or commit of a Hugging Face id", "model")

    def __post_init__(self) -> None:
        for setting in fields(self):
            kinds, value = _members(_types()[setting.name]), getattr(self, setting.name)
            _check(setting, kinds, value)
            if setting.name == "budget":
                seconds_of(value)
            if setting.name == "preserve":
                parse_preserve(value)
            if setting.name == "augment":
                parse_augment(value)
            if float in kinds and type(value) is int:  # TOML, and people, write 1 for 1.0
                object.__setattr__(self, setting.name, float(value))


@dataclass(frozen=True, kw_only=True)
class Preserve:
    """What training keeps as it is.

    Attributes:
        covariance: How much updates are kept off the directions that ordinary text uses; None for not
            at all.
        anchors: How many texts are held to what the unedited model makes of them.
    """

    covariance: float | None = None
    anchors: int = 0


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What further training examples each edit gets.

    Attributes:
        prefixes: How many with its prompt behind another sentence.
        rephrases: How many in other words.
        formats: Whether its prompt is also put as a question, a statement and a chat.
    """

    prefixes: int = 0
    rephrases: int = 0
    formats: bool = False

    @property
    def is_none(self) -> bool:
        """Whether there are none."""
        return self == Augment()


def parse_preserve(text: str) -> Preserve:
    """Read what training keeps as it is: ``none``, ``covariance``, ``covariance:10+anchors:100``.

    Raises:
        ConfigError: The text cannot be read.
    """
    found = _parse_parts(text, {"covariance": PRESERVE_STRENGTH, "anchors": NUM_ANCHORS})
    if found is None:
        raise ConfigError(
            f"preserve is {text!r}: expected none, covariance or covariance:STRENGTH with a number of "
            "at least 0, anchors or anchors:N with a whole number over 0, or both joined by +"
        )
    return Preserve(**found)


def parse_augment(text: str) -> Augment:
    """Read what each edit is augmented by: ``none``, ``prefix``, ``prefix:4+rephrase:2+formats``.

    Raises:
        ConfigError: The text cannot be read.
    """
    found = _parse_parts(text, {"prefix": NUM_ADDED, "rephrase": NUM_ADDED, "formats": True})
    if found is None:
        raise ConfigError(
            f"augment is {text!r}: expected none, or some of prefix[:K], rephrase[:K] with a whole "
            "number over 0, and formats, joined by +"
        )
    return Augment(
        prefixes=found.get("prefix", 0),
        rephrases=found.get("rephrase", 0),
        formats=found.get("formats", False),
    )


def _parse_parts(text: str, defaults: Mapping[str, float]) -> dict[str, Any] | None:
    """Read ``NAME[:NUMBER]`` once or several times, joined by +; None if it cannot be read.

    A number has the type of the name's default, and is at least 0, a whole one at least 1; where the
    default is True there is none.
    """
    found: dict[str, Any] = {}
    for part in () if text == "none" else text.split("+"):
        name, colon, number = part.partition(":")
        default = defaults.get(name)
        if default is None or name in found or (colon and default is True):
            return None
        try:
            value = type(default)(number) if colon else default
        except ValueError:
            return None
        if not (isinstance(value, int) or 0 <= value < math.inf) or (value < 1 and type(value) is int):
            return None
        found[name] = value
    return found


def seconds_of(duration: str) -> float:
    """Read a duration: ``90``, ``90s``, ``10m``, ``1.5h``.

    Raises:
        ConfigError: It is none, or not over 0.
    """
    number, unit = duration[:-1], duration[-1:]
    if unit.isdigit():
        number, unit = duration, "s"
    try:
        seconds = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except (ValueError, KeyError):
        seconds = 0.0
    if not 0 < seconds < _LONGEST_S:
        raise ConfigError(
            f"budget is {duration!r}: expected a duration over 0, in seconds or as 90s, 10m, 1h"
        )
    return seconds


def settings() -> tuple[Field[Any], ...]:
    """Return the settings in order, with their help texts in `metadata`."""
    return fields(RunConfig)


def choices_of(setting: Field[Any]) -> tuple[str, ...] | None:
    """Return the words that a setting may be; None if it also takes other values."""
    annotation = _types()[setting.name]
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else None


def parse_setting(name: str, text: str) -> Any:
    """Turn a flag's text into a setting's value.

    Raises:
        ConfigError: The text is no value of the setting's type.
    """
    value: Any = text
    for kind in _members(_types()[name]):
        if kind in (int, float):
            try:
                value = kind(text)
            except ValueError:
                continue
            break
    setting = next(setting for setting in settings() if setting.name == name)
    _check(setting, _members(_types()[name]), value)
    return value


def read_config(path: Path, base: RunConfig | None = None) -> RunConfig:
    """Read a run file.

    Args:
        path: A TOML file whose keys are names of settings.
        base: What holds where the file says nothing; the defaults if None.

    Returns:
        The settings.

    Raises:
        ConfigError: The file cannot be read, or a key is unknown or its value cannot be used.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or numbers without end
        raise ConfigError(f"{path} is no TOML file: {error}") from error
    try:
        return with_settings(base or RunConfig(), values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def with_settings(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Replace some settings.

    Raises:
        ConfigError: A key is unknown (the nearest known one is named) or a value cannot be used.
    """
    known = [setting.name for setting in settings()]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0)[0]
            advice = f"did you mean {near!r}? known: {', '.join(known)}"
            raise ConfigError(f"unknown setting {key!r}: {advice}")
    return replace(config, **values)


def to_toml(config: RunConfig) -> str:
    """Write settings as a run file that `read_config` reads back."""
    lines = [
        # JSON's escapes are TOML's, too; but TOML wants DEL escaped as well.
        f"{name} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
        for name, value in asdict(config).items()
        if value is not None
    ]
    return "\n".join(lines) + "\n"


def _types() -> dict[str, Any]:
    return typing.get_type_hints(RunConfig)


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def _check(setting: Field[Any], kinds: tuple[Any, ...], value: Any) -> None:
    expected: list[str] = []
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            words = typing.get_args(kind)
            if value in words:
                return
            expected.extend(words)
        elif kind in (int, float):
            wanted = _wanted_number(setting, kind, value)
            if wanted is None:
                return
            expected.append(wanted)
        elif type(value) is kind:
            return
        elif kind is str:
            expected.append("text")
    raise ConfigError(f"{setting.name} is {value!r}: expected {' or '.join(expected)}")


def _wanted_number(setting: Field[Any], kind: type, value: Any) -> str | None:
    """Say which number was wanted; None if the value is one."""
    noun = "a whole number" if kind is int else "a number"
    if not (type(value) is int or (kind is float and type(value) is float)):
        return noun
    over, least, most = (setting.metadata[key] for key in ("over", "least", "most"))
    endless = kind is float and not abs(value) <= sys.float_info.max  # true for NaN, too
    if over is not None and (endless or value <= over):
        return f"{noun} over {over}"
    if least is not None and (endless or value < least):
        return f"{noun} of at least {least}"
    if most is not None and value > most:
        return f"{noun} of at most {most}"
    return None
