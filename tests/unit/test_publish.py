import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from locft import publish
from locft.errors import InputError
from locft.publish import (
    add_files,
    is_temporary,
    keep_mode,
    locked,
    reserved,
    staged_folder,
    temporary_files,
    temporary_path,
    write_file,
)

LEFT = ".locft-0123abcd-"


def test_folder_appears_only_when_the_body_is_done(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged_folder(target) as staging:
        (staging / "file").write_text("content")
        assert not target.exists()
        assert staging.parent == tmp_path
        assert staging.name.startswith(".locft-")
    assert (target / "file").read_text() == "content"
    assert list(tmp_path.iterdir()) == [target]


def test_missing_parents_are_created_and_kept_on_failure(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "a" / "b" / "out"):
        raise ZeroDivisionError
    assert (tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_folder_has_the_mode_of_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with staged_folder(tmp_path / "out"):
        pass
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "out")}
    assert len(modes) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_nothing_is_left_behind_when_the_body_is_stopped(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def build() -> None:
        with staged_folder(tmp_path / "out") as staging:
            (staging / "deep").mkdir()
            (staging / "deep" / "file").touch()
            raise error

    with pytest.raises(error):
        build()
    assert list(tmp_path.iterdir()) == []


def test_empty_target_is_filled(tmp_path: Path) -> None:
    with staged_folder(tmp_path) as staging:
        (staging / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_target_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("link", "dangling"):
        with pytest.raises(InputError, match="is a link"), staged_folder(tmp_path / name):
            pytest.fail("the body ran")
    assert list((tmp_path / "real").iterdir()) == []


def test_parents_may_be_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with staged_folder(tmp_path / "link" / "out"):
        pass
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["out"]


def test_relative_target_survives_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with staged_folder(Path("out")):
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert (tmp_path / "out").is_dir()


def test_target_that_is_not_empty_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with (
        pytest.raises(InputError, match="not empty; name another"),
        staged_folder(tmp_path / "out"),
    ):
        pytest.fail("the body ran")
    assert (tmp_path / "out" / "mine").exists()


def test_target_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match="not a folder"), staged_folder(tmp_path / "out"):
        pytest.fail("the body ran")


def test_target_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="cannot be created"),
        staged_folder(tmp_path / "file" / "out"),
    ):
        pytest.fail("the body ran")


@pytest.mark.parametrize("taken_by", ["file", "folder"])
def test_target_taken_meanwhile_is_refused_and_kept(tmp_path: Path, taken_by: str) -> None:
    target = tmp_path / "out"
    theirs = target if taken_by == "file" else target / "file"

    def build() -> None:
        with staged_folder(target):
            theirs.parent.mkdir(exist_ok=True)
            theirs.write_text("theirs")

    with pytest.raises(InputError):
        build()
    assert list(tmp_path.iterdir()) == [target]
    assert theirs.read_text() == "theirs"


def test_failing_rename_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("no")

    monkeypatch.setattr("os.rename", fail)
    with pytest.raises(OSError, match="no"), staged_folder(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_thread(act: Callable[[], object]) -> None:
    """Do something in another thread, and wait for it; what it raises is raised."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in errors:
        raise error


def enter(context: Callable[[Path], AbstractContextManager[object]], path: Path) -> None:
    with context(path):
        pass


# What killed writers leave


def leave_behind(parent: Path, name: str) -> None:
    """Leave what a killed writer of a folder leaves."""
    (parent / f"{LEFT}{name}").mkdir()
    (parent / f"{LEFT}{name}" / "half").touch()
    (parent / f".locft-lock-{name}").touch()


@pytest.mark.parametrize("context", [staged_folder, reserved])
def test_what_killed_writers_left_is_removed_by_the_next_one(
    context: Callable[[Path], AbstractContextManager[object]], tmp_path: Path
) -> None:
    for name in ("out", "other", "odd\nname"):
        leave_behind(tmp_path, name)
    (tmp_path / ".locft-lock-alone").touch()
    with context(tmp_path / "out"):
        left = [name for name in names_in(tmp_path) if name.startswith((LEFT, ".locft-lock-"))]
        assert left == [".locft-lock-out"]
    assert [name for name in names_in(tmp_path) if name != "out"] == []


def test_what_is_not_left_by_a_writer_of_folders_stays(tmp_path: Path) -> None:
    (tmp_path / f"{LEFT}file").touch()  # of somebody who writes files here, and holds another lock
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"{LEFT}link").symlink_to("elsewhere")
    (tmp_path / ".locft-lock-folder").mkdir()
    for name in (".locft-0123ABCD-a", ".locft-0123abc-a", ".locft-0123abcd", "x.locft-0123abcd-a"):
        (tmp_path / name).mkdir()
    before = names_in(tmp_path)
    enter(staged_folder, tmp_path / "out")
    assert names_in(tmp_path) == sorted([*before, "out"])


def test_what_a_live_writer_builds_stays(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "one") as staging:
        (staging / "file").touch()
        in_thread(lambda: enter(staged_folder, tmp_path / "two"))
        assert (staging / "file").exists()
        assert (tmp_path / ".locft-lock-one").exists()
    assert names_in(tmp_path) == ["one", "two"]


def test_what_a_writer_in_another_process_builds_stays(tmp_path: Path) -> None:
    leave_behind(tmp_path, "theirs")
    leave_behind(tmp_path, "left")
    with (tmp_path / ".locft-lock-theirs").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        enter(staged_folder, tmp_path / "out")
        assert names_in(tmp_path) == [f"{LEFT}theirs", ".locft-lock-theirs", "out"]
    enter(reserved, tmp_path / "more")
    assert names_in(tmp_path) == ["out"]


def test_a_nested_writer_of_the_same_target_removes_what_was_left_but_not_what_is_built(
    tmp_path: Path,
) -> None:
    with reserved(tmp_path / "out"), staged_folder(tmp_path / "out") as staging:
        leave_behind(tmp_path, "other")
        (tmp_path / f"{LEFT}out").mkdir()
        with reserved(tmp_path / "out"):
            assert names_in(tmp_path) == sorted([".locft-lock-out", staging.name])
    assert names_in(tmp_path) == ["out"]


def test_names_that_lead_out_of_the_folder_are_harmless(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / ".locft-lock-..").touch()
    (parent / ".locft-lock-").touch()
    (parent / f"{LEFT}..").mkdir()
    (parent / f"{LEFT}.").mkdir()
    enter(staged_folder, parent / "out")
    assert names_in(tmp_path) == ["parent"]


def test_a_name_is_temporary_for_the_one_that_it_was_made_of_alone(tmp_path: Path) -> None:
    made = temporary_path(tmp_path / "file")
    assert made.parent == tmp_path
    assert is_temporary(made.name, "file")
    assert not is_temporary(made.name, "other")
    assert not is_temporary("file", "file")
    assert temporary_path(tmp_path / "file") != made


def test_temporary_files_are_told_from_all_others(tmp_path: Path) -> None:
    for name in (f"{LEFT}a", ".locft-lock-a", "a", ".locft"):
        (tmp_path / name).touch()
    (tmp_path / f"{LEFT}b").symlink_to("nowhere")
    (tmp_path / f"{LEFT}c").mkdir()
    assert sorted(path.name for path in temporary_files(tmp_path)) == [f"{LEFT}a", f"{LEFT}b"]


# Locks


def test_a_reserved_folder_is_kept_free(tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"
    with reserved(target):
        assert not target.exists()
        for context in (reserved, staged_folder):
            with pytest.raises(InputError, match="out: is being written by another locft"):
                in_thread(lambda context=context: enter(context, target))  # type: ignore[misc]
        with staged_folder(target):
            pass
    assert names_in(target.parent) == ["out"]


@pytest.mark.parametrize("context", [reserved, staged_folder])
def test_a_folder_that_is_filled_while_its_lock_is_awaited_is_refused(
    context: Callable[[Path], AbstractContextManager[object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = fcntl.flock

    def lock(descriptor: int, operation: int) -> None:
        real(descriptor, operation)
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").touch()

    monkeypatch.setattr("fcntl.flock", lock)
    with pytest.raises(InputError, match="out: exists and is not empty"):
        enter(context, tmp_path / "out")
    assert names_in(tmp_path) == ["out"]


def test_a_refused_writer_is_told_who_holds_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/locft", "apply", "my model", "p" * 300])
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    with locked(tmp_path / "model"):
        with pytest.raises(InputError) as caught:
            in_thread(lambda: enter(locked, tmp_path / "model"))
        in_thread(lambda: enter(locked, tmp_path / "other"))
    command = f"locft apply 'my model' {'p' * 300}"[:200]
    assert str(caught.value) == (
        f"{tmp_path}/model: is being written by another locft (process {os.getpid()} on here:"
        f" {command}); wait for it, or stop it"
    )
    assert names_in(tmp_path) == []


def test_a_holder_that_has_not_said_yet_who_it_is_has_just_started(tmp_path: Path) -> None:
    with (tmp_path / ".locft-lock-model").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"another locft \(it just started\); wait for it"):
            enter(locked, tmp_path / "model")
    enter(locked, tmp_path / "model")
    assert names_in(tmp_path) == []


def test_a_lock_is_one_and_the_same_by_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    with locked(tmp_path / "real" / "model"):
        for path in (Path("model"), tmp_path / "link" / "model", Path("../link/model")):
            with pytest.raises(InputError, match="is being written by another locft"):
                in_thread(lambda path=path: enter(locked, path))  # type: ignore[misc]
            enter(locked, path)  # within a thread they nest


def test_locks_nest_within_a_thread_and_are_freed_by_the_outer_one(tmp_path: Path) -> None:
    with locked(tmp_path / "model"):
        enter(locked, tmp_path / "model")
        with pytest.raises(InputError, match="is being written"):
            in_thread(lambda: enter(locked, tmp_path / "model"))
    in_thread(lambda: enter(locked, tmp_path / "model"))


def test_a_lock_is_freed_when_its_body_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "model"):
        raise ZeroDivisionError
    in_thread(lambda: enter(locked, tmp_path / "model"))


def test_a_lock_that_was_removed_by_its_holder_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / ".locft-lock-model"
    real = fcntl.flock
    done: list[int] = []

    def remove_and_lock(descriptor: int, operation: int) -> None:
        real(descriptor, operation)
        if len(done) == 0:
            lock.unlink()
        elif len(done) == 1:
            lock.unlink()
            lock.touch()
        done.append(descriptor)

    monkeypatch.setattr("fcntl.flock", remove_and_lock)
    with locked(tmp_path / "model"):
        assert len(done) == 3
        with pytest.raises(InputError, match="is being written"):
            in_thread(lambda: enter(locked, tmp_path / "model"))


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_to_all_the_same(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    with staged_folder(tmp_path / "out") as staging:
        (staging / "file").touch()
    assert names_in(tmp_path) == ["out"]


def test_a_lock_that_fails_for_another_reason_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    num_open = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(OSError, match="the disk is broken"):
        enter(locked, tmp_path / "model")
    assert len(os.listdir("/proc/self/fd")) == num_open  # noqa: PTH208


@pytest.mark.parametrize("stuck", [False, True], ids=["", "and the file cannot be removed"])
def test_a_lock_on_which_its_holder_cannot_be_written_is_given_back(
    stuck: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched:
        patched.setattr("os.pwrite", fail)
        if stuck:
            patched.setattr("os.unlink", fail)
        with pytest.raises(OSError, match="full"):
            enter(locked, tmp_path / "model")
    assert names_in(tmp_path) == ([".locft-lock-model"] if stuck else [])
    enter(locked, tmp_path / "model")
    assert names_in(tmp_path) == []


def test_a_lock_is_no_way_to_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".locft-lock-model").symlink_to("precious")
    with pytest.raises(InputError, match="model: cannot be written to: "):
        enter(locked, tmp_path / "model")
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, *_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr("os.open", refuse)
        with pytest.raises(InputError, match="model: cannot be written to: Permission denied"):
            enter(locked, tmp_path / "model")
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda *_: False)
        with pytest.raises(InputError, match=f"cannot be created: {tmp_path} cannot be written to"):
            enter(staged_folder, tmp_path / "out")


@pytest.mark.parametrize("where", ["parent", "staging"])
def test_a_folder_that_cannot_be_made_is_told(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.mkdir

    def refuse(path: Path, *words: Any, **more: Any) -> None:
        if (where == "parent") != Path(path).name.startswith(".locft-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *words, **more)

    monkeypatch.setattr("os.mkdir", refuse)
    target = tmp_path / "a" / "out" if where == "parent" else tmp_path / "out"
    with pytest.raises(InputError) as caught:
        enter(staged_folder, target)
    assert str(caught.value) == f"{target}: the folder cannot be created: No space left on device"
    assert names_in(tmp_path) == []


def test_a_target_that_is_the_folder_itself_by_another_name_is_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    enter(locked, Path())
    enter(locked, Path(".."))
    (tmp_path / "a" / "b").mkdir()
    with staged_folder(Path("../a/b/..") / "c") as staging:
        (staging / "file").touch()
    assert names_in(tmp_path / "a") == ["b", "c"]


@pytest.mark.parametrize("name", ["", "..", "../../{parent}"])
def test_the_working_directory_and_what_holds_it_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    target = Path(name.format(parent=tmp_path.name))
    if not name:
        with pytest.raises(InputError, match="is the working directory"), staged_folder(target):
            pytest.fail("the body ran")
    else:
        with pytest.raises(InputError), staged_folder(target):
            pytest.fail("the body ran")
    assert names_in(tmp_path) == ["a"]


def test_a_mount_point_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == (tmp_path / "out").resolve())
    with pytest.raises(InputError, match="is a mount point"), staged_folder(tmp_path / "out"):
        pytest.fail("the body ran")
    assert names_in(tmp_path) == ["out"]


def test_without_locks_nobody_sweeps_what_another_writer_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr("fcntl.flock", fail)
    theirs = tmp_path / ".locft-0123abcd-theirs"
    theirs.mkdir()
    with staged_folder(tmp_path / "out"):
        pass
    assert names_in(tmp_path) == [".locft-0123abcd-theirs", "out"]


def test_a_folder_that_cannot_be_listed_is_not_taken_for_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def fail(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise OSError(errno.EIO, "the disk is broken")
        return real(path)

    def build() -> None:
        with staged_folder(tmp_path / "out") as staging:
            (staging / "deep").mkdir()
            monkeypatch.setattr("os.scandir", fail)

    with pytest.raises(OSError, match="the disk is broken"):
        build()
    assert not (tmp_path / "out").exists()


def test_a_folder_that_its_disk_may_not_keep_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = publish.sync_folder

    def fail(folder: Path) -> None:
        if folder == tmp_path:
            raise OSError(errno.EIO, "the disk is broken")
        real(folder)

    monkeypatch.setattr(publish, "sync_folder", fail)
    with pytest.raises(InputError) as caught, staged_folder(tmp_path / "out") as staging:
        (staging / "file").touch()
    assert str(caught.value).startswith(f"{tmp_path}/out: is whole, but its disk did not confirm")
    assert names_in(tmp_path / "out") == ["file"]


# Files


def test_files_are_added_to_a_folder_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = publish.sync_folder

    def look(folder: Path) -> None:
        real(folder)
        if folder == tmp_path / "run":
            seen.append(names_in(folder))

    monkeypatch.setattr(publish, "sync_folder", look)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "b").write_text("old")
    add_files(tmp_path / "run", {"c": b"3", "b": b"2", "a": b"1"})
    assert seen == [["b", "c"], ["b", "c"], ["a", "b", "c"]]
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == {
        "a": b"1",
        "b": b"2",
        "c": b"3",
    }
    assert names_in(tmp_path) == ["run"]


@pytest.mark.parametrize("call", ["os.replace", "os.mkdir", "os.fsync"])
def test_files_that_cannot_be_added_leave_nothing_behind(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(call, fail)
        with pytest.raises(OSError, match="the disk is broken"):
            add_files(tmp_path / "run", {"a": b"1", "b": b"2"})
    assert names_in(tmp_path) == ["run"]
    assert names_in(tmp_path / "run") == []
    add_files(tmp_path / "run", {})
    assert names_in(tmp_path) == ["run"]


def test_what_a_killed_writer_of_files_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    leave_behind(tmp_path, "run")
    enter(staged_folder, tmp_path / "other")
    assert names_in(tmp_path) == ["other", "run"]


def test_a_file_is_written_or_replaced_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"old")
    with (tmp_path / "file").open("rb") as before:
        write_file(tmp_path / "file", b"new")
        assert before.read() == b"old"
    assert (tmp_path / "file").read_bytes() == b"new"
    assert names_in(tmp_path) == ["file"]


def test_a_replaced_file_keeps_its_mode_and_a_new_one_has_that_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_file(tmp_path / "new", b"")
    assert mode_of(tmp_path / "new") == mode_of(tmp_path / "plain")
    (tmp_path / "new").chmod(0o640)
    write_file(tmp_path / "new", b"more")
    assert mode_of(tmp_path / "new") == 0o640
    (tmp_path / "link").symlink_to("new")
    write_file(tmp_path / "link", b"mine")
    assert not (tmp_path / "link").is_symlink()
    assert mode_of(tmp_path / "link") == mode_of(tmp_path / "plain")
    assert (tmp_path / "new").read_bytes() == b"more"


def test_a_file_system_without_modes_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "no modes here")

    (tmp_path / "old").touch()
    (tmp_path / "new").touch()
    monkeypatch.setattr("os.chmod", refuse)
    keep_mode(tmp_path / "old", tmp_path / "new")
    write_file(tmp_path / "old", b"new")
    assert (tmp_path / "old").read_bytes() == b"new"


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "os.chmod"])
def test_a_file_that_cannot_be_written_leaves_the_old_one(
    call: str, fault: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(call, fail)
    with pytest.raises(type(fault)):
        write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


def test_the_error_that_counts_is_told_even_if_nothing_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    def stuck(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr("os.fsync", full)
    monkeypatch.setattr("os.unlink", stuck)
    with pytest.raises(OSError, match="full"):
        write_file(tmp_path / "file", b"new")
