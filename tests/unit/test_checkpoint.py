import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from locft.checkpoint import read_checkpoint, refuse_quantised
from locft.errors import ModelError
from locft.tensorfile import (
    FLOAT_DTYPES,
    TensorData,
    TensorEntry,
    has_plain_header,
    hash_tensor,
    is_finite,
    read_header,
    read_tensor,
    write_safetensors,
)

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
@example(file_bytes({"a": entry(shape=[10**600, 10**600])}, b"abcd"))
@example(file_bytes({"a": entry(offsets=[10**600, 10**600 + 4])}, b"abcd"))
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
        (file_bytes(b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}"), "nested too deeply"),
        (file_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "has over 640 digits: '9999"),
        # The product of these takes minutes.
        (file_bytes({"a": entry(shape=[10**600] * 15_000)}, b"abcd"), "do not fit F32"),
        (file_bytes({"a": entry(shape=[10**600] * 15_000 + [0])}, b"abcd"), "do not fit F32"),
        (file_bytes({"a": entry(offsets=[10**600, 4])}, b"abcd"), "do not fit F32"),
        (file_bytes({"\x1b[2J" + "n" * 10**6: 1}), r"tensor '\\x1b\[2Jn"),
        (file_bytes({"a": entry("D" * 10**6)}, b"abcd"), "'dtype': expected one of"),
        (file_bytes({"a": entry(shape="S" * 10**6)}, b"abcd"), "'shape': expected a list"),
        (file_bytes({"a": entry(offsets=["O" * 10**6])}, b"abcd"), "expected two whole numbers"),
    ],
)
def test_damaged_file_is_refused_with_its_defect(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ModelError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


class Bomb:
    """Would be run by whoever opens the pickle."""

    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise SystemExit",)


def zipped(name: str, contents: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, contents)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        *((pickle.dumps(Bomb(), protocol), "a pickle") for protocol in range(2, 6)),
        (pickle.dumps(list(range(100_000)), 4) + bytes(10**7), "a pickle"),
        (zipped("archive/data.pkl", pickle.dumps(Bomb())), "a zip archive"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\x80\x02", "a pickle"),
        (struct.pack("<Q", 128) + b" " * 128, "a pickle"),
    ],
)
def test_pickle_or_archive_under_the_name_of_safetensors_is_named_and_not_opened(
    tmp_path: Path, raw: bytes, kind: str
) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(ModelError, match=f"is no safetensors file but {kind}") as caught:
        read_checkpoint(tmp_path)
    assert "take the model's own safetensors files" in str(caught.value)


def test_pickle_of_the_oldest_kinds_is_no_safetensors_file_either(tmp_path: Path) -> None:
    for protocol in (0, 1):
        (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb(), protocol))
        with pytest.raises(ModelError, match="truncated, or no safetensors file"):
            read_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [0x80, 0x4B50])
def test_header_whose_length_looks_like_another_kind_of_file_is_read(
    tmp_path: Path, length: int
) -> None:
    path = tmp_path / "x.safetensors"
    text = json.dumps({"a": entry("U8", [1], [0, 1])}).encode().ljust(length)
    path.write_bytes(file_bytes(text, b"x"))
    assert read_header(path).keys() == {"a"}


def test_long_header_is_read_in_linear_time(tmp_path: Path) -> None:
    # 5 MB; at quadratic cost this would take minutes.
    path = tmp_path / "x.safetensors"
    empty = {f"model.layers.{i}.mlp.weight": entry("F32", [0, 2], [0, 0]) for i in range(55_000)}
    raw = file_bytes(empty)
    assert len(raw) > 5_000_000
    path.write_bytes(raw)
    assert len(read_header(path)) == 55_000


def test_pipe_or_device_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(ModelError, match="cannot be read: is a pipe or a device"):
            read_header(tmp_path / name)
        with pytest.raises(ModelError, match="cannot be read: is a pipe or a device"):
            read_tensor(TensorEntry(tmp_path / name, "U8", (1,), 0, 1))
        with pytest.raises(ModelError, match="cannot be read: is a pipe or a device"):
            has_plain_header(tmp_path / name, {})


@pytest.mark.parametrize("percent", range(100))
def test_file_cut_off_anywhere_is_refused(tmp_path: Path, percent: int) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {name: TensorData("F32", (5, 7), bytes(140)) for name in "abc"})
    os.truncate(path, path.stat().st_size * percent // 100)
    with pytest.raises(ModelError, match=r"model\.safetensors: "):
        read_checkpoint(tmp_path)


@settings(deadline=None)
@given(st.dictionaries(names, tensors(), max_size=5))
def test_own_header_is_told_from_any_other_that_says_the_same(written: dict[str, TensorData]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        write_safetensors(path, written)
        entries = read_header(path)
        assert has_plain_header(path, entries)
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        for other in (
            json.dumps(header).encode(),
            json.dumps(header | {"__metadata__": {"format": "np"}}).encode(),
            json.dumps(header | {"__metadata__": {"format": "pt", "x": "y"}}).encode(),
            raw[8 : 8 + length] + b" " * 8,
        ):
            path.write_bytes(file_bytes(other, data))
            described = read_header(path)
            assert described.keys() == written.keys()
            assert not has_plain_header(path, described)


def float_bytes(dtype: str, value: float) -> bytes:
    if dtype == "BF16":
        return np.array(value, "<f4").tobytes()[2:]
    return np.array(value, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()


FINITE = {"F16": 65504.0, "BF16": 3.3895314e38, "F32": 3.4028235e38, "F64": 1.7976931348623157e308}


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_infinities_and_nan_are_found_wherever_they_are(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    numbers = [0.0, -0.0, 1.5, FINITE[dtype], -FINITE[dtype], 5e-324]
    finite = [float_bytes(dtype, number) for number in numbers]
    for block_bytes in (16, 16 * 2**20):
        monkeypatch.setattr("locft.tensorfile._BLOCK_BYTES", block_bytes)
        assert is_finite(dtype, b"".join(finite))
        assert is_finite(dtype, b"")
        for odd in (math.nan, -math.nan, math.inf, -math.inf):
            for place in range(len(finite) + 1):
                data = [*finite[:place], float_bytes(dtype, odd), *finite[place:]]
                assert not is_finite(dtype, b"".join(data)), (odd, place)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_pattern_of_bits_is_judged_as_numpy_does(dtype: str) -> None:
    bits = np.random.default_rng(0).integers(0, 256, (4096, 8), np.uint8)
    bits[::2, 1::2] |= 0x78  # half of them near the top of the exponent
    bits[::2, 0::2] |= 0xF0
    if dtype == "BF16":
        numbers = bits.copy().view("<u2").astype("<u4") << 16
        judged = np.isfinite(numbers.view("<f4"))
    else:
        judged = np.isfinite(bits.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]))
    assert 0 < judged.sum() < judged.size
    width = bits.size // judged.size
    found = [is_finite(dtype, bits.tobytes()[i : i + width]) for i in range(0, bits.size, width)]
    assert found == judged.ravel().tolist()


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


def write_shards(
    folder: Path, weight_map: dict[str, str] | None = None
) -> dict[str, np.ndarray[Any, Any]]:
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
        ({"a": ""}, "expected the plain name"),
        ({"a": "."}, "expected the plain name"),
        ({"a": ".."}, "expected the plain name"),
        ({"a": "../../model.safetensors"}, "expected the plain name"),
        ({"a": "sub/m-1.safetensors"}, "expected the plain name"),
        ({"a": "C:m-1.safetensors"}, "expected the plain name"),
        ({"a": "\\\\host\\share\\m-1.safetensors"}, "expected the plain name"),
        ({"a": "m\x1b[2J.safetensors"}, "expected the plain name"),
        ({"a": "m\n.safetensors"}, "expected the plain name"),
        ({"a": "m\x9b.safetensors"}, "expected the plain name"),
        ({"a": "m\u202e.safetensors"}, "expected the plain name"),
        ({"a": "m\ud800.safetensors"}, "expected the plain name"),
        ({"a": None}, "expected the plain name"),
        ({"a": ["m-1.safetensors"]}, "expected the plain name"),
        ({"a": "m-1.safetensors" * 10**5 + "x"}, "expected the plain name"),
        ({"\x1b" * 10**5: 1}, "expected the plain name"),
        ({"a": "m" * 300 + ".safetensors"}, "cannot be read: File name too long"),
        (None, "'weight_map': expected an object"),
        ({"\x1b[2J" * 10**4: "m-1.safetensors"}, "is said to be in m-1"),
        ({"a": "pytorch_model.bin"}, "expected the plain name"),
        ({"a": "m-3.safetensors"}, "m-3.safetensors: cannot be read: it is missing, but .* names it"),
        ({"a": "m-1.safetensors", "z": "m-1.safetensors"}, "'z' is said to be in m-1"),
        ({"a": "m-2.safetensors", "b": "m-2.safetensors"}, "'a' is said to be in m-2"),
    ],
)
def test_index_that_contradicts_its_shards_is_refused(
    tmp_path: Path, weight_map: object, message: str
) -> None:
    write_shards(tmp_path)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message) as caught:
        read_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"weight_map": {"a": "m-1.safetensors", "a": "m-2.safetensors"}}', "same key twice: 'a'"),
        (b'{"weight_map": ' + b"[" * 10**5 + b"}", "nested too deeply"),
        (b'{"weight_map": ' + b"9" * 5000 + b"}", "has over 640 digits: '9999"),
        (b'{"weight_map": {}, "more": NaN}', "JSON has no NaN"),
        (b"[]", "expected a JSON object"),
        (b"", "Expecting value"),
    ],
)
def test_damaged_index_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(raw)
    with pytest.raises(ModelError, match=rf"index\.json: is damaged: .*{message}"):
        read_checkpoint(tmp_path)


def test_index_over_100_mb_is_refused_without_reading_it(tmp_path: Path) -> None:
    write_shards(tmp_path)
    os.truncate(tmp_path / "model.safetensors.index.json", 10**11)
    with pytest.raises(ModelError, match="100,000,000,000 bytes long, expected at most 100,000,000"):
        read_checkpoint(tmp_path)


def test_shard_that_is_a_pipe_or_a_folder_is_refused_without_waiting(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "m-2.safetensors").unlink()
    os.mkfifo(tmp_path / "m-2.safetensors")
    with pytest.raises(ModelError, match=r"m-2\.safetensors: cannot be read: is a pipe"):
        read_checkpoint(tmp_path)
    (tmp_path / "m-2.safetensors").unlink()
    (tmp_path / "m-2.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"m-2\.safetensors: cannot be read: Is a directory"):
        read_checkpoint(tmp_path)


def test_shard_that_is_a_broken_link_is_missing(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "m-2.safetensors").unlink()
    (tmp_path / "m-2.safetensors").symlink_to("blob")
    with pytest.raises(ModelError, match=r"m-2\.safetensors: .* it is missing"):
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


def test_folder_whose_name_is_impossible_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read: File name too long"):
        read_checkpoint(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": {"bits": 4}}, "None"),
        ({"quantization_config": "awq"}, "awq"),
        ({"quantization_config": 4}, "4"),
        ({"quantization_config": {"quant_method": "\x1b" * 10**6}}, "'"),
    ],
)
def test_quantised_checkpoint_is_refused_by_its_method(
    tmp_path: Path, config: dict[str, object], method: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is refused: its weights are quantised") as caught:
        refuse_quantised(tmp_path)
    assert f"quantised ({method}" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "take the original checkpoint" in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text", ["{}", '{"quantization_config": null}', '{"quantization_config": {}, "limit": Infinity}']
)
def test_plain_checkpoint_is_not_refused(tmp_path: Path, text: str) -> None:
    refuse_quantised(tmp_path)  # without any config.json
    (tmp_path / "config.json").write_text(text)
    refuse_quantised(tmp_path)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff", b"[]", b"null", b"[" * 10**5, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_damaged_config_is_refused_rather_than_taken_for_plain(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ModelError, match=r"config\.json: is damaged"):
        refuse_quantised(tmp_path)


def test_config_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json: cannot be read: Is a directory"):
        refuse_quantised(tmp_path)
    (tmp_path / "config.json").rmdir()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"config\.json: cannot be read: is a pipe"):
        refuse_quantised(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", 10**11)
    with pytest.raises(ModelError, match="expected at most 10,000,000"):
        refuse_quantised(tmp_path)
