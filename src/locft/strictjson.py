"""JSON as files that must not be ambiguous hold it: strict about keys, numbers and depth."""

import json
import math
from collections import Counter
from itertools import accumulate
from typing import Any, NoReturn, TypeGuard

from locft.errors import brief

# Nothing that is read here is deeper than ten; the parser itself recurses.
MAX_DEPTH = 100

# Python turns that many digits into a number, and back, whatever its settings; more take quadratic time.
_MAX_NUMBER_CHARS = 640

# Brackets as steps up and down, of a signed byte each; all else is left out.
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))


class StrictJsonError(ValueError):
    """JSON that other readers may take, and may take differently.

    Attributes:
        code: A short stable name of what is wrong.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def parse_json(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Args:
        raw: The text in UTF-8.

    Returns:
        The object.

    Raises:
        ValueError: `raw` is anything else; says what.
    """
    value = load_json(raw.decode())
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def load_json(text: str) -> object:
    """Parse JSON strictly: no key twice, no NaN or Infinity, no number or nesting without end.

    Args:
        text: The text.

    Returns:
        What it says.

    Raises:
        StrictJsonError: It is JSON in a wider sense.
        json.JSONDecodeError: It is no JSON.
    """
    # Before parsing: the parser would meet its own limit in the middle of its work.
    if _depth(text) > MAX_DEPTH:
        raise StrictJsonError("too-deep", f"JSON is nested too deeply: over {MAX_DEPTH} levels")
    value: object = STRICT_DECODER.decode(text)
    return value


def _depth(text: str) -> int:
    """Tell how deeply a text is nested, as far as it is JSON, in linear time."""
    if "\\" in text:  # escapes, so that every quote that is left begins or ends a string
        text = text.replace("\\\\", "").replace('\\"', "")
    brackets = "".join(text.split('"')[::2]).encode("ascii", "ignore")
    steps = memoryview(brackets.translate(_STEPS, _NO_BRACKETS)).cast("b")
    return max(accumulate(steps), default=0)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise StrictJsonError(
            "duplicate-key", f"JSON has an object with the same key twice: {brief(key)}"
        )
    return record


def _whole_number(text: str) -> int:
    return int(text) if len(text) <= _MAX_NUMBER_CHARS else _refuse_number(text)


def _number(text: str) -> float:
    number = float(text) if len(text) <= _MAX_NUMBER_CHARS else _refuse_number(text)
    return number if math.isfinite(number) else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    raise StrictJsonError(
        "number-too-large",
        f"JSON has a number that is too large, or has over {_MAX_NUMBER_CHARS} digits: {brief(text)}",
    )


def _refuse_constant(name: str) -> NoReturn:
    raise StrictJsonError("malformed-json", f"JSON has no {name}")


STRICT_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys,
    parse_float=_number,
    parse_int=_whole_number,
    parse_constant=_refuse_constant,
)


def is_whole_numbers(value: object) -> TypeGuard[list[int]]:
    """Tell whether a JSON value is a list of whole numbers, zero or more, as a shape is.

    Args:
        value: The value.

    Returns:
        True if it is; booleans do not count as numbers.
    """
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
