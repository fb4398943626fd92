"""Checkpoints are copied and changed in place; whatever was interrupted is finished or forgotten."""

import errno
import fcntl
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import (
    DOWN_0,
    DOWN_1,
    EMBED,
    INDEX,
    LAYOUTS,
    SHARDED,
    SINGLE,
    UP_0,
    UP_1,
    Layout,
    Tensors,
    changes,
    id_of,
    make_patch,
    pack,
    patch_of,
    plain,
    read_weights,
    signed,
    tree,
)

from locft.checkpoint import read_checkpoint
from locft.errors import InputError, LocftError, ModelError, PatchError
from locft.patch import rewrite
from locft.patch.apply import revert_patches, stack_patches
from locft.patch.compare import compare_checkpoints
from locft.patch.format import Patch, manifest_record
from locft.patch.rewrite import opened_in_place, read_record
from locft.patch.status import read_status
from locft.publish import locked

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)

# Of one file, of two shards, of one of them.
TOUCHED = ((DOWN_0,), (DOWN_0, DOWN_1), (UP_0, DOWN_0))

every_touch = pytest.mark.parametrize("names", TOUCHED, ids=["one", "two shards", "one shard"])


def carried(folder: Path) -> list[str]:
    return [patch.id for patch in read_status(folder).patches]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return SHARDED.make(tmp_path / "base")


TENSORS = SHARDED.tensors()

PATCH, PATCHED = patch_of(TENSORS, (DOWN_0, DOWN_1), 1)


class Bar:
    """A progress bar that calls back at its first step."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act: Callable[[], object] | None = act

    @contextmanager
    def __call__(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        yield self.step

    def step(self, num_bytes: int) -> None:
        if self.act is not None:
            act, self.act = self.act, None
            act()


# In place


@every_layout
@every_touch
def test_in_place_only_the_patched_bytes_change_and_come_back(
    layout: Layout, names: tuple[str, ...], tmp_path: Path
) -> None:
    folder = layout.make(tmp_path / "base")
    before = tree(folder)
    patch, after = patch_of(layout.tensors(), names, 1)
    stack_patches(folder, [patch], None)
    assert plain(folder) == layout.files(after)
    assert set(tree(folder)) - set(before) == {
        ".locft",
        ".locft/record.json",
        f".locft/{id_of(patch)}.safetensors",
    }
    assert carried(folder) == [id_of(patch)]
    revert_patches(folder, [], None)
    assert tree(folder) == before


@every_layout
def test_a_copy_differs_in_the_patched_bytes_alone_and_goes_back_to_the_same_bytes(
    layout: Layout, tmp_path: Path
) -> None:
    folder = layout.make(tmp_path / "base")
    before = tree(folder)
    patch, after = patch_of(layout.tensors(), (DOWN_0, UP_1), 1)
    stack_patches(folder, [patch], tmp_path / "copy")
    assert tree(folder) == before
    assert plain(tmp_path / "copy") == layout.files(after)
    revert_patches(tmp_path / "copy", [], tmp_path / "back")
    assert tree(tmp_path / "back") == before
    assert plain(tmp_path / "copy") == layout.files(after)


@every_layout
def test_in_place_and_in_a_copy_the_same_files_come_about(layout: Layout, tmp_path: Path) -> None:
    folder = layout.make(tmp_path / "base")
    patch, _ = patch_of(layout.tensors(), (DOWN_0, UP_1), 1)
    stack_patches(folder, [patch], tmp_path / "copy")
    stack_patches(folder, [patch], None)
    assert tree(folder) == tree(tmp_path / "copy")


def test_what_a_loader_does_not_read_stays_as_it_is_in_place(base: Path) -> None:
    mine = [".gitattributes", "modeling.py", "onnx/model.onnx", "adapter.safetensors", ".locft-notes"]
    for name in mine:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    stack_patches(base, [PATCH], None)
    assert {name: (base / name).read_text() for name in mine} == {name: name for name in mine}


@every_touch
def test_files_that_are_links_are_replaced_and_not_written_through(
    names: tuple[str, ...], tmp_path: Path, base: Path
) -> None:
    store = tmp_path / "store"
    base.rename(store)
    base.mkdir()
    for file in store.iterdir():
        (base / file.name).symlink_to(file)
    before = tree(store)
    patch, after = patch_of(TENSORS, names, 1)
    stack_patches(base, [patch], None)
    assert tree(store) == before
    assert read_weights(base) == after
    written = {SHARDED.file_of(name) for name in names}
    links = {path.name for path in base.iterdir() if path.is_symlink()}
    # The index is rewritten, with its own bytes, only where several shards change.
    assert links == set(before) - written - ({INDEX} if len(written) > 1 else set())
    assert (base / INDEX).read_bytes() == before[INDEX]
    revert_patches(base, [], None)
    assert read_weights(base) == TENSORS
    assert tree(store) == before


@every_touch
def test_files_with_a_second_name_are_replaced_and_not_written_through(
    names: tuple[str, ...], tmp_path: Path, base: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other, copy_function=os.link)
    before = tree(other)
    patch, after = patch_of(TENSORS, names, 1)
    stack_patches(base, [patch], None)
    assert read_weights(base) == after
    assert tree(other) == before
    shared = {name for name in before if (base / name).samefile(other / name)}
    written = {SHARDED.file_of(name) for name in names}
    assert shared == set(before) - written - ({INDEX} if len(written) > 1 else set())


@every_layout
@every_touch
def test_at_every_moment_a_loader_finds_the_old_weights_or_the_new_ones(
    layout: Layout, names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = layout.make(tmp_path / "base")
    before = layout.tensors()
    patch, after = patch_of(before, names, 1)
    seen: list[Tensors] = []

    def watched(real: Callable[..., object]) -> Callable[..., object]:
        def call(*words: object, **more: object) -> object:
            result = real(*words, **more)
            seen.append(read_weights(folder))
            return result

        return call

    for name in ("replace", "unlink", "link", "mkdir", "rmdir", "fsync"):
        monkeypatch.setattr(f"os.{name}", watched(getattr(os, name)))
    operations: list[Callable[[], object]] = [
        lambda: stack_patches(folder, [patch], None),
        lambda: revert_patches(folder, [], None),
    ]
    for operation in operations:
        seen.clear()
        operation()
        turn = next(i for i, found in enumerate(seen) if found != before)
        assert 0 < turn < len(seen) - 1
        assert seen == [before] * turn + [after] * (len(seen) - turn)
        before, after = after, before


def test_files_keep_their_modes_in_place(base: Path) -> None:
    modes = {
        SHARDED.file_of(DOWN_0): 0o600,
        SHARDED.file_of(DOWN_1): 0o440,
        SHARDED.file_of(EMBED): 0o600,
        INDEX: 0o640,
    }
    for name, mode in modes.items():
        (base / name).chmod(mode)
    stack_patches(base, [PATCH], None)
    assert {name: stat.S_IMODE((base / name).stat().st_mode) for name in modes} == modes
    revert_patches(base, [], None)
    assert {name: stat.S_IMODE((base / name).stat().st_mode) for name in modes} == modes


def test_a_file_that_replaces_a_link_has_the_mode_of_any_new_file(tmp_path: Path, base: Path) -> None:
    store = tmp_path / "store"
    base.rename(store)
    base.mkdir()
    for file in store.iterdir():
        file.chmod(0o400)  # as in the Hugging Face cache of a careful user
        (base / file.name).symlink_to(file)
    stack_patches(base, [PATCH], None)
    (tmp_path / "new").touch()
    mode = stat.S_IMODE((tmp_path / "new").stat().st_mode)
    for name in (SHARDED.file_of(DOWN_0), SHARDED.file_of(DOWN_1), INDEX):
        assert stat.S_IMODE((base / name).stat().st_mode) == mode


def test_a_folder_given_by_a_link_is_changed_where_it_is(tmp_path: Path, base: Path) -> None:
    (tmp_path / "link").symlink_to(base)
    stack_patches(tmp_path / "link", [PATCH], None)
    assert read_weights(base) == PATCHED
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "link"]


def test_a_relative_folder_is_changed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base)
    stack_patches(Path(), [PATCH], None)
    assert carried(Path()) == [id_of(PATCH)]
    revert_patches("", [], None)
    assert read_weights(base) == TENSORS


@pytest.mark.parametrize("layout", [SINGLE, SHARDED], ids=lambda layout: layout.name)
def test_a_disk_without_room_is_told_before_anything_is_written(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = layout.make(tmp_path / "base")
    patch, after = patch_of(layout.tensors(), (DOWN_0, DOWN_1), 1)
    files = {layout.file_of(name) for name in (DOWN_0, DOWN_1)}
    # What is written anew, and the old values: those are as long as the new ones.
    needed = sum((folder / file).stat().st_size for file in files)
    needed += sum(len(tensor.data) for tensor in patch.tensors.values())
    before = tree(folder)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(InputError, match=f"base: not enough disk space: {needed:,} bytes needed"):
        stack_patches(folder, [patch], None)
    assert tree(folder) == before
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed))
    stack_patches(folder, [patch], None)
    assert read_weights(folder) == after


def hub_snapshot(cache: Path, tensors: Tensors) -> Path:
    """Make a snapshot as huggingface_hub does: links to blobs."""
    repository = cache / "models--some--model"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, (name, data) in enumerate(SHARDED.files(tensors).items()):
        (blobs / str(i)).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    return snapshot


def test_the_hub_cache_is_refused_in_place_and_copied_from(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path / "hub", TENSORS)
    inner = snapshot / "inner"
    inner.mkdir()
    for link in list(snapshot.iterdir()):
        if link.is_symlink():
            (inner / link.name).symlink_to(link.resolve())
    (tmp_path / "link").symlink_to(snapshot)
    before = tree(tmp_path)
    for folder in (snapshot, inner, tmp_path / "link"):
        with pytest.raises(InputError) as caught:
            stack_patches(folder, [PATCH], None)
        assert str(caught.value) == (
            f"{folder}: lies in the Hugging Face Hub's cache, which others read, too;"
            " make a copy with -o DIR instead"
        )
        with pytest.raises(InputError, match="make a copy with -o DIR"):
            revert_patches(folder, [], None)
    assert tree(tmp_path) == before
    stack_patches(snapshot, [PATCH], tmp_path / "copy")
    assert read_weights(tmp_path / "copy") == PATCHED
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())


def test_a_folder_that_is_only_called_snapshots_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    folder = SHARDED.make(tmp_path / "snapshots" / "step-100")
    stack_patches(folder, [PATCH], None)
    assert read_weights(folder) == PATCHED


def test_the_cache_of_locft_is_refused_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "models").mkdir(parents=True)
    folder = SHARDED.make(tmp_path / "cache" / "models" / "demo")
    before = tree(folder)
    with pytest.raises(InputError, match=r"lies in locft's cache, .* make a copy with -o DIR instead"):
        stack_patches(folder, [PATCH], None)
    assert tree(folder) == before


def test_a_refused_change_leaves_no_trace(base: Path) -> None:
    other, _ = patch_of(PATCHED, (DOWN_0,), 2)
    before = tree(base)
    with pytest.raises(PatchError, match="is not the one that the patch was made from"):
        stack_patches(base, [other], None)
    with pytest.raises(PatchError, match="carries no patches"):
        revert_patches(base, [], None)
    assert tree(base) == before


def test_no_patches_change_nothing(tmp_path: Path, base: Path) -> None:
    before = tree(base)
    assert stack_patches(base, [], None) == ()
    assert tree(base) == before
    assert stack_patches(base, [], tmp_path / "copy") == ()
    assert tree(tmp_path / "copy") == before


def test_a_change_that_is_interrupted_before_its_rename_leaves_no_trace(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    before = tree(base)
    monkeypatch.setattr("locft.patch.rewrite.progress", Bar(stop))
    with pytest.raises(KeyboardInterrupt):
        stack_patches(base, [PATCH], None)
    assert tree(base) == before


@pytest.mark.parametrize("layout", [SINGLE, SHARDED], ids=lambda layout: layout.name)
def test_a_change_that_fails_after_its_rename_is_finished_nevertheless(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = layout.make(tmp_path / "base")
    patch, after = patch_of(layout.tensors(), (DOWN_0, DOWN_1), 1)
    settle, fault = rewrite._settle, [OSError(errno.EIO, "no")]

    def fail_once(*words: Any) -> None:
        if fault:
            raise fault.pop()
        settle(*words)

    monkeypatch.setattr(rewrite, "_settle", fail_once)
    with pytest.raises(OSError, match="no"):
        stack_patches(folder, [patch], None)
    assert plain(folder) == layout.files(after)
    assert carried(folder) == [id_of(patch)]
    assert read_status(folder).leftovers == ()


def test_a_disk_that_does_not_keep_what_is_written_is_noticed(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(descriptor: int) -> None:
        sync(descriptor)
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
            os.pwrite(descriptor, b"\xff", os.fstat(descriptor).st_size - 1)

    before, sync = tree(base), os.fsync
    last = make_patch(TENSORS, changes(TENSORS, [SHARDED.shards()[SHARDED.file_of(UP_1)][0]], 5))
    monkeypatch.setattr("os.fsync", damage)
    with pytest.raises(ModelError, match="did not keep what was written to it"):
        stack_patches(base, [last], None)
    assert tree(base) == before


def test_a_folder_that_is_being_written_is_refused_by_name_of_the_writer(base: Path) -> None:
    before = tree(base)
    said: list[str] = []

    def try_it() -> None:
        with pytest.raises(InputError) as caught:
            stack_patches(base, [PATCH], None)
        said.append(str(caught.value))

    with opened_in_place(base):
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
    assert f"is being written by another locft (process {os.getpid()} on " in said[0]
    assert said[0].endswith("; wait for it, or stop it")
    assert tree(base) == before


# Copies


def test_a_copy_shares_unchanged_shards_and_old_values_and_nothing_else(
    tmp_path: Path, base: Path
) -> None:
    first, after = patch_of(TENSORS, (DOWN_0,), 1)
    stack_patches(base, [first], tmp_path / "one")
    shared = {file.name for file in base.iterdir() if file.samefile(tmp_path / "one" / file.name)}
    assert shared == {SHARDED.file_of(DOWN_1), SHARDED.file_of("model.norm.weight")}
    second, after = patch_of(after, (DOWN_1,), 2)
    stack_patches(tmp_path / "one", [second], tmp_path / "two")
    undo = f".locft/{id_of(first)}.safetensors"
    assert (tmp_path / "one" / undo).samefile(tmp_path / "two" / undo)
    assert read_weights(tmp_path / "two") == after


def test_a_copy_shares_no_file_whose_mode_is_not_that_of_any_new_one(tmp_path: Path, base: Path) -> None:
    first, after = patch_of(TENSORS, (DOWN_0,), 1)
    stack_patches(base, [first], None)
    undo = base / ".locft" / f"{id_of(first)}.safetensors"
    private = (base / SHARDED.file_of(DOWN_1), undo)
    for file in private:
        file.chmod(0o400)
    second, after = patch_of(after, (UP_0,), 2)
    stack_patches(base, [second], tmp_path / "copy")
    (tmp_path / "new").touch()
    for file in private:
        copy = tmp_path / "copy" / file.relative_to(base)
        assert not copy.samefile(file)
        assert copy.stat().st_mode == (tmp_path / "new").stat().st_mode
        assert copy.read_bytes() == file.read_bytes()
    assert (tmp_path / "copy" / SHARDED.file_of("model.norm.weight")).samefile(
        base / SHARDED.file_of("model.norm.weight")
    )


def test_changing_a_copy_in_place_never_changes_its_base(tmp_path: Path, base: Path) -> None:
    first, after = patch_of(TENSORS, (DOWN_0,), 1)
    stack_patches(base, [first], tmp_path / "one")
    stack_patches(tmp_path / "one", [], tmp_path / "two")
    second, last = patch_of(after, tuple(TENSORS), 2)
    before = tree(base), tree(tmp_path / "one")
    stack_patches(tmp_path / "two", [second], None)
    assert (tree(base), tree(tmp_path / "one")) == before
    assert read_weights(tmp_path / "two") == last
    revert_patches(tmp_path / "two", [], None)
    assert (tree(base), tree(tmp_path / "one")) == before
    assert tree(tmp_path / "two") == before[0]
    # And the other way round.
    stack_patches(base, [patch_of(TENSORS, tuple(TENSORS), 3)[0]], None)
    assert tree(tmp_path / "one") == before[1]
    assert tree(tmp_path / "two") == before[0]


def test_shards_are_copied_where_links_cannot_be_made(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr("os.link", refuse)
    stack_patches(base, [PATCH], tmp_path / "copy")
    assert plain(tmp_path / "copy") == SHARDED.files(PATCHED)
    for file in base.iterdir():
        assert not file.samefile(tmp_path / "copy" / file.name)
    stack_patches(base, [PATCH], None)
    assert tree(base) == tree(tmp_path / "copy")


def test_files_are_cloned_where_the_file_system_can(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloned = []

    def clone(target: int, request: int, source: int) -> int:
        assert request == 0x40049409  # FICLONE of linux/fs.h
        data = os.pread(source, 10**6, 0)
        cloned.append(os.pwrite(target, data, 0))
        return 0

    monkeypatch.setattr("fcntl.ioctl", clone)
    stack_patches(base, [PATCH], tmp_path / "copy")
    assert sorted(cloned) == sorted(file.stat().st_size for file in base.iterdir())
    assert plain(tmp_path / "copy") == SHARDED.files(PATCHED)
    for file in base.iterdir():
        assert not file.samefile(tmp_path / "copy" / file.name)
    stack_patches(base, [PATCH], None)
    assert tree(base) == tree(tmp_path / "copy")


def test_systems_that_cannot_clone_are_not_asked_to(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        pytest.fail("asked")

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("fcntl.ioctl", never)
    stack_patches(base, [PATCH], tmp_path / "copy")
    assert plain(tmp_path / "copy") == SHARDED.files(PATCHED)


def test_on_another_disk_the_shards_need_room_too(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.stat

    def stat_elsewhere(path: Path, **words: bool) -> os.stat_result:
        found = real(path, **words)
        if path.name.endswith("-copy") and stat.S_ISDIR(found.st_mode):
            fields = list(found)
            fields[2] += 1  # st_dev
            return os.stat_result(fields)
        return found

    small, _ = patch_of(TENSORS, (DOWN_0,), 1)
    everything = sum(file.stat().st_size for file in base.iterdir())
    everything += sum(len(tensor.data) for tensor in small.tensors.values())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=everything - 1))
    stack_patches(base, [small], tmp_path / "near")
    monkeypatch.setattr(Path, "stat", stat_elsewhere)
    with pytest.raises(InputError, match="copy: not enough disk space"):
        stack_patches(base, [small], tmp_path / "copy")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=everything))
    stack_patches(base, [small], tmp_path / "copy")


def replace_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.json").write_bytes(b'{"version": "2.0"}')


def rewrite_shard(base: Path) -> None:
    file = base / SHARDED.file_of(DOWN_0)
    file.write_bytes(file.read_bytes())


def patch_in_place(base: Path) -> None:
    stack_patches(base, [patch_of(TENSORS, (UP_1,), 7)[0]], None)


def remove_shards(base: Path) -> None:
    for name in SHARDED.shards():
        (base / name).unlink()


def add_file(base: Path) -> None:
    (base / "generation_config.json").write_text("{}")


@pytest.mark.parametrize(
    "change", [replace_tokenizer, rewrite_shard, patch_in_place, remove_shards], ids=lambda f: f.__name__
)
def test_a_base_that_is_changed_while_it_is_copied_is_refused_and_no_copy_is_left(
    change: Callable[[Path], None], tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("locft.patch.rewrite.progress", Bar(lambda: change(base)))
    with pytest.raises(InputError, match="base: was changed while it was copied; try again"):
        stack_patches(base, [PATCH], tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_base_that_is_changed_while_it_is_read_is_read_again(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = rewrite.read_record

    def read_and_change(folder: Path) -> Any:
        record = real(folder)
        monkeypatch.setattr(rewrite, "read_record", real)
        patch_in_place(base)
        return record

    monkeypatch.setattr(rewrite, "read_record", read_and_change)
    stack_patches(base, [PATCH], tmp_path / "copy")
    # Else the copy would hold the values of a patch that its record does not know.
    assert len(carried(tmp_path / "copy")) == 2
    revert_patches(tmp_path / "copy", [], None)
    assert read_weights(tmp_path / "copy") == TENSORS


@pytest.mark.parametrize(
    "operation",
    [
        read_status,
        lambda base: compare_checkpoints(base, base),
        lambda base: stack_patches(base, [PATCH], base.with_name("copy")),
    ],
    ids=["status", "diff", "copy"],
)
def test_a_base_that_never_comes_to_rest_is_refused(
    operation: Callable[[Path], object], tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    def touch(checkpoint: Path) -> Any:
        (base / f"new{len(list(base.iterdir()))}").touch()
        return read_checkpoint(checkpoint)

    for module in ("rewrite", "status", "compare"):
        monkeypatch.setattr(f"locft.patch.{module}.read_checkpoint", touch)
    monkeypatch.setattr("time.sleep", pauses.append)
    with pytest.raises(InputError, match="base: is being changed by another process; try again when"):
        operation(base)
    assert sum(pauses) == pytest.approx(5)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_a_copy_does_not_hold_may_change_while_it_is_made(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "locft.patch.rewrite.progress", Bar(lambda: (base / "notes.py").write_text("mine"))
    )
    stack_patches(base, [PATCH], tmp_path / "copy")
    assert read_weights(tmp_path / "copy") == PATCHED


def test_a_fault_of_the_disk_is_told_as_such(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr("locft.patch.rewrite.progress", Bar(fail))
    with pytest.raises(OSError, match="the disk is broken"):
        stack_patches(base, [PATCH], tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_copy_needs_the_old_values_that_its_record_speaks_of(tmp_path: Path, base: Path) -> None:
    stack_patches(base, [PATCH], None)
    undo = base / ".locft" / f"{id_of(PATCH)}.safetensors"
    undo.unlink()
    with pytest.raises(
        PatchError, match=f"{undo}: is missing; without these old values patch .* cannot"
    ):
        stack_patches(base, [patch_of(PATCHED, (UP_0,), 2)[0]], tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# Recovery


TEMPORARY = ".locft-01234567-"


def journal_of(layout: Layout, before: Tensors, patch: Patch, below: tuple[Patch, ...] = ()) -> bytes:
    """Write `next.json` as `docs/patch-format.md` has it."""
    files = sorted({layout.file_of(name) for name in patch.tensors})
    index = layout.files(before)[INDEX].decode() if len(files) > 1 else None
    record = {
        "format_version": 1,
        "patches": [manifest_record(one) for one in (*below, patch)],
    }
    body = {
        "record": json.loads(signed(record, "record_sha256")),
        "hashes": {
            name: [tensor.old_sha256, tensor.new_sha256] for name, tensor in patch.tensors.items()
        },
        "files": {file: TEMPORARY + file for file in files},
        "index": index,
    }
    return signed(body, "next_sha256")


def interrupted(folder: Path, layout: Layout, names: tuple[str, ...], stage: str) -> None:
    """Put a fresh checkpoint into a state in which a killed writer of PATCH may leave it."""
    before = layout.tensors()
    patch, after = patch_of(before, names, 1)
    files = sorted({layout.file_of(name) for name in names})
    old, new = layout.files(before), layout.files(after)
    store = folder / ".locft"
    store.mkdir()
    undo = pack({name: before[name] for name in names})
    if stage == "old values half":
        (store / f"{TEMPORARY}{id_of(patch)}.safetensors").write_bytes(undo[:50])
        return
    (store / f"{id_of(patch)}.safetensors").write_bytes(undo)
    if stage == "new file half":
        (folder / (TEMPORARY + files[0])).write_bytes(new[files[0]][:100])
        return
    for file in files:
        (folder / (TEMPORARY + file)).write_bytes(new[file])
    if stage == "no journal":
        (store / f"{TEMPORARY}next.json").write_bytes(b"{")
        return
    (store / "next.json").write_bytes(journal_of(layout, before, patch))
    if stage == "journal":
        return
    if len(files) == 1:
        (folder / (TEMPORARY + files[0])).replace(folder / files[0])
    else:
        index = json.loads(old[INDEX])
        if stage != "index half":
            for name, file in index["weight_map"].items():
                index["weight_map"][name] = TEMPORARY + file if file in files else file
            (folder / INDEX).write_text(json.dumps(index))
        else:
            (folder / f"{TEMPORARY}{INDEX}").write_bytes(b"{")
            return
    done = {"switched": 0, "one shard linked": 1, "one shard": 1, "all shards": len(files)}
    for file in files[: done.get(stage, len(files))] if len(files) > 1 else ():
        if stage == "one shard linked":
            os.link(folder / (TEMPORARY + file), folder / f".locft-89abcdef-{file}")
        else:
            (folder / file).unlink()
            os.link(folder / (TEMPORARY + file), folder / file)
    if stage in done:
        return
    if len(files) > 1:
        (folder / INDEX).write_bytes(old[INDEX])
    if stage == "index":
        return
    record = json.loads((store / "next.json").read_bytes())["record"]
    (store / "record.json").write_bytes(signed(record, "record_sha256"))
    if stage == "record":
        return
    (store / "next.json").unlink()


OLD_STAGES = ("old values half", "new file half", "no journal", "journal")

STAGES = [
    (layout, names, stage, is_new)
    for layout, names, old, new in (
        (SINGLE, (DOWN_0, DOWN_1), OLD_STAGES, ("switched", "index", "record", "all")),
        (SHARDED, (DOWN_0, UP_0), OLD_STAGES, ("switched", "index", "record", "all")),
        (
            SHARDED,
            (DOWN_0, DOWN_1),
            (*OLD_STAGES, "index half"),
            ("switched", "one shard linked", "one shard", "all shards", "index", "record", "all"),
        ),
    )
    for stages, is_new in ((old, False), (new, True))
    for stage in stages
]

every_stage = pytest.mark.parametrize(
    ("layout", "names", "stage", "is_new"),
    STAGES,
    ids=[
        f"{layout.name}, {len(names)} in {names[-1][13:16]}, {stage}"
        for layout, names, stage, _ in STAGES
    ],
)


@every_stage
def test_an_interrupted_change_has_happened_or_has_not_for_all_who_read(
    layout: Layout, names: tuple[str, ...], stage: str, is_new: bool, tmp_path: Path
) -> None:
    folder = layout.make(tmp_path / "base")
    patch, after = patch_of(layout.tensors(), names, 1)
    interrupted(folder, layout, names, stage)
    before = tree(folder)
    status = read_status(folder)
    assert read_weights(folder) == (after if is_new else layout.tensors())
    assert [one.id for one in status.patches] == ([id_of(patch)] if is_new else [])
    assert all(one.obstacle is None for one in status.patches)
    assert status.is_intact
    if (layout, stage) != (SINGLE, "all") and (len(names), stage) != (2, "all"):
        assert status.leftovers
    assert tree(folder) == before


@every_stage
def test_the_next_writer_finishes_or_forgets_an_interrupted_change(
    layout: Layout, names: tuple[str, ...], stage: str, is_new: bool, tmp_path: Path
) -> None:
    folder = layout.make(tmp_path / "base")
    patch, after = patch_of(layout.tensors(), names, 1)
    interrupted(folder, layout, names, stage)
    with opened_in_place(folder):
        pass
    clean = layout.make(tmp_path / "clean")
    assert read_status(folder).leftovers == ()
    if not is_new:
        assert tree(folder) == tree(clean)
        return
    assert plain(folder) == layout.files(after)
    assert {path.name for path in (folder / ".locft").iterdir()} == {
        "record.json",
        f"{id_of(patch)}.safetensors",
    }
    revert_patches(folder, [], None)
    assert tree(folder) == tree(clean)


@every_stage
def test_from_an_interrupted_change_everything_goes_on(
    layout: Layout, names: tuple[str, ...], stage: str, is_new: bool, tmp_path: Path
) -> None:
    now = patch_of(layout.tensors(), names, 1)[1] if is_new else layout.tensors()
    more, after = patch_of(now, (UP_1, DOWN_0), 2)
    for name, output in (("in place", None), ("copied", tmp_path / "copy")):
        folder = layout.make(tmp_path / name)
        interrupted(folder, layout, names, stage)
        stack_patches(folder, [more], output)
        result = output or folder
        assert plain(result) == layout.files(after)
        assert read_status(result).leftovers == ()
        assert len(read_status(result).patches) == 1 + is_new
        revert_patches(result, [], None)
        assert tree(result) == layout.files(layout.tensors())
    assert not (tmp_path / "copied" / ".locft" / "next.json").exists()


@every_stage
def test_an_interrupted_change_can_be_reverted_if_it_has_happened(
    layout: Layout, names: tuple[str, ...], stage: str, is_new: bool, tmp_path: Path
) -> None:
    folder = layout.make(tmp_path / "base")
    interrupted(folder, layout, names, stage)
    if not is_new:
        with pytest.raises(PatchError, match="carries no patches"):
            revert_patches(folder, [], None)
    else:
        revert_patches(folder, [], None)
        assert tree(folder) == layout.files(layout.tensors())


def damage_tensor(folder: Path, names: tuple[str, ...]) -> None:
    """Flip the last bit of the first tensor where a loader finds it."""
    for file in folder.glob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        if names[0] in header:
            raw[start + header[names[0]]["data_offsets"][1] - 1] ^= 1
            file.unlink()
            file.write_bytes(raw)


@pytest.mark.parametrize("stage", ["journal", "switched", "one shard", "index", "record"])
@pytest.mark.parametrize(
    ("layout", "names"), [(SINGLE, (DOWN_0,)), (SHARDED, (DOWN_0, DOWN_1))], ids=["single", "sharded"]
)
def test_what_is_neither_old_nor_new_is_touched_by_nobody_until_it_is_put_back(
    layout: Layout, names: tuple[str, ...], stage: str, tmp_path: Path
) -> None:
    folder = layout.make(tmp_path / "base")
    interrupted(folder, layout, names, stage)
    shutil.copytree(folder, tmp_path / "backup")
    for file in [path for path in folder.glob("*.safetensors") if path.name.startswith(".locft")]:
        file.chmod(0o600)
    damage_tensor(folder, names)
    before = tree(folder)
    patch, after = patch_of(layout.tensors(), names, 1)
    more, _ = patch_of(layout.tensors(), (UP_1,), 2)
    operations: list[Callable[[], object]] = [
        lambda: stack_patches(folder, [more], None),
        lambda: stack_patches(folder, [more], tmp_path / "copy"),
        lambda: revert_patches(folder, [], None),
        lambda: revert_patches(folder, [id_of(patch)], tmp_path / "copy"),
        lambda: read_status(folder),
    ]
    for operation in operations:
        with pytest.raises(PatchError) as caught:
            operation()
        assert str(caught.value) == (
            f"{folder}: a change of it was interrupted, and something else changed its tensors since"
            f" ({names[0]!r}, for one): put the files back as they were, or copy the model afresh"
        )
        assert tree(folder) == before
    shutil.rmtree(folder)
    (tmp_path / "backup").rename(folder)
    stack_patches(folder, [more], None)
    is_new = stage != "journal"
    expected = (after if is_new else layout.tensors()) | {UP_1: read_weights(folder)[UP_1]}
    assert read_weights(folder) == expected
    revert_patches(folder, [], None)
    assert plain(folder) == layout.files(layout.tensors())


def test_a_tensor_that_is_gone_is_neither_old_nor_new(base: Path) -> None:
    interrupted(base, SHARDED, (DOWN_0, DOWN_1), "index")
    kept = {UP_1: TENSORS[UP_1]}
    (base / SHARDED.file_of(DOWN_1)).write_bytes(pack(kept))
    index = json.loads((base / INDEX).read_bytes())
    del index["weight_map"][DOWN_1]
    (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(PatchError, match=f"something else changed its tensors since .'{DOWN_1}'"):
        read_status(base)


def test_shards_that_the_index_names_stay_even_if_nothing_is_known_of_them(base: Path) -> None:
    interrupted(base, SHARDED, (DOWN_0, DOWN_1), "switched")
    shutil.rmtree(base / ".locft")
    assert read_weights(base) == PATCHED
    assert read_status(base).leftovers == ()
    more, after = patch_of(PATCHED, (DOWN_0, UP_1), 2)
    stack_patches(base, [more], None)
    assert read_weights(base) == after
    revert_patches(base, [], None)
    assert read_weights(base) == PATCHED


# A damaged journal


def flip(raw: bytes, bit: int) -> bytes:
    damaged = bytearray(raw)
    damaged[bit // 8 % len(raw)] ^= 1 << bit % 8
    return bytes(damaged)


def test_every_flipped_bit_of_a_journal_is_noticed_and_nothing_is_done(base: Path) -> None:
    interrupted(base, SHARDED, (DOWN_0, DOWN_1), "switched")
    file = base / ".locft" / "next.json"
    raw = file.read_bytes()
    for i in range(0, 8 * len(raw), 41):  # every bit of a byte in turn, all over the file
        file.write_bytes(flip(raw, i))
        before = tree(base)
        for operation in (read_status, lambda folder: revert_patches(folder, [], None)):
            with pytest.raises(PatchError, match=f"^{file}: "):
                operation(base)
        assert tree(base) == before
    file.write_bytes(raw[:-1])
    with pytest.raises(PatchError, match=r"next\.json: is damaged: it was changed by hand"):
        read_record(base)
    file.write_bytes(raw)
    revert_patches(base, [], None)
    assert tree(base) == SHARDED.files(TENSORS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda body: body.update(more=1), "is damaged: it was changed by hand, or has unknown fields"),
        (lambda body: body.pop("record"), "is damaged: 'record'"),
        (lambda body: body.pop("index"), "is damaged: 'index'"),
        (lambda body: body.update(record=[]), "is damaged"),
        (lambda body: body.update(hashes=[]), "is damaged"),
        (lambda body: body.update(hashes={DOWN_0: ["a"]}), "is damaged"),
        (lambda body: body.update(hashes={DOWN_0: "ab"}), "is damaged"),
        (lambda body: body.update(files=5), "is damaged"),
        (lambda body: body.update(files={"a": 5}), "it names a file that locft does not write: 'a'"),
        (
            lambda body: body.update(files={"model.safetensors": 5}),
            "is damaged: expected string or bytes-like object",
        ),
        (
            lambda body: body.update(
                files={"model.safetensors": "../.locft-01234567-model.safetensors"}
            ),
            "it names a file that locft does not write: 'model.safetensors'",
        ),
        (
            lambda body: body.update(files={"../model.safetensors": f"{TEMPORARY}../model.safetensors"}),
            "it names a file that locft does not write: '../model.safetensors'",
        ),
        (
            lambda body: body.update(files={"a\n.safetensors": f"{TEMPORARY}a\n.safetensors"}),
            "it names a file that locft does not write: 'a\\n.safetensors'",
        ),
        (
            lambda body: body.update(files={"config.json": f"{TEMPORARY}config.json"}),
            "it names a file that locft does not write: 'config.json'",
        ),
        (
            lambda body: body.update(files={"a.safetensors": "config.json"}),
            "it names a file that locft does not write: 'a.safetensors'",
        ),
        (lambda body: body.update(index=5), "is damaged"),
        (lambda body: body.update(index="{"), "is damaged"),
        (lambda body: body.update(index="{}"), "is damaged: 'weight_map'"),
        (lambda body: body.update(index='{"weight_map": {"a": []}}'), "is damaged: unhashable"),
        (
            lambda body: body["record"].update(format_version=2),
            "record: format_version is 2, this locft reads 1: a newer locft",
        ),
        (lambda body: body["record"].update(patches={}), "record: patches: expected a list"),
    ],
)
def test_a_journal_that_locft_did_not_write_is_refused(
    change: Callable[[dict[str, Any]], None], said: str, base: Path
) -> None:
    interrupted(base, SHARDED, (DOWN_0, DOWN_1), "switched")
    file = base / ".locft" / "next.json"
    body = json.loads(file.read_bytes())
    change(body)
    file.write_bytes(signed(body, "next_sha256"))
    before = tree(base)
    for operation in (
        read_status,
        lambda folder: revert_patches(folder, [], None),
        lambda folder: revert_patches(folder, [], folder.with_name("copy")),
    ):
        with pytest.raises(PatchError) as caught:
            operation(base)
        assert str(caught.value).startswith(f"{file}: ")
        assert said in str(caught.value)
    assert tree(base) == before


def test_a_journal_that_is_a_link_a_folder_or_endless_is_refused(tmp_path: Path, base: Path) -> None:
    interrupted(base, SHARDED, (DOWN_0, DOWN_1), "switched")
    file = base / ".locft" / "next.json"
    file.rename(tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(PatchError, match=r"next\.json: is a link"):
        revert_patches(base, [], None)
    file.unlink()
    file.mkdir()
    with pytest.raises(PatchError, match=r"next\.json: cannot be read: Is a directory"):
        revert_patches(base, [], None)
    file.rmdir()
    os.mkfifo(file)
    with pytest.raises(PatchError, match=r"next\.json: cannot be read: .* expected a regular file"):
        revert_patches(base, [], None)
    file.unlink()
    with file.open("wb") as endless:
        endless.truncate(2 * 10**9)
    with pytest.raises(PatchError, match=r"next\.json: is damaged: 2,000,000,000 bytes long"):
        revert_patches(base, [], None)


def test_leftovers_are_found_without_a_record_folder(base: Path) -> None:
    (base / ".locft-01234567-model.safetensors").write_bytes(b"half")
    (base / ".locft-01234567-folder").mkdir()
    assert read_status(base).leftovers == (".locft-01234567-model.safetensors",)
    stack_patches(base, [PATCH], None)
    assert read_status(base).leftovers == ()
    assert (base / ".locft-01234567-folder").is_dir()


def test_what_lies_in_the_record_folder_and_is_not_of_locft_stays(base: Path) -> None:
    stack_patches(base, [PATCH], None)
    for name in ("notes", "a.safetensors", f"{'a' * 64}.bin"):
        (base / ".locft" / name).write_text("mine")
    (base / ".locft" / "folder").mkdir()
    mine = sorted({path.name for path in (base / ".locft").iterdir()} - {"record.json"})
    assert read_status(base).leftovers == ()
    revert_patches(base, [], None)
    mine.remove(f"{id_of(PATCH)}.safetensors")
    assert sorted(path.name for path in (base / ".locft").iterdir()) == mine
    assert read_status(base).patches == ()


def test_old_values_of_a_patch_that_is_not_there_are_a_leftover(base: Path) -> None:
    stack_patches(base, [PATCH], None)
    (base / ".locft" / f"{'a' * 64}.safetensors").touch()
    (base / ".locft" / f"{'b' * 64}.safetensors").symlink_to("record.json")
    assert read_status(base).leftovers == tuple(f".locft/{c * 64}.safetensors" for c in "ab")
    stack_patches(base, [patch_of(PATCHED, (UP_0,), 2)[0]], None)
    assert read_status(base).leftovers == ()
    assert len(carried(base)) == 2


def test_a_lock_that_somebody_holds_keeps_a_copy_from_recovering(tmp_path: Path, base: Path) -> None:
    interrupted(base, SHARDED, (DOWN_0, DOWN_1), "switched")
    before = tree(base)
    with locked(base / ".locft"):
        errors: list[LocftError] = []

        def copy() -> None:
            with pytest.raises(InputError) as caught:
                revert_patches(base, [], tmp_path / "copy")
            errors.append(caught.value)

        thread = threading.Thread(target=copy)
        thread.start()
        thread.join()
    assert "is being written by another locft" in str(errors[0])
    assert tree(base) == before
