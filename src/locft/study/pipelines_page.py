"""Says what stands in the report of the study of pipelines."""

from collections.abc import Iterable, Mapping, Sequence

from locft.report.page import Block, Page, Section, Table, Text
from locft.report.pictures import draw_courses, draw_groups
from locft.report.sections import drawn
from locft.report.words import SCORE_NAMES, counted
from locft.study.records import StudyReport, Trial, TrialResult
from locft.study.sections import (
    closing_sections,
    failure_texts,
    range_text,
    score_text,
    scores_over_seeds,
    without_failures,
)
from locft.types import Figure

Group = tuple[str, str]
"""A method, and a pipeline with its batch."""


def describe_pipelines(report: StudyReport) -> Page:
    """Describe the study of pipelines.

    Args:
        report: Its report; trials may be missing.

    Returns:
        The page.
    """
    groups: dict[Group, list[TrialResult]] = {}
    for result in report.trials:
        groups.setdefault(_group(result.trial), []).append(result)
    scores = {group: scores_over_seeds(without_failures(results)) for group, results in groups.items()}
    topic = report.topic
    return Page(
        title=f"Depth-first against breadth-first: {counted(topic.edits.num_edits, 'edit')} in "
        f"{topic.model.id}",
        verdict=_verdict(scores),
        tiles=(),
        sections=(
            Section(
                title="Scores", blocks=(_table(groups, scores), *failure_texts(report.trials), _how())
            ),
            Section(title="By batch", blocks=tuple(_by_batch(scores))),
            Section(title="While editing proceeds", blocks=_courses(groups)),
            Section(title="Methods", blocks=(_methods(report.trials),)),
            *closing_sections(report, "study pipelines"),
        ),
    )


def _group(trial: Trial) -> Group:
    if trial.pipeline == "depth-first":
        return trial.method, "depth-first"
    return trial.method, f"breadth-first, batch {trial.batch_size:,}"


def _verdict(scores: Mapping[Group, Mapping[str, Figure]]) -> str:
    told = []
    for method in dict.fromkeys(method for method, _ in scores):
        found = {
            how: figures["reliability"].value
            for (of, how), figures in scores.items()
            if of == method and "reliability" in figures
        }
        depth = found.pop("depth-first", None)
        values = [value for value in found.values() if value is not None]
        if depth is not None and values:
            told.append(
                f"{method}: {100 * depth:.0f}% depth-first, {100 * max(values):.0f}% breadth-first"
            )
    return f"Reliability by {'; '.join(told)}." if told else "No method was tried both ways yet."


def _table(
    groups: Mapping[Group, Sequence[TrialResult]], scores: Mapping[Group, Mapping[str, Figure]]
) -> Table:
    rows = []
    for group, results in groups.items():
        done = without_failures(results)
        figures = scores[group]
        rows.append(
            (
                *group,
                *(score_text(name, figures[name]) if name in figures else "-" for name in SCORE_NAMES),
                range_text(result.num_steps for result in done),
                range_text((result.seconds_per_edit for result in done), ".2f"),
                f"{len(done):,}" + (f" of {len(results):,}" if len(done) < len(results) else ""),
            )
        )
    columns = ("method", "pipeline", *SCORE_NAMES, "steps", "s per edit", "seeds")
    return Table(columns=columns, rows=tuple(rows))


def _how() -> Text:
    return Text(
        "Means over seeds, with 95% intervals: Student's t over the seeds, cut where no "
        "value can be; of a single seed, the "
        "interval of its own items. A seed names the order of the edits, and what adapters start from. "
        "Scored after all edits were in. Steps and seconds: the least and the most of the seeds."
    )


def _by_batch(scores: Mapping[Group, Mapping[str, Figure]]) -> Iterable[Block]:
    ways = list(dict.fromkeys(how for _, how in scores))
    names = {how: how.replace("breadth-first, ", "") for how in ways}
    for name in ("reliability", "generalization"):
        lines = {
            method: {
                names[how]: figures[name]
                for (of, how), figures in scores.items()
                if of == method and name in figures
            }
            for method in dict.fromkeys(method for method, _ in scores)
        }
        yield from drawn(draw_groups(f"{name.capitalize()}: depth-first, and by batch", lines))


def _courses(groups: Mapping[Group, Sequence[TrialResult]]) -> tuple[Block, ...]:
    """Show the first seed of each group: how each fifth fares while the others are edited."""
    courses = {}
    for (method, how), results in groups.items():
        first = next((result for result in results if result.course), None)
        if first is not None:
            courses[f"{method}, {how}"] = [(one.done, one.success) for one in first.course]
    if not courses:
        return ()
    return (
        *drawn(draw_courses("Success of each fifth of the edits while editing proceeds", courses)),
        Text(
            "Success is the share of target tokens that are predicted right, the true ones before them "
            "given (first seed). Depth-first it is measured after each tenth of the edits, and the "
            "fifths are in the order in which they are edited; breadth-first it falls out of each epoch."
        ),
    )


def _methods(results: Sequence[TrialResult]) -> Table:
    rows = {}
    for result in results:
        trial = result.trial
        settings = ", ".join(f"{name} {value}" for name, value in trial.settings.items())
        rows[trial.method] = (
            trial.method,
            trial.location or "all layers",
            f"{trial.lr:.3g}",
            settings or "-",
            f"{result.num_parameters:,}",
        )
    columns = ("method", "location", "learning rate", "settings", "trained numbers")
    return Table(columns=columns, rows=tuple(rows.values()))
