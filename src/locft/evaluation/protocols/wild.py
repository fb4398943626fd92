"""Protocol ``wild``: longer answers, judged by another model where one is at hand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from locft.evaluation.protocols import locft
from locft.evaluation.protocols.base import Measurable, Protocol
from locft.evaluation.scoring import Item, Result

MAX_NEW_TOKENS = 50

Triple = tuple[str, str, str]
Judge = Callable[[Sequence[Triple]], Mapping[Triple, bool | None]]


def measure(model: Measurable, items: Sequence[Item]) -> list[Result]:
    """Match greedy answers of at most 50 new tokens with the target, exactly, once normalised.

    As ``locft``, with longer answers; `judged_by` has another model judge them instead.

    Source: Yang et al., The Mirage of Model Editing (arXiv 2502.11177): free generation, no teacher
    forcing, and exact match where no judge is at hand.
    """
    return locft.match_answers(model, items, MAX_NEW_TOKENS)


def judged_by(judge: Judge) -> Protocol:
    """Make the protocol with a judge.

    Args:
        judge: Says of prompt, target and answer whether the answer says the same as the target; None
            is no verdict.

    Returns:
        The protocol.
    """

    def measure_judged(model: Measurable, items: Sequence[Item]) -> list[Result]:
        """Judge by another model whether greedy answers of at most 50 new tokens say the target.

        An answer without a verdict is left out. Locality has no target to be judged by, and is
        compared as in ``locft``.

        Source: Yang et al., The Mirage of Model Editing (arXiv 2502.11177): a model as the judge.
        """
        results = measure(model, items)
        triples = [
            (item.prompt, item.target, result.answer or "")
            for item, result in zip(items, results, strict=True)
        ]
        verdicts = judge(
            [triple for item, triple in zip(items, triples, strict=True) if item.kind != "locality"]
        )
        return [
            result if item.kind == "locality" else replace(result, score=_score_of(verdicts[triple]))
            for item, triple, result in zip(items, triples, results, strict=True)
        ]

    return replace(PROTOCOL, measure=measure_judged, match="a judge's verdict")


def _score_of(verdict: bool | None) -> float | None:
    return None if verdict is None else float(verdict)


PROTOCOL = replace(locft.PROTOCOL, name="wild", measure=measure, max_new_tokens=MAX_NEW_TOKENS)
