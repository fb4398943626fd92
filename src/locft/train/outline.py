"""Counts what a model does with a token, from its modules; their values do not matter."""

from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from locft.model.names import POINTWISE_NAMES, USUAL
from locft.model.structure import find_layers
from locft.train.cost import LayerSize, ModelSize

# What attention's output projection is called across the families of transformers.
_OUTPUT_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo")


def size_model(model: PreTrainedModel) -> ModelSize:
    """Measure a model's shapes.

    Args:
        model: A causal language model, on any device; the meta device holds no weights.

    Returns:
        Its size.

    Raises:
        ModelError: The model's layers cannot be found.
    """
    config = model.config.get_text_config(decoder=True)
    experts = getattr(config, "num_experts_per_tok", None) or 1
    layers = tuple(
        _size_layer(layer, config.hidden_size, experts) for layer in find_layers(model).modules
    )
    return ModelSize(
        layers=layers,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        number_bytes=model.dtype.itemsize,
    )


def _size_layer(layer: nn.Module, width: int, experts: int) -> LayerSize:
    size = LayerSize(
        queries=0,
        keys_values=0,
        attention_out=0,
        mlp_in=0,
        mlp_out=0,
        width=width,
        inner=0,
        attention_width=width,
        num_parameters=sum(parameter.numel() for parameter in layer.parameters()),
        shapes=(),
    )
    for name, parameter in layer.named_parameters():
        if parameter.dim() >= 2:
            size = _with_matrix(size, name, parameter, experts)
    return size


def _with_matrix(size: LayerSize, name: str, matrix: Tensor, experts: int) -> LayerSize:
    # Experts lie behind one another in one tensor, and some of them answer.
    answering = min(experts, len(matrix)) if matrix.dim() > 2 else 1
    rows, columns = matrix.shape[-2:]
    numbers = answering * rows * columns
    # A family that stores its matrices the other way round multiplies with as many numbers.
    shape = (columns, rows)
    size = replace(size, shapes=(*size.shapes, *[shape] * answering))
    path = name.split(".")
    if any(part in USUAL.attn for part in path):
        if any(part in _OUTPUT_NAMES for part in path):
            across = rows * columns // size.width
            return replace(size, attention_out=size.attention_out + numbers, attention_width=across)
        if any(part in POINTWISE_NAMES for part in path):
            return replace(size, queries=size.queries + numbers)
        return replace(size, keys_values=size.keys_values + numbers)
    if any(part in USUAL.down for part in path):
        inner = numbers // size.width
        return replace(size, mlp_out=size.mlp_out + numbers, inner=size.inner + inner)
    return replace(size, mlp_in=size.mlp_in + numbers)
