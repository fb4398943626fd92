"""A Hugging Face checkpoint folder: which file holds which tensor."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from locft.errors import ModelError, brief
from locft.openfile import read_limited
from locft.strictjson import parse_json
from locft.tensorfile import TensorEntry, read_header

WEIGHTS_FILE = "model.safetensors"

INDEX_FILE = "model.safetensors.index.json"

CONFIG_FILE = "config.json"

# Ten times what the largest models have, and far from what would harm.
_MAX_INDEX_BYTES = 100_000_000
_MAX_CONFIG_BYTES = 10_000_000


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
    try:
        if not folder.is_dir():
            raise ModelError(f"{folder}: is not a folder; a checkpoint is a folder with {WEIGHTS_FILE}")
        if (folder / WEIGHTS_FILE).is_file():
            return read_header(folder / WEIGHTS_FILE)
        if not (folder / INDEX_FILE).is_file():
            message = f"{folder}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}"
            if any(folder.glob("*.bin")):
                message += (
                    "; there are *.bin weights, but only safetensors is read: load the model with"
                    " transformers and save it again with save_pretrained()"
                )
            raise ModelError(message)
        return _read_shards(folder, _read_weight_map(folder / INDEX_FILE))
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read: {error.strerror}") from error


def _read_shards(folder: Path, weight_map: Mapping[str, str]) -> dict[str, TensorEntry]:
    index = folder / INDEX_FILE
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).exists():
            raise ModelError(
                f"{folder / shard}: cannot be read: it is missing, but {INDEX_FILE} names it;"
                " fetch the checkpoint again"
            )
        for name, entry in read_header(folder / shard).items():
            # transformers loads whole shards, so the last copy would win, whatever the index says.
            if name in entries:
                raise ModelError(
                    f"{folder}: tensor {brief(name)} is in two shards, {entries[name].file.name} and"
                    f" {shard}"
                )
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries or entries[name].file.name != shard:
            raise ModelError(f"{index}: tensor {brief(name)} is said to be in {shard}, but is not")
    return entries


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = parse_json(read_limited(index, _MAX_INDEX_BYTES)).get("weight_map")
    except ValueError as error:
        raise ModelError(f"{index}: is damaged: {error}") from error
    if not isinstance(weight_map, dict):
        raise ModelError(f"{index}: 'weight_map': expected an object")
    for name, shard in weight_map.items():
        # The index is input from outside: it must not lead to files elsewhere.
        if (
            not isinstance(shard, str)
            or not shard.endswith(".safetensors")
            or not shard.isprintable()
            or any(mark in shard for mark in "/\\:")
        ):
            raise ModelError(
                f"{index}: 'weight_map': expected the plain name of a safetensors file"
                f" for {brief(name)}, found {brief(shard)}"
            )
    return weight_map


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`, what a checkpoint says of its model; one without it says nothing.

    Args:
        folder: The checkpoint.

    Returns:
        The configuration.

    Raises:
        ModelError: It cannot be read, or is no JSON object.
    """
    path = folder / CONFIG_FILE
    try:
        # Not the strict reader: configurations hold Infinity.
        config = json.loads(read_limited(path, _MAX_CONFIG_BYTES))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: is damaged: expected a JSON object")
    return config


def refuse_quantised(folder: Path) -> None:
    """Refuse a checkpoint whose weights are quantised: its tensors are not the model's matrices.

    Args:
        folder: The checkpoint.

    Raises:
        ModelError: Its `config.json` says that it is, or cannot be read.
    """
    reason = quantisation(read_model_config(folder))
    if reason is not None:
        raise ModelError(f"model {str(folder)!r} is refused: {reason}")


def quantisation(config: Mapping[str, Any]) -> str | None:
    """Say why a model cannot be edited if its weights are quantised; None if they are not.

    Args:
        config: The model's configuration.

    Returns:
        The reason, with the method's name.
    """
    quantised = config.get("quantization_config")
    if not quantised:
        return None
    method = quantised
    if isinstance(quantised, dict):
        by_bits = quantised.get("load_in_8bit") or quantised.get("load_in_4bit")
        method = quantised.get("quant_method", "bitsandbytes" if by_bits else None)
    name = method if isinstance(method, str) and len(method) <= 40 else brief(method)
    return (
        f"its weights are quantised ({name}), and an edit needs plain ones: take the original"
        f" checkpoint{', or dequantise its file with locft convert' if method == 'gguf' else ''}"
    )
