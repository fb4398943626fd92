"""How figures are worded, the same in every report and on the terminal."""

from collections.abc import Sequence

from locft.types import Figure, Scores

_NUM_NAMED = 4

SCORE_NAMES = ("reliability", "generalization", "locality", "drift")
# The names of each protocol's scores, without loading what measures them.
PROTOCOL_SCORES = {
    "locft": SCORE_NAMES[:3],
    "wild": SCORE_NAMES[:3],
    "teacher-forced": SCORE_NAMES[:3],
    "likelihood": ("efficacy", "paraphrase", "neighbourhood"),
}
MEANINGS = {
    "reliability": "prompts answered with the target",
    "generalization": "rephrases answered with the target",
    "locality": "other prompts answered as before the edit",
    "drift": "change of predictions on neutral text, nats per token",
}


def figure_text(name: str, figure: Figure) -> str:
    """Word a figure with its interval and count: ``97.0% [93.6, 98.6] of 200``."""
    if figure.value is None:
        return f"not measured ({figure.reason})" if figure.reason else "not measured"
    if name == "drift":
        if figure.value == 0 and figure.reason:
            return "0 by definition"
        if figure.low is None or figure.high is None:
            return f"{figure.value:.4f} ({figure.reason})"
        return f"{figure.value:.4f} [{figure.low:.4f}, {figure.high:.4f}], {figure.num:,} passages"
    if figure.reason:
        return f"{100 * figure.value:.0f}% by definition"
    assert figure.low is not None
    assert figure.high is not None
    return (
        f"{100 * figure.value:.1f}% [{100 * figure.low:.1f}, {100 * figure.high:.1f}] of {figure.num:,}"
    )


def change_text(figure: Figure) -> str:
    """Word the difference of two shares on the same items: ``+12.0 [+8.5, +15.5]``, in points."""
    if figure.value is None or figure.low is None or figure.high is None:
        return ""
    return f"{100 * figure.value:+.1f} [{100 * figure.low:+.1f}, {100 * figure.high:+.1f}]"


def verdict(scores: Scores, num_edits: int) -> str:
    """Say in one line what the edits did, the harm as plainly as the success."""
    taken = round((scores.reliability.value or 0) * scores.reliability.num)
    parts = [f"{taken:,} of {num_edits:,} edits took"]
    if scores.generalization.value is not None:
        parts.append(f"{100 * scores.generalization.value:.0f}% of rephrases follow")
    if scores.locality.value is not None:
        parts.append(
            f"{100 * (1 - scores.locality.value):.0f}% of other prompts are answered differently"
        )
    if scores.drift.value is not None:
        parts.append(f"predictions on neutral text moved by {scores.drift.value:.3f} nats per token")
    return "; ".join(parts) + "."


def counted(num: int, noun: str, plural: str | None = None) -> str:
    """Word a count: ``1 edit``, ``1,000 edits``."""
    return f"{num:,} {noun if num == 1 else plural or noun + 's'}"


def some(names: Sequence[str]) -> str:
    """List names, the first ones if they are many: ``a, b, c and 9 more``."""
    rest = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


def bytes_text(num: int) -> str:
    """Word a size: ``3.5 MB``."""
    size = float(num)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.95 or unit == "GB":  # else it would be worded as 1000.0
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def seconds_text(seconds: float) -> str:
    """Word a duration: ``2.1 s``, ``3 min 05 s``, ``1 h 02 min``."""
    if seconds < 59.95:  # else it would be worded as 60.0
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
