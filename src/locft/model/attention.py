"""Attention over packed sequences: the one place where nodes of a prefix tree meet as sequences.

Registered with transformers' attention interface. A family that computes attention in a way of its own
does not come here; its tail then differs on the probe, and it is run padded instead.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from locft.model.packing import Packed

_NAME = "locft_packed"
_PACKED: ContextVar[Packed] = ContextVar("packed")
States = Mapping[nn.Module, tuple[Tensor, Tensor]]

# Up to here, on a CPU, plain products take about half the time of the fused kernel, which is made for
# long sequences; beyond, their (T, T) scores would take memory.
_SHORT = 64


@dataclass(frozen=True)
class Past:
    """What sequences begin with, where it stays as it is and need not be run again.

    Attributes:
        states: Keys (1, K, P, E) and values (1, K, P, F) of P nodes that were run before, of each
            attention module; from `kept_states`.
        grid: (B, T) the node at each place of each sequence: one of those P, or P and more for those
            that are run now; anything at padding.
    """

    states: States
    grid: Tensor


_PAST: ContextVar[Past | None] = ContextVar("past", default=None)
_KEPT: ContextVar[dict[nn.Module, tuple[Tensor, Tensor]] | None] = ContextVar("kept", default=None)


@contextmanager
def kept_states() -> Iterator[States]:
    """Keep the keys and values of packed sequences that are run while the body runs; for one run."""
    kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    token = _KEPT.set(kept)
    try:
        yield kept
    finally:
        _KEPT.reset(token)


@contextmanager
def behind(past: Past | None) -> Iterator[None]:
    """Let packed sequences stand behind what they begin with while the body runs.

    What is run then has a place in the sequence by its position, as ever.
    """
    token = _PAST.set(past)
    try:
        yield
    finally:
        _PAST.reset(token)


@contextmanager
def packed_attention(configs: Sequence[PreTrainedConfig], packed: Packed) -> Iterator[None]:
    """Let a model's attention see packed sequences while the body runs its forward.

    Args:
        configs: What its attention modules read (`attention_configs`).
        packed: What its input (1, N) holds.
    """
    # Not through the property, which sets what stands below a configuration, too, and forgets it.
    own = [config._attn_implementation_internal for config in configs]
    token = _PACKED.set(packed)
    try:
        for config in configs:
            config._attn_implementation_internal = _NAME
        yield
    finally:
        for config, name in zip(configs, own, strict=True):
            config._attn_implementation_internal = name
        _PACKED.reset(token)


def attention_configs(model: PreTrainedModel) -> tuple[PreTrainedConfig, ...]:
    """List the configurations that a model's modules hold."""
    held = (getattr(module, "config", None) for module in model.modules())
    return tuple({id(one): one for one in held if isinstance(one, PreTrainedConfig)}.values())


def longest_unwindowed(model: PreTrainedModel) -> float:
    """Say up to how many tokens a sequence is seen whole by every layer; infinity if always."""
    config = model.config.get_text_config(decoder=True)
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((window for window in windows if isinstance(window, int)), default=math.inf)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each sequence.

    Args:
        module: The attention module.
        query: (1, H, N, E) queries of the nodes.
        key: (1, K, N, E) keys, K a divisor of H.
        value: (1, K, N, F) values.
        attention_mask: None.
        scaling: What scores are multiplied by; 1 / sqrt(E) if None.
        softcap: None; others are not for packed sequences.
        s_aux: None.
        position_bias: None.

    Returns:
        (1, N, H, F), and no weights.

    Raises:
        NotImplementedError: The family's attention is more than that.
    """
    extras = (attention_mask, softcap, s_aux, position_bias)
    if any(extra is not None for extra in extras) or not getattr(module, "is_causal", True):
        raise NotImplementedError("attention with a mask, a cap, sinks or biases of its own")
    packed, past, kept = _PACKED.get(), _PAST.get(), _KEPT.get()
    if kept is not None:
        kept[module] = (key.detach(), value.detach())
    if past is None:
        grid, later = packed.grid, _later(torch.arange(packed.grid.shape[1], device=key.device))
    else:
        earlier_keys, earlier_values = past.states[module]
        key = torch.cat([earlier_keys, key], dim=2)
        value = torch.cat([earlier_values, value], dim=2)
        grid = past.grid
        later = _later(packed.positions[packed.grid], grid.shape[1])[:, None]
    queries = _spread(query, packed.grid)
    keys, values = (_spread(states, grid) for states in (key, value))
    sequences, longest = packed.grid.shape
    if grid.shape[1] <= _SHORT and query.dtype == torch.float32 and query.device.type == "cpu":
        attended = _attend_short(queries, keys, values, later, scaling or query.shape[-1] ** -0.5)
    else:
        attended = nn.functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=None if past is None else ~later,
            is_causal=past is None,
            scale=scaling,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
    flat = attended.transpose(1, 2).reshape(sequences * longest, *attended.shape[1::2])
    return flat.index_select(0, packed.home).unsqueeze(0), None


def _later(positions: Tensor, longest: int | None = None) -> Tensor:
    """Say which places (..., Q, T) come after positions (..., Q), and so are not seen from there."""
    length = positions.shape[-1] if longest is None else longest
    return torch.arange(length, device=positions.device) > positions[..., None]


def _spread(states: Tensor, grid: Tensor) -> Tensor:
    """Turn (1, H, N, E) of nodes into (B, H, T, E) of sequences; padding holds what does not matter."""
    by_node = states[0].transpose(0, 1).index_select(0, grid.flatten())
    return by_node.view(*grid.shape, *by_node.shape[1:]).transpose(1, 2)


def _attend_short(
    queries: Tensor, keys: Tensor, values: Tensor, later: Tensor, scaling: float
) -> Tensor:
    """Attend by plain products.

    Args:
        queries: (B, H, Q, E).
        keys: (B, K, T, E).
        values: (B, K, T, F).
        later: (Q, T) or (B, 1, Q, T), which places are not seen.
        scaling: What scores are multiplied by.

    Returns:
        (B, H, Q, F).
    """
    sequences, heads, num_queries, _ = queries.shape
    longest = keys.shape[2]
    groups = sequences * keys.shape[1]
    together = heads // keys.shape[1]  # heads that share keys: one product for them all
    scores = torch.bmm(
        (queries * scaling).reshape(groups, together * num_queries, -1),
        keys.reshape(groups, longest, -1).transpose(1, 2),
    ).view(sequences, heads, num_queries, longest)
    weights = torch.softmax(scores + _minus_infinity(later, scores.dtype), dim=-1)
    attended = torch.bmm(
        weights.view(groups, together * num_queries, longest), values.reshape(groups, longest, -1)
    )
    return attended.view(sequences, heads, num_queries, -1)


def _minus_infinity(where: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(where.shape, dtype=dtype).masked_fill(where, -torch.inf)


AttentionInterface.register(_NAME, _attend)
