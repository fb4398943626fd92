"""Preconditioned updates: a matrix is changed least where ordinary text uses its input most."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from locft.model.moments import InputMoment

_ROUNDING = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True, kw_only=True)
class Preconditioner:
    """What the update of a matrix W is multiplied by on the side of its input: W = W0 + D P.

    Attributes:
        matrix: P, (K, K) float32, symmetric, with eigenvalues over 0 and at most 1.
        axis: The axis of W along which its input runs: 1 for (out, K), 0 for (K, out).
        gain: By how much more than W itself D must move for the same effect on ordinary inputs x: the
            mean of x^T x over that of x^T P x; 1 or more.
    """

    matrix: Tensor
    axis: int
    gain: float

    def apply(self, tensor: Tensor) -> Tensor:
        """Multiply a tensor in the shape of W: D gives an update, the gradient of W that of D."""
        return tensor @ self.matrix if self.axis else self.matrix @ tensor


def make_preconditioner(
    moment: InputMoment, strength: float, axis: int, device: torch.device | None = None
) -> Preconditioner:
    """Make the preconditioner of a matrix from the second moment C of its input.

    P = (I + strength C / mean(e))^-1 with e the eigenvalues of C. So P has C's eigenvectors, and the
    eigenvalues 1 / (1 + strength e / mean(e)): along a direction that is used as much as the mean, an
    update keeps 1 / (1 + strength) of its size.

    Args:
        moment: The second moment.
        strength: How much is kept off directions in use; 0 gives the identity.
        axis: The axis of the matrix along which its input runs.
        device: Where the matrix is; the CPU if None.

    Returns:
        The preconditioner.
    """
    second = moment.matrix.double()
    # Rounded to float32, it may have eigenvalues a hair under zero.
    second.diagonal().add_(_ROUNDING * second.diagonal().sum())
    mean = second.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    whole = torch.eye(len(second), dtype=torch.float64) + strength / mean * second
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(whole))
    kept = (inverse * second).sum()
    return Preconditioner(
        matrix=inverse.float().to(device),
        axis=axis,
        gain=(second.diagonal().sum() / kept).item() if kept > 0 else 1.0,
    )


def make_preconditioners(
    moments: Mapping[str, InputMoment],
    axes: Mapping[str, int],
    strength: float,
    device: torch.device | None = None,
) -> dict[str, Preconditioner]:
    """Make the preconditioners of several matrices; those that receive the same share one.

    Args:
        moments: The second moment of each matrix's input, by parameter.
        axes: The axis of each along which its input runs.
        strength: As for `make_preconditioner`.
        device: Where the matrices are; the CPU if None.

    Returns:
        The preconditioners, by parameter.
    """
    made: dict[tuple[int, int], Preconditioner] = {}
    for name, moment in moments.items():
        key = (id(moment), axes[name])
        if key not in made:
            made[key] = make_preconditioner(moment, strength, axes[name], device)
    return {name: made[id(moment), axes[name]] for name, moment in moments.items()}
