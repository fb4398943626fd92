"""Says what stands in the report of a run, in which order: the judgement first, then its grounds."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from locft.report.page import Block, Command, Page, Section, Text, Tile
from locft.report.pictures import draw_shares
from locft.report.schema import (
    EditReport,
    EvalReport,
)
from locft.report.sections import (
    answer_blocks,
    blank_locality,
    capability_blocks,
    change_blocks,
    context_blocks,
    drawn,
    drift_blocks,
    edit_cost_blocks,
    eval_cost_table,
    how_scored,
    learning_blocks,
    no_drift,
    provenance_table,
    scores_table,
    settings_blocks,
    with_drift,
)
from locft.report.words import (
    MEANINGS,
    change_text,
    counted,
    figure_text,
    verdict,
)
from locft.types import AnswerRecord, Figure


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """An evaluation: its report, its answers, and the name of the folder that holds it."""

    name: str
    report: EvalReport
    answers: Sequence[AnswerRecord]


def describe_edit(
    report: EditReport, answers: Sequence[AnswerRecord], evaluations: Sequence[Evaluated] = ()
) -> Page:
    """Describe an edit run.

    Args:
        report: Its report.
        answers: Its answers.
        evaluations: What else was measured of it.

    Returns:
        The page.
    """
    before = vars(report.scores_before)
    after = vars(report.scores)
    shares = {name: figure for name, figure in after.items() if name != "drift"}
    sections = [
        Section(
            title="Scores",
            blocks=(
                *drawn(draw_shares("Scores before and after", before, shares)),
                scores_table(before, after, report.change, {**MEANINGS, **report.protocol.meanings}),
                *blank_locality(answers, report.protocol),
                Text(how_scored(report.protocol)),
            ),
        ),
        Section(title="Learning", blocks=learning_blocks(report.training, report.settings)),
        *(section for found in evaluations for section in _evaluation_sections(found)),
        Section(title="Drift", blocks=drift_blocks(report.drift)),
        Section(title="Answers", blocks=answer_blocks(answers, report.protocol)),
        Section(title="What was changed", blocks=change_blocks(report)),
        Section(title="Cost", blocks=edit_cost_blocks(report.cost, report.plan, report.training)),
        Section(title="Settings", blocks=settings_blocks(report.settings, report.resolved)),
        Section(
            title="Where",
            blocks=(
                provenance_table(report.environment, report.edits),
                Text("To repeat it, from where this run was made:"),
                Command(
                    f"locft edit {shlex.quote(report.model.id)} RUN/edits.jsonl --config RUN/run.toml "
                    "-o NEW"
                ),
            ),
        ),
    ]
    return Page(
        title=f"{counted(report.edits.num_edits, 'edit')} in {report.model.id}",
        verdict=verdict(after, report.edits.num_edits),
        tiles=_tiles(after, report.change),
        sections=tuple(sections),
    )


def describe_evaluation(report: EvalReport, answers: Sequence[AnswerRecord]) -> Page:
    """Describe an evaluation.

    Args:
        report: Its report.
        answers: Its answers.

    Returns:
        The page.
    """
    main = next(iter(report.protocols.values()))
    figures = with_drift(main.after, report.drift)
    sections = [
        *_evaluation_sections(Evaluated(name="", report=report, answers=answers)),
        Section(title="Drift", blocks=() if report.drift is None else drift_blocks(report.drift)),
        Section(title="Answers", blocks=answer_blocks(answers, main.protocol)),
        Section(title="Cost", blocks=(eval_cost_table(report.cost, report.parts_s),)),
        Section(title="Where", blocks=(provenance_table(report.environment, report.edits),)),
    ]
    return Page(
        title=f"{evaluated_name(report)}: {counted(report.edits.num_edits, 'edit')}",
        verdict=verdict(
            figures, report.edits.num_edits, by_answers=main.protocol.max_new_tokens is not None
        ),
        tiles=_tiles(figures, main.change or {}),
        sections=tuple(sections),
    )


def evaluated_name(report: EvalReport) -> str:
    """Name what was evaluated."""
    if report.endpoint is not None:
        return f"{report.endpoint.model} at {report.endpoint.url}"
    name = "" if report.model is None else report.model.id
    return name if report.patch is None else f"{name} with {report.patch}"


def _tiles(figures: Mapping[str, Figure], change: Mapping[str, Figure]) -> tuple[Tile, ...]:
    tiles = []
    for name, figure in figures.items():
        if figure.value is None:
            continue
        is_drift = name == "drift"
        value = f"{figure.value:.4f}" if is_drift else f"{100 * figure.value:.1f}%"
        note = f"{figure.num:,} {'passages, nats per token' if is_drift else 'prompts'}"
        if figure.low is not None and figure.high is not None:
            ends = (
                f"{figure.low:.4f} to {figure.high:.4f}"
                if is_drift
                else f"{100 * figure.low:.1f} to {100 * figure.high:.1f}%"
            )
            note = f"{ends}, {note}"
        changed = change_text(change[name]) if name in change else ""
        tiles.append(Tile(name=name, value=value, note=note, change=changed))
    return tuple(tiles)


def _evaluation_sections(found: Evaluated) -> list[Section]:
    """Describe what `locft eval` measures beyond a run's own scores."""
    report = found.report
    suffix = f" ({found.name})" if found.name else ""
    of_protocols: list[Block] = []
    for number, (name, scores) in enumerate(report.protocols.items()):
        before, after, meanings = scores.before, scores.after, {**MEANINGS, **scores.protocol.meanings}
        if number == 0 and report.drift is not None:
            after = with_drift(after, report.drift)
            before = None if before is None else {**before, "drift": no_drift(report.drift)}
        of_protocols += drawn(draw_shares(f"Protocol {name}{suffix}", scores.before, scores.after))
        of_protocols += [
            scores_table(before, after, scores.change, meanings),
            *blank_locality(found.answers, scores.protocol),
            Text(how_scored(scores.protocol)),
        ]
    if report.judge is not None:
        of_protocols.append(
            Text(
                f"Judge {report.judge.model}: agrees with exact match on "
                f"{figure_text('agreement', report.judge.agreement)}; "
                f"{counted(report.judge.num_without_verdict, 'answer')} without a verdict."
            )
        )
    return [
        Section(title=f"Scores by protocol{suffix}", blocks=tuple(of_protocols)),
        Section(title=f"How far the edits carry{suffix}", blocks=context_blocks(report.contexts)),
        Section(
            title=f"Capability{suffix}",
            blocks=() if report.capability is None else capability_blocks(report.capability, suffix),
        ),
    ]
