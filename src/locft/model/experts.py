"""Which experts of a mixture serve which tokens."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
    num_experts = _num_experts(experts)
    if num_experts is None:
        return None
    given: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.extend(one.detach() for one in (*args, *kwargs.values()) if isinstance(one, Tensor))

    counts = torch.zeros(num_experts, dtype=torch.int64)
    is_told = False
    # Even of the last layer all positions count.
    whole = replace(split, pointwise=())
    with _hooked(experts, note), torch.no_grad(), whole.tail() as tail:
        for packed, hidden in batches:
            tail(packed, hidden, torch.zeros(1, dtype=torch.int64, device=hidden.device))
            chosen = _chosen(given, num_experts, split.places(packed))
            given.clear()
            if chosen is not None:
                # Some models choose what does nothing, too, and number it behind the experts.
                counts += torch.bincount(chosen, minlength=num_experts)[:num_experts]
                is_told = True
    return tuple(counts.tolist()) if is_told else None


def _chosen(given: Sequence[Tensor], num_experts: int, places: Tensor) -> Tensor | None:
    """Tell from what experts are given which of them serve the positions that are not padding."""
    for one in given:
        if not one.is_floating_point():  # (positions, experts for each)
            return one.flatten(0, -2).cpu()[places].flatten()
    if len(given) == 1 and given[0].dim() == 2 and len(given[0]) % num_experts == 0:
        # All positions for each expert, zero where it does not serve.
        is_served = given[0].view(num_experts, -1, given[0].shape[-1]).any(dim=-1).cpu()[:, places]
        return is_served.nonzero()[:, 0]
    return None


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
