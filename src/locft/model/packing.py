"""Lays token sequences out so that nothing is computed twice, and nothing for padding.

In a causal model the state at a position depends on the tokens up to it, and on nothing else. So
sequences that begin alike share their states there: each distinct beginning is one *node* of a prefix
tree. Nodes lie in one row, one after the other, for everything that is done position by position;
attention alone sees the sequences.

Shapes: B sequences, T tokens in the longest, N nodes.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Some sequences as the nodes of their prefix tree.

    Attributes:
        ids: (N,) the token of each node.
        positions: (N,) its position, from 0.
        grid: (B, T) the node at each place of each sequence; 0 at padding.
        home: (N,) for each node, a place where it stands, as an index into the flattened grid.
    """

    ids: Tensor
    positions: Tensor
    grid: Tensor
    home: Tensor

    def to(self, device: torch.device) -> "Packed":
        """Bring it to a device."""
        return Packed(
            *(tensor.to(device) for tensor in (self.ids, self.positions, self.grid, self.home))
        )

    def round_up(self, multiple: int) -> "Packed":
        """Repeat the last node until their number is a multiple; no sequence holds the repeats."""
        ids, positions, home = (
            round_up(line, multiple) for line in (self.ids, self.positions, self.home)
        )
        return Packed(ids, positions, self.grid, home)


@dataclass(frozen=True)
class PrefixTree:
    """The distinct beginnings of all sequences. Made by `merge_prefixes`.

    Attributes:
        tokens: The token of each node.
        positions: Its position.
        nodes: The nodes of all sequences, one sequence after the other.
        starts: Where each sequence's nodes begin in `nodes`, and where the last one's end.
        order: The sequences in an order in which those that begin alike are neighbours.
    """

    tokens: np.ndarray
    positions: np.ndarray
    nodes: np.ndarray
    starts: np.ndarray
    order: np.ndarray

    def nodes_of(self, index: int) -> np.ndarray:
        """Return the nodes of one sequence, from its first token on."""
        found: np.ndarray = self.nodes[self.starts[index] : self.starts[index + 1]]
        return found

    def pack(self, indices: Sequence[int]) -> tuple[Packed, np.ndarray]:
        """Lay some of the sequences out.

        Args:
            indices: Which; at least one.

        Returns:
            The sequences packed, in this order, and the tree's node behind each of theirs.
        """
        rows = [self.nodes_of(index) for index in indices]
        longest = max(len(row) for row in rows)
        places = np.concatenate([np.arange(len(row)) + i * longest for i, row in enumerate(rows)])
        chosen, home, local = np.unique(np.concatenate(rows), return_index=True, return_inverse=True)
        grid = np.zeros(len(rows) * longest, dtype=np.int64)
        grid[places] = local
        packed = Packed(
            ids=torch.from_numpy(self.tokens[chosen].astype(np.int64)),
            positions=torch.from_numpy(self.positions[chosen].astype(np.int64)),
            grid=torch.from_numpy(grid).view(len(rows), longest),
            home=torch.from_numpy(places[home]),
        )
        return packed, chosen


def lay_out(sequences: Tensor) -> Packed:
    """Lay sequences of equal length out side by side: one node for each token, none shared.

    Args:
        sequences: (B, T) token ids.

    Returns:
        The sequences, with B T nodes.
    """
    num, length = sequences.shape
    nodes = torch.arange(num * length)
    return Packed(
        ids=sequences.flatten(),
        positions=torch.arange(length).repeat(num),
        grid=nodes.view(num, length),
        home=nodes,
    )


def lay_out_ends(sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Packed:
    """Lay the ends of sequences of any length out side by side: one node for each token, none shared.

    Args:
        sequences: Token ids.
        starts: Where the end of each begins, an index below its length.

    Returns:
        The ends; of sequence after sequence, token by token.
    """
    ends = [list(sequence[start:]) for sequence, start in zip(sequences, starts, strict=True)]
    longest = max(map(len, ends))
    # Read in order, the places that hold a token are the nodes.
    held = torch.arange(longest) < torch.tensor([len(end) for end in ends])[:, None]
    home = held.flatten().nonzero()[:, 0]
    grid = torch.zeros(len(ends) * longest, dtype=torch.int64)
    grid[home] = torch.arange(len(home))
    return Packed(
        ids=torch.tensor([token for end in ends for token in end]),
        positions=torch.cat(
            [torch.arange(start, start + len(end)) for start, end in zip(starts, ends, strict=True)]
        ),
        grid=grid.view(len(ends), longest),
        home=home,
    )


def count_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens that two sequences begin with alike."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def round_up(rows: Tensor, multiple: int) -> Tensor:
    """Repeat the last of some rows until their number is a multiple."""
    extra = -len(rows) % multiple
    return torch.cat([rows, rows[-1:].expand(extra, *rows.shape[1:])]) if extra else rows


def merge_prefixes(sequences: Sequence[Sequence[int]]) -> PrefixTree:
    """Build the prefix tree of token sequences.

    Args:
        sequences: Token ids; each has one at least.

    Returns:
        The tree. Four bytes a number, since there may be millions.
    """
    order = sorted(range(len(sequences)), key=lambda index: tuple(sequences[index]))
    tokens, positions = array("i"), array("i")
    starts = np.zeros(len(sequences) + 1, dtype=np.int64)
    starts[1:] = np.cumsum([len(sequence) for sequence in sequences])
    nodes = np.empty(starts[-1], dtype=np.int32)
    before: Sequence[int] = ()
    path: list[int] = []
    for index in order:
        sequence = sequences[index]
        # In sorted order whatever a sequence shares with an earlier one it shares with the last.
        shared = count_shared(before, sequence)
        path[shared:] = range(len(tokens), len(tokens) + len(sequence) - shared)
        tokens.extend(sequence[shared:])
        positions.extend(range(shared, len(sequence)))
        nodes[starts[index] : starts[index + 1]] = path
        before = sequence
    return PrefixTree(
        np.array(tokens, dtype=np.int32),
        np.array(positions, dtype=np.int32),
        nodes,
        starts,
        np.array(order, dtype=np.int32),
    )
