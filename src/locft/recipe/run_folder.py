"""What a run leaves on the disk, and how it is read again (no torch).

An edit run comes in two steps: the finished patch, and then its scores. Each comes whole or not at all:
a run folder always holds a patch and what it was trained with, and one with a `report.json` is a whole
run. An evaluation is a folder of its own, which may stand within the run folder that it is about.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from locft.config import RunConfig, to_toml
from locft.data.edits import write_edits
from locft.errors import RunError, brief, first_line, printable
from locft.openfile import open_regular, read_limited
from locft.patch.format import PATCH_FOLDER, Patch, write_patch
from locft.publish import add_files, staged_folder
from locft.report.content import Evaluated, describe_edit, describe_evaluation
from locft.report.html import draw_html
from locft.report.markdown import draw_markdown
from locft.report.page import Page
from locft.report.schema import SCHEMA_VERSION, EditReport, EvalReport, to_bytes
from locft.report.words import some
from locft.strictjson import parse_json
from locft.types import AnswerRecord, Edit, Figure, PassageDrift

ANSWERS_FILE = "answers.jsonl"
DRIFT_FILE = "drift.jsonl"
EDITS_FILE = "edits.jsonl"
REPORT_FILE = "report.json"
TRAINING_FILE = "train.jsonl"

_REPORTS: dict[str, type[EditReport] | type[EvalReport]] = {"edit": EditReport, "evaluation": EvalReport}
_MAX_REPORT_BYTES = 100_000_000
_MAX_LINE_BYTES = 10_000_000
_MOST_FIFTHS = 5
_LARGEST = 10**15  # nothing that is measured is larger, and larger numbers cannot all be drawn

Record = TypeVar("Record")


@dataclass(frozen=True)
class Run:
    """A run folder, or the folder of an evaluation, as it was read.

    Attributes:
        folder: Where it is.
        report: Its report.
        answers: Its answers.
        passages: The drift of each passage; none where drift was not measured.
        evaluations: The evaluations that stand within it.
    """

    folder: Path
    report: EditReport | EvalReport
    answers: tuple[AnswerRecord, ...]
    passages: tuple[PassageDrift, ...]
    evaluations: tuple[Evaluated, ...] = ()

    def page(self) -> Page:
        """Describe it."""
        if isinstance(self.report, EditReport):
            return describe_edit(self.report, self.answers, self.evaluations)
        return describe_evaluation(self.report, self.answers)


def edits_of_run(path: Path) -> Path | None:
    """Find the edits of a run folder; None where there are none, as beside a patch by itself."""
    file = path / EDITS_FILE
    return file if file.is_file() else None


def save_trained(folder: Path, patch: Patch, edits: Iterable[Edit], config: RunConfig) -> None:
    """Write a finished patch and what it was trained with, into the staged run folder."""
    write_patch(patch, folder / PATCH_FOLDER)
    write_edits(folder / EDITS_FILE, edits)
    (folder / "run.toml").write_text(to_toml(config), "utf-8")


def save_scored(run: Run) -> None:
    """Write the scores and the answers that they come from, into the folder of an edit run."""
    add_files(run.folder, _files(run))


def save_evaluation(run: Run) -> None:
    """Write an evaluation and the answers that it comes from, as a folder of its own."""
    write_folder(run.folder, _files(run))


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files as a folder of their own, whole or not at all."""
    with staged_folder(folder) as staging:
        for name, data in files.items():
            (staging / name).write_bytes(data)


def draw(page: Page) -> dict[str, bytes]:
    """Draw a page for people to read: the files by their names."""
    drawn = {"report.md": draw_markdown(page), "report.html": draw_html(page)}
    return {name: text.encode() for name, text in drawn.items()}


def _files(run: Run) -> dict[str, bytes]:
    files = {ANSWERS_FILE: _lines(run.answers)}
    if run.report.drift is not None:
        files[DRIFT_FILE] = _lines(run.passages)
    # The report comes last, so that a folder with one is a whole run.
    return {**files, **draw(run.page()), REPORT_FILE: to_bytes(run.report)}


def _lines(records: Iterable[Any]) -> bytes:
    return "".join(f"{json.dumps(asdict(one), ensure_ascii=False)}\n" for one in records).encode()


def read_run(folder: Path) -> Run:
    """Read a run folder, or the folder of an evaluation.

    Args:
        folder: The folder.

    Returns:
        The run, with the evaluations that stand within its folder.

    Raises:
        RunError: It is none, is not whole, is damaged, or another version of locft wrote it.
    """
    report = _read_report(folder)
    answers = tuple(_read_lines(folder / ANSWERS_FILE, AnswerRecord))
    passages: tuple[PassageDrift, ...] = ()
    if report.drift is not None:
        passages = tuple(_read_lines(folder / DRIFT_FILE, PassageDrift))
    return Run(
        folder=folder,
        report=report,
        answers=answers,
        passages=passages,
        evaluations=tuple(_evaluations(folder)) if isinstance(report, EditReport) else (),
    )


def _evaluations(folder: Path) -> Iterator[Evaluated]:
    """Read the evaluations that stand within a run folder, in the order of their names."""
    try:
        # A hidden one is being written, or a killed writer left it.
        inner = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise RunError(f"{folder}: cannot be read: {error.strerror}") from error
    for path in inner:
        if not (path / REPORT_FILE).is_file():
            continue
        record = _read_record(path)
        if record.get("kind") in ("edit", "comparison"):
            continue
        report = _to_report(record, path)
        answers = _read_lines(path / ANSWERS_FILE, AnswerRecord)
        if isinstance(report, EvalReport):
            yield Evaluated(name=path.name, report=report, answers=tuple(answers))


def _read_report(folder: Path) -> EditReport | EvalReport:
    return _to_report(_read_record(folder), folder)


def _read_record(folder: Path) -> dict[str, Any]:
    file = folder / REPORT_FILE
    try:
        raw = read_limited(file, _MAX_REPORT_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError(f"{folder}: {_what_else(folder)}") from error
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{file}: {first_line(error)}") from error
    try:
        return parse_json(raw)
    except ValueError as error:
        raise RunError(f"{file}: is damaged: {first_line(error)}") from error


def _to_report(record: dict[str, Any], folder: Path) -> EditReport | EvalReport:
    file = folder / REPORT_FILE
    version = record.get("schema_version")
    if version != SCHEMA_VERSION or type(version) is not int:
        raise RunError(f"{file}: {_what_version(version, folder)}")
    kind = record.get("kind")
    if not isinstance(kind, str) or kind not in _REPORTS:
        raise RunError(
            f"{file}: field kind is {brief(kind)}: expected {' or '.join(_REPORTS)}, as `locft edit` "
            "and `locft eval` write it"
        )
    try:
        report = msgspec.convert(record, _REPORTS[kind])
    except msgspec.ValidationError as error:
        raise RunError(f"{file}: is damaged: {_place(error)}") from error
    except UnicodeError as error:  # half a character where a number belongs
        raise RunError(f"{file}: is damaged: {first_line(error)}") from error
    if wrong := next(_unsound(report), "") or _inconsistent(report):
        raise RunError(f"{file}: is damaged: {wrong}")
    return report


def _what_else(folder: Path) -> str:
    """Say what a folder is, if it is no run."""
    if not folder.is_dir():
        return (
            "is no folder: expected a run folder" if folder.exists() else "there is no such run folder"
        )
    if (folder / PATCH_FOLDER).is_dir():
        return (
            f"is a run whose patch is finished and whose scores are not (no {REPORT_FILE}): take them "
            f"with `locft eval MODEL {folder / EDITS_FILE} --patch {folder} -o NEW`"
        )
    return f"is no run folder (no {REPORT_FILE}): expected what `locft edit -o` or `locft eval -o` made"


def _what_version(version: object, folder: Path) -> str:
    if type(version) is not int:
        return f"field schema_version is {brief(version)}: expected {SCHEMA_VERSION}"
    if version > SCHEMA_VERSION:
        return (
            f"a newer locft wrote it (report version {version:,}; this one reads {SCHEMA_VERSION}): "
            "upgrade locft"
        )
    return (
        f"an older locft wrote it (report version {version:,}; this one reads {SCHEMA_VERSION}). Its "
        f"patch is as good as ever: score it again with `locft eval MODEL {folder / EDITS_FILE} --patch "
        f"{folder} -o NEW`"
    )


def _unsound(value: object, place: str = "") -> Iterator[str]:
    """Name the values that cannot have been measured, and could not be drawn."""
    if isinstance(value, int | float) and abs(value) > _LARGEST:
        yield f"field {place} is {brief(value)}: expected a number of at most {_LARGEST:,}"
    if (
        isinstance(value, Figure)
        and value.value is not None
        and value.reason is None
        and (value.low is None or value.high is None)
    ):
        yield f"field {place} has a value, and neither an interval (low, high) nor a reason"
    parts: Iterable[tuple[object, object]] = ()
    if is_dataclass(value):
        parts = vars(value).items()
    elif isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, tuple):
        parts = enumerate(value)
    for name, part in parts:
        if name != "settings":
            inner = (
                f"{place}[{name}]" if isinstance(name, int) else printable(f"{place}.{name}").lstrip(".")
            )
            yield from _unsound(part, inner)


def _inconsistent(report: EditReport | EvalReport) -> str:
    """Say what of a report cannot be, where each field by itself could; nothing if all fits."""
    if isinstance(report, EvalReport):
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
    if report.model.num_parameters < 1:
        return f"field model.num_parameters is {report.model.num_parameters:,}: expected 1 or more"
    training = report.training
    if not 1 <= len(training.fifths) <= _MOST_FIFTHS:
        return f"field training.fifths has {len(training.fifths):,} parts: expected 1 to {_MOST_FIFTHS}"
    for number, epoch in enumerate(training.course):
        if len(epoch.success) != len(training.fifths):
            return (
                f"field training.course[{number}].success has {len(epoch.success):,} shares: expected "
                f"{len(training.fifths)}, as training.fifths has"
            )
    return ""


def _read_lines(file: Path, of: type[Record]) -> Iterator[Record]:
    decoder = msgspec.json.Decoder(of)
    number = 0
    try:
        with open_regular(file) as lines:
            while line := lines.readline(_MAX_LINE_BYTES):
                number += 1
                record = decoder.decode(line)
                if wrong := next(_unsound(record), "") or _unlikely(record):
                    raise RunError(f"{file}: line {number:,} is damaged: {wrong}")
                yield record
    except FileNotFoundError as error:
        raise RunError(f"{file}: is missing, so this run cannot be drawn again") from error
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}") from error
    except msgspec.ValidationError as error:
        raise RunError(f"{file}: line {number:,} is damaged: {_place(error)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RunError(f"{file}: line {number:,} is damaged: {first_line(error)}") from error


def _unlikely(record: object) -> str:
    if isinstance(record, AnswerRecord):
        for name in ("score_before", "score_after"):
            score = getattr(record, name)
            if score is not None and not 0 <= score <= 1:
                return f"field {name} is {score}: expected 0 to 1"
    if isinstance(record, PassageDrift) and record.num_tokens < 1:
        return f"field num_tokens is {record.num_tokens:,}: expected 1 or more"
    return ""


def _place(error: msgspec.ValidationError) -> str:
    """Word what is wrong with a value, and with which: ``field edits.num_edits: expected ...``."""
    what, _, where = str(error).partition(" - at `$")
    what = what.replace("`", "")
    where = where.removesuffix("`").lstrip(".")
    return f"field {where}: {what[:1].lower()}{what[1:]}" if where else what
