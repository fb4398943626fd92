"""Scores and their 95% intervals: pure functions of answers and counts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from locft.data.normalise import cut_answer, normalise
from locft.types import Figure

Floats = np.ndarray[Any, np.dtype[np.float64]]

_Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution
_RESAMPLES = 2000
_MAX_DRAWN = 2_000_000  # counts that are in memory at one time
_NONE = Figure(value=None, num=0, reason="the edits hold none")


def is_match(answer: str, expected: str) -> bool:
    """Compare an answer with what was expected, by normalised exact match (the paper's protocol)."""
    return normalise(cut_answer(answer)) == normalise(expected)


def share(successes: int, num: int) -> Figure:
    """Give a share with its Wilson score interval (Wilson 1927; 95%, no continuity correction).

    Args:
        successes: How many of the items count.
        num: How many items there are.

    Returns:
        The share; without a value where there are no items.
    """
    if num == 0:
        return _NONE
    p, z2 = successes / num, _Z95**2
    centre = (p + z2 / (2 * num)) / (1 + z2 / num)
    half = _Z95 / (1 + z2 / num) * np.sqrt(p * (1 - p) / num + z2 / (4 * num * num))
    # At 0 and 1 the interval ends there exactly; rounding may leave it a hair inside.
    low = 0.0 if successes == 0 else float(centre - half)
    high = 1.0 if successes == num else float(centre + half)
    return Figure(value=p, num=num, low=low, high=high)


def mean_per_token(sums: Sequence[float], num_tokens: Sequence[int]) -> Figure:
    """Give a mean per token with its bootstrap interval over passages.

    Tokens of one passage hang together, so passages are resampled (2,000 times, percentile
    interval, fixed seed), not tokens.

    Args:
        sums: Per passage, the sum over its tokens.
        num_tokens: Per passage, how many tokens that was.

    Returns:
        The mean; `num` counts passages.
    """
    if not sums:
        return Figure(value=None, num=0, reason="the text holds no passage of two tokens")
    if len(sums) == 1:
        reason = "one passage gives no interval"
        return Figure(value=sums[0] / num_tokens[0], num=1, reason=reason)
    totals, counts = np.asarray(sums, dtype=float), np.asarray(num_tokens, dtype=float)
    drawn = np.random.default_rng(0).integers(len(totals), size=(_RESAMPLES, len(totals)))
    means = totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = middle_of(means)
    value = float(totals.sum() / counts.sum())
    return Figure(value=value, num=len(totals), low=low, high=high)


def mean(values: Sequence[float], *, least: float = 0.0, most: float = 1.0) -> Figure:
    """Give a mean over items with its bootstrap interval (2,000 resamples, percentiles, fixed seed).

    Where all values are equal there is nothing to resample, which does not make them certain: the
    interval is then that of `unanimous_interval`.

    Source: Efron (1979), Bootstrap methods: another look at the jackknife.

    Args:
        values: One value for each item.
        least: The least that a value can be.
        most: The most.

    Returns:
        The mean; without a value where there are no items.
    """
    if not values:
        return _NONE
    if min(values) == max(values):
        low, high = unanimous_interval(values[0], len(values), least, most)
    else:
        low, high = middle_of(resampled_means(values, np.random.default_rng(0)))
    return Figure(value=float(np.mean(values)), num=len(values), low=low, high=high)


def unanimous_interval(value: float, num: int, least: float, most: float) -> tuple[float, float]:
    """Give a 95% interval for the mean of items that all had the same value.

    Another value that is rarer than p may well not have been seen in n items, where (1 - p)^n = 0.025;
    at worst it is the least or the most that there is.

    Source: Clopper and Pearson (1934), at no failure.

    Args:
        value: What all items had.
        num: How many there were.
        least: The least that a value can be.
        most: The most.

    Returns:
        The interval's ends.
    """
    unseen = 1 - 0.025 ** (1 / num)
    return value - unseen * (value - least), value + unseen * (most - value)


def paired_difference(before: Sequence[float], after: Sequence[float]) -> Figure:
    """Give the mean difference of two models on the same items, with its paired interval.

    What makes an item easy or hard for both cancels out. Where every value is 0 or 1 the difference is
    one of two shares, and the interval is Newcombe's; else it is a bootstrap over items.

    Source: Newcombe (1998), Improved confidence intervals for the difference between binomial
        proportions based on paired data, method 10.

    Args:
        before: One value for each item.
        after: The other model's, in the same order.

    Returns:
        The mean of `after` less `before`; without a value where there are no items.
    """
    pairs = list(zip(before, after, strict=True))
    if not pairs or any(value not in (0, 1) for pair in pairs for value in pair):
        return mean([late - early for early, late in pairs], least=-1.0)
    num = len(pairs)
    both = sum(early == late == 1 for early, late in pairs)
    gained = sum(late > early for early, late in pairs)
    lost = sum(late < early for early, late in pairs)
    now, was = share(both + gained, num), share(both + lost, num)
    value = (gained - lost) / num
    correlation = _correlation(both, gained, lost, num - both - gained - lost)
    down = _joint_error(_below(now), _above(was), correlation)
    up = _joint_error(_above(now), _below(was), correlation)
    return Figure(value=value, num=num, low=max(-1.0, value - down), high=min(1.0, value + up))


def _correlation(both: int, gained: int, lost: int, neither: int) -> float:
    """Give the correlation of two models' successes, less Newcombe's correction for continuity."""
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    if margins == 0:
        return 0.0
    together = float(both * neither - gained * lost)
    if together > 0:
        together = max(together - (both + gained + lost + neither) / 2, 0.0)
    return float(together / np.sqrt(margins))


def _joint_error(one: float, other: float, correlation: float) -> float:
    return float(np.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other)))


def _below(figure: Figure) -> float:
    assert figure.value is not None
    assert figure.low is not None
    return figure.value - figure.low


def _above(figure: Figure) -> float:
    assert figure.value is not None
    assert figure.high is not None
    return figure.high - figure.value


def resampled_means(values: Sequence[float], random: np.random.Generator) -> Floats:
    """Draw as many of some items as there are, with replacement, 2,000 times.

    Args:
        values: One value for each item.
        random: Where the draws come from.

    Returns:
        The means of the draws.
    """
    # How often each value is drawn is multinomial; most items share their values with many others.
    distinct, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    means = np.empty(_RESAMPLES)
    step = max(1, _MAX_DRAWN // len(distinct))
    for start in range(0, _RESAMPLES, step):
        num = min(step, _RESAMPLES - start)
        drawn = random.multinomial(len(values), counts / len(values), size=num)
        means[start : start + num] = drawn @ distinct / len(values)
    return means


def middle_of(means: Floats) -> tuple[float, float]:
    """Give the ends between which 95% of resampled means lie."""
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
