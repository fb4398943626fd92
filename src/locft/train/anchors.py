"""Texts on which a model is to stay what it was, and how far it has gone from there."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from locft.model.split import Tail
from locft.train.cache import PrefixCache
from locft.train.objective import kept_divergence

# Of what the unedited model predicts so many tokens are told apart; all others count as one.
_NUM_TOLD_APART = 64
_AT_ONCE = 8  # texts


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """Texts with what the unedited model predicts there. M predicted tokens, K of them told apart.

    Attributes:
        cache: The texts, with what enters the tuned layer.
        tokens: (M, K) the likeliest next tokens at each place.
        log_probs: (M, K + 1) their log-probabilities, and that of all others.
    """

    cache: PrefixCache
    tokens: Tensor
    log_probs: Tensor

    def divergence(self, tail: Tail, indices: Sequence[int]) -> Tensor:
        """Give KL(unedited || now) on some of the texts: a scalar with gradients, in nats per token.

        Tokens that are not told apart count as one, so that it is a little less than over all tokens.
        """
        batch = self.cache.batch(indices)
        starts = self.cache.starts
        places = np.concatenate([np.arange(starts[index], starts[index + 1]) for index in indices])
        rows = torch.from_numpy(places)
        device = self.cache.device
        logits = tail(batch.packed, batch.hidden, batch.asked)
        return kept_divergence(logits, self.tokens[rows].to(device), self.log_probs[rows].to(device))


def make_anchors(tail: Tail, cache: PrefixCache) -> Anchors:
    """Note what the unedited model predicts.

    Args:
        tail: The model's tail, its weights unedited.
        cache: The texts; what is target there is held.

    Returns:
        The anchors.
    """
    tokens: list[Tensor] = []
    log_probs: list[Tensor] = []
    with torch.no_grad():
        for indices in _passes(cache):
            batch = cache.batch(indices)
            logits = tail(batch.packed, batch.hidden, batch.asked)
            scores = torch.log_softmax(logits, dim=1, dtype=torch.float32)
            likeliest = scores.topk(min(_NUM_TOLD_APART, scores.shape[1]), dim=1)
            others = (1 - likeliest.values.exp().sum(dim=1, keepdim=True)).clamp(min=0).log()
            tokens.append(likeliest.indices.to("cpu", torch.int32))
            log_probs.append(torch.cat([likeliest.values, others], dim=1).cpu())
    return Anchors(cache=cache, tokens=torch.cat(tokens), log_probs=torch.cat(log_probs))


def mean_divergence(anchors: Anchors, tail: Tail) -> float:
    """Measure KL(unedited || now) on all of the texts, in nats per token."""
    starts = anchors.cache.starts
    with torch.no_grad():
        total = sum(
            anchors.divergence(tail, indices).item() * (starts[indices[-1] + 1] - starts[indices[0]])
            for indices in _passes(anchors.cache)
        )
    return float(total / starts[-1])


def _passes(cache: PrefixCache) -> list[range]:
    num = cache.num_examples
    return [range(first, min(first + _AT_ONCE, num)) for first in range(0, num, _AT_ONCE)]
