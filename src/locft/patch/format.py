"""The patch on disk: a folder with the changed matrices and a manifest of what they belong to.

`patch.safetensors` holds the full new value of every changed matrix, in the checkpoint's dtype and
under the checkpoint's name. `patch.json` holds the rest; each tensor's hash before and after ties
it to its checkpoint and to its data, and `manifest_sha256` ties the manifest to itself. Both files
can be written in one way only, so that a patch is the same patch down to every bit, or is refused.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locft.errors import ModelError, PatchError, brief
from locft.patch.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    PatchManifest,
    dump_manifest,
    hash_manifest,
    read_manifest,
    to_manifest,
)
from locft.publish import staged_folder
from locft.tensorfile import (
    TensorData,
    has_plain_header,
    hash_tensor,
    is_finite,
    read_header,
    read_tensor,
    write_safetensors,
)

TENSORS_FILE = "patch.safetensors"

PATCH_FOLDER = "patch"  # within a run folder


@dataclass(frozen=True, kw_only=True)
class PatchTensor:
    """One changed matrix.

    Attributes:
        dtype: Its dtype as safetensors names it: BF16, F16, F32 or F64.
        shape: Its shape.
        data: Its new elements, row-major and little-endian; finite, all of them.
        old_sha256: `hash_tensor` of the matrix in the checkpoint that the patch was made from.
        new_sha256: `hash_tensor` of the new matrix.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    old_sha256: str
    new_sha256: str


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
        PatchError: The patch contradicts itself or holds NaN, so that it could not be read back.
        TypeError: A setting is of a type that JSON does not have.
        ValueError: A tensor's data is not of its size, or a setting is not finite.
    """
    with staged_folder(folder) as staging:
        write_safetensors(
            staging / TENSORS_FILE,
            {
                name: TensorData(tensor.dtype, tensor.shape, tensor.data)
                for name, tensor in patch.tensors.items()
            },
        )
        (staging / MANIFEST_FILE).write_bytes(dump_manifest(manifest_record(patch)))
        # Nobody shall find out later that a patch cannot be read.
        read_patch(staging)


def manifest_record(patch: Patch) -> dict[str, Any]:
    """Build what `patch.json` holds of a patch; its `manifest_sha256` is the patch's identity."""
    record = {
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(patch.manifest),
        "tensors": {
            name: {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "old_sha256": tensor.old_sha256,
                "new_sha256": tensor.new_sha256,
            }
            for name, tensor in patch.tensors.items()
        },
    }
    record["manifest_sha256"] = hash_manifest(record)
    return record


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
    with _readable(folder):
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
    record = read_manifest(folder / MANIFEST_FILE)
    tensors = _read_tensors(folder / TENSORS_FILE, record["tensors"])
    return Patch(tensors=tensors, manifest=to_manifest(record))


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
    with _readable(path):
        if inner.is_symlink():
            raise PatchError(f"{inner}: is a link, expected the patch itself; name what it leads to")
        return read_patch(inner if inner.is_dir() else path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Tell of a folder that cannot be looked into as of any other that is no patch."""
    try:
        yield
    except OSError as error:
        raise PatchError(f"{path}: cannot be read: {error.strerror}") from error


def _read_tensors(path: Path, listed: Mapping[str, Mapping[str, Any]]) -> dict[str, PatchTensor]:
    try:
        entries = read_header(path, MAX_MANIFEST_BYTES)
        if entries.keys() != listed.keys():
            odd = min(entries.keys() ^ listed.keys())
            there, missing = (path.name, MANIFEST_FILE) if odd in entries else (MANIFEST_FILE, path.name)
            raise PatchError(f"{path.parent}: tensor {brief(odd)} is in {there}, but not in {missing}")
        tensors = {}
        for name, fields in listed.items():
            entry, where = entries[name], f"{path}: tensor {brief(name)}"
            if (entry.dtype, list(entry.shape)) != (fields["dtype"], fields["shape"]):
                raise PatchError(
                    f"{where}: expected {fields['dtype']} {brief(fields['shape'])} as in"
                    f" {MANIFEST_FILE}, found {entry.dtype} {brief(list(entry.shape))}"
                )
            tensor = PatchTensor(data=read_tensor(entry), **{**fields, "shape": entry.shape})
            found = hash_tensor(tensor.dtype, tensor.shape, tensor.data)
            if found != tensor.new_sha256:
                raise PatchError(
                    f"{where}: its data is damaged: expected new_sha256 {tensor.new_sha256},"
                    f" found {found}"
                )
            if not is_finite(tensor.dtype, tensor.data):
                raise PatchError(f"{where}: holds NaN or infinity, which would spoil the whole model")
            tensors[name] = tensor
        if not has_plain_header(path, entries):
            raise PatchError(
                f"{path}: its header is damaged: it describes the right tensors, but not as locft"
                " writes it: take the file as it was made"
            )
    except ModelError as error:
        raise PatchError(str(error)) from error
    return tensors
