"""The methods that edit a model by training, each one small file; `METHODS` names them all."""

from collections.abc import Sequence

from locft.errors import ConfigError
from locft.methods import adalora, ft_m, full, lora
from locft.methods.base import Method, Plan, Tuning

__all__ = ["METHODS", "Method", "Plan", "Tuning", "choose_methods"]

METHODS: dict[str, Method] = {
    method.name: method for method in (ft_m.METHOD, lora.METHOD, adalora.METHOD, full.METHOD)
}


def choose_methods(names: Sequence[str]) -> tuple[Method, ...]:
    """Find methods by their names.

    Raises:
        ConfigError: A name is unknown or given twice, or there is none.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names or len(set(names)) < len(names):
        what = f"unknown method {unknown[0]!r}" if unknown else "methods are named once each"
        raise ConfigError(f"{what}: expected one or more of {', '.join(METHODS)}")
    return tuple(METHODS[name] for name in names)
