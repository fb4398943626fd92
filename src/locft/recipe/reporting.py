"""Draw runs again, alone or side by side, from what they left on the disk (no torch)."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from locft.errors import InputError, PatchError
from locft.evaluation.metrics import mean_per_token, paired_difference
from locft.patch.format import PATCH_FOLDER, open_patch
from locft.publish import add_files, locked
from locft.recipe.run_folder import (
    EDITS_FILE,
    REPORT_FILE,
    TRAINING_FILE,
    Run,
    draw,
    read_run,
    write_folder,
)
from locft.report.comparison import describe_comparison
from locft.report.content import evaluated_name
from locft.report.page import Page
from locft.report.schema import (
    SCHEMA_VERSION,
    ComparedRun,
    ComparisonReport,
    Difference,
    EditReport,
    EvalReport,
    to_bytes,
)
from locft.report.sections import with_drift
from locft.report.words import PROTOCOL_SCORES
from locft.types import KINDS, Figure, Kind

_MOST_RUNS = len(ascii_uppercase)


def redraw(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[EditReport | EvalReport, list[Path]]:
    """Draw the report of a run again, from its folder.

    Args:
        folder: The run folder, or that of an evaluation.
        output: A folder to make for `report.md`, `report.html` and a copy of `report.json`; if None, the
            first two are drawn into the run folder itself.
        say: Called with a line about what the report does without.

    Returns:
        The report, and the files that were written.

    Raises:
        RunError: It is no run folder, is not whole, is damaged, or of another version.
        InputError: `output` is taken, or cannot be written to.
    """
    run = read_run(Path(folder), say)
    if isinstance(run.report, EditReport):
        for line in _what_is_amiss(run.folder, run.report):
            say(line)
    files = draw(run.page())
    if output is None:
        return run.report, write_into(run.folder, files)
    files[REPORT_FILE] = to_bytes(run.report)
    write_folder(Path(output), files)
    return run.report, [Path(output) / name for name in files]


def write_into(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write files that were drawn from a folder into it; name them.

    Raises:
        InputError: One is a folder, or they cannot be written.
    """
    taken = [folder / name for name in files if (folder / name).is_dir()]
    if taken:
        raise InputError(f"{taken[0]}: is a folder: expected a file, or nothing; -o DIR draws elsewhere")
    try:
        with locked(folder):
            add_files(folder, files)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written to: {error.strerror}; choose a place with -o"
        ) from error
    except InputError as error:
        raise InputError(f"{error}; -o DIR draws it elsewhere") from error
    return [folder / name for name in files]


def _what_is_amiss(folder: Path, report: EditReport) -> Iterator[str]:
    """Tell what of an edit run beside its report is not there any more, or is another run's."""
    for name in (EDITS_FILE, TRAINING_FILE):
        if not (folder / name).is_file():
            yield f"{folder}: holds no {name} any more"
    if not (folder / PATCH_FOLDER).is_dir():
        yield f"{folder}: holds no {PATCH_FOLDER}/ any more, only what was measured of it"
        return
    try:
        manifest = open_patch(folder).manifest
    except PatchError as error:
        yield f"the patch cannot be used: {error}"
        return
    if manifest.edits_sha256 != report.edits.sha256:
        yield f"{folder / PATCH_FOLDER}: is of other edits than the report, which says nothing about it"


def compare_runs(
    folders: Sequence[str | Path], output: str | Path | None = None
) -> tuple[ComparisonReport, Page]:
    """Compare runs side by side, the others with the first.

    Args:
        folders: Run folders, or those of evaluations; two at least.
        output: A folder to make for `report.json`, `report.md` and `report.html`; None writes nothing.

    Returns:
        The comparison, and the page that shows it.

    Raises:
        RunError: One is no run folder, is not whole, is damaged, or of another version.
        InputError: There are too few or too many, one is named twice, or `output` is taken or cannot be
            written to.
    """
    if not 2 <= len(folders) <= _MOST_RUNS:
        raise InputError(f"{len(folders):,} runs: expected 2 to {_MOST_RUNS} to compare")
    runs = [read_run(Path(folder)) for folder in folders]
    seen: set[Path] = set()
    for run in runs:
        place = run.folder.resolve()
        if place in seen:
            raise InputError(f"{run.folder}: is named twice: expected different runs to compare")
        seen.add(place)
    first = runs[0]
    rule = _main_rule(first)
    odd = _odd_settings(runs)
    compared = tuple(
        _describe(name, run, rule, odd) for name, run in zip(ascii_uppercase, runs, strict=False)
    )
    differences = [
        difference
        for run, described in zip(runs[1:], compared[1:], strict=True)
        for difference in _differences(described, compared[0], run, first, rule)
    ]
    report = ComparisonReport(
        schema_version=SCHEMA_VERSION, runs=compared, differences=tuple(differences)
    )
    page = describe_comparison(report)
    if output is not None:
        write_folder(Path(output), {**draw(page), REPORT_FILE: to_bytes(report)})
    return report, page


_Rule = tuple[str, str]
"""A protocol and a context."""


def _main_rule(run: Run) -> _Rule:
    report = run.report
    if isinstance(report, EditReport):
        return report.protocol.name, report.protocol.context
    protocol = next(iter(report.protocols.values())).protocol
    return protocol.name, protocol.context


def _scores(run: Run, rule: _Rule) -> dict[str, Figure] | None:
    """Give what a run scored by a rule; None if it was not scored so."""
    report = run.report
    if isinstance(report, EditReport):
        return dict(vars(report.scores)) if _main_rule(run) == rule else None
    scores = report.protocols.get(rule[0])
    if scores is None or scores.protocol.context != rule[1]:
        return None
    return with_drift(scores.after, report.drift)


def _describe(name: str, run: Run, rule: _Rule, odd: Sequence[str]) -> ComparedRun:
    report = run.report
    scores = _scores(run, rule)
    own = _main_rule(run)
    return ComparedRun(
        name=name,
        folder=str(run.folder),
        kind=report.kind,
        subject=report.model.id if isinstance(report, EditReport) else evaluated_name(report),
        location=report.location.name if isinstance(report, EditReport) else None,
        num_edits=report.edits.num_edits,
        edits_sha256=report.edits.sha256,
        protocol=own[0] if scores is None else rule[0],
        context=own[1] if scores is None else rule[1],
        scores=scores or {},
        reason=None
        if scores is not None
        else f"was not scored by protocol {rule[0]} in context {rule[1]}, as the first run was",
        seconds_per_edit=report.cost.seconds_per_edit if isinstance(report, EditReport) else None,
        wall_s=report.cost.wall_s,
        peak_memory_bytes=report.cost.peak_memory_bytes,
        patch_bytes=report.patch_bytes if isinstance(report, EditReport) else None,
        settings={setting: _resolved(report).get(setting) for setting in odd}
        if isinstance(report, EditReport)
        else {},
    )


def _odd_settings(runs: Sequence[Run]) -> list[str]:
    """Name the settings that are not the same in all edit runs."""
    settings = [_resolved(run.report) for run in runs if isinstance(run.report, EditReport)]
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]


def _resolved(report: EditReport) -> dict[str, Any]:
    return {**report.settings, **report.resolved}


def _differences(
    described: ComparedRun, first: ComparedRun, run: Run, first_run: Run, rule: _Rule
) -> list[Difference]:
    found = []
    for kind, score in zip(KINDS, PROTOCOL_SCORES.get(rule[0], KINDS), strict=True):
        if score not in described.scores or score not in first.scores:
            continue
        ours, theirs = _items(run, rule, kind), _items(first_run, rule, kind)
        shared = [key for key in theirs if key in ours]
        figure = paired_difference([theirs[key] for key in shared], [ours[key] for key in shared])
        if not shared:
            figure = Figure(value=None, num=0, reason="the runs have no item in common")
        found.append(
            Difference(
                run=described.name,
                score=score,
                figure=figure,
                num_items=len(ours),
                num_items_first=len(theirs),
            )
        )
    if "drift" in described.scores and "drift" in first.scores:
        found.append(
            Difference(
                run=described.name,
                score="drift",
                figure=_drift_difference(run, first_run),
                num_items=len(run.passages),
                num_items_first=len(first_run.passages),
            )
        )
    return found


def _items(run: Run, rule: _Rule, kind: Kind) -> dict[Hashable, float]:
    """Give the scores of one kind of items, by what makes them the same in another run."""
    seen: Counter[Hashable] = Counter()
    items: dict[Hashable, float] = {}
    for answer in run.answers:
        if (answer.protocol, answer.context, answer.kind) != (*rule, kind):
            continue
        if answer.score_after is None:
            continue
        key = (answer.prompt, answer.expected)
        items[key, seen[key]] = answer.score_after
        seen[key] += 1
    return items


def _drift_difference(run: Run, first: Run) -> Figure:
    ours, theirs = run.report.drift, first.report.drift
    if ours is None or theirs is None or ours.overall.value is None or theirs.overall.value is None:
        return Figure(value=None, num=0, reason="drift was not measured in both")
    counts = [passage.num_tokens for passage in run.passages]
    if ours.text_sha256 != theirs.text_sha256 or counts != [one.num_tokens for one in first.passages]:
        return Figure(value=None, num=0, reason="drift was measured on different text")
    sums = [
        (mine.drift - yours.drift) * mine.num_tokens
        for mine, yours in zip(run.passages, first.passages, strict=True)
    ]
    return mean_per_token(sums, counts)
