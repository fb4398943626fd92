"""Says which patches a checkpoint carries, and whether its matrices are what they should be."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from locft.checkpoint import read_checkpoint
from locft.errors import PatchError
from locft.patch.manifest import PatchLocation, PatchModel, to_manifest
from locft.patch.record import read_undo, short
from locft.patch.rewrite import leftovers, read_record, read_steadily
from locft.tensorfile import TensorEntry, hash_entry


@dataclass(frozen=True, kw_only=True)
class PatchStatus:
    """A patch in a checkpoint.

    Attributes:
        id: Its identity: the hash of its manifest.
        model: What it was made from.
        location: What it changed.
        num_edits: How many edits it holds.
        edits_sha256: Hash of the edits.
        tensors: The tensors that it changed.
        obstacle: Why it cannot be reverted by itself; None if it can.
    """

    id: str
    model: PatchModel
    location: PatchLocation
    num_edits: int
    edits_sha256: str
    tensors: tuple[str, ...]
    obstacle: str | None


@dataclass(frozen=True, kw_only=True)
class TensorStatus:
    """A tensor that patches changed.

    Attributes:
        name: Its name in the checkpoint.
        patch: Identity of the newest patch that changed it.
        expected_sha256: What it should hash to.
        found_sha256: What it hashes to; None if it is missing.
        state: Whether these are equal.
    """

    name: str
    patch: str
    expected_sha256: str
    found_sha256: str | None
    state: Literal["ok", "changed", "missing"]


@dataclass(frozen=True, kw_only=True)
class CheckpointStatus:
    """What an edited checkpoint holds.

    Attributes:
        checkpoint: The folder.
        is_intact: Whether every patched tensor is what its patch made of it, and the old values are
            there to go back to.
        patches: The patches in it, from the oldest to the newest.
        tensors: The tensors that they changed.
        leftovers: Files that an interrupted writer left; the next one removes them.
    """

    checkpoint: str
    is_intact: bool
    patches: tuple[PatchStatus, ...]
    tensors: tuple[TensorStatus, ...]
    leftovers: tuple[str, ...]


def read_status(checkpoint: str | Path) -> CheckpointStatus:
    """Say which patches a checkpoint carries, and whether its matrices still hash to what they should.

    Args:
        checkpoint: A checkpoint folder, edited or not; it is only read.

    Returns:
        Its patches and patched tensors.

    Raises:
        InputError: The checkpoint is being changed.
        ModelError: The checkpoint is damaged, or has no safetensors weights.
        PatchError: Its record is damaged.
    """
    folder = Path(checkpoint)
    return read_steadily([folder], lambda: _read_status(folder))


def _read_status(folder: Path) -> CheckpointStatus:
    entries = read_checkpoint(folder)
    record = read_record(folder)
    newest = record.newest()
    tensors = []
    for name, manifest in sorted(newest.items()):
        expected = manifest["tensors"][name]["new_sha256"]
        found = hash_entry(entries[name]) if name in entries else None
        tensors.append(
            TensorStatus(
                name=name,
                patch=manifest["manifest_sha256"],
                expected_sha256=expected,
                found_sha256=found,
                state="missing" if found is None else "ok" if found == expected else "changed",
            )
        )
    odd = {tensor.name: tensor.state for tensor in tensors if tensor.state != "ok"}
    patches = []
    num_lost = 0
    for manifest in record.patches:
        patch_id = manifest["manifest_sha256"]
        about = to_manifest(manifest)
        later = [name for name in manifest["tensors"] if newest[name] is not manifest]
        amiss = [name for name in manifest["tensors"] if name in odd]
        obstacle: str | None
        if later:
            above = newest[later[0]]["manifest_sha256"]
            obstacle = f"patch {short(above)} builds on it: revert that one first"
        elif amiss:
            obstacle = f"tensor {amiss[0]!r} is {odd[amiss[0]]}"
        else:
            obstacle = _missing_undo(folder, manifest, entries)
            num_lost += obstacle is not None
        patches.append(
            PatchStatus(
                id=patch_id,
                model=about.model,
                location=about.location,
                num_edits=about.num_edits,
                edits_sha256=about.edits_sha256,
                tensors=tuple(sorted(manifest["tensors"])),
                obstacle=obstacle,
            )
        )
    return CheckpointStatus(
        checkpoint=str(folder),
        is_intact=not odd and not num_lost,
        patches=tuple(patches),
        tensors=tuple(tensors),
        leftovers=tuple(sorted(str(path.relative_to(folder)) for path in leftovers(folder, record))),
    )


def _missing_undo(
    folder: Path, manifest: Mapping[str, Any], entries: Mapping[str, TensorEntry]
) -> str | None:
    try:
        read_undo(folder, manifest, entries)
    except PatchError as error:
        return str(error)
    return None
