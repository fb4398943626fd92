"""Says what stands in a comparison of runs."""

from collections.abc import Sequence

from locft.report.page import Block, Page, Section, Table, Text
from locft.report.pictures import FrontPoint, draw_changes, draw_front
from locft.report.schema import ComparedRun, ComparisonReport, Difference
from locft.report.sections import drawn
from locft.report.words import (
    bytes_text,
    change_text,
    counted,
    figure_text,
    seconds_text,
    setting_text,
)
from locft.types import Figure


def describe_comparison(report: ComparisonReport) -> Page:
    """Describe a comparison.

    Args:
        report: The comparison.

    Returns:
        The page.
    """
    runs = report.runs
    return Page(
        title=f"{counted(len(runs), 'run')} side by side",
        verdict=_verdict(report),
        tiles=(),
        sections=(
            Section(title="Runs", blocks=(_runs_table(runs),)),
            Section(title="Scores", blocks=(_scores_table(runs), *_reasons(runs))),
            Section(title="Differences", blocks=_differences(report)),
            Section(title="Generalization against drift", blocks=_front(runs)),
            Section(title="Cost", blocks=(_cost_table(runs),)),
            Section(title="Settings that differ", blocks=_settings(runs)),
        ),
    )


def _verdict(report: ComparisonReport) -> str:
    """Say which differences from the first run are beyond chance, which way, and which are not."""
    told = []
    for run in report.runs[1:]:
        found = [one for one in report.differences if one.run == run.name]
        clear = [
            f"{'more' if (one.figure.value or 0) > 0 else 'less'} {one.score} "
            f"({_difference_text(one.score, one.figure)})"
            for one in found
            if _is_clear(one.figure)
        ]
        unclear = [
            one.score for one in found if one.figure.value is not None and not _is_clear(one.figure)
        ]
        unpaired = [one.score for one in found if one.figure.value is None]
        parts = [", ".join(clear)] if clear else []
        if unclear:
            parts.append(f"no clear difference in {', '.join(unclear)}")
        if unpaired or not found:
            parts.append(f"nothing to pair for {', '.join(unpaired) or 'any score'}")
        told.append(f"{run.name} against {report.runs[0].name}: {'; '.join(parts)}")
    return ". ".join(told) + "."


def _is_clear(figure: Figure) -> bool:
    low, high = figure.low, figure.high
    return low is not None and high is not None and (low > 0 or high < 0)


def _difference_text(score: str, figure: Figure) -> str:
    if figure.value is None:
        return f"not comparable ({figure.reason})" if figure.reason else "not comparable"
    if score != "drift":
        return f"{change_text(figure)} points"
    if figure.low is None or figure.high is None:
        return f"{figure.value:+.4f} nats per token ({figure.reason})"
    return f"{figure.value:+.4f} [{figure.low:+.4f}, {figure.high:+.4f}] nats per token"


def _runs_table(runs: Sequence[ComparedRun]) -> Table:
    rows = [
        (
            run.name,
            run.folder,
            run.subject,
            run.location or "-",
            f"{run.num_edits:,}",
            run.edits_sha256[:12],
        )
        for run in runs
    ]
    columns = ("run", "folder", "model", "location", "edits", "sha256 of the edits")
    return Table(columns=columns, rows=tuple(rows))


def _score_names(runs: Sequence[ComparedRun]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.scores))


def _scores_table(runs: Sequence[ComparedRun]) -> Table:
    names = _score_names(runs)
    rows = [
        (
            run.name,
            *(figure_text(name, run.scores[name]) if name in run.scores else "-" for name in names),
        )
        for run in runs
    ]
    return Table(columns=("run", *names), rows=tuple(rows))


def _reasons(runs: Sequence[ComparedRun]) -> list[Block]:
    first = runs[0]
    how = f"By protocol {first.protocol}, context {first.context}, with 95% intervals."
    return [
        Text(how),
        *_other_edits(runs),
        *(Text(f"{run.name}: {run.reason}.") for run in runs if run.reason is not None),
    ]


def _other_edits(runs: Sequence[ComparedRun]) -> list[Block]:
    """Warn of scores that do not compare, being of other edits."""
    first = runs[0]
    others = [run.name for run in runs if run.edits_sha256 != first.edits_sha256]
    if not others:
        return []
    return [
        Text(
            f"Not on the same edits as {first.name}: {', '.join(others)}. Their scores are of other "
            "prompts; only differences on the items that two runs share compare like with like."
        )
    ]


def _differences(report: ComparisonReport) -> tuple[Block, ...]:
    if not report.differences:
        return ()
    first = report.runs[0].name
    shares = {
        f"{one.run} - {first}: {one.score}": one.figure
        for one in report.differences
        if one.score != "drift"
    }
    picture = draw_changes(f"Differences from run {first}", shares)
    rows = [
        (
            f"{one.run}, {one.score}",
            _difference_text(one.score, one.figure),
            _paired_text(one),
        )
        for one in report.differences
    ]
    return (
        *drawn(picture),
        Table(columns=("run and score", f"against {first}", "paired items"), rows=tuple(rows)),
        Text(
            "Differences are paired: only items that both runs have count (the same prompt, with the "
            "same expected answer; the same passage). 95% intervals: Newcombe for shares, else a "
            "bootstrap over items or passages."
        ),
    )


def _paired_text(one: Difference) -> str:
    counts = f"{one.figure.num:,}"
    if one.num_items == one.num_items_first == one.figure.num:
        return counts
    return f"{counts} of {one.num_items:,} and {one.num_items_first:,}"


def _front(runs: Sequence[ComparedRun]) -> tuple[Block, ...]:
    # Runs on other edits have no place on it.
    points = [
        FrontPoint(name=run.name, generalization=run.scores["generalization"], drift=run.scores["drift"])
        for run in runs
        if {"generalization", "drift"} <= run.scores.keys() and run.edits_sha256 == runs[0].edits_sha256
    ]
    picture = draw_front(points)
    if picture is None:
        return ()
    best = front_names(points)
    return (
        picture,
        Text(
            f"On the front, where no other run carries at least as far for at most as much harm: "
            f"{', '.join(best)}."
        ),
    )


def front_names(points: Sequence[FrontPoint]) -> list[str]:
    """Name the points that no other one beats in one of the two without losing in the other."""
    values = [
        (one.name, one.generalization.value, one.drift.value)
        for one in points
        if one.generalization.value is not None and one.drift.value is not None
    ]
    return [
        name
        for name, up, harm in values
        if not any(
            other_up >= up and other_harm <= harm and (other_up, other_harm) != (up, harm)
            for _, other_up, other_harm in values
        )
    ]


def _cost_table(runs: Sequence[ComparedRun]) -> Table:
    rows = [
        (
            run.name,
            "-" if run.seconds_per_edit is None else f"{run.seconds_per_edit:.3g} s",
            seconds_text(run.wall_s),
            bytes_text(run.peak_memory_bytes),
            "-" if run.patch_bytes is None else bytes_text(run.patch_bytes),
        )
        for run in runs
    ]
    columns = ("run", "per edit", "in all", "peak memory", "patch")
    return Table(columns=columns, rows=tuple(rows))


def _settings(runs: Sequence[ComparedRun]) -> tuple[Block, ...]:
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    if not names:
        return ()
    rows = [(run.name, *(setting_text(run.settings.get(name, "-")) for name in names)) for run in runs]
    return (Table(columns=("run", *names), rows=tuple(rows)),)
