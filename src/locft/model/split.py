"""Splits a model at a layer into a frozen prefix, run once, and a tail, run at every step.

Layers below the tuned one never change, so what they hand on is a constant. The tail is the model's
own forward, in which the layers below pass their input through and the cached state is put in where
the tuned layer receives its input: masks, positions and soft-caps stay the model's own, in every
family.

Three things are left out that no result depends on. Sequences are packed (`model/packing.py`), so that
nothing is computed for padding, nor twice for a common beginning. The head sees only the positions
whose logits are asked for: over a vocabulary of 50,000 to 250,000 tokens that is most of its cost. And
so does what the last layer does position by position. Families that do not allow it, which a probe
tells, are run padded, or with a whole last layer.

Shapes: B sequences, T tokens in the longest, N nodes of the packed sequences, M asked positions,
V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from locft.errors import ModelError, first_line
from locft.model.attention import attention_configs, longest_unwindowed, packed_attention
from locft.model.packing import Packed, merge_prefixes, round_up
from locft.model.products import bfloat16_products, replace_forward
from locft.model.structure import Layers, find_layers, find_pointwise

Tail = Callable[[Packed, Tensor, Tensor], Tensor]
# Float32 logits agree to rounding. Bfloat16 ones are too coarse to compare by value, but what rounding
# does to predictions is far less than what a wrong mask does.
_LARGEST_DIFFERENCE = 2e-5
_LARGEST_DIVERGENCE = 0.02
# Of unequal length, so that right padding is probed, too; they begin alike, so that a node has two
# successors.
_PROBE_LENGTHS = (11, 7)
_PROBE_SHARED = 3
# For products in bfloat16, oneDNN makes code for each number of rows that it meets, and keeps it: over a
# run that came to 200 MB. So batches come in few sizes.
_NODES_MULTIPLE = 16
_ASKED_MULTIPLE = 8


class _PrefixDoneError(Exception):
    """Ends a forward pass as soon as the hidden states are at hand."""


@dataclass(frozen=True)
class Split:
    """A model, split at a layer. Made by `split_model`, which proves that the split is exact.

    Attributes:
        model: The model.
        layers: Its layers.
        layer: The first layer of the tail.
        tuple_lengths: Per layer, how long a tuple it returns; 0 for a bare tensor.
        configs: What the model's modules read their kind of attention from.
        longest_packed: The longest sequence that may be packed; 0 for a family that cannot be.
        pointwise: Modules of the last layer that need to run at asked positions only.
    """

    model: PreTrainedModel
    layers: Layers
    layer: int
    tuple_lengths: tuple[int, ...]
    configs: tuple[PreTrainedConfig, ...]
    longest_packed: float
    pointwise: tuple[nn.Module, ...]

    def prefix(self, packed: Packed) -> Tensor:
        """Run the layers below the split.

        Args:
            packed: Token sequences, on the model's device.

        Returns:
            (N, ...) the hidden states that enter the split's layer, usually of shape (N, D), detached.
        """
        return self._run_until(self.layer, packed)

    def advance(self, packed: Packed, hidden: Tensor, layer: int) -> Tensor:
        """Run the layers from the split on, up to another layer.

        Args:
            packed: Token sequences, on the model's device.
            hidden: (N, ...) what `prefix` gave for them.
            layer: The layer to stop at; above the split's.

        Returns:
            (N, ...) the hidden states that enter that layer, detached.
        """
        with ExitStack() as undo:
            self._enter(undo, {"hidden": self._unpacked(packed, hidden)})
            return self._run_until(layer, packed)

    def _run_until(self, layer: int, packed: Packed) -> Tensor:
        """Run the model up to what enters a layer."""
        kept: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append((args[0] if args else kwargs["hidden_states"]).detach())
            raise _PrefixDoneError

        handle = self.layers.modules[layer].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with torch.no_grad(), self._laid_out(packed) as inputs:
                self.model(**inputs, use_cache=False)
        except _PrefixDoneError:
            pass
        finally:
            handle.remove()
        return kept[0][0] if self.packs(packed) else kept[0].flatten(0, 1)[packed.home]

    def run_through(self, packed: Packed) -> None:
        """Run the model up to the split's layer, that layer included, for hooks that listen in it.

        Args:
            packed: Token sequences, on the model's device; every position of theirs is run.
        """
        if self.layer + 1 < len(self.layers):
            self._run_until(self.layer + 1, packed)
            return
        first = torch.zeros(1, dtype=torch.int64, device=packed.ids.device)
        with torch.no_grad(), self._laid_out(packed) as inputs:
            logits_at(self.model, first, first, **inputs)  # one position is enough for the head

    def places(self, packed: Packed) -> Tensor:
        """Tell where the nodes (N,) of packed sequences lie among the positions that layers see."""
        return torch.arange(len(packed.ids)) if self.packs(packed) else packed.home.cpu()

    def _unpacked(self, packed: Packed, hidden: Tensor) -> Tensor:
        """Lay hidden states out as the model's layers take them."""
        return hidden.unsqueeze(0) if self.packs(packed) else hidden[packed.grid]

    def _enter(self, undo: ExitStack, state: dict[str, Tensor]) -> None:
        """Let the split's layer receive `state["hidden"]`, whatever comes from below."""

        def put_in(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (state["hidden"], *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": state["hidden"]}

        below = self.layers.modules[: self.layer]
        for layer, length in zip(below, self.tuple_lengths, strict=False):
            replace_forward(undo, layer, _pass_through(length))
        first = self.layers.modules[self.layer]
        undo.callback(first.register_forward_pre_hook(put_in, with_kwargs=True).remove)

    @contextmanager
    def tail(
        self, *, in_bfloat16: bool = False, compiled: str | None = None, from_tokens: bool = False
    ) -> Iterator[Tail]:
        """Turn the model into its tail while the body runs.

        Args:
            in_bfloat16: Compute the products of linear layers with bfloat16 factors; for a float32
                model. Logits then are bfloat16. Which weights have gradients must be settled by now.
            compiled: The backend of torch.compile to compile each layer with; None for none. It cannot
                see through products in bfloat16.
            from_tokens: Let the tail be the whole model, from token ids on, whatever hidden states it is
                given: where not even the embeddings are frozen.

        Yields:
            A function of packed sequences, the hidden states (N, ...) of their nodes from `prefix`, and
            the nodes (M,) to predict from, that returns their logits (M, V).
        """
        state: dict[str, Tensor] = {}

        def run(packed: Packed, hidden: Tensor, asked: Tensor) -> Tensor:
            num_asked = len(asked)
            is_packed = self.packs(packed)
            if in_bfloat16:
                packed, hidden = packed.round_up(_NODES_MULTIPLE), round_up(hidden, _NODES_MULTIPLE)
                asked = round_up(asked, _ASKED_MULTIPLE)
            state["hidden"] = self._unpacked(packed, hidden)
            places = asked if is_packed else packed.home[asked]
            # Distinct, since sequences may ask the same node.
            state["places"] = torch.unique(places)
            longest = packed.grid.shape[1]
            rows = torch.zeros_like(places) if is_packed else places // longest
            columns = places if is_packed else places % longest
            with self._laid_out(packed) as inputs:
                return logits_at(self.model, rows, columns, **inputs)[:num_asked]

        with ExitStack() as undo:
            tail = self.layers.modules[0 if from_tokens else self.layer :]
            if in_bfloat16:
                head = self.model.get_output_embeddings()
                undo.enter_context(bfloat16_products((*tail, head), rounded=head))
            for module in self.pointwise:
                replace_forward(undo, module, _at_places(module.forward, state))
            if compiled is not None:
                for layer in tail:
                    # Sequences have any length, and another one must not compile anew.
                    compiled_forward = torch.compile(layer.forward, backend=compiled, dynamic=True)
                    replace_forward(undo, layer, compiled_forward)
            if not from_tokens:
                self._enter(undo, state)
            try:
                yield run
            finally:
                state.clear()

    def packs(self, packed: Packed) -> bool:
        """Say whether sequences are run packed, rather than padded."""
        return packed.grid.shape[1] <= self.longest_packed

    @contextmanager
    def _laid_out(self, packed: Packed) -> Iterator[dict[str, Tensor]]:
        """Say what the model's forward takes for some sequences; the body runs it."""
        if self.packs(packed):
            with packed_attention(self.configs, packed):
                yield {"input_ids": packed.ids[None], "position_ids": packed.positions[None]}
        else:
            # Right padding needs no mask under a causal one. Which id pads does not matter.
            yield {"input_ids": packed.ids[packed.grid]}


def logits_at(model: PreTrainedModel, rows: Tensor, columns: Tensor, **inputs: Tensor) -> Tensor:
    """Run a model's forward, its head at some positions only.

    Args:
        model: A causal language model with an output head.
        rows: (M,) the rows of the positions.
        columns: (M,) their columns.
        inputs: What the forward takes: `input_ids` (B, T), and others.

    Returns:
        (M, V) logits.
    """

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][rows, columns].unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return logits[0]


def split_model(model: PreTrainedModel, layer: int) -> Split:
    """Split a model at a layer and check on a probe that its tail equals its full forward.

    Args:
        model: A causal language model, in evaluation mode.
        layer: Index of the first layer of the tail, from 0.

    Returns:
        The split.

    Raises:
        ModelError: The model is refused: a layer does not run exactly once, there is no output
            head, right padding changes the logits, or the tail does not equal the full forward.
    """
    try:
        return _split_and_probe(model, layer)
    except ModelError:
        raise
    except Exception as error:  # whatever a model does that is built in another way
        raise ModelError(
            f"{type(model).__name__} is refused: it cannot be split: {first_line(error)}"
        ) from error


def _split_and_probe(model: PreTrainedModel, layer: int) -> Split:
    layers = find_layers(model)
    name = type(model).__name__
    if not isinstance(model.get_output_embeddings(), nn.Module):
        raise ModelError(f"{name} is refused: it has no output head over its vocabulary")
    device = next(model.parameters()).device
    packed = _probe_sequences(model).to(device)
    ids = packed.ids[packed.grid]
    longest, shorter = _PROBE_LENGTHS
    returned: list[list[int]] = [[] for _ in layers.modules]

    def watch(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            returned[index].append(len(output) if isinstance(output, tuple) else 0)

        return note

    with ExitStack() as undo, torch.no_grad():
        for index, module in enumerate(layers.modules):
            undo.callback(module.register_forward_hook(watch(index)).remove)
        full = model(input_ids=ids, use_cache=False).logits
        alone = model(input_ids=ids[1:, :shorter], use_cache=False).logits
    runs = {len(lengths) for lengths in returned}
    if runs != {2}:
        raise ModelError(
            f"{name} is refused: its layers ({layers.prefix}) do not each run exactly once in a pass"
        )
    _refuse_unless_close(name, "right padding changes its logits", alone[:, -1], full[1:, shorter - 1])
    lengths = tuple(lengths[0] for lengths in returned)
    # Also where the second sequence leaves the first, and the node before stands elsewhere.
    rows = torch.tensor([0, 0, 1, 1], device=device)
    columns = torch.tensor([1, longest - 1, _PROBE_SHARED, shorter - 1], device=device)
    asked, expected = packed.grid[rows, columns], full[rows, columns]
    # The cheapest way of running the tail that gives the model's own logits.
    longest_packed = longest_unwindowed(model)
    lengths_packed = (longest_packed, 0) if longest_packed >= longest else (0,)
    ways = product(lengths_packed, (find_pointwise(layers.modules[-1], layers.names), ()))
    splits = [Split(model, layers, layer, lengths, attention_configs(model), *way) for way in ways]
    for split in splits[:-1]:
        try:
            _probe(split, packed, asked, expected)
        except Exception:
            continue
        return split
    _probe(splits[-1], packed, asked, expected)
    return splits[-1]


def _probe_sequences(model: PreTrainedModel) -> Packed:
    """Make two sequences of spread ids that every vocabulary has."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    longest, shorter = _PROBE_LENGTHS
    first = [(index * 7 + 5) % vocabulary for index in range(longest)]
    second = [(index * 7 + 5) % vocabulary for index in range(longest, longest + shorter)]
    packed, _ = merge_prefixes([first, first[:_PROBE_SHARED] + second[_PROBE_SHARED:]]).pack([0, 1])
    return packed


def _probe(split: Split, packed: Packed, asked: Tensor, expected: Tensor) -> None:
    """Refuse a split whose tail does not give the full forward's logits (M, V) at asked nodes (M,)."""
    with torch.no_grad():
        hidden = split.prefix(packed)
        # State that a layer keeps for a later one must not happen to fit the probe.
        split.prefix(Packed(packed.ids.flip(0), packed.positions, packed.grid, packed.home))
        with split.tail() as tail:
            logits = tail(packed, hidden, asked)
    name = type(split.model).__name__
    _refuse_unless_close(name, "its tail does not equal its full forward", logits, expected)


def _at_places(forward: Callable[[Tensor], Tensor], state: dict[str, Tensor]) -> Callable[..., Any]:
    """Let a module run at the asked places only, and give zero elsewhere."""

    def run(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        flat, places = states.flatten(0, 1), state["places"]
        found = forward(flat.index_select(0, places)[None], *args, **kwargs)[0]
        whole = found.new_zeros(len(flat), *found.shape[1:]).index_copy(0, places, found)
        return whole.view(*states.shape[:2], *found.shape[1:])

    return run


def _pass_through(tuple_length: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *[None] * (tuple_length - 1)) if tuple_length else hidden

    return forward


def _refuse_unless_close(name: str, reason: str, got: Tensor, expected: Tensor) -> None:
    """Compare logits (M, V): by their values in float32, by their predictions where those are coarse."""
    if expected.dtype == torch.float32:
        difference = (got - expected).abs().max() / expected.abs().max()
        bound, what = _LARGEST_DIFFERENCE, "relative difference"
    else:
        predicted = torch.log_softmax(expected.float(), dim=-1)
        found = torch.log_softmax(got.float(), dim=-1)
        difference = (predicted.exp() * (predicted - found)).sum(dim=-1).max()
        bound, what = _LARGEST_DIVERGENCE, "KL divergence in nats"
    if not difference.item() <= bound:  # also true for NaN
        raise ModelError(
            f"{name} is refused: {reason} on a probe (largest {what} {difference.item():.3g}, at most "
            f"{bound:g} expected)"
        )
