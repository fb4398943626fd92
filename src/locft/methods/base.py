"""What a method is: how it makes a model trainable, and what the model's parameters come to."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locft.data.encode import Codec
from locft.model.structure import Index
from locft.train.precondition import Preconditioner
from locft.train.step import Trainable
from locft.types import Edit


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a method is told before it begins.

    Attributes:
        location: The tuning location, for methods that have one.
        num_steps: The most steps that will be taken.
        seed: Names what is drawn at random.
        settings: All settings of the method, by name.
        preconditioners: What the updates of the location's parameters are multiplied by, by name.
        steps_per_epoch: How many steps go through all examples once.
    """

    location: str
    num_steps: int
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    preconditioners: Mapping[str, Preconditioner] = field(default_factory=dict)
    steps_per_epoch: int = 1


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A model made ready for training by a method.

    Attributes:
        trainable: What is trained.
        layer: The lowest layer that is trained: what the layers below hand on is computed once.
        from_tokens: Whether even the embeddings are trained, so that nothing can be computed once.
        values: Gives what training has made of the model's own parameters, by their names, as copies.
    """

    trainable: Trainable
    layer: int
    from_tokens: bool = False
    values: Callable[[], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class EditorPlan:
    """What an editor is told before it begins.

    Attributes:
        codec: How prompts become token ids.
        lr: Adam's learning rate, for editors that look for target vectors.
        seed: Names what is drawn at random.
        settings: All settings of the method, by name.
        sequences: Token ids of ordinary text, for editors that need statistics of it.
        model_sha256: Fingerprint of the unedited model.
        in_bfloat16: Whether a float32 model's products have bfloat16 factors while target vectors are
            looked for.
    """

    codec: Codec
    lr: float
    seed: int
    settings: Mapping[str, Any]
    sequences: Sequence[Sequence[int]]
    model_sha256: str
    in_bfloat16: bool = False


@dataclass(frozen=True, kw_only=True)
class Editing:
    """A model made ready by an editor for one batch of edits after the other.

    Attributes:
        insert: Changes the model, so that it knows a batch of edits, too.
        values: Gives what that has made of the model's own parameters, by their names, as copies.
        num_parameters: How many numbers may change.
        notes: What else decides the result, to be recorded.
    """

    insert: Callable[[Sequence[Edit]], None]
    values: Callable[[], dict[str, Tensor]]
    num_parameters: int
    notes: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of editing by training.

    Attributes:
        name: What it is chosen by.
        title: What it is, in a few words.
        attach: Makes a model trainable while the body runs, and leaves it as it was.
        lr: Adam's learning rate; ``auto`` follows the size of the tuned weights.
        settings: Its other settings and their defaults.
        uses_location: Whether it trains a tuning location, rather than parts of all layers.
        at_once: Whether all target tokens are predicted from the prompt's last token, each for itself.
    """

    name: str
    title: str
    attach: Callable[[PreTrainedModel, Plan], AbstractContextManager[Tuning]]
    lr: float | Literal["auto"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    uses_location: bool = False
    at_once: bool = False


@dataclass(frozen=True, kw_only=True)
class Editor:
    """A way of editing by inserting one batch of edits after the other, in closed form.

    Attributes:
        name: What it is chosen by.
        title: What it is, in a few words.
        open: Makes a model ready for batches of edits while the body runs, and leaves it as it was.
        lr: Adam's learning rate, where it looks for target vectors.
        settings: Its other settings and their defaults.
        batch_size: Edits at a time.
        needs_subject: Whether edits must name their subject.
        needs_text: Whether it needs statistics of ordinary text.
    """

    name: str
    title: str
    open: Callable[[PreTrainedModel, EditorPlan], AbstractContextManager[Editing]]
    lr: float
    settings: Mapping[str, Any]
    batch_size: int = 100
    needs_subject: bool = True
    needs_text: bool = True


@contextmanager
def tune_in_place(
    model: PreTrainedModel,
    names: Iterable[str],
    layer: int,
    *,
    parts: Mapping[str, Index] | None = None,
    preconditioners: Mapping[str, Preconditioner] | None = None,
    from_tokens: bool = False,
    after_step: Callable[[int], None] | None = None,
) -> Iterator[Tuning]:
    """Train parameters of a model themselves while the body runs, and give them their values back."""
    parameters = {name: model.get_parameter(name) for name in names}
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield Tuning(
            trainable=Trainable(
                parameters=parameters,
                parts=parts or {},
                preconditioners=preconditioners or {},
                after_step=after_step,
            ),
            layer=layer,
            from_tokens=from_tokens,
            values=lambda: {name: one.detach().clone() for name, one in parameters.items()},
        )
    finally:
        with torch.no_grad():
            for name, value in own.items():
                parameters[name].copy_(value)
