"""Two checkpoints are compared bit by bit, and the numbers are those of numpy."""

import math
import os
import struct
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import DOWN_0, INDEX, SHARDED, SINGLE, Tensors, pack, patch_of, value
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from locft.checkpoint import read_checkpoint
from locft.errors import ModelError
from locft.patch import compare
from locft.patch.apply import apply_patch
from locft.patch.compare import Comparison, TensorDifference, compare_checkpoints
from locft.tensorfile import TensorData

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def bytes_of(values: Any, dtype: str) -> bytes:
    """Write numbers in a dtype; bfloat16 by cutting a float32 off."""
    if dtype == "BF16":
        return (np.asarray(values, "<f4").reshape(-1).view("<u4") >> 16).astype("<u2").tobytes()
    return np.asarray(values, NUMPY[dtype]).tobytes()


def numbers_of(data: bytes, dtype: str) -> NDArray[np.float64]:
    """Read numbers of a dtype."""
    if dtype == "BF16":
        return np.array(
            [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
        )
    return np.frombuffer(data, NUMPY[dtype]).astype(np.float64)


@pytest.fixture
def compared(tmp_path: Path) -> Callable[[Tensors, Tensors], Comparison]:
    def run(first: Tensors, second: Tensors) -> Comparison:
        for name, tensors in (("first", first), ("second", second)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "model.safetensors").write_bytes(pack(tensors))
        return compare_checkpoints(tmp_path / "first", tmp_path / "second")

    return run


def one(dtype: str, shape: tuple[int, ...], data: bytes) -> Tensors:
    return {"w": TensorData(dtype, shape, data)}


def pair(
    compared: Callable[[Tensors, Tensors], Comparison], dtype: str, first: Any, second: Any
) -> TensorDifference | None:
    """Compare two tensors of numbers."""
    shape = np.shape(first)
    sides = (one(dtype, shape, bytes_of(numbers, dtype)) for numbers in (first, second))
    found = compared(*sides).tensors
    return found[0] if found else None


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("block_bytes", [16, 64, 2**24])
def test_numbers_are_those_of_numpy(
    dtype: str,
    block_bytes: int,
    compared: Callable[[Tensors, Tensors], Comparison],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare, "_BLOCK_BYTES", block_bytes)
    random = np.random.default_rng(len(dtype) + block_bytes)
    first = random.normal(size=(7, 9))
    second = np.where(random.random((7, 9)) < 0.4, first + random.normal(size=(7, 9)) / 8, first)
    found = pair(compared, dtype, first, second)
    old, new = (numbers_of(bytes_of(side, dtype), dtype) for side in (first, second))
    assert found is not None
    assert (found.name, found.kind, found.num_elements) == ("w", "changed", 63)
    assert (found.dtype, found.shape) == ((dtype, dtype), ((7, 9), (7, 9)))
    assert found.num_changed == np.count_nonzero(old != new)
    assert found.num_changed in range(1, 63)
    assert found.max_change == np.abs(new - old).max()
    expected = np.linalg.norm(new - old) / np.linalg.norm(old)
    assert found.relative_change == pytest.approx(expected, rel=1e-12)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_bits_are_compared_as_numpy_compares_them(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dtype = data.draw(st.sampled_from(["F64", "F32", "F16", "BF16"]))
    width = {"F64": 8, "F32": 4}.get(dtype, 2)
    length = data.draw(st.integers(1, 6))
    sides = [data.draw(st.binary(min_size=width * length, max_size=width * length)) for _ in range(2)]
    folders = [tmp_path_factory.mktemp("side") for _ in sides]
    for folder, side in zip(folders, sides, strict=True):
        (folder / "model.safetensors").write_bytes(pack(one(dtype, (length,), side)))
    found = compare_checkpoints(*folders).tensors
    if sides[0] == sides[1]:
        assert found == ()
        return
    cells = [[side[i : i + width] for i in range(0, len(side), width)] for side in sides]
    assert found[0].num_changed == sum(old != new for old, new in zip(*cells, strict=True))
    with np.errstate(all="ignore"):
        old, new = (numbers_of(side, dtype) for side in sides)
        squares = float(np.sum(old**2)), float(np.sum((new - old) ** 2))
    if not all(map(math.isfinite, squares)):
        assert (found[0].relative_change, found[0].max_change) == (None, None)
        return
    assert found[0].max_change == np.abs(new - old).max()
    if squares[0] == 0 or not math.isfinite(math.sqrt(squares[1]) / math.sqrt(squares[0])):
        assert found[0].relative_change is None
    else:
        expected = math.sqrt(squares[1]) / math.sqrt(squares[0])
        assert found[0].relative_change == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_what_is_not_finite_is_counted_and_not_measured(
    dtype: str, bad: float, compared: Callable[[Tensors, Tensors], Comparison]
) -> None:
    for first, second in (([1.0, 2.0], [1.0, bad]), ([1.0, bad], [1.0, 2.0]), ([bad, 1.0], [bad, 2.0])):
        found = pair(compared, dtype, first, second)
        assert found is not None
        assert (found.num_changed, found.relative_change, found.max_change) == (1, None, None)
    assert pair(compared, dtype, [bad, 1.0], [bad, 1.0]) is None


def test_two_nans_of_different_bits_differ(compared: Callable[[Tensors, Tensors], Comparison]) -> None:
    found = compared(
        one("F32", (1,), bytes.fromhex("0000c07f")), one("F32", (1,), bytes.fromhex("0100a07f"))
    ).tensors
    assert found[0].num_changed == 1


def test_zeros_of_different_signs_differ_by_nothing(
    compared: Callable[[Tensors, Tensors], Comparison],
) -> None:
    found = pair(compared, "F32", [0.0, 1.0], [-0.0, 1.0])
    assert found is not None
    assert (found.num_changed, found.relative_change, found.max_change) == (1, 0.0, 0.0)


def test_a_change_of_zeros_has_no_relation_to_them(
    compared: Callable[[Tensors, Tensors], Comparison],
) -> None:
    found = pair(compared, "F32", [0.0, 0.0], [0.0, 3.0])
    assert found is not None
    assert (found.relative_change, found.max_change) == (None, 3.0)


def test_numbers_beyond_what_can_be_squared_are_not_measured(
    compared: Callable[[Tensors, Tensors], Comparison],
) -> None:
    found = pair(compared, "F64", [1e200, 0.0], [1e200, 1.0])
    assert found is not None
    assert (found.relative_change, found.max_change) == (None, None)
    found = pair(compared, "F64", [1e-161], [1e153])
    assert found is not None
    assert (found.relative_change, found.max_change) == (None, 1e153)
    found = pair(compared, "F64", [1e-150], [1e150])
    assert found is not None
    assert found.relative_change == pytest.approx(1e300)


@pytest.mark.parametrize(
    ("dtype", "width"),
    [("I8", 1), ("U8", 1), ("BOOL", 1), ("I16", 2), ("I32", 4), ("I64", 8), ("F8_E4M3", 1), ("C64", 8)],
)
def test_what_is_no_float_is_counted_by_its_elements(
    dtype: str, width: int, compared: Callable[[Tensors, Tensors], Comparison]
) -> None:
    first = bytes(6 * width)
    second = bytearray(first)
    second[0] = second[-1] = 1
    if width > 1:
        second[1] = 1  # in the same element
    [found] = compared(one(dtype, (2, 3), first), one(dtype, (2, 3), bytes(second))).tensors
    assert found == TensorDifference(
        name="w",
        kind="changed",
        dtype=(dtype, dtype),
        shape=((2, 3), (2, 3)),
        num_elements=6,
        num_changed=2,
    )


@pytest.mark.parametrize(("dtype", "shape"), [("F4", (2, 3)), ("F6_E2M3", (4,))])
def test_elements_narrower_than_a_byte_are_not_counted(
    dtype: str, shape: tuple[int, ...], compared: Callable[[Tensors, Tensors], Comparison]
) -> None:
    [found] = compared(one(dtype, shape, b"\0\0\0"), one(dtype, shape, b"\0\x11\0")).tensors
    assert (found.kind, found.num_elements, found.num_changed) == ("changed", math.prod(shape), None)
    assert compared(one(dtype, shape, b"\0\1\0"), one(dtype, shape, b"\0\1\0")).tensors == ()


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_empty_tensors_are_equal(
    shape: tuple[int, ...], compared: Callable[[Tensors, Tensors], Comparison]
) -> None:
    full = {"a": value("F32", (2,), 1)}
    result = compared({**full, **one("F32", shape, b"")}, {**full, **one("F32", shape, b"")})
    assert (result.num_tensors, result.tensors) == (2, ())
    assert compared(one("F32", shape, b""), one("F32", shape, b"")).tensors == ()


def test_scalars_are_compared(compared: Callable[[Tensors, Tensors], Comparison]) -> None:
    found = pair(compared, "F32", 4.0, 5.0)
    assert found is not None
    assert (found.shape, found.num_elements, found.num_changed) == (((), ()), 1, 1)
    assert (found.relative_change, found.max_change) == (0.25, 1.0)


def test_a_truth_that_changed_is_found_in_both_ways(
    compared: Callable[[Tensors, Tensors], Comparison],
) -> None:
    first, second = one("BOOL", (3,), b"\0\1\1"), one("BOOL", (3,), b"\1\1\1")
    assert compared(first, second).tensors[0].num_changed == 1
    assert compared(second, first).tensors[0].num_changed == 1


def test_another_dtype_or_shape_is_told_with_both(
    compared: Callable[[Tensors, Tensors], Comparison],
) -> None:
    data = bytes(24)
    first = {"a": TensorData("F32", (2, 3), data), "b": TensorData("F32", (6,), data)}
    second = {"a": TensorData("F32", (3, 2), data), "b": TensorData("I32", (6,), data)}
    assert compared(first, second).tensors == (
        TensorDifference(name="a", kind="shape", dtype=("F32", "F32"), shape=((2, 3), (3, 2))),
        TensorDifference(name="b", kind="dtype", dtype=("F32", "I32"), shape=((6,), (6,))),
    )
    both = compared(one("F32", (6,), data), one("F64", (3,), data)).tensors
    assert both == (TensorDifference(name="w", kind="shape", dtype=("F32", "F64"), shape=((6,), (3,))),)


def test_tensors_of_one_side_alone_are_told(compared: Callable[[Tensors, Tensors], Comparison]) -> None:
    same = {"m": value("F32", (2,), 1)}
    result = compared({**same, "z": value("F16", (3,), 2)}, {**same, "a": value("BF16", (), 3)})
    assert result.num_tensors == 1
    assert result.tensors == (
        TensorDifference(name="a", kind="only in the second", dtype=(None, "BF16"), shape=(None, ())),
        TensorDifference(name="z", kind="only in the first", dtype=("F16", None), shape=((3,), None)),
    )


def test_a_checkpoint_differs_from_itself_in_nothing_even_if_it_is_stored_in_another_way(
    tmp_path: Path,
) -> None:
    tensors = SHARDED.tensors()
    SHARDED.make(tmp_path / "sharded", tensors)
    SINGLE.make(tmp_path / "single", tensors)
    assert compare_checkpoints(str(tmp_path / "sharded"), tmp_path / "single") == Comparison(
        first=str(tmp_path / "sharded"),
        second=str(tmp_path / "single"),
        num_tensors=len(tensors),
        tensors=(),
        files=(),
    )


def test_a_patch_is_all_that_differs_between_a_model_and_its_copy(tmp_path: Path) -> None:
    base = SHARDED.make(tmp_path / "base")
    patch, _ = patch_of(SHARDED.tensors(), (DOWN_0,), 1)
    apply_patch(base, patch, tmp_path / "copy")
    result = compare_checkpoints(base, tmp_path / "copy")
    assert [one.name for one in result.tensors] == [DOWN_0]
    assert result.files == ()
    assert result.num_tensors == len(SHARDED.tensors())


def test_a_file_that_both_share_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = SHARDED.make(tmp_path / "base")
    patch, _ = patch_of(SHARDED.tensors(), (DOWN_0,), 1)
    apply_patch(base, patch, tmp_path / "copy")
    read: list[str] = []
    real = compare._blocks

    def blocks(entry: Any) -> Any:
        read.append(entry.file.name)
        return real(entry)

    monkeypatch.setattr(compare, "_blocks", blocks)
    compare_checkpoints(base, tmp_path / "copy")
    assert set(read) == {SHARDED.file_of(DOWN_0)}
    read.clear()
    compare_checkpoints(base, base)
    assert read == []


def test_other_files_that_differ_are_named(tmp_path: Path) -> None:
    first, second = SHARDED.make(tmp_path / "first"), SHARDED.make(tmp_path / "second")
    for folder in (first, second):
        (folder / "additional_chat_templates").mkdir()
        (folder / ".hidden").write_text(folder.name)
        (folder / "modeling.py").write_text(folder.name)
        (folder / "README.md").write_text("the same")
    (first / "config.json").write_text('{"a": 1}')
    (first / "vocab.txt").touch()
    (second / "additional_chat_templates" / "tool.jinja").touch()
    # The order of an index is nobody's business.
    (second / INDEX).write_bytes((second / INDEX).read_bytes() + b"\n")
    assert compare_checkpoints(first, second).files == (
        "additional_chat_templates/tool.jinja: only in the second",
        "config.json: differs",
        "vocab.txt: only in the first",
    )


def test_progress_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    totals: list[int] = []

    @contextmanager
    def bar(label: str, total: int, unit: str) -> Any:
        totals.append(total)
        yield steps.append

    monkeypatch.setattr(compare, "progress", bar)
    monkeypatch.setattr(compare, "_BLOCK_BYTES", 16)
    first = SHARDED.tensors()
    second = dict(first)
    second["new"] = second.pop(DOWN_0)
    names = list(second)
    second[names[0]] = replace(second[names[0]], shape=(5, 7))
    second[names[1]] = value("F16", second[names[1]].shape, 99)
    SHARDED.make(tmp_path / "first", first)
    SINGLE.make(tmp_path / "second", {})
    (tmp_path / "second" / "model.safetensors").write_bytes(pack(second))
    compare_checkpoints(tmp_path / "first", tmp_path / "second")
    expected = sum(len(tensor.data) for name, tensor in first.items() if name != DOWN_0)
    assert totals == [expected]
    assert sum(steps) == expected


def test_a_checkpoint_that_is_cut_off_meanwhile_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = SHARDED.make(tmp_path / "first"), SHARDED.make(tmp_path / "second")

    def read_and_cut(folder: Path) -> Any:
        entries = read_checkpoint(folder)
        if folder == second:
            for name in SHARDED.shards():
                os.truncate(second / name, (second / name).stat().st_size - 1)
        return entries

    monkeypatch.setattr("locft.patch.compare.read_checkpoint", read_and_cut)
    with pytest.raises(ModelError, match=r"second/.*: is truncated: its header promises \d+ bytes"):
        compare_checkpoints(first, second)


def test_a_checkpoint_that_goes_meanwhile_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = SHARDED.make(tmp_path / "first"), SHARDED.make(tmp_path / "second")
    real = os.path.samestat

    def remove_and_compare(*stats: os.stat_result) -> bool:
        for name in SHARDED.shards():
            (second / name).unlink(missing_ok=True)
        return real(*stats)

    monkeypatch.setattr("os.path.samestat", remove_and_compare)
    with pytest.raises(ModelError, match=r"second/.*: cannot be read: it is missing"):
        compare_checkpoints(first, second)


@pytest.mark.parametrize("side", [0, 1])
def test_what_is_no_checkpoint_is_refused(side: int, tmp_path: Path) -> None:
    folders = [tmp_path / "nowhere", SHARDED.make(tmp_path / "base")]
    with pytest.raises(ModelError, match="nowhere: is not a folder"):
        compare_checkpoints(folders[side], folders[1 - side])
