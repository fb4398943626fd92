"""Makes a tiny random model of any family that transformers loads for causal language modelling."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from locft.errors import ModelError

NUM_LAYERS = 4
VOCABULARY = 128

# What sizes are called in configurations, as patterns, and what they become; the first that fits counts.
# Settings that no pattern names keep their defaults. No two widths are equal, so that none passes for
# another.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"max_(source|target)_positions", 128),
    (r".*vocab_size|vocab_size_per_layer_input", VOCABULARY),
    (r"(|num_)(en|de)coder_layers|num_hidden_layers|n_layers?|num_layers|num_blocks", NUM_LAYERS),
    (r"(swa_)?num_key_value_heads|num_kv_heads|num_query_groups|n_mamba_heads|index_n_heads", 2),
    (r"(n|num|attention|(swa_)?num_attention)_heads?|(num_)?(en|de)coder_attention_heads", 4),
    (r"linear_num_(key_|value_)?heads|mamba_n_heads|mamba_num_heads", 4),
    (r"((qk_rope|qk_nope|v|linear|linear_key|linear_value|index|swa)_)?head_dim", 8),
    (r"d_head|dim_head|attention_head_size|kv_channels|rotary_dim|hidden_size_per_layer_input", 8),
    (r"mamba_d_state|(ssm_)?state_size|(mamba_)?chunk_size|time_step_rank|mamba_dt_rank", 8),
    (r"attention_head_dim|qk_head_dim|mamba_d_head|mamba_head_dim|(q|kv|o)_lora_rank", 16),
    (r"gated_norm_rank|index_topk|laurel_rank|hc_lowrank|d_rel|adapter_rank", 16),
    (r"(attention_|backbone_)?hidden_size|(|input_|output_)embedding_size|embedding_dim|emb_dim", 32),
    (r"d_model|n_embd|dim_model|word_embed_proj_dim|lru_width|mamba_headdim", 32),
    (r"(moe_(shared_expert_)?|shared_|shared_experts?_)intermediate_size|expert_ffn_hidden_size", 48),
    (r"(dense_)?intermediate_size(_mlp)?|((en|de)coder_)?ffn_dim|ffn_hidden_size|dff|dim_ff", 64),
    (r"d_inner|feed_forward_size|n_inner|mamba_d_ssm", 64),
    (r"n_routed_experts|(moe_)?num_(local_)?experts", 4),
    (r"num_experts_per_tok(en)?|moe_(top)?k", 2),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"n_groups?|topk_group|num_expert_group|num_limited_groups|mamba_n_groups", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length", 128),
    (r"sliding_window(_size)?|(attention_|keep_)?window_size", 64),
    (r"(bos|sep|cls)_token_id|decoder_start_token_id", 1),
    (r"eos_token_id|pad_token_id", 0),
)
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What a family, or a part of one, needs besides, by `model_type`.
_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_output_size": 32},
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
        "mlp_layer_types": ["dense"] * NUM_LAYERS,
    },
    "gpt_neo": {
        "attention_types": [[["global", "local"], 2]],
        "attention_layers": ["global", "local"] * 2,
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "llama4_text": {"moe_layers": list(range(NUM_LAYERS))},
    "longcat_flash": {"zero_expert_num": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal_audio": {"num_blocks": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
    },
    "xmod": {"default_language": "en_XX"},
    # Hybrid layers share their weights.
    "zamba": {
        "attention_hidden_size": 64,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
}


def family_names() -> tuple[str, ...]:
    """Name all families that transformers loads for causal language modelling, by `model_type`."""
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def class_name(family: str) -> str:
    """Name the class of a family's models."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return found if isinstance(found, str) else found[0]


def tiny_config(family: str) -> PreTrainedConfig:
    """Configure a tiny model of a family, as a decoder where it may be an encoder.

    Raises:
        ModelError: transformers does not make a configuration of these sizes.
    """
    try:
        kind = CONFIG_MAPPING[family]
        return kind(**_shrink(kind().to_dict()))
    except Exception as error:  # whatever a configuration finds wrong with itself
        raise ModelError(f"transformers cannot configure a tiny one: {_in_a_line(error)}") from error


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Build a model with random weights, in evaluation mode and frozen.

    Raises:
        ModelError: transformers cannot build it.
    """
    torch.manual_seed(seed)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever a class finds wrong with its configuration
        raise ModelError(f"transformers cannot build a tiny one: {_in_a_line(error)}") from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and not parameter.any():
                parameter.normal_(std=0.02)  # some begin at zero, where nothing could be seen
    model.eval()
    model.requires_grad_(False)
    return model


def _in_a_line(error: Exception) -> str:
    """Give an error's words, of which the first line may be the least telling."""
    return " ".join(str(error).split())


def _shrink(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give every setting that is a size a small value."""
    small: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            small[key] = _shrink(value)
        elif isinstance(value, list) and value and len(value) == config.get("num_hidden_layers"):
            # Of what is said of each layer, evenly spaced ones.
            small[key] = [value[i * (len(value) - 1) // (NUM_LAYERS - 1)] for i in range(NUM_LAYERS)]
        elif isinstance(value, int) and not isinstance(value, bool):
            fitting = [size for pattern, size in _SIZES if re.fullmatch(pattern, key)]
            if fitting:
                small[key] = fitting[0]
    for kind in ("", "swa_"):
        heads, groups = f"{kind}num_attention_heads", f"{kind}num_key_value_heads"
        if groups in small and config[groups] == config.get(heads):
            small[groups] = small[heads]
    if "is_decoder" in config:
        small["is_decoder"] = True
    return small | dict(_FAMILIES.get(config["model_type"], {}))
