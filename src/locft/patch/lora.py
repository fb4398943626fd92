"""A patch as a LoRA adapter in PEFT's format: W x becomes W x + B (A x), with A and B of a low rank.

Written by hand, so that exporting needs no PEFT: a file of factors and a page of configuration.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from locft.checkpoint import read_checkpoint
from locft.errors import PatchError
from locft.model.resolve import CheckpointFolder
from locft.model.weights import to_data, to_tensor
from locft.patch.format import Patch
from locft.tensorfile import TensorData, read_tensor, write_safetensors

# What vLLM takes as --max-lora-rank (its LoRAConfig); it serves no adapter of a higher rank.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MAX_RANK = VLLM_RANKS[-1]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class LinearChange:
    """What a patch adds to the weight of one linear layer.

    Attributes:
        module: The layer's name in the model.
        delta: New values less old ones, (out, in), in float64.
        dtype: Safetensors name of the dtype in which the checkpoint holds the weight.
        num_bytes: Bytes of the weight in the checkpoint.
        is_transposed: Whether the layer holds its weight as (in, out), as GPT-2's Conv1D does.
    """

    module: str
    delta: Tensor
    dtype: str
    num_bytes: int
    is_transposed: bool


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The change of one linear layer's weight as a product, its largest components first.

    Attributes:
        module: The layer's name in the model.
        a: (rank, in).
        b: (out, rank); the change is b @ a.
        dtype: Safetensors name of the dtype in which they are saved.
        is_transposed: As in `LinearChange`.
    """

    module: str
    a: Tensor
    b: Tensor
    dtype: str
    is_transposed: bool

    @property
    def rank(self) -> int:
        """The number of components."""
        return self.a.shape[0]


def find_changes(
    model: PreTrainedModel, checkpoint: Path, patch: Patch, values: Mapping[str, Tensor]
) -> tuple[LinearChange, ...]:
    """Find what a patch adds to each linear layer.

    Args:
        model: The unedited model.
        checkpoint: The folder that it was loaded from.
        patch: The patch.
        values: The new values of the parameters that it changes, as `patched_values` gives them.

    Returns:
        The changes, in the order of the layers' names.

    Raises:
        PatchError: The patch changes what an adapter cannot hold.
    """
    stored = _stored_names(model, values, patch)
    unfit = {
        parameter: reason
        for parameter in sorted(values)
        if (reason := _why_unfit(model, parameter, parameter in stored)) is not None
    }
    if unfit:
        first, *others = unfit
        raise PatchError(
            f"location {patch.manifest.location.name}: {first} cannot be put in a LoRA adapter: "
            f"{unfit[first]}"
            + (f" (nor can {', '.join(others)})" if others else "")
            + "; export with --full"
        )
    entries = read_checkpoint(checkpoint)
    changes: list[LinearChange] = []
    for parameter, name in sorted(stored.items()):
        # From the files, unrounded: the model may run in another dtype.
        entry = entries[name]
        old = to_tensor(TensorData(entry.dtype, entry.shape, read_tensor(entry)))
        delta = _new_value(patch, name).double() - old.double()
        module = parameter.removesuffix(".weight")
        is_transposed = type(model.get_submodule(module)) is Conv1D
        changes.append(
            LinearChange(
                module=module,
                delta=delta.T if is_transposed else delta,
                dtype=entry.dtype,
                num_bytes=entry.end - entry.start,
                is_transposed=is_transposed,
            )
        )
    return tuple(changes)


def _stored_names(model: PreTrainedModel, values: Mapping[str, Tensor], patch: Patch) -> dict[str, str]:
    """Name the tensor of each parameter that the checkpoint holds under its name and as it is."""
    # Files are saved with and without the base model's prefix.
    prefix = f"{model.base_model_prefix}."
    tensors = {name.removeprefix(prefix): name for name in patch.tensors}
    bare = {parameter: parameter.removeprefix(prefix) for parameter in values}
    return {
        parameter: tensors[name]
        for parameter, name in bare.items()
        if name in tensors
        and torch.equal(_new_value(patch, tensors[name]).to(values[parameter]), values[parameter])
    }


def _new_value(patch: Patch, name: str) -> Tensor:
    tensor = patch.tensors[name]
    return to_tensor(TensorData(tensor.dtype, tensor.shape, tensor.data))


def _why_unfit(model: PreTrainedModel, parameter: str, is_stored: bool) -> str | None:
    """Say why the change of a parameter cannot be an adapter's; None if it can."""
    name, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(name)
    if leaf == "bias":
        return "it is a bias, and an adapter changes matrices only"
    value = model.get_parameter(parameter)
    if value.dim() > 2:
        return f"it is a stack of {value.shape[0]} matrices, and not a linear layer's weight"
    # Not isinstance: a class of its own may use its weight otherwise than a linear layer does.
    if leaf != "weight" or type(module) not in (nn.Linear, Conv1D):
        return f"it belongs to a {type(module).__name__}, which is no linear layer"
    if not is_stored:
        return "the checkpoint stores it in another shape or under another name"
    shared = [
        other
        for other, found in model.named_parameters(remove_duplicate=False)
        if found is value and other != parameter
    ]
    if shared:
        return f"it is shared with {shared[0]}, which an adapter would not change"
    alike = [other for other, _ in model.named_modules() if other.endswith(f".{name}")]
    if alike:
        return f"PEFT would put the change into {alike[0]}, too, whose name ends like its own"
    return None


def largest_rank(changes: Sequence[LinearChange]) -> int:
    """Find the largest rank at which an adapter is not larger than the matrices; at most 512.

    Returns:
        The rank; 0 if even an adapter of rank 1 is larger.
    """
    ours = sum(change.num_bytes for change in changes)
    per_rank = sum(
        change.num_bytes // change.delta.numel() * sum(change.delta.shape) for change in changes
    )
    return min(MAX_RANK, ours // per_rank)


def rank_ladder(largest: int) -> tuple[int, ...]:
    """List the ranks to look at: the powers of two up to the largest rank, and that one."""
    return (*(2**i for i in range(largest.bit_length()) if 2**i < largest), largest)


def vllm_rank(rank: int) -> int:
    """Choose the --max-lora-rank with which vLLM serves an adapter."""
    return next(allowed for allowed in VLLM_RANKS if allowed >= rank)


def factorise(change: LinearChange, rank: int) -> Factors:
    """Factorise a change: the truncated singular value decomposition, the best one of its rank.

    The root of each singular value goes into either factor, so that the entries of both are of one
    size, and far from the ends of float16's range. The first of a component's largest entries on the
    shorter side is positive, so that equal changes give equal factors.

    Args:
        change: The change.
        rank: How many components to find; there are no more than the shorter side is long.

    Returns:
        The factors, in float64.
    """
    is_tall = change.delta.shape[0] > change.delta.shape[1]
    wide = change.delta.T if is_tall else change.delta
    # By way of the Gram matrix, which is much faster. It blurs components 1e-8 the size of the
    # largest, and those are lost when the factors are rounded anyway.
    vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1)[:, :rank]
    peaks = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    vectors = vectors * peaks.sign()
    others = vectors.T @ wide
    roots = torch.linalg.vector_norm(others, dim=1).sqrt()
    left = vectors * roots
    right = others / roots.clamp(min=torch.finfo(roots.dtype).tiny)[:, None]
    return Factors(
        module=change.module,
        a=left.T if is_tall else right,
        b=right.T if is_tall else left,
        dtype=change.dtype,
        is_transposed=change.is_transposed,
    )


def cut(factors: Factors, rank: int) -> Factors:
    """Keep the first components, rounded to the dtype in which they are saved.

    Args:
        factors: Any factors.
        rank: How many components to keep; zeros fill up what is not there, since all layers of an
            adapter have one rank.

    Returns:
        The factors as they are saved.
    """
    missing = max(0, rank - factors.rank)
    a = functional.pad(factors.a[:rank], (0, 0, 0, missing))
    b = functional.pad(factors.b[:, :rank], (0, missing))
    a, b = (to_tensor(to_data(factor, factors.dtype)) for factor in (a, b))
    return Factors(
        module=factors.module,
        a=a,
        b=b,
        dtype=factors.dtype,
        is_transposed=factors.is_transposed,
    )


def num_bytes(factors: Sequence[Factors]) -> int:
    """Count the bytes of an adapter's tensors."""
    return sum(factor.nbytes for each in factors for factor in (each.a, each.b))


def relative_error(changes: Sequence[LinearChange], factors: Sequence[Factors]) -> float:
    """Measure what factors leave out: the Frobenius norm of the rest over that of the changes."""
    left = sum(
        torch.linalg.vector_norm(change.delta - each.b.double() @ each.a.double()).square().item()
        for change, each in zip(changes, factors, strict=True)
    )
    whole = sum(torch.linalg.vector_norm(change.delta).square().item() for change in changes)
    return float((left / whole) ** 0.5) if whole else 0.0


@contextmanager
def adapted(model: PreTrainedModel, factors: Sequence[Factors]) -> Iterator[None]:
    """Run a model with an adapter while the body runs: W x + B (A x), in the model's dtype.

    That is what is served: W stays as it is, and the product of the factors is never formed.
    """
    handles: list[Any] = []
    try:
        for each in factors:
            module = model.get_submodule(each.module)
            weight = module.get_parameter("weight")
            a, b = (factor.to(weight.device, weight.dtype) for factor in (each.a, each.b))
            handles.append(module.register_forward_hook(partial(_add_product, a, b)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_product(
    a: Tensor, b: Tensor, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    return output + functional.linear(functional.linear(inputs[0], a), b)


def write_adapter(folder: Path, factors: Sequence[Factors], base: CheckpointFolder) -> None:
    """Write an adapter that PEFT and vLLM load; equal ones give equal bytes.

    Args:
        folder: An existing folder.
        factors: The factors as `cut` gives them, all of one rank.
        base: The model that the adapter belongs to.
    """
    tensors: dict[str, TensorData] = {}
    for each in factors:
        name = f"base_model.model.{each.module}"
        tensors[f"{name}.lora_A.weight"] = to_data(each.a, each.dtype)
        tensors[f"{name}.lora_B.weight"] = to_data(each.b, each.dtype)
    write_safetensors(folder / WEIGHTS_FILE, tensors)
    config = adapter_config(factors, base)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def adapter_config(factors: Sequence[Factors], base: CheckpointFolder) -> Mapping[str, object]:
    """Describe an adapter as PEFT does, with no more than vLLM serves: no DoRA, no bias."""
    rank = factors[0].rank
    return {
        # A folder is named by its path: what the user called it may be known to locft only.
        "base_model_name_or_path": base.name if base.revision else str(base.folder),
        "bias": "none",
        "fan_in_fan_out": any(each.is_transposed for each in factors),
        "inference_mode": True,
        "lora_alpha": rank,  # PEFT multiplies the product by lora_alpha / r
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "revision": base.revision,
        "target_modules": [each.module for each in factors],  # in full: a short name hits all layers
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
