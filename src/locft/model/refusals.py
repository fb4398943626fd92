"""Why a model is refused, told from its configuration, before any weights are loaded."""

from collections.abc import Mapping
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from locft.checkpoint import quantisation

_STATE = "its layers hand on more than hidden states, so that layers below a location cannot be run once"
_PADDING = "padding on the right changes its predictions"
_ENCODER = (
    "it is an encoder: one that was trained as a decoder says is_decoder in its configuration, this one "
    "does not"
)

REFUSED: Mapping[str, str] = {
    "blt": "it reads bytes in patches, through several models in turn",
    "cpmant": _PADDING,
    "gemma3n": _STATE,
    "gemma3n_text": _STATE,
    "gemma4_assistant": "it drafts for another model, whose keys and values it reads",
    "gemma4_unified_assistant": "it drafts for another model, whose keys and values it reads",
    "hrm_text": "its layers are run over and over (recurrence in depth)",
    "hy_v4": _STATE,
    "mllama": "some of its layers attend to an image only, and do not run on text",
    "reformer": _STATE,
    "xlm": _PADDING,
    "xlnet": _PADDING,
    "zaya": _STATE,
}
"""Families that cannot be edited, by `model_type`, and why."""

# Of these, checkpoints of encoders are the rule, and the class for causal language modelling runs them.
_MAY_BE_ENCODERS = (
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


def why_quantised(config: Mapping[str, Any]) -> str | None:
    """Say why a model cannot be edited if its weights, or those of its text part, are quantised.

    Args:
        config: The model's configuration, as `config.json` holds it.

    Returns:
        The reason, and the way out; None if they are not quantised.
    """
    for part in (config, config.get("text_config")):
        quantised = quantisation(part) if isinstance(part, Mapping) else None
        if quantised is not None:
            return quantised
    return None


def why_refused(config: Mapping[str, Any]) -> str | None:
    """Say why models of a family cannot be edited.

    Args:
        config: The configuration of one, as `config.json` holds it.

    Returns:
        The reason; None if nothing in the configuration speaks against it.
    """
    if config.get("is_encoder_decoder"):
        return "it is an encoder-decoder, not a decoder"
    family = config.get("model_type")
    if not isinstance(family, str):
        return None  # nothing that transformers would load
    if family in CONFIG_MAPPING and family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"transformers does not load its kind ({family}) as a causal language model"
    if family in _MAY_BE_ENCODERS and not config.get("is_decoder"):
        return _ENCODER
    return REFUSED.get(family)
