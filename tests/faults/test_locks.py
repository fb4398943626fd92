"""Two writers on one folder: the second is refused, and what a dead one left is no obstacle."""

import fcntl
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults.harness import Call, Drivers, Ending, Fault
from faults.worlds import copy_world, make_sharded, make_single, read_tree, write_patches
from locft.errors import InputError
from locft.publish import locked, reserved, staged_folder

NUM_ATTEMPTS = 50

APPLY = ("apply", "base", "../patches/one")

SAVE = ("save-edit", "run", "../patches/one")

# A writer that holds its lock, another that comes then, and what the message calls its target.
RIVALS = {
    "in place": (("hold", "in-place", "base"), (*APPLY, "--in-place"), "base"),
    "copy": (("hold", "copy", "out"), (*APPLY, "-o", "out"), "out"),
    "edit": (("hold", "edit", "run"), SAVE, "run"),
    "copy into an edit's place": (("hold", "edit", "run"), (*APPLY, "-o", "run"), "run"),
}

FLOCK = Call("flock", "", 0, 1)

rivals = pytest.mark.parametrize(("holder", "writer", "target"), RIVALS.values(), ids=RIVALS.keys())


@pytest.fixture
def world(arena: Path) -> Path:
    """A folder with two checkpoints, and patches beside it."""
    home = Path(tempfile.mkdtemp(prefix="locks", dir=arena))
    (home / "world").mkdir()
    write_patches(home / "patches")
    make_single(home / "world" / "base")
    make_sharded(home / "world" / "sharded")
    return home / "world"


@dataclass
class Holder:
    """A writer in the middle of its work, and later how it ended."""

    pid: int
    ending: Ending | None = None


@contextmanager
def holding(drivers: Drivers, world: Path, words: tuple[str, ...]) -> Iterator[Holder]:
    """Keep a writer in the middle of its work; let it go on afterwards."""
    with drivers.lend() as driver:
        holder = Holder(driver.start(world, words))
        assert driver.answer() == {"ready": True}
        try:
            yield holder
        finally:
            (world / "release").touch()
            holder.ending = driver.finish(holder.pid)
            (world / "release").unlink()


def is_done(holder: Holder) -> bool:
    return holder.ending is not None and holder.ending.status == 0


def run(drivers: Drivers, world: Path, words: tuple[str, ...]) -> Ending:
    with drivers.lend() as driver:
        return driver.run(world, words)


@rivals
def test_second_writer_is_refused_naming_the_holder(
    drivers: Drivers, world: Path, holder: tuple[str, ...], writer: tuple[str, ...], target: str
) -> None:
    with holding(drivers, world, holder) as held:
        before = read_tree(world)
        ending = run(drivers, world, writer)
        assert read_tree(world) == before
    assert is_done(held)
    command = " ".join(("locft", *holder))
    assert ending.status == 2
    assert ending.text == (
        f"locft: error: {world / target}: is being written by another locft"
        f" (process {held.pid} on {socket.gethostname()}: {command}); wait for it, or stop it\n"
    )


@rivals
def test_lock_dies_with_its_process_and_the_next_run_sweeps(
    drivers: Drivers, world: Path, holder: tuple[str, ...], writer: tuple[str, ...], target: str
) -> None:
    copy_world(world, world.parent / "clean")
    assert run(drivers, world.parent / "clean", writer).status == 0
    with holding(drivers, world, holder) as held:
        os.kill(held.pid, signal.SIGKILL)
    assert not is_done(held)
    assert any(".locft-lock-" in name for name in read_tree(world))
    assert run(drivers, world, writer).status == 0
    assert read_tree(world) == read_tree(world.parent / "clean")


@pytest.mark.parametrize("stale", [b"", b"process 1 on elsewhere: locft apply", b"\xff" * 1000])
def test_stale_locks_are_no_obstacle(drivers: Drivers, world: Path, stale: bytes) -> None:
    locks = [world / ".locft-lock-out", world / ".locft-lock-else", world / "base/.locft-lock-.locft"]
    for lock in locks:
        lock.write_bytes(stale)
    assert run(drivers, world, (*APPLY, "-o", "out")).status == 0
    assert run(drivers, world, (*APPLY, "--in-place")).status == 0
    assert not any(lock.exists() for lock in locks)


def test_lock_that_is_a_link_is_not_written_through(drivers: Drivers, world: Path) -> None:
    (world / "mine").write_bytes(b"mine")
    (world / ".locft-lock-out").symlink_to("mine")
    ending = run(drivers, world, (*APPLY, "-o", "out"))
    assert ending.status == 2
    assert "cannot be written to" in ending.text
    assert (world / "mine").read_bytes() == b"mine"


def test_staging_of_a_live_writer_is_never_swept(drivers: Drivers, world: Path) -> None:
    with holding(drivers, world, ("hold", "copy", "first")) as held:
        assert run(drivers, world, (*APPLY, "-o", "second")).status == 0
        assert run(drivers, world, SAVE).status == 0
        assert run(drivers, world, (*APPLY, "--in-place")).status == 0
    assert is_done(held)
    assert (world / "first" / "half").read_bytes() == b"half"
    assert not [name for name in read_tree(world) if "/" not in name and name.startswith(".locft")]


def test_locks_of_one_thread_nest(tmp_path: Path) -> None:
    with reserved(tmp_path / "out"), reserved(tmp_path / "out"):
        with staged_folder(tmp_path / "out") as staging, staged_folder(staging / "inner"):
            pass
        # The inner ones did not free it.
        assert refused_elsewhere(tmp_path / "out")
    assert not refused_elsewhere(tmp_path / "out")
    assert sorted(read_tree(tmp_path)) == ["out", "out/inner"]


def test_two_threads_exclude_each_other(tmp_path: Path) -> None:
    with locked(tmp_path / "target"):
        assert f"process {os.getpid()} " in refused_elsewhere(tmp_path / "target")
        assert not refused_elsewhere(tmp_path / "other")
    assert not refused_elsewhere(tmp_path / "target")
    assert read_tree(tmp_path) == {}


def test_lock_file_removed_while_it_was_being_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, flock = tmp_path / ".locft-lock-target", fcntl.flock
    descriptors: list[int] = []

    def flock_after_removal(descriptor: int, operation: int) -> None:
        if not descriptors:
            lock.unlink()  # as whoever held it does at its end
        descriptors.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", flock_after_removal)
    with locked(tmp_path / "target"):
        assert len(descriptors) == 2
        assert refused_elsewhere(tmp_path / "target")


def refused_elsewhere(target: Path) -> str:
    """Lock a target in another thread; return why that is refused, or nothing."""
    messages = []

    def lock() -> None:
        try:
            with locked(target):
                messages.append("")
        except InputError as error:
            messages.append(str(error))

    thread = threading.Thread(target=lock)
    thread.start()
    thread.join()
    return messages[0]


def test_staging_of_another_thread_is_never_swept(tmp_path: Path) -> None:
    def write() -> None:
        with staged_folder(tmp_path / "theirs") as staging:
            (staging / "file").touch()

    with staged_folder(tmp_path / "mine") as staging:
        (staging / "file").touch()
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert sorted(read_tree(tmp_path)) == ["mine", "mine/file", "theirs", "theirs/file"]


@pytest.mark.parametrize(
    ("words", "refusals"),
    [
        ((*APPLY, "--in-place"), ("is being written by another locft", "carries the patch already")),
        (
            ("apply", "sharded", "../patches/two", "--in-place"),
            ("is being written by another locft", "carries the patch already"),
        ),
        ((*APPLY, "-o", "out"), ("is being written by another locft", "exists and is not empty")),
    ],
    ids=["in place", "in place, two shards", "copy"],
)
def test_of_two_racing_writers_one_wins(
    drivers: Drivers,
    world: Path,
    words: tuple[str, ...],
    refusals: tuple[str, ...],
    report: Callable[[str], None],
) -> None:
    race = world.parent / "race"
    race.mkdir()
    for number in range(NUM_ATTEMPTS):
        copy_world(world, race / str(number))
    clean = world.parent / "clean"
    copy_world(world, clean)
    (race / "patches").symlink_to("../patches")
    assert run(drivers, clean, words).status == 0
    with drivers.lend() as one, drivers.lend() as two:
        start = str(time.monotonic() + 0.2)
        command = ("repeat", start, str(NUM_ATTEMPTS), *words)
        pids = [(driver, driver.start(race, command)) for driver in (one, two)]
        said = [driver.finish(pid).text.splitlines() for driver, pid in pids]
    statuses = [[line for line in lines if line.startswith("status ")] for lines in said]
    pairs = list(zip(*statuses, strict=True))
    assert len(pairs) == NUM_ATTEMPTS
    assert {tuple(sorted(pair)) for pair in pairs} == {("status 0", "status 2")}
    errors = [line for lines in said for line in lines if "error" in line]
    assert not [line for line in errors if not any(refusal in line for refusal in refusals)]
    expected = read_tree(clean)
    for number in range(NUM_ATTEMPTS):
        assert read_tree(race / str(number)) == expected
    held = sum(refusals[0] in line for line in errors)
    report(
        f"{NUM_ATTEMPTS} races of two `{' '.join(words)}`: one won each; {held} losers met the lock,"
        f" {NUM_ATTEMPTS - held} came too late"
    )


@pytest.mark.strace
@pytest.mark.parametrize("error", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_file_system_without_locks_is_written_to(drivers: Drivers, world: Path, error: str) -> None:
    clean = world.parent / "clean"
    copy_world(world, clean)
    assert run(drivers, clean, (*APPLY, "-o", "out")).status == 0
    with drivers.lend() as driver:
        ending = driver.trace(world, (*APPLY, "-o", "out"), (Fault(error, lasts=True), FLOCK))
    assert ending.is_faulty
    assert ending.status == 0, ending.text
    assert read_tree(world) == read_tree(clean)


@pytest.mark.strace
def test_lock_that_fails_for_another_reason_stops_the_writer(drivers: Drivers, world: Path) -> None:
    with drivers.lend() as driver:
        ending = driver.trace(world, (*APPLY, "-o", "out"), (Fault("EIO"), FLOCK))
    assert ending.status == 1
    assert ending.text == "locft: error: [Errno 5] Input/output error; nothing was kept\n"
