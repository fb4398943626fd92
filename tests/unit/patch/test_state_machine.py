"""Whatever is done to checkpoints in whatever order, each holds what a plain model of it says.

The model is versions of tensors and a list of patches. Operations are carried out, killed half-way
or met by damage; after every step the bytes of all files are compared with what they should be.
"""

import itertools
import json
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
from checkpoints import (
    DOWN_0,
    DOWN_1,
    INDEX,
    LAYOUTS,
    NORM,
    UP_0,
    Layout,
    Tensors,
    changes,
    id_of,
    make_patch,
    read_weights,
    signed,
    tree,
    unpack,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from killing import DONE, REFUSED, Killer, perform

from locft.errors import LocftError
from locft.patch.format import manifest_record, write_patch
from locft.patch.rewrite import read_record
from locft.patch.status import read_status

NUM_SEQUENCES = 500

NUM_STEPS = 10

NUM_FOLDERS = 3

MAX_PATCHES = 4  # as many or more, and some are taken out

NUM_VERSIONS = 3

# Two of one shard, and one of each of the others.
NAMES = (DOWN_0, UP_0, DOWN_1, NORM)

# A patch as the model has it: name, old and new version of each tensor.
Change = tuple[tuple[str, int, int], ...]

Versions = tuple[int, ...]

COUNTS: Counter[str] = Counter()


@lru_cache(None)
def tensors_of(layout: Layout, versions: Versions) -> Tensors:
    """Return the tensors of a checkpoint; version 0 is the original one."""
    result = layout.tensors()
    for name, version in zip(NAMES, versions, strict=True):
        if version:
            result |= changes(result, [name], version)
    return result


@lru_cache(None)
def files_of(layout: Layout, versions: Versions) -> dict[str, bytes]:
    """Return the bytes of a checkpoint's files."""
    return layout.files(tensors_of(layout, versions))


@dataclass(frozen=True)
class Made:
    """A patch that was written to the disk."""

    id: str
    path: Path
    record: dict[str, Any]
    old: Tensors


class Pool:
    """Patches, made when they are first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[str, Change], Made] = {}
        self._records: dict[tuple[str, tuple[Change, ...]], bytes] = {}

    def get(self, layout: Layout, change: Change) -> Made:
        """Return a patch."""
        key = layout.name, change
        if key not in self._made:
            sides: list[Tensors] = []
            for side in (1, 2):
                versions = dict.fromkeys(NAMES, 0) | {step[0]: step[side] for step in change}
                every = tensors_of(layout, tuple(versions.values()))
                sides.append({name: every[name] for name, *_ in change})
            patch = make_patch(sides[0], sides[1])
            path = self._folder / f"patch{len(self._made)}"
            write_patch(patch, path)
            self._made[key] = Made(id_of(patch), path, manifest_record(patch), sides[0])
        return self._made[key]

    def record(self, layout: Layout, patches: tuple[Change, ...]) -> bytes:
        """Return the bytes of a record."""
        key = layout.name, patches
        if key not in self._records:
            manifests = [self.get(layout, change).record for change in patches]
            body = {"format_version": 1, "patches": manifests}
            self._records[key] = signed(body, "record_sha256")
        return self._records[key]


@dataclass
class Folder:
    """A checkpoint folder, and what is true of it.

    Attributes:
        path: Where it is.
        layout: How it is stored.
        versions: The versions of its tensors, in the order of NAMES.
        patches: What was put in, from the oldest to the newest.
        is_dirty: Whether a writer of it was killed, so that something may be left.
    """

    path: Path
    layout: Layout
    versions: Versions
    patches: tuple[Change, ...] = ()
    is_dirty: bool = False

    def newest(self, name: str) -> int | None:
        """Return the place of the newest patch that changed a tensor."""
        return max(
            (i for i, change in enumerate(self.patches) if name in {step[0] for step in change}),
            default=None,
        )


@dataclass(frozen=True)
class Outcome:
    """What is true of a folder after an operation."""

    versions: Versions
    patches: tuple[Change, ...]


@dataclass(frozen=True)
class Operation:
    """What is to be done.

    Attributes:
        kind: In a word.
        folder: To which folder.
        output: Where the result goes; None if in place.
        patches: The patches to put in.
        ids: The identities of those to take out.
        outcomes: What may come of it: several, if patches fit in several orders; none, if it is to
            be refused.
        may_refuse: Whether it may be refused nevertheless.
    """

    kind: str
    folder: Folder
    output: Path | None
    patches: tuple[Change, ...] | None
    ids: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    may_refuse: bool = False


def put(versions: Versions, change: Change) -> Versions | None:
    """Put a patch in; None if it does not fit."""
    result = dict(zip(NAMES, versions, strict=True))
    for name, old, new in change:
        if result[name] != old:
            return None
        result[name] = new
    return tuple(result.values())


def take(versions: Versions, change: Change) -> Versions:
    """Take a patch out."""
    result = dict(zip(NAMES, versions, strict=True)) | {name: old for name, old, _ in change}
    return tuple(result.values())


def stack(folder: Folder, patches: tuple[Change, ...]) -> tuple[Outcome, ...]:
    """Tell what may come of putting patches in: try all orders."""
    found = []
    for order in itertools.permutations(patches):
        versions: Versions | None = folder.versions
        for change in order:
            versions = versions and put(versions, change)
        if versions:
            found.append(Outcome(versions, folder.patches + order))
    return tuple(found)


def revert(folder: Folder, chosen: set[int]) -> tuple[Outcome, ...]:
    """Tell what comes of taking patches out, by their places."""
    versions, stay = folder.versions, set[str]()
    for i in reversed(range(len(folder.patches))):
        names = {step[0] for step in folder.patches[i]}
        if i not in chosen:
            stay |= names
        elif names & stay:
            return ()
        else:
            versions = take(versions, folder.patches[i])
    left = tuple(change for i, change in enumerate(folder.patches) if i not in chosen)
    return (Outcome(versions, left),) if chosen else ()


def flip(raw: bytes, bit: int, start: int = 0) -> bytes:
    """Flip a bit behind a start; the number wraps around."""
    damaged = bytearray(raw)
    place = start + bit // 8 % (len(raw) - start)
    damaged[place] ^= 1 << bit % 8
    return bytes(damaged)


def replace(file: Path, raw: bytes) -> None:
    """Give a file other bytes, and leave those alone that share its old ones."""
    file.unlink()
    file.write_bytes(raw)


def header_bytes(raw: bytes) -> int:
    """Tell where the tensors of a safetensors file begin."""
    return 8 + int.from_bytes(raw[:8], "little")


def find_tensor(folder: Path, name: str) -> tuple[Path, int, int]:
    """Tell in which file a loader finds a tensor, and where its bytes begin and end."""
    index = folder / INDEX
    single = folder / "model.safetensors"
    where = single if single.exists() else folder / json.loads(index.read_bytes())["weight_map"][name]
    raw = where.read_bytes()
    start = header_bytes(raw)
    first, last = json.loads(raw[8:start])[name]["data_offsets"]
    return where, start + first, start + last


class Checkpoints(RuleBasedStateMachine):
    """Checkpoint folders, and what is done to them."""

    pool: ClassVar[Pool]
    killer: ClassVar[Killer]
    home: ClassVar[Path]

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=self.home))
        self.folders: list[Folder] = []
        self.num_made = 0
        self.is_dirty = False
        COUNTS["sequences"] += 1

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @initialize(layout=st.sampled_from(LAYOUTS[1:3]))
    def make(self, layout: Layout) -> None:
        path = layout.make(self.root / "base")
        self.folders.append(Folder(path, layout, (0,) * len(NAMES)))

    @rule(data=st.data())
    def change(self, data: st.DataObject) -> None:
        """Do something, or have it refused."""
        operation = self.draw(data)
        self.perform(operation)
        self.check(operation)

    @rule(data=st.data(), at=st.integers(1, 50))
    def kill(self, data: st.DataObject, at: int) -> None:
        """Do something, and be killed half-way, or just not."""
        operation = self.draw(data, can_be_refused=False)
        code = self.killer.perform(self.words(operation), at)
        COUNTS["kills"] += 1
        if code in (DONE, REFUSED):
            assert (code == REFUSED) <= operation.may_refuse
            if code == DONE:
                self.note(operation)
        else:
            assert code == -signal.SIGKILL
            COUNTS["kills inside"] += 1
            COUNTS[f"kills inside {'a copy' if operation.output else 'in place'}"] += 1
            self.find_out(operation)
        self.check(operation)

    @precondition(lambda self: any(folder.patches for folder in self.folders))
    @rule(data=st.data(), bit=st.integers(0, 10**6), cut=st.sampled_from([0, 0, 0, 1, 100]))
    def corrupt(self, data: st.DataObject, bit: int, cut: int) -> None:
        """Damage something, see what needs it refused, and put it back."""
        folder = data.draw(st.sampled_from([one for one in self.folders if one.patches]))
        what = data.draw(st.sampled_from(["tensor", "undo", "record", "patch"]))
        COUNTS["corruptions"] += 1
        COUNTS[f"corruptions of {what}"] += 1
        getattr(self, f"corrupt_{what}")(folder, data, bit, cut)

    def corrupt_patch(self, folder: Folder, data: st.DataObject, bit: int, cut: int) -> None:
        operation = self.draw(data, folder, can_be_refused=False, kinds=("apply", "stack"))
        change = data.draw(st.sampled_from(operation.patches or ()))
        made = self.pool.get(folder.layout, change)
        file = made.path / data.draw(st.sampled_from(["patch.json", "patch.safetensors"]))
        self.refuse(operation, file, self.damaged(file, bit, cut))

    def corrupt_record(self, folder: Folder, data: st.DataObject, bit: int, cut: int) -> None:
        operation = self.draw(data, folder)
        file = folder.path / ".locft" / "next.json"
        if not file.exists():
            file = folder.path / ".locft" / "record.json"
        self.refuse(operation, file, self.damaged(file, bit, cut))
        self.check(operation)

    def corrupt_undo(self, folder: Folder, data: st.DataObject, bit: int, cut: int) -> None:
        place = data.draw(st.integers(0, len(folder.patches) - 1))
        made = self.pool.get(folder.layout, folder.patches[place])
        file = folder.path / ".locft" / f"{made.id}.safetensors"
        # A flipped bit of a header may leave it with the same meaning.
        start = header_bytes(file.read_bytes())
        self.refuse(self.taking_out(data, folder, place), file, self.damaged(file, bit, cut, start))

    def corrupt_tensor(self, folder: Folder, data: st.DataObject, bit: int, cut: int) -> None:
        names = [name for name in NAMES if folder.newest(name) is not None]
        name = data.draw(st.sampled_from(names))
        file, start, end = find_tensor(folder.path, name)
        raw = file.read_bytes()
        if cut:
            self.refuse(self.draw(data, folder), file, raw[:-cut])
            return
        place = folder.newest(name)
        assert place is not None
        operation = self.taking_out(data, folder, place)
        if data.draw(st.booleans()):
            version = folder.versions[NAMES.index(name)]
            patches = (((name, version, (version + 1) % NUM_VERSIONS),),)
            operation = Operation("apply", folder, operation.output, patches, (), ())
        damaged = raw[:start] + flip(raw[start:end], bit) + raw[end:]
        if folder.is_dirty:
            self.refuse_after_recovery(operation, name, bit)
        else:
            self.refuse(operation, file, damaged)

    def refuse(self, operation: Operation, file: Path, damaged: bytes) -> None:
        """See an operation refused that meets damage, and the damage put back."""
        raw = file.read_bytes()
        replace(file, damaged)
        before = tree(self.root)
        with pytest.raises(LocftError):
            perform(self.words(operation))
        # A writer finishes first what a killed one left.
        if not operation.folder.is_dirty:
            assert tree(self.root) == before
        assert file.read_bytes() == damaged
        replace(file, raw)
        COUNTS["refusals of damage"] += 1
        self.check(operation)

    def refuse_after_recovery(self, operation: Operation, name: str, bit: int) -> None:
        """The same for a tensor whose file may be given its usual name by then."""
        for is_damage in (True, False):
            file, start, end = find_tensor(operation.folder.path, name)
            raw = file.read_bytes()
            replace(file, raw[:start] + flip(raw[start:end], bit) + raw[end:])
            if is_damage:
                with pytest.raises(LocftError):
                    perform(self.words(operation))
        COUNTS["refusals of damage"] += 1
        self.check(operation)

    @staticmethod
    def damaged(file: Path, bit: int, cut: int, start: int = 0) -> bytes:
        raw = file.read_bytes()
        return raw[:-cut] if cut else flip(raw, bit, start)

    def taking_out(self, data: st.DataObject, folder: Folder, place: int) -> Operation:
        """Draw an operation that takes a patch out, by itself if that can be."""
        change = folder.patches[place]
        newest = max(i for i, other in enumerate(folder.patches) if other == change)
        outcomes = revert(folder, {newest})
        ids = (self.pool.get(folder.layout, change).id,) if outcomes else ()
        output = self.output(data)
        return Operation("revert", folder, output, None, ids, ())

    def output(self, data: st.DataObject) -> Path | None:
        self.num_made += 1
        return self.root / f"copy{self.num_made}" if data.draw(st.booleans()) else None

    def draw(
        self,
        data: st.DataObject,
        folder: Folder | None = None,
        *,
        can_be_refused: bool = True,
        kinds: tuple[str, ...] = ("apply", "stack", "revert", "revert given", "revert all"),
    ) -> Operation:
        """Draw an operation, mostly one that can be carried out."""
        folder = folder or data.draw(st.sampled_from(self.folders))
        output = self.output(data)
        is_odd = can_be_refused and data.draw(st.integers(0, 9)) == 0
        if not folder.patches and not is_odd:
            kinds = kinds[:2]
        elif len(folder.patches) >= MAX_PATCHES:
            kinds = kinds[2:] or kinds
        kind = data.draw(st.sampled_from(kinds))
        if kind in ("apply", "stack"):
            num = 1 if kind == "apply" else data.draw(st.integers(2, 3))
            patches = self.draw_patches(data, folder.versions, num, is_odd=is_odd)
            olds = [(name, old) for change in patches for name, old, _ in change]
            return Operation(
                kind,
                folder,
                output,
                patches,
                (),
                stack(folder, patches),
                # Where a tensor comes back to an old version, only one order of several is tried.
                may_refuse=len(set(olds)) < len(olds),
            )
        chosen = set(range(len(folder.patches)))
        ids: tuple[str, ...] = ()
        if kind != "revert all" and chosen:
            last = len(folder.patches) - 1
            place = last if kind == "revert" else data.draw(st.integers(0, last))
            change = folder.patches[place]
            chosen = {max(i for i, other in enumerate(folder.patches) if other == change)}
            whole = self.pool.get(folder.layout, change).id
            ids = (data.draw(st.sampled_from([whole, whole[:12]])),)
            if not can_be_refused and not revert(folder, chosen):
                chosen, ids = set(range(len(folder.patches))), ()
        return Operation(kind, folder, output, None, ids, revert(folder, chosen))

    def draw_patches(
        self, data: st.DataObject, versions: Versions, num: int, *, is_odd: bool
    ) -> tuple[Change, ...]:
        """Draw patches that follow on each other, in any order; an odd one may not fit."""
        patches: list[Change] = []
        for _ in range(num):
            names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True))
            change: Change = tuple(
                (name, old, (old + data.draw(st.integers(0, NUM_VERSIONS - 1))) % NUM_VERSIONS)
                for name, old in zip(NAMES, versions, strict=True)
                if name in names
            )
            versions = put(versions, change) or versions
            if is_odd:
                name, old, new = change[0]
                change = ((name, (old + 1) % NUM_VERSIONS, new), *change[1:])
                is_odd = False
            patches.append(change)
        return tuple(data.draw(st.permutations(patches)))

    def words(self, operation: Operation) -> dict[str, Any]:
        """Put an operation in words."""
        folder = operation.folder
        words: dict[str, Any] = {
            "folder": str(folder.path),
            "output": operation.output and str(operation.output),
        }
        if operation.patches is None:
            return {**words, "ids": operation.ids}
        paths = [str(self.pool.get(folder.layout, change).path) for change in operation.patches]
        return {**words, "patches": paths}

    def perform(self, operation: Operation) -> None:
        """Carry an operation out, or see it refused."""
        COUNTS[operation.kind] += 1
        can_be_refused = operation.may_refuse or not operation.outcomes
        before = tree(self.root) if can_be_refused else {}
        try:
            perform(self.words(operation))
        except LocftError:
            assert can_be_refused
            if not operation.folder.is_dirty:
                assert tree(self.root) == before
            COUNTS["refusals"] += 1
        else:
            self.note(operation)

    def note(self, operation: Operation) -> None:
        """Note down what came of an operation that was done."""
        folder = operation.folder
        if operation.output is None:
            outcome = self.recognise(operation, folder.path)
            folder.versions, folder.patches = outcome.versions, outcome.patches
            folder.is_dirty = False
        else:
            self.add_copy(operation)
            self.is_dirty = False

    def find_out(self, operation: Operation) -> None:
        """Find out how far an operation came that was killed: nowhere, or to its end."""
        folder = operation.folder
        if operation.output is None:
            folder.is_dirty = True
            ids = self.ids_in(folder.path)
            if ids != [self.pool.get(folder.layout, change).id for change in folder.patches]:
                outcome = self.recognise(operation, folder.path)
                folder.versions, folder.patches = outcome.versions, outcome.patches
                COUNTS["kills inside in place, after which all was new"] += 1
        else:
            folder.is_dirty = True  # a copy finishes what was left of its base
            self.is_dirty = True
            if operation.output.exists():
                self.add_copy(operation)

    def recognise(self, operation: Operation, path: Path) -> Outcome:
        """Tell which of an operation's outcomes it was, by the patches that are told of."""
        ids = self.ids_in(path)
        layout = operation.folder.layout
        return next(
            outcome
            for outcome in operation.outcomes
            if ids == [self.pool.get(layout, change).id for change in outcome.patches]
        )

    def ids_in(self, path: Path) -> list[str]:
        return list(read_record(path).ids())

    def add_copy(self, operation: Operation) -> None:
        assert operation.output is not None
        outcome = self.recognise(operation, operation.output)
        copy = Folder(operation.output, operation.folder.layout, outcome.versions, outcome.patches)
        self.folders.append(copy)
        if len(self.folders) > NUM_FOLDERS:
            oldest = next(folder for folder in self.folders if folder is not operation.folder)
            self.folders.remove(oldest)
            shutil.rmtree(oldest.path)

    def check(self, operation: Operation) -> None:
        """Compare everything on the disk with the model."""
        COUNTS["steps"] += 1
        known = {folder.path.name for folder in self.folders}
        others = {path.name for path in self.root.iterdir()} - known
        assert all(self.is_dirty and name.startswith(".locft-") for name in others)
        for folder in self.folders:
            is_touched = folder is operation.folder or folder.path == operation.output
            self.check_folder(folder, is_touched=is_touched)

    def check_folder(self, folder: Folder, *, is_touched: bool) -> None:
        files = files_of(folder.layout, folder.versions)
        found = tree(folder.path)
        made = [self.pool.get(folder.layout, change) for change in folder.patches]
        if folder.is_dirty:
            assert read_weights(folder.path) == tensors_of(folder.layout, folder.versions)
            assert set(files) <= set(found)
            assert all(name.startswith(".locft") for name in set(found) - set(files))
            whole = {name for name in files if "safetensors" not in name}
            assert {name: found[name] for name in whole} == {name: files[name] for name in whole}
        else:
            kept: dict[str, Any] = {}
            if made:
                record = self.pool.record(folder.layout, folder.patches)
                kept = {".locft": None, ".locft/record.json": record}
            for one in made:
                name = f".locft/{one.id}.safetensors"
                undo = found[name]
                assert isinstance(undo, bytes)
                assert unpack(undo) == one.old
                kept[name] = undo
            assert found == {**files, **kept}
        if is_touched:
            status = read_status(folder.path)
            assert [patch.id for patch in status.patches] == [one.id for one in made]
            assert status.is_intact
            assert folder.is_dirty or not status.leftovers
            for i, patch in enumerate(status.patches):
                # What the status says can be reverted is what the model says; of the same patch
                # twice, only the newer.
                assert (patch.obstacle is None) == bool(revert(folder, {i}))


@pytest.fixture
def machine() -> Iterator[type[Checkpoints]]:
    memory = Path("/dev/shm")
    killer = Killer()
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as home:
        Checkpoints.home = Path(home)
        Checkpoints.killer = killer
        (Checkpoints.home / "patches").mkdir()
        Checkpoints.pool = Pool(Checkpoints.home / "patches")
        COUNTS.clear()
        yield Checkpoints
    killer.close()


def test_checkpoints_hold_what_the_model_says_after_every_step(
    machine: type[Checkpoints], capsys: pytest.CaptureFixture[str]
) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=NUM_SEQUENCES,
            stateful_step_count=NUM_STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    with capsys.disabled():
        text = ", ".join(f"{name} {COUNTS[name]:,}" for name in sorted(COUNTS))
        sys.stdout.write(f"\nstate machine: {text}\n")
    assert COUNTS["sequences"] >= NUM_SEQUENCES
    # Else the machine would have become a test of something less.
    assert COUNTS["kills inside in place"] > NUM_SEQUENCES / 2
    assert COUNTS["kills inside a copy"] > NUM_SEQUENCES / 2
    for what in ("patch", "record", "undo", "tensor"):
        assert COUNTS[f"corruptions of {what}"] > NUM_SEQUENCES / 10
