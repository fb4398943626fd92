"""Keeps what the frozen prefix hands on for every training example: computed once, read often.

It lies in a file without a name, mapped into memory: however many edits there are, the system may drop
any part of it and read it again, and it is gone when the process ends, however that ends.
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from locft.data.encode import Encoded
from locft.model.packing import Packed, PrefixTree, merge_prefixes
from locft.model.paging import page_out
from locft.model.split import Split
from locft.progress import progress
from locft.publish import require_space

# Tokens per pass of the prefix: enough to fill the machine, little enough to fit it.
TOKENS_PER_PASS = 2048


@dataclass(frozen=True)
class Batch:
    """Examples, packed. N nodes, D width, M target tokens.

    Attributes:
        packed: The examples' inputs: all their tokens but the last, from which nothing is predicted.
        hidden: (N, ...) what the prefix hands on for each node, usually (N, D).
        asked: (M,) the node that predicts each target token.
        rows: (M,) the example that each belongs to, from 0.
        labels: (M,) the target tokens.
    """

    packed: Packed
    hidden: Tensor
    asked: Tensor
    rows: Tensor
    labels: Tensor

    @property
    def num_examples(self) -> int:
        """How many examples it holds."""
        return len(self.packed.grid)


@dataclass(frozen=True)
class PrefixCache:
    """The examples, with the hidden states that enter the tuned layer. Made by `build_cache`.

    Attributes:
        tree: The prefix tree of the examples' inputs.
        hidden: (nodes of the tree, ...) their hidden states, in the model's dtype, on the CPU.
        labels: The target tokens of all examples, one example after the other.
        starts: Where each example's begin in `labels`, and where the last one's end.
        device: Where batches go.
        at_once: Whether all target tokens are predicted from the prompt's last token.
    """

    tree: PrefixTree
    hidden: Tensor
    labels: np.ndarray
    starts: np.ndarray
    device: torch.device
    at_once: bool = False

    @property
    def num_examples(self) -> int:
        """How many examples it holds."""
        return len(self.starts) - 1

    @property
    def num_bytes(self) -> int:
        """How large it is on the disk."""
        return self.hidden.nbytes

    def batch(self, indices: Sequence[int]) -> Batch:
        """Put some examples together."""
        packed, nodes = self.tree.pack(indices)
        labels = [self.labels[self.starts[index] : self.starts[index + 1]] for index in indices]
        counts = [len(of_example) for of_example in labels]
        # A node predicts the token after it: the last ones of each example predict its targets.
        asked = [
            np.repeat(self.tree.nodes_of(i)[-1:], count)
            if self.at_once
            else self.tree.nodes_of(i)[-count:]
            for i, count in zip(indices, counts, strict=True)
        ]
        return Batch(
            packed=packed.to(self.device),
            hidden=self.hidden[torch.from_numpy(nodes)].to(self.device),
            asked=torch.from_numpy(np.searchsorted(nodes, np.concatenate(asked))).to(self.device),
            rows=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(self.device),
            labels=torch.from_numpy(np.concatenate(labels).astype(np.int64)).to(self.device),
        )


def build_cache(
    split: Split,
    examples: Sequence[Encoded],
    folder: Path | None = None,
    *,
    at_once: bool = False,
) -> PrefixCache:
    """Run the frozen prefix over all examples, once.

    Args:
        split: The model, split at the tuned layer.
        examples: What will be trained on.
        folder: Where the file may lie; the system's folder for temporary files if None.
        at_once: Whether to predict all target tokens from the prompt's last token, each for itself.

    Returns:
        The cache, in the order of `examples`.

    Raises:
        InputError: The disk has no room for it.
    """
    tree = merge_prefixes(
        [example.ids[: example.target_start if at_once else -1] for example in examples]
    )
    targets = [example.ids[example.target_start :] for example in examples]
    starts = np.zeros(len(examples) + 1, dtype=np.int64)
    starts[1:] = np.cumsum([len(tokens) for tokens in targets])
    labels = np.fromiter((token for tokens in targets for token in tokens), np.int32, starts[-1])
    device = next(split.model.parameters()).device
    hidden = _run_over(tree, folder, lambda packed, _: split.prefix(packed.to(device)))
    page_out(split.model.parameters())  # the frozen layers are done with
    return PrefixCache(tree, hidden, labels, starts, device, at_once)


def advance_cache(
    cache: PrefixCache, split: Split, layer: int, folder: Path | None = None
) -> PrefixCache:
    """Run the layers between two tuned layers over all examples, not all of them from the first on.

    Args:
        cache: The examples, with what enters the split's layer.
        split: The model, split at that layer, with the weights that it had then.
        layer: The other layer, above.
        folder: Where the file may lie; the system's folder for temporary files if None.

    Returns:
        A cache of the same examples, with what enters the other layer.

    Raises:
        InputError: The disk has no room for it.
    """

    def run(packed: Packed, nodes: np.ndarray) -> Tensor:
        states = cache.hidden[torch.from_numpy(nodes)]
        return split.advance(packed.to(cache.device), states.to(cache.device), layer)

    return replace(cache, hidden=_run_over(cache.tree, folder, run))


class LayerCaches:
    """Caches for one layer after the other: that of a higher layer goes on from that of a lower one."""

    def __init__(self) -> None:
        self._last: tuple[Split, tuple[Encoded, ...], PrefixCache] | None = None

    def __call__(self, split: Split, examples: Sequence[Encoded]) -> PrefixCache:
        """Give the cache of some examples, as `build_cache` would; the model must be unedited."""
        cache: PrefixCache
        if self._last is None or self._last[1] != tuple(examples) or self._last[0].layer > split.layer:
            cache = build_cache(split, examples)
        elif self._last[0].layer == split.layer:
            cache = self._last[2]
        else:
            cache = advance_cache(self._last[2], self._last[0], split.layer)
        self._last = (split, tuple(examples), cache)
        return cache


def _run_over(
    tree: PrefixTree, folder: Path | None, run: Callable[[Packed, np.ndarray], Tensor]
) -> Tensor:
    """Run layers over all examples, in passes, and keep what comes out for each node of their tree."""
    hidden: Tensor | None = None
    with progress("caching the frozen layers", len(tree.order), "edits") as step:
        for indices in passes_of(tree):
            packed, nodes = tree.pack(indices)
            states = run(packed, nodes).cpu()
            if hidden is None:
                hidden = _mapped((len(tree.tokens), *states.shape[1:]), states.dtype, folder)
            hidden[torch.from_numpy(nodes)] = states
            step(len(indices))
    assert hidden is not None  # there is one example at least
    return hidden


def passes_of(tree: PrefixTree) -> Iterator[list[int]]:
    """Group examples that begin alike, as many as one pass may take.

    Args:
        tree: The prefix tree of the examples.

    Yields:
        The indices of the examples of one pass.
    """
    taken: list[int] = []
    longest = 0
    for index in tree.order.tolist():
        length = len(tree.nodes_of(index))
        if taken and (len(taken) + 1) * max(longest, length) > TOKENS_PER_PASS:
            yield taken
            taken, longest = [], 0
        taken.append(index)
        longest = max(longest, length)
    yield taken


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """Make a tensor in a file that has no name."""
    place = Path(tempfile.gettempdir()) if folder is None else folder
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    require_space(place, place, num_bytes, " for the frozen layers' output")
    with tempfile.TemporaryFile(dir=place) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(
                file.fileno(), 0, num_bytes
            )  # a full disk is an error now, not a crash later
        else:
            file.truncate(num_bytes)
        mapped = mmap.mmap(file.fileno(), num_bytes)
    return torch.frombuffer(mapped, dtype=dtype).view(shape)
