"""JSON as files that must not be ambiguous hold it: strict about keys, constants and text."""

import json
from typing import Any, NoReturn, TypeGuard


def parse_json(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no key twice, no NaN or Infinity.

    Args:
        raw: The text.

    Returns:
        The object.

    Raises:
        ValueError: `raw` is anything else; says what.
    """
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("JSON has an object with the same key twice")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


def is_whole_numbers(value: object) -> TypeGuard[list[int]]:
    """Tell whether a JSON value is a list of whole numbers, zero or more, as a shape is.

    Args:
        value: The value.

    Returns:
        True if it is; booleans do not count as numbers.
    """
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
