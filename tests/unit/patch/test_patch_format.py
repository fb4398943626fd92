import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from locft.errors import InputError, PatchError
from locft.patch.format import Patch, PatchTensor, read_patch, write_patch
from locft.patch.manifest import PatchLocation, PatchManifest, PatchModel
from locft.tensorfile import TensorData, hash_tensor, write_safetensors

MANIFEST = PatchManifest(
    locft_version="0.1.0",
    model=PatchModel(id="some/model", revision=None),
    location=PatchLocation(
        name="layer 3 mlp", layer=3, module="layers.3.mlp.down_proj", num_parameters=6
    ),
    dtype="BF16",
    settings={"lr": 1e-5, "steps": [1, 2], "note": "ü", "nested": {"on": True, "off": None}},
    num_edits=2,
    edits_sha256="a" * 64,
)


def make_tensor(data: bytes, dtype: str = "BF16", shape: tuple[int, ...] = (3, 2)) -> PatchTensor:
    return PatchTensor(
        dtype=dtype,
        shape=shape,
        data=data,
        old_sha256=hash_tensor(dtype, shape, bytes(len(data))),
        new_sha256=hash_tensor(dtype, shape, data),
    )


PATCH = Patch(
    tensors={"b.weight": make_tensor(b"0123456789ab"), "a.weight": make_tensor(b"ba9876543210")},
    manifest=MANIFEST,
)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change `patch.json` as someone would who knows the format, the manifest's hash included."""
    path = folder / "patch.json"
    record = json.loads(path.read_bytes())
    del record["manifest_sha256"]
    change(record)
    text = json.dumps(record, sort_keys=True, indent=2) + "\n"
    record.setdefault("manifest_sha256", hashlib.sha256(text.encode()).hexdigest())
    path.write_text(json.dumps(record))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=6,
)
texts = st.text()
hashes = st.binary(min_size=32, max_size=32).map(bytes.hex)
numbers = st.integers(0, 2**60)


@st.composite
def patch_tensors(draw: st.DrawFn) -> PatchTensor:
    dtype, width = draw(st.sampled_from([("F32", 4), ("F16", 2), ("BF16", 2)]))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
    size = int(np.prod(shape, dtype=int)) * width
    data = draw(st.binary(min_size=size, max_size=size))
    return dataclasses.replace(make_tensor(data, dtype, shape), old_sha256=draw(hashes))


tensor_names = st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda name: name != "__metadata__"
)
patches = st.builds(
    Patch,
    tensors=st.dictionaries(tensor_names, patch_tensors(), min_size=1, max_size=3),
    manifest=st.builds(
        PatchManifest,
        locft_version=texts,
        model=st.builds(PatchModel, id=texts, revision=st.none() | texts),
        location=st.builds(
            PatchLocation,
            name=texts,
            layer=st.none() | numbers,
            module=texts,
            num_parameters=numbers,
        ),
        dtype=texts,
        settings=st.dictionaries(texts, json_values, max_size=3),
        num_edits=numbers,
        edits_sha256=hashes,
    ),
)


@settings(max_examples=50, deadline=None)
@given(patches)
def test_written_patch_reads_back_equal(patch: Patch) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "patch")
        write_patch(patch, folder)
        assert read_patch(folder) == patch


def test_patch_is_two_files_that_depend_only_on_its_contents(tmp_path: Path) -> None:
    reordered = Patch(
        tensors=dict(reversed(PATCH.tensors.items())),
        manifest=dataclasses.replace(MANIFEST, settings=dict(reversed(MANIFEST.settings.items()))),
    )
    write_patch(PATCH, tmp_path / "one")
    write_patch(reordered, tmp_path / "two")
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")
    ]
    assert contents[0] == contents[1]
    assert contents[0].keys() == {"patch.json", "patch.safetensors"}


def test_manifest_is_plain_sorted_json(tmp_path: Path) -> None:
    write_patch(PATCH, tmp_path / "patch")
    text = (tmp_path / "patch" / "patch.json").read_text()
    record = json.loads(text)
    assert text == json.dumps(record, sort_keys=True, indent=2) + "\n"
    assert record["format_version"] == 1
    assert record["model"] == {"id": "some/model", "revision": None}
    assert record["settings"] == MANIFEST.settings
    assert record["tensors"]["a.weight"] == {
        "dtype": "BF16",
        "shape": [3, 2],
        "old_sha256": PATCH.tensors["a.weight"].old_sha256,
        "new_sha256": PATCH.tensors["a.weight"].new_sha256,
    }


def test_tensors_are_read_by_the_safetensors_library(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float16).reshape(3, 2)
    patch = Patch(tensors={"w": make_tensor(array.tobytes(), "F16")}, manifest=MANIFEST)
    write_patch(patch, tmp_path / "patch")
    loaded = safetensors.numpy.load_file(tmp_path / "patch" / "patch.safetensors")
    np.testing.assert_array_equal(loaded["w"], array)


@pytest.mark.parametrize("name", ["patch.json", "patch.safetensors"])
def test_any_flipped_byte_is_detected_or_changes_nothing(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "patch"
    write_patch(PATCH, folder)
    path = folder / name
    raw = path.read_bytes()

    @settings(max_examples=300, deadline=None)
    @given(st.integers(0, len(raw) - 1), st.integers(1, 255))
    def check(position: int, mask: int) -> None:
        flipped = bytearray(raw)
        flipped[position] ^= mask
        path.write_bytes(flipped)
        try:
            patch = read_patch(folder)
        except PatchError:
            return
        assert patch == PATCH

    check()


@pytest.mark.parametrize("name", ["patch.json", "patch.safetensors"])
def test_truncated_patch_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "patch"
    write_patch(PATCH, folder)
    raw = (folder / name).read_bytes()
    for length in range(0, len(raw) - 1, 7):
        (folder / name).write_bytes(raw[:length])
        with pytest.raises(PatchError, match=name):
            read_patch(folder)


@pytest.mark.parametrize("name", ["patch.json", "patch.safetensors"])
def test_missing_file_link_or_folder_in_a_files_place_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "patch"
    write_patch(PATCH, folder)
    (folder / name).rename(tmp_path / "moved")
    with pytest.raises(PatchError, match=f"has no regular file {name}"):
        read_patch(folder)
    (folder / name).mkdir()
    with pytest.raises(PatchError, match=f"has no regular file {name}"):
        read_patch(folder)
    (folder / name).rmdir()
    (folder / name).symlink_to(tmp_path / "moved")
    with pytest.raises(PatchError, match=f"{name}: is a link"):
        read_patch(folder)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="is not a patch"):
        read_patch(tmp_path / "nowhere")


def nest(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("format_version"), "format_version: expected 1, found None"),
        (lambda r: r.update(format_version=0), "format_version: expected 1, found 0"),
        (lambda r: r.update(format_version=True), "format_version: expected 1, found True"),
        (lambda r: r.update(format_version=2, more=1), "is 2, this locft reads 1: upgrade"),
        (lambda r: r.update(more=1), "'more': unknown field"),
        (lambda r: r.pop("dtype"), "dtype: is missing, expected a text"),
        (lambda r: r.update(dtype=1), "dtype: expected a text, found 1"),
        (lambda r: r.update(num_edits=-1), "num_edits: expected a whole number, zero or more"),
        (lambda r: r.update(num_edits=1.0), "num_edits: expected a whole number"),
        (lambda r: r.update(num_edits=True), "num_edits: expected a whole number"),
        (lambda r: r.update(settings=[]), r"settings: expected an object, found \[\]"),
        (lambda r: r.update(edits_sha256="A" * 64), "edits_sha256: expected 64 lower-case"),
        (lambda r: r.update(model="some/model"), "model: expected an object"),
        (lambda r: r["model"].update(id=None), r"model\.id: expected a text, found None"),
        (lambda r: r["model"].update(revision=1), r"model\.revision: expected a text, or null"),
        (lambda r: r["model"].update(more=1), r"model\.'more': unknown field"),
        (lambda r: r["location"].update(layer="3"), r"location\.layer: expected a whole number"),
        (lambda r: r["location"].pop("module"), r"location\.module: is missing"),
        (lambda r: r.update(tensors={}), "tensors: expected at least one"),
        (lambda r: r["tensors"].update(x=1), r"tensors\['x'\]: expected an object"),
        (lambda r: r["tensors"]["a.weight"].update(shape=[3.0, 2]), r"\.shape: expected a list"),
        (lambda r: r["tensors"]["a.weight"].update(shape=[2, 3]), r"expected BF16 \[2, 3\]"),
        (lambda r: r["tensors"]["a.weight"].update(dtype="F16"), r"expected F16 \[3, 2\]"),
        (lambda r: r["tensors"]["a.weight"].pop("old_sha256"), r"\.old_sha256: is missing"),
        (
            lambda r: r["tensors"]["a.weight"].update(new_sha256="0" * 64),
            f"'a.weight': its data is damaged: expected new_sha256 {'0' * 64}, found [0-9a-f]+",
        ),
        (
            lambda r: r["tensors"].pop("a.weight"),
            r"'a\.weight' is in patch\.safetensors, but not in patch\.json",
        ),
        (
            lambda r: r["tensors"].update(z=r["tensors"]["a.weight"]),
            r"'z' is in patch\.json, but not in patch\.safetensors",
        ),
        (lambda r: r.update(manifest_sha256="0" * 64), f"expected manifest_sha256 {'0' * 64}"),
        (lambda r: r.update(manifest_sha256=None), "manifest_sha256: expected 64 lower-case"),
        (lambda r: r["settings"].update(x=float("nan")), "is damaged: JSON has no NaN"),
    ],
)
def test_wrong_manifest_is_refused_with_file_and_field(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = tmp_path / "patch"
    write_patch(PATCH, folder)
    edit_manifest(folder, change)
    with pytest.raises(PatchError, match=message) as caught:
        read_patch(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b"{", b"{} {}", b'{"a": 1, "a": 1}'])
def test_manifest_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    write_patch(PATCH, tmp_path / "patch")
    (tmp_path / "patch" / "patch.json").write_bytes(text)
    with pytest.raises(PatchError, match=r"patch\.json: is damaged"):
        read_patch(tmp_path / "patch")


@pytest.mark.parametrize("value", ["1e999", "[" * 700 + "]" * 700, "[" * 10**5 + "]" * 10**5])
@pytest.mark.parametrize("field", ["num_edits", "settings"])
def test_outlandish_values_are_refused(tmp_path: Path, value: str, field: str) -> None:
    folder = tmp_path / "patch"
    write_patch(PATCH, folder)
    record = json.loads((folder / "patch.json").read_bytes())
    record[field] = {"x": "HERE"} if field == "settings" else "HERE"
    (folder / "patch.json").write_text(json.dumps(record).replace('"HERE"', value))
    with pytest.raises(PatchError, match=r"patch\.json: "):
        read_patch(folder)


def test_data_of_another_patch_is_refused(tmp_path: Path) -> None:
    write_patch(PATCH, tmp_path / "one")
    other = {name: make_tensor(b"x" * 12) for name in PATCH.tensors}
    write_patch(Patch(tensors=other, manifest=MANIFEST), tmp_path / "two")
    (tmp_path / "two" / "patch.safetensors").replace(tmp_path / "one" / "patch.safetensors")
    with pytest.raises(PatchError, match="its data is damaged"):
        read_patch(tmp_path / "one")


def test_file_beside_the_patch_is_no_harm(tmp_path: Path) -> None:
    write_patch(PATCH, tmp_path / "patch")
    (tmp_path / "patch" / "README.md").touch()
    assert read_patch(tmp_path / "patch") == PATCH


@pytest.mark.parametrize(
    ("patch", "error"),
    [
        (Patch(tensors={}, manifest=MANIFEST), PatchError),
        (
            Patch(
                tensors={"w": dataclasses.replace(make_tensor(b"0" * 12), new_sha256="0" * 64)},
                manifest=MANIFEST,
            ),
            PatchError,
        ),
        (Patch(tensors={"w": make_tensor(b"0")}, manifest=MANIFEST), ValueError),
        (
            dataclasses.replace(PATCH, manifest=dataclasses.replace(MANIFEST, num_edits=-1)),
            PatchError,
        ),
        (
            dataclasses.replace(
                PATCH, manifest=dataclasses.replace(MANIFEST, settings={"x": float("nan")})
            ),
            ValueError,
        ),
        (
            dataclasses.replace(PATCH, manifest=dataclasses.replace(MANIFEST, settings={"x": {1}})),
            TypeError,
        ),
    ],
)
def test_patch_that_could_not_be_read_back_is_not_written(
    tmp_path: Path, patch: Patch, error: type[Exception]
) -> None:
    with pytest.raises(error):
        write_patch(patch, tmp_path / "patch")
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    write_patch(PATCH, tmp_path / "patch")
    before = (tmp_path / "patch" / "patch.json").read_bytes()
    with pytest.raises(InputError, match="not empty"):
        write_patch(PATCH, tmp_path / "patch")
    assert (tmp_path / "patch" / "patch.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["patch"]  # noqa: PTH208


@pytest.mark.parametrize("fault", [OSError("disk"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["os.rename", "pathlib.Path.write_bytes"])
def test_fault_while_writing_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException, place: str
) -> None:
    def fail(*args: object) -> None:
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(place, fail)
        with pytest.raises(type(fault)):
            write_patch(PATCH, tmp_path / "patch")
    assert list(tmp_path.iterdir()) == []


def test_damaged_tensor_file_is_one_patch_error(tmp_path: Path) -> None:
    write_patch(PATCH, tmp_path / "patch")
    write_safetensors(tmp_path / "patch" / "patch.safetensors", {"a": TensorData("U8", (0,), b"")})
    with (tmp_path / "patch" / "patch.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(PatchError, match=r"patch\.safetensors: has \d+ bytes"):
        read_patch(tmp_path / "patch")
