"""Scores and their 95% intervals: pure functions of answers and counts."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from locft.data.normalise import cut_answer, normalise
from locft.types import Edit, Figure

_Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution
_RESAMPLES = 2000


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
        return Figure(value=None, num=0, reason="the edits hold none")
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
    low, high = np.quantile(means, [0.025, 0.975])
    value = float(totals.sum() / counts.sum())
    return Figure(value=value, num=len(totals), low=float(low), high=float(high))


def reliability(edits: Iterable[Edit], answers: Mapping[str, str]) -> Figure:
    """Score the share of prompts that are answered with the target."""
    return _share_of_matches(((edit.prompt, edit.target) for edit in edits), answers)


def generalization(edits: Iterable[Edit], answers: Mapping[str, str]) -> Figure:
    """Score the share of rephrases that are answered with the target."""
    pairs = ((text, edit.target) for edit in edits for text in edit.rephrases)
    return _share_of_matches(pairs, answers)


def locality(
    edits: Iterable[Edit], answers: Mapping[str, str], base_answers: Mapping[str, str]
) -> Figure:
    """Score the share of locality prompts that are answered as the unedited model answers them."""
    pairs = ((text, base_answers[text]) for edit in edits for text in edit.locality)
    return _share_of_matches(pairs, answers)


def _share_of_matches(pairs: Iterable[tuple[str, str]], answers: Mapping[str, str]) -> Figure:
    matches = [is_match(answers[prompt], expected) for prompt, expected in pairs]
    return share(sum(matches), len(matches))
