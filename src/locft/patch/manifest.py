"""The manifest of a patch, `patch.json`: what the patch belongs to, and how it came about.

`manifest_sha256` ties what it says to itself, and the file must be written as locft writes it, so
that every changed bit is noticed.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from locft.errors import PatchError, brief
from locft.openfile import read_limited
from locft.strictjson import is_whole_numbers, parse_json
from locft.tensorfile import FLOAT_DTYPES

MANIFEST_FILE = "patch.json"

FORMAT_VERSION = 1

# Room for some 30,000 matrices; the header of the tensors' file says less and is held to it, too.
MAX_MANIFEST_BYTES = 10_000_000


@dataclass(frozen=True, kw_only=True)
class PatchModel:
    """The model that a patch was made from.

    Attributes:
        id: Its repository or folder, as the user named it.
        revision: Its commit; None if it has none.
    """

    id: str
    revision: str | None


@dataclass(frozen=True, kw_only=True)
class PatchLocation:
    """The part of the model that was tuned.

    Attributes:
        name: The location's name, with the layer's index ("20.mlp.down").
        layer: Index of its layer, from 0; None if it is in no layer.
        module: Which part of the layer ("mlp.down").
        num_parameters: How many weights were tuned.
    """

    name: str
    layer: int | None
    module: str
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class PatchManifest:
    """How a patch came about.

    Attributes:
        locft_version: The locft that made it.
        model: The model that it was made from.
        location: What was tuned.
        dtype: In which dtypes the checkpoint stores the location: names of safetensors', joined by ", ".
        settings: The settings of the training run, as JSON values.
        num_edits: How many edits were trained.
        edits_sha256: Hash of the edits, in lower-case hexadecimal.
    """

    locft_version: str
    model: PatchModel
    location: PatchLocation
    dtype: str
    settings: dict[str, Any]
    num_edits: int
    edits_sha256: str

    @property
    def format(self) -> Literal["raw", "chat"]:
        """How prompts were put to the model in training."""
        return "chat" if self.settings.get("format") == "chat" else "raw"


def read_manifest(path: Path) -> dict[str, Any]:
    """Read `patch.json` and check every field of it.

    Raises:
        PatchError: It is damaged, of a newer version, or not written as locft writes it; names the
            field.
    """
    try:
        raw = read_limited(path, MAX_MANIFEST_BYTES)
        record = parse_json(raw)
    except OSError as error:
        raise PatchError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PatchError(f"{path}: is damaged: {error}") from error
    check_manifest(str(path), record)
    if raw != dump_manifest(record):
        raise PatchError(
            f"{path}: is not canonical: it says what it should, but its spaces, the order of its keys or"
            " its escapes are not those that locft writes: take the file as it was made"
        )
    return record


def check_manifest(path: str, record: Mapping[str, Any]) -> None:
    """Check every field of a manifest, its hash included.

    Args:
        path: Where the manifest stands, for messages.
        record: The manifest as JSON holds it.

    Raises:
        PatchError: It is damaged, or of a newer version; names the field.
    """
    version = record.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise PatchError(
            f"{path}: format_version is {version}, this locft reads {FORMAT_VERSION}:"
            " a newer locft wrote it, and a newer one reads it"
        )
    if type(version) is not int or version != FORMAT_VERSION:
        raise PatchError(f"{path}: format_version: expected {FORMAT_VERSION}, found {brief(version)}")

    _check_fields(
        f"{path}: ",
        record,
        {
            "format_version": _NUMBER,
            "locft_version": _TEXT,
            "model": _OBJECT,
            "location": _OBJECT,
            "dtype": _TEXT,
            "tensors": _OBJECT,
            "settings": _OBJECT,
            "num_edits": _NUMBER,
            "edits_sha256": _HASH,
            "manifest_sha256": _HASH,
        },
    )
    _check_fields(f"{path}: model.", record["model"], {"id": _TEXT, "revision": _TEXT.or_null()})
    _check_fields(
        f"{path}: location.",
        record["location"],
        {"name": _TEXT, "layer": _NUMBER.or_null(), "module": _TEXT, "num_parameters": _NUMBER},
    )
    if not record["tensors"]:
        raise PatchError(f"{path}: tensors: expected at least one")
    for name, fields in record["tensors"].items():
        where = f"{path}: tensors[{brief(name)}]"
        if not isinstance(fields, dict):
            raise PatchError(f"{where}: expected an object, found {brief(fields)}")
        _check_fields(
            f"{where}.",
            fields,
            {"dtype": _FLOAT, "shape": _SHAPE, "old_sha256": _HASH, "new_sha256": _HASH},
        )

    expected = record["manifest_sha256"]
    found = hash_manifest({key: record[key] for key in record if key != "manifest_sha256"})
    if found != expected:
        raise PatchError(
            f"{path}: is damaged, or was changed by hand: expected manifest_sha256 {expected},"
            f" found {found}"
        )


def to_manifest(record: Mapping[str, Any]) -> PatchManifest:
    """Take the manifest out of a record that `check_manifest` found sound."""
    return PatchManifest(
        locft_version=record["locft_version"],
        model=PatchModel(**record["model"]),
        location=PatchLocation(**record["location"]),
        dtype=record["dtype"],
        settings=record["settings"],
        num_edits=record["num_edits"],
        edits_sha256=record["edits_sha256"],
    )


@dataclass(frozen=True)
class _Kind:
    """What a field of the manifest may hold: in words, and as a test."""

    description: str
    holds: Callable[[object], bool]

    def or_null(self) -> "_Kind":
        return _Kind(f"{self.description}, or null", lambda value: value is None or self.holds(value))


_TEXT = _Kind("a text", lambda value: isinstance(value, str))

_NUMBER = _Kind("a whole number, zero or more", lambda value: is_whole_numbers([value]))

_SHAPE = _Kind("a list of whole numbers", is_whole_numbers)

_FLOAT = _Kind(f"one of {', '.join(FLOAT_DTYPES)}", lambda value: value in FLOAT_DTYPES)

_OBJECT = _Kind("an object", lambda value: isinstance(value, dict))

_HASH = _Kind(
    "64 lower-case hexadecimal digits",
    lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
)


def _check_fields(where: str, record: Mapping[str, object], kinds: Mapping[str, _Kind]) -> None:
    """Raise PatchError unless `record` has exactly the fields of `kinds`, each of its kind."""
    for name in record:
        if name not in kinds:
            raise PatchError(f"{where}{brief(name)}: unknown field, expected only {', '.join(kinds)}")
    for name, kind in kinds.items():
        if name not in record:
            raise PatchError(f"{where}{name}: is missing, expected {kind.description}")
        if not kind.holds(record[name]):
            raise PatchError(f"{where}{name}: expected {kind.description}, found {brief(record[name])}")


def hash_manifest(record: Mapping[str, object]) -> str:
    """Hash a manifest, without the field that will hold the hash."""
    return hashlib.sha256(dump_manifest(record)).hexdigest()


def dump_manifest(record: Mapping[str, object]) -> bytes:
    """Write a manifest as bytes: equal ones give equal bytes."""
    return (json.dumps(record, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()
