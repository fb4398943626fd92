"""Second moments of what enters weight matrices: how much each direction of their input is in use.

A matrix that is changed along a direction that ordinary text hardly ever takes leaves what the model
makes of ordinary text as it was.

Source: the uncentred covariance of keys of ROME (Meng et al. 2022, section 3.1), of every kind of input.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from locft.model.packing import lay_out
from locft.model.split import Split
from locft.progress import progress

_TOKENS_PER_PASS = 2048


@dataclass(frozen=True, kw_only=True)
class InputMoment:
    """The second moment of what enters a weight matrix.

    Attributes:
        matrix: (K, K) float32, symmetric: the mean of x x^T over tokens.
        num_tokens: Over how many tokens.
    """

    matrix: Tensor
    num_tokens: int


def input_axis(model: PreTrainedModel, name: str) -> int | None:
    """Tell along which axis of a parameter a layer's input runs; None if it is no layer's matrix.

    A linear layer holds (out, in), GPT-2's Conv1D (in, out). Which it is follows from the module, as
    shapes do not tell.

    Args:
        model: The model.
        name: The parameter's name in it.
    """
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    if leaf != "weight":
        return None
    if isinstance(owner, Conv1D):
        return 0
    return 1 if isinstance(owner, nn.Linear) else None


def measure_moments(
    split: Split, names: Sequence[str], sequences: Iterable[Sequence[int]]
) -> dict[str, InputMoment]:
    """Measure the second moment of what enters some matrices of the split's layer and those below.

    Args:
        split: The model, unedited, split at the layer.
        names: The parameters; those of linear maps count, others are left out. Matrices that
            receive the same share one.
        sequences: Token ids.

    Returns:
        The moments, by parameter. They do not depend on how many sequences are run at a time, but for
        rounding.
    """
    modules = {
        name: split.model.get_submodule(name.rpartition(".")[0])
        for name in names
        if input_axis(split.model, name) is not None
    }
    sums: dict[nn.Module, Tensor] = {}
    counts: dict[nn.Module, int] = {}
    twins: dict[nn.Module, nn.Module] = {}  # who receives the same: queries, keys and values, say
    met: list[tuple[Tensor, nn.Module]] = []  # in this pass

    def listen(module: nn.Module, args: tuple[Any, ...]) -> None:
        first = next((one for states, one in met if states is args[0]), module)
        twins[module] = first
        if first is not module:
            return
        met.append((args[0], module))
        rows = args[0].detach().flatten(0, -2).float()
        sums[module] = sums[module].addmm_(rows.T, rows) if module in sums else rows.T @ rows
        counts[module] = counts.get(module, 0) + len(rows)

    passes = list(_passes(sequences))
    with ExitStack() as undo, progress("measuring inputs", len(passes), "passes") as step:
        for module in dict.fromkeys(modules.values()):
            undo.callback(module.register_forward_pre_hook(listen).remove)
        for rows in passes:
            split.run_through(lay_out(rows).to(split.model.device))
            met.clear()
            step(1)
    found = {
        module: InputMoment(matrix=(total / counts[module]).cpu(), num_tokens=counts[module])
        for module, total in sums.items()
    }
    # An expert that nothing was routed to has none.
    return {name: found[twins[one]] for name, one in modules.items() if one in twins}


def _passes(sequences: Iterable[Sequence[int]]) -> Iterable[Tensor]:
    """Put sequences of equal length together, so that nothing is padded."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for sequence in sequences:
        by_length.setdefault(len(sequence), []).append(sequence)
    for length, alike in sorted(by_length.items()):
        at_once = max(1, _TOKENS_PER_PASS // length)
        for start in range(0, len(alike), at_once):
            yield torch.tensor([list(one) for one in alike[start : start + at_once]])
