"""A Hugging Face checkpoint folder: which file holds which tensor."""

import reprlib
from pathlib import Path

from locft.errors import ModelError
from locft.strictjson import parse_json
from locft.tensorfile import TensorEntry, read_header

WEIGHTS_FILE = "model.safetensors"

INDEX_FILE = "model.safetensors.index.json"


def read_checkpoint(folder: Path) -> dict[str, TensorEntry]:
    """Find every tensor that transformers would load from a checkpoint folder.

    Args:
        folder: Holds `model.safetensors`, or `model.safetensors.index.json` and its shards; where
            both are there, the former counts, as it does for transformers.

    Returns:
        The tensors by name.

    Raises:
        ModelError: There are no safetensors weights, or they are damaged or contradict their index.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: is not a folder; a checkpoint is a folder with {WEIGHTS_FILE}")
    if (folder / WEIGHTS_FILE).is_file():
        return read_header(folder / WEIGHTS_FILE)
    index = folder / INDEX_FILE
    if not index.is_file():
        message = f"{folder}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}"
        if any(folder.glob("*.bin")):
            message += (
                "; there are *.bin weights, but only safetensors is read: load the model with"
                " transformers and save it again with save_pretrained()"
            )
        raise ModelError(message)

    weight_map = _read_weight_map(index)
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        for name, entry in read_header(folder / shard).items():
            # transformers loads whole shards, so the last copy would win, whatever the index says.
            if name in entries:
                raise ModelError(
                    f"{folder}: tensor {name!r} is in two shards, {entries[name].file.name} and {shard}"
                )
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries or entries[name].file.name != shard:
            raise ModelError(f"{index}: tensor {name!r} is said to be in {shard}, but is not")
    return entries


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = parse_json(index.read_bytes()).get("weight_map")
    except OSError as error:
        raise ModelError(f"{index}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{index}: is damaged: {error}") from error
    if not isinstance(weight_map, dict):
        raise ModelError(f"{index}: 'weight_map': expected an object")
    for name, shard in weight_map.items():
        # The index is input from outside: it must not lead to files elsewhere.
        if (
            not isinstance(shard, str)
            or not shard.endswith(".safetensors")
            or any(mark in shard for mark in "/\\\0")
        ):
            raise ModelError(
                f"{index}: 'weight_map': expected the plain name of a safetensors file"
                f" for {name!r}, found {reprlib.repr(shard)}"
            )
    return weight_map
