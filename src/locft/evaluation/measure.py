"""Puts items to models: every protocol in every context that is asked for, before and after."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from locft.data.contexts import Context
from locft.evaluation.causes import find_cause
from locft.evaluation.metrics import is_match
from locft.evaluation.protocols import Measurable, Protocol
from locft.evaluation.scoring import Item, Result, expect_own_answers, join_results
from locft.types import AnswerRecord, Kind


@dataclass(frozen=True)
class Way:
    """One way of scoring: a protocol in a context."""

    protocol: Protocol
    context: Context


Readers = Mapping[Context, Measurable]
"""A model in one state, by the context that prompts are put into."""


def measure_unedited(
    readers: Readers,
    items: Mapping[Way, Sequence[Item]],
    on_measured: Callable[[Way], None] = lambda _: None,
) -> tuple[dict[Way, list[Item]], dict[Way, list[Result]]]:
    """Measure the unedited model.

    Args:
        readers: The model.
        items: What to measure, in each way.
        on_measured: Called after each way.

    Returns:
        The items, with what it answers expected where nothing else was; and its results.
    """
    known: dict[Way, list[Item]] = {}
    results: dict[Way, list[Result]] = {}
    for way, result in measure_model(readers, items, on_measured).items():
        known[way], results[way] = expect_own_answers(items[way], result)
    return known, results


def measure_model(
    readers: Readers,
    items: Mapping[Way, Sequence[Item]],
    on_measured: Callable[[Way], None] = lambda _: None,
) -> dict[Way, list[Result]]:
    """Measure a model in every way, as `measure_unedited` does the unedited one."""
    results: dict[Way, list[Result]] = {}
    for way, of_way in items.items():
        results[way] = way.protocol.measure(readers[way.context], of_way)
        on_measured(way)
    return results


def record_answers(
    items: Mapping[Way, Sequence[Item]],
    before: Mapping[Way, Sequence[Result]] | None,
    after: Mapping[Way, Sequence[Result]],
) -> dict[Way, list[AnswerRecord]]:
    """Join the results of two models, and find the cause of each failure.

    Args:
        items: What was measured, in each way.
        before: The unedited model's results; None if there is no such model.
        after: The scored model's.

    Returns:
        The records of each way, in the order of the items.
    """
    records = {
        way: join_results(
            way.protocol.name, way.context, items[way], before[way] if before else None, after[way]
        )
        for way in items
    }
    right = {
        (record.protocol, record.edit, record.kind, record.prompt)
        for of_way in records.values()
        for record in of_way
        if record.score_after == 1
    }
    return {
        way: [_with_cause(record, right) for record in of_way] if way.protocol.shows_answers else of_way
        for way, of_way in records.items()
    }


def _with_cause(record: AnswerRecord, right: set[tuple[str, str, Kind, str]]) -> AnswerRecord:
    if record.score_after != 0 or record.after is None or record.expected is None:
        return record
    if is_match(record.after, record.expected):  # a judge denied it
        return record
    is_right_elsewhere = (record.protocol, record.edit, record.kind, record.prompt) in right
    cause = find_cause(record.after, record.expected, record.kind, is_right_elsewhere=is_right_elsewhere)
    return replace(record, cause=cause)
