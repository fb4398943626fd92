"""Which experts of a mixture serve which tokens."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from locft.model.packing import Packed
from locft.model.split import Split
from locft.model.structure import find_experts


def count_served(split: Split, batches: Iterable[tuple[Packed, Tensor]]) -> tuple[int, ...] | None:
    """Count how many tokens each routed expert of the split's layer serves.

    Args:
        split: The model, split at a layer.
        batches: Packed sequences, and the hidden states (N, ...) that enter the layer.

    Returns:
        How many nodes each expert is chosen for, by the expert's number; a node that sequences share
        counts once. None where the layer has no routed experts, or does not say which it chooses.
    """
    experts = find_experts(split.layers, split.layer)
    if experts is None:
        return None
    given: list[Tensor] = []  # (positions, experts for each)

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.extend(
            one.detach().flatten(0, -2).cpu()
            for one in (*args, *kwargs.values())
            if isinstance(one, Tensor) and not one.is_floating_point()
        )

    chosen: list[Tensor] = []
    with _hooked(experts, note), torch.no_grad(), split.tail() as tail:
        for packed, hidden in batches:
            tail(packed, hidden, torch.zeros(1, dtype=torch.int64, device=hidden.device))
            # Not what pads.
            chosen += [one[split.places(packed)].flatten() for one in given]
            given.clear()
    if not chosen:
        return None
    num_experts = _num_experts(experts)
    if num_experts is None:
        return None
    # Some models choose what does nothing, too, and number it behind the experts.
    counts = torch.bincount(torch.cat(chosen), minlength=num_experts)
    return tuple(counts[:num_experts].tolist())


@contextmanager
def _hooked(module: nn.Module, note: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _num_experts(experts: nn.Module) -> int | None:
    if isinstance(experts, nn.ModuleList):
        return len(experts)
    lengths = {len(parameter) for parameter in experts.parameters() if parameter.dim() == 3}
    return min(lengths, default=None)
