"""Why an answer is not the one that was expected."""

import difflib

from locft.data.normalise import cut_answer, normalise
from locft.types import Cause, Kind

CAUSES: dict[Cause, str] = {
    "empty": "nothing is left of the answer once it is normalised",
    "rambling": "the answer begins right and then goes on",
    "contained": "the answer holds what was expected, among other words",
    "near miss": "the answer is spelt almost so, or is a part of what was expected",
    "right elsewhere": "the answer is wrong here, and right in another context that was measured",
    "wrong fact": "the answer says something else",
    "answered otherwise": "the same of a locality prompt, where nothing is right or wrong",
}

# Share of letters in common, in order, from which on two answers count as spelt almost alike.
_ALMOST = 0.8


def find_cause(
    answer: str, expected: str, kind: Kind = "reliability", *, is_right_elsewhere: bool = False
) -> Cause:
    """Find why an answer does not match; the first cause that holds counts.

    Args:
        answer: The answer, which is not a match.
        expected: What was expected.
        kind: What the prompt measures.
        is_right_elsewhere: Whether the same prompt is answered right in another context.

    Returns:
        The cause.
    """
    got, wanted = normalise(cut_answer(answer)), normalise(expected)
    words, wanted_words = got.split(), wanted.split()
    if words and wanted_words:
        if words[: len(wanted_words)] == wanted_words:
            return "rambling"
        if f" {wanted} " in f" {got} ":
            return "contained"
        is_part = set(words) <= set(wanted_words)
        if is_part or difflib.SequenceMatcher(None, got, wanted, autojunk=False).ratio() >= _ALMOST:
            return "near miss"
    if is_right_elsewhere:
        return "right elsewhere"
    if not words:
        return "empty"
    return "answered otherwise" if kind == "locality" else "wrong fact"
