"""Protocol ``teacher-forced``: what older papers report, here to compare with them; it flatters."""

from collections.abc import Sequence

from locft.evaluation.likelihood import Continuation
from locft.evaluation.protocols import locft
from locft.evaluation.protocols.base import PLAIN_NAMES, Measurable, Protocol
from locft.evaluation.scoring import Item, Result


def measure(model: Measurable, items: Sequence[Item]) -> list[Result]:
    """Count the target's tokens that are the likeliest, given the true ones before: teacher-forced.

    The model sees the right beginning of every target, and need not know where to stop: the scores are
    higher than what it would answer. The end of sequence does not count. Locality takes the unedited
    model's own answer (by ``locft``) as the target; where that is empty, there is nothing to measure.

    Source: Wang et al., EasyEdit (ACL 2024, arXiv 2308.07269), and the papers that measure with it;
    criticised in Yang et al. (arXiv 2502.11177).
    """
    # What is expected of locality prompts was generated, with a space before it or without.
    unknown = [item.prompt for item in items if item.expected is None]
    answers = model.answer(unknown, locft.MAX_NEW_TOKENS) if unknown else {}
    pairs = {
        is_own: [
            (item.prompt, item.expected)
            for item in items
            if item.expected is not None and (item.kind == "locality") == is_own
        ]
        for is_own in (False, True)
    }
    found = {
        is_own: model.continuations(of_kind, as_generated=is_own) for is_own, of_kind in pairs.items()
    }
    return [
        Result(score=None, answer=answers[item.prompt].rstrip())
        if item.expected is None
        else _result(found[item.kind == "locality"][item.prompt, item.expected])
        for item in items
    ]


def _result(text: Continuation) -> Result:
    return Result(
        score=text.share_right, details={"num_tokens": text.num_tokens, "num_right": text.num_right}
    )


PROTOCOL = Protocol(
    name="teacher-forced",
    measure=measure,
    score_names=PLAIN_NAMES,
    meanings={
        "reliability": "target tokens right after a prompt, the true ones given",
        "generalization": "target tokens right after a rephrase, the true ones given",
        "locality": "tokens of the unedited model's answer that are still the likeliest",
    },
    match="share of tokens, teacher-forced",
    is_share=False,
    needs_logits=True,
)
