"""The operations under test: what stands on the disk before, and how its state is told apart.

A world is a folder of its own, in which an operation's words name everything by relative paths.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from locft.patch.apply import stack_patches
from locft.patch.format import Patch, PatchTensor, read_patch, write_patch
from locft.patch.manifest import PatchLocation, PatchManifest, PatchModel
from locft.patch.status import read_status
from locft.tensorfile import TensorData, hash_tensor, write_safetensors

TEMPORARY = re.compile(r"\.locft-[0-9a-f]{8}-")

_TEMPORARY_BYTES = re.compile(TEMPORARY.pattern.encode())

Value = tuple[str, tuple[int, ...], bytes]

Tree = dict[str, bytes | None]


def _bytes(length: int, seed: int) -> bytes:
    """Make bytes that are finite numbers in every dtype: the exponent is never full."""
    block = hashlib.sha256(bytes([seed])).digest()
    return bytes(byte & 0x3F for byte in (block * (length // 32 + 1))[:length])


def _weights() -> dict[str, TensorData]:
    return {
        "embed": TensorData("F32", (5,), _bytes(20, 0)),
        # Beyond a buffer, so that it is written on its own.
        "layers.0.mlp": TensorData("BF16", (64, 80), _bytes(10_240, 1)),
        "layers.0.norm": TensorData("F16", (3,), _bytes(6, 2)),
        "layers.1.mlp": TensorData("BF16", (2, 3), _bytes(12, 3)),
        "layers.2.mlp": TensorData("BF16", (4, 2), _bytes(16, 4)),
    }


_SHARDS = (("embed", "layers.0.mlp"), ("layers.0.norm", "layers.1.mlp"), ("layers.2.mlp",))


def make_single(folder: Path) -> None:
    """Make a checkpoint of a single file."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    write_safetensors(folder / "model.safetensors", _weights())


def make_sharded(folder: Path) -> None:
    """Make a checkpoint of three shards."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    weights = _weights()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_SHARDS, 1):
        shard = f"model-0000{number}-of-00003.safetensors"
        write_safetensors(folder / shard, {name: weights[name] for name in names})
        weight_map |= dict.fromkeys(names, shard)
    # Neither our order nor our spaces, which must come back.
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=3) + "\n")


def _patch(number: int, changes: Mapping[str, bytes], below: Patch | None = None) -> Patch:
    weights = _weights()
    tensors = {}
    for name, data in changes.items():
        old = weights[name]
        before = old.data if below is None or name not in below.tensors else below.tensors[name].data
        tensors[name] = PatchTensor(
            dtype=old.dtype,
            shape=old.shape,
            data=data,
            old_sha256=hash_tensor(old.dtype, old.shape, before),
            new_sha256=hash_tensor(old.dtype, old.shape, data),
        )
    manifest = PatchManifest(
        locft_version="0.1.0",
        model=PatchModel(id="some/model", revision="abc"),
        location=PatchLocation(name=f"{number}", layer=0, module="mlp", num_parameters=4),
        dtype="BF16",
        settings={},
        num_edits=number,
        edits_sha256="a" * 64,
    )
    return Patch(tensors=tensors, manifest=manifest)


def write_patches(folder: Path) -> None:
    """Write the patches: `one` of one shard, `two` of two, `three` of the last, `four` on `one`."""
    one = _patch(1, {"layers.0.mlp": _bytes(10_240, 11)})
    write_patch(one, folder / "one")
    write_patch(
        _patch(2, {"layers.0.mlp": _bytes(10_240, 21), "layers.1.mlp": _bytes(12, 22)}), folder / "two"
    )
    write_patch(_patch(3, {"layers.2.mlp": _bytes(16, 31)}), folder / "three")
    write_patch(_patch(4, {"layers.0.mlp": _bytes(10_240, 41)}, one), folder / "four")
    write_patch(_patch(5, {"layers.1.mlp": _bytes(12, 51)}), folder / "five")


def _stack(folder: Path, *names: str, output: Path | None = None) -> None:
    patches = [read_patch(folder.parents[1] / "patches" / name) for name in names]
    stack_patches(folder, patches, output)


def _single(world: Path) -> None:
    make_single(world / "base")


def _single_patched(world: Path) -> None:
    make_single(world / "base")
    _stack(world / "base", "one")


def _sharded(world: Path) -> None:
    make_sharded(world / "base")


def _sharded_copy(world: Path) -> None:
    """A copy that shares its first two shards with its base, by hard links."""
    make_sharded(world / "base")
    _stack(world / "base", "three", output=world / "copy")


def _sharded_copy_patched(world: Path) -> None:
    _sharded_copy(world)
    _stack(world / "copy", "two")


def _sharded_stacked(world: Path) -> None:
    make_sharded(world / "base")
    _stack(world / "base", "one", "five", "four", output=world / "copy")


def _patches_only(world: Path) -> None:
    pass


@dataclass(frozen=True)
class Operation:
    """One command, and what to do after it was stopped.

    Attributes:
        name: Its name in reports.
        words: The command.
        target: The checkpoint folder that it makes or changes, or the run folder.
        make: Makes its world; the patches are beside it already.
        again: The next run where the command was done: in place the inverse, else a second copy.
    """

    name: str
    words: tuple[str, ...]
    target: str
    make: Callable[[Path], None] = field(repr=False)
    again: tuple[str, ...]

    @property
    def is_in_place(self) -> bool:
        """Whether it changes a folder that was there."""
        return "--in-place" in self.words

    @property
    def is_edit(self) -> bool:
        """Whether it makes a run folder instead of a checkpoint."""
        return self.words[0] == "save-edit"

    @property
    def recovery(self) -> tuple[str, ...]:
        """The first part of every later run: what puts things in order."""
        return ("recover", self.target) if self.is_in_place else ("sweep", "other")


def _operation(
    name: str, words: str, target: str, make: Callable[[Path], None], again: str
) -> Operation:
    return Operation(name, tuple(words.split()), target, make, tuple(again.split()))


OPERATIONS = (
    _operation(
        "apply -o",
        "apply base ../patches/one -o out",
        "out",
        _sharded,
        "apply base ../patches/one -o out2",
    ),
    _operation(
        "apply in place",
        "apply base ../patches/one --in-place",
        "base",
        _single,
        "revert base --in-place",
    ),
    _operation(
        "apply in place, two shards",
        "apply copy ../patches/two --in-place",
        "copy",
        _sharded_copy,
        "revert copy --in-place",
    ),
    _operation(
        "stack -o",
        "stack base ../patches/four ../patches/five ../patches/one -o out",
        "out",
        _sharded,
        "stack base ../patches/four ../patches/five ../patches/one -o out2",
    ),
    _operation(
        "stack in place",
        "stack base ../patches/four ../patches/five ../patches/one --in-place",
        "base",
        _sharded,
        "revert base --all --in-place",
    ),
    _operation(
        "revert -o",
        "revert copy --patch ../patches/four -o out",
        "out",
        _sharded_stacked,
        "revert copy -o out2",
    ),
    _operation(
        "revert in place",
        "revert base --in-place",
        "base",
        _single_patched,
        "apply base ../patches/one --in-place",
    ),
    _operation(
        "revert in place, two shards",
        "revert copy --patch ../patches/two --in-place",
        "copy",
        _sharded_copy_patched,
        "apply copy ../patches/two --in-place",
    ),
    _operation(
        "revert --all in place",
        "revert copy --all --in-place",
        "copy",
        _sharded_stacked,
        "stack copy ../patches/one ../patches/five ../patches/four --in-place",
    ),
    _operation(
        "edit's saving",
        "save-edit run ../patches/one",
        "run",
        _patches_only,
        "save-edit run2 ../patches/one",
    ),
)


def copy_world(source: Path, target: Path) -> None:
    """Copy a world; files that are one file under several names stay so."""
    made: dict[int, Path] = {}

    def copy(name: str, place: str) -> str:
        inode = Path(name).stat().st_ino
        if inode in made:
            Path(place).hardlink_to(made[inode])
        else:
            made[inode] = Path(shutil.copyfile(name, place))
        return place

    shutil.copytree(source, target, copy_function=copy)


def read_tree(folder: Path) -> Tree:
    """Read everything below a folder, by path: the bytes of files, None for folders."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def fingerprint(tree: Tree) -> str:
    """Hash a tree; all temporary names count as the same one."""
    return hashlib.sha256(repr(sorted(map(_nameless, tree, tree.values()))).encode()).hexdigest()


def _nameless(path: str, raw: bytes | None) -> tuple[str, bytes | int | None]:
    name = TEMPORARY.sub(".locft-X-", path)
    if raw is None:
        return name, None
    if name.endswith("next.json"):  # what it holds of temporary names is hashed into it
        return name, len(raw)
    if ".locft-lock-" in name:  # holds the process
        return name, min(len(raw), 1)
    return name, _TEMPORARY_BYTES.sub(b".locft-X-", raw)


def load_weights(folder: Path) -> dict[str, Value]:
    """Load a checkpoint as transformers does: one file, or whatever files the index names.

    Nothing of locft is used, so that a mistake cannot hide itself.
    """
    single = folder / "model.safetensors"
    if single.is_file():
        return _load_file(single)
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    files = {file: _load_file(folder / file) for file in set(index["weight_map"].values())}
    loaded = {name: files[file][name] for name, file in index["weight_map"].items()}
    assert sum(map(len, files.values())) == len(loaded), "a shard holds what the index does not name"
    return loaded


def _load_file(path: Path) -> dict[str, Value]:
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header: dict[str, Any] = json.loads(raw[8:start])
    return {
        name: (
            fields["dtype"],
            tuple(fields["shape"]),
            raw[start + fields["data_offsets"][0] : start + fields["data_offsets"][1]],
        )
        for name, fields in header.items()
        if name != "__metadata__"
    }


@dataclass(frozen=True)
class State:
    """What a checkpoint folder is to whoever reads it.

    Attributes:
        weights: Every tensor, as transformers would load it.
        patches: Identity and obstacle of each patch that locft reports.
        is_intact: Whether locft finds the patched tensors to be what they should be.
        others: The other files that are not hidden, with their bytes; of weights, the names.
    """

    weights: Mapping[str, Value]
    patches: Sequence[tuple[str, str | None]]
    is_intact: bool
    others: Mapping[str, bytes | None]


def read_state(folder: Path) -> State | None:
    """Read the state of a checkpoint folder; None if it is not there."""
    if not folder.exists():
        return None
    status = read_status(folder)
    return State(
        weights=load_weights(folder),
        patches=[(patch.id, patch.obstacle) for patch in status.patches],
        is_intact=status.is_intact,
        others={
            path.name: None if "safetensors" in path.name else path.read_bytes()
            for path in sorted(folder.iterdir())
            if not path.name.startswith(".")
        },
    )


def read_run(folder: Path) -> str:
    """Tell what a run folder is: `none`, `trained` (a patch without a report) or `whole`."""
    if not folder.exists():
        return "none"
    read_patch(folder / "patch")
    if not (folder / "report.json").exists():
        return "trained"
    json.loads((folder / "report.json").read_bytes())
    return "whole"
