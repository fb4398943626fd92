"""The loss: cross-entropy on target tokens only (the paper's section 3, and its Table 8)."""

from typing import Literal

import torch
from torch import Tensor

LossMean = Literal["sample", "token"]


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
    losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    if mean == "token":
        return losses.mean()
    counts = torch.bincount(rows)
    return (losses / counts[rows]).sum() / len(counts)
