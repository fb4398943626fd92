"""How figures are worded, the same in every report and on the terminal."""

import json
from collections.abc import Mapping, Sequence

from locft.report.schema import HeldBackInfo
from locft.types import Figure

_NUM_NAMED = 4
_JOINERS = "\u200c\u200d"

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
    if figure.low is None or figure.high is None:
        return f"{100 * figure.value:.1f}% of {figure.num:,}"
    return (
        f"{100 * figure.value:.1f}% [{100 * figure.low:.1f}, {100 * figure.high:.1f}] of {figure.num:,}"
    )


def change_text(figure: Figure) -> str:
    """Word the difference of two shares on the same items: ``+12.0 [+8.5, +15.5]``, in points."""
    if figure.value is None or figure.low is None or figure.high is None:
        return ""
    return f"{100 * figure.value:+.1f} [{100 * figure.low:+.1f}, {100 * figure.high:+.1f}]"


def limit_in_words(held_back: HeldBackInfo, most: float) -> str:
    """Say whether training kept within its limit of drift, and by how much it did not."""
    where = f"on {held_back.num_tokens:,} tokens held back, of at most {most:g}"
    if held_back.is_met:
        return f"drift is {held_back.drift:.4f} {where}"
    return (
        f"the edits were not learnt within the limit: the last epoch came to a drift of "
        f"{held_back.wanted:.4f} {where}; the update was made smaller after "
        f"{counted(held_back.num_shrunk, 'epoch')}, to {held_back.drift:.4f} in the end"
    )


def verdict(scores: Mapping[str, Figure], num_edits: int, *, by_answers: bool = True) -> str:
    """Say in one line what the edits did, the harm as plainly as the success.

    Args:
        scores: By name, drift included where it was measured.
        num_edits: How many edits there are.
        by_answers: Whether the scores count answers; else they are only named.
    """
    parts = []
    for name, figure in scores.items():
        value = figure.value
        if value is None:
            continue
        if name == "drift":
            parts.append(f"predictions on neutral text moved by {value:.3f} nats per token")
        elif not by_answers:
            parts.append(f"{name} {100 * value:.0f}%")
        elif name == "reliability":
            parts.append(f"{round(value * figure.num):,} of {num_edits:,} edits took")
        elif name == "generalization":
            parts.append(f"{round(value * figure.num):,} of {figure.num:,} rephrases follow")
        elif name == "locality":
            changed = figure.num - round(value * figure.num)
            parts.append(f"{changed:,} of {figure.num:,} other prompts are answered differently")
    return "; ".join(parts or ["nothing was measured"]) + "."


def one_line(text: str, limit: int | None = 200) -> str:
    """Show any text in one line: nothing steers whoever displays it, and nothing is endless.

    Args:
        text: The text.
        limit: How many characters are shown at most; None for all.

    Returns:
        The text with white space as single spaces where it would break the line, and with whatever else
        cannot be seen, such as what turns the direction of writing, as a JSON escape. What joins and
        parts letters (U+200C, U+200D) stays, as scripts and emoji need it.
    """
    flat = "".join(map(_seen, text))
    return flat if limit is None or len(flat) <= limit else f"{flat[: limit - 1]}…"


def _seen(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    return " " if character.isspace() else json.dumps(character)[1:-1]


def setting_text(value: object) -> str:
    """Word the value of a setting: numbers in as few digits as tell them apart for people."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else str(value)


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
