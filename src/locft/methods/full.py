"""Full fine-tuning: every parameter of the model, embeddings and head included."""

from contextlib import AbstractContextManager

from transformers import PreTrainedModel

from locft.methods.base import Method, Plan, Tuning, tune_in_place


def _attach(model: PreTrainedModel, _: Plan) -> AbstractContextManager[Tuning]:
    # Parameters that share their memory come once.
    names = [name for name, _ in model.named_parameters()]
    return tune_in_place(model, names, 0, from_tokens=True)


METHOD = Method(name="full", title="fine-tuning of all parameters", attach=_attach, lr=1e-4)
