import dataclasses
import hashlib
import json
import os
import pickle
import re
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
from locft.patch.format import Patch, PatchTensor, manifest_record, open_patch, read_patch, write_patch
from locft.patch.manifest import PatchLocation, PatchManifest, PatchModel, read_manifest
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
    digest = hashlib.sha256(canonical(record).encode()).hexdigest()
    record.setdefault("manifest_sha256", digest)
    path.write_text(canonical(record))


def canonical(record: object) -> str:
    return json.dumps(record, sort_keys=True, indent=2) + "\n"


def forge(patch: Patch, folder: Path) -> None:
    """Write a patch as `write_patch` does, but without asking whether it can be read."""
    folder.mkdir()
    data = {name: TensorData(each.dtype, each.shape, each.data) for name, each in patch.tensors.items()}
    write_safetensors(folder / "patch.safetensors", data)
    (folder / "patch.json").write_text(canonical(manifest_record(patch)))


def refusal(folder: Path) -> str:
    """Have a patch refused, in one short line that can be printed and names the folder."""
    with pytest.raises(PatchError) as caught:
        read_patch(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert message.isprintable()
    assert len(message) < 1000
    return message


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
    data = bytes(byte & 0xBF for byte in data)  # leaves a bit of each exponent unset: all finite
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
        (lambda r: r.update(format_version=2, more=1), "is 2, this locft reads 1: a newer locft"),
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
        (lambda r: r["settings"].update(x=10**641), "is damaged: .* over 640 digits"),
        (lambda r: r["settings"].update(x=nest(98)), "is damaged: JSON is nested too deeply"),
        (lambda r: r["tensors"]["a.weight"].update(dtype="I8"), r"\.dtype: expected one of .*'I8'"),
        (lambda r: r["tensors"]["a.weight"].update(dtype="x" * 10**6), r"\.dtype: expected one of"),
        (lambda r: r["tensors"]["a.weight"].update(dtype=[]), r"\.dtype: expected one of"),
        (lambda r: r["tensors"]["a.weight"].update(shape=[1] * 10**5), r"expected BF16 \[1, 1"),
        (lambda r: r["tensors"].update({"\x1b[2J" + "n" * 10**6: 1}), r"tensors\['\\x1b\[2Jn"),
        (lambda r: r["tensors"].update({"n" * 10**6: r["tensors"]["a.weight"]}), "but not in"),
        (lambda r: r.update({"k" * 10**6: 1}), "'k.*unknown field"),
        (lambda r: r.update(format_version=10**600), "a newer locft"),
    ],
)
def test_wrong_manifest_is_refused_with_file_and_field(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = tmp_path / "patch"
    write_patch(PATCH, folder)
    edit_manifest(folder, change)
    assert re.search(message, refusal(folder))


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b"{", b"{} {}", b'{"a": 1, "a": 1}'])
def test_manifest_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    write_patch(PATCH, tmp_path / "patch")
    (tmp_path / "patch" / "patch.json").write_bytes(text)
    with pytest.raises(PatchError, match=r"patch\.json: is damaged"):
        read_patch(tmp_path / "patch")


@pytest.mark.parametrize(
    "value", ["1e999", "9" * 5000, "[" * 700 + "]" * 700, "[" * 10**5 + "]" * 10**5, "{" * 10**5]
)
@pytest.mark.parametrize("field", ["num_edits", "settings"])
def test_outlandish_values_are_refused(tmp_path: Path, value: str, field: str) -> None:
    folder = tmp_path / "patch"
    write_patch(PATCH, folder)
    record = json.loads((folder / "patch.json").read_bytes())
    record[field] = {"x": "HERE"} if field == "settings" else "HERE"
    (folder / "patch.json").write_text(canonical(record).replace('"HERE"', value))
    assert "patch.json: is damaged: JSON " in refusal(folder)


def test_settings_as_deep_as_the_bound_are_read_back(tmp_path: Path) -> None:
    manifest = dataclasses.replace(MANIFEST, settings={"x": nest(97)})
    write_patch(dataclasses.replace(PATCH, manifest=manifest), tmp_path / "patch")
    assert read_patch(tmp_path / "patch").manifest == manifest


def compact(text: str) -> str:
    return json.dumps(json.loads(text))


def unsorted(text: str) -> str:
    return json.dumps(dict(reversed(json.loads(text).items())), indent=2) + "\n"


def unescaped(text: str) -> str:
    return text.replace(r"\u00fc", "ü")


def escaped(text: str) -> str:
    return text.replace("BF16", r"BF1\u0036")


def other_number(text: str) -> str:
    return text.replace("1e-05", "1.0e-5")


@pytest.mark.parametrize(
    "rewrite",
    [
        compact,
        unsorted,
        unescaped,
        escaped,
        other_number,
        str.rstrip,
        lambda text: text + "\n",
        lambda text: " " + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("  ", "\t"),
    ],
)
def test_manifest_that_says_the_same_in_other_bytes_is_refused(
    tmp_path: Path, rewrite: Callable[[str], str]
) -> None:
    folder = tmp_path / "patch"
    write_patch(PATCH, folder)
    raw = (folder / "patch.json").read_bytes()
    text = rewrite(raw.decode())
    assert json.loads(text) == json.loads(raw)
    assert text.encode() != raw
    (folder / "patch.json").write_bytes(text.encode())
    assert "patch.json: is not canonical" in refusal(folder)


def swap(header: dict[str, Any]) -> None:
    """Have the data of the two tensors, which are of one size, in the other order."""
    a, b = header["a.weight"], header["b.weight"]
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: None,  # but for the padding
        lambda header: header.pop("__metadata__"),
        lambda header: header.update(__metadata__={"format": "np"}),
        lambda header: header["__metadata__"].update(more="x" * 1000),
        lambda header: header["a.weight"].update(more=1),
        lambda header: header.update({"a.weight": header.pop("a.weight")}),
        swap,
    ],
)
def test_header_that_says_the_same_in_other_bytes_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    folder = tmp_path / "patch"
    write_patch(PATCH, folder)
    path = folder / "patch.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    data = data[12:] + data[:12] if change is swap else data
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert "patch.safetensors: its header is damaged" in refusal(folder)


def test_files_over_their_bounds_are_refused_without_reading_them(tmp_path: Path) -> None:
    folder = tmp_path / "patch"
    write_patch(PATCH, folder)
    path = folder / "patch.safetensors"
    os.truncate(path, 10**11)  # a hole: reading it would take all memory
    with path.open("r+b") as file:
        file.write((10_000_001).to_bytes(8, "little"))
    assert "10000001 bytes long, expected at most 10000000" in refusal(folder)
    os.truncate(folder / "patch.json", 10**11)
    assert "100,000,000,000 bytes long, expected at most 10,000,000" in refusal(folder)


def test_many_matrices_are_within_the_bounds(tmp_path: Path) -> None:
    # As many as the experts of a layer of the largest mixtures have.
    tensor = make_tensor(b"01", shape=(1,))
    names = (f"model.layers.60.mlp.experts.{i}.down_proj.weight" for i in range(1536))
    write_patch(Patch(tensors=dict.fromkeys(names, tensor), manifest=MANIFEST), tmp_path / "patch")
    assert (tmp_path / "patch" / "patch.json").stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("dtype", "odd"),
    [
        ("F16", "007c"),  # infinity
        ("F16", "00fc"),  # -infinity
        ("F16", "01fe"),  # NaN
        ("BF16", "807f"),
        ("BF16", "80ff"),
        ("BF16", "c07f"),
        ("F32", "0000807f"),
        ("F32", "000080ff"),
        ("F32", "0100c07f"),
        ("F64", "000000000000f07f"),
        ("F64", "000000000000f0ff"),
        ("F64", "010000000000f87f"),
    ],
)
@pytest.mark.parametrize("place", [0, 5])
def test_nan_and_infinity_are_neither_read_nor_written(
    tmp_path: Path, dtype: str, odd: str, place: int
) -> None:
    elements = [bytes(len(odd) // 2)] * 6
    elements[place] = bytes.fromhex(odd)
    tensor = make_tensor(b"".join(elements), dtype)
    patch = Patch(tensors={"fine": make_tensor(bytes(12)), "odd": tensor}, manifest=MANIFEST)
    forge(patch, tmp_path / "patch")
    assert "tensor 'odd': holds NaN or infinity" in refusal(tmp_path / "patch")
    with pytest.raises(PatchError, match="tensor 'odd': holds NaN or infinity"):
        write_patch(patch, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["patch"]


@pytest.mark.parametrize("dtype", ["BOOL", "U8", "I8", "I32", "I64", "F8_E4M3", "C64", "F4", "", "bf16"])
def test_dtypes_that_no_patch_has_are_refused_by_name(tmp_path: Path, dtype: str) -> None:
    width = {"I32": 4, "I64": 8, "C64": 8}.get(dtype, 1)
    tensor = make_tensor(bytes(6 * width), dtype)
    patch = Patch(tensors={"w": tensor}, manifest=MANIFEST)
    message = rf"tensors\['w'\]\.dtype: expected one of F16, BF16, F32, F64, found '{dtype}'"
    if dtype in ("BOOL", "U8", "I8", "I32", "I64", "F8_E4M3", "C64"):
        forge(patch, tmp_path / "patch")
        assert re.search(message, refusal(tmp_path / "patch"))
    with pytest.raises((PatchError, ValueError), match=f"{message}|unknown dtype|are not F4"):
        write_patch(patch, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_run_folder_whose_patch_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_patch(PATCH, tmp_path / "run" / "patch")
    assert open_patch(tmp_path / "run") == open_patch(tmp_path / "run" / "patch") == PATCH
    (tmp_path / "linked").mkdir()
    for target in (tmp_path / "run" / "patch", tmp_path / "nowhere"):
        (tmp_path / "linked" / "patch").symlink_to(target)
        with pytest.raises(PatchError, match="patch: is a link, expected the patch itself"):
            open_patch(tmp_path / "linked")
        (tmp_path / "linked" / "patch").unlink()


def test_link_that_the_user_names_is_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_patch(PATCH, tmp_path / "run" / "patch")
    (tmp_path / "run link").symlink_to(tmp_path / "run")
    (tmp_path / "patch link").symlink_to(tmp_path / "run" / "patch")
    assert open_patch(tmp_path / "run link") == open_patch(tmp_path / "patch link") == PATCH


@pytest.mark.parametrize("name", ["patch.json", "patch.safetensors"])
def test_pipe_or_device_in_a_files_place_is_refused_without_waiting(tmp_path: Path, name: str) -> None:
    write_patch(PATCH, tmp_path / "patch")
    (tmp_path / "patch" / name).unlink()
    os.mkfifo(tmp_path / "patch" / name)
    assert f"has no regular file {name}" in refusal(tmp_path / "patch")


def test_manifest_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"patch\.json: cannot be read: No such file"):
        read_manifest(tmp_path / "patch.json")


def test_folder_that_cannot_be_looked_into_is_refused(tmp_path: Path) -> None:
    for read in (read_patch, open_patch):
        with pytest.raises(PatchError, match="cannot be read: File name too long"):
            read(tmp_path / ("x" * 300))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickle_in_the_tensors_place_is_refused_by_name(tmp_path: Path, protocol: int) -> None:
    write_patch(PATCH, tmp_path / "patch")
    (tmp_path / "patch" / "patch.safetensors").write_bytes(pickle.dumps([1], protocol))
    assert "is no safetensors file but a pickle" in refusal(tmp_path / "patch")


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
