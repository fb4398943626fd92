"""One step of training, the same for every method and every order of the examples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from locft.errors import TrainingError
from locft.model.split import Tail
from locft.model.structure import Index
from locft.train.anchors import Anchors
from locft.train.cache import Batch, PrefixCache
from locft.train.objective import LossMean, predicted_share, target_loss
from locft.train.precondition import Preconditioner

_ANCHORS_PER_STEP = 8
_ANCHOR_WEIGHT = 2.0


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """What is trained.

    Attributes:
        parameters: The trained parameters, by name.
        parts: Which part of a parameter is trained, by name, where that is not all of it.
        initial: Where they start from, by name, where the model holds them rounded to its own dtype; the
            model's own values for those that are not named.
        preconditioners: What the updates of parameters are multiplied by, by name, where they are.
        penalty: What is added to the loss, a scalar; None for nothing.
        after_step: Called with the number of steps so far after each, while gradients are still there;
            it may change the parameters. None for nothing.
    """

    parameters: Mapping[str, nn.Parameter]
    parts: Mapping[str, Index] = field(default_factory=dict)
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    preconditioners: Mapping[str, Preconditioner] = field(default_factory=dict)
    penalty: Callable[[], Tensor] | None = None
    after_step: Callable[[int], None] | None = None

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """Take what is trained of a tensor in a parameter's shape."""
        return tensor[self.parts.get(name, ())]

    @contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        """Let these parameters of a model, and no others, have gradients while the body runs."""
        model.requires_grad_(False)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self.parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None


class Stepper:
    """Takes steps of Adam on examples whose frozen states are cached.

    Each parameter has a float32 master copy, which Adam steps; the model computes with that copy
    rounded to its own dtype, once it is known to be finite. Where updates are preconditioned, what Adam
    steps is the update D, from zero on, and the master copy follows it.

    Args:
        tail: What runs the model from the cached states on.
        cache: The examples.
        trainable: What is trained.
        lr: Adam's learning rate.
        loss_mean: How the loss is averaged over target tokens.
        anchors: Texts whose divergence from the unedited model is added to the loss, some in each step.
        may_shrink: Whether `shrink` may be asked for.
    """

    def __init__(
        self,
        tail: Tail,
        cache: PrefixCache,
        trainable: Trainable,
        lr: float,
        loss_mean: LossMean,
        anchors: Anchors | None = None,
        may_shrink: bool = False,
    ) -> None:
        self.cache = cache
        self.tail = tail
        self._anchors = anchors
        self._turns = cycle(range(0 if anchors is None else anchors.cache.num_examples))
        self._trainable = trainable
        self._loss_mean = loss_mean
        self._masters = {
            name: trainable.part(name, trainable.initial.get(name, parameter))
            .detach()
            .to(parameter.device, torch.float32, copy=True, memory_format=torch.contiguous_format)
            for name, parameter in trainable.parameters.items()
        }
        # Where they started; of parameters that Adam steps themselves only what may shrink needs it.
        self._starts = {
            name: master.clone()
            for name, master in self._masters.items()
            if may_shrink or name in trainable.preconditioners
        }
        self._stepped = {
            name: torch.zeros_like(master) if name in trainable.preconditioners else master
            for name, master in self._masters.items()
        }
        # Fused: one pass over each matrix instead of one for every term of the update.
        self._optimizer = torch.optim.Adam(self._stepped.values(), lr=lr, fused=True)
        self.num_steps = 0

    def step(self, indices: Sequence[int], place: str) -> tuple[float, Tensor]:
        """Take a step.

        Args:
            indices: The examples of the batch.
            place: Where training is, for error messages.

        Returns:
            The loss before the step, in nats, and the share (B,) of each example's target tokens that
            was predicted right before it.

        Raises:
            TrainingError: The loss, a gradient or a weight is not finite.
        """
        batch = self.cache.batch(indices)
        logits = self._logits(batch)
        loss = target_loss(logits, batch.labels, batch.rows, self._loss_mean)
        value = loss.item()
        success = predicted_share(logits.detach(), batch.labels, batch.rows)
        _require_finite("loss", torch.tensor(value), place)
        if self._trainable.penalty is not None:
            loss = loss + self._trainable.penalty()
        loss.backward()  # type: ignore[no-untyped-call]
        if self._anchors is not None:
            moved = self._anchors.divergence(self.tail, list(islice(self._turns, _ANCHORS_PER_STEP)))
            (_ANCHOR_WEIGHT * moved).backward()  # type: ignore[no-untyped-call]
        for name, parameter in self._trainable.parameters.items():
            if parameter.grad is None:
                continue  # no loss depends on it: an expert's bias for load balancing, say
            _require_finite(f"gradient of {name}", parameter.grad, place)
            gradient = self._trainable.part(name, parameter.grad).float()
            if name in self._trainable.preconditioners:
                gradient = self._trainable.preconditioners[name].apply(gradient)
            self._stepped[name].grad = gradient.contiguous()
            if self._trainable.after_step is None:
                parameter.grad = None  # no copy of it is needed
        self._optimizer.step()
        self.num_steps += 1
        for name, preconditioner in self._trainable.preconditioners.items():
            update = preconditioner.apply(self._stepped[name])
            torch.add(self._starts[name], update, out=self._masters[name])
        for name, master in self._masters.items():
            _require_finite(f"weight {name}", master, place)
        with torch.no_grad():
            for name, parameter in self._trainable.parameters.items():
                self._trainable.part(name, parameter).copy_(self._masters[name])
            if self._trainable.after_step is not None:
                self._trainable.after_step(self.num_steps)
                for name, parameter in self._trainable.parameters.items():
                    self._masters[name].copy_(self._trainable.part(name, parameter))
        for name, parameter in self._trainable.parameters.items():
            parameter.grad = self._stepped[name].grad = None
        return value, success

    def shrink(self, share: float) -> None:
        """Take back a part of what was changed so far: what is left is a share of it, from 0 to 1."""
        with torch.no_grad():
            for name, parameter in self._trainable.parameters.items():
                master = self._masters[name]
                master.copy_(torch.lerp(self._starts[name], master, share))
                if name in self._trainable.preconditioners:
                    self._stepped[name].mul_(share)
                self._trainable.part(name, parameter).copy_(master)

    def success(self, indices: Sequence[int]) -> Tensor:
        """Give the share (B,) of each example's target tokens that is predicted right now."""
        batch = self.cache.batch(indices)
        with torch.no_grad():
            return predicted_share(self._logits(batch), batch.labels, batch.rows)

    def values(self) -> dict[str, Tensor]:
        """Copy the trained parameters in float32, on the CPU, by name."""
        values: dict[str, Tensor] = {}
        for name, parameter in self._trainable.parameters.items():
            start = self._trainable.initial.get(name, parameter)
            values[name] = start.detach().to("cpu", torch.float32, copy=True)
            self._trainable.part(name, values[name]).copy_(self._masters[name].detach())
        return values

    def _logits(self, batch: Batch) -> Tensor:
        return self.tail(batch.packed, batch.hidden, batch.asked)


def _require_finite(what: str, tensor: Tensor, place: str) -> None:
    # What is not finite stays so in a sum, which takes one pass and no copy.
    if not torch.isfinite(tensor.sum()):
        raise TrainingError(
            f"training stopped at {place}: the {what} is not finite, and no patch was written. Try "
            "a lower learning rate (--lr), or --dtype float32"
        )
