"""Between a model's parameters in memory and the tensors of its checkpoint files."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locft.errors import ModelError
from locft.tensorfile import TensorData, TensorEntry, read_tensor

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def match_tensors(
    model: PreTrainedModel, entries: Mapping[str, TensorEntry], parameters: Iterable[str]
) -> dict[str, str]:
    """Find what the checkpoint file calls each parameter, and prove it by the values.

    Args:
        model: The model as loaded from the checkpoint.
        entries: The checkpoint's tensors.
        parameters: Names of parameters in the model.

    Returns:
        The tensor's name in the checkpoint for each parameter.

    Raises:
        ModelError: A parameter does not stand in the file as one plain tensor.
    """
    names: dict[str, str] = {}
    for parameter in parameters:
        value = model.get_parameter(parameter).detach().cpu()
        for name in _spellings(model, parameter):
            entry = entries.get(name)
            if entry is None or entry.dtype not in _TORCH_DTYPES or entry.shape != value.shape:
                continue
            stored = to_tensor(TensorData(entry.dtype, entry.shape, read_tensor(entry)))
            if torch.equal(stored.to(value.dtype), value):
                names[parameter] = name
                break
        else:
            raise ModelError(
                f"{type(model).__name__} is refused: its checkpoint does not hold {parameter} as one "
                "plain tensor (it is fused, split or renamed in memory), so a patch could not name it"
            )
    return names


def match_parameters(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """Find the model's parameter for each tensor of its checkpoint.

    Raises:
        ModelError: The model has no such parameter.
    """
    parameters = dict(model.named_parameters())
    names: dict[str, str] = {}
    for tensor in tensors:
        found = [name for name in _spellings(model, tensor) if name in parameters]
        if not found:
            raise ModelError(f"{type(model).__name__} has no parameter for the tensor {tensor}")
        names[tensor] = found[0]
    return names


def stored_values(entries: Mapping[str, TensorEntry], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Read parameters from the checkpoint, unrounded, in the dtype that they are stored in.

    Args:
        entries: The checkpoint's tensors.
        names: The tensor's name in the checkpoint for each parameter.

    Returns:
        The values by parameter.
    """
    return {
        parameter: to_tensor(
            TensorData(entries[name].dtype, entries[name].shape, read_tensor(entries[name]))
        )
        for parameter, name in names.items()
    }


def to_data(value: Tensor, dtype: str) -> TensorData:
    """Round a tensor to a checkpoint's dtype.

    Args:
        value: Any tensor.
        dtype: The dtype as safetensors names it ("BF16").

    Returns:
        Its bytes, row-major.
    """
    rounded = value.detach().cpu().to(_TORCH_DTYPES[dtype]).contiguous()
    data = rounded.view(-1).view(torch.uint8).numpy().tobytes()
    return TensorData(dtype, tuple(value.shape), data)


def to_tensor(data: TensorData) -> Tensor:
    """Read a tensor from its bytes, in the dtype that they are in."""
    flat = torch.frombuffer(bytearray(data.data), dtype=_TORCH_DTYPES[data.dtype])
    return flat.view(data.shape)


@contextmanager
def swapped_in(model: PreTrainedModel, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give some parameters other values while the body runs, and their own back after it.

    Args:
        model: The model.
        values: New values by parameter name; cast to the model's dtype and moved to its device.
    """
    own = {name: model.get_parameter(name).detach().clone() for name in values}
    try:
        _put(model, values)
        yield
    finally:
        _put(model, own)


def _put(model: PreTrainedModel, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)


def _spellings(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """Spell a name with and without the base model's prefix: files are saved from either class."""
    prefix = f"{model.base_model_prefix}."
    return (name, name.removeprefix(prefix), prefix + name)
