import contextlib
import hashlib
import json
import os
import stat
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from locft.checkpoint import read_checkpoint
from locft.errors import ModelError
from locft.tensorfile import TensorData, hash_tensor, read_header, read_tensor, write_safetensors

# The names that the safetensors library writes and reads dtypes under, and their widths in bytes.
DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "C64": ("complex64", 8),
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
}


@st.composite
def tensors(draw: st.DrawFn) -> TensorData:
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    size = int(np.prod(shape, dtype=int)) * DTYPES[dtype][1]
    return TensorData(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


names = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda name: name != "__metadata__")


def library_bytes(tensors: dict[str, TensorData]) -> bytes:
    buffers = {name: np.frombuffer(tensor.data, np.uint8) for name, tensor in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=DTYPES[tensor.dtype][0],
            shape=list(tensor.shape),
            data_ptr=buffers[name].ctypes.data,
            data_len=len(tensor.data),
        )
        for name, tensor in tensors.items()
    }
    return bytes(safetensors.serialize(specs, metadata={"format": "pt"}))


def file_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@settings(deadline=None)
@given(st.dictionaries(names, tensors(), max_size=5))
def test_written_file_reads_back_equal_and_is_what_the_library_writes(
    written: dict[str, TensorData],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        write_safetensors(path, written)
        raw = path.read_bytes()
        entries = read_header(path)
        read = {name: TensorData(e.dtype, e.shape, read_tensor(e)) for name, e in entries.items()}
    assert read == written
    assert raw == library_bytes(written)
    assert {
        name: TensorData(view["dtype"], tuple(view["shape"]), bytes(view["data"]))
        for name, view in safetensors.deserialize(raw)  # type: ignore[no-untyped-call]
    } == written


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(6, dtype=np.float16),
        np.array(3.5),
        np.zeros((0, 4), np.int64),
    ],
)
def test_file_of_the_library_is_read(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": array, "b": np.ones(3, np.uint8)}, path)
    entries = read_header(path)
    assert entries["a"].shape == array.shape
    assert read_tensor(entries["a"]) == array.tobytes()
    assert read_tensor(entries["b"]) == b"\1\1\1"
    assert path.read_bytes()[entries["a"].start : entries["a"].end] == array.tobytes()


def test_dtypes_narrower_than_a_byte_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes({"a": entry("F4", [3, 2], [0, 3])}, b"abc"))
    assert read_tensor(read_header(path)["a"]) == b"abc"
    path.write_bytes(file_bytes({"a": entry("F4", [3], [0, 1])}, b"a"))
    with pytest.raises(ModelError, match="do not fit F4"):
        read_header(path)


@settings(deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=100).map(file_bytes))
@example(file_bytes(b"[" * 100_000))
@example(file_bytes(b'{"a":' * 100_000))
@example(file_bytes(b'{"a": ' + b"9" * 5000 + b"}"))
@example(file_bytes({"a": entry(shape=[10**4000, 10**4000])}, b"abcd"))
@example(file_bytes({"a": entry(offsets=[10**4299, 10**4299 + 4])}, b"abcd"))
@example(file_bytes(b'{"\\ud800": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', b"abcd"))
def test_arbitrary_bytes_raise_only_model_errors(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(raw)
        with contextlib.suppress(ModelError):
            read_header(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values),
    max_leaves=5,
)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=3),
        json_values
        | st.builds(
            entry,
            st.sampled_from(["F32", "U8", "nope"]) | json_values,
            st.lists(st.integers(-1, 2), max_size=2) | json_values,
            st.lists(st.integers(-1, 9), min_size=2, max_size=2) | json_values,
        ),
        max_size=3,
    ),
    st.binary(max_size=9),
)
def test_arbitrary_headers_raise_only_model_errors_and_cover_what_they_pass(
    header: dict[str, object], data: bytes
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(file_bytes(header, data))
        try:
            entries = read_header(path)
        except ModelError:
            return
        covered = sorted(read_tensor(e) for e in entries.values())
    assert sum(map(len, covered)) == len(data)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "truncated"),
        (b"\x08\0\0", "truncated"),
        (struct.pack("<Q", 9) + b"{}", "truncated"),
        (struct.pack("<Q", 2**63) + b"{}", "truncated"),
        (file_bytes(b"{]"), "damaged safetensors header"),
        (file_bytes(b"\xff{}"), "damaged safetensors header"),
        (file_bytes([]), "expected a JSON object"),
        (file_bytes(b'{"a": {}, "a": {}}'), "same key twice"),
        (file_bytes(b'{"__metadata__": NaN}'), "JSON has no NaN"),
        (file_bytes({"a": 1}), "'a': expected an object"),
        (file_bytes({"a": entry("F31")}, b"abcd"), "'dtype': expected one of"),
        (file_bytes({"a": entry(["F32"])}, b"abcd"), "'dtype': expected one of"),
        (file_bytes({"a": entry(shape=[1.0])}, b"abcd"), "'shape': expected a list"),
        (file_bytes({"a": entry(shape=[True])}, b"abcd"), "'shape': expected a list"),
        (file_bytes({"a": entry(shape=[-1])}, b"abcd"), "'shape': expected a list"),
        (file_bytes({"a": entry(offsets=[0])}, b"abcd"), "expected two whole numbers"),
        (file_bytes({"a": entry(offsets=[-4, 0])}, b"abcd"), "expected two whole numbers"),
        (file_bytes({"a": entry(offsets=[4, 0])}, b"abcd"), "do not fit F32"),
        (file_bytes({"a": entry(shape=[2])}, b"abcd"), "do not fit F32"),
        (file_bytes({"a": entry()}, b"abc"), "beyond the end"),
        (file_bytes({"a": entry()}, b"abcde"), "tensors end at byte"),
        (file_bytes({"a": entry(offsets=[1, 5])}, b"abcde"), "leaves a gap"),
        (file_bytes({"a": entry(), "b": entry(offsets=[2, 6])}, b"abcdef"), "overlaps"),
        (file_bytes({"a": entry(), "b": entry()}, b"abcd"), "overlaps"),
    ],
)
def test_damaged_file_is_refused_with_its_defect(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ModelError, match=message):
        read_header(path)


def test_header_over_100_mb_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(path, 200_000_000)
    with pytest.raises(ModelError, match="100000001 bytes long"):
        read_header(path)


def test_file_that_shrank_since_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": TensorData("U8", (4,), b"abcd")})
    found = read_header(path)["a"]
    os.truncate(path, found.end - 1)
    with pytest.raises(ModelError, match="truncated"):
        read_tensor(found)
    path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        read_tensor(found)
    with pytest.raises(ModelError, match="cannot be read"):
        read_header(path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("a", TensorData("F32", (2,), b"abcd")),
        ("a", TensorData("float32", (1,), b"abcd")),
        ("__metadata__", TensorData("F32", (1,), b"abcd")),
    ],
)
def test_tensor_that_no_file_can_hold_is_not_written(
    tmp_path: Path, name: str, tensor: TensorData
) -> None:
    with pytest.raises(ValueError):
        write_safetensors(tmp_path / "x", {name: tensor})
    assert not (tmp_path / "x").exists()


def test_written_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_safetensors(tmp_path / "x", {})
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "x")}
    assert len(modes) == 1


@settings(deadline=None)
@given(tensors(), tensors())
def test_hash_is_equal_exactly_for_equal_tensors(a: TensorData, b: TensorData) -> None:
    hashes = [hash_tensor(t.dtype, t.shape, t.data) for t in (a, b)]
    assert (hashes[0] == hashes[1]) == (a == b)
    assert hashes[0] == hash_tensor(a.dtype, list(a.shape), memoryview(a.data))


def test_hash_never_changes() -> None:
    # Patches that are out there carry these hashes.
    expected = hashlib.sha256(b"BF16:1,2\n\0\1\2\3").hexdigest()
    assert hash_tensor("BF16", (1, 2), b"\0\1\2\3") == expected


def write_shards(folder: Path, weight_map: object = None) -> dict[str, np.ndarray[Any, Any]]:
    arrays = {name: np.full((2, 2), value, np.float16) for value, name in enumerate("abc")}
    safetensors.numpy.save_file({"a": arrays["a"]}, folder / "m-1.safetensors")
    safetensors.numpy.save_file({"b": arrays["b"], "c": arrays["c"]}, folder / "m-2.safetensors")
    shards = {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"}
    index = {"metadata": {}, "weight_map": shards if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return arrays


def test_single_file_checkpoint_is_read_rather_than_its_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {"x": TensorData("U8", (1,), b"x")})
    assert read_checkpoint(tmp_path).keys() == {"x"}


def test_sharded_checkpoint_is_read(tmp_path: Path) -> None:
    arrays = write_shards(tmp_path)
    entries = read_checkpoint(tmp_path)
    assert entries["b"].file == tmp_path / "m-2.safetensors"
    assert {name: read_tensor(e) for name, e in entries.items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }


def test_checkpoint_of_links_is_read(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write_shards(tmp_path / "blobs")
    for blob in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / blob.name).symlink_to(blob)
    assert read_checkpoint(tmp_path / "snapshot").keys() == {"a", "b", "c"}


def test_tensor_that_only_its_shard_names_is_read_as_transformers_does(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors"})
    assert read_checkpoint(tmp_path).keys() == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (["a"], "'weight_map': expected an object"),
        ({"a": 1}, "expected the plain name"),
        ({"a": "../m-1.safetensors"}, "expected the plain name"),
        ({"a": "/m-1.safetensors"}, "expected the plain name"),
        ({"a": "sub\\m-1.safetensors"}, "expected the plain name"),
        ({"a": "m\0.safetensors"}, "expected the plain name"),
        ({"a": "pytorch_model.bin"}, "expected the plain name"),
        ({"a": "m-3.safetensors"}, "m-3.safetensors: cannot be read"),
        ({"a": "m-1.safetensors", "z": "m-1.safetensors"}, "'z' is said to be in m-1"),
        ({"a": "m-2.safetensors", "b": "m-2.safetensors"}, "'a' is said to be in m-2"),
    ],
)
def test_index_that_contradicts_its_shards_is_refused(
    tmp_path: Path, weight_map: object, message: str
) -> None:
    write_shards(tmp_path, weight_map)
    with pytest.raises(ModelError, match=message):
        read_checkpoint(tmp_path)


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write_safetensors(tmp_path / "m-1.safetensors", {"b": TensorData("U8", (1,), b"x")})
    with pytest.raises(ModelError, match="'b' is in two shards"):
        read_checkpoint(tmp_path)


def no_folder(folder: Path) -> None:
    folder.rmdir()


def no_weights(folder: Path) -> None:
    pass


def pickled_weights(folder: Path) -> None:
    (folder / "pytorch_model.bin").touch()


def damaged_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_bytes(b"\xff")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_folder, "is not a folder"),
        (no_weights, r"neither model\.safetensors nor .*index\.json$"),
        (pickled_weights, "only safetensors is read"),
        (damaged_index, "is damaged"),
    ],
)
def test_folder_without_readable_weights_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        read_checkpoint(folder)
