"""AdaLoRA: low-rank changes whose ranks are allotted by importance while training, through PEFT.

Source: Zhang et al. (2023), Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, equations 3
(the singular form), 4 (orthogonality) and 13 (the budget over the steps).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locft.methods.adapters import attached, import_peft
from locft.methods.base import Method, Plan, Tuning
from locft.train.step import Trainable

# Shares of the steps before ranks are taken away, and after the last is taken.
_WARM_UP, _FINAL = 0.1, 0.3


@contextmanager
def _attach(model: PreTrainedModel, plan: Plan) -> Iterator[Tuning]:
    peft = import_peft(METHOD.name)
    rank = plan.settings["rank"]
    config = peft.AdaLoraConfig(
        init_r=plan.settings["init_rank"],
        target_r=rank,
        lora_alpha=rank,
        target_modules="all-linear",
        total_step=plan.num_steps,
        tinit=int(_WARM_UP * plan.num_steps),
        tfinal=int(_FINAL * plan.num_steps),
        deltaT=1,
        orth_reg_weight=plan.settings["orthogonality"],
    )
    torch.manual_seed(plan.seed)
    with attached(model, peft.AdaLoraModel, config) as (tuner, adapters, values):
        factors = [one for name, one in adapters.items() if "lora_A" in name or "lora_B" in name]

        def penalty() -> Tensor:
            losses = [_skewness(factor) for factor in factors]
            weight: float = plan.settings["orthogonality"]
            return weight * torch.stack(losses).mean()

        yield Tuning(
            trainable=Trainable(
                parameters=adapters, penalty=penalty, after_step=tuner.update_and_allocate
            ),
            layer=0,
            values=values,
        )


def _skewness(factor: Tensor) -> Tensor:
    """Measure how far a factor (r, in) or (out, r) is from orthogonal rows or columns."""
    rows = factor if factor.shape[0] <= factor.shape[1] else factor.t()
    gram = rows @ rows.t()
    distance: Tensor = torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device))
    return distance


METHOD = Method(
    name="adalora",
    title="adapters of all linear layers, their ranks by importance",
    attach=_attach,
    lr=3e-3,
    settings={"rank": 8, "init_rank": 12, "orthogonality": 0.5},
)
