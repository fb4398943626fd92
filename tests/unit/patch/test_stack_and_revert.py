"""Patches go in on top of what they were made from, and come out if nothing builds on them."""

import itertools
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import (
    DOWN_0,
    DOWN_1,
    SHARDED,
    SINGLE,
    UP_0,
    UP_1,
    Layout,
    Tensors,
    changes,
    id_of,
    make_patch,
    patch_of,
    plain,
    read_weights,
    tree,
)

from locft.checkpoint import read_checkpoint
from locft.errors import ModelError, PatchError
from locft.patch import record
from locft.patch.apply import apply_patch, check_base, revert_patches, stack_patches, write_plain
from locft.patch.format import Patch, manifest_record
from locft.patch.status import read_status

ORIGINAL = SHARDED.tensors()

# Three on one another, and one beside them.
FIRST, AFTER_FIRST = patch_of(ORIGINAL, (DOWN_0,), 1)
SECOND, AFTER_SECOND = patch_of(AFTER_FIRST, (DOWN_0, DOWN_1), 2)
THIRD, AFTER_THIRD = patch_of(AFTER_SECOND, (DOWN_1,), 3)
BESIDE, _ = patch_of(ORIGINAL, (UP_0, UP_1), 4)

CHAIN = (FIRST, SECOND, THIRD)

BACK = make_patch(AFTER_FIRST, {DOWN_0: ORIGINAL[DOWN_0]})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return SHARDED.make(tmp_path / "base")


def carried(folder: Path) -> list[str]:
    return [patch.id for patch in read_status(folder).patches]


def refusal(folder: Path, operation: Callable[..., object], *words: object) -> str:
    """Tell what an operation says that must be refused and change nothing."""
    before = tree(folder.parent)
    with pytest.raises(PatchError) as caught:
        operation(*words)
    assert tree(folder.parent) == before
    return str(caught.value)


def given(tensors: Tensors, *patches: Patch) -> Tensors:
    """Put the patches' values over a checkpoint's."""
    result = dict(tensors)
    for patch in patches:
        for name, tensor in patch.tensors.items():
            result[name] = replace(result[name], data=tensor.data)
    return result


# Stacking


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("place", ["in place", "a copy"])
def test_the_order_in_which_patches_follow_on_each_other_is_found(
    order: Sequence[int], place: str, tmp_path: Path, base: Path
) -> None:
    output = None if place == "in place" else tmp_path / "copy"
    ids = stack_patches(base, [CHAIN[i] for i in order], output)
    assert list(ids) == list(map(id_of, CHAIN))
    assert carried(output or base) == list(ids)
    assert plain(output or base) == SHARDED.files(AFTER_THIRD)


def test_patches_of_different_matrices_keep_the_order_in_which_they_are_given(
    tmp_path: Path, base: Path
) -> None:
    assert stack_patches(base, [BESIDE, FIRST], tmp_path / "one") == (id_of(BESIDE), id_of(FIRST))
    assert stack_patches(base, [FIRST, BESIDE], tmp_path / "two") == (id_of(FIRST), id_of(BESIDE))
    assert plain(tmp_path / "one") == plain(tmp_path / "two")
    assert plain(tmp_path / "one") == SHARDED.files(given(ORIGINAL, FIRST, BESIDE))


def test_one_after_the_other_patches_give_what_they_give_at_once(tmp_path: Path, base: Path) -> None:
    stack_patches(base, [*CHAIN, BESIDE], tmp_path / "at once")
    for patch in (*CHAIN, BESIDE):
        apply_patch(base, patch, None)
    assert tree(base) == tree(tmp_path / "at once")


def test_a_patch_of_the_same_matrix_fits_only_on_top_of_the_one_that_it_was_made_from(
    base: Path,
) -> None:
    other, _ = patch_of(ORIGINAL, (DOWN_0,), 9)
    stack_patches(base, [FIRST], None)
    said = refusal(base, stack_patches, base, [other], None)
    assert f"tensor '{DOWN_0}' was changed by patch {id_of(FIRST)[:12]}, and this patch was not" in said
    assert stack_patches(base, [SECOND], None) == (id_of(SECOND),)


def test_patches_go_in_all_or_none(tmp_path: Path, base: Path) -> None:
    for output in (None, tmp_path / "copy"):
        said = refusal(base, stack_patches, base, [BESIDE, THIRD, FIRST], output)
        assert f"tensor '{DOWN_1}' is not the one that the patch was made from" in said


def test_the_same_patch_twice_is_refused(base: Path) -> None:
    said = refusal(base, stack_patches, base, [FIRST, FIRST], None)
    assert "the patch was named twice" in said
    apply_patch(base, FIRST, None)
    said = refusal(base, apply_patch, base, FIRST, None)
    assert "this checkpoint carries the patch already" in said


def test_there_and_back_again_every_step_can_be_reverted(tmp_path: Path, base: Path) -> None:
    steps = [FIRST, BACK, FIRST, BACK, FIRST]
    states = [tree(base)]
    for patch in steps:
        apply_patch(base, patch, None)
        states.append(tree(base))
    assert carried(base) == list(map(id_of, steps))
    assert plain(base) == SHARDED.files(AFTER_FIRST)
    # Each patch keeps its old values once, however often it is there.
    assert len(list((base / ".locft").iterdir())) == 3
    for patch in reversed(steps):
        assert tree(base) == states.pop()
        assert revert_patches(base, [id_of(patch)], None) == (id_of(patch),)
    assert tree(base) == states.pop()


def test_there_and_back_again_is_stacked_and_reverted_at_once(tmp_path: Path, base: Path) -> None:
    before = tree(base)
    steps = [FIRST, BACK, FIRST]
    assert list(stack_patches(base, steps, None)) == list(map(id_of, steps))
    assert list(revert_patches(base, [], tmp_path / "copy")) == list(map(id_of, reversed(steps)))
    assert tree(tmp_path / "copy") == before
    # The newer of the same patch twice is meant.
    said = refusal(base, revert_patches, base, [id_of(BACK)], None)
    assert f"was changed again by patch {id_of(FIRST)[:12]}" in said
    assert revert_patches(base, [id_of(FIRST), id_of(BACK)], None) == (id_of(FIRST), id_of(BACK))
    assert carried(base) == [id_of(FIRST)]


def test_a_patch_that_changes_nothing_goes_in_and_out(base: Path) -> None:
    same = make_patch(ORIGINAL, {DOWN_0: ORIGINAL[DOWN_0], DOWN_1: ORIGINAL[DOWN_1]})
    before = tree(base)
    apply_patch(base, same, None)
    apply_patch(base, same, None)
    assert plain(base) == before
    assert carried(base) == [id_of(same), id_of(same)]
    revert_patches(base, [], None)
    assert tree(base) == before


def test_a_quantised_checkpoint_is_refused(base: Path) -> None:
    (base / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    before = tree(base)
    with pytest.raises(ModelError, match=r"its weights are quantised \(gptq\)"):
        stack_patches(base, [FIRST], None)
    assert tree(base) == before


@pytest.mark.parametrize("place", ["in place", "a copy"])
def test_a_patch_is_not_put_on_what_something_else_changed_since(
    place: str, tmp_path: Path, base: Path
) -> None:
    apply_patch(base, FIRST, None)
    # Somebody put the original file back by hand, and now wants the patch again.
    file = base / SHARDED.file_of(DOWN_0)
    file.write_bytes(SHARDED.files(ORIGINAL)[file.name])
    output = None if place == "in place" else tmp_path / "copy"
    for patches in ([FIRST], [BESIDE, FIRST]):
        said = refusal(base, stack_patches, base, patches, output)
        assert said == (
            f"{base}: tensor '{DOWN_0}' is no longer what patch {id_of(FIRST)[:12]} made of it:"
            f" something else changed it. If it is as it should be, remove {base}/.locft and try again:"
            " the patches in it can then not be reverted"
        )
    # What is not concerned goes on.
    stack_patches(base, [BESIDE], output)
    shutil.rmtree(base / ".locft")
    stack_patches(base, [FIRST], tmp_path / "again")
    assert carried(tmp_path / "again") == [id_of(FIRST)]


def test_a_patch_of_a_tensor_that_went_missing_is_told_as_such(base: Path) -> None:
    apply_patch(base, FIRST, None)
    shard = base / SHARDED.file_of(DOWN_0)
    rest = {name: tensor for name, tensor in AFTER_FIRST.items() if name != DOWN_0}
    for name, data in SHARDED.files(rest).items():
        (base / name).write_bytes(data)
    assert shard.is_file()
    assert f"has no tensor '{DOWN_0}'" in refusal(base, apply_patch, base, SECOND, None)
    said = refusal(base, revert_patches, base, [], None)
    assert f"tensor '{DOWN_0}' is no longer what the patch made of it" in said


def test_more_patches_than_a_record_may_hold_are_refused(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack_patches(base, CHAIN, None)
    stack_patches(base, [BESIDE], tmp_path / "copy")
    length = (tmp_path / "copy" / ".locft" / "record.json").stat().st_size
    monkeypatch.setattr("locft.patch.apply.MAX_RECORD_BYTES", length - 1)
    said = refusal(base, stack_patches, base, [BESIDE], None)
    assert said == f"{base}: carries too many patches to record more; revert some first"
    monkeypatch.setattr("locft.patch.apply.MAX_RECORD_BYTES", length)
    stack_patches(base, [BESIDE], None)


def test_whether_a_patch_belongs_to_a_checkpoint_can_be_asked_before(base: Path) -> None:
    check_base(base, read_checkpoint(base), FIRST)
    said = refusal(base, check_base, base, read_checkpoint(base), SECOND)
    assert f"{base}: tensor '{DOWN_0}' is not the one that the patch was made from" in said


def test_a_plain_copy_says_nothing_of_locft(tmp_path: Path, base: Path) -> None:
    write_plain(base, FIRST, tmp_path / "plain")
    assert tree(tmp_path / "plain") == SHARDED.files(AFTER_FIRST)
    apply_patch(base, FIRST, None)
    write_plain(base, SECOND, tmp_path / "more")
    assert tree(tmp_path / "more") == SHARDED.files(AFTER_SECOND)


# Reverting


@pytest.mark.parametrize("layout", [SINGLE, SHARDED], ids=lambda layout: layout.name)
def test_all_patches_come_out_newest_first(layout: Layout, tmp_path: Path) -> None:
    tensors = layout.tensors()
    first, after = patch_of(tensors, (DOWN_0,), 1)
    second, after = patch_of(after, (DOWN_0, UP_1), 2)
    base = layout.make(tmp_path / "base")
    before = tree(base)
    stack_patches(base, [first, second], None)
    assert revert_patches(base, [], tmp_path / "copy") == (id_of(second), id_of(first))
    assert revert_patches(base, [], None) == (id_of(second), id_of(first))
    assert tree(base) == tree(tmp_path / "copy") == before


def test_a_patch_in_the_middle_comes_out_if_nothing_builds_on_it(tmp_path: Path, base: Path) -> None:
    stack_patches(base, [FIRST, BESIDE, SECOND], None)
    assert revert_patches(base, [id_of(BESIDE)], tmp_path / "copy") == (id_of(BESIDE),)
    assert plain(tmp_path / "copy") == SHARDED.files(AFTER_SECOND)
    assert carried(tmp_path / "copy") == [id_of(FIRST), id_of(SECOND)]
    assert not (tmp_path / "copy" / ".locft" / f"{id_of(BESIDE)}.safetensors").exists()
    revert_patches(base, [id_of(BESIDE)], None)
    assert tree(base) == tree(tmp_path / "copy")
    apply_patch(base, BESIDE, None)
    assert carried(base) == [id_of(FIRST), id_of(SECOND), id_of(BESIDE)]


def test_a_patch_that_others_build_on_stays_and_the_newest_of_them_is_named(base: Path) -> None:
    before = tree(base)
    fourth, _ = patch_of(AFTER_THIRD, (DOWN_0,), 5)
    stack_patches(base, [*CHAIN, fourth], None)
    said = refusal(base, revert_patches, base, [id_of(FIRST)], None)
    assert said == (
        f"{base}: patch {id_of(FIRST)[:12]} cannot be reverted: tensor '{DOWN_0}' was changed again by"
        f" patch {id_of(fourth)[:12]}; revert that one first"
    )
    said = refusal(base, revert_patches, base, [id_of(FIRST), id_of(fourth)], None)
    assert f"by patch {id_of(SECOND)[:12]}; revert that one first" in said
    # In any order, together with those that build on it.
    several = [id_of(FIRST), id_of(THIRD), id_of(fourth), id_of(SECOND)]
    assert revert_patches(base, several, None) == tuple(map(id_of, (fourth, THIRD, SECOND, FIRST)))
    assert tree(base) == before


def test_an_identity_may_be_shortened(base: Path) -> None:
    stack_patches(base, [FIRST, BESIDE], None)
    assert revert_patches(base, [id_of(FIRST)[:12]], None) == (id_of(FIRST),)
    assert revert_patches(base, [id_of(BESIDE)[:1]], None) == (id_of(BESIDE),)


def twins() -> tuple[Patch, Patch]:
    """Find two patches whose identities begin alike."""
    seen: dict[str, Patch] = {}
    for number in range(17):
        patch = make_patch(ORIGINAL, changes(ORIGINAL, [(UP_0, UP_1)[number % 2]], 6), number)
        start = id_of(patch)[:1]
        if start in seen and not seen[start].tensors.keys() & patch.tensors.keys():
            return seen[start], patch
        seen.setdefault(start, patch)
    raise AssertionError("no two of them begin alike")


def test_an_identity_that_is_too_short_to_tell_is_refused_with_all_that_it_may_mean(base: Path) -> None:
    one, other = twins()
    stack_patches(base, [one, other], None)
    start = id_of(one)[:1]
    assert refusal(base, revert_patches, base, [start], None) == (
        f"{base}: '{start}' may mean several patches: {id_of(one)}, {id_of(other)}"
    )


def test_an_identity_that_is_too_short_names_the_same_patch_once(base: Path) -> None:
    one, other = twins()
    [name] = one.tensors
    back = make_patch(given(ORIGINAL, one), {name: ORIGINAL[name]}, 99)
    stack_patches(base, [one, back, one, other], None)
    start = id_of(one)[:1]
    said = refusal(base, revert_patches, base, [start], None)
    assert said.count(id_of(one)) == 1
    assert said.count(id_of(other)) == 1


@pytest.mark.parametrize("wanted", ["zzz", "", "0" * 65, "runs/other", "*"])
def test_an_identity_that_nothing_carries_is_refused_with_those_that_are_there(
    wanted: str, base: Path
) -> None:
    stack_patches(base, [FIRST, BESIDE], None)
    assert refusal(base, revert_patches, base, [wanted], None) == (
        f"{base}: carries no patch {wanted!r}; it carries {id_of(FIRST)[:12]}, {id_of(BESIDE)[:12]}"
    )


def test_there_is_nothing_to_revert_in_an_unedited_checkpoint(tmp_path: Path, base: Path) -> None:
    for ids in ([], ["abc"]):
        for output in (None, tmp_path / "copy"):
            said = refusal(base, revert_patches, base, ids, output)
            assert said == f"{base}: carries no patches, so there is nothing to revert"


@pytest.mark.parametrize("place", ["in place", "a copy"])
def test_what_something_else_changed_since_is_not_lost_by_reverting(
    place: str, tmp_path: Path, base: Path
) -> None:
    stack_patches(base, [FIRST, BESIDE], None)
    file = base / SHARDED.file_of(DOWN_0)
    tuned = changes(AFTER_FIRST, [DOWN_0], 77)
    file.write_bytes(SHARDED.files({**given(AFTER_FIRST, BESIDE), **tuned})[file.name])
    output = None if place == "in place" else tmp_path / "copy"
    for ids in ([], [id_of(FIRST)]):
        said = refusal(base, revert_patches, base, ids, output)
        assert said == (
            f"{base}: patch {id_of(FIRST)[:12]} cannot be reverted: tensor '{DOWN_0}' is no longer what"
            " the patch made of it: something else changed it, and reverting would lose that change"
        )
    revert_patches(base, [id_of(BESIDE)], output)
    assert read_weights(output or base) == {**ORIGINAL, **tuned}


UNDO = f".locft/{id_of(FIRST)}.safetensors"


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_last_bit(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def rename_tensor(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"down_proj", b"down_prob"))


def transpose(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"[5,3]", b"[3,5]").replace(b"[5, 3]", b"[3, 5]"))


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def make_link(file: Path) -> None:
    (file.parents[2] / "elsewhere").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(file.parents[2] / "elsewhere")


@pytest.mark.parametrize("place", ["in place", "a copy"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove, "is missing; without these old values"),
        (make_folder, "is missing; without these old values"),
        (make_link, "is a link, which no part of a checkpoint's record may be"),
        (truncate, "reach beyond the end of the file; without these old values"),
        (empty, "is truncated, or no safetensors file; without these old values"),
        (flip_last_bit, f"tensor '{DOWN_0}' is damaged; without these old values"),
        (rename_tensor, f"holds no such tensor '{DOWN_0}' as the checkpoint does; without these"),
        (transpose, f"holds no such tensor '{DOWN_0}' as the checkpoint does; without these"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_without_sound_old_values_nothing_is_reverted(
    damage: Callable[[Path], None], said: str, place: str, tmp_path: Path, base: Path
) -> None:
    stack_patches(base, [FIRST, BESIDE], None)
    raw = (base / UNDO).read_bytes()
    damage(base / UNDO)
    output = None if place == "in place" else tmp_path / "copy"
    for ids in ([], [id_of(FIRST)]):
        message = refusal(base, revert_patches, base, ids, output)
        assert message.startswith(f"{base / UNDO}: ")
        assert said in message
    # Where it is not needed, it is in nobody's way.
    revert_patches(base, [id_of(BESIDE)], None)
    if (base / UNDO).is_dir():
        (base / UNDO).rmdir()
    (base / UNDO).unlink(missing_ok=True)
    (base / UNDO).write_bytes(raw)
    revert_patches(base, [], None)
    assert tree(base) == SHARDED.files(ORIGINAL)


def test_old_values_of_another_size_are_never_written_beyond_their_tensor(
    base: Path,
) -> None:
    # A record that a stranger made: its hashes are right, but they are those of a longer tensor.
    longer = replace(ORIGINAL[DOWN_0], shape=(5, 30), data=bytes(300))
    patch = make_patch({**ORIGINAL, DOWN_0: longer}, {DOWN_0: AFTER_FIRST[DOWN_0]})
    (base / ".locft").mkdir()
    (base / ".locft" / f"{id_of(patch)}.safetensors").write_bytes(
        Layout("", "F16", is_sharded=False, is_tied=True).files({DOWN_0: longer})["model.safetensors"]
    )
    for name, data in SHARDED.files(AFTER_FIRST).items():
        (base / name).write_bytes(data)
    manifest = record.Record((manifest_record(patch),))
    (base / ".locft" / "record.json").write_bytes(record.dump_record(manifest))
    assert [tensor.state for tensor in read_status(base).tensors] == ["ok"]
    said = refusal(base, revert_patches, base, [], None)
    assert f"holds no such tensor '{DOWN_0}' as the checkpoint does" in said
    assert re.search("holds no such tensor", read_status(base).patches[0].obstacle or "")
