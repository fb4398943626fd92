"""Protocol ``locft``: the paper's, and the default."""

from collections.abc import Sequence

from locft.evaluation.metrics import is_match
from locft.evaluation.protocols.base import PLAIN_NAMES, Measurable, Protocol
from locft.evaluation.scoring import Item, Result

MAX_NEW_TOKENS = 32


def measure(model: Measurable, items: Sequence[Item]) -> list[Result]:
    """Match greedy answers of at most 32 new tokens with the target, exactly, once normalised.

    An answer ends at the first ".", newline or end of sequence. Normalised is: in lower case, without
    ASCII punctuation and the words a, an and the, with single spaces. Locality compares with the
    unedited model's answer in the same way. All edits are in.

    Source: Yang et al., Fine-tuning Done Right in Model Editing (ICLR 2026, arXiv 2509.22072),
    section 5.
    """
    return match_answers(model, items, MAX_NEW_TOKENS)


def match_answers(model: Measurable, items: Sequence[Item], max_new_tokens: int) -> list[Result]:
    """Answer every item, and score by normalised exact match."""
    answers = model.answer([item.prompt for item in items], max_new_tokens)
    return [
        Result(
            score=None
            if item.expected is None
            else float(is_match(answers[item.prompt], item.expected)),
            answer=answers[item.prompt].strip(),
        )
        for item in items
    ]


PROTOCOL = Protocol(
    name="locft",
    measure=measure,
    score_names=PLAIN_NAMES,
    meanings={
        "reliability": "prompts answered with the target",
        "generalization": "rephrases answered with the target",
        "locality": "other prompts answered as before the edit",
    },
    match="normalised exact match",
    max_new_tokens=MAX_NEW_TOKENS,
    shows_answers=True,
)
