"""Trains one tuning location breadth-first: epochs over all edits, reshuffled, in mini-batches."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locft.errors import TrainingError
from locft.model.load import dtype_name
from locft.model.location import Location
from locft.model.split import Split
from locft.progress import progress
from locft.train.cache import PrefixCache
from locft.train.objective import LossMean, predicted_share, target_loss
from locft.types import Epoch

_NUM_FIFTHS = 5


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
) -> Trained:
    """Train a tuning location on cached prefix states.

    The tuned parameters have a float32 master copy, which Adam steps; the model computes with that
    copy rounded to its own dtype. The model is left with the trained values in place.

    Args:
        split: The model, split at the location's layer.
        location: What to train; everything else stays frozen.
        cache: The examples, with the states that enter the layer.
        schedule: How long and how fast.
        on_epoch: Called after each epoch.
        initial: Where the tuned parameters start from, by name, where the model holds them rounded to
            its own dtype; the model's own values if None.
        engine: What the tail computes with.

    Returns:
        The trained matrices and the course of the loss.

    Raises:
        TrainingError: A loss, gradient or weight is not finite.
    """
    tuned = [split.model.get_parameter(name) for name in location.parameters]
    values = initial or dict(zip(location.parameters, tuned, strict=True))
    masters = [
        values[name].detach().to(parameter.device, torch.float32, copy=True)
        for name, parameter in zip(location.parameters, tuned, strict=True)
    ]
    # Fused: one pass over each matrix instead of one for every term of the update.
    optimizer = torch.optim.Adam(masters, lr=schedule.lr, fused=True)
    num_examples = cache.num_examples
    # Of every example, as it is met.
    success = torch.zeros(num_examples, device=cache.device)
    orders = shuffled_batches(num_examples, schedule.batch_size, schedule.seed)
    epochs: list[Epoch] = []
    with (
        _trainable(split.model, tuned),
        split.tail(in_bfloat16=engine.in_bfloat16, compiled=engine.compiled) as tail,
        progress("training", schedule.epochs * num_examples, "edits") as advance,
    ):
        while len(epochs) < schedule.epochs:
            total = 0.0
            batches = next(orders)
            for number, indices in enumerate(batches):
                place = f"epoch {len(epochs) + 1}, step {number + 1} of {len(batches)}"
                batch = cache.batch(indices)
                logits = tail(batch.packed, batch.hidden, batch.asked)
                loss = target_loss(logits, batch.labels, batch.rows, schedule.loss_mean)
                value = loss.item()
                success[indices] = predicted_share(logits.detach(), batch.labels, batch.rows)
                _require_finite("loss", torch.tensor(value), place)
                loss.backward()  # type: ignore[no-untyped-call]
                for name, parameter, master in zip(location.parameters, tuned, masters, strict=True):
                    if parameter.grad is None:
                        continue  # no loss depends on it: an expert's bias for load balancing, say
                    _require_finite(f"gradient of {name}", parameter.grad, place)
                    master.grad = parameter.grad.float()
                    parameter.grad = None
                optimizer.step()
                with torch.no_grad():
                    for name, parameter, master in zip(location.parameters, tuned, masters, strict=True):
                        _require_finite(f"weight {name}", master, place)
                        parameter.copy_(master)
                total += value * batch.num_examples
                advance(batch.num_examples, note=f"loss {value:.3f}")
            epochs.append(
                Epoch(
                    epoch=len(epochs) + 1,
                    steps=len(batches),
                    loss=total / num_examples,
                    success=tuple(part.mean().item() for part in _fifths(success)),
                )
            )
            on_epoch(epochs[-1])
            if epochs[-1].loss < schedule.stop_loss:
                break
    matrices = {name: master.cpu() for name, master in zip(location.parameters, masters, strict=True)}
    return Trained(matrices, tuple(epochs), epochs[-1].loss < schedule.stop_loss)


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


def _fifths(of_examples: Tensor) -> tuple[Tensor, ...]:
    return torch.tensor_split(of_examples, min(_NUM_FIFTHS, len(of_examples)))


@contextmanager
def _trainable(model: PreTrainedModel, tuned: list[torch.nn.Parameter]) -> Iterator[None]:
    """Let the tuned parameters, and nothing else, have gradients while the body runs."""
    model.requires_grad_(False)
    for parameter in tuned:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in tuned:
            parameter.requires_grad_(False)
            parameter.grad = None


def _require_finite(what: str, tensor: Tensor, place: str) -> None:
    if not torch.isfinite(tensor).all():
        raise TrainingError(
            f"training stopped at {place}: the {what} is not finite, and no patch was written. Try "
            "a lower learning rate (--lr), or --dtype float32"
        )
