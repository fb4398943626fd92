"""Puts answers and drift together into the scores of one model on one set of edits."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from locft.evaluation.metrics import generalization, is_match, locality, reliability
from locft.types import Edit, Figure, Scores

_BY_DEFINITION = "by definition: the unedited model is compared with itself"


@dataclass(frozen=True, kw_only=True)
class AnswerRecord:
    """What was answered to one prompt, before and after.

    Attributes:
        edit: Id of the edit that the prompt belongs to.
        kind: What the prompt measures.
        prompt: The prompt.
        expected: The target; for locality the unedited model's own answer. None if unknown.
        before: The unedited model's answer; None if there is no unedited model.
        after: The scored model's answer.
        match_before: Whether `before` is what was expected.
        match_after: Whether `after` is what was expected.
    """

    edit: str
    kind: Literal["reliability", "generalization", "locality"]
    prompt: str
    expected: str | None
    before: str | None
    after: str
    match_before: bool | None
    match_after: bool | None


def prompts_of(edits: Iterable[Edit]) -> list[str]:
    """List every prompt that scoring needs an answer to."""
    return [text for edit in edits for text in (edit.prompt, *edit.rephrases, *edit.locality)]


def guesses_for(edits: Iterable[Edit]) -> dict[str, str]:
    """Guess what an edited model answers to the prompts that it was trained on: their targets.

    Nothing is guessed of other prompts. A wrong guess costs a pass, so guessing pays only where most are
    right.
    """
    return {edit.prompt: edit.target for edit in edits}


def score(
    edits: Sequence[Edit],
    answers: Mapping[str, str],
    base_answers: Mapping[str, str] | None,
    drift: Figure | None,
) -> Scores:
    """Score a model, all edits being in.

    Args:
        edits: The edits.
        answers: The model's answer to each prompt of `prompts_of`.
        base_answers: The unedited model's answers; None if there is no unedited model.
        drift: The drift from the unedited model; None if there is none.

    Returns:
        The scores; locality and drift are without value where there is no unedited model.
    """
    missing = Figure(value=None, num=0, reason="no unedited model to compare with: name one with --base")
    return Scores(
        reliability=reliability(edits, answers),
        generalization=generalization(edits, answers),
        locality=missing if base_answers is None else locality(edits, answers, base_answers),
        drift=drift or missing,
    )


def score_unedited(edits: Sequence[Edit], answers: Mapping[str, str], num_passages: int) -> Scores:
    """Score the unedited model, which is its own standard for locality and drift."""
    own = locality(edits, answers, answers)
    if own.value is not None:
        own = Figure(value=1.0, num=own.num, low=1.0, high=1.0, reason=_BY_DEFINITION)
    return Scores(
        reliability=reliability(edits, answers),
        generalization=generalization(edits, answers),
        locality=own,
        drift=Figure(value=0.0, num=num_passages, low=0.0, high=0.0, reason=_BY_DEFINITION),
    )


def answer_records(
    edits: Iterable[Edit], answers: Mapping[str, str], base_answers: Mapping[str, str] | None
) -> Iterator[AnswerRecord]:
    """List every answer beside what was expected, in the order of the edits."""
    for edit in edits:
        yield _record(edit, "reliability", edit.prompt, edit.target, answers, base_answers)
        for text in edit.rephrases:
            yield _record(edit, "generalization", text, edit.target, answers, base_answers)
        for text in edit.locality:
            own = None if base_answers is None else base_answers[text]
            yield _record(edit, "locality", text, own, answers, base_answers)


def _record(
    edit: Edit,
    kind: Literal["reliability", "generalization", "locality"],
    prompt: str,
    expected: str | None,
    answers: Mapping[str, str],
    base_answers: Mapping[str, str] | None,
) -> AnswerRecord:
    before = None if base_answers is None else base_answers[prompt]
    return AnswerRecord(
        edit=edit.id,
        kind=kind,
        prompt=prompt,
        expected=expected,
        before=before,
        after=answers[prompt],
        match_before=None if before is None or expected is None else is_match(before, expected),
        match_after=None if expected is None else is_match(answers[prompt], expected),
    )
