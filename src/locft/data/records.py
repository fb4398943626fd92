"""From the bytes of a JSONL, JSON or CSV file to its records and their places.

Nothing here knows what a record means; `locft.data.formats` does.
"""

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from locft.data.problems import Problem, kind_of, shown
from locft.errors import EditsError
from locft.strictjson import STRICT_DECODER, StrictJsonError, load_json

_EXAMPLE = '{"prompt": "...", "target": "..."}'

# What to do about JSON that is refused for more than its grammar.
_ADVICE = {
    "duplicate-key": "; keep one of them",
    "number-too-large": "; put it in quotes",
    "too-deep": "; expected texts and lists of texts",
}

_BETWEEN_ITEMS = re.compile(r"[ \t\n\r,]*")

_PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))

# What files are that are no text in UTF-8, and what to do about it, by how they begin; the longer
# beginnings first. What is in them is not looked at.
_FOREIGN: dict[tuple[bytes, ...], str] = {
    (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE): "is text in UTF-32; save it as UTF-8",
    (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE): "is text in UTF-16; save it as UTF-8",
    (b"\x1f\x8b",): "is compressed by gzip; unpack it first",
    (b"PK\x03\x04",): "is a zip archive or a spreadsheet; unpack it first, or export it as CSV",
    (b"PAR1",): "is a Parquet file; export it as JSONL",
    _PICKLES: "is a pickle, which is never opened; export it as JSONL",
}
_NUM_PEEKED_BYTES = 64

_MAX_WRAPPER_CHARS = 40


@dataclass(frozen=True)
class Record:
    """One record of a file, its fields still as they were written."""

    where: str
    fields: Mapping[str, object]


@dataclass(frozen=True)
class Records:
    """All records of a file that could be made out.

    Attributes:
        records: In the order of the file.
        problems: Why others could not be made out.
        columns: The header of a CSV file; None for JSONL and JSON.
    """

    records: tuple[Record, ...]
    problems: tuple[Problem, ...]
    columns: tuple[str, ...] | None = None


class _MalformedJsonError(Exception):
    """A text is not JSON; the message and, where it is known, `line` say why and where."""

    def __init__(self, code: str, message: str, line: int | None) -> None:
        super().__init__(message)
        self.code = code
        self.line = line


def parse_records(data: bytes, path: Path) -> Records:
    """Split a file into records.

    Args:
        data: The contents of the file.
        path: Its name; the suffix tells the kind of file, else the first character does.

    Returns:
        The records, and a problem for each part that is none.

    Raises:
        EditsError: The file is no text in UTF-8, or neither the name nor the contents tell what kind
            of file it is.
    """
    reason = next((reason for start, reason in _FOREIGN.items() if data.startswith(start)), None)
    data = data.removeprefix(codecs.BOM_UTF8)
    if reason is None and b"\0" in data[:_NUM_PEEKED_BYTES]:
        reason = "holds NUL bytes, as UTF-16 and binary files do; save it as text in UTF-8"
    if reason is not None:
        raise EditsError(f"{path}: {reason}; expected JSONL, JSON or CSV")
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return _parse_jsonl(data)
        case ".json":
            return _parse_json(data)
        case ".csv":
            return _parse_csv(data)
    match data.lstrip()[:1]:
        case b"[":
            return _parse_json(data)
        case b"{" | b"":
            return _parse_jsonl(data)
    raise EditsError(
        f"{path}: cannot tell what kind of file this is; expected a name that ends in .jsonl, "
        ".json or .csv, or contents that begin with [ (JSON) or { (JSONL)"
    )


def unpack_lists(record: Record, columns: frozenset[str]) -> tuple[Record, list[Problem]]:
    """Read the cells of a CSV record that hold a JSON list.

    Args:
        record: A record of a CSV file.
        columns: The columns in which a cell that starts with ``[`` is a list.

    Returns:
        The record with its lists, and a problem for each cell that is no valid JSON. Such a cell
        is left out.
    """
    fields: dict[str, object] = {}
    problems: list[Problem] = []
    for name, cell in record.fields.items():
        value = cell
        if name in columns and isinstance(cell, str) and cell.lstrip().startswith("["):
            try:
                value = _load_json(cell)
            except _MalformedJsonError as error:
                message = f"`{name}` starts with [ but is no JSON list: {error}"
                problems.append(Problem("error", error.code, record.where, message))
                continue
        fields[name] = value
    return Record(record.where, fields), problems


def _parse_jsonl(data: bytes) -> Records:
    # Split on the line feed only: a string may hold a raw U+2028 or U+0085, which
    # str.splitlines takes for the end of a line.
    items: list[tuple[str, object]] = []
    problems: list[Problem] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            items.append((where, _load_json(line.decode())))
        except UnicodeDecodeError as error:
            problems.append(_invalid_utf8(error, number))
        except _MalformedJsonError as error:
            message = str(error)
            if error.code == "malformed-json":
                message += f"; expected one object on the line, {_EXAMPLE}, and nothing behind it"
            if line.lstrip().startswith(b"["):
                message += "; a file that is one JSON list is named .json"
            problems.append(Problem("error", error.code, where, message))
    return _objects(items, problems)


def _parse_json(data: bytes) -> Records:
    text, problems = _decode(data)
    if text is None or not text.strip():
        return Records((), tuple(problems))
    try:
        document = _load_json(text)
    except _MalformedJsonError as error:
        where = _refused_record(text) if error.line is None else f"line {error.line}"
        message = str(error)
        if error.code == "malformed-json":
            message += f"; expected one JSON list, [{_EXAMPLE}, ...]"
        return Records((), (Problem("error", error.code, where, message),))
    if isinstance(document, dict) and (name := _wrapped_list(document)) is not None:
        message = (
            f"the file is an object whose `{name}` holds a list; expected the list itself: "
            f"jq '.{name}' FILE > edits.json"
        )
        return Records((), (Problem("error", "wrapped-list", "", message),))
    items = document if isinstance(document, list) else [document]
    return _objects([(f"record [{i}]", item) for i, item in enumerate(items)], problems)


def _refused_record(text: str) -> str:
    """Find the record that makes the strict reader refuse a document."""
    number, position = 0, text.find("[") + 1
    if text.lstrip().startswith("["):
        # All before the refused record is sound: the reader got there.
        with suppress(StrictJsonError):
            while found := _BETWEEN_ITEMS.match(text, position):
                _, position = STRICT_DECODER.raw_decode(text, found.end())
                number += 1
    return f"record [{number}]"


def _wrapped_list(document: dict[str, object]) -> str | None:
    """Name the only field of an object, if it holds a list of objects."""
    if len(document) != 1:
        return None
    [(name, value)] = document.items()
    wraps = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    return name if wraps and name.isidentifier() and len(name) <= _MAX_WRAPPER_CHARS else None


def _parse_csv(data: bytes) -> Records:
    text, problems = _decode(data)
    if text is None:
        return Records((), tuple(problems))
    columns: tuple[str, ...] | None = None
    records: list[Record] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        number = reader.line_num + 1
        where = f"line {number}"
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            # Where a quote is left open the rest of the file cannot be told apart.
            message = (
                f"malformed CSV: {error}; expected each quote that opens a cell to be closed, and at "
                f"most {csv.field_size_limit():,} characters in a cell"
            )
            problems.append(Problem("error", "malformed-csv", where, message))
            break
        if not any(cell.strip() for cell in row):
            continue
        if (mark := _foreign_mark(row)) is not None:
            problems.append(Problem("error", "malformed-csv", where, f"malformed CSV: {mark}"))
            if columns is None:
                break
        elif columns is None:
            columns = tuple(cell.strip() for cell in row)
            problems.extend(_repeated_columns(columns, where))
        elif len(row) == len(columns):
            records.append(Record(where, dict(zip(columns, row, strict=True))))
        else:
            message = (
                f"{len(row)} cells where the header has {len(columns)}; "
                "a cell that holds a comma needs quotes"
            )
            problems.append(Problem("error", "cell-count", where, message))
    return Records(tuple(records), tuple(problems), columns)


def _foreign_mark(row: Sequence[str]) -> str | None:
    """Name what a row holds that belongs in no text, though it can be decoded."""
    if any("\0" in cell for cell in row):
        return "a cell holds a NUL byte; save the file as text in UTF-8"
    if row[0].startswith("\ufeff"):
        return "a byte order mark in the middle, as where files were joined; remove it"
    return None


def _repeated_columns(columns: Sequence[str], where: str) -> list[Problem]:
    return [
        Problem("error", "duplicate-column", where, f"the column {shown(name)} is there twice")
        for name, num in sorted(Counter(columns).items())
        if num > 1
    ]


def _decode(data: bytes) -> tuple[str | None, list[Problem]]:
    """Decode a whole file, or say which of its lines are not UTF-8."""
    try:
        return data.decode(), []
    except UnicodeDecodeError:
        problems = []
        for number, line in enumerate(data.split(b"\n"), start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                problems.append(_invalid_utf8(error, number))
        return None, problems


def _invalid_utf8(error: UnicodeDecodeError, line: int) -> Problem:
    message = (
        f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of the line; "
        "save the file as UTF-8"
    )
    return Problem("error", "invalid-utf8", f"line {line}", message)


def _load_json(text: str) -> object:
    if text.startswith("\ufeff"):
        message = (
            "malformed JSON: a byte order mark in the middle, as where files were joined; remove it"
        )
        raise _MalformedJsonError("malformed-json", message, 1)
    try:
        return load_json(text)
    except StrictJsonError as error:
        # Depth is judged before anything is parsed; of the rest the parser keeps no place.
        line = 1 if error.code == "too-deep" else None
        advice = _ADVICE.get(error.code, "")
        raise _MalformedJsonError(error.code, f"{error}{advice}", line) from None
    except json.JSONDecodeError as error:
        message = f"malformed JSON at column {error.colno}: {error.msg}"
        if error.msg == "Extra data" and error.lineno > 1:
            message += "; if each line is a record of its own, name the file .jsonl"
        raise _MalformedJsonError("malformed-json", message, error.lineno) from None


def _objects(items: Sequence[tuple[str, object]], problems: list[Problem]) -> Records:
    records: list[Record] = []
    for where, item in items:
        if isinstance(item, dict):
            records.append(Record(where, item))
        else:
            message = f"{kind_of(item)}, expected an object with the fields of one edit"
            if isinstance(item, list):
                message += "; a file that is one JSON list is named .json"
            problems.append(Problem("error", "not-an-object", where, message))
    return Records(tuple(records), tuple(problems))
