"""What can be wrong with an edits file, and how a person is told."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from locft.errors import printable

_NUM_SHOWN_CHARS = 60
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Problem:
    """One finding about an edits file.

    Attributes:
        level: An ``error`` forbids the use of the file; a ``warning`` does not.
        code: A short stable name, such as ``unknown-field``.
        where: ``line 3``, ``record [2]``, or empty for the file as a whole.
        message: What is wrong, what was expected, and what to do about it.
    """

    level: Literal["error", "warning"]
    code: str
    where: str
    message: str


def shown(text: str) -> str:
    """Quote a text of the user's for a message.

    Control characters and lone surrogates come out escaped, so that a message can always be
    printed and never steers the terminal.

    Args:
        text: Any string.

    Returns:
        The quoted text, shortened if it is long.
    """
    if len(text) > _NUM_SHOWN_CHARS:
        return repr(text[:_NUM_SHOWN_CHARS]) + "..."
    return repr(text)


def kind_of(value: object) -> str:
    """Name the kind of a JSON value, as a message would.

    Args:
        value: Anything that the json module returns.

    Returns:
        A noun phrase, such as ``a list``.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"


def format_problems(problems: Iterable[Problem], path: Path, limit: int | None = None) -> str:
    """Render problems for a person, one line each in the order of the file, and their count.

    Args:
        problems: The problems of one file, in any order.
        path: The file that they are about.
        limit: The most problems to show; errors are shown in preference to warnings.

    Returns:
        Lines such as ``edits.jsonl: line 3: error: `target` is empty [empty-field]``; the last
        one counts errors and warnings.
    """
    ordered = sorted(problems, key=_position)
    num_errors = sum(problem.level == "error" for problem in ordered)
    by_weight = sorted(ordered, key=lambda problem: problem.level != "error")
    kept = sorted(by_weight[:limit], key=_position)
    lines = [_line(problem, path) for problem in kept]
    if len(kept) < len(ordered):
        lines.append(f"{path}: {len(ordered) - len(kept):,} more not shown")
    lines.append(
        f"{path}: {_count(num_errors, 'error')}, {_count(len(ordered) - num_errors, 'warning')}"
    )
    # A line feed in a name must not make a line of its own.
    return "\n".join(map(printable, lines))


def _position(problem: Problem) -> int:
    number = _NUMBER.search(problem.where)
    return int(number.group()) if number else -1


def _line(problem: Problem, path: Path) -> str:
    place = f"{path}: {problem.where}" if problem.where else str(path)
    return f"{place}: {problem.level}: {problem.message} [{problem.code}]"


def _count(num: int, noun: str) -> str:
    return f"{num:,} {noun}" if num == 1 else f"{num:,} {noun}s"
