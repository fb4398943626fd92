"""FT-L: all target tokens predicted from the prompt's last token, in one matrix, perhaps within a box.

Source: Zhu et al. (2020), Modifying Memories in Transformer Models (the box), and Meng et al. (2022), as
EasyEdit's ``prompt_last`` has it. It is among the paper's baselines, and cannot work: several tokens
share one position, so that an answer of n distinct ones costs log n nats at least. ``box`` is how far
each weight may go from where it was before training; 0 is no box, as for Llama and Qwen.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from locft.methods.base import Method, Plan, Tuning, tune_in_place
from locft.model.location import resolve_location


@contextmanager
def _attach(model: PreTrainedModel, plan: Plan) -> Iterator[Tuning]:
    location = resolve_location(model, plan.location)
    box = plan.settings["box"]
    starts = {name: model.get_parameter(name).detach().clone() for name in location.parameters}

    def keep_in_box(_: int) -> None:
        for name, start in starts.items():
            parameter = model.get_parameter(name)
            parameter.copy_(torch.clamp(parameter, start - box, start + box))

    with tune_in_place(
        model,
        location.parameters,
        location.layer,
        parts=location.parts,
        after_step=keep_in_box if box else None,
    ) as tuning:
        yield tuning


METHOD = Method(
    name="ft-l",
    title="fine-tuning of one location, all target tokens at once",
    attach=_attach,
    lr=5e-4,
    settings={"box": 0.0},
    uses_location=True,
    at_once=True,
)
"""Adam without weight decay, 5e-4, 25 epochs."""
