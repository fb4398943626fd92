"""Whether what a run folder holds can have been measured, and fits together (no torch).

Every check says what is wrong in words that name the field, or says nothing.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass

from locft.errors import brief, printable
from locft.evaluation.metrics import share
from locft.report.schema import DriftInfo, EditReport, EvalReport, ProtocolScores
from locft.report.words import PROTOCOL_SCORES, some
from locft.types import KINDS, AnswerRecord, Figure, PassageDrift

_MOST_FIFTHS = 5
_LARGEST = 10**15  # nothing that is measured is larger, and larger numbers cannot all be drawn
_ROUNDING = 1e-6
_SHARES = ("locft", "wild")  # protocols by which an item is right or wrong
_OWN_WORDS = ("settings", "resolved")  # fields that hold whatever settings may be
_DURATIONS = ("cost", "plan", "parts_s")


def impossible_value(value: object, place: str = "") -> str:
    """Name the first value, in a report or a record, that nobody can have measured."""
    return next(_impossible(value, place), "")


def _impossible(value: object, place: str) -> Iterator[str]:
    if isinstance(value, int | float) and abs(value) > _LARGEST:
        yield f"field {place} is {brief(value)}: expected a number of at most {_LARGEST:,}"
    elif isinstance(value, int | float) and value < 0 and _counts(value, place):
        yield f"field {place} is {value:,}: expected 0 or more"
    elif isinstance(value, Figure):
        yield from _impossible_figure(value, place)
    parts: Iterable[tuple[object, object]] = ()
    if is_dataclass(value):
        parts = vars(value).items()
    elif isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, tuple):
        parts = enumerate(value)
    for name, part in parts:
        if name not in _OWN_WORDS:
            inner = (
                f"{place}[{name}]" if isinstance(name, int) else printable(f"{place}.{name}").lstrip(".")
            )
            yield from _impossible(part, inner)


def _counts(value: float, place: str) -> bool:
    """Tell whether a number counts something, or is a duration: neither is ever below 0."""
    return isinstance(value, int) or place.split(".")[0] in _DURATIONS


def _impossible_figure(figure: Figure, place: str) -> Iterator[str]:
    value, low, high = figure.value, figure.low, figure.high
    if value is None:
        return
    if low is None or high is None:
        if figure.reason is None:
            yield f"field {place} has a value, and neither an interval (low, high) nor a reason"
    elif not low - _ROUNDING <= value <= high + _ROUNDING:
        yield f"field {place} is {value:.6g}, outside its own interval [{low:.6g}, {high:.6g}]"


def impossible_record(record: object) -> str:
    """Say what of an answer or a passage cannot be."""
    if isinstance(record, AnswerRecord):
        for name in ("score_before", "score_after"):
            score = getattr(record, name)
            if score is not None and not 0 <= score <= 1:
                return f"field {name} is {score}: expected 0 to 1"
    if isinstance(record, PassageDrift) and record.num_tokens < 1:
        return f"field num_tokens is {record.num_tokens:,}: expected 1 or more"
    return ""


def inconsistent_report(report: EditReport | EvalReport) -> str:
    """Say what of a report cannot be, where each field by itself could."""
    if isinstance(report, EvalReport):
        return _inconsistent_evaluation(report)
    if report.model.num_parameters < 1:
        return f"field model.num_parameters is {report.model.num_parameters:,}: expected 1 or more"
    if report.scores.drift != report.drift.overall:
        return "field scores.drift is not the one of field drift.overall"
    training = report.training
    if not 1 <= len(training.fifths) <= _MOST_FIFTHS:
        return f"field training.fifths has {len(training.fifths):,} parts: expected 1 to {_MOST_FIFTHS}"
    if training.course:
        took = (len(training.course), sum(epoch.steps for epoch in training.course))
        if (training.epochs, training.steps) != took:
            return (
                f"field training has {training.epochs:,} epochs and {training.steps:,} steps: expected "
                f"{took[0]:,} and {took[1]:,}, as training.course has"
            )
        if training.final_loss != training.course[-1].loss:
            return "field training.final_loss is not the loss of the last epoch of training.course"
    for number, epoch in enumerate(training.course):
        if len(epoch.success) != len(training.fifths):
            return (
                f"field training.course[{number}].success has {len(epoch.success):,} shares: expected "
                f"{len(training.fifths)}, as training.fifths has"
            )
    return ""


def _inconsistent_evaluation(report: EvalReport) -> str:
    if not report.protocols:
        return "field protocols is empty: expected one at least"
    names: set[str] | None = None
    for name, scores in report.contexts.items():
        found = scores.after.keys() if scores.before is None else scores.before.keys()
        names = set(scores.after) if names is None else names
        if not names == scores.after.keys() == found:
            return f"field contexts.{printable(name)} has other scores than {some(sorted(names))}"
    if len({scores.before is None for scores in report.contexts.values()}) > 1:
        return "field contexts has scores before the edit in some contexts only"
    return ""


def unlike_answers(report: EditReport | EvalReport, answers: Sequence[AnswerRecord]) -> str:
    """Say which score is not what the answers come to."""
    for places, scores in _all_scores(report):
        names = PROTOCOL_SCORES.get(scores.protocol.name, ())
        for kind, name in zip(KINDS, names, strict=False):
            rule = (scores.protocol.name, scores.protocol.context, kind)
            found = [one for one in answers if (one.protocol, one.context, one.kind) == rule]
            for when, figure, values in _sides(scores, name, found):
                place = f"field {places[when]}.{printable(name)}"
                if wrong := _unlike(figure, math.fsum(values), len(values)):
                    return f"{place} is {wrong} by the answers; are they of another run?"
                is_share = scores.protocol.name in _SHARES and when != "change"
                if is_share and (wrong := _unlike_interval(figure, values)):
                    return f"{place} has the interval {wrong} by the answers"
    if isinstance(report, EditReport):
        return _miscounted(report, answers)
    return ""


def _miscounted(report: EditReport, answers: Sequence[AnswerRecord]) -> str:
    """Say which count of an edit run is not that of its answers."""
    edits = report.edits
    counts = {
        "reliability": ("num_edits", edits.num_edits),
        "generalization": ("num_rephrases", edits.num_rephrases),
        "locality": ("num_locality", edits.num_locality),
    }
    rule = (report.protocol.name, report.protocol.context)
    for kind, (field, count) in counts.items():
        found = sum((one.protocol, one.context) == rule and one.kind == kind for one in answers)
        if found != count:
            return f"field edits.{field} is {count:,}, and {found:,} by the answers"
    return ""


def _unlike_interval(figure: Figure, values: Sequence[float]) -> str:
    """Say what interval a share has and should have, if that is not the same."""
    if figure.reason is not None or not set(values) <= {0.0, 1.0}:
        return ""
    right = share(round(sum(values)), len(values))
    if _is_close(figure.low, right.low) and _is_close(figure.high, right.high):
        return ""
    return f"[{_end(figure.low)}, {_end(figure.high)}], and [{_end(right.low)}, {_end(right.high)}]"


def _end(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _all_scores(report: EditReport | EvalReport) -> Iterator[tuple[dict[str, str], ProtocolScores]]:
    """Give all scores of a report, with the names of the fields that hold them."""
    if isinstance(report, EvalReport):
        for field, found in (("protocols", report.protocols), ("contexts", report.contexts)):
            for name, scores in found.items():
                inner = f"{field}.{printable(name)}"
                yield {when: f"{inner}.{when}" for when in ("before", "after", "change")}, scores
        return
    yield (
        {"before": "scores_before", "after": "scores", "change": "change"},
        ProtocolScores(
            protocol=report.protocol,
            before=dict(vars(report.scores_before)),
            after=dict(vars(report.scores)),
            change=report.change,
        ),
    )


def _sides(
    scores: ProtocolScores, name: str, answers: Sequence[AnswerRecord]
) -> Iterator[tuple[str, Figure, list[float]]]:
    """Give each figure of a score, with the values that it is the mean of."""
    pairs = [
        (one.score_before, one.score_after)
        for one in answers
        if one.score_before is not None and one.score_after is not None
    ]
    before, change = (scores.before or {}).get(name), (scores.change or {}).get(name)
    if before is not None:
        yield "before", before, [early for early, _ in pairs]
    if name in scores.after:
        alone = [one.score_after for one in answers if one.score_after is not None]
        # Both models' scores are of the same items.
        yield "after", scores.after[name], alone if before is None else [late for _, late in pairs]
    if change is not None:
        yield "change", change, [late - early for early, late in pairs]


def unlike_passages(drift: DriftInfo, passages: Sequence[PassageDrift]) -> str:
    """Say which drift is not what the passages come to."""
    kinds: dict[str, list[PassageDrift]] = {}
    for one in passages:
        kinds.setdefault(one.kind, []).append(one)
    if passages and kinds.keys() != drift.by_kind.keys():
        found_kinds = some(sorted(map(printable, kinds)))
        return f"field drift.by_kind has other kinds than the passages: {found_kinds}"
    places = [("overall", drift.overall, list(passages))]
    places += [
        (f"by_kind.{printable(kind)}", figure, kinds.get(kind, []))
        for kind, figure in drift.by_kind.items()
    ]
    for place, figure, found in places:
        num_tokens = sum(one.num_tokens for one in found)
        total = math.fsum(one.drift * one.num_tokens for one in found)
        if come_to := _unlike(figure, total, num_tokens, len(found)):
            return f"field drift.{place} is {come_to} by the passages"
    return ""


def _unlike(figure: Figure, total: float, weight: int, num: int | None = None) -> str:
    """Say what a figure says and what it should say, if that is not the same."""
    num = weight if num is None else num
    value = total / weight if weight else None
    if figure.num == num and _is_close(figure.value, value):
        return ""
    return f"{_told(figure.value, figure.num)}, and {_told(value, num)}"


def _is_close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, abs_tol=_ROUNDING)


def _told(value: float | None, num: int) -> str:
    return "not measured" if value is None else f"{value:.6g} of {num:,}"
