"""What is published is flushed first, name and content, and has the modes that the umask gives."""

import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from faults.harness import Call, Drivers
from faults.trials import Bench
from faults.worlds import OPERATIONS, TEMPORARY, Operation, make_sharded, make_single, write_patches

every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.name)

_STRING = re.compile(r'"([^"]*)"')

_DESCRIPTOR = re.compile(r"(?:\d+|AT_FDCWD)<([^>]*)>")


@dataclass
class Disk:
    """Follows a trace, and knows what a power cut could still take.

    Before a journal is there, what has a temporary name counts only when it is moved to its place;
    from then on, the journal counts on it.

    Attributes:
        contents: Files written to since they were flushed.
        names: Names that came into being since their folder was flushed.
        gone: Names that were removed since then, and may come back.
        problems: What was published while something could still be lost.
        published: What was published, in order.
    """

    contents: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    published: list[str] = field(default_factory=list)
    _folder: str = "/"

    def follow(self, calls: Sequence[Call]) -> None:
        """Follow a whole trace of calls."""
        told = (re.match("AT_FDCWD<([^>]*)>", call.arguments) for call in calls)
        self._folder = next(found[1] for found in told if found)
        for call in calls:
            if call.result is not None and call.result >= 0:
                self._follow(call)

    def _follow(self, call: Call) -> None:
        folders = _DESCRIPTOR.findall(call.arguments)
        paths = [str(Path(self._folder, path)) for path in _STRING.findall(call.arguments)]
        if ".locft-lock-" in call.arguments:
            return
        match call.name:
            case "openat" if "O_CREAT" in call.arguments:
                self.names.add(paths[0])
                self.contents.add(paths[0])
            case "mkdir":
                self.names.add(paths[0])
            case "link" | "linkat":
                self.names.add(paths[-1])
                if paths[0] in self.contents:
                    self.contents.add(paths[-1])
            case "write" | "pwrite64":
                self.contents.add(folders[0])
            case "fsync" | "fdatasync":
                self.contents.discard(folders[0])
                for names in (self.names, self.gone):
                    names -= {path for path in names if str(Path(path).parent) == folders[0]}
            case "unlink" | "rmdir":
                if paths[0].endswith("/next.json"):
                    self._publish("the end of " + paths[0], {paths[0]})
                self._forget(paths[0])
                if not TEMPORARY.search(paths[0]):  # which any later run removes again
                    self.gone.add(paths[0])
            case "rename":
                self._rename(*paths)

    def _rename(self, source: str, target: str) -> None:
        if not TEMPORARY.search(target):  # else it is moved within what is not published yet
            self._publish(target, {source})
        moved = [path for path in self.contents | self.names if _is_within(path, source)]
        for known in (self.contents, self.names):
            for path in moved:
                if path in known:
                    known.discard(path)
                    known.add(target + path.removeprefix(source))
        self.names.add(target)

    def _publish(self, what: str, moved: set[str]) -> None:
        self.published.append(what)
        # Its old name need not be there for long.
        known = self.contents | self.names - moved | self.gone
        lost = [path for path in sorted(known) if self._counts(path, moved)]
        if lost:
            self.problems.append(f"{what} is published before {lost} are flushed")

    def _counts(self, path: str, moved: set[str]) -> bool:
        if any(what.endswith("/next.json") for what in self.published):
            return True
        if any(_is_within(path, source) for source in moved):
            return True
        return TEMPORARY.search(path) is None and not path.endswith("/.locft")

    def _forget(self, path: str) -> None:
        self.contents = {known for known in self.contents if not _is_within(known, path)}
        self.names = {known for known in self.names if not _is_within(known, path)}


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


@pytest.mark.strace
@every_operation
def test_all_is_flushed_before_it_is_published_and_its_name_after(
    benches: Callable[[Operation], Bench], operation: Operation
) -> None:
    disk = Disk()
    disk.follow(benches(operation).traced.calls)
    assert disk.published
    assert not disk.problems
    assert not disk.contents
    assert not disk.names


@pytest.mark.strace
def test_new_parents_are_flushed_too(drivers: Drivers, arena: Path) -> None:
    home = arena / "parents"
    (home / "world").mkdir(parents=True)
    write_patches(home / "patches")
    make_single(home / "world" / "base")
    disk = Disk()
    words = ["apply", "base", "../patches/one", "-o", "new/deep/out"]
    with drivers.lend() as driver:
        disk.follow(driver.trace(home / "world", words).calls)
    assert disk.published == [str(home / "world/new/deep/out")]
    assert not disk.problems
    assert not disk.names


@pytest.mark.strace
def test_manifest_and_report_come_last(benches: Callable[[Operation], Bench]) -> None:
    edit = next(operation for operation in OPERATIONS if operation.is_edit)
    disk = Disk()
    disk.follow(benches(edit).traced.calls)
    names = [Path(path).name for path in disk.published]
    scores = ["answers.jsonl", "drift.jsonl", "report.md", "report.html", "report.json"]
    assert names == ["run", *scores]
    in_place = next(operation for operation in OPERATIONS if "two shards" in operation.name)
    disk = Disk()
    disk.follow(benches(in_place).traced.calls)
    names = [re.sub("[0-9a-f]{64}", "ID", Path(path).name) for path in disk.published]
    assert names == [
        "ID.safetensors",
        "next.json",
        "model.safetensors.index.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model.safetensors.index.json",
        "record.json",
        "next.json",
    ]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_new_files_and_folders_have_the_modes_that_the_umask_gives(
    drivers: Drivers, arena: Path, umask: int
) -> None:
    home = arena / f"modes{umask:o}"
    (home / "world").mkdir(parents=True)
    write_patches(home / "patches")
    make_sharded(home / "world" / "base")
    old = {path.name: path.stat().st_mode for path in (home / "world" / "base").iterdir()}
    with drivers.lend() as driver:
        for words in (
            ("apply", "base", "../patches/one", "-o", "new/out"),
            ("save-edit", "run", "../patches/one"),
            ("apply", "base", "../patches/two", "--in-place"),
        ):
            ending = driver.run(home / "world", words, umask=umask)
            assert ending.status == 0, ending.text
    for folder in ("new", "run", "base/.locft"):
        for path in (home / "world" / folder, *(home / "world" / folder).rglob("*")):
            expected = (0o777 if path.is_dir() else 0o666) & ~umask
            assert stat.S_IMODE(path.stat().st_mode) == expected, path
    # What is replaced keeps its mode.
    for name, mode in old.items():
        assert (home / "world" / "base" / name).stat().st_mode == mode
