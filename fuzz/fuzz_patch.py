"""Fuzz the readers of files that come from others: patches, safetensors headers, indexes, JSON.

    python fuzz/fuzz_patch.py CORPUS [libFuzzer options]

Only a LocftError may come out of them, or, for the JSON reader, a ValueError. What is read must keep
its promises, too: a patch that is accepted has exactly the bytes that writing it again gives. The
first byte of an input chooses what is done with the rest. CORPUS gets the seeds if it is empty.
"""

import contextlib
import copy
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import numpy  # noqa: F401  (imported here, so that it is not instrumented and no input pays for it)

with atheris.instrument_imports(include=["locft"]):
    from locft.checkpoint import INDEX_FILE, WEIGHTS_FILE, read_checkpoint, refuse_quantised
    from locft.errors import LocftError
    from locft.patch.format import (
        TENSORS_FILE,
        Patch,
        PatchTensor,
        manifest_record,
        read_patch,
        write_patch,
    )
    from locft.patch.manifest import (
        MANIFEST_FILE,
        PatchLocation,
        PatchManifest,
        PatchModel,
        dump_manifest,
        hash_manifest,
    )
    from locft.strictjson import load_json, parse_json
    from locft.tensorfile import (
        TensorData,
        has_plain_header,
        hash_tensor,
        read_header,
        read_tensor,
        write_safetensors,
    )

SHARD = "m-1.safetensors"

# In memory, as every input is written to files; elsewhere where there is no such place.
SHM = Path("/dev/shm")
FOLDER = Path(tempfile.mkdtemp(prefix="locft-fuzz-", dir=SHM if SHM.is_dir() else None))

WORDS = (
    *('"format_version"', '"locft_version"', '"model"', '"id"', '"revision"', '"location"', '"name"'),
    *('"layer"', '"module"', '"num_parameters"', '"dtype"', '"tensors"', '"settings"', '"num_edits"'),
    *('"edits_sha256"', '"manifest_sha256"', '"old_sha256"', '"new_sha256"', '"shape"', '"weight_map"'),
    *('"data_offsets"', '"__metadata__"', '"format"', '"pt"', '"quantization_config"', '"quant_method"'),
    *('"BF16"', '"F16"', '"F32"', '"F64"', '"F4"', '"F8_E4M3"', '"BOOL"', '"I64"', "null", "true"),
    *("NaN", "Infinity", "1e999", "-0", "0.1", "99999999999999999999", '"\\ud800"', '"\\u0000"', "[[[["),
    *(
        '{"a":{"a":',
        "}}",
        "]]",
        "[]",
        "{}",
        ",",
        ":",
        '"../x.safetensors"',
        f'"{SHARD}"',
        "\x80\x04",
        "PK",
    ),
)


def fuzz_patch(data: bytes) -> None:
    """Read a folder of two files, split at a place that the input names."""
    cut = int.from_bytes(data[:2], "little")
    folder = _folder({MANIFEST_FILE: data[2 : 2 + cut], TENSORS_FILE: data[2 + cut :]})
    _read_patch(folder)


def fuzz_repaired_patch(data: bytes) -> None:
    """Do the same with all hashes put right, which no fuzzer finds, and a canonical manifest."""
    cut = int.from_bytes(data[:2], "little")
    try:
        record: Any = load_json(data[2 : 2 + cut].decode())
    except ValueError:
        return
    if isinstance(record, dict):
        _read_repaired(record, data[2 + cut :])


def fuzz_changed_patch(data: bytes) -> None:
    """Change a sound manifest and a sound header where and how the input says; repair most hashes."""
    choose = atheris.FuzzedDataProvider(data)
    record, header, tensors = SOUND[choose.ConsumeIntInRange(0, len(SOUND) - 1)]
    record, header = copy.deepcopy((record, header))
    for _ in range(choose.ConsumeIntInRange(0, 4)):
        _change([record, header][choose.ConsumeIntInRange(0, 1)], choose)
    tensors = bytearray(tensors)
    for _ in range(choose.ConsumeIntInRange(0, 2)):
        tensors[choose.ConsumeIntInRange(0, len(tensors) - 1)] = choose.ConsumeIntInRange(0, 255)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * choose.PickValueInList([-len(text) % 8, 0, 1])
    how = choose.ConsumeIntInRange(0, 4)
    _read_repaired(
        record,
        len(text).to_bytes(8, "little") + text + tensors,
        rehash_tensors=how != 1,
        rehash=how != 2,
        canonical=how != 3,
    )


def _change(tree: Any, choose: Any) -> None:
    """Replace, remove or rename something at some depth of a tree."""
    while isinstance(tree, dict | list) and tree:
        key = choose.PickValueInList(list(tree) if isinstance(tree, dict) else list(range(len(tree))))
        if isinstance(tree[key], dict | list) and tree[key] and choose.ConsumeIntInRange(0, 3):
            tree = tree[key]
            continue
        value, how = tree.pop(key), choose.ConsumeIntInRange(0, 3)
        new = copy.deepcopy(choose.PickValueInList(list(VALUES))) if how else value
        if isinstance(tree, list):
            tree.insert(key, new)
        elif how < 3:
            tree[key if how else choose.PickValueInList(list(NAMES))] = new
        return


def _read_repaired(
    record: dict[str, Any],
    tensors: bytes,
    *,
    rehash_tensors: bool = True,
    rehash: bool = True,
    canonical: bool = True,
) -> None:
    folder = _folder({TENSORS_FILE: tensors})
    with contextlib.suppress(LocftError):
        entries = read_header(folder / TENSORS_FILE)
        listed = record.get("tensors") if rehash_tensors else None
        for name, fields in listed.items() if isinstance(listed, dict) else ():
            if isinstance(fields, dict) and name in entries:
                entry = entries[name]
                fields["new_sha256"] = hash_tensor(entry.dtype, entry.shape, read_tensor(entry))
    try:
        if rehash:
            record.pop("manifest_sha256", None)
            record["manifest_sha256"] = hash_manifest(record)
        raw = dump_manifest(record)
    except ValueError:  # a value that no file can hold
        return
    (folder / MANIFEST_FILE).write_bytes(raw if canonical else raw.replace(b"  ", b" "))
    _read_patch(folder)


def fuzz_header(data: bytes) -> None:
    """Read a header; its length, which no fuzzer keeps right, is put right for every second input."""
    if data[:1] == b"=":
        header, _, rest = data[1:].partition(b"\n")
        data = len(header).to_bytes(8, "little") + header + rest
    path = _folder({WEIGHTS_FILE: data}) / WEIGHTS_FILE
    with contextlib.suppress(LocftError):
        entries = read_header(path)
        covered = sum(len(read_tensor(entry)) for entry in entries.values())
        header_bytes = 8 + int.from_bytes(data[:8], "little")
        assert covered == len(data) - header_bytes, "tensors do not cover the file"
        has_plain_header(path, entries)


def fuzz_json(data: bytes) -> None:
    """Parse JSON; what is accepted, the json module reads in the same way."""
    try:
        record = parse_json(data)
    except ValueError:
        return
    assert record == json.loads(data), "read in another way than json does"


def fuzz_checkpoint(data: bytes) -> None:
    """Read a checkpoint's index and configuration, beside one sound shard."""
    index, _, config = data.partition(b"\0")
    folder = _folder({INDEX_FILE: index, "config.json": config})
    write_safetensors(folder / SHARD, {"a": TensorData("U8", (4,), b"abcd")})
    with contextlib.suppress(LocftError):
        entries = read_checkpoint(folder)
        assert all(entry.file.parent == folder for entry in entries.values()), "led elsewhere"
    with contextlib.suppress(LocftError):
        refuse_quantised(folder)


TARGETS: tuple[Callable[[bytes], None], ...] = (
    fuzz_patch,
    fuzz_repaired_patch,
    fuzz_header,
    fuzz_json,
    fuzz_checkpoint,
    fuzz_changed_patch,
)


def fuzz_one(data: bytes) -> None:
    """Do with one input what its first byte says."""
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])


def _folder(files: dict[str, bytes]) -> Path:
    for path in FOLDER.iterdir():
        path.unlink()
    for name, data in files.items():
        (FOLDER / name).write_bytes(data)
    return FOLDER


def _read_patch(folder: Path) -> None:
    try:
        patch = read_patch(folder)
    except LocftError:
        return
    raw = {name: (folder / name).read_bytes() for name in (MANIFEST_FILE, TENSORS_FILE)}
    assert raw[MANIFEST_FILE] == dump_manifest(manifest_record(patch)), "another manifest was accepted"
    tensors = {name: TensorData(one.dtype, one.shape, one.data) for name, one in patch.tensors.items()}
    write_safetensors(folder / "again", tensors)
    assert raw[TENSORS_FILE] == (folder / "again").read_bytes(), "other tensors were accepted"


def sound_patches() -> list[tuple[bytes, bytes]]:
    """Make patches of every dtype, and return their two files."""
    made = []
    for dtype, width in (("BF16", 2), ("F16", 2), ("F32", 4), ("F64", 8)):
        data = bytes(6 * width)
        digest = hash_tensor(dtype, (3, 2), data)
        tensor = PatchTensor(dtype=dtype, shape=(3, 2), data=data, old_sha256=digest, new_sha256=digest)
        manifest = PatchManifest(
            locft_version="0",
            model=PatchModel(id="m", revision=None),
            location=PatchLocation(name="0.mlp", layer=0, module="mlp", num_parameters=6),
            dtype=dtype,
            settings={"lr": 1e-3, "format": "raw", "nested": [{"x": None}]},
            num_edits=1,
            edits_sha256="0" * 64,
        )
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent, "patch")
            write_patch(Patch(tensors={"a": tensor, "b": tensor}, manifest=manifest), folder)
            made.append(((folder / MANIFEST_FILE).read_bytes(), (folder / TENSORS_FILE).read_bytes()))
    return made


def taken_apart(manifest: bytes, tensors: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Return a patch's manifest and header as JSON has them, and its data."""
    start = 8 + int.from_bytes(tensors[:8], "little")
    return json.loads(manifest), json.loads(tensors[8:start]), tensors[start:]


def seeds() -> list[bytes]:
    """Make sound inputs of every kind."""
    made = []
    for manifest, tensors in sound_patches():
        both = len(manifest).to_bytes(2, "little") + manifest + tensors
        made += [b"\0" + both, b"\1" + both, b"\2" + tensors, b"\3" + manifest]
        start = 8 + int.from_bytes(tensors[:8], "little")
        made.append(b"\2=" + tensors[8:start] + b"\n" + tensors[start:])
    made += [b"\5" + hashlib.sha512(bytes([i])).digest() for i in range(64)]
    index = json.dumps({"metadata": {"total_size": 4}, "weight_map": {"a": SHARD}}).encode()
    config = {
        "model_type": "llama",
        "rope_scaling": None,
        "quantization_config": {"quant_method": "awq"},
    }
    made.append(b"\4" + index + b"\0" + json.dumps(config).encode())
    made.append(b"\4" + index + b"\0{}")
    return made


SOUND = [taken_apart(*files) for files in sound_patches()]

# What is put in the place of what belongs there.
VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 2, 3, 12, 24, 2**63, 10**700, 0.5, -0.0, float("nan"), float("inf")),
    *("", "a", "F16", "BF16", "F32", "F64", "F4", "I8", "nope", "\0", "\ud800", "\x1b[2J", "x" * 1000),
    *(
        "0" * 64,
        "A" * 64,
        [],
        [0],
        [0, 12],
        [12, 24],
        [3, 2],
        [6],
        [6, 1],
        [2**62, 4],
        [0, 10**500],
        [-1],
    ),
    *([[]], [True, 2], [1.0], {}, {"a": {}}, {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}),
)
NAMES = ("a", "b", "c", "", "__metadata__", "dtype", "shape", "id", "name", "\ud800", "\x1b", "tensors")


def main() -> None:
    """Write what libFuzzer starts from, and run it."""
    corpus = next((Path(word) for word in sys.argv[1:] if not word.startswith("-")), None)
    if corpus is None:
        sys.exit(__doc__)
    if not corpus.is_file():  # one input to run again
        corpus.mkdir(parents=True, exist_ok=True)
        if not any(corpus.iterdir()):
            for i, seed in enumerate(seeds()):
                (corpus / f"seed-{i}").write_bytes(seed)
    words = tempfile.NamedTemporaryFile("w", suffix=".dict")  # noqa: SIM115  (libFuzzer reads it later)
    for word in WORDS:
        escaped = "".join(c if c.isalnum() else f"\\x{ord(c):02x}" for c in word)
        words.write(f'"{escaped}"\n')
    words.flush()
    atheris.Setup([*sys.argv, f"-dict={words.name}"], fuzz_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
