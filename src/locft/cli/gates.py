"""Gates: conditions on the scores that decide the exit status."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from locft.errors import ConfigError
from locft.report.words import PROTOCOL_SCORES, SCORE_NAMES
from locft.types import Figure

# A score by its name alone is the main protocol's.
_NAMES = dict.fromkeys(
    (
        *SCORE_NAMES,
        *(name for names in PROTOCOL_SCORES.values() for name in names),
        *(f"{protocol}.{name}" for protocol, names in PROTOCOL_SCORES.items() for name in names),
    )
)
_COMPARE: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Gate:
    """A condition such as ``reliability>=0.95`` or ``wild.reliability>=0.95``."""

    score: str
    sign: str
    bound: float

    def failure(self, figures: Mapping[str, Figure]) -> str | None:
        """Say why the gate does not hold; None if it holds. A score without value fails."""
        figure = figures.get(self.score)
        value = None if figure is None else figure.value
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
    match = re.fullmatch(r"\s*([\w.-]+)\s*(>=|<=)\s*(\d+(?:\.\d+)?)\s*", text, re.ASCII)
    if match is None or match[1] not in _NAMES:
        raise ConfigError(
            f"gate {text!r} cannot be read: expected SCORE>=X or SCORE<=X with SCORE one of "
            f"{', '.join(_NAMES)}"
        )
    bound = float(match[3])
    if bound > 1 and match[1] != "drift":
        raise ConfigError(f"gate {text!r} can never matter: {match[1]} is a share, from 0 to 1")
    return Gate(match[1], match[2], bound)
