import dataclasses
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import locft
from locft.checkpoint import read_checkpoint
from locft.errors import InputError, ModelError, PatchError
from locft.patch.apply import apply_patch
from locft.patch.format import Patch, PatchTensor, read_patch, write_patch
from locft.patch.manifest import PatchLocation, PatchManifest, PatchModel
from locft.tensorfile import TensorData, hash_tensor, read_tensor, write_safetensors

MANIFEST = PatchManifest(
    locft_version="0.1.0",
    model=PatchModel(id="some/model", revision="abc"),
    location=PatchLocation(name="mlp", layer=0, module="layers.0.mlp", num_parameters=4),
    dtype="BF16",
    settings={},
    num_edits=1,
    edits_sha256="a" * 64,
)
# Sizes of which none is a multiple of the others, so that a wrong offset shows.
WEIGHTS = {
    "embed": TensorData("F32", (5,), bytes(range(20))),
    "layers.0.mlp": TensorData("BF16", (3, 2), bytes(range(100, 112))),
    "layers.0.norm": TensorData("F16", (3,), bytes(range(50, 56))),
    "layers.1.mlp": TensorData("BF16", (2, 1), bytes(range(200, 204))),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def unrecorded(folder: Path) -> dict[str, bytes]:
    """What a copy holds besides what locft needs to go back."""
    return {name: raw for name, raw in contents(folder).items() if not name.startswith(".locft/")}


def weights(folder: Path) -> dict[str, TensorData]:
    return {
        name: TensorData(entry.dtype, entry.shape, read_tensor(entry))
        for name, entry in read_checkpoint(folder).items()
    }


def changed(name: str, data: bytes, base: dict[str, TensorData] = WEIGHTS) -> PatchTensor:
    old = base[name]
    return PatchTensor(
        dtype=old.dtype,
        shape=old.shape,
        data=data,
        old_sha256=hash_tensor(old.dtype, old.shape, old.data),
        new_sha256=hash_tensor(old.dtype, old.shape, data),
    )


PATCH = Patch(
    tensors={
        "layers.0.mlp": changed("layers.0.mlp", b"new values!!"),
        "layers.1.mlp": changed("layers.1.mlp", b"more"),
    },
    manifest=MANIFEST,
)
PATCHED = {
    **WEIGHTS,
    "layers.0.mlp": TensorData("BF16", (3, 2), b"new values!!"),
    "layers.1.mlp": TensorData("BF16", (2, 1), b"more"),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", WEIGHTS)
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weight_map: dict[str, str] = {}
    for number, names in enumerate((("embed", "layers.0.mlp"), ("layers.0.norm", "layers.1.mlp")), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        write_safetensors(folder / shard, {name: WEIGHTS[name] for name in names})
        weight_map |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("layout", ["checkpoint", "sharded"])
def test_only_the_patched_bytes_change(
    tmp_path: Path, layout: str, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(layout)
    before = contents(source)
    apply_patch(source, PATCH, tmp_path / "out")
    assert contents(source) == before
    assert weights(tmp_path / "out") == PATCHED
    after = unrecorded(tmp_path / "out")
    assert after.keys() == before.keys()
    assert {name: len(raw) for name, raw in after.items()} == {
        name: len(raw) for name, raw in before.items()
    }
    assert after["config.json"] == before["config.json"]


def test_result_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    arrays = {name: np.full((2, 3), value, np.float32) for value, name in enumerate("abc")}
    (tmp_path / "in").mkdir()
    safetensors.numpy.save_file(arrays, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    edited = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = changed("b", edited.tobytes(), weights(tmp_path / "in"))
    apply_patch(tmp_path / "in", Patch(tensors={"b": tensor}, manifest=MANIFEST), tmp_path / "out")
    loaded = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    for name, array in (arrays | {"b": edited}).items():
        np.testing.assert_array_equal(loaded[name], array)
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_patch_from_disk_applies(tmp_path: Path, checkpoint: Path) -> None:
    write_patch(PATCH, tmp_path / "patch")
    apply_patch(checkpoint, read_patch(tmp_path / "patch"), tmp_path / "out")
    assert weights(tmp_path / "out") == PATCHED


def test_patch_back_to_the_old_values_restores_every_byte(tmp_path: Path, checkpoint: Path) -> None:
    apply_patch(checkpoint, PATCH, tmp_path / "out")
    back = Patch(
        tensors={
            name: dataclasses.replace(
                tensor,
                data=WEIGHTS[name].data,
                old_sha256=tensor.new_sha256,
                new_sha256=tensor.old_sha256,
            )
            for name, tensor in PATCH.tensors.items()
        },
        manifest=MANIFEST,
    )
    apply_patch(tmp_path / "out", back, tmp_path / "back")
    assert unrecorded(tmp_path / "back") == contents(checkpoint)


def test_only_what_plain_transformers_needs_is_copied(tmp_path: Path, sharded: Path) -> None:
    kept = [
        "README.md",
        "LICENSE",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "vocab.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
    ]
    skipped = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.onnx",
        "model.gguf",
        "model-Q8.GGUF",
        "tf_model.h5",
        "flax_model.msgpack",
        "flax_model.msgpack.index.json",
        "consolidated.pth",
        "optimizer.pt",
        "last.ckpt",
        "rust_model.ot",
        "64.tflite",
        "adapter_model.safetensors",
        "adapter_config.json",
        "consolidated.safetensors",
        "consolidated.safetensors.index.json",
        "modeling_custom.py",
        ".gitattributes",
        ".cache/huggingface/x",
        ".git/config",
        "onnx/model.json",
        "original/params.json",
        "additional_chat_templates/run.py",
        "additional_chat_templates/deeper/x.jinja",
    ]
    weight_files = set(contents(sharded))
    for name in kept + skipped:
        (sharded / name).parent.mkdir(parents=True, exist_ok=True)
        (sharded / name).write_text(name)
    apply_patch(sharded, PATCH, tmp_path / "out")
    assert unrecorded(tmp_path / "out").keys() == weight_files | set(kept)


def test_stale_index_and_shards_beside_a_single_file_stay_behind(tmp_path: Path, sharded: Path) -> None:
    write_safetensors(sharded / "model.safetensors", WEIGHTS)
    apply_patch(sharded, PATCH, tmp_path / "out")
    assert unrecorded(tmp_path / "out").keys() == {"config.json", "model.safetensors"}


def test_links_are_followed_and_the_copy_has_none(tmp_path: Path, checkpoint: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in checkpoint.iterdir():
        file.chmod(0o400)
        (snapshot / file.name).symlink_to(file)
    (snapshot / "optimizer.pt").symlink_to(tmp_path / "nowhere")  # a copy goes without those
    apply_patch(snapshot, PATCH, tmp_path / "out")
    assert weights(tmp_path / "out") == PATCHED
    assert weights(checkpoint) == WEIGHTS
    (tmp_path / "plain").touch()
    mode = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    for name in unrecorded(tmp_path / "out"):
        assert not (tmp_path / "out" / name).is_symlink()
        assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == mode


def test_link_to_nothing_among_the_files_of_a_copy_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "broken.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        ModelError, match=r"broken\.json: is a link to nothing .*nowhere.*remove the link"
    ):
        apply_patch(checkpoint, PATCH, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    apply_patch(checkpoint, PATCH, None)
    assert weights(checkpoint) == PATCHED


def test_checkpoint_given_by_a_link_or_a_relative_path_works(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(checkpoint)
    apply_patch(tmp_path / "link", PATCH, tmp_path / "one")
    monkeypatch.chdir(checkpoint)
    apply_patch(Path(), PATCH, Path("../two"))
    assert weights(tmp_path / "one") == weights(tmp_path / "two") == PATCHED


class Bar:
    """A progress bar that remembers what it was told, and may fail."""

    def __init__(self, fault: BaseException | None = None, at: int = 0) -> None:
        self.total = 0
        self.steps: list[int] = []
        self.fault = fault
        self.at = at

    @contextmanager
    def __call__(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        self.total = total
        yield self.step

    def step(self, num_bytes: int) -> None:
        self.steps.append(num_bytes)
        if self.fault is not None and len(self.steps) == self.at:
            raise self.fault


def test_progress_adds_up_to_the_output(
    tmp_path: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = Bar()
    monkeypatch.setattr("locft.patch.rewrite.progress", bar)
    apply_patch(sharded, PATCH, tmp_path / "out")
    assert sum(bar.steps) == bar.total == sum(map(len, unrecorded(tmp_path / "out").values()))


def refusal(checkpoint: Path, patch: Patch, output: Path) -> str:
    siblings = sorted(output.parent.iterdir())
    with pytest.raises(PatchError) as caught:
        apply_patch(checkpoint, patch, output)
    assert sorted(output.parent.iterdir()) == siblings
    return str(caught.value)


def test_wrong_base_is_refused_with_tensor_hashes_and_model(tmp_path: Path, checkpoint: Path) -> None:
    other = TensorData("BF16", (2, 1), b"else")
    write_safetensors(checkpoint / "model.safetensors", WEIGHTS | {"layers.1.mlp": other})
    message = refusal(checkpoint, PATCH, tmp_path / "out")
    assert "'layers.1.mlp'" in message
    assert PATCH.tensors["layers.1.mlp"].old_sha256[:12] in message
    assert hash_tensor(other.dtype, other.shape, other.data)[:12] in message
    assert "'some/model' at revision 'abc'" in message
    assert "already" not in message


def test_model_without_revision_is_named_by_its_id_alone(tmp_path: Path, checkpoint: Path) -> None:
    manifest = dataclasses.replace(MANIFEST, model=PatchModel(id="a folder", revision=None))
    patch = Patch(tensors={"gone": PATCH.tensors["layers.0.mlp"]}, manifest=manifest)
    message = refusal(checkpoint, patch, tmp_path / "out")
    assert "has no tensor 'gone'" in message
    assert message.endswith("made from 'a folder'")


def test_checkpoint_that_carries_the_patch_already_is_refused_as_such(
    tmp_path: Path, checkpoint: Path
) -> None:
    apply_patch(checkpoint, PATCH, tmp_path / "out")
    assert "carries the patch already" in refusal(tmp_path / "out", PATCH, tmp_path / "again")


def test_checkpoint_that_carries_half_of_the_patch_is_a_wrong_base(
    tmp_path: Path, checkpoint: Path
) -> None:
    half = WEIGHTS | {"layers.0.mlp": PATCHED["layers.0.mlp"]}
    write_safetensors(checkpoint / "model.safetensors", half)
    assert "already" not in refusal(checkpoint, PATCH, tmp_path / "out")


@pytest.mark.parametrize(
    "tensor", [TensorData("BF16", (2, 3), bytes(12)), TensorData("F16", (3, 2), bytes(12))]
)
def test_other_dtype_or_shape_is_refused(tmp_path: Path, checkpoint: Path, tensor: TensorData) -> None:
    write_safetensors(checkpoint / "model.safetensors", WEIGHTS | {"layers.0.mlp": tensor})
    message = refusal(checkpoint, PATCH, tmp_path / "out")
    assert f"is {tensor.dtype} {list(tensor.shape)}, but the patch expects BF16 [3, 2]" in message


def test_damaged_checkpoint_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="truncated"):
        apply_patch(checkpoint, PATCH, tmp_path / "out")


@pytest.mark.parametrize("place", [".", "deep/er", "../link/out"])
def test_output_within_the_checkpoint_is_refused(tmp_path: Path, checkpoint: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(checkpoint)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="lies within the checkpoint"):
        apply_patch(checkpoint, PATCH, checkpoint / place)
    assert contents(tmp_path) == before


def test_existing_output_is_kept(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InputError, match="not empty"):
        apply_patch(checkpoint, PATCH, tmp_path / "out")
    assert contents(tmp_path / "out").keys() == {"mine"}


def test_disk_without_enough_space_is_reported_before_copying(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(map(len, contents(checkpoint).values())) + 16
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    bar = Bar()
    monkeypatch.setattr("locft.patch.rewrite.progress", bar)
    with pytest.raises(InputError, match=r"not enough disk space: .* needed, .* free"):
        apply_patch(checkpoint, PATCH, tmp_path / "out")
    assert bar.steps == []
    assert list(tmp_path.iterdir()) == [checkpoint]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed))
    apply_patch(checkpoint, PATCH, tmp_path / "out")


@pytest.mark.parametrize("fault", [OSError("disk"), KeyboardInterrupt()])
def test_fault_in_the_middle_leaves_nothing_behind(
    tmp_path: Path, sharded: Path, fault: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(tmp_path)
    monkeypatch.setattr("locft.patch.rewrite.progress", Bar(fault, at=3))
    with pytest.raises(type(fault)):
        apply_patch(sharded, PATCH, tmp_path / "out")
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == [sharded.name]  # noqa: PTH208


def test_failing_rename_leaves_nothing_behind(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError("rename")

    with monkeypatch.context() as patched:
        patched.setattr("os.rename", fail)
        with pytest.raises(OSError, match="rename"):
            apply_patch(checkpoint, PATCH, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_importing_loads_no_heavy_library() -> None:
    code = (
        "import sys, locft.patch.apply;"
        "print({'torch', 'transformers', 'safetensors', 'numpy'} & sys.modules.keys())"
    )
    path = os.pathsep.join(map(str, {Path(entry).parent for entry in locft.__path__}))
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "set()"
