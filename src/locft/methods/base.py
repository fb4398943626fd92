"""What a method is: how it makes a model trainable, and what the model's parameters come to."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locft.model.structure import Index
from locft.train.precondition import Preconditioner
from locft.train.step import Trainable


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a method is told before it begins.

    Attributes:
        location: The tuning location, for methods that have one.
        num_steps: The most steps that will be taken.
        seed: Names what is drawn at random.
        settings: All settings of the method, by name.
        preconditioners: What the updates of the location's parameters are multiplied by, by name.
    """

    location: str
    num_steps: int
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    preconditioners: Mapping[str, Preconditioner] = field(default_factory=dict)


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
class Method:
    """A way of editing by training.

    Attributes:
        name: What it is chosen by.
        title: What it is, in a few words.
        attach: Makes a model trainable while the body runs, and leaves it as it was.
        lr: Adam's learning rate; ``auto`` follows the size of the tuned weights.
        settings: Its other settings and their defaults.
        uses_location: Whether it trains a tuning location, rather than parts of all layers.
    """

    name: str
    title: str
    attach: Callable[[PreTrainedModel, Plan], AbstractContextManager[Tuning]]
    lr: float | Literal["auto"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    uses_location: bool = False


@contextmanager
def tune_in_place(
    model: PreTrainedModel,
    names: Iterable[str],
    layer: int,
    *,
    parts: Mapping[str, Index] | None = None,
    preconditioners: Mapping[str, Preconditioner] | None = None,
    from_tokens: bool = False,
) -> Iterator[Tuning]:
    """Train parameters of a model themselves while the body runs, and give them their values back."""
    parameters = {name: model.get_parameter(name) for name in names}
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield Tuning(
            trainable=Trainable(
                parameters=parameters, parts=parts or {}, preconditioners=preconditioners or {}
            ),
            layer=layer,
            from_tokens=from_tokens,
            values=lambda: {name: one.detach().clone() for name, one in parameters.items()},
        )
    finally:
        with torch.no_grad():
            for name, value in own.items():
                parameters[name].copy_(value)
