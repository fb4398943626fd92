"""Trials of one operation: run it with a fault, judge what is left, and let the next run follow."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from statistics import median

from faults.harness import Call, Driver, Drivers, Ending, Fault
from faults.worlds import (
    Operation,
    Tree,
    copy_world,
    fingerprint,
    read_run,
    read_state,
    read_tree,
    write_patches,
)

# What may fail without harm, as there is another way, or as the next run cleans up.
_FORGIVING = {"ioctl", "link", "linkat", "unlink", "unlinkat", "rmdir"}

# Of a folder that is there already.
_FRUITLESS = {"mkdir", "mkdirat"}


@dataclass(frozen=True)
class Crash:
    """What a killed run left.

    Attributes:
        call: The system call before which it was killed.
        world: A copy of what it left.
    """

    call: Call
    world: Path


class Bench:
    """An operation, its world, and what becomes of it where nothing fails."""

    def __init__(self, operation: Operation, drivers: Drivers, folder: Path) -> None:
        self.operation = operation
        self._drivers = drivers
        self._folder = folder
        self._numbers = count()
        self._followed: set[str] = set()
        self.world = folder / "world"
        self.world.mkdir(parents=True)
        write_patches(folder / "patches")
        operation.make(self.world)
        self.before = read_tree(self.world)
        self.old = None if operation.is_edit else read_state(self.world / operation.target)
        with drivers.lend() as driver, self.opened() as world:
            _succeed(driver, world, operation.words)
            self.done = read_tree(world)
            self.new = None if operation.is_edit else read_state(world / operation.target)
            _succeed(driver, world, operation.again)
            self.done_again = read_tree(world)
        assert operation.is_edit or self.old != self.new
        assert not [name for name in self.done if ".locft-" in name]
        if operation.is_in_place:
            _compare(self.done_again, self.before)  # there and back again

    @contextmanager
    def opened(self, source: Path | None = None) -> Iterator[Path]:
        """Copy a world, its own if none is named, for as long as a trial takes."""
        world = self._folder / str(next(self._numbers))
        try:
            copy_world(source or self.world, world)
            yield world
        finally:
            shutil.rmtree(world)
            world.with_name(f"{world.name}.strace").unlink(missing_ok=True)

    @cached_property
    def traced(self) -> Ending:
        """A run under strace without a fault."""
        with self._drivers.lend() as driver, self.opened() as world:
            ending = driver.trace(world, self.operation.words)
            assert ending.status == 0, ending.text
            assert read_tree(world) == self.done, "tracing changes what the command does"
        return ending

    @cached_property
    def wall_s(self) -> float:
        """How long the operation takes, if nothing stops it."""
        times = []
        with self._drivers.lend() as driver:
            for _ in range(9):
                with self.opened() as world:
                    times.append(_succeed(driver, world, self.operation.words).wall_s)
        return median(times)

    def each(self, trials: Iterable[Callable[[Driver], None]]) -> None:
        """Run trials, as many at a time as there are drivers, and fail with what they found."""

        def run(trial: Callable[[Driver], None]) -> str | None:
            with self._drivers.lend() as driver:
                try:
                    trial(driver)
                except Exception as error:
                    return str(error) or type(error).__name__
            return None

        with ThreadPoolExecutor(self._drivers.num) as pool:
            problems = [problem for problem in pool.map(run, trials) if problem is not None]
        listed = "\n".join(problems[:20])
        assert not problems, f"{self.operation.name}: {len(problems)} trials failed, e.g.\n{listed}"

    def trial(self, fault: Fault, call: Call) -> Callable[[Driver], None]:
        """Plan a run with a fault at one system call, its judgement, and the next run."""

        def run(driver: Driver) -> None:
            with self.opened() as world, telling(f"{fault} at {call}"):
                ending = driver.trace(world, self.operation.words, (fault, call))
                assert ending.is_faulty, f"the fault did not take place: {ending}"
                state = self.judge(world)
                _check_ending(fault, call, ending, state)
                if ending.status and state == "old" and not fault.lasts:
                    _compare(read_tree(world), self.before)  # it cleans up, too, as it is alive
                self.follow(driver, world, state)

        return run

    @cached_property
    def crashes(self) -> list[Crash]:
        """All that the operation may leave, killed before each of its writing calls."""
        found: dict[str, Crash] = {}

        def plan(call: Call) -> Callable[[Driver], None]:
            def run(driver: Driver) -> None:
                with self.opened() as world, telling(f"SIGKILL at {call}"):
                    driver.trace(world, self.operation.words, (Fault("SIGKILL"), call))
                    kept = world.with_name(f"{world.name}.crash")
                    if found.setdefault(fingerprint(read_tree(world)), Crash(call, kept)).world == kept:
                        copy_world(world, kept)

            return run

        self.each(map(plan, self.traced.writes))
        return list(found.values())

    def recoveries(self, faults: Iterable[Fault]) -> list[Callable[[Driver], None]]:
        """Plan to recover from every crash with a fault at each writing call of the recovery.

        Of crashes from which recovery takes the same way, call by call, one is taken.
        """
        ways: dict[tuple[str, ...], tuple[Crash, list[Call]]] = {}

        def explore(crash: Crash) -> Callable[[Driver], None]:
            def run(driver: Driver) -> None:
                with self.opened(crash.world) as world:
                    calls = driver.trace(world, self.operation.recovery).writes
                ways.setdefault(tuple(call.name for call in calls), (crash, calls))

            return run

        self.each(map(explore, self.crashes))
        return [
            self._recovery(crash, fault, call)
            for crash, calls in ways.values()
            for fault in faults
            for call in calls
        ]

    def _recovery(self, crash: Crash, fault: Fault, call: Call) -> Callable[[Driver], None]:
        words = self.operation.recovery
        what = f"SIGKILL at {crash.call}, then {fault} in recovery at {call}"

        def run(driver: Driver) -> None:
            with self.opened(crash.world) as world, telling(what):
                before = self.judge(world)
                ending = driver.trace(world, words, (fault, call))
                assert ending.is_faulty, f"the fault did not take place: {ending}"
                state = self.judge(world)
                assert state == before, f"recovery turned {before} into {state}"
                if ending.status != 0:
                    _check_ending(fault, call, ending, state)
                self.follow(driver, world, state)

        return run

    def kill_after(self, delay_s: float, note: Callable[[str], None]) -> Callable[[Driver], None]:
        """Plan to kill a run after some time; note where that was: before, within or after."""

        def run(driver: Driver) -> None:
            with self.opened() as world, telling(f"SIGKILL after {1000 * delay_s:.3f} ms"):
                ending = driver.run(world, self.operation.words, kill_after_s=delay_s)
                if ending.status is not None:
                    note("after")
                    assert ending.status == 0, ending.text
                else:
                    note("before" if read_tree(world) == self.before else "within")
                self.follow(driver, world, self.judge(world))

        return run

    def judge(self, world: Path) -> str:
        """Tell in which state a world is: `old`, `new` or, of an edit, `trained`.

        Raises:
            AssertionError: It is in neither, or what is none of the operation's business changed.
        """
        target = self.operation.target
        if self.operation.is_edit:
            state = {"none": "old", "trained": "trained", "whole": "new"}[read_run(world / target)]
        else:
            found = read_state(world / target)
            assert found in (self.old, self.new), f"neither old nor new: {found}"
            state = "old" if found == self.old else "new"
        tree = read_tree(world)
        own = self.done if target not in self.before else self.before
        for name, raw in tree.items():
            top = name.split("/")[0]
            if top == target and not self.operation.is_in_place:
                # Published whole or not at all, so what is there is what shall be there.
                assert own.get(name, b"") == raw, f"{name} is not what it shall be"
            elif top != target and not top.startswith(".locft-"):
                assert self.before.get(name, b"none") == raw, f"{name} was changed"
        missing = {name for name in self.before if name.split("/")[0] != target} - tree.keys()
        assert not missing, f"{missing} are gone"
        return state

    def follow(self, driver: Driver, world: Path, state: str) -> None:
        """Do the next run, and see to it that it leaves what it should and nothing else.

        What was seen before is not tried again: a run depends on nothing but what it finds.
        """
        found = fingerprint(read_tree(world))
        if found in self._followed:
            return
        self._follow(driver, world, state)
        self._followed.add(found)

    def _follow(self, driver: Driver, world: Path, state: str) -> None:
        operation = self.operation
        words = operation.words if state == "old" else operation.again
        _succeed(driver, world, words)
        tree = read_tree(world)
        expected = self.done if state == "old" else self.done_again
        if state == "trained":  # the scores may be missing, all or some
            scores = {f"{operation.target}/{name}" for name in _SCORES}
            expected = {
                name: raw for name, raw in expected.items() if name not in scores or name in tree
            }
        with telling("after the next run"):
            _compare(tree, expected)


_SCORES = ("answers.jsonl", "drift.jsonl", "report.md", "report.html", "report.json")


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Put what was tried before an error's message."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def _succeed(driver: Driver, world: Path, words: Iterable[str]) -> Ending:
    ending = driver.run(world, tuple(words))
    assert ending.status == 0, f"{' '.join(words)}: {ending.text}"
    return ending


def _check_ending(fault: Fault, call: Call, ending: Ending, state: str) -> None:
    if fault.name == "SIGKILL":
        assert ending.status is None, f"not killed: {ending.status}"
        assert ending.signal == 9
        return
    said = f"exit status {ending.status}, {ending.text!r}"
    assert "Traceback" not in ending.text, said
    assert "Error" not in ending.text, said
    assert ending.text.count("\n") <= 1, said
    if ending.status == 0:
        is_vain = call.name in _FRUITLESS and call.result != 0
        assert call.name in _FORGIVING or is_vain, f"the fault was not noticed: {said}"
        assert state == "new", f"{said}, but it is {state}"
    else:
        assert ending.status in (1, 2), said
        assert ending.text.startswith("locft: error: "), said
        assert state == "old" or "nothing was kept" not in ending.text, f"{said}, but it is {state}"


def _compare(tree: Tree, expected: Tree) -> None:
    more, less = tree.keys() - expected.keys(), expected.keys() - tree.keys()
    assert not more, f"{sorted(more)} were left"
    assert not less, f"{sorted(less)} were lost"
    changed = [name for name, raw in tree.items() if raw != expected[name]]
    assert not changed, f"{changed} are not what they should be"
