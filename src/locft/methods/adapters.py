"""Puts PEFT's adapters into a model while a body runs."""

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from locft.errors import MissingExtraError, ModelError, first_line

_ADAPTER = "default"
_Values = Callable[[], dict[str, Tensor]]


def import_peft(method: str) -> Any:
    """Import PEFT, which not everybody has.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise MissingExtraError(f"method {method}", "study") from error


@contextmanager
def attached(
    model: PreTrainedModel, tuner_type: Any, config: Any
) -> Iterator[tuple[Any, Mapping[str, nn.Parameter], _Values]]:
    """Put adapters beside a model's linear layers while the body runs.

    Args:
        model: The model.
        tuner_type: A tuner of PEFT.
        config: Its configuration.

    Yields:
        The tuner, the adapters' parameters by name, and what gives the model's weights with the adapters
        merged in.

    Raises:
        ModelError: The model has no layers that PEFT can adapt.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuner = tuner_type(model, {_ADAPTER: config}, _ADAPTER)
    except (ValueError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be given adapters: {first_line(error)}"
        ) from error
    adapters = {name: one for name, one in model.named_parameters() if "lora_" in name}

    def values() -> dict[str, Tensor]:
        with torch.no_grad():
            return {
                f"{name}.weight": layer.base_layer.weight + layer.get_delta_weight(_ADAPTER)
                for name, layer in model.named_modules()
                if hasattr(layer, "base_layer")
            }

    try:
        yield tuner, adapters, values
    finally:
        tuner.unload()
