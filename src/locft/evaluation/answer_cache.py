"""What servers answered, kept on disk, so that nothing is asked twice."""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from locft.errors import InputError, first_line
from locft.model.demo import cache_folder

_BUSY_S = 30.0  # how long to wait for another process that writes


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a server is asked. The key that it is asked with is no part of it.

    Attributes:
        url: The whole address, path included.
        body: What is sent there as JSON; it names the model.
    """

    url: str
    body: Mapping[str, object]

    def digest(self) -> str:
        """Return a hash that equal requests share, whatever the order of their keys."""
        text = json.dumps([self.url, self.body], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """Answers in a SQLite file; threads may share the object, and processes the file.

    Close it, or use it in a `with` statement.

    Attributes:
        path: The file.
        num_found: How many times `get` found an answer.
        num_kept: How many answers `put` has kept.
    """

    def __init__(self, path: Path, *, keep: bool = True) -> None:
        """Open the file, or create it.

        Args:
            path: The file; missing parents are created.
            keep: Whether answers stay. A server may get another model under the same name, so those
                of a model that is edited should not: without `keep`, all that was asked for is deleted
                at the end of a `with` body that is done, and stays where an error or an interrupt
                ends it, for the next run to go on from.

        Raises:
            InputError: The file is damaged, or cannot be written to.
        """
        self.path = path
        self.num_found = 0
        self.num_kept = 0
        self._keep = keep
        self._asked: set[str] = set()
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # No transactions of Python's own: each statement is one.
            self._database = sqlite3.connect(
                path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise self._refused(error) from error
        self._database.text_factory = bytes  # so that what is no text can be told
        try:
            # Not WAL, which saves milliseconds an answer: network file systems cannot hold it.
            columns = "request TEXT PRIMARY KEY, answer TEXT NOT NULL"
            self._run(f"CREATE TABLE IF NOT EXISTS answers ({columns})")
        except BaseException:
            self.close()
            raise

    def get(self, request: Request) -> str | None:
        """Look up what a request was answered with; None if that is not known.

        Raises:
            InputError: The file is damaged, or cannot be read.
        """
        digest = request.digest()
        self._asked.add(digest)
        rows = self._run("SELECT answer FROM answers WHERE request = ?", digest)
        if not rows:
            return None
        [(text,)] = rows
        try:
            answer: str = text.decode()
        except UnicodeDecodeError as error:
            raise self._damaged("an answer is no text") from error
        with self._lock:
            self.num_found += 1
        return answer

    def put(self, request: Request, answer: str) -> None:
        """Remember what a request was answered with; it is on disk when this returns.

        Raises:
            InputError: The file is damaged, or cannot be written to.
        """
        digest = request.digest()
        self._asked.add(digest)
        self._run("INSERT OR REPLACE INTO answers VALUES (?, ?)", digest, answer)
        with self._lock:
            self.num_kept += 1

    def close(self) -> None:
        """Close the file; everything in it stays."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None and not self._keep:
                asked = json.dumps(sorted(self._asked))
                self._run("DELETE FROM answers WHERE request IN (SELECT value FROM json_each(?))", asked)
        finally:
            self.close()

    def _run(self, statement: str, *values: str) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._database.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                raise self._refused(error) from error

    def _refused(self, error: Exception) -> InputError:
        # An OperationalError comes from around the file: it is locked, its disk is full or read-only.
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            return self._damaged(first_line(error))
        return InputError(
            f"{self.path}: the file of kept answers cannot be used: {first_line(error)}; see to it, or"
            " name another folder: export LOCFT_CACHE=FOLDER"
        )

    def _damaged(self, reason: str) -> InputError:
        return InputError(
            f"{self.path}: the file of kept answers is damaged: {reason}; delete it and run again (what"
            " it held is asked again)"
        )


def default_cache_path() -> Path:
    """Return the file that answers are kept in, beside what else locft computes once."""
    return cache_folder() / "answers.sqlite"
