"""A Hugging Face checkpoint folder as bytes: its tensors, where they lie, and what they hash to.

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
from typing import Any, NoReturn, TypeGuard

from locft.errors import ModelError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

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


def read_checkpoint(folder: Path) -> dict[str, TensorEntry]:
    """Find every tensor that transformers would load from a checkpoint folder.

    Args:
        folder: Holds `model.safetensors`, or `model.safetensors.index.json` and its shards; where
            both are there, the former counts, as it does for transformers.

    Returns:
        The tensors by name.

    Raises:
        ModelError: There are no safetensors weights, or they are damaged or contradict their index.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: is not a folder; a checkpoint is a folder with {WEIGHTS_FILE}")
    if (folder / WEIGHTS_FILE).is_file():
        return read_header(folder / WEIGHTS_FILE)
    index = folder / INDEX_FILE
    if not index.is_file():
        message = f"{folder}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}"
        if any(folder.glob("*.bin")):
            message += (
                "; there are *.bin weights, but only safetensors is read: load the model with"
                " transformers and save it again with save_pretrained()"
            )
        raise ModelError(message)

    weight_map = _read_weight_map(index)
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        for name, entry in read_header(folder / shard).items():
            # transformers loads whole shards, so the last copy would win, whatever the index says.
            if name in entries:
                raise ModelError(
                    f"{folder}: tensor {name!r} is in two shards, {entries[name].file.name} and {shard}"
                )
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries or entries[name].file.name != shard:
            raise ModelError(f"{index}: tensor {name!r} is said to be in {shard}, but is not")
    return entries


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = parse_json(index.read_bytes()).get("weight_map")
    except OSError as error:
        raise ModelError(f"{index}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{index}: is damaged: {error}") from error
    if not isinstance(weight_map, dict):
        raise ModelError(f"{index}: 'weight_map': expected an object")
    for name, shard in weight_map.items():
        # The index is input from outside: it must not lead to files elsewhere.
        if (
            not isinstance(shard, str)
            or not shard.endswith(".safetensors")
            or any(mark in shard for mark in "/\\\0")
        ):
            raise ModelError(
                f"{index}: 'weight_map': expected the plain name of a safetensors file"
                f" for {name!r}, found {reprlib.repr(shard)}"
            )
    return weight_map


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


def parse_json(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no key twice, no NaN or Infinity.

    Args:
        raw: The text.

    Returns:
        The object.

    Raises:
        ValueError: `raw` is anything else; says what.
    """
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("JSON has an object with the same key twice")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


def is_whole_numbers(value: object) -> TypeGuard[list[int]]:
    """Tell whether a JSON value is a list of whole numbers, zero or more, as a shape is.

    Args:
        value: The value.

    Returns:
        True if it is; booleans do not count as numbers.
    """
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
