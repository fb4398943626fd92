"""Splits a model at a layer into a frozen prefix, run once, and a tail, run at every step.

Layers below the tuned one never change, so what they hand on is a constant. The tail is the model's
own forward, in which the layers below pass their input through and the cached state is put in where
the tuned layer receives its input: masks, positions and soft-caps stay the model's own, in every
family. The head sees only the positions whose logits are asked for: over a vocabulary of 50,000 to
250,000 tokens that is most of its cost.

Shapes: B batch, T tokens, D width, M asked positions, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from locft.errors import ModelError, first_line
from locft.model.structure import Layers, find_layers

Tail = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Float32 logits agree to rounding. Bfloat16 ones are too coarse to compare by value, but what rounding
# does to predictions is far less than what a wrong mask does.
_LARGEST_DIFFERENCE = 2e-5
_LARGEST_DIVERGENCE = 0.02
_PROBE_LENGTHS = (11, 7)  # two rows of unequal length, so that right padding is probed too


class _PrefixDoneError(Exception):
    """Ends a forward pass as soon as the hidden states are at hand."""


@dataclass(frozen=True)
class Split:
    """A model, split at a layer. Made by `split_model`, which proves that the split is exact."""

    model: PreTrainedModel
    layers: Layers
    layer: int
    tuple_lengths: tuple[int, ...]  # per layer: how long a tuple it returns; 0 for a bare tensor

    def prefix(self, ids: Tensor) -> Tensor:
        """Run the layers below the split.

        Args:
            ids: (B, T) token ids, right-padded with any id.

        Returns:
            (B, T, D) the hidden states that enter the split's layer, detached.
        """
        kept: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append((args[0] if args else kwargs["hidden_states"]).detach())
            raise _PrefixDoneError

        handle = self.layers.modules[self.layer].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with torch.no_grad():
                self.model(input_ids=ids, use_cache=False)
        except _PrefixDoneError:
            pass
        finally:
            handle.remove()
        return kept[0]

    @contextmanager
    def tail(self) -> Iterator[Tail]:
        """Turn the model into its tail while the body runs.

        Yields:
            A function of ids (B, T), hidden states (B, T, D) from `prefix`, and the rows (M,) and
            columns (M,) of the positions to predict from, that returns their logits (M, V).
        """
        state: dict[str, Tensor] = {}

        def put_in(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (state["hidden"], *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": state["hidden"]}

        def run(ids: Tensor, hidden: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
            state["hidden"] = hidden
            return logits_at(self.model, rows, columns, input_ids=ids)

        with ExitStack() as undo:
            for layer, length in zip(
                self.layers.modules[: self.layer], self.tuple_lengths, strict=False
            ):
                undo.callback(_restore_forward, layer, vars(layer).get("forward"))
                layer.forward = _pass_through(length)
            tuned = self.layers.modules[self.layer]
            handle = tuned.register_forward_pre_hook(put_in, with_kwargs=True)
            undo.callback(handle.remove)
            try:
                yield run
            finally:
                state.clear()


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
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    longest, shorter = _PROBE_LENGTHS
    # Two rows of spread ids that every vocabulary has; the second row's end is padding.
    ids = (torch.arange(2 * longest, device=device) * 7 + 5).remainder(vocabulary).view(2, longest)
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
    split = Split(model, layers, layer, tuple(lengths[0] for lengths in returned))
    rows = torch.tensor([0, 0, 1], device=device)
    columns = torch.tensor([1, longest - 1, shorter - 1], device=device)
    with torch.no_grad():
        hidden = split.prefix(ids)
        # State that a layer keeps for a later one must not happen to fit the probe.
        split.prefix(ids.flip(0))
        with split.tail() as tail:
            logits = tail(ids, hidden, rows, columns)
    # Same batch, same kernels: equal but for the head's different number of rows.
    _refuse_unless_close(name, "its tail does not equal its full forward", logits, full[rows, columns])
    _refuse_unless_close(name, "right padding changes its logits", alone[:, -1], full[1:, shorter - 1])
    return split


def _restore_forward(layer: nn.Module, own: Callable[..., Any] | None) -> None:
    # Other libraries' hooks may have given the layer a forward of its own.
    if own is None:
        del layer.forward
    else:
        layer.forward = own


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
