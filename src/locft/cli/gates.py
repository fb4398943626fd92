"""Gates: conditions on the scores that decide the exit status."""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from locft.errors import ConfigError
from locft.report.words import SCORE_NAMES
from locft.types import Scores

_COMPARE: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Gate:
    """A condition such as ``reliability>=0.95``."""

    score: str
    sign: str
    bound: float

    def failure(self, scores: Scores) -> str | None:
        """Say why the gate does not hold; None if it holds. A score without value fails."""
        value = getattr(scores, self.score).value
        wanted = f"{self.score}{self.sign}{self.bound:g}"
        if value is None:
            return f"gate {wanted} failed: {self.score} was not measured"
        if _COMPARE[self.sign](value, self.bound):
            return None
        return f"gate {wanted} failed: {self.score} is {value:.4g}"


def parse_gate(text: str) -> Gate:
    """Read a gate.

    Raises:
        ConfigError: It names no score, no sign or no number.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*(\d+(?:\.\d+)?)\s*", text, re.ASCII)
    if match is None or match[1] not in SCORE_NAMES:
        raise ConfigError(
            f"gate {text!r} cannot be read: expected SCORE>=X or SCORE<=X with SCORE one of "
            f"{', '.join(SCORE_NAMES)}"
        )
    return Gate(match[1], match[2], float(match[3]))
