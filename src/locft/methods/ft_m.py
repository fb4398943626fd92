"""FT-M: plain fine-tuning of one tuning location; breadth-first it is LocFT-BF.

Source: Yang et al. (2026), Fine-tuning Done Right in Model Editing, sections 3 and 4; the loss is on the
target alone, as in Zhang et al. (2024), A Comprehensive Study of Knowledge Editing, who named it.
"""

from contextlib import AbstractContextManager

from transformers import PreTrainedModel

from locft.methods.base import Method, Plan, Tuning, tune_in_place
from locft.model.location import resolve_location


def _attach(model: PreTrainedModel, plan: Plan) -> AbstractContextManager[Tuning]:
    location = resolve_location(model, plan.location)
    return tune_in_place(
        model,
        location.parameters,
        location.layer,
        parts=location.parts,
        preconditioners=plan.preconditioners,
    )


METHOD = Method(
    name="ft-m",
    title="fine-tuning of one location",
    attach=_attach,
    lr="auto",
    uses_location=True,
)
