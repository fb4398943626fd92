"""What an edited checkpoint says of itself: the patches in it, and how to take them out again.

The folder `.locft` of an edited checkpoint holds `record.json`, the manifests of its patches from
the oldest to the newest, and for each of them the old values of its matrices. `next.json` is there
only while matrices are replaced in place; `locft.patch.rewrite` tells why.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locft.errors import ModelError, PatchError, brief
from locft.openfile import read_limited
from locft.patch.manifest import check_manifest, dump_manifest, hash_manifest
from locft.strictjson import parse_json
from locft.tensorfile import TensorData, TensorEntry, hash_tensor, read_header, read_tensor

RECORD_FOLDER = ".locft"

RECORD_FILE = "record.json"

NEXT_FILE = "next.json"

RECORD_VERSION = 1

# What to do about a damaged record.
_AMENDS = f"put it back as it was, or remove the folder {RECORD_FOLDER} and give up reverting"

# Room for some 30,000 patches.
MAX_RECORD_BYTES = 100_000_000


@dataclass(frozen=True)
class Record:
    """The patches in a checkpoint.

    Attributes:
        patches: Their manifests as `patch.json` holds them, from the oldest to the newest.
    """

    patches: tuple[Mapping[str, Any], ...] = ()

    def newest(self) -> dict[str, Mapping[str, Any]]:
        """Return, for each patched tensor, the manifest of the newest patch that changed it."""
        return {name: manifest for manifest in self.patches for name in manifest["tensors"]}

    def ids(self) -> tuple[str, ...]:
        """Return the identity of each patch."""
        return tuple(manifest["manifest_sha256"] for manifest in self.patches)


def undo_file(folder: Path, patch_id: str) -> Path:
    """Return the file with the old values of a patch's matrices; the same patch has the same ones."""
    return folder / RECORD_FOLDER / f"{patch_id}.safetensors"


def is_undo_name(name: str) -> bool:
    """Tell whether a file in the record's folder is one of old values, by its name."""
    return re.fullmatch(r"[0-9a-f]{64}\.safetensors", name) is not None


def require_undo(folder: Path, patch_id: str) -> Path:
    """Return the file with the old values of a patch's matrices, which must be there.

    Raises:
        PatchError: It is missing, or a link.
    """
    file = undo_file(folder, patch_id)
    refuse_links(file)
    if not file.is_file():
        raise PatchError(f"{file}: is missing; {_without(patch_id)}")
    return file


def read_undo(
    folder: Path, manifest: Mapping[str, Any], entries: Mapping[str, TensorEntry]
) -> dict[str, TensorData]:
    """Read the old values of a patch's matrices, and verify them.

    Args:
        folder: The checkpoint.
        manifest: The patch in its record.
        entries: The checkpoint's tensors; those of the patch are among them.

    Returns:
        The old values by name, of the checkpoint's dtypes and shapes.

    Raises:
        PatchError: They are missing or damaged, or the file is a link.
    """
    patch_id = manifest["manifest_sha256"]
    file = require_undo(folder, patch_id)
    values = {}
    try:
        undo = read_header(file)
        for name, fields in manifest["tensors"].items():
            old, entry = undo.get(name), entries[name]
            if old is None or (old.dtype, old.shape) != (entry.dtype, entry.shape):
                raise ModelError(f"{file}: holds no such tensor {brief(name)} as the checkpoint does")
            values[name] = TensorData(old.dtype, old.shape, read_tensor(old))
            if hash_tensor(old.dtype, old.shape, values[name].data) != fields["old_sha256"]:
                raise ModelError(f"{file}: tensor {brief(name)} is damaged")
    except ModelError as error:
        raise PatchError(f"{error}; {_without(patch_id)}") from error
    return values


def _without(patch_id: str) -> str:
    return (
        f"without these old values patch {short(patch_id)} cannot be reverted: take the model as it was"
        " before that patch"
    )


def refuse_links(file: Path) -> None:
    """Refuse a file of the record that is a link, or in a folder that is one.

    Raises:
        PatchError: It is; it could lead to files elsewhere.
    """
    for path in (file.parent, file):
        if path.is_symlink():
            raise PatchError(
                f"{path}: is a link, which no part of a checkpoint's record may be; put what it leads to"
                " in its place"
            )


def short(patch_id: str) -> str:
    """Shorten a patch's identity to what people need to tell patches apart."""
    return patch_id[:12]


def read_recorded(folder: Path) -> Record:
    """Read `record.json` as it stands; a folder without one carries no patches.

    Raises:
        PatchError: It is damaged, a link, or from a newer locft; names the field.
    """
    path = folder / RECORD_FOLDER / RECORD_FILE
    refuse_links(path)
    try:
        raw = read_limited(path, MAX_RECORD_BYTES)
        fields = parse_json(raw)
        record = check_record(str(path), fields)
        if raw != dump_manifest(fields):
            raise ValueError("it was changed by hand")
        return record
    except FileNotFoundError:
        return Record()
    except OSError as error:
        raise PatchError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PatchError(f"{path}: is damaged: {error}; {_AMENDS}") from error


def check_record(path: str, record: Mapping[str, Any]) -> Record:
    """Check every field of a record, its hash included.

    Args:
        path: Where the record stands, for messages.
        record: The record as JSON holds it.

    Raises:
        PatchError: It is damaged or from a newer locft; names the field.
    """
    version = record.get("format_version")
    if type(version) is int and version > RECORD_VERSION:
        raise PatchError(
            f"{path}: format_version is {version}, this locft reads {RECORD_VERSION}:"
            " a newer locft wrote it, and a newer one reads it"
        )
    if type(version) is not int or version != RECORD_VERSION:
        raise PatchError(f"{path}: format_version: expected {RECORD_VERSION}, found {version!r:.40}")
    manifests = record.get("patches")
    if not isinstance(manifests, list) or not all(isinstance(one, dict) for one in manifests):
        raise PatchError(f"{path}: patches: expected a list of objects")
    for i, manifest in enumerate(manifests):
        check_manifest(f"{path}: patches[{i}]", manifest)
    found = Record(tuple(manifests))
    if dict(record) != to_json(found):
        raise PatchError(
            f"{path}: is damaged, or was changed by hand: its record_sha256 does not match,"
            f" or it has unknown fields; {_AMENDS}"
        )
    seen: dict[str, str] = {}
    for i, manifest in enumerate(manifests):
        for name, fields in manifest["tensors"].items():
            if seen.get(name, fields["old_sha256"]) != fields["old_sha256"]:
                raise PatchError(
                    f"{path}: patches[{i}]: tensor {brief(name)} does not follow on the one before"
                )
            seen[name] = fields["new_sha256"]
    return found


def to_json(record: Record) -> dict[str, Any]:
    """Build what `record.json` holds."""
    body: dict[str, Any] = {
        "format_version": RECORD_VERSION,
        "patches": [dict(manifest) for manifest in record.patches],
    }
    return {**body, "record_sha256": hash_manifest(body)}


def dump_record(record: Record) -> bytes:
    """Write a record as bytes: equal ones give equal bytes."""
    return dump_manifest(to_json(record))
