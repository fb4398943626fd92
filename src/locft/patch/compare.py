"""Compares two checkpoints: which tensors differ, and by how much."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from locft.checkpoint import read_checkpoint
from locft.errors import ModelError
from locft.patch.rewrite import list_files, read_steadily
from locft.progress import Step, progress
from locft.tensorfile import TensorEntry

_BLOCK_BYTES = 16 * 2**20  # a multiple of every element's width

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """A tensor that is not the same in two checkpoints.

    Attributes:
        name: Its name.
        kind: Whether its elements, its dtype or its shape differ, or only one checkpoint has it.
        dtype: Its dtype in each checkpoint; None where it is missing.
        shape: Its shape in each checkpoint; None where it is missing.
        num_elements: How many elements it has, where dtype and shape agree.
        num_changed: How many of them differ in a bit; None for elements narrower than a byte.
        relative_change: Frobenius norm of the difference over that of the first tensor; None if that
            is zero, or a tensor is not finite or of no F64, F32, F16 or BF16.
        max_change: Largest absolute difference of two elements; None if a tensor is not finite or of
            another dtype.
    """

    name: str
    kind: Literal["changed", "dtype", "shape", "only in the first", "only in the second"]
    dtype: tuple[str | None, str | None]
    shape: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    num_elements: int | None = None
    num_changed: int | None = None
    relative_change: float | None = None
    max_change: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What differs between two checkpoints.

    Attributes:
        first: The first folder.
        second: The second folder.
        num_tensors: How many tensors they have in common.
        tensors: The tensors that differ.
        files: The other files that differ or that only one of them has, of those that transformers
            reads.
    """

    first: str
    second: str
    num_tensors: int
    tensors: tuple[TensorDifference, ...]
    files: tuple[str, ...]


def compare_checkpoints(first: str | Path, second: str | Path) -> Comparison:
    """Compare two checkpoints, bit by bit.

    Args:
        first: A checkpoint folder.
        second: Another one.

    Returns:
        The tensors and files that differ.

    Raises:
        InputError: A checkpoint is being changed.
        ModelError: A checkpoint is damaged, or has no safetensors weights.
    """
    folders = Path(first), Path(second)
    return read_steadily(folders, lambda: _compare_all(folders))


def _compare_all(folders: tuple[Path, Path]) -> Comparison:
    sides = read_checkpoint(folders[0]), read_checkpoint(folders[1])
    common = sides[0].keys() & sides[1].keys()
    found = []
    total = sum(sides[0][name].end - sides[0][name].start for name in common)
    # Damaged tensors may hold any bits, signalling NaNs included.
    with progress("comparing", total, "bytes") as step, np.errstate(all="ignore"):
        for name in sorted(sides[0].keys() | sides[1].keys()):
            difference = _compare(name, sides[0].get(name), sides[1].get(name), step)
            if difference is not None:
                found.append(difference)
    return Comparison(
        first=str(folders[0]),
        second=str(folders[1]),
        num_tensors=len(common),
        tensors=tuple(found),
        files=tuple(_other_files(folders, sides)),
    )


def _compare(
    name: str, first: TensorEntry | None, second: TensorEntry | None, step: Step
) -> TensorDifference | None:
    dtypes = (first.dtype if first else None, second.dtype if second else None)
    shapes = (first.shape if first else None, second.shape if second else None)
    if first is None or second is None:
        only: Any = "only in the second" if first is None else "only in the first"
        return TensorDifference(name=name, kind=only, dtype=dtypes, shape=shapes)
    num_bytes = first.end - first.start
    if shapes[0] != shapes[1] or dtypes[0] != dtypes[1]:
        step(num_bytes)
        kind: Any = "shape" if shapes[0] != shapes[1] else "dtype"
        return TensorDifference(name=name, kind=kind, dtype=dtypes, shape=shapes)
    if first.start == second.start and os.path.samestat(first.file.stat(), second.file.stat()):
        step(num_bytes)
        return None  # the same file, under two names

    num_elements = int(np.prod(first.shape, dtype=np.int64))
    num_changed, is_changed = 0, False
    square, square_of_change, largest = 0.0, 0.0, 0.0
    width = num_bytes // max(num_elements, 1)
    for old, new in zip(_blocks(first), _blocks(second), strict=True):
        step(len(old))
        values = _floats(first.dtype, old)
        if values is not None:
            square += float(np.sum(np.square(values)))
        if old == new:
            continue
        is_changed = True
        rows = [np.frombuffer(side, np.uint8).reshape(-1, max(width, 1)) for side in (old, new)]
        num_changed += int(np.count_nonzero((rows[0] != rows[1]).any(axis=1)))
        others = _floats(first.dtype, new)
        if values is not None and others is not None:
            change = others - values
            square_of_change += float(np.sum(np.square(change)))
            largest = max(largest, float(np.max(np.abs(change))))
    if not is_changed:
        return None
    is_measured = _floats(first.dtype, b"") is not None and math.isfinite(square + square_of_change)
    relative = math.sqrt(square_of_change) / math.sqrt(square) if is_measured and square else math.inf
    return TensorDifference(
        name=name,
        kind="changed",
        dtype=dtypes,
        shape=shapes,
        num_elements=num_elements,
        num_changed=num_changed if width else None,
        relative_change=relative if math.isfinite(relative) else None,
        max_change=largest if is_measured else None,
    )


def _blocks(entry: TensorEntry) -> Iterator[bytes]:
    try:
        with entry.file.open("rb") as file:
            file.seek(entry.start)
            left = entry.end - entry.start
            while left:
                block = file.read(min(_BLOCK_BYTES, left))
                if len(block) < min(_BLOCK_BYTES, left):
                    raise ModelError(
                        f"{entry.file}: is truncated: its header promises {entry.end} bytes"
                    )
                left -= len(block)
                yield block
    except OSError as error:
        raise ModelError(f"{entry.file}: cannot be read: {error.strerror}") from error


def _floats(dtype: str, data: bytes) -> NDArray[np.float64] | None:
    """Read elements as float64; None if they are no floats that we can read."""
    if dtype == "BF16":  # the upper half of a float32
        halves = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return halves.view(np.float32).astype(np.float64)
    if dtype not in _FLOATS:
        return None
    return np.frombuffer(data, _FLOATS[dtype]).astype(np.float64)


def _other_files(
    folders: tuple[Path, Path], sides: tuple[dict[str, TensorEntry], dict[str, TensorEntry]]
) -> Iterator[str]:
    """Name the files besides the weights that differ."""
    names = [
        {
            str(file.relative_to(folder))
            for file in list_files(folder, entries)
            if file.suffix != ".safetensors" and not file.name.endswith(".index.json")
        }
        for folder, entries in zip(folders, sides, strict=True)
    ]
    for name in sorted(names[0] | names[1]):
        if name not in names[0]:
            yield f"{name}: only in the second"
        elif name not in names[1]:
            yield f"{name}: only in the first"
        elif (folders[0] / name).read_bytes() != (folders[1] / name).read_bytes():
            yield f"{name}: differs"
