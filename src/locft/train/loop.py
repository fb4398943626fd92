"""Trains breadth-first: epochs over all edits, reshuffled, in mini-batches.

Depth-first, one edit after the other, stands beside it to be compared with.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locft.model.load import dtype_name
from locft.model.location import Location
from locft.model.split import Split
from locft.progress import progress
from locft.train.cache import PrefixCache
from locft.train.objective import LossMean
from locft.train.precondition import Preconditioner
from locft.train.step import Stepper, Trainable
from locft.types import Epoch

_NUM_FIFTHS = 5
_NUM_PARTS = 10
_NUM_MEASURED_TOGETHER = 20


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train, every `auto` being resolved.

    Attributes:
        lr: Adam's learning rate.
        batch_size: Examples per step; the last batch of an epoch may be smaller.
        epochs: The most passes over all examples.
        stop_loss: Training ends after an epoch whose mean loss is under this.
        loss_mean: How the loss is averaged over target tokens.
        seed: Names the order of the examples in every epoch.
    """

    lr: float
    batch_size: int
    epochs: int
    stop_loss: float
    loss_mean: LossMean
    seed: int


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What the tail computes with.

    Attributes:
        in_bfloat16: Whether a float32 model's products have bfloat16 factors.
        compiled: The backend of torch.compile that each layer is compiled with; None for none.
    """

    in_bfloat16: bool = False
    compiled: str | None = None

    def compute_dtype(self, model: PreTrainedModel) -> str:
        """Name the dtype of the products in a model's tail."""
        return "bfloat16" if self.in_bfloat16 else dtype_name(model.dtype)


@dataclass(frozen=True)
class Trained:
    """What training gives.

    Attributes:
        matrices: The tuned parameters in float32, on the CPU, by their names in the model.
        epochs: What each epoch did.
        stopped_early: Whether the loss fell under the threshold.
    """

    matrices: Mapping[str, Tensor]
    epochs: tuple[Epoch, ...]
    stopped_early: bool


def train_breadth_first(
    split: Split,
    location: Location,
    cache: PrefixCache,
    schedule: Schedule,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
    initial: Mapping[str, Tensor] | None = None,
    engine: Engine = Engine(),
    preconditioners: Mapping[str, Preconditioner] | None = None,
) -> Trained:
    """Train a tuning location on cached prefix states.

    The model is left with the trained values in place.

    Args:
        split: The model, split at the location's layer.
        location: What to train; everything else stays frozen.
        cache: The examples, with the states that enter the layer.
        schedule: How long and how fast.
        on_epoch: Called after each epoch.
        initial: Where the tuned parameters start from, by name, where the model holds them rounded to
            its own dtype; the model's own values if None.
        engine: What the tail computes with.
        preconditioners: What the updates of parameters are multiplied by, by name, where they are.

    Returns:
        The trained matrices and the course of the loss.

    Raises:
        TrainingError: A loss, gradient or weight is not finite.
    """
    trainable = Trainable(
        parameters={name: split.model.get_parameter(name) for name in location.parameters},
        parts=location.parts,
        initial=initial or {},
        preconditioners=preconditioners or {},
    )
    with (
        trainable.alone(split.model),
        split.tail(in_bfloat16=engine.in_bfloat16, compiled=engine.compiled) as tail,
    ):
        stepper = Stepper(tail, cache, trainable, schedule.lr, schedule.loss_mean)
        epochs = run_breadth_first(stepper, schedule, on_epoch)
    return Trained(stepper.values(), epochs, epochs[-1].loss < schedule.stop_loss)


def run_breadth_first(
    stepper: Stepper, schedule: Schedule, on_epoch: Callable[[Epoch], None] = lambda _: None
) -> tuple[Epoch, ...]:
    """Go through all examples in every epoch, reshuffled, in mini-batches, until the loss is low.

    Args:
        stepper: What takes the steps.
        schedule: How long and how fast.
        on_epoch: Called after each epoch.

    Returns:
        What each epoch did.

    Raises:
        TrainingError: A loss, gradient or weight is not finite.
    """
    num_examples = stepper.cache.num_examples
    # Of every example, as it is met.
    success = torch.zeros(num_examples, device=stepper.cache.device)
    orders = shuffled_batches(num_examples, schedule.batch_size, schedule.seed)
    epochs: list[Epoch] = []
    with progress("training", schedule.epochs * num_examples, "edits") as advance:
        while len(epochs) < schedule.epochs:
            total = 0.0
            batches = next(orders)
            for number, indices in enumerate(batches):
                place = f"epoch {len(epochs) + 1}, step {number + 1} of {len(batches)}"
                loss, success[indices] = stepper.step(indices, place)
                total += loss * len(indices)
                advance(len(indices), note=f"loss {loss:.3f}")
            epochs.append(
                Epoch(
                    epoch=len(epochs) + 1,
                    steps=len(batches),
                    loss=total / num_examples,
                    success=means_of_fifths(success),
                )
            )
            on_epoch(epochs[-1])
            if epochs[-1].loss < schedule.stop_loss:
                break
    return tuple(epochs)


def run_depth_first(stepper: Stepper, schedule: Schedule) -> tuple[Epoch, ...]:
    """Train each example until its loss is low, and then the next, in a single pass.

    It is what editors did before (section 2 of the paper), and what breadth-first is compared with.

    Args:
        stepper: What takes the steps; one example each.
        schedule: How fast; no example gets more steps than it has epochs.

    Returns:
        What was done by each tenth of the examples: how many steps that took, the mean loss with which
        its examples were left, and the success, at its end, of each fifth of all examples.

    Raises:
        TrainingError: A loss, gradient or weight is not finite.
    """
    num_examples = stepper.cache.num_examples
    tenths = torch.tensor_split(torch.arange(num_examples), min(_NUM_PARTS, num_examples))
    batches = torch.tensor_split(
        torch.arange(num_examples), math.ceil(num_examples / _NUM_MEASURED_TOGETHER)
    )
    parts: list[Epoch] = []
    with progress("training", num_examples, "edits") as advance:
        for part in tenths:
            before, losses = stepper.num_steps, []
            for index in part.tolist():
                loss = math.inf
                for number in range(schedule.epochs):
                    place = f"edit {index + 1:,} of {num_examples:,}, step {number + 1}"
                    loss, _ = stepper.step([index], place)
                    if loss < schedule.stop_loss:
                        break
                losses.append(loss)
                advance(1, note=f"loss {loss:.3f}")
            success = torch.cat([stepper.success(batch.tolist()) for batch in batches])
            parts.append(
                Epoch(
                    epoch=len(parts) + 1,
                    steps=stepper.num_steps - before,
                    loss=sum(losses) / len(losses),
                    success=means_of_fifths(success),
                )
            )
    return tuple(parts)


def shuffled_batches(num_examples: int, batch_size: int, seed: int) -> Iterator[list[list[int]]]:
    """Say which examples each step takes, epoch by epoch, without end.

    Args:
        num_examples: How many examples there are.
        batch_size: Examples per step; the last batch of an epoch may be smaller.
        seed: Names the order.

    Yields:
        The batches of one epoch: indices of examples, each example once.
    """
    # On the CPU for every device, so that a seed names one order everywhere.
    shuffler = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(num_examples, generator=shuffler).tolist()
        yield [order[i : i + batch_size] for i in range(0, num_examples, batch_size)]


def fifths_of(num_examples: int) -> tuple[int, ...]:
    """Count the examples of each fifth; fewer than five are parts of one each."""
    return tuple(len(part) for part in _fifths(torch.empty(num_examples)))


def means_of_fifths(of_examples: Tensor) -> tuple[float, ...]:
    """Average a value (N,) of each example over each fifth of them."""
    return tuple(part.mean().item() for part in _fifths(of_examples))


def _fifths(of_examples: Tensor) -> tuple[Tensor, ...]:
    return torch.tensor_split(of_examples, min(_NUM_FIFTHS, len(of_examples)))
