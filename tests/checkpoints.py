"""Checkpoints and patches of a few bytes, made without torch and without locft's own writer."""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from locft.patch.format import Patch, PatchTensor, manifest_record
from locft.patch.manifest import PatchLocation, PatchManifest, PatchModel
from locft.tensorfile import TensorData, hash_tensor

EMBED = "model.embed_tokens.weight"

# No size is a multiple of the others, so that a wrong offset shows.
DOWN_0, UP_0, DOWN_1, UP_1 = (
    f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in (0, 1) for part in ("down", "up")
)

NORM = "model.norm.weight"

HEAD = "lm_head.weight"

SHAPES = {
    EMBED: (7, 5),
    DOWN_0: (5, 3),
    UP_0: (3, 5),
    DOWN_1: (5, 2),
    UP_1: (2, 5),
    NORM: (5,),
    HEAD: (7, 5),
}

# Each shard holds a matrix that others do not; the last one holds what patches leave alone.
SHARDS = ((EMBED, DOWN_0, UP_0), (DOWN_1, UP_1), (NORM, HEAD))

INDEX = "model.safetensors.index.json"

WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}

Tensors = dict[str, TensorData]

Tree = dict[str, bytes | str | None]


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is stored.

    Attributes:
        name: For the names of tests.
        dtype: Of all its tensors.
        is_sharded: Whether it has an index and three shards, or a single file.
        is_tied: Whether the head is the embedding, and hence not in any file.
    """

    name: str
    dtype: str
    is_sharded: bool
    is_tied: bool

    def tensors(self) -> Tensors:
        """Make its tensors."""
        names = [name for name in SHAPES if not (self.is_tied and name == HEAD)]
        return {name: value(self.dtype, SHAPES[name], seed) for seed, name in enumerate(names)}

    def make(self, folder: Path, tensors: Mapping[str, TensorData] | None = None) -> Path:
        """Make a checkpoint folder, and return it."""
        folder.mkdir()
        for name, data in self.files(self.tensors() if tensors is None else tensors).items():
            (folder / name).write_bytes(data)
        return folder

    def files(self, tensors: Mapping[str, TensorData]) -> dict[str, bytes]:
        """Return what each file of a checkpoint with these tensors holds."""
        files = {"config.json": b"{}\n", "tokenizer.json": b'{"version": "1.0"}'}
        weight_map: dict[str, str] = {}
        for file, names in self.shards().items():
            held = {name: tensors[name] for name in names if name in tensors}
            files[file] = pack(held)
            weight_map |= dict.fromkeys(held, file)
        if not self.is_sharded:
            return files
        # In neither an order nor spaces of ours: these very bytes must come back.
        index = {"weight_map": weight_map, "metadata": {"total_size": 1e3, "made by": "Größe"}}
        return {**files, INDEX: (json.dumps(index, indent=3, ensure_ascii=False) + " \n").encode()}

    def shards(self) -> dict[str, tuple[str, ...]]:
        """Name the files with weights, and the tensors in each."""
        if not self.is_sharded:
            return {"model.safetensors": tuple(SHAPES)}
        return {f"model-0000{i}-of-00003.safetensors": names for i, names in enumerate(SHARDS, 1)}

    def file_of(self, tensor: str) -> str:
        """Name the file that holds a tensor."""
        return next(file for file, names in self.shards().items() if tensor in names)


LAYOUTS = (
    Layout("single F32", "F32", is_sharded=False, is_tied=False),
    Layout("single BF16 tied", "BF16", is_sharded=False, is_tied=True),
    Layout("sharded F16", "F16", is_sharded=True, is_tied=False),
    Layout("sharded BF16 tied", "BF16", is_sharded=True, is_tied=True),
)

SINGLE, SHARDED = LAYOUTS[1], LAYOUTS[2]


def value(dtype: str, shape: Sequence[int], seed: int) -> TensorData:
    """Make a tensor of random bits, all of them finite numbers."""
    length = WIDTHS[dtype]
    for size in shape:
        length *= size
    # Without its highest exponent bits no number is infinite.
    data = bytes(byte & 0x3F for byte in random.Random(seed).randbytes(length))
    return TensorData(dtype, tuple(shape), data)


def pack(tensors: Mapping[str, TensorData]) -> bytes:
    """Write a safetensors file as others might: own metadata, order and spaces."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "by": "somebody"}}
    blobs, position = [], 0
    for name in reversed(list(tensors)):
        tensor = tensors[name]
        end = position + len(tensor.data)
        header[name] = {
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
            "dtype": tensor.dtype,
        }
        blobs.append(tensor.data)
        position = end
    text = json.dumps(header).encode() + b"   "
    return len(text).to_bytes(8, "little") + text + b"".join(blobs)


def unpack(raw: bytes) -> Tensors:
    """Read the tensors of a safetensors file."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    found = {}
    for tensor, fields in header.items():
        first, last = (start + offset for offset in fields["data_offsets"])
        found[tensor] = TensorData(fields["dtype"], tuple(fields["shape"]), raw[first:last])
    return found


def read_weights(folder: Path) -> Tensors:
    """Read what a loader would find in a checkpoint folder."""
    names = ["model.safetensors"]
    if not (folder / names[0]).exists():
        names = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
    found: Tensors = {}
    for name in names:
        found |= unpack((folder / name).read_bytes())
    return found


def tree(folder: Path, without: Iterable[str] = ()) -> Tree:
    """Tell all that a folder holds: bytes of files, targets of links, None for the rest."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.split("/")[0] in without:
            continue
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def plain(folder: Path) -> Tree:
    """Tell what a checkpoint holds besides the record of its patches."""
    return tree(folder, without=[".locft"])


def digest(tensor: TensorData) -> str:
    """Hash a tensor as a manifest does."""
    return hash_tensor(tensor.dtype, tensor.shape, tensor.data)


MANIFEST = PatchManifest(
    locft_version="0.1.0",
    model=PatchModel(id="some/model", revision="abc"),
    location=PatchLocation(name="0.mlp.down", layer=0, module="mlp.down", num_parameters=15),
    dtype="BF16",
    settings={"lr": 0.001},
    num_edits=3,
    edits_sha256="e" * 64,
)


def make_patch(
    before: Mapping[str, TensorData], after: Mapping[str, TensorData], number: int = 3
) -> Patch:
    """Make a patch that turns some tensors into others; `number` is that of its edits."""
    return Patch(
        tensors={
            name: PatchTensor(
                dtype=new.dtype,
                shape=new.shape,
                data=new.data,
                old_sha256=digest(before[name]),
                new_sha256=digest(new),
            )
            for name, new in after.items()
        },
        manifest=replace(MANIFEST, num_edits=number),
    )


def changes(tensors: Mapping[str, TensorData], names: Iterable[str], seed: int) -> Tensors:
    """Make other values for some tensors; another seed makes others."""
    return {
        name: value(tensors[name].dtype, tensors[name].shape, 1000 * (seed + 1) + i)
        for i, name in enumerate(names)
    }


def patch_of(tensors: Tensors, names: Iterable[str], seed: int) -> tuple[Patch, Tensors]:
    """Make a patch of some tensors of a checkpoint; also return all tensors as it leaves them."""
    after = changes(tensors, names, seed)
    return make_patch(tensors, after), {**tensors, **after}


def id_of(patch: Patch) -> str:
    """Return a patch's identity."""
    identity: str = manifest_record(patch)["manifest_sha256"]
    return identity


def signed(body: Mapping[str, Any], name: str) -> bytes:
    """Write JSON as locft writes its own, with a hash of itself."""

    def dump(record: Mapping[str, Any]) -> bytes:
        return (json.dumps(record, sort_keys=True, indent=2) + "\n").encode()

    rest = {key: field for key, field in body.items() if key != name}
    return dump({**rest, name: hashlib.sha256(dump(rest)).hexdigest()})
