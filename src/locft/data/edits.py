"""Reading and writing edits files."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from locft.data.convert import convert
from locft.data.formats import LOCFT, Format, choose_format
from locft.data.problems import Problem, shown
from locft.data.records import Record, Records, parse_records, unpack_lists
from locft.errors import EditsError
from locft.openfile import open_regular
from locft.types import Edit

# Longer names are no misspelling of a field's, and difflib takes quadratic time.
_MAX_FIELD_NAME_CHARS = 40

# Whoever has more of them has keys where the format has values.
_MAX_UNKNOWN_FIELDS = 100

# The format of edits that come from no file.
IN_MEMORY = "python"


@dataclass(frozen=True)
class EditFile:
    """An edits file as it was read.

    Attributes:
        path: The file.
        format: Name of the data set shape that it has.
        edits: All edits without an error of their own, in the order of the file. They are fit
            for use only if no problem is an error.
        problems: Everything that is wrong with the file.
        sha256: Hash of the file's bytes.
    """

    path: Path
    format: str
    edits: tuple[Edit, ...]
    problems: tuple[Problem, ...]
    sha256: str


def read_edits(path: str | Path) -> EditFile:
    """Read an edits file and collect all its problems.

    Args:
        path: A JSONL, JSON or CSV file, in our own or in a published format.

    Returns:
        Its edits and its problems.

    Raises:
        EditsError: The file cannot be read at all, or is of no kind that we know.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            data = file.read()
    except OSError as error:
        raise EditsError(f"cannot read the edits file {path}: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path
        raise EditsError(f"cannot read the edits file {path}: {error}") from error
    parsed = parse_records(data, path)
    if parsed.columns is None:
        form = choose_format(record.fields for record in parsed.records)
    else:
        form = choose_format([parsed.columns])
    edits, found = _convert_all(parsed, form)
    problems = [*parsed.problems, *found]
    if not parsed.records and not problems:
        problems.append(Problem("error", "no-records", "", "the file holds no edits"))
    problems.extend(_unknown_fields(parsed.records, form))
    problems.extend(duplicate_ids(edits))
    return EditFile(
        path=path,
        format=form.name,
        edits=_with_ids(edits),
        problems=tuple(problems),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def hold_edits(edits: Sequence[Edit]) -> EditFile:
    """Hold edits that were given directly to the rules that those of a file are held to.

    Args:
        edits: The edits; where one has no `source`, its place becomes it.

    Returns:
        The edits and their problems, as if read from a file.
    """
    problems: list[Problem] = []
    held: list[Edit] = []
    for index, edit in enumerate(edits):
        where = edit.source or f"edit [{index}]"
        converted, found = convert(LOCFT, _record_of(edit), where)
        problems.extend(found)
        if converted is not None:
            held.append(converted)
    if not edits:
        problems.append(Problem("error", "no-records", "", "there are no edits"))
    problems.extend(duplicate_ids(held))
    return EditFile(Path("edits"), IN_MEMORY, _with_ids(held), tuple(problems), sha256="")


def write_edits(path: Path, edits: Iterable[Edit]) -> None:
    """Write edits as JSONL in our own format.

    Reading the file gives the same edits but for `source`, if they are such as reading gives:
    with distinct ids and without empty texts.

    Args:
        path: The file to write; it is replaced if it exists.
        edits: What to write.

    Raises:
        EditsError: The file cannot be written, or a text cannot be encoded.
    """
    lines = [json.dumps(_record_of(edit), ensure_ascii=False) + "\n" for edit in edits]
    try:
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
    except (OSError, ValueError) as error:
        raise EditsError(f"cannot write the edits file {path}: {error}") from error


def edits_sha256(edits: Iterable[Edit]) -> str:
    """Hash what edits say, whatever file or format they come from.

    Args:
        edits: The edits; their order counts, their `source` does not.

    Returns:
        A SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256()
    for edit in edits:
        digest.update(json.dumps(_record_of(edit), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _record_of(edit: Edit) -> dict[str, object]:
    record: dict[str, object] = {
        "id": edit.id,
        "prompt": edit.prompt,
        "target": edit.target,
        "subject": edit.subject,
        "rephrases": _listed(edit.rephrases),
        "locality": _listed(edit.locality),
        "train_rephrases": _listed(edit.train_rephrases),
        "train_locality": _listed(edit.train_locality),
        "old": edit.old,
    }
    return {name: value for name, value in record.items() if value not in (None, [])}


def _listed(texts: object) -> object:
    """Make a tuple the list that JSON has; anything else is for the checks to judge."""
    return list(texts) if isinstance(texts, tuple) else texts


def _convert_all(parsed: Records, form: Format) -> tuple[list[Edit], list[Problem]]:
    columns = parsed.columns
    if columns is not None and (missing := form.required.difference(columns)):
        # Said once: every record lacks the same fields.
        return [], [_missing_columns(missing, columns)]
    edits: list[Edit] = []
    problems: list[Problem] = []
    for record in parsed.records:
        unpacked, unreadable = unpack_lists(record, form.lists) if columns else (record, [])
        edit, unusable = convert(form, unpacked.fields, record.where)
        problems += unreadable + unusable
        if edit is not None and not unreadable:
            edits.append(edit)
    return edits, problems


def _missing_columns(missing: Iterable[str], columns: Iterable[str]) -> Problem:
    lacking = " and ".join(f"`{name}`" for name in sorted(missing))
    message = (
        f"the header lacks {lacking}; it has {shown(','.join(columns))}, expected a row of "
        "comma-separated names such as prompt,target,rephrases,locality"
    )
    return Problem("error", "missing-column", "line 1", message)


def _unknown_fields(records: Iterable[Record], form: Format) -> list[Problem]:
    """Report each unknown field once, where it first occurs."""
    first: dict[str, str] = {}
    counts: dict[str, int] = {}
    known = sorted(form.known)
    for record in records:
        for name in record.fields:
            if name not in known:
                first.setdefault(name, record.where)
                counts[name] = counts.get(name, 0) + 1
    problems = []
    listed = dict(islice(first.items(), _MAX_UNKNOWN_FIELDS))
    for name, where in listed.items():
        message = f"unknown field {shown(name)} is ignored"
        if counts[name] > 1:
            message += f", here and in {counts[name] - 1:,} more"
        if len(name) <= _MAX_FIELD_NAME_CHARS and (near := get_close_matches(name, known, n=1)):
            message += f"; did you mean `{near[0]}`?"
        problems.append(Problem("warning", "unknown-field", where, message))
    if len(listed) < len(first):
        message = f"{len(first) - len(listed):,} more unknown fields are ignored"
        problems.append(Problem("warning", "unknown-field", "", message))
    return problems


def duplicate_ids(edits: Iterable[Edit]) -> list[Problem]:
    """Find ids that more than one edit has; edits without an id have none in common."""
    first: dict[str, Edit] = {}
    problems = []
    for edit in edits:
        if edit.id and (other := first.setdefault(edit.id, edit)) is not edit:
            message = f"the id {shown(edit.id)} is that of {other.source} already"
            problems.append(Problem("error", "duplicate-id", edit.source, message))
    return problems


def _with_ids(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """Give the edits without an id their position, marked by # where the file uses it too."""
    taken = {edit.id for edit in edits}
    named = []
    for position, edit in enumerate(edits):
        name = edit.id or str(position)
        while not edit.id and name in taken:
            name = f"#{name}"
        named.append(edit if edit.id else replace(edit, id=name))
    return tuple(named)
