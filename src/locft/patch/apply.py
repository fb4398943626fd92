"""Apply a patch: a checkpoint and a patch give a checkpoint that plain transformers loads."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from locft.checkpoint import INDEX_FILE, WEIGHTS_FILE, read_checkpoint
from locft.errors import InputError, PatchError
from locft.patch.format import Patch
from locft.publish import staged_folder
from locft.tensorfile import TensorEntry, hash_tensor, read_tensor

# The one subfolder that a tokenizer reads.
_TEMPLATES_FOLDER = "additional_chat_templates"

# Weights in other formats would contradict the patched ones, and model code is never passed on.
_SKIPPED_SUFFIXES = (
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".index.json",
    ".msgpack",
    ".onnx",
    ".ot",
    ".pt",
    ".pth",
    ".py",
    ".safetensors",
    ".tflite",
)

# Where peft is installed, this file makes transformers load the adapter's base model instead.
_ADAPTER_CONFIG = "adapter_config.json"

_BLOCK_BYTES = 16 * 2**20


def apply_patch(
    checkpoint: str | Path,
    patch: Patch,
    output: str | Path,
    *,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a copy of a checkpoint with a patch applied, whole or not at all.

    The copy has the checkpoint's safetensors weights and the other files that transformers needs;
    weights in other formats, adapters, Python code, hidden files and subfolders stay behind.

    Args:
        checkpoint: The checkpoint folder that the patch was made from; it is only read.
        patch: The patch.
        output: The folder to create; it may exist if it is empty.
        progress: Called with the number of bytes written since its last call; they add up to
            `output_bytes(checkpoint)`.

    Raises:
        InputError: `output` is taken, lies within the checkpoint, or does not fit on its disk.
        ModelError: The checkpoint is damaged, or has no safetensors weights.
        PatchError: The patch does not belong to this checkpoint, or is in it already.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    source, target = checkpoint.resolve(), output.resolve()
    if source == target or source in target.parents:
        raise InputError(f"{output}: is or lies within the checkpoint {checkpoint}; name another one")
    entries = read_checkpoint(checkpoint)
    check_base(checkpoint, entries, patch)

    with staged_folder(output) as staging:
        files = _list_files(checkpoint, entries)
        needed, free = _count_bytes(files), shutil.disk_usage(staging).free
        if needed > free:
            raise InputError(
                f"{output}: not enough disk space: {needed / 1e9:.2f} GB needed,"
                f" {free / 1e9:.2f} GB free"
            )
        for file in files:
            copy = staging / file.relative_to(checkpoint)
            copy.parent.mkdir(exist_ok=True)
            _copy_file(file, copy, progress)
        for name, tensor in patch.tensors.items():
            entry = entries[name]
            with (staging / entry.file.name).open("r+b") as shard:
                shard.seek(entry.start)
                shard.write(tensor.data)


def output_bytes(checkpoint: Path) -> int:
    """Count the bytes that `apply_patch` writes for a checkpoint.

    Args:
        checkpoint: The checkpoint folder.

    Returns:
        The size of all files to copy.

    Raises:
        ModelError: The checkpoint is damaged, or has no safetensors weights.
    """
    return _count_bytes(_list_files(checkpoint, read_checkpoint(checkpoint)))


def _count_bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def check_base(checkpoint: Path, entries: Mapping[str, TensorEntry], patch: Patch) -> None:
    """Check that a checkpoint holds what a patch was made from.

    Args:
        checkpoint: The checkpoint folder, for the message.
        entries: Its tensors.
        patch: The patch.

    Raises:
        PatchError: It does not, or it carries the patch already.
    """
    model = patch.manifest.model
    origin = f"the patch was made from {model.id!r}"
    if model.revision is not None:
        origin += f" at revision {model.revision!r}"
    for name, tensor in patch.tensors.items():
        if name not in entries:
            raise PatchError(f"{checkpoint}: has no tensor {name!r}, which the patch changes; {origin}")
        entry = entries[name]
        if (entry.dtype, entry.shape) != (tensor.dtype, tensor.shape):
            raise PatchError(
                f"{checkpoint}: tensor {name!r} is {entry.dtype} {entry.shape}, but the patch"
                f" expects {tensor.dtype} {tensor.shape}; {origin}"
            )
    found = {
        name: hash_tensor(entries[name].dtype, entries[name].shape, read_tensor(entries[name]))
        for name in patch.tensors
    }
    applied = all(found[name] == tensor.new_sha256 for name, tensor in patch.tensors.items())
    for name, tensor in patch.tensors.items():
        if found[name] != tensor.old_sha256:
            raise PatchError(
                f"{checkpoint}: tensor {name!r} is not the one that the patch was made from:"
                f" expected sha256 {tensor.old_sha256[:12]}, found {found[name][:12]}; {origin}; "
                + (
                    "this checkpoint carries the patch already"
                    if applied
                    else "apply it to that checkpoint"
                )
            )


def _list_files(checkpoint: Path, entries: Mapping[str, TensorEntry]) -> list[Path]:
    weights = {entry.file.name for entry in entries.values()}
    if WEIGHTS_FILE not in weights:
        weights.add(INDEX_FILE)
    return sorted(
        file
        for folder in (checkpoint, checkpoint / _TEMPLATES_FOLDER)
        if folder.is_dir()
        for file in folder.iterdir()
        if file.is_file() and (file.name in weights or not _is_skipped(file.name))
    )


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or name == _ADAPTER_CONFIG or name.lower().endswith(_SKIPPED_SUFFIXES)


def _copy_file(source: Path, target: Path, progress: Callable[[int], object] | None) -> None:
    # Not shutil.copy: the copy's mode is up to the umask, and a cached source may be read-only.
    with source.open("rb") as reader, target.open("xb") as writer:
        while block := reader.read(_BLOCK_BYTES):
            writer.write(block)
            if progress is not None:
                progress(len(block))
