"""The folder of a study: trials are kept as they are done, so that one that was cut short goes on."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import msgspec

from locft.errors import InputError, RunError, brief, first_line
from locft.openfile import open_regular, read_limited
from locft.publish import add_files, locked, sync_folder, write_file
from locft.report.schema import to_bytes
from locft.study.records import STUDY_VERSION, Topic, Trial, TrialResult

TOPIC_FILE = "study.json"
TRIALS_FILE = "trials.jsonl"
_MAX_BYTES = 10_000_000


class Store:
    """The trials of a study that are done. Made by `open_store`."""

    def __init__(self, folder: Path, done: list[TrialResult]) -> None:
        self.folder = folder
        self._done = done

    def find(self, trial: Trial) -> TrialResult | None:
        """Find what came of a trial; None if it is not done yet."""
        return next((result for result in self._done if result.trial == trial), None)

    def add(self, result: TrialResult) -> None:
        """Keep what came of a trial, for good."""
        line = json.dumps(asdict(result), ensure_ascii=False).encode() + b"\n"
        with (self.folder / TRIALS_FILE).open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._done.append(result)

    def write(self, files: dict[str, bytes]) -> None:
        """Write what is drawn from the trials."""
        add_files(self.folder, files)


@contextmanager
def open_store(folder: Path, topic: Topic) -> Iterator[Store]:
    """Open the folder of a study, or make it, and keep others from it while the body runs.

    Args:
        folder: The folder; a new or empty one, or one of the same study.
        topic: What the study is about.

    Yields:
        The trials that are done.

    Raises:
        InputError: The folder holds something else, a study of something else, or cannot be written to.
        RunError: What it holds is damaged.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror}") from error
    with locked(folder):
        file = folder / TOPIC_FILE
        try:
            if file.exists():
                _refuse_other(file, topic)
            elif any(folder.iterdir()):
                raise InputError(
                    f"{folder}: exists and is no study (no {TOPIC_FILE}): choose another place"
                )
            else:
                write_file(file, to_bytes(topic))
                sync_folder(folder)
        except OSError as error:
            raise InputError(f"{folder}: cannot be written to: {error.strerror}") from error
        done = read_trials(folder)
        _drop_rest(folder / TRIALS_FILE)
        yield Store(folder, done)


def is_study(folder: Path) -> bool:
    """Tell whether a folder is that of a study."""
    return (folder / TOPIC_FILE).is_file()


def read_topic(folder: Path) -> Topic:
    """Read what the study of a folder is about.

    Raises:
        OSError: It cannot be read.
        RunError: It is damaged, or another version of locft wrote it.
    """
    file = folder / TOPIC_FILE
    try:
        found = msgspec.json.decode(read_limited(file, _MAX_BYTES), type=Topic)
    except (msgspec.DecodeError, ValueError) as error:
        raise RunError(f"{file}: is damaged: {first_line(error)}; start anew elsewhere") from error
    if found.version != STUDY_VERSION:
        raise RunError(
            f"{file}: is of version {found.version}, expected {STUDY_VERSION}: another version of locft "
            "wrote it; start anew elsewhere"
        )
    return found


def _refuse_other(file: Path, topic: Topic) -> None:
    """Refuse to go on with a study of something else."""
    found = read_topic(file.parent)
    for field in fields(Topic):
        old, new = getattr(found, field.name), getattr(topic, field.name)
        if old != new:
            raise InputError(
                f"{file.parent}: holds a study with another {_difference(field.name, old, new)}: choose "
                "another place, or ask for the same"
            )


def _difference(name: str, old: object, new: object) -> str:
    """Name what differs, as deep as it can be named."""
    olds = old if isinstance(old, dict) else getattr(old, "__dict__", None)
    news = new if isinstance(new, dict) else getattr(new, "__dict__", None)
    if isinstance(olds, dict) and isinstance(news, dict):
        for key in (*olds, *news):
            if olds.get(key) != news.get(key):
                return _difference(f"{name}.{key}", olds.get(key), news.get(key))
    return f"{name} ({brief(old)}; asked for now: {brief(new)})"


def read_trials(folder: Path) -> list[TrialResult]:
    """Read the trials that are done, without a last line that was cut short.

    Raises:
        OSError: They cannot be read.
        RunError: One is damaged.
    """
    file = folder / TRIALS_FILE
    decoder = msgspec.json.Decoder(TrialResult)
    done: list[TrialResult] = []
    for number, line in enumerate(_whole_lines(file), 1):
        try:
            done.append(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RunError(
                f"{file}: line {number:,} is damaged: {first_line(error)}; delete the line to have its "
                "trial done again"
            ) from error
    return done


def _whole_lines(file: Path) -> list[bytes]:
    if not file.exists():
        return []
    with open_regular(file) as lines:
        return [line for line in lines if line.endswith(b"\n")]


def _drop_rest(file: Path) -> None:
    """Drop a last line that was cut short, so that the next one begins on its own."""
    whole = sum(map(len, _whole_lines(file)))
    if file.exists() and file.stat().st_size > whole:
        os.truncate(file, whole)
