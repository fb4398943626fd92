"""Trains breadth-first: epochs over all edits, reshuffled, in mini-batches.

Depth-first, one edit after the other, stands beside it to be compared with.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locft.model.load import dtype_name
from locft.model.location import Location
from locft.model.split import Split, Tail
from locft.progress import progress
from locft.train.anchors import make_anchors
from locft.train.cache import PrefixCache
from locft.train.limit import DriftLimit
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
        max_drift: The most that drift may come to, in nats per token; None for no limit.
    """

    lr: float
    batch_size: int
    epochs: int
    stop_loss: float
    loss_mean: LossMean
    seed: int
    max_drift: float | None = None


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
        limit: How drift kept within its limit; None where there was none.
    """

    matrices: Mapping[str, Tensor]
    epochs: tuple[Epoch, ...]
    stopped_early: bool
    limit: DriftLimit | None = None


def train_breadth_first(
    split: Split,
    location: Location,
    cache: PrefixCache,
    schedule: Schedule,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
    initial: Mapping[str, Tensor] | None = None,
    engine: Engine = Engine(),
    preconditioners: Mapping[str, Preconditioner] | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    anchors: PrefixCache | None = None,
    held_back: PrefixCache | None = None,
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
        groups: The examples of each edit, its own prompt's first; one each if None.
        anchors: Texts that are held to what the unedited model makes of them.
        held_back: Text that drift is limited on, where the schedule has a limit.

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
        stepper = make_stepper(tail, cache, trainable, schedule, anchors)
        limit = make_limit(tail, schedule, held_back)
        epochs = run_breadth_first(stepper, schedule, on_epoch, groups, limit)
    is_early = epochs[-1].loss < schedule.stop_loss and (limit is None or limit.is_met)
    return Trained(stepper.values(), epochs, is_early, limit)


def make_stepper(
    tail: Tail,
    cache: PrefixCache,
    trainable: Trainable,
    schedule: Schedule,
    anchors: PrefixCache | None = None,
) -> Stepper:
    """Get ready for steps on some examples; the tail's weights are still unedited."""
    return Stepper(
        tail,
        cache,
        trainable,
        schedule.lr,
        schedule.loss_mean,
        None if anchors is None else make_anchors(tail, anchors),
        may_shrink=schedule.max_drift is not None,
    )


def make_limit(tail: Tail, schedule: Schedule, held_back: PrefixCache | None) -> DriftLimit | None:
    """Get ready to limit drift; the tail's weights are still unedited."""
    if schedule.max_drift is None or held_back is None:
        return None
    return DriftLimit(schedule.max_drift, make_anchors(tail, held_back))


def run_breadth_first(
    stepper: Stepper,
    schedule: Schedule,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
    groups: Sequence[Sequence[int]] | None = None,
    limit: DriftLimit | None = None,
) -> tuple[Epoch, ...]:
    """Go through all edits in every epoch, reshuffled, in mini-batches, until the loss is low.

    Args:
        stepper: What takes the steps.
        schedule: How long and how fast.
        on_epoch: Called after each epoch.
        groups: The examples of each edit, its own prompt's first; a step takes all of them. One each
            if None.
        limit: What drift is held to after each epoch; None for no limit.

    Returns:
        What each epoch did.

    Raises:
        TrainingError: A loss, gradient or weight is not finite.
    """
    groups = [[index] for index in range(stepper.cache.num_examples)] if groups is None else groups
    num_edits = len(groups)
    # Of every edit's own prompt, as it is met.
    success = torch.zeros(num_edits, device=stepper.cache.device)
    orders = shuffled_batches(num_edits, schedule.batch_size, schedule.seed)
    epochs: list[Epoch] = []
    with progress("training", schedule.epochs * num_edits, "edits") as advance:
        while len(epochs) < schedule.epochs:
            total = 0.0
            batches = next(orders)
            for number, batch in enumerate(batches):
                place = f"epoch {len(epochs) + 1}, step {number + 1} of {len(batches)}"
                examples = [example for edit in batch for example in groups[edit]]
                own = list(accumulate((len(groups[edit]) for edit in batch[:-1]), initial=0))
                loss, found = stepper.step(examples, place)
                success[batch] = found[own]
                total += loss * len(batch)
                advance(len(batch), note=f"loss {loss:.3f}")
            epochs.append(
                Epoch(
                    epoch=len(epochs) + 1,
                    steps=len(batches),
                    loss=total / num_edits,
                    success=means_of_fifths(success),
                )
            )
            on_epoch(epochs[-1])
            was_held = limit is not None and limit.hold(stepper)
            if epochs[-1].loss < schedule.stop_loss and not was_held:
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
