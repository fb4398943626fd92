"""The items that are scored, what two models make of them, and the figures that follow."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from locft.evaluation.metrics import mean, paired_difference, share
from locft.types import KINDS, AnswerRecord, Edit, Figure, Kind

_BY_DEFINITION = "by definition: the unedited model is compared with itself"
_UNSCORED = Figure(value=None, num=0, reason="none of the items could be scored")
_NO_BASE = Figure(value=None, num=0, reason="no unedited model to compare with: name one with --base")


@dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt of an edit, and what is expected of it.

    Attributes:
        edit: Id of the edit.
        kind: What the prompt measures.
        prompt: The prompt.
        target: The edit's target.
        expected: What shall be answered: the target; for locality what the unedited model answers,
            None as long as that is not known.
        old: The answer before the edit, if the edits say so.
    """

    edit: str
    kind: Kind
    prompt: str
    target: str
    expected: str | None
    old: str | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a model makes of an item.

    Attributes:
        score: From 0 to 1; None if there is nothing to measure it by.
        answer: What it answered, where it was asked.
        details: What the score was made of, by name, where that is more than the answer.
    """

    score: float | None
    answer: str | None = None
    details: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A score of two models on the same items.

    Attributes:
        before: The unedited model's; None if there is none.
        after: The scored model's.
        change: The mean difference, with its paired interval (that of `after` alone where the unedited
            model's score holds by definition); None if there is nothing to compare.
    """

    before: Figure | None
    after: Figure
    change: Figure | None


def prompts_of(edits: Iterable[Edit]) -> list[str]:
    """List every prompt that scoring needs an answer to."""
    return [text for edit in edits for text in (edit.prompt, *edit.rephrases, *edit.locality)]


def items_of(edits: Iterable[Edit], kinds: Sequence[Kind] = KINDS) -> list[Item]:
    """List what is scored, in the order of the edits."""
    items: list[Item] = []
    for edit in edits:
        prompts: dict[Kind, tuple[str, ...]] = {
            "reliability": (edit.prompt,),
            "generalization": edit.rephrases,
            "locality": edit.locality,
        }
        items += [
            Item(
                edit=edit.id,
                kind=kind,
                prompt=prompt,
                target=edit.target,
                expected=None if kind == "locality" else edit.target,
                old=edit.old,
            )
            for kind in kinds
            for prompt in prompts[kind]
        ]
    return items


def expect_own_answers(
    items: Sequence[Item], results: Sequence[Result]
) -> tuple[list[Item], list[Result]]:
    """Expect what the unedited model answers, where nothing else is expected; it is right by definition.

    Args:
        items: The items.
        results: What the unedited model makes of them.

    Returns:
        The items to measure another model by, and the unedited model's results.
    """
    known: list[Item] = []
    own: list[Result] = []
    for item, result in zip(items, results, strict=True):
        is_open = item.expected is None and result.answer is not None
        known.append(replace(item, expected=result.answer) if is_open else item)
        own.append(replace(result, score=1.0) if is_open and result.score is None else result)
    return known, own


def guesses_for(edits: Iterable[Edit]) -> dict[str, str]:
    """Guess what an edited model answers to the prompts that it was trained on: their targets.

    Nothing is guessed of other prompts. A wrong guess costs a pass, so guessing pays only where most are
    right.
    """
    return {edit.prompt: edit.target for edit in edits}


def join_results(
    protocol: str,
    context: str,
    items: Iterable[Item],
    before: Sequence[Result] | None,
    after: Sequence[Result],
) -> list[AnswerRecord]:
    """Join what two models make of the same items.

    Args:
        protocol: Name of the protocol.
        context: Name of the context.
        items: The items.
        before: The unedited model's results; None if there is no such model.
        after: The scored model's.

    Returns:
        A record for each item, in order, without causes.
    """
    nothing = Result(score=None)
    return [
        AnswerRecord(
            protocol=protocol,
            context=context,
            edit=item.edit,
            kind=item.kind,
            prompt=item.prompt,
            expected=item.expected,
            before=early.answer,
            after=late.answer,
            score_before=early.score,
            score_after=late.score,
            details_before=early.details,
            details_after=late.details,
        )
        for item, early, late in zip(items, before or [nothing] * len(after), after, strict=True)
    ]


def compare(
    records: Sequence[AnswerRecord], kind: Kind, *, is_share: bool, is_own_standard: bool
) -> Compared:
    """Draw the figures of one kind of items.

    Args:
        records: Of one protocol and context.
        kind: The kind.
        is_share: Whether scores are 0 or 1, so that their mean is a share (with Wilson's interval).
        is_own_standard: Whether the unedited model's score holds by definition.

    Returns:
        Both models' figures and the paired change. Items without a score do not count.
    """
    of_kind = [record for record in records if record.kind == kind]
    if of_kind and is_own_standard and all(record.expected is None for record in of_kind):
        return Compared(before=None, after=_NO_BASE, change=None)
    after = [record.score_after for record in of_kind if record.score_after is not None]
    pairs = [
        (record.score_before, record.score_after)
        for record in of_kind
        if record.score_before is not None and record.score_after is not None
    ]
    if of_kind and not after:
        return Compared(before=None, after=_UNSCORED, change=None)
    if of_kind and not pairs:  # there is no unedited model
        return Compared(before=None, after=_figure(after, is_share=is_share), change=None)
    # Both on the same items.
    before, after = [early for early, _ in pairs], [late for _, late in pairs]
    of_after = _figure(after, is_share=is_share)
    of_before = _figure(before, is_share=is_share)
    change = paired_difference(before, after)
    if is_own_standard and of_before.value is not None:
        value = of_before.value
        of_before = replace(of_before, low=value, high=value, reason=_BY_DEFINITION)
        change = _less(of_after, value)
    return Compared(before=of_before, after=of_after, change=change)


def _less(figure: Figure, standard: float) -> Figure:
    """Give how far a figure is from a value that holds by definition, and so is no less sure."""
    if figure.value is None or figure.low is None or figure.high is None:
        return figure
    return replace(
        figure,
        value=figure.value - standard,
        low=figure.low - standard,
        high=figure.high - standard,
    )


def drift_of_unedited(num_passages: int) -> Figure:
    """Give the drift of the unedited model from itself."""
    return Figure(value=0.0, num=num_passages, low=0.0, high=0.0, reason=_BY_DEFINITION)


def _figure(values: Sequence[float], *, is_share: bool) -> Figure:
    return share(round(sum(values)), len(values)) if is_share else mean(values)
