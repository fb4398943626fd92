"""What families call the parts of a layer: the resolver's rules, as data.

Names of parts, not of models: a new family that names its parts as others do needs nothing here.
Where a name alone does not tell, `FAMILIES` says it for one family: adding one is a line.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the parts of a decoder layer may be called; paths begin at the part that holds them.

    Attributes:
        attn: The attention, in a layer.
        mlp: The MLP, or the mixture of experts, in a layer.
        experts: The routed experts, in a mixture.
        shared: The expert that answers for every token, in a mixture or beside it.
        routers: What chooses and weighs experts, in a mixture; it stays frozen.
        up: Up projections, in an MLP.
        down: Down projections, in an MLP.
        fused_up: Gate and up projections in one matrix, in an MLP.
        interleaved: Whether the rows of gate and up take turns there, instead of following one another.
        loose_up: Up projections of a layer that holds those of its MLP itself.
        loose_down: Its down projections.
    """

    attn: tuple[str, ...] = (
        "self_attn",
        "attn",
        "attention",
        "self_attention",
        "linear_attn",
        "multi_head_attention",
    )
    mlp: tuple[str, ...] = (
        "mlp",
        "feed_forward",
        "ffn",
        "ff",
        "feedforward",
        "block_sparse_moe",
        "mlp_block",
    )
    experts: tuple[str, ...] = ("experts",)
    shared: tuple[str, ...] = ("shared_experts", "shared_expert", "shared_mlp")
    routers: tuple[str, ...] = ("gate", "router", "shared_expert_gate")
    up: tuple[str, ...] = (
        "up_proj",
        "c_fc",
        "dense_h_to_4h",
        "fc1",
        "fc_in",
        "w3",
        "linear1",
        "wi",
        "proj_up",
    )
    down: tuple[str, ...] = (
        "down_proj",
        "c_proj",
        "dense_4h_to_h",
        "fc2",
        "fc_out",
        "w2",
        "linear2",
        "wo",
        "proj_down",
        "output_linear",
        "Wo",
    )
    fused_up: tuple[str, ...] = ("gate_up_proj", "input_linear", "Wi")
    interleaved: bool = False
    loose_up: tuple[str, ...] = ("fc1", "intermediate.dense")
    loose_down: tuple[str, ...] = ("fc2", "output.dense")


# Projections of an attention whose result at a position is used at that position alone.
POINTWISE_NAMES = ("q_proj", "o_proj", "out_proj", "dense")

USUAL = Names()
FAMILIES: Mapping[str, Names] = {
    "ctrl": replace(USUAL, up=("0",), down=("2",)),
    "gpt_oss": replace(USUAL, interleaved=True),
    "longcat_flash": replace(USUAL, routers=("router",)),
    "moshi": replace(USUAL, up=(), fused_up=("fc1",)),
    "recurrent_gemma": replace(USUAL, attn=("temporal_block",)),
    "rwkv": replace(USUAL, up=("key",), down=("value",)),
}
"""Names of a family, by the `model_type` of its decoder's configuration."""
