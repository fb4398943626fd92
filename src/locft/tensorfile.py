"""A safetensors file as bytes: its tensors, where they lie, and what they hash to.

Nothing here computes with weights, so neither torch nor the safetensors library is needed: every
dtype, bfloat16 included, is a name and a width.
"""

import hashlib
import json
import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from locft.errors import ModelError
from locft.strictjson import is_whole_numbers, parse_json

# The format's own limit; it keeps a damaged length from asking for gigabytes.
_MAX_HEADER_BYTES = 100_000_000

# Bits per element. The order is the one in which the safetensors library ranks dtypes: it lays
# tensors out from the last to the first, so that each one is aligned to the width of its elements.
_DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

_DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPE_BITS)}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a safetensors file.

    Attributes:
        file: The file that holds it.
        dtype: Its dtype as safetensors names it ("BF16").
        shape: Its shape; empty for a scalar.
        start: Offset of its first byte from the start of the file.
        end: Offset behind its last byte.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorData:
    """One tensor to write.

    Attributes:
        dtype: Its dtype as safetensors names it ("BF16").
        shape: Its shape; empty for a scalar.
        data: Its elements, row-major and little-endian.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of a safetensors file.

    Args:
        path: The file.

    Returns:
        The file's tensors by name, in the header's order.

    Raises:
        ModelError: The file cannot be read or is no sound safetensors file: truncated, a header
            that is no valid JSON, an unknown dtype, or data offsets that do not match dtype and
            shape or do not cover the data exactly once.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise ModelError(f"{path}: is truncated, or no safetensors file")
            if length > _MAX_HEADER_BYTES:
                raise ModelError(
                    f"{path}: damaged safetensors header: {length} bytes long,"
                    f" expected at most {_MAX_HEADER_BYTES}"
                )
            header = parse_json(file.read(length))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path}: damaged safetensors header: {error}") from error

    header.pop("__metadata__", None)
    entries = {
        name: _parse_entry(path, name, record, data_start=8 + length, file_size=size)
        for name, record in header.items()
    }
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise ModelError(
                f"{path}: tensor {name!r} overlaps another one, or leaves a gap:"
                f" starts at byte {entry.start}, expected {position}"
            )
        position = entry.end
    if position != size:
        raise ModelError(f"{path}: has {size} bytes, but its tensors end at byte {position}")
    return entries


def _parse_entry(path: Path, name: str, record: object, data_start: int, file_size: int) -> TensorEntry:
    def damaged(what: str) -> ModelError:
        return ModelError(f"{path}: tensor {name!r}: {what}")

    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise damaged("its name is not valid Unicode") from error
    if not isinstance(record, dict):
        raise damaged("expected an object")
    dtype, shape, offsets = (record.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise damaged(f"'dtype': expected one of {', '.join(_DTYPE_BITS)}, found {reprlib.repr(dtype)}")
    if not is_whole_numbers(shape):
        raise damaged(f"'shape': expected a list of whole numbers, found {reprlib.repr(shape)}")
    if not is_whole_numbers(offsets) or len(offsets) != 2:
        raise damaged(f"'data_offsets': expected two whole numbers, found {reprlib.repr(offsets)}")
    start, end = (data_start + offset for offset in offsets)
    if end > file_size:
        raise damaged(f"'data_offsets': {reprlib.repr(offsets)} reach beyond the end of the file")
    if not _fits(end - start, dtype, shape):
        raise damaged(f"'data_offsets': {offsets!r} do not fit {dtype} {reprlib.repr(shape)}")
    return TensorEntry(path, dtype, tuple(shape), start, end)


def _fits(num_bytes: int, dtype: str, shape: Sequence[int]) -> bool:
    # Compared in bits, as there are dtypes narrower than a byte.
    return 8 * num_bytes == _DTYPE_BITS[dtype] * math.prod(shape)


def read_tensor(entry: TensorEntry) -> bytes:
    """Read one tensor's elements, row-major and little-endian.

    Args:
        entry: Where the tensor lies.

    Returns:
        `entry.end - entry.start` bytes.

    Raises:
        ModelError: The file cannot be read, or is shorter than its header said.
    """
    try:
        with entry.file.open("rb") as file:
            file.seek(entry.start)
            data = file.read(entry.end - entry.start)
    except OSError as error:
        raise ModelError(f"{entry.file}: cannot be read: {error.strerror}") from error
    if len(data) != entry.end - entry.start:
        raise ModelError(f"{entry.file}: is truncated: its header promises {entry.end} bytes")
    return data


def hash_tensor(dtype: str, shape: Sequence[int], data: bytes | memoryview) -> str:
    """Hash a tensor: equal exactly if dtype, shape and all elements are, bit by bit.

    Args:
        dtype: Its dtype as safetensors names it ("BF16").
        shape: Its shape.
        data: Its elements, row-major and little-endian.

    Returns:
        The SHA-256 of a line `dtype:dim,dim` and the elements, in lower-case hexadecimal.
    """
    digest = hashlib.sha256(f"{dtype}:{','.join(map(str, shape))}\n".encode())
    digest.update(data)
    return digest.hexdigest()


def write_safetensors(path: Path, tensors: Mapping[str, TensorData]) -> None:
    """Write a safetensors file, byte for byte as the safetensors library would.

    Args:
        path: The file to write; an existing one is overwritten.
        tensors: The tensors by name.

    Raises:
        ValueError: A name is reserved, a dtype unknown, or a tensor's data not of its size.
    """
    for name, tensor in tensors.items():
        if name == "__metadata__":
            raise ValueError("a tensor cannot be named '__metadata__'")
        if tensor.dtype not in _DTYPE_BITS:
            raise ValueError(f"tensor {name!r}: unknown dtype {tensor.dtype!r}")
        if not _fits(len(tensor.data), tensor.dtype, tensor.shape):
            raise ValueError(
                f"tensor {name!r}: {len(tensor.data)} bytes are not {tensor.dtype} {tensor.shape}"
            )
    layout = sorted(tensors.items(), key=lambda item: (-_DTYPE_RANK[item[1].dtype], item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in layout:
        end = position + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (position, end),
        }
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in layout:
            file.write(tensor.data)
