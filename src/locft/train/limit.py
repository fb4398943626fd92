"""Holds training to a limit of drift, measured on text that it sees in no other way."""

import math

from locft.train.anchors import Anchors, mean_divergence
from locft.train.step import Stepper

_MARGIN = 0.98


class DriftLimit:
    """The most that drift may come to: where an epoch goes beyond, the update is made smaller.

    Args:
        most: The limit, in nats per token.
        held_back: The text that drift is measured on.

    Attributes:
        drift: Drift as it was last measured.
        wanted: What the last epoch came to by itself.
        num_shrunk: After how many epochs the update was made smaller.
    """

    def __init__(self, most: float, held_back: Anchors) -> None:
        self.most = most
        self.drift = 0.0
        self.wanted = 0.0
        self.num_shrunk = 0
        self._held_back = held_back

    @property
    def is_met(self) -> bool:
        """Whether the last epoch kept within the limit by itself."""
        return self.wanted <= self.most

    def hold(self, stepper: Stepper) -> bool:
        """Measure drift and, where it is beyond the limit, bring the update back within.

        Returns:
            Whether that was needed.
        """
        self.drift = self.wanted = mean_divergence(self._held_back, stepper.tail)
        self.num_shrunk += not self.is_met
        while self.drift > self.most:
            # Drift grows with the square of a small update.
            stepper.shrink(_MARGIN * math.sqrt(self.most / self.drift))
            self.drift = mean_divergence(self._held_back, stepper.tail)
        return not self.is_met
