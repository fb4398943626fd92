"""The loss: cross-entropy on target tokens only (the paper's section 3, and its Table 8).

And how far predictions have gone from what they were, where they are to stay.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LossMean = Literal["sample", "token"]

# Logits in one piece of work: over a vocabulary of 50,000 to 250,000 tokens, all of them at once would
# leave every cache of a processor.
_PIECE = 2**19


def target_loss(logits: Tensor, labels: Tensor, rows: Tensor, mean: LossMean) -> Tensor:
    """Average the cross-entropy of target tokens.

    Args:
        logits: (M, V) at the positions that predict a target token.
        labels: (M,) the target tokens.
        rows: (M,) which example of the batch each belongs to; every example has one at least.
        mean: ``sample`` averages over each example's target tokens first and then over the batch,
            as the authors' script does; ``token`` averages over all target tokens, as
            LLaMA-Factory does.

    Returns:
        The loss, a float32 scalar, in nats.
    """
    if mean == "token":
        shares = torch.full(labels.shape, 1 / len(labels), device=logits.device)
    else:
        counts = torch.bincount(rows)
        shares = 1 / (counts[rows] * len(counts))
    loss: Tensor = _CrossEntropy.apply(logits, labels, shares)  # type: ignore[no-untyped-call]
    return loss


def predicted_share(logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Tell how much of each example's target is predicted, token by token.

    Args:
        logits: (M, V) at the positions that predict a target token.
        labels: (M,) the target tokens.
        rows: (M,) which example of the batch each belongs to; every example has one at least.

    Returns:
        (B,) float32: the share of each example's target tokens that no other token outscores.
    """
    # The most, not its place: to find that takes twenty times as long.
    is_right = logits.gather(1, labels[:, None])[:, 0] >= logits.amax(dim=1)
    counts = torch.bincount(rows)
    return torch.bincount(rows, weights=is_right.float(), minlength=len(counts)) / counts


def kept_divergence(logits: Tensor, tokens: Tensor, log_probs: Tensor) -> Tensor:
    """Average KL(kept || now) over places, where some tokens are told apart and all others count as one.

    Args:
        logits: (M, V) what is predicted now.
        tokens: (M, K) distinct tokens.
        log_probs: (M, K + 1) the log-probabilities to keep: of those tokens, and of all others.

    Returns:
        The mean, a float32 scalar, in nats.
    """
    mean: Tensor = _KeptDivergence.apply(logits, tokens.long(), log_probs)  # type: ignore[no-untyped-call]
    return mean


class _CrossEntropy(torch.autograd.Function):
    """Logits (M, V), labels (M,) and the labels' shares (M,) to the weighted sum of cross-entropies.

    The gradient is computed with the loss, while the logits are at hand; it has their dtype.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        losses = []
        size = max(1, _PIECE // logits.shape[1])
        for start in range(0, len(logits), size):
            piece = slice(start, start + size)
            label, share = labels[piece, None], shares[piece, None]
            scores = torch.log_softmax(logits[piece], dim=1, dtype=torch.float32)
            losses.append(-(scores.gather(1, label) * share).sum())
            if gradient is not None:
                scores.exp_().scatter_add_(1, label, torch.full_like(share, -1))
                gradient[piece] = scores.mul_(share)
        ctx.gradient = gradient
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient.mul_(gradient), None, None


class _KeptDivergence(torch.autograd.Function):
    """Logits (M, V), tokens (M, K) and log-probabilities (M, K + 1) to the mean divergence.

    The gradient is computed with it, while the logits are at hand; it has their dtype.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, log_probs: Tensor) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        divergences = []
        size = max(1, _PIECE // logits.shape[1])
        tiny = torch.finfo(torch.float32).tiny
        for start in range(0, len(logits), size):
            piece = slice(start, start + size)
            told, kept = tokens[piece], log_probs[piece]
            scores = torch.log_softmax(logits[piece], dim=1, dtype=torch.float32)
            now = scores.gather(1, told)
            others = (1 - now.exp().sum(dim=1, keepdim=True)).clamp(min=torch.finfo(torch.float32).eps)
            shares = kept.exp()
            gone = torch.cat([now, others.log()], dim=1)
            # What is never predicted is kept, too, however it is predicted now.
            divergences.append(torch.where(shares > tiny, shares * (kept - gone), 0).sum())
            if gradient is not None:
                scores.exp_().mul_(1 - shares[:, -1:] / others)
                at_told = now.exp() - shares[:, :-1]
                gradient[piece] = scores.scatter_(1, told, at_told).div_(len(logits))
        ctx.gradient = gradient
        return torch.stack(divergences).sum() / len(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient.mul_(gradient), None, None
