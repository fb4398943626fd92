"""LoRA: a low-rank change beside every linear layer of the decoder, through PEFT.

Source: Hu et al. (2022), LoRA: Low-Rank Adaptation of Large Language Models.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from locft.methods.adapters import attached, import_peft
from locft.methods.base import Method, Plan, Tuning
from locft.train.step import Trainable


@contextmanager
def _attach(model: PreTrainedModel, plan: Plan) -> Iterator[Tuning]:
    peft = import_peft(METHOD.name)
    rank = plan.settings["rank"]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    torch.manual_seed(plan.seed)
    with attached(model, peft.LoraModel, config) as (_, adapters, values):
        yield Tuning(trainable=Trainable(parameters=adapters), layer=0, values=values)


METHOD = Method(
    name="lora",
    title="low-rank adapters of all linear layers",
    attach=_attach,
    lr=1e-3,
    settings={"rank": 8},
)
