"""The methods that edit a model, each one small file; `METHODS` names them all."""

from collections.abc import Sequence

from locft.errors import ConfigError
from locft.methods import (
    adalora,
    alphaedit,
    ft_l,
    ft_m,
    full,
    lora,
    memit,
    rect,
    rome,
    roselora,
    ultraedit,
)
from locft.methods.base import Editor, Method, Plan, Tuning

__all__ = ["METHODS", "AnyMethod", "Editor", "Method", "Plan", "Tuning", "choose_methods"]

AnyMethod = Method | Editor

METHODS: dict[str, AnyMethod] = {
    method.name: method
    for method in (
        ft_m.METHOD,
        lora.METHOD,
        adalora.METHOD,
        full.METHOD,
        ft_l.METHOD,
        roselora.METHOD,
        rome.METHOD,
        memit.METHOD,
        rect.METHOD,
        alphaedit.METHOD,
        ultraedit.METHOD,
    )
}


def choose_methods(names: Sequence[str]) -> tuple[AnyMethod, ...]:
    """Find methods by their names.

    Raises:
        ConfigError: A name is unknown or given twice, or there is none.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names or len(set(names)) < len(names):
        what = f"unknown method {unknown[0]!r}" if unknown else "methods are named once each"
        raise ConfigError(f"{what}: expected one or more of {', '.join(METHODS)}")
    return tuple(METHODS[name] for name in names)
