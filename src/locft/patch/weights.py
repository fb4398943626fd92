"""Patches and models in memory: makes a patch of trained matrices, and finds a patch's matrices."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locft.checkpoint import read_checkpoint
from locft.model.matching import map_tensors
from locft.model.weights import WeightMap, to_tensor
from locft.patch.apply import check_base
from locft.patch.format import Patch, PatchTensor
from locft.patch.manifest import PatchManifest
from locft.tensorfile import TensorData, hash_tensor, read_tensor


def make_patch(
    weights: WeightMap, matrices: Mapping[str, Tensor], manifest: PatchManifest
) -> tuple[Patch, tuple[tuple[str, float], ...]]:
    """Make a patch of trained matrices, rounded to the checkpoint's dtype.

    Args:
        weights: Where the checkpoint holds them.
        matrices: The trained parameters by name.
        manifest: What the patch says of itself.

    Returns:
        The patch; and for each tensor, in the order of their names, the Frobenius norm of its change
        over that of its old values (0 where those are 0). Tensors that did not change are left out,
        as are the experts of a mixture that no edit reached, unless none did.
    """
    changed: dict[str, PatchTensor] = {}
    changes: list[tuple[str, float]] = []
    stored = {name: read_tensor(weights.entries[name]) for name in weights.tensors}
    tensors = weights.to_file(matrices)
    kept = {name: new for name, new in tensors.items() if new.data != stored[name]} or tensors
    for name, new in kept.items():
        entry, old = weights.entries[name], stored[name]
        changed[name] = PatchTensor(
            dtype=new.dtype,
            shape=new.shape,
            data=new.data,
            old_sha256=hash_tensor(entry.dtype, entry.shape, old),
            new_sha256=hash_tensor(new.dtype, new.shape, new.data),
        )
        before = to_tensor(TensorData(entry.dtype, entry.shape, old)).double()
        moved = torch.linalg.vector_norm(to_tensor(new).double() - before).item()
        norm = torch.linalg.vector_norm(before).item()
        changes.append((name, moved / norm if norm else 0.0))
    return Patch(tensors=changed, manifest=manifest), tuple(changes)


def patched_values(model: PreTrainedModel, checkpoint: Path, patch: Patch) -> dict[str, Tensor]:
    """Find the new values of the parameters that a patch changes in a model.

    Args:
        model: The unedited model.
        checkpoint: The folder that it was loaded from.
        patch: The patch.

    Returns:
        New values by the parameters' names in the model, in the model's dtype.

    Raises:
        ModelError: The model does not hold the patch's tensors in a way that can be told.
        PatchError: The patch was made from another model.
    """
    entries = read_checkpoint(checkpoint)
    check_base(checkpoint, entries, patch)
    weights = map_tensors(model, entries, patch.tensors)
    return weights.to_model(
        model,
        {
            name: to_tensor(TensorData(tensor.dtype, tensor.shape, tensor.data))
            for name, tensor in patch.tensors.items()
        },
    )
