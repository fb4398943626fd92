"""The status of a checkpoint tells what is in it, what is amiss and what can be reverted."""

from dataclasses import asdict
from pathlib import Path

import pytest
from checkpoints import (
    DOWN_0,
    DOWN_1,
    LAYOUTS,
    SHARDED,
    UP_0,
    Layout,
    Tensors,
    changes,
    digest,
    id_of,
    make_patch,
    patch_of,
    tree,
)

from locft.errors import ModelError
from locft.patch.apply import revert_patches, stack_patches
from locft.patch.manifest import PatchLocation, PatchModel
from locft.patch.status import CheckpointStatus, PatchStatus, TensorStatus, read_status

ORIGINAL = SHARDED.tensors()

FIRST, AFTER_FIRST = patch_of(ORIGINAL, (DOWN_0,), 1)

SECOND, AFTER_SECOND = patch_of(AFTER_FIRST, (DOWN_0, DOWN_1), 2)

BESIDE, _ = patch_of(ORIGINAL, (UP_0,), 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a checkpoint with three patches in it."""
    made = SHARDED.make(tmp_path / "folder")
    stack_patches(made, [FIRST, SECOND, BESIDE], None)
    return made


def overwrite(folder: Path, tensors: Tensors) -> None:
    """Give a checkpoint other tensors, as somebody may who knows nothing of locft."""
    for name, data in SHARDED.files(tensors).items():
        (folder / name).write_bytes(data)


def obstacles(status: CheckpointStatus) -> dict[str, str | None]:
    return {patch.id: patch.obstacle for patch in status.patches}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_an_unedited_checkpoint_carries_nothing(layout: Layout, tmp_path: Path) -> None:
    folder = layout.make(tmp_path / "folder")
    assert read_status(str(folder)) == CheckpointStatus(
        checkpoint=str(folder), is_intact=True, patches=(), tensors=(), leftovers=()
    )
    assert tree(folder) == layout.files(layout.tensors())


def test_patches_are_told_from_the_oldest_to_the_newest_with_all_that_is_known(folder: Path) -> None:
    before = tree(folder)
    status = read_status(folder)
    assert status.is_intact
    assert status.leftovers == ()
    above = f"patch {id_of(SECOND)[:12]} builds on it: revert that one first"
    assert status.patches == tuple(
        PatchStatus(
            id=id_of(patch),
            model=PatchModel(id="some/model", revision="abc"),
            location=PatchLocation(name="0.mlp.down", layer=0, module="mlp.down", num_parameters=15),
            num_edits=3,
            edits_sha256="e" * 64,
            tensors=names,
            obstacle=obstacle,
        )
        for patch, names, obstacle in (
            (FIRST, (DOWN_0,), above),
            (SECOND, (DOWN_0, DOWN_1), None),
            (BESIDE, (UP_0,), None),
        )
    )
    assert status.tensors == tuple(
        TensorStatus(
            name=name,
            patch=id_of(patch),
            expected_sha256=patch.tensors[name].new_sha256,
            found_sha256=patch.tensors[name].new_sha256,
            state="ok",
        )
        for name, patch in ((DOWN_0, SECOND), (UP_0, BESIDE), (DOWN_1, SECOND))
    )
    assert tree(folder) == before


def test_what_can_be_reverted_according_to_the_status_can_be(tmp_path: Path, folder: Path) -> None:
    for number, (patch_id, obstacle) in enumerate(obstacles(read_status(folder)).items()):
        if obstacle is None:
            revert_patches(folder, [patch_id], tmp_path / str(number))
            assert patch_id not in obstacles(read_status(tmp_path / str(number)))


def test_a_changed_tensor_is_told_with_both_hashes_and_keeps_its_patch_in(folder: Path) -> None:
    tuned = changes(ORIGINAL, [DOWN_1], 50)
    now = {**AFTER_SECOND, UP_0: changes(ORIGINAL, [UP_0], 4)[UP_0]}
    overwrite(folder, {**now, **tuned})
    status = read_status(folder)
    assert not status.is_intact
    odd = [tensor for tensor in status.tensors if tensor.state != "ok"]
    assert odd == [
        TensorStatus(
            name=DOWN_1,
            patch=id_of(SECOND),
            expected_sha256=SECOND.tensors[DOWN_1].new_sha256,
            found_sha256=digest(tuned[DOWN_1]),
            state="changed",
        )
    ]
    assert obstacles(status) == {
        id_of(FIRST): f"patch {id_of(SECOND)[:12]} builds on it: revert that one first",
        id_of(SECOND): f"tensor '{DOWN_1}' is changed",
        id_of(BESIDE): None,
    }


def test_what_no_patch_changed_may_change(folder: Path) -> None:
    tuned = changes(ORIGINAL, ["model.norm.weight"], 50)
    overwrite(folder, {**AFTER_SECOND, UP_0: changes(ORIGINAL, [UP_0], 4)[UP_0], **tuned})
    assert read_status(folder).is_intact


def test_a_missing_tensor_is_told(folder: Path) -> None:
    rest = {name: tensor for name, tensor in AFTER_SECOND.items() if name != UP_0}
    overwrite(folder, rest)
    status = read_status(folder)
    assert not status.is_intact
    assert asdict(status.tensors[1]) == {
        "name": UP_0,
        "patch": id_of(BESIDE),
        "expected_sha256": BESIDE.tensors[UP_0].new_sha256,
        "found_sha256": None,
        "state": "missing",
    }
    assert obstacles(status)[id_of(BESIDE)] == f"tensor '{UP_0}' is missing"
    assert obstacles(status)[id_of(SECOND)] is None


def test_old_values_that_are_missing_or_damaged_make_a_checkpoint_less_than_intact(folder: Path) -> None:
    undo = folder / ".locft" / f"{id_of(BESIDE)}.safetensors"
    raw = undo.read_bytes()
    advice = (
        f"without these old values patch {id_of(BESIDE)[:12]} cannot be reverted: take the model as it"
        " was before that patch"
    )
    for damaged, said in (
        (raw[:-1] + bytes([raw[-1] ^ 4]), f"{undo}: tensor '{UP_0}' is damaged; {advice}"),
        (raw[:7], f"{undo}: is truncated, or no safetensors file; {advice}"),
    ):
        undo.write_bytes(damaged)
        status = read_status(folder)
        assert not status.is_intact
        assert {tensor.state for tensor in status.tensors} == {"ok"}
        assert obstacles(status)[id_of(BESIDE)] == said
    undo.unlink()
    assert obstacles(read_status(folder))[id_of(BESIDE)] == f"{undo}: is missing; {advice}"
    undo.symlink_to("/dev/null")
    assert f"{undo}: is a link" in (obstacles(read_status(folder))[id_of(BESIDE)] or "")


def test_of_a_patch_that_is_there_twice_only_the_newer_can_be_reverted(tmp_path: Path) -> None:
    folder = SHARDED.make(tmp_path / "folder")
    back = make_patch(AFTER_FIRST, {DOWN_0: ORIGINAL[DOWN_0]})
    stack_patches(folder, [FIRST, back, FIRST], None)
    status = read_status(folder)
    assert [patch.id for patch in status.patches] == [id_of(FIRST), id_of(back), id_of(FIRST)]
    above = f"patch {id_of(FIRST)[:12]} builds on it: revert that one first"
    assert [patch.obstacle for patch in status.patches] == [above, above, None]


def test_leftovers_are_named_from_the_folder_on(folder: Path) -> None:
    names = (".locft-01234567-model.safetensors", ".locft/.locft-89abcdef-record.json")
    for name in names:
        (folder / name).touch()
    assert read_status(folder).leftovers == names


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_no_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=name):
        read_status(tmp_path / name)
