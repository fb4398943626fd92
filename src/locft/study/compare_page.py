"""Says what stands in a comparison of methods."""

from collections.abc import Mapping, Sequence

from locft.methods import METHODS
from locft.report.page import Page, Section, Table, Text
from locft.report.pictures import FrontPoint, draw_front
from locft.report.sections import drawn
from locft.report.words import bytes_text, counted
from locft.study.over_seeds import mean_over_seeds
from locft.study.records import StudyReport, Trial, TrialResult
from locft.study.sections import (
    closing_sections,
    range_text,
    score_text,
    scores_over_seeds,
    without_failures,
)
from locft.types import Figure

_LESS_IS_BETTER = ("drift", "s per edit", "peak memory")


def describe_compare(report: StudyReport) -> Page:
    """Describe a comparison of methods.

    Args:
        report: Its report; trials may be missing.

    Returns:
        The page.
    """
    topic = report.topic
    groups: dict[str, list[TrialResult]] = {}
    for result in report.trials:
        groups.setdefault(name_of(result.trial), []).append(result)
    done = {name: without_failures(results) for name, results in groups.items()}
    figures = {name: _figures(results) for name, results in done.items() if results}
    failed = [result for result in report.trials if result.failure is not None]
    points = [
        FrontPoint(name=name, generalization=found["generalization"], drift=found["drift"])
        for name, found in figures.items()
    ]
    return Page(
        title=f"{counted(len(groups), 'way')} of editing {topic.model.id}: "
        f"{counted(topic.edits.num_edits, 'edit')}",
        verdict=_verdict(figures),
        tiles=(),
        sections=(
            Section(
                title="Scores and cost",
                blocks=(
                    *((_table(done, figures), _how(report)) if figures else ()),
                    *(
                        Text(f"{name_of(one.trial)}, seed {one.trial.seed}: {one.failure}")
                        for one in failed
                    ),
                ),
            ),
            Section(title="Generalization against drift", blocks=tuple(drawn(draw_front(points)))),
            *closing_sections(report, "compare"),
        ),
    )


def name_of(trial: Trial) -> str:
    """Name a trial by what sets it apart, whatever its seed."""
    parts = [trial.method]
    if trial.location is not None:
        parts.append(trial.location)
    if trial.pipeline == "depth-first":
        parts.append(trial.pipeline)
    if trial.preserve != "none":
        parts.append(f"preserve {trial.preserve}")
    if trial.augment != "none":
        parts.append(f"augment {trial.augment}")
    if trial.max_drift is not None:
        parts.append(f"max drift {trial.max_drift:g}")
    own = METHODS[trial.method].settings
    parts += [f"{key} {value}" for key, value in trial.settings.items() if value != own.get(key)]
    parts += [f"batch {trial.batch_size}", f"lr {trial.lr:.2g}"]
    return ", ".join(parts)


def _figures(results: Sequence[TrialResult]) -> dict[str, Figure]:
    figures = scores_over_seeds(results)
    capability = [result.capability.after for result in results if result.capability is not None]
    if capability:
        figures["capability"] = mean_over_seeds(capability)
    return figures


def _verdict(figures: Mapping[str, Mapping[str, Figure]]) -> str:
    if not figures:
        return "Nothing was tried yet."
    told = []
    for name in ("reliability", "generalization", "drift"):
        best = _best(name, {way: found[name].value for way, found in figures.items() if name in found})
        if best is not None:
            told.append(f"{'least' if name in _LESS_IS_BETTER else 'highest'} {name} by {best}")
    return f"{'; '.join(told).capitalize()}."


def _best(name: str, values: Mapping[str, float | None]) -> str | None:
    """Name what has the best value; None where nothing was measured or all are the same."""
    found = {way: value for way, value in values.items() if value is not None}
    if len(set(found.values())) < 2:
        return None
    choose = min if name in _LESS_IS_BETTER else max
    return choose(found, key=lambda way: found[way])


def _table(
    done: Mapping[str, Sequence[TrialResult]], figures: Mapping[str, Mapping[str, Figure]]
) -> Table:
    names = list(dict.fromkeys(name for found in figures.values() for name in found))
    best = {
        name: _best(name, {way: found[name].value for way, found in figures.items() if name in found})
        for name in names
    }
    costs: dict[str, dict[str, float | None]] = {
        "s per edit": {way: min(one.seconds_per_edit for one in done[way]) for way in figures},
        "peak memory": {way: min(one.peak_memory_bytes for one in done[way]) for way in figures},
    }
    best |= {name: _best(name, values) for name, values in costs.items()}
    rows = []
    for way, found in figures.items():
        cells = {name: score_text(name, found[name]) if name in found else "-" for name in names}
        cells["s per edit"] = range_text((one.seconds_per_edit for one in done[way]), ".3f")
        memory = max(one.peak_memory_bytes for one in done[way])
        cells["peak memory"] = bytes_text(memory)
        rows.append(
            (
                way,
                *(text + (" *" if best.get(name) == way else "") for name, text in cells.items()),
            )
        )
    return Table(columns=("method", *names, *costs), rows=tuple(rows))


def _how(report: StudyReport) -> Text:
    num_seeds = len({result.trial.seed for result in report.trials})
    interval = (
        f"Student's t over {num_seeds} seeds" if num_seeds > 1 else "over prompts, passages and items"
    )
    return Text(
        f"* The best of its column. In brackets: 95% intervals, {interval}. Scored after all edits were "
        "in. Seconds per edit count the frozen layers and training. Each had a process of its own, "
        "whose peak memory includes scoring."
    )
