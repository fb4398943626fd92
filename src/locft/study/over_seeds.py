"""Means over seeds, with their intervals."""

import math
import statistics
from collections.abc import Sequence

from locft.errors import InputError
from locft.types import Figure

# Two-sided 95% quantiles of Student's t distribution, for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = len(_T95) + 1


def mean_over_seeds(figures: Sequence[Figure], most: float = 1.0) -> Figure:
    """Average a score over seeds.

    Args:
        figures: The score of each seed; one at least.
        most: The largest value that there can be; 0 is the least.

    Returns:
        The mean, with Student's t interval over the seeds, cut where no value can be, and their number
        as `num`; of a single seed its own figure. Without a value where a seed has none.

    Raises:
        InputError: There are more than ten.
    """
    if len(figures) > MOST_SEEDS:
        raise InputError(f"{len(figures):,} seeds: expected at most {MOST_SEEDS}")
    values = [figure.value for figure in figures if figure.value is not None]
    if len(figures) == 1 or len(values) < len(figures):
        return figures[0] if len(values) == len(figures) else Figure(value=None, num=len(values))
    mean = statistics.fmean(values)
    half = _T95[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    low, high = max(0.0, mean - half), min(most, mean + half)
    return Figure(value=mean, num=len(values), low=low, high=high)
