"""What a run leaves on the disk, and how it is read again (no torch).

An edit run comes in two steps: the finished patch, and then its scores. Each comes whole or not at all:
a run folder always holds a patch and what it was trained with, and one with a `report.json` is a whole
run. An evaluation is a folder of its own, which may stand within the run folder that it is about.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from locft.config import RunConfig, to_toml
from locft.data.augment import Example
from locft.data.edits import write_edits
from locft.errors import RunError, brief, first_line
from locft.openfile import open_regular, read_limited
from locft.patch.format import PATCH_FOLDER, Patch, write_patch
from locft.publish import add_files, staged_folder
from locft.recipe.soundness import (
    impossible_record,
    impossible_value,
    inconsistent_report,
    unlike_answers,
    unlike_passages,
)
from locft.report.content import Evaluated, describe_edit, describe_evaluation
from locft.report.html import draw_html
from locft.report.markdown import draw_markdown
from locft.report.page import Page
from locft.report.schema import SCHEMA_VERSION, EditReport, EvalReport, to_bytes
from locft.strictjson import parse_json
from locft.types import AnswerRecord, Edit, PassageDrift

ANSWERS_FILE = "answers.jsonl"
DRIFT_FILE = "drift.jsonl"
EDITS_FILE = "edits.jsonl"
EXAMPLES_FILE = "examples.jsonl"
REPORT_FILE = "report.json"
TRAINING_FILE = "train.jsonl"

_REPORTS: dict[str, type[EditReport] | type[EvalReport]] = {"edit": EditReport, "evaluation": EvalReport}
_MAX_REPORT_BYTES = 100_000_000
_MAX_LINE_BYTES = 10_000_000

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


def save_trained(
    folder: Path,
    patch: Patch,
    edits: Sequence[Edit],
    added: Sequence[Sequence[Example]],
    config: RunConfig,
) -> None:
    """Write a finished patch and what it was trained with, into the staged run folder.

    Args:
        folder: The folder.
        patch: The patch.
        edits: The edits.
        added: What each was trained on beside its own prompt.
        config: The settings.
    """
    write_patch(patch, folder / PATCH_FOLDER)
    write_edits(folder / EDITS_FILE, edits)
    if any(added):
        lines = [
            {"edit": edit.id, **asdict(example)}
            for edit, examples in zip(edits, added, strict=True)
            for example in examples
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / EXAMPLES_FILE).write_text(text, "utf-8")
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


def read_run(folder: Path, say: Callable[[str], None] = lambda _: None) -> Run:
    """Read a run folder, or the folder of an evaluation.

    Args:
        folder: The folder.
        say: Called with a line about each evaluation within a run folder that cannot be read and is left
            out.

    Returns:
        The run, with the evaluations that stand within its folder.

    Raises:
        RunError: It is none, is not whole, is damaged, or another version of locft wrote it.
    """
    with _way_out(folder):
        run = _read_alone(folder)
    if not isinstance(run.report, EditReport):
        return run
    return replace(run, evaluations=tuple(_evaluations(folder, run.report.edits.sha256, say)))


def _read_alone(folder: Path) -> Run:
    """Read a run or an evaluation, without what stands within its folder."""
    report = _to_report(_read_record(folder), folder)
    answers = tuple(_read_lines(folder / ANSWERS_FILE, AnswerRecord))
    passages: tuple[PassageDrift, ...] = ()
    wrong = unlike_answers(report, answers)
    if report.drift is not None:
        passages = tuple(_read_lines(folder / DRIFT_FILE, PassageDrift))
        wrong = wrong or unlike_passages(report.drift, passages)
    if wrong:
        raise RunError(f"{folder / REPORT_FILE}: does not fit what it was made from: {wrong}")
    return Run(folder=folder, report=report, answers=answers, passages=passages)


def _evaluations(folder: Path, edits_sha256: str, say: Callable[[str], None]) -> Iterator[Evaluated]:
    """Read the evaluations that stand within a run folder, in the order of their names."""
    try:
        # A hidden one is being written, or a killed writer left it.
        inner = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise RunError(f"{folder}: cannot be read: {error.strerror}") from error
    for path in inner:
        try:
            if not (path / REPORT_FILE).is_file():
                continue
            with _way_out(path):
                kind = _read_record(path).get("kind")
                if kind == "comparison":
                    continue
                if kind == "edit":
                    say(f"left out: {path}: is an edit run of its own, and no evaluation of this one")
                    continue
                found = _read_alone(path)
                if found.report.edits.sha256 != edits_sha256:
                    raise RunError(
                        f"{path / REPORT_FILE}: is of other edits than the run (sha256 "
                        f"{found.report.edits.sha256[:12]}, not {edits_sha256[:12]})"
                    )
        except RunError as error:
            say(f"left out: {error}")
            continue
        except OSError as error:  # a folder that may not be looked into
            say(f"left out: {path}: cannot be read: {error.strerror}")
            continue
        if isinstance(found.report, EvalReport):
            yield Evaluated(name=path.name, report=found.report, answers=found.answers)


@contextmanager
def _way_out(folder: Path) -> Iterator[None]:
    """Say how to score the patch of a run that cannot be read, or whose evaluation cannot be."""
    try:
        yield
    except RunError as error:
        if not _is_folder(folder):
            raise
        run = next((at for at in (folder, folder.parent) if _is_folder(at / PATCH_FOLDER)), None)
        if run is None:
            raise
        how = f"`locft eval MODEL {run / EDITS_FILE} --patch {run} -o NEW`"
        raise RunError(f"{error}; to score its patch: {how}") from error


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # its name is too long, or it may not be looked at
        return False


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
        raise RunError(f"{file}: {_what_version(version)}")
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
    if wrong := impossible_value(report) or inconsistent_report(report):
        raise RunError(f"{file}: is damaged: {wrong}")
    return report


def _what_else(folder: Path) -> str:
    """Say what a folder is, if it is no run."""
    if not folder.is_dir():
        return (
            "is no folder: expected a run folder" if folder.exists() else "there is no such run folder"
        )
    if (folder / PATCH_FOLDER).is_dir():
        return f"is a run whose patch is finished and whose scores are not (no {REPORT_FILE})"
    return f"is no run folder (no {REPORT_FILE}): expected what `locft edit -o` or `locft eval -o` made"


def _what_version(version: object) -> str:
    if type(version) is not int:
        return f"field schema_version is {brief(version)}: expected the number {SCHEMA_VERSION}"
    if version > SCHEMA_VERSION:
        return (
            f"a newer locft wrote it (report version {version:,}; this one reads {SCHEMA_VERSION}): "
            "upgrade locft"
        )
    return f"an older locft wrote it (report version {version:,}; this one reads {SCHEMA_VERSION})"


def _read_lines(file: Path, of: type[Record]) -> Iterator[Record]:
    decoder = msgspec.json.Decoder(of)
    number = 0
    try:
        with open_regular(file) as lines:
            while line := lines.readline(_MAX_LINE_BYTES):
                number += 1
                record = decoder.decode(line)
                if wrong := impossible_value(record) or impossible_record(record):
                    raise RunError(f"{file}: line {number:,} is damaged: {wrong}")
                yield record
    except FileNotFoundError as error:
        raise RunError(f"{file}: is missing, and the report cannot be drawn without it") from error
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}") from error
    except msgspec.ValidationError as error:
        raise RunError(f"{file}: line {number:,} is damaged: {_place(error)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RunError(f"{file}: line {number:,} is damaged: {first_line(error)}") from error


def _place(error: msgspec.ValidationError) -> str:
    """Word what is wrong with a value, and with which: ``field edits.num_edits: expected ...``."""
    what, _, where = str(error).partition(" - at `$")
    what = what.replace("`", "")
    where = where.removesuffix("`").lstrip(".")
    return f"field {where}: {what[:1].lower()}{what[1:]}" if where else what
