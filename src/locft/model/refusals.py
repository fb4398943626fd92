"""Why a model is refused, told from its configuration, before any weights are loaded."""

from collections.abc import Mapping
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from locft.checkpoint import quantisation

_STATE = "its layers hand on more than hidden states, so that layers below a location cannot be run once"
_PADDING = "padding on the right changes its predictions"
_ENCODER = "it is an encoder: its configuration does not say is_decoder"

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
    "prophetnet": _PADDING,
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


def why_refused(config: Mapping[str, Any]) -> str | None:
    """Say why a model of a configuration cannot be edited.

    Args:
        config: The model's configuration, as `config.json` holds it.

    Returns:
        The reason; None if nothing in the configuration speaks against it.
    """
    quantised = quantisation(config)
    if quantised is not None:
        return quantised
    if config.get("is_encoder_decoder"):
        return "it is an encoder-decoder, not a decoder"
    family = config.get("model_type")
    if family in CONFIG_MAPPING and family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"transformers has no causal language model of its kind ({family})"
    if family in _MAY_BE_ENCODERS and not config.get("is_decoder"):
        return _ENCODER
    return REFUSED.get(str(family))
