"""Loads models: a Hugging Face id, a local folder, or the embedded model `demo`; safetensors only."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from locft.checkpoint import read_model_config
from locft.errors import ModelError, first_line
from locft.model.refusals import why_quantised, why_refused
from locft.model.resolve import CheckpointFolder, resolve_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that is ready to be edited, asked or scored: in evaluation mode, all frozen.

    Attributes:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        checkpoint: Where its files are, and what it is called.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    checkpoint: CheckpointFolder


def choose_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` into a device that is there.

    Raises:
        ModelError: This machine, or this build of torch, has no such device.
    """
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        name = "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    kind, colon, index = name.partition(":")
    num_devices = torch.cuda.device_count() if kind == "cuda" else 1
    exists = not colon or index in map(str, range(num_devices))
    if not available.get(kind, False) or not exists:
        there = ", ".join(kind for kind, there in available.items() if there)
        raise ModelError(
            f"device {name!r} is not available: torch {torch.__version__} sees {there} here"
        )
    return torch.device(name)


def choose_dtype(name: str, checkpoint_dtype: str) -> torch.dtype:
    """Choose the dtype that the frozen weights run in.

    ``auto`` is the checkpoint's own; a float16 checkpoint runs in float32, since gradients of
    float16 activations underflow without loss scaling.
    """
    if name == "auto":
        return torch.bfloat16 if checkpoint_dtype == "bfloat16" else torch.float32
    return DTYPES[name]


def context_tokens(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model can read; None if its configuration does not say."""
    text_config = config.get_text_config(decoder=True)
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        limit = getattr(text_config, key, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def end_of_sequence(config: PreTrainedConfig) -> int | None:
    """Return the end-of-sequence token that a configuration names; the first where it names several."""
    named = getattr(config.get_text_config(decoder=True), "eos_token_id", None)
    return named[0] if isinstance(named, list) and named else named if isinstance(named, int) else None


def load_tokenizer(
    name: str, *, revision: str | None = None
) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """Load only the tokenizer and the configuration of a model.

    Raises:
        ModelError: There is no such model, or they cannot be used.
    """
    checkpoint = resolve_checkpoint(name, revision=revision, weights=False)
    with _refusing(f"model {name!r}"):
        config = AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=False, local_files_only=True
        )
    return _load_tokenizer(checkpoint), config


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name: ``float32``."""
    return str(dtype).removeprefix("torch.")


def outline_model(
    name: str, *, dtype: str = "auto", revision: str | None = None
) -> tuple[PreTrainedModel, CheckpointFolder, str]:
    """Build a model without its weights: modules and parameters have shapes, and no values.

    Args:
        name: ``demo``, a local folder, or a Hugging Face id, of which no weights are fetched.
        dtype: As `load_model` takes it.
        revision: Branch, tag or commit of a Hugging Face id.

    Returns:
        The model on torch's meta device, where its files are, and the dtype that they say they are in.

    Raises:
        ModelError: There is no such model, or it is refused with the reason.
    """
    checkpoint = resolve_checkpoint(name, revision=revision, weights=False)
    with _refusing(f"model {name!r}"):
        config = read_model_config(checkpoint.folder)
    _refuse_unusable(name, config)
    stored = _stored_dtype(config)
    with _refusing(f"model {name!r}"), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(
                checkpoint.folder, trust_remote_code=False, local_files_only=True
            ),
            dtype=choose_dtype(dtype, stored),
            trust_remote_code=False,
        )
    model.eval()
    return model, checkpoint, stored


def load_model(
    name: str, *, dtype: str = "auto", device: str = "auto", revision: str | None = None
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Code from the model's repository is never run, and only safetensors files are read.

    Args:
        name: ``demo``, a local folder, or a Hugging Face id.
        dtype: ``auto`` (see `choose_dtype`), ``float32`` or ``bfloat16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        revision: Branch, tag or commit of a Hugging Face id.

    Returns:
        The model in evaluation mode, frozen, on its device.

    Raises:
        ModelError: There is no such model, or it is refused with the reason.
    """
    target = choose_device(device)
    checkpoint = resolve_checkpoint(name, revision=revision)
    with _refusing(f"model {name!r}"):
        config = read_model_config(checkpoint.folder)
    _refuse_unusable(name, config)
    tokenizer = _load_tokenizer(checkpoint)
    with _refusing(f"model {name!r}"):
        # Returns a pair, which its annotation does not say.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=choose_dtype(dtype, _stored_dtype(config)),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"model {name!r} is refused: its files lack {len(missing)} of its weights "
            f"({missing[0]} is one), which would be made up at random"
        )
    model.requires_grad_(False)
    model.eval()
    with _refusing(f"model {name!r}"):
        model.to(target)
    return LoadedModel(model=model, tokenizer=tokenizer, checkpoint=checkpoint)


def _load_tokenizer(checkpoint: CheckpointFolder) -> PreTrainedTokenizerBase:
    with _refusing(f"the tokenizer of model {checkpoint.name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=False, local_files_only=True
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"model {checkpoint.name!r} is refused: its tokenizer ({type(tokenizer).__name__}) gives "
            "no character offsets, which decide which tokens belong to a target"
        )
    return tokenizer


def _refuse_unusable(name: str, config: dict[str, Any]) -> None:
    quantised = why_quantised(config)
    if quantised is not None:
        raise ModelError(f"model {name!r} is refused: {quantised}")
    reason = why_refused(config)
    if reason is not None:
        raise ModelError(
            f"model {name!r} is refused: {reason}; `locft families` lists what can be edited"
        )


def _stored_dtype(config: dict[str, Any]) -> str:
    """Read the dtype that a checkpoint says it is in; multimodal ones say it of their text part."""
    text_config = config.get("text_config")
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if part.get(key):
                return str(part[key])
    return "float32"


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turn whatever transformers raises on a model that it cannot load into one clear error."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"{what} cannot be loaded: {first_line(error)}") from error
