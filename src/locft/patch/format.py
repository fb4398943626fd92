"""The patch on disk: a folder with the changed matrices and a manifest of what they belong to.

`patch.safetensors` holds the full new value of every changed matrix, in the checkpoint's dtype and
under the checkpoint's name. `patch.json` holds the rest; each tensor's hash before and after ties
it to its checkpoint and to its data, and `manifest_sha256` ties the manifest to itself.
"""

import dataclasses
import hashlib
import json
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from locft.checkpoint import (
    TensorData,
    hash_tensor,
    is_whole_numbers,
    parse_json,
    read_header,
    read_tensor,
    write_safetensors,
)
from locft.errors import ModelError, PatchError
from locft.staging import staged_folder

TENSORS_FILE = "patch.safetensors"
MANIFEST_FILE = "patch.json"
PATCH_FOLDER = "patch"  # within a run folder
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PatchTensor:
    """One changed matrix.

    Attributes:
        dtype: Its dtype as safetensors names it ("BF16").
        shape: Its shape.
        data: Its new elements, row-major and little-endian.
        old_sha256: `hash_tensor` of the matrix in the checkpoint that the patch was made from.
        new_sha256: `hash_tensor` of the new matrix.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    old_sha256: str
    new_sha256: str


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
        dtype: Safetensors name of the dtype in which the checkpoint stores the location.
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


@dataclass(frozen=True, kw_only=True)
class Patch:
    """An edit of a model, as new values of some of its matrices.

    Attributes:
        tensors: The changed matrices, named as the checkpoint names them.
        manifest: How the patch came about.
    """

    tensors: dict[str, PatchTensor]
    manifest: PatchManifest


def write_patch(patch: Patch, folder: Path) -> None:
    """Write a patch, whole or not at all; equal patches give equal bytes.

    Args:
        patch: The patch.
        folder: The folder to create; it may exist if it is empty.

    Raises:
        InputError: `folder` is taken, or cannot be created.
        PatchError: The patch contradicts itself, so that it could not be read back.
        TypeError: A setting is of a type that JSON does not have.
        ValueError: A tensor's data is not of its size, or a setting is not finite.
    """
    record = {
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(patch.manifest),
        "tensors": {
            name: {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "old_sha256": tensor.old_sha256,
                "new_sha256": tensor.new_sha256,
            }
            for name, tensor in patch.tensors.items()
        },
    }
    record["manifest_sha256"] = _hash_manifest(record)
    with staged_folder(folder) as staging:
        write_safetensors(
            staging / TENSORS_FILE,
            {
                name: TensorData(tensor.dtype, tensor.shape, tensor.data)
                for name, tensor in patch.tensors.items()
            },
        )
        (staging / MANIFEST_FILE).write_bytes(_dump(record))
        # Nobody shall find out later that a patch cannot be read.
        read_patch(staging)


def read_patch(folder: str | Path) -> Patch:
    """Read a patch and verify all of it, down to every tensor's hash.

    Args:
        folder: The patch.

    Returns:
        The patch.

    Raises:
        PatchError: The patch is damaged, incomplete or from a newer locft; names file and field.
    """
    folder = Path(folder)
    for name in (MANIFEST_FILE, TENSORS_FILE):
        path = folder / name
        # A link would make the patch depend on, or leak, files outside its folder.
        if path.is_symlink():
            raise PatchError(f"{path}: is a link, expected a regular file")
        if not path.is_file():
            raise PatchError(
                f"{folder}: is not a patch: has no regular file {name}"
                f" (a patch is a folder with {MANIFEST_FILE} and {TENSORS_FILE})"
            )
    manifest, listed = _read_manifest(folder / MANIFEST_FILE)
    return Patch(tensors=_read_tensors(folder / TENSORS_FILE, listed), manifest=manifest)


def open_patch(path: Path) -> Patch:
    """Read a patch from its folder, or from the run folder that holds it.

    Args:
        path: The patch folder or the run folder.

    Returns:
        The patch.

    Raises:
        PatchError: There is no patch, or it is damaged.
    """
    inner = path / PATCH_FOLDER
    return read_patch(inner if inner.is_dir() else path)


def _read_tensors(path: Path, listed: Mapping[str, Mapping[str, Any]]) -> dict[str, PatchTensor]:
    try:
        entries = read_header(path)
        if entries.keys() != listed.keys():
            odd = min(entries.keys() ^ listed.keys())
            there, missing = (path.name, MANIFEST_FILE) if odd in entries else (MANIFEST_FILE, path.name)
            raise PatchError(f"{path.parent}: tensor {odd!r} is in {there}, but not in {missing}")
        tensors = {}
        for name, fields in listed.items():
            entry = entries[name]
            if (entry.dtype, entry.shape) != (fields["dtype"], fields["shape"]):
                raise PatchError(
                    f"{path}: tensor {name!r}: expected {fields['dtype']} {fields['shape']} as in"
                    f" {MANIFEST_FILE}, found {entry.dtype} {entry.shape}"
                )
            tensor = PatchTensor(data=read_tensor(entry), **fields)
            found = hash_tensor(tensor.dtype, tensor.shape, tensor.data)
            if found != tensor.new_sha256:
                raise PatchError(
                    f"{path}: tensor {name!r}: its data is damaged: expected new_sha256"
                    f" {tensor.new_sha256}, found {found}"
                )
            tensors[name] = tensor
    except ModelError as error:
        raise PatchError(str(error)) from error
    return tensors


def _read_manifest(path: Path) -> tuple[PatchManifest, dict[str, dict[str, Any]]]:
    """Read `patch.json`: the manifest, and each tensor's fields besides its data."""
    try:
        record = parse_json(path.read_bytes())
    except OSError as error:
        raise PatchError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PatchError(f"{path}: is damaged: {error}") from error
    version = record.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise PatchError(
            f"{path}: format_version is {version}, this locft reads {FORMAT_VERSION}:"
            " upgrade it with pip install --upgrade locft"
        )
    if type(version) is not int or version != FORMAT_VERSION:
        raise PatchError(
            f"{path}: format_version: expected {FORMAT_VERSION}, found {reprlib.repr(version)}"
        )

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
        where = f"{path}: tensors[{name!r}]"
        if not isinstance(fields, dict):
            raise PatchError(f"{where}: expected an object, found {reprlib.repr(fields)}")
        _check_fields(
            f"{where}.",
            fields,
            {"dtype": _TEXT, "shape": _SHAPE, "old_sha256": _HASH, "new_sha256": _HASH},
        )

    expected = record.pop("manifest_sha256")
    try:
        found = _hash_manifest(record)
    except (ValueError, RecursionError) as error:  # the settings: a number too large, or nesting
        raise PatchError(f"{path}: settings: cannot be read: {error}") from error
    if found != expected:
        raise PatchError(
            f"{path}: is damaged, or was changed by hand: expected manifest_sha256 {expected},"
            f" found {found}"
        )
    manifest = PatchManifest(
        locft_version=record["locft_version"],
        model=PatchModel(**record["model"]),
        location=PatchLocation(**record["location"]),
        dtype=record["dtype"],
        settings=record["settings"],
        num_edits=record["num_edits"],
        edits_sha256=record["edits_sha256"],
    )
    listed = {
        name: {**fields, "shape": tuple(fields["shape"])} for name, fields in record["tensors"].items()
    }
    return manifest, listed


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
_OBJECT = _Kind("an object", lambda value: isinstance(value, dict))
_HASH = _Kind(
    "64 lower-case hexadecimal digits",
    lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
)


def _check_fields(where: str, record: Mapping[str, object], kinds: Mapping[str, _Kind]) -> None:
    """Raise PatchError unless `record` has exactly the fields of `kinds`, each of its kind."""
    for name in record:
        if name not in kinds:
            raise PatchError(f"{where}{name!r}: unknown field, expected only {', '.join(kinds)}")
    for name, kind in kinds.items():
        if name not in record:
            raise PatchError(f"{where}{name}: is missing, expected {kind.description}")
        if not kind.holds(record[name]):
            raise PatchError(
                f"{where}{name}: expected {kind.description}, found {reprlib.repr(record[name])}"
            )


def _hash_manifest(record: Mapping[str, object]) -> str:
    return hashlib.sha256(_dump(record)).hexdigest()


def _dump(record: Mapping[str, object]) -> bytes:
    return (json.dumps(record, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()
