"""What makes one result better than another, where it carries further and harms more."""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from locft.evaluation.metrics import Floats
from locft.types import Figure

Preference = Literal["generalization", "balanced", "preservation"]
# Points of generalization that one hundredth of a nat of drift takes away.
_PRICES: Mapping[Preference, float] = {"generalization": 0.0, "balanced": 1.0, "preservation": 4.0}
PREFERENCES: tuple[Preference, ...] = tuple(_PRICES)
_ENOUGH = 95.0  # points of reliability; what is missing is taken away


def value_of(scores: Mapping[str, Figure], preference: Preference) -> float:
    """Value a result, in points: generalization, less the price of drift, less missing reliability.

    Args:
        scores: Reliability, generalization and drift, by name.
        preference: What drift costs: nothing, a point for each hundredth of a nat, or four.

    Returns:
        The value; minus infinity where one of the three was not measured.
    """
    reliability, generalization, drift = (
        scores[name].value if name in scores else None
        for name in ("reliability", "generalization", "drift")
    )
    if reliability is None or generalization is None or drift is None:
        return float("-inf")
    found = value_from(
        np.asarray(reliability), np.asarray(generalization), np.asarray(drift), preference
    )
    return float(found)


def value_from(
    reliability: Floats, generalization: Floats, drift: Floats, preference: Preference
) -> Floats:
    """Value results as `value_of` does, many at a time."""
    missing = np.maximum(0.0, _ENOUGH - 100 * reliability)
    found: Floats = 100 * generalization - _PRICES[preference] * 100 * drift - missing
    return found


def rule_of(preference: Preference) -> str:
    """Say how a preference values a result."""
    price = _PRICES[preference]
    harm = f" less {price:g} for each 0.01 nats of drift" if price else ""
    return f"points of generalization{harm}, less one for each point of reliability under {_ENOUGH:.0f}%"
