"""Gets ready what a run preserves: the preconditioners of the matrices that it will tune."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from locft.config import parse_preserve
from locft.errors import ConfigError
from locft.evaluation.subject import Subject
from locft.model.location import Location
from locft.model.neutral import known_moments
from locft.recipe.ordinary import OrdinaryText, input_axes
from locft.train.precondition import Preconditioner, make_preconditioners


@dataclass(frozen=True, kw_only=True)
class Preservation:
    """What a run preserves, and by what.

    Attributes:
        preconditioners: What updates are multiplied by, by parameter.
        strength: How much updates are kept off the directions in use; None for not at all.
        left_plain: Parameters of the location whose updates are not preconditioned.
    """

    preconditioners: Mapping[str, Preconditioner] = field(default_factory=dict)
    strength: float | None = None
    left_plain: tuple[str, ...] = ()

    @property
    def gain(self) -> float:
        """How much more updates must move than plain ones; the mean over the matrices."""
        gains = [one.gain for one in self.preconditioners.values()]
        return sum(gains) / len(gains) if gains else 1.0


def prepare_preservation(
    subject: Subject, location: Location | None, preserve: str, text: OrdinaryText | None
) -> Preservation:
    """Measure what a location receives of ordinary text, and make its preconditioners.

    Args:
        subject: The model, unedited.
        location: What will be tuned; None where a method has no location.
        preserve: What is to be preserved, as `parse_preserve` reads it.
        text: The ordinary text; None where nothing is to be preserved.

    Returns:
        The preconditioners, and what they were made by; neither where nothing is to be preserved.

    Raises:
        ConfigError: No parameter of the location has an input that can be seen.
    """
    strength = parse_preserve(preserve).covariance
    if strength is None or text is None or location is None:
        return Preservation()
    network = subject.loaded.model
    axes = input_axes(subject, location)
    if not axes:
        raise ConfigError(
            f"preserve covariance is not for location {location.name} of this model: its matrices are "
            "experts in a stack, whose inputs cannot be seen apart. Choose mlp.shared.down or attn, or "
            "--preserve none"
        )
    groups = [(location.layer, tuple(axes))]
    moments = known_moments(network, text.model_sha256, groups, text.sequences)
    return Preservation(
        preconditioners=make_preconditioners(moments, axes, strength, network.device),
        strength=strength,
        left_plain=tuple(name for name in location.parameters if name not in moments),
    )
