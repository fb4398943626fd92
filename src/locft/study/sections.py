"""What the reports of all studies have in common."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from locft.report.page import Block, Command, Section, Text
from locft.report.sections import provenance_table, settings_blocks
from locft.report.words import SCORE_NAMES, counted
from locft.study.over_seeds import mean_over_seeds
from locft.study.records import StudyReport, TrialResult
from locft.types import Figure


def without_failures(results: Iterable[TrialResult]) -> list[TrialResult]:
    """Leave out the trials whose training could not go on."""
    return [result for result in results if result.failure is None]


def failure_texts(results: Iterable[TrialResult]) -> list[Block]:
    """Tell why the training of some trials could not go on."""
    return [
        Text(f"{result.trial.name}: {result.failure}")
        for result in results
        if result.failure is not None
    ]


def closing_sections(report: StudyReport, command: str) -> tuple[Section, ...]:
    """Show the settings, where the trials were done, and the command that goes on."""
    places = Counter(one.environment for one in report.trials if one.environment is not None)
    [*others, last] = places or [None]
    elsewhere = [
        Text(
            f"{counted(places[one], 'trial')} on another machine or in another way, whose times do not "
            f"compare with the others: {one.device}, {counted(one.num_threads, 'thread')}, "
            f"{one.platform}, locft {one.locft}, torch {one.torch}, transformers {one.transformers}, "
            f"Python {one.python}."
        )
        for one in others
        if one is not None
    ]
    return (
        Section(title="Settings", blocks=settings_blocks(report.topic.settings, {})),
        Section(
            title="Where",
            blocks=(
                *(() if last is None else (provenance_table(last, report.topic.edits),)),
                *elsewhere,
                Text("Every trial: trials.jsonl. To go on, or to repeat it elsewhere:"),
                Command(f"locft {command} MODEL EDITS -o DIR"),
            ),
        ),
    )


def scores_over_seeds(done: Sequence[TrialResult]) -> dict[str, Figure]:
    """Average each score over the seeds; nothing where no trial was done."""
    return {
        name: mean_over_seeds(
            [result.scores[name] for result in done], most=math.inf if name == "drift" else 1.0
        )
        for name in SCORE_NAMES
        if done
    }


def score_text(name: str, figure: Figure) -> str:
    """Word a score over seeds, without its count."""
    if figure.value is None:
        return "-"
    digits, factor, unit = (4, 1, "") if name == "drift" else (1, 100, "%")
    text = f"{factor * figure.value:.{digits}f}{unit}"
    if figure.low is None or figure.high is None:
        return text
    return f"{text} [{factor * figure.low:.{digits}f}, {factor * figure.high:.{digits}f}]"


def range_text(values: Iterable[float], form: str = ",") -> str:
    """Word the least and the most of some values."""
    found = sorted(values)
    if not found:
        return "-"
    low, high = format(found[0], form), format(found[-1], form)
    return low if low == high else f"{low} to {high}"
