"""The closed forms of editors that treat a matrix as a memory.

A matrix W (O, K) gives W k for a key k. Keys (K, N) and residuals (O, N) stand in columns, one for each
of N edits; an update has W's shape. All is float64.
"""

import torch
from torch import Tensor

from locft.methods.memory.solve import factor


def rome_update(key: Tensor, direction: Tensor, residual: Tensor) -> Tensor:
    """Insert one key and its value: ROME (Meng et al. 2022, equation 2).

    Args:
        key: (K,) k, of the bare prompt.
        direction: (K,) u, along which W changes: C^-1 times the mean key.
        residual: (O,) what is missing of the value: v - W k.

    Returns:
        (O, K) the update, after which W gives v for k.
    """
    unit = direction / direction.norm()
    return torch.outer(residual / (key @ unit), unit)


def memit_update(keys: Tensor, residuals: Tensor, lower: Tensor) -> Tensor:
    """Insert many keys at once: MEMIT (Meng et al. 2023, equation 14), D = R K^T (S + K K^T)^-1.

    It minimises |D K - R|^2 + tr(D S D^T). The system solved is of N equations, not of K.

    Args:
        keys: (K, N).
        residuals: (O, N).
        lower: (K, K) the Cholesky factor of S = lambda C.

    Returns:
        (O, K) the update.
    """
    weighted = torch.cholesky_solve(keys, lower)  # S^-1 K
    small = keys.T @ weighted
    small.diagonal().add_(1)
    return residuals @ torch.cholesky_solve(weighted.T, torch.linalg.cholesky(small))


def keep_largest(update: Tensor, weight: Tensor, share: float) -> Tensor:
    """Keep that part of an update which changes weights most, relative to them: RECT (Gu et al. 2024).

    Args:
        update: (O, K).
        weight: (O, K) W before it.
        share: How much of it to keep, from 0 to 1; rounded to whole entries.

    Returns:
        (O, K) the update with zeros elsewhere; what is kept is as it was. Among equals the
        first are kept.
    """
    # A weight of zero changes without bound, but what is not changed does not count.
    relative = torch.where(update == 0, 0.0, (update / weight).abs())
    kept = torch.zeros(update.numel(), dtype=torch.bool, device=update.device)
    # topk may take any of several equal ones: sorting stably decides.
    order = torch.sort(relative.flatten(), descending=True, stable=True).indices
    kept[order[: round(share * update.numel())]] = True
    return torch.where(kept.view_as(update), update, 0.0)


def unused_directions(moment: Tensor, threshold: float) -> Tensor:
    """Find the directions that ordinary keys hardly use: AlphaEdit (Fang et al. 2025, section 3.1).

    Args:
        moment: (K, K) C, the uncentred second moment of keys.
        threshold: Eigenvalues of C under this count as none.

    Returns:
        (K, Q) orthonormal columns; none where no eigenvalue is so small.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    found: Tensor = vectors[:, values < threshold]
    return found


def alphaedit_update(
    keys: Tensor, residuals: Tensor, unused: Tensor, earlier: Tensor, ridge: float
) -> Tensor:
    """Insert keys along unused directions, and leave earlier ones alone: AlphaEdit, equation 14.

    With P = U U^T it minimises |D P K - R|^2 + tr(D P G P D^T) + a |D P|^2, and gives D P.

    Args:
        keys: (K, N).
        residuals: (O, N).
        unused: (K, Q) U, the unused directions.
        earlier: (K, K) G, the sum of k k^T over earlier batches.
        ridge: a.

    Returns:
        (O, K) the update.
    """
    inside = unused.T @ keys
    system = inside @ inside.T + unused.T @ earlier @ unused
    system.diagonal().add_(ridge)
    lower = factor(system, "AlphaEdit's system", "give ridge a larger value")
    return residuals @ torch.cholesky_solve(inside, lower).T @ unused.T


def ridge_update(inputs: Tensor, steps: Tensor) -> Tensor:
    """Make one update of the steps that many tokens ask for: UltraEdit (Gu et al. 2025, equation 6).

    Args:
        inputs: (T, K) H, a token's input in each row.
        steps: (T, O) V, what its output is to change by.

    Returns:
        (O, K) X^T with X = (H^T H + I)^-1 H^T V, by the smaller of the two systems.
    """
    num_tokens, width = inputs.shape
    system = inputs @ inputs.T if num_tokens < width else inputs.T @ inputs
    system.diagonal().add_(1)
    lower = torch.linalg.cholesky(system)
    if num_tokens < width:
        return (inputs.T @ torch.cholesky_solve(steps, lower)).T
    return torch.cholesky_solve(inputs.T @ steps, lower).T
