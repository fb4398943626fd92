"""Gives some tensors of a checkpoint other values: in a copy of the folder, or in place.

Only the files that hold such a tensor are written. A copy is built beside its place and moved there
by one rename. In place, every moment is either the old state or the new:

1. New files are written beside the old ones, and `.locft/next.json` says what they are for.
2. One rename makes them count: of the weights file, or, where several shards change, of the index,
   which then names the new shards.
3. The shards take their usual names (each new one has two names for a moment) and the index its
   old bytes back; `.locft/record.json` is written, and `next.json` removed.

Whoever writes next asks the tensors' hashes whether step 2 was reached, and finishes or forgets.
"""

import fcntl
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from locft.checkpoint import INDEX_FILE, WEIGHTS_FILE, read_checkpoint
from locft.errors import InputError, LocftError, ModelError, PatchError, brief
from locft.openfile import read_limited
from locft.patch.manifest import dump_manifest, hash_manifest
from locft.patch.record import (
    MAX_RECORD_BYTES,
    NEXT_FILE,
    RECORD_FILE,
    RECORD_FOLDER,
    Record,
    check_record,
    dump_record,
    is_undo_name,
    read_recorded,
    refuse_links,
    require_undo,
    to_json,
    undo_file,
)
from locft.progress import progress
from locft.publish import (
    is_temporary,
    keep_mode,
    locked,
    replace_file,
    require_space,
    staged_folder,
    sync_file,
    sync_folder,
    temporary_files,
    temporary_path,
    write_file,
)
from locft.strictjson import parse_json
from locft.tensorfile import TensorData, TensorEntry, hash_entry, hash_tensor, write_safetensors

# The one subfolder that a tokenizer reads.
_TEMPLATES_FOLDER = "additional_chat_templates"

# Weights in other formats would contradict the patched ones, and model code is never passed on.
_OTHER_WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".tflite")
_CONSOLIDATED = "consolidated.safetensors"  # Mistral's own format, which vLLM can be told to take
_TRAINER_FILE = "training_args.bin"
_SKIPPED_SUFFIXES = (*_OTHER_WEIGHTS, ".index.json", ".py", ".safetensors")

# Where peft is installed, this file makes transformers load the adapter's base model instead.
_ADAPTER_CONFIG = "adapter_config.json"

_BLOCK_BYTES = 16 * 2**20

# How often, and after how long, a folder that was changed while it was read is read again.
_MAX_ATTEMPTS = 50
_PAUSE_S = 0.1

_Result = TypeVar("_Result")

_MAX_JOURNAL_BYTES = 10 * MAX_RECORD_BYTES  # it holds a record and, escaped, an index

_FICLONE = 0x40049409  # Linux: let two files share their blocks until one of them is written


@dataclass(frozen=True)
class Base:
    """A checkpoint folder as it stands.

    Attributes:
        folder: The folder.
        entries: Its tensors.
        record: The patches in it.
        signatures: What tells whether a file was changed since.
    """

    folder: Path
    entries: Mapping[str, TensorEntry]
    record: Record
    signatures: tuple[tuple[int, int, int], ...]

    @property
    def files(self) -> list[Path]:
        """The files that a copy gets."""
        return list_files(self.folder, self.entries)


@dataclass(frozen=True)
class Rewrite:
    """What shall become of a checkpoint.

    Attributes:
        values: New values by tensor name.
        record: The patches in it afterwards.
        undo: For each patch that is new in the record, its matrices' old values.
    """

    values: Mapping[str, TensorData]
    record: Record
    undo: Mapping[str, Mapping[str, TensorData]]


def read_base(folder: Path) -> Base:
    """Read what a checkpoint folder holds, for `write_copy` or `write_in_place`.

    Raises:
        ModelError: The checkpoint is damaged, or has no safetensors weights.
        PatchError: Its record is damaged.
    """
    entries = read_checkpoint(folder)
    # Taken before the record or a tensor is read, so that no later change of them goes unnoticed.
    signatures = _signatures(folder, list_files(folder, entries))
    return Base(folder, entries, read_record(folder), signatures)


def write_copy(base: Base, output: Path, rewrite: Rewrite) -> None:
    """Write a copy of a checkpoint with other values, whole or not at all.

    Args:
        base: The checkpoint to copy; links in it are followed.
        output: The folder to create; it may exist if it is empty.
        rewrite: What is different in the copy; with an empty record it says nothing of locft.

    Raises:
        InputError: `output` is taken, lies within the checkpoint or does not fit on its disk, or
            the checkpoint was changed meanwhile.
        ModelError: A file of the checkpoint is a link to nothing, or the disk did not keep what was
            written.
        PatchError: Old values that a record speaks of are missing.
    """
    source, target = base.folder.resolve(), output.resolve()
    if source == target or source in target.parents:
        raise InputError(f"{output}: is or lies within the checkpoint {base.folder}; name another one")
    for file in _all_files(base.folder):
        if file.is_symlink() and not file.exists() and not _is_skipped(file.name):
            raise ModelError(
                f"{file}: is a link to nothing ({brief(str(file.readlink()))}); fetch the model again,"
                " or remove the link if the file is not needed"
            )
    kept = [require_undo(base.folder, one) for one in set(rewrite.record.ids()) - set(rewrite.undo)]
    files = base.files
    with staged_folder(output) as staging, _unchanged(base, files):
        written = _files_of(base.entries, rewrite.values)
        linked = [
            file
            for file in files
            if file.suffix == ".safetensors" and file.name not in written and _is_alike(file, staging)
        ]
        copied = [file for file in files if file not in linked]
        if staging.stat().st_dev != source.stat().st_dev:
            copied += linked
        require_space(output, staging, _count_bytes(copied) + _undo_bytes(rewrite))
        with progress("writing", _count_bytes(files), "bytes") as step:
            for file in files:
                copy = staging / file.relative_to(base.folder)
                copy.parent.mkdir(exist_ok=True)
                (_link_or_copy if file in linked else _copy)(file, copy, step)
        _put(base.entries, rewrite.values, {name: staging / name for name in written})
        if rewrite.record.patches:
            store = staging / RECORD_FOLDER
            store.mkdir()
            for undo in kept:
                put = _link_or_copy if _is_alike(undo, staging) else _copy
                put(undo, store / undo.name, _ignore)
            _write_undo(staging, rewrite)
            (store / RECORD_FILE).write_bytes(dump_record(rewrite.record))


@contextmanager
def opened_in_place(checkpoint: Path) -> Iterator[Path]:
    """Keep other writers away from a checkpoint folder that is to be changed in place.

    What an interrupted writer left is finished or removed first.

    Args:
        checkpoint: The folder.

    Yields:
        The folder, links resolved.

    Raises:
        InputError: Another process is writing it, or it cannot be written to.
        ModelError: The checkpoint is damaged.
        PatchError: Its record is damaged.
    """
    folder = checkpoint.resolve()
    with locked(folder / RECORD_FOLDER, shown=folder):
        recover(folder)
        try:
            yield folder
        finally:
            with suppress(OSError):
                (folder / RECORD_FOLDER).rmdir()  # unless there is something to remember


def write_in_place(base: Base, rewrite: Rewrite) -> None:
    """Give tensors of a checkpoint other values, all at once; call it within `opened_in_place`.

    Args:
        base: The checkpoint. Files that are links are replaced, not written through.
        rewrite: What shall become of it.

    Raises:
        InputError: There is no room on the disk.
        ModelError: The disk did not keep what was written.
    """
    folder = base.folder
    written = _files_of(base.entries, rewrite.values)
    room = sum((folder / name).stat().st_size for name in written)
    require_space(folder, folder, room + _undo_bytes(rewrite))
    temporary = {name: temporary_path(folder / name) for name in written}
    journal = _Journal(
        record=rewrite.record,
        hashes={
            name: (hash_entry(base.entries[name]), hash_tensor(value.dtype, value.shape, value.data))
            for name, value in rewrite.values.items()
        },
        files={name: path.name for name, path in temporary.items()},
        index=(folder / INDEX_FILE).read_bytes().decode() if len(written) > 1 else None,
    )
    try:
        store = folder / RECORD_FOLDER
        store.mkdir(exist_ok=True)
        _write_undo(folder, rewrite)
        with progress("writing", room, "bytes") as step:
            for name, path in temporary.items():
                _copy(folder / name, path, step)
        _put(base.entries, rewrite.values, temporary)
        for name, path in temporary.items():
            keep_mode(folder / name, path)
        sync_folder(folder)
        write_file(store / NEXT_FILE, journal.dump())
        sync_folder(folder)
        _switch(folder, journal)
        _settle(folder, journal)
    except BaseException:
        # If this fails, too, the next writer does it.
        with suppress(OSError, LocftError):
            recover(folder)
        raise


def recover(folder: Path) -> None:
    """Finish or forget what an interrupted writer left in a checkpoint folder; the caller locks it.

    Raises:
        ModelError: The checkpoint is damaged.
        PatchError: The folder's record is damaged, or so are the tensors that were being replaced.
    """
    journal = _read_journal(folder)
    if journal is not None and _is_reached(folder, journal):
        _settle(folder, journal)
        return
    record = read_recorded(folder)  # what is damaged stays as it is
    (folder / RECORD_FOLDER / NEXT_FILE).unlink(missing_ok=True)
    _tidy(folder, record)


def read_record(folder: Path) -> Record:
    """Read which patches a checkpoint carries, without changing anything.

    Raises:
        ModelError: The checkpoint is damaged.
        PatchError: Its record is damaged; or an interrupted writer was replacing tensors, and they are
            damaged.
    """
    journal = _read_journal(folder)
    if journal is not None and _is_reached(folder, journal):
        return journal.record
    return read_recorded(folder)


def read_steadily(folders: Sequence[Path], read: Callable[[], _Result]) -> _Result:
    """Read from checkpoints that somebody may be changing in place: again, if one was changed.

    Args:
        folders: Their folders.
        read: Reads what they hold.

    Returns:
        What `read` returns.

    Raises:
        InputError: A folder does not come to rest.
    """
    for _ in range(_MAX_ATTEMPTS):
        before = [_names(folder) for folder in folders]
        fault: LocftError | OSError | None = None
        try:
            result = read()
        except (LocftError, OSError) as error:
            fault = error
        changed = [folder for folder, was in zip(folders, before, strict=True) if _names(folder) != was]
        if changed:
            time.sleep(_PAUSE_S)
            continue
        if fault is not None:
            raise fault
        return result
    raise InputError(f"{changed[0]}: is being changed by another process; try again when it is done")


def _names(folder: Path) -> tuple[tuple[str, int], ...]:
    """List a folder's names, and those of its record, with what they stand for."""
    found = []
    for place in (folder, folder / RECORD_FOLDER):
        with suppress(OSError):
            found += [(entry.name, entry.inode()) for entry in os.scandir(place)]
    return tuple(sorted(found))


def leftovers(folder: Path, record: Record) -> list[Path]:
    """List what an interrupted writer left in a checkpoint folder, for the next one to remove.

    Args:
        folder: The folder.
        record: The patches that it carries.

    Returns:
        Files that belong to none of them.
    """
    store = folder / RECORD_FOLDER
    return [*_unused_files(folder), *(_unknown(store, record) if store.is_dir() else ())]


def _unknown(store: Path, record: Record) -> list[Path]:
    """List the files of ours in a record's folder that the record does not speak of."""
    kept = {undo_file(store, patch_id).name for patch_id in record.ids()}
    return [
        path
        for path in store.iterdir()
        if path.name == NEXT_FILE or (is_undo_name(path.name) and path.name not in kept)
    ] + temporary_files(store)


def list_files(checkpoint: Path, entries: Mapping[str, TensorEntry]) -> list[Path]:
    """List the files of a checkpoint that its copy gets.

    The safetensors weights and what else transformers needs; weights in other formats, adapters,
    Python code, hidden files and subfolders stay behind.
    """
    weights = {entry.file.name for entry in entries.values()}
    if WEIGHTS_FILE not in weights:
        weights.add(INDEX_FILE)
    return sorted(
        file
        for file in _all_files(checkpoint)
        if file.is_file() and (file.name in weights or not _is_skipped(file.name))
    )


def list_other_weights(checkpoint: Path) -> list[Path]:
    """List the weights of a checkpoint that lie beside its safetensors weights, in other formats."""
    return sorted(
        file
        for file in checkpoint.iterdir()
        if (file.name.lower().endswith(_OTHER_WEIGHTS) and file.name != _TRAINER_FILE)
        or file.name == _CONSOLIDATED
    )


def _all_files(checkpoint: Path) -> Iterator[Path]:
    for folder in (checkpoint, checkpoint / _TEMPLATES_FOLDER):
        if folder.is_dir():
            yield from folder.iterdir()


@dataclass(frozen=True)
class _Journal:
    """What `next.json` holds: enough to finish, or to see that nothing has happened yet.

    Attributes:
        record: The record to be.
        hashes: What each tensor that is replaced hashed to, and what it will hash to.
        files: The temporary name of each new file, by its final name.
        index: The index as it was and shall be; None if a single file changes.
    """

    record: Record
    hashes: Mapping[str, tuple[str, str]]
    files: Mapping[str, str]
    index: str | None

    def dump(self) -> bytes:
        """Write it as bytes."""
        fields = {"hashes": self.hashes, "files": self.files, "index": self.index}
        body = {"record": to_json(self.record), **fields}
        return dump_manifest({**body, "next_sha256": hash_manifest(body)})

    def switched_index(self) -> str:
        """Return the index with the new shards in it, under their temporary names."""
        index = parse_json((self.index or "").encode())
        weight_map = {name: self.files.get(file, file) for name, file in index["weight_map"].items()}
        return json.dumps({**index, "weight_map": weight_map})


def _read_journal(folder: Path) -> _Journal | None:
    path = folder / RECORD_FOLDER / NEXT_FILE
    refuse_links(path)
    try:
        raw = read_limited(path, _MAX_JOURNAL_BYTES)
        fields = parse_json(raw)
        record = check_record(f"{path}: record", fields["record"])
        hashes = {name: (old, new) for name, (old, new) in fields["hashes"].items()}
        journal = _Journal(record, hashes, dict(fields["files"]), fields["index"])
        if raw != journal.dump():
            raise ValueError("it was changed by hand, or has unknown fields")
        for name, temporary in journal.files.items():
            is_plain = name.isprintable() and name.endswith(".safetensors") and "/" not in name
            if not is_plain or not is_temporary(temporary, name):
                raise ValueError(f"it names a file that locft does not write: {brief(name)}")
        if journal.index is not None:
            journal.switched_index()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise PatchError(f"{path}: cannot be read: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PatchError(f"{path}: is damaged: {error}") from error
    return journal


def _is_reached(folder: Path, journal: _Journal) -> bool:
    """Tell whether a checkpoint's tensors are what a journal wants them to be, or what they were.

    Raises:
        PatchError: They are neither.
    """
    entries = read_checkpoint(folder)
    found = {name: hash_entry(entries[name]) if name in entries else None for name in journal.hashes}
    if all(found[name] == new for name, (_, new) in journal.hashes.items()):
        return True
    odd = [name for name, (old, _) in journal.hashes.items() if found[name] != old]
    if odd:
        neither = [name for name in odd if found[name] != journal.hashes[name][1]] or odd
        raise PatchError(
            f"{folder}: a change of it was interrupted, and something else changed its tensors since"
            f" ({brief(neither[0])}, for one): put the files back as they were, or copy the model afresh"
        )
    return False


def _is_switched(folder: Path, journal: _Journal) -> bool:
    """Tell whether the index names the new shards by their temporary names."""
    return (folder / INDEX_FILE).read_bytes() == journal.switched_index().encode()


def _switch(folder: Path, journal: _Journal) -> None:
    """Make the new files count, by one rename."""
    if journal.index is None:
        for name, temporary in journal.files.items():
            replace_file(folder / temporary, folder / name)
    else:
        write_file(folder / INDEX_FILE, journal.switched_index().encode())


def _settle(folder: Path, journal: _Journal) -> None:
    """Do what is left once the new files count; may be repeated."""
    if journal.index is not None and _is_switched(folder, journal):
        for name, temporary in journal.files.items():
            # The index names the temporary file, so it must stay while the other appears.
            second = temporary_path(folder / name)
            _link_or_copy(folder / temporary, second, _ignore)
            sync_file(second)
            replace_file(second, folder / name)
        write_file(folder / INDEX_FILE, journal.index.encode())
    store = folder / RECORD_FOLDER
    if journal.record.patches:
        write_file(store / RECORD_FILE, dump_record(journal.record))
    else:
        (store / RECORD_FILE).unlink(missing_ok=True)
    sync_folder(store)
    (store / NEXT_FILE).unlink(missing_ok=True)
    _tidy(folder, journal.record)


def _tidy(folder: Path, record: Record) -> None:
    """Remove what the record does not speak of."""
    for path in _unused_files(folder):
        path.unlink()
    store = folder / RECORD_FOLDER
    if store.is_dir():
        for path in _unknown(store, record):
            path.unlink()


def _unused_files(folder: Path) -> list[Path]:
    """List the temporary files that no tensor lies in: who removed `.locft` by hand may have others."""
    used = {entry.file.name for entry in read_checkpoint(folder).values()}
    return [path for path in temporary_files(folder) if path.name not in used]


def _write_undo(folder: Path, rewrite: Rewrite) -> None:
    for patch_id, tensors in rewrite.undo.items():
        file = undo_file(folder, patch_id)
        temporary = temporary_path(file)
        write_safetensors(temporary, tensors)
        sync_file(temporary)
        replace_file(temporary, file)


def _put(
    entries: Mapping[str, TensorEntry], values: Mapping[str, TensorData], files: Mapping[str, Path]
) -> None:
    """Write values over tensors in copies of their files, and read them back."""
    for name, value in values.items():
        entry = entries[name]
        with files[entry.file.name].open("r+b") as file:
            file.seek(entry.start)
            file.write(value.data)
            file.flush()
            os.fsync(file.fileno())
            file.seek(entry.start)
            if file.read(entry.end - entry.start) != value.data:
                raise ModelError(f"{files[entry.file.name]}: did not keep what was written to it")


def _files_of(entries: Mapping[str, TensorEntry], names: Iterable[str]) -> list[str]:
    return sorted({entries[name].file.name for name in names})


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or name == _ADAPTER_CONFIG or name.lower().endswith(_SKIPPED_SUFFIXES)


def _count_bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _undo_bytes(rewrite: Rewrite) -> int:
    return sum(len(value.data) for tensors in rewrite.undo.values() for value in tensors.values())


@contextmanager
def _unchanged(base: Base, files: Sequence[Path]) -> Iterator[None]:
    """Refuse a base that is changed while the body copies files from it."""

    def refuse_change(fault: OSError | None = None) -> None:
        if _signatures(base.folder, files) != base.signatures:
            raise InputError(f"{base.folder}: was changed while it was copied; try again") from fault

    try:
        yield
    except OSError as error:
        refuse_change(error)
        raise
    refuse_change()


def _signatures(folder: Path, files: Iterable[Path]) -> tuple[tuple[int, int, int], ...]:
    record = folder / RECORD_FOLDER / RECORD_FILE
    found = [file.stat() for file in (*files, record) if file.exists()]
    return tuple((status.st_ino, status.st_size, status.st_mtime_ns) for status in found)


def _is_alike(file: Path, folder: Path) -> bool:
    """Tell whether a file has the mode of any new one, judged by a new folder's; a link shares it."""
    return stat.S_IMODE(file.stat().st_mode) == folder.stat().st_mode & 0o666


def _link_or_copy(source: Path, target: Path, step: Callable[[int], object]) -> None:
    """Give a file that nobody will write to a second place, without copying it where that can be."""
    source = source.resolve()  # a link in the base is followed
    if _clone(source, target):
        step(source.stat().st_size)
        return
    try:
        target.hardlink_to(source)
    except OSError:  # another disk, a file system without links, or a file of somebody else's
        _copy(source, target, step)
    else:
        step(source.stat().st_size)


def _copy(source: Path, target: Path, step: Callable[[int], object]) -> None:
    # Not shutil.copy: the copy's mode is up to the umask, and a cached source may be read-only.
    if _clone(source, target):
        step(source.stat().st_size)
        return
    with source.open("rb") as reader, target.open("xb") as writer:
        while block := reader.read(_BLOCK_BYTES):
            writer.write(block)
            step(len(block))


def _clone(source: Path, target: Path) -> bool:
    """Copy a file by sharing its blocks; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    with source.open("rb") as reader, target.open("xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        except OSError:
            is_cloned = False
        else:
            is_cloned = True
    if not is_cloned:
        target.unlink()
    return is_cloned


def _ignore(num_bytes: int) -> None:
    """Advance nothing."""
