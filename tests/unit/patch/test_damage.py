"""Whatever happens to the bytes of a patch, or of the matrix that it changes, is noticed."""

import os
import random
from pathlib import Path

import numpy as np
import pytest

from locft.errors import ModelError, PatchError
from locft.patch.apply import apply_patch
from locft.patch.format import Patch, PatchTensor, read_patch, write_patch
from locft.patch.manifest import PatchLocation, PatchManifest, PatchModel
from locft.tensorfile import TensorData, hash_tensor, read_header, write_safetensors

NUM_FLIPS = 1000
FILES = ("patch.json", "patch.safetensors")
TARGET = "model.layers.1.mlp.down_proj.weight"


def weights(seed: int, shape: tuple[int, ...] = (24, 16)) -> TensorData:
    values = np.random.default_rng(seed).normal(size=shape).astype("<f4")
    return TensorData("F32", shape, values.tobytes())


OLD = {
    "model.embed_tokens.weight": weights(0, (8, 16)),
    TARGET: weights(1),
    "model.layers.1.mlp.up_proj.weight": weights(2),
}
NEW = weights(3)
PATCH = Patch(
    tensors={
        TARGET: PatchTensor(
            dtype=NEW.dtype,
            shape=NEW.shape,
            data=NEW.data,
            old_sha256=hash_tensor("F32", NEW.shape, OLD[TARGET].data),
            new_sha256=hash_tensor("F32", NEW.shape, NEW.data),
        )
    },
    manifest=PatchManifest(
        locft_version="0.1.0",
        model=PatchModel(id="Some/Möbel", revision="abc"),
        location=PatchLocation(name="1.mlp.down", layer=1, module="mlp.down", num_parameters=384),
        dtype="F32",
        settings={"lr": 1e-3, "batch_size": 20, "format": "raw"},
        num_edits=200,
        edits_sha256="a" * 64,
    ),
)


@pytest.fixture
def patch_folder(tmp_path: Path) -> Path:
    write_patch(PATCH, tmp_path / "patch")
    return tmp_path / "patch"


@pytest.fixture(params=["one file", "shards"])
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if request.param == "one file":
        write_safetensors(folder / "model.safetensors", OLD)
    else:
        for i, (name, tensor) in enumerate(OLD.items()):
            write_safetensors(folder / f"model-{i}.safetensors", {name: tensor})
        weight_map = ", ".join(f'"{name}": "model-{i}.safetensors"' for i, name in enumerate(OLD))
        (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{weight_map}}}}}')
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def flipped(raw: bytes, bit: int) -> bytes:
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def assert_refused(folder: Path, what: object) -> None:
    try:
        read_patch(folder)
    except PatchError as error:
        message = str(error)
    else:
        pytest.fail(f"{what} was not noticed")
    assert str(folder) in message
    assert message.isprintable()


def test_a_thousand_flipped_bits_of_a_patch_are_all_noticed(patch_folder: Path) -> None:
    raws = {name: (patch_folder / name).read_bytes() for name in FILES}
    # Spread evenly over both files: one bit in each of as many stretches of the same length.
    places = [(name, bit) for name in FILES for bit in range(8 * len(raws[name]))]
    chosen = random.Random(0)
    num = 0
    for i in range(NUM_FLIPS):
        stretch = range(i * len(places) // NUM_FLIPS, (i + 1) * len(places) // NUM_FLIPS)
        name, bit = places[chosen.choice(stretch)]
        (patch_folder / name).write_bytes(flipped(raws[name], bit))
        assert_refused(patch_folder, f"bit {bit} of {name}")
        (patch_folder / name).write_bytes(raws[name])
        num += 1
    assert num == NUM_FLIPS
    assert read_patch(patch_folder) == PATCH


def test_every_bit_around_the_tensors_counts(patch_folder: Path) -> None:
    path = patch_folder / "patch.safetensors"
    raw = path.read_bytes()
    start = read_header(path)[TARGET].start
    assert raw[:start].startswith(b'{"__metadata__":{"format":"pt"},', 8)
    assert raw[:start].endswith(b"}}  ")  # with padding
    for bit in range(8 * start):
        path.write_bytes(flipped(raw, bit))
        assert_refused(patch_folder, f"bit {bit}")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("percent", range(100))
def test_a_patch_cut_off_anywhere_is_refused(patch_folder: Path, name: str, percent: int) -> None:
    path = patch_folder / name
    os.truncate(path, path.stat().st_size * percent // 100)
    assert_refused(patch_folder, f"{percent}% of {name}")


@pytest.mark.parametrize("name", FILES)
def test_the_last_byte_and_one_more_count(patch_folder: Path, name: str) -> None:
    path = patch_folder / name
    raw = path.read_bytes()
    for other in (raw[:-1], raw + b"\n", raw + b"\0", raw + raw, raw[1:]):
        path.write_bytes(other)
        assert_refused(patch_folder, f"{len(other)} bytes of {len(raw)}")


def shard_of_target(checkpoint: Path) -> Path:
    files = checkpoint.glob("*.safetensors")
    return next(file for file in files if TARGET in read_header(file))


@pytest.mark.parametrize("checkpoint", ["one file"], indirect=True)
def test_a_thousand_flipped_bits_of_the_base_are_all_noticed(tmp_path: Path, checkpoint: Path) -> None:
    path = shard_of_target(checkpoint)
    raw, entry = path.read_bytes(), read_header(path)[TARGET]
    chosen = random.Random(0)
    for bit in chosen.sample(range(8 * entry.start, 8 * entry.end), NUM_FLIPS):
        path.write_bytes(flipped(raw, bit))
        with pytest.raises(PatchError, match="is not the one that the patch was made from"):
            apply_patch(checkpoint, PATCH, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    path.write_bytes(raw)
    apply_patch(checkpoint, PATCH, tmp_path / "out")


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_flipped_bit_of_the_base_leaves_everything_as_it_was(
    tmp_path: Path, checkpoint: Path, place: str
) -> None:
    path = shard_of_target(checkpoint)
    entry = read_header(path)[TARGET]
    bit = 8 * entry.start if place == "first" else 8 * entry.end - 1
    path.write_bytes(flipped(path.read_bytes(), bit))
    before = contents(tmp_path)
    for output in (tmp_path / "out", None):
        with pytest.raises(PatchError, match="is not the one that the patch was made from"):
            apply_patch(checkpoint, PATCH, output)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("percent", range(100))
def test_a_base_cut_off_anywhere_is_refused(tmp_path: Path, checkpoint: Path, percent: int) -> None:
    path = shard_of_target(checkpoint)
    os.truncate(path, path.stat().st_size * percent // 100)
    before = contents(tmp_path)
    with pytest.raises(ModelError, match=path.name) as caught:
        apply_patch(checkpoint, PATCH, tmp_path / "out")
    assert str(caught.value).isprintable()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("checkpoint", ["shards"], indirect=True)
def test_a_missing_shard_is_one_error_that_names_it(tmp_path: Path, checkpoint: Path) -> None:
    path = shard_of_target(checkpoint)
    path.unlink()
    before = contents(tmp_path)
    with pytest.raises(ModelError, match=f"{path.name}: cannot be read: it is missing"):
        apply_patch(checkpoint, PATCH, tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_quantised_base_is_refused_by_its_method(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    before = contents(tmp_path)
    for output in (tmp_path / "out", None):
        with pytest.raises(ModelError, match=r"its weights are quantised \(gptq\)"):
            apply_patch(checkpoint, PATCH, output)
        assert contents(tmp_path) == before


def test_a_base_of_links_takes_the_patch(tmp_path: Path, checkpoint: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in checkpoint.iterdir():
        (snapshot / file.name).symlink_to(file)
    before = contents(checkpoint)
    apply_patch(snapshot, PATCH, tmp_path / "out")
    assert contents(checkpoint) == before
    entry = read_header(shard_of_target(tmp_path / "out"))[TARGET]
    assert entry.file.read_bytes()[entry.start : entry.end] == NEW.data
