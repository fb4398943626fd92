"""What every way of training has in common: how it is timed, and what it gives."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from locft.train.calibrate import synchronise


class Clock:
    """Notes when something is done, what a device still has to do included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: list[float] = []
        self.note()

    def note(self) -> None:
        """Note that something is done."""
        synchronise(self._device)
        self._times.append(time.perf_counter())

    @property
    def laps(self) -> tuple[float, ...]:
        """Seconds between each note and the one before it; the first was made at the start."""
        return tuple(after - before for before, after in zip(self._times, self._times[1:], strict=False))


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a way of training gives.

    Attributes:
        matrix: The trained matrix, on the CPU.
        dtype: What the frozen weights were multiplied in.
        losses: Mean loss of each epoch, in nats.
        epoch_seconds: What each epoch took.
        step_seconds: What each step took, where each was timed.
        step_tokens: How many tokens each of these ran on, padding included.
        same_tokens: Whether token ids and targets were those of locft, where they are another's.
    """

    matrix: Tensor
    dtype: str
    losses: tuple[float, ...]
    epoch_seconds: tuple[float, ...]
    step_seconds: tuple[float, ...] = ()
    step_tokens: tuple[int, ...] = ()
    same_tokens: bool = True
