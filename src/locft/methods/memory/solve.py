"""Linear systems of the editors' closed forms, in float64, and what to say if they have no solution."""

import torch
from torch import Tensor

from locft.errors import TrainingError

# Beyond that, float64 leaves fewer than four digits of the solution.
_WORST_CONDITION = 1e12


def factor(matrix: Tensor, what: str, remedy: str) -> Tensor:
    """Factor a symmetric positive definite matrix, so that systems with it can be solved.

    Args:
        matrix: (K, K).
        what: What it is, for the error.
        remedy: What to do if it cannot be factored.

    Returns:
        (K, K) float64, its lower Cholesky factor, for `torch.cholesky_solve`.

    Raises:
        TrainingError: It is singular, or so near to it that a solution would mean nothing.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix.double())
    pivots = lower.diagonal()
    # Never over the condition number, and seldom far under it.
    condition = torch.inf if failed else (pivots.max() / pivots.min()).item() ** 2
    if not condition < _WORST_CONDITION:
        found = "singular" if failed else f"ill-conditioned (condition number at least {condition:.1e})"
        if failed:
            values = torch.linalg.eigvalsh(matrix.double()).abs()
            found += f" (condition number {(values.max() / values.min()).item():.1e})"
        raise TrainingError(f"{what} is {found}, so that the edit is not determined: {remedy}")
    found_lower: Tensor = lower
    return found_lower
