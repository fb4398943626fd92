"""A safetensors file as bytes: its tensors, where they lie, and what they hash to.

Nothing here computes with weights, so neither torch nor the safetensors library is needed: every
dtype, bfloat16 included, is a name and a width.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from locft.errors import ModelError, brief
from locft.openfile import open_regular
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

# The bits of the exponent, all of which are set in infinities and NaN alone. IEEE 754; bfloat16 is
# the upper half of float32.
_EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000}

FLOAT_DTYPES = tuple(_EXPONENTS)

_BLOCK_BYTES = 16 * 2**20

# How files begin that come under the name of safetensors, and what they are. Neither is opened
# further: what is in a pickle can run code.
_FOREIGN = {
    b"\x80": "a pickle, which can run code when it is opened and is not read here",
    b"PK": "a zip archive, as torch.save writes around pickles, and is not read here",
}


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

    @property
    def num_bytes(self) -> int:
        """How long its data is."""
        return self.end - self.start


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

    @property
    def num_bytes(self) -> int:
        """How long its data is."""
        return len(self.data)


class _Described(Protocol):
    """A tensor, as far as a header tells of it."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def num_bytes(self) -> int: ...


def read_header(path: Path, max_bytes: int = _MAX_HEADER_BYTES) -> dict[str, TensorEntry]:
    """Read and check the header of a safetensors file.

    Args:
        path: The file.
        max_bytes: The longest header to read.

    Returns:
        The file's tensors by name, in the header's order.

    Raises:
        ModelError: The file cannot be read or is no sound safetensors file: truncated, a header
            that is no valid JSON, an unknown dtype, or data offsets that do not match dtype and
            shape or do not cover the data exactly once.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            _refuse_foreign(path, file.peek(9)[:9])
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise ModelError(f"{path}: is truncated, or no safetensors file")
            if length > max_bytes:
                raise ModelError(
                    f"{path}: damaged safetensors header: {length} bytes long,"
                    f" expected at most {max_bytes}"
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
                f"{path}: tensor {brief(name)} overlaps another one, or leaves a gap:"
                f" starts at byte {entry.start}, expected {position}"
            )
        position = entry.end
    if position != size:
        raise ModelError(f"{path}: has {size} bytes, but its tensors end at byte {position}")
    return entries


def _refuse_foreign(path: Path, start: bytes) -> None:
    # A header is an object; the numbers of its length before it may look like anything.
    kind = next((kind for magic, kind in _FOREIGN.items() if start.startswith(magic)), None)
    if kind is not None and start[8:] != b"{":
        raise ModelError(
            f"{path}: is no safetensors file but {kind}; take the model's own safetensors files, or have"
            " someone you trust load it and save it again with save_pretrained()"
        )


def _parse_entry(path: Path, name: str, record: object, data_start: int, file_size: int) -> TensorEntry:
    def damaged(what: str) -> ModelError:
        return ModelError(f"{path}: tensor {brief(name)}: {what}")

    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise damaged("its name is not valid Unicode") from error
    if not isinstance(record, dict):
        raise damaged("expected an object")
    dtype, shape, offsets = record.get("dtype"), record.get("shape"), record.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise damaged(f"'dtype': expected one of {', '.join(_DTYPE_BITS)}, found {brief(dtype)}")
    if not is_whole_numbers(shape):
        raise damaged(f"'shape': expected a list of whole numbers, found {brief(shape)}")
    if not is_whole_numbers(offsets) or len(offsets) != 2:
        raise damaged(f"'data_offsets': expected two whole numbers, found {brief(offsets)}")
    start, end = data_start + offsets[0], data_start + offsets[1]
    if end > file_size:
        raise damaged(f"'data_offsets': {brief(offsets)} reach beyond the end of the file")
    if not _fits(end - start, dtype, shape):
        raise damaged(f"'data_offsets': {brief(offsets)} do not fit {dtype} {brief(shape)}")
    return TensorEntry(path, dtype, tuple(shape), start, end)


def _fits(num_bytes: int, dtype: str, shape: Sequence[int]) -> bool:
    # Compared in bits, as there are dtypes narrower than a byte.
    num_bits = 0 if 0 in shape else _DTYPE_BITS[dtype]
    for size in shape:
        num_bits *= size
        if num_bits > 8 * num_bytes:  # before the product of a hostile shape takes for ever
            break
    return num_bits == 8 * num_bytes


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
        with open_regular(entry.file) as file:
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


def hash_entry(entry: TensorEntry) -> str:
    """Hash a tensor in a file, as `hash_tensor` does.

    Raises:
        ModelError: The file cannot be read, or is shorter than its header said.
    """
    return hash_tensor(entry.dtype, entry.shape, read_tensor(entry))


def is_finite(dtype: str, data: bytes) -> bool:
    """Tell whether all elements of a tensor are numbers, neither infinite nor NaN.

    Args:
        dtype: One of `FLOAT_DTYPES`.
        data: Its elements, little-endian.

    Returns:
        True if they are.
    """
    import numpy as np  # only here, so that what merely moves bytes starts without it

    kind = np.dtype(f"<u{_DTYPE_BITS[dtype] // 8}")
    exponent = kind.type(_EXPONENTS[dtype])
    view = memoryview(data)
    # In blocks, as a matrix may take a large part of the memory.
    blocks = (view[start : start + _BLOCK_BYTES] for start in range(0, len(data), _BLOCK_BYTES))
    return not any(((np.frombuffer(block, kind) & exponent) == exponent).any() for block in blocks)


def has_plain_header(path: Path, entries: Mapping[str, TensorEntry]) -> bool:
    """Tell whether a file begins exactly as `write_safetensors` would write it.

    The same tensors can be described in many ways, and beside them anything else; to a file that
    is known to come from here, any other header is damage.

    Args:
        path: The file.
        entries: Its tensors.

    Returns:
        True if it does.

    Raises:
        ModelError: The file cannot be read.
    """
    expected = _dump_header(entries)
    try:
        with open_regular(path) as file:
            return file.read(len(expected)) == expected
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


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
    header = _dump_header(tensors)
    with path.open("wb") as file:
        file.write(header)
        for name in _laid_out(tensors):
            file.write(tensors[name].data)


def _laid_out(tensors: Mapping[str, _Described]) -> list[str]:
    """Put the names of tensors in the order in which the safetensors library writes their data."""
    return sorted(tensors, key=lambda name: (-_DTYPE_RANK[tensors[name].dtype], name))


def _dump_header(tensors: Mapping[str, _Described]) -> bytes:
    """Write what comes before the data: the header and, before it, its length."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in _laid_out(tensors):
        tensor = tensors[name]
        end = position + tensor.num_bytes
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (position, end),
        }
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
