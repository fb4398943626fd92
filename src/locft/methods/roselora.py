"""RoseLoRA: low-rank adapters of queries and values that become sparse by row and column.

Source: Wang et al. (2024), RoseLoRA: Row and Column-wise Sparse Low-rank Adaptation, sections 3.2 and
3.3 (importance, cubic schedule). Settings are the published code's. Its dropout is left out: a step
would depend on how examples are laid out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locft.methods.adapters import attached, import_peft
from locft.methods.base import Method, Plan, Tuning
from locft.model.moments import input_axis
from locft.model.structure import find_layers, find_parameters
from locft.train.step import Trainable

# What queries and values come from, where they come apart.
_TARGETS = ({"q_proj", "v_proj"}, {"query", "value"})
_FIRST, _LAST = 3, 20  # epochs between which entries are given up
_MEMORY = 0.8


def kept_share(epoch: int, final: float) -> float:
    """Say what share of each row and column is kept in an epoch, counted from 0."""
    if epoch < _FIRST:
        return 1.0
    if epoch >= _LAST:
        return final
    return final + (1 - final) * (1 - (epoch - _FIRST) / (_LAST - _FIRST)) ** 3


def mean_importance(before: Tensor | None, parameter: Tensor, gradient: Tensor) -> Tensor:
    """Follow how much each entry matters: |p g|, averaged over steps."""
    now = (parameter * gradient).abs()
    return now if before is None else _MEMORY * before + (1 - _MEMORY) * now


def prune_rows(matrix: Tensor, importance: Tensor, share: float) -> Tensor:
    """Keep the most important entries of each row; the others become zero.

    Args:
        matrix: (R, M).
        importance: (R, M).
        share: What share to keep. Entries as important as the least that is kept are kept, too.

    Returns:
        (R, M).
    """
    num_dropped = int(matrix.shape[1] * (1 - share))
    if not num_dropped:
        return matrix
    least = importance.kthvalue(num_dropped, dim=1, keepdim=True).values
    # As published: what is under the k-th smallest goes, and that itself stays.
    return torch.where(importance < least, 0.0, matrix)


def _choose_modules(model: PreTrainedModel) -> list[str]:
    """Name the linear maps that make queries and values; all of attention where those are one."""
    layers = find_layers(model)
    found: list[str] = []
    for layer in range(len(layers)):
        names = [
            name.removesuffix(".weight")
            for name in find_parameters(layers, layer, "attn")
            if input_axis(model, name) is not None
        ]
        last = {name.rpartition(".")[2] for name in names}
        wanted = next((pair for pair in _TARGETS if pair <= last), last)
        found += [name for name in names if name.rpartition(".")[2] in wanted]
    return found


@contextmanager
def _attach(model: PreTrainedModel, plan: Plan) -> Iterator[Tuning]:
    peft = import_peft(METHOD.name)
    settings = plan.settings
    config = peft.LoraConfig(
        r=settings["rank"], lora_alpha=settings["alpha"], target_modules=_choose_modules(model)
    )
    torch.manual_seed(plan.seed)
    with attached(model, peft.LoraModel, config) as (_, adapters, values):
        importance: dict[str, Tensor] = {}
        before = {name: one.detach().clone() for name, one in adapters.items()}

        def prune(number: int) -> None:
            share = kept_share((number - 1) // plan.steps_per_epoch, settings["kept"])
            for name, one in adapters.items():
                if one.grad is None:
                    continue
                importance[name] = mean_importance(importance.get(name), before[name], one.grad)
                if share < 1:
                    is_a = "lora_A" in name
                    pruned = prune_rows(
                        one if is_a else one.T, importance[name] if is_a else importance[name].T, share
                    )
                    one.copy_((pruned if is_a else pruned.T).clamp(-settings["box"], settings["box"]))
                before[name].copy_(one)

        yield Tuning(trainable=Trainable(parameters=adapters, after_step=prune), layer=0, values=values)


METHOD = Method(
    name="roselora",
    title="adapters of queries and values that become sparse",
    attach=_attach,
    lr=5e-4,
    settings={"rank": 8, "alpha": 32, "kept": 0.05, "box": 3e-3},
)
