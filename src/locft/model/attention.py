"""Attention over packed sequences: the one place where nodes of a prefix tree meet as sequences.

Registered with transformers' attention interface. A family that computes attention in a way of its own
does not come here; its tail then differs on the probe, and it is run padded instead.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from locft.model.packing import Packed

_NAME = "locft_packed"
_PACKED: ContextVar[Packed] = ContextVar("packed")

# Up to here, on a CPU, plain products take about half the time of the fused kernel, which is made for
# long sequences; beyond, their (T, T) scores would take memory.
_SHORT = 64


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
    packed = _PACKED.get()
    sequences, longest = packed.grid.shape
    queries, keys, values = (_spread(states, packed) for states in (query, key, value))
    if longest <= _SHORT and query.dtype == torch.float32 and query.device.type == "cpu":
        attended = _attend_short(queries, keys, values, scaling or query.shape[-1] ** -0.5)
    else:
        attended = nn.functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            is_causal=True,
            scale=scaling,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
    flat = attended.transpose(1, 2).reshape(sequences * longest, *attended.shape[1::2])
    return flat.index_select(0, packed.home).unsqueeze(0), None


def _spread(states: Tensor, packed: Packed) -> Tensor:
    """Turn (1, H, N, E) of nodes into (B, H, T, E) of sequences; padding holds what does not matter."""
    by_node = states[0].transpose(0, 1).index_select(0, packed.grid.flatten())
    return by_node.view(*packed.grid.shape, *by_node.shape[1:]).transpose(1, 2)


def _attend_short(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attend by plain products: (B, H, T, E), (B, K, T, E), (B, K, T, F) to (B, H, T, F)."""
    sequences, heads, longest, _ = queries.shape
    groups = sequences * keys.shape[1]
    together = heads // keys.shape[1]  # heads that share keys: one product for them all
    scores = torch.bmm(
        (queries * scaling).reshape(groups, together * longest, -1),
        keys.reshape(groups, longest, -1).transpose(1, 2),
    ).view(groups, together, longest, longest)
    later = torch.full((longest, longest), -torch.inf, dtype=scores.dtype).triu(1)
    weights = torch.softmax(scores + later, dim=-1).view(groups, together * longest, longest)
    attended = torch.bmm(weights, values.reshape(groups, longest, -1))
    return attended.view(sequences, heads, longest, -1)


AttentionInterface.register(_NAME, _attend)
