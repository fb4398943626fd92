"""Keeps what the frozen prefix hands on for every training example: computed once, read often."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from locft.data.encode import Encoded
from locft.model.split import Split
from locft.progress import progress

# Tokens per pass of the prefix: enough to fill the machine, little enough to fit it.
_TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class Batch:
    """Examples, right-padded to the longest. B examples, T tokens, D width, M target tokens.

    Attributes:
        ids: (B, T) token ids.
        hidden: (B, T, D) what the prefix hands on; zero at padding.
        rows: (M,) the example of each target token.
        columns: (M,) the position that predicts it.
        labels: (M,) the target token.
    """

    ids: Tensor
    hidden: Tensor
    rows: Tensor
    columns: Tensor
    labels: Tensor


@dataclass(frozen=True)
class PrefixCache:
    """The examples with the hidden states that enter the tuned layer.

    Attributes:
        examples: The examples.
        hidden: For each example (T, D), without padding, in the model's dtype and on its device.
    """

    examples: tuple[Encoded, ...]
    hidden: tuple[Tensor, ...]

    def batch(self, indices: Sequence[int]) -> Batch:
        """Put some examples together, padded on the right."""
        chosen = [self.examples[index] for index in indices]
        hidden = torch.nn.utils.rnn.pad_sequence(
            [self.hidden[index] for index in indices], batch_first=True
        )
        # The logits at a position predict the next token.
        positions = [
            (row, column, example.ids[column + 1])
            for row, example in enumerate(chosen)
            for column in range(example.target_start - 1, len(example.ids) - 1)
        ]
        rows, columns, labels = torch.tensor(positions, device=hidden.device).unbind(dim=1)
        return Batch(_pad(chosen, hidden.device), hidden, rows, columns, labels)


def build_cache(split: Split, examples: Sequence[Encoded]) -> PrefixCache:
    """Run the frozen prefix over all examples, once.

    Args:
        split: The model, split at the tuned layer.
        examples: What will be trained on.

    Returns:
        The cache, in the order of `examples`.
    """
    device = next(split.model.parameters()).device
    hidden: list[Tensor] = [torch.empty(0)] * len(examples)
    # Sorted by length, so that little is padded.
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
    with progress("caching the frozen layers", len(examples), "edits") as step:
        while order:
            longest = len(examples[order[-1]].ids)
            taken = order[-max(1, _TOKENS_PER_PASS // longest) :]
            del order[-len(taken) :]
            states = split.prefix(_pad([examples[index] for index in taken], device))
            for index, state in zip(taken, states, strict=True):
                # A copy, so that the padded whole is not kept alive.
                hidden[index] = state[: len(examples[index].ids)].clone()
            step(len(taken))
    return PrefixCache(tuple(examples), tuple(hidden))


def _pad(examples: Sequence[Encoded], device: torch.device) -> Tensor:
    # Which id pads does not matter: nothing looks at what stands to its right.
    longest = max(len(example.ids) for example in examples)
    rows = [[*example.ids, *[0] * (longest - len(example.ids))] for example in examples]
    return torch.tensor(rows, device=device)
