"""Weights between a model in memory and its checkpoint, where it is known what belongs together."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locft.tensorfile import TensorData, TensorEntry, read_tensor

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def to_data(value: Tensor, dtype: str) -> TensorData:
    """Round a tensor to a checkpoint's dtype.

    Args:
        value: Any tensor.
        dtype: The dtype as safetensors names it ("BF16").

    Returns:
        Its bytes, row-major.
    """
    rounded = value.detach().cpu().to(TORCH_DTYPES[dtype]).contiguous()
    data = rounded.view(-1).view(torch.uint8).numpy().tobytes()
    return TensorData(dtype, tuple(value.shape), data)


def to_tensor(data: TensorData) -> Tensor:
    """Read a tensor from its bytes, in the dtype that they are in."""
    flat = torch.frombuffer(bytearray(data.data), dtype=TORCH_DTYPES[data.dtype])
    return flat.view(data.shape)


class View(NamedTuple):
    """Evenly spaced positions in a vector, as `Tensor.as_strided` takes them."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int


# Where a tensor's elements lie in a vector. Positions that are not evenly spaced are listed, in the
# tensor's shape.
Positions = View | Tensor


def take(vector: Tensor, positions: Positions) -> Tensor:
    """Read the elements at some positions of a vector."""
    return vector.as_strided(*positions) if isinstance(positions, View) else vector[positions]


def put(vector: Tensor, positions: Positions, values: Tensor) -> None:
    """Write values to some positions of a vector, rounded to its dtype."""
    if isinstance(positions, View):
        vector.as_strided(*positions).copy_(values)
    else:
        vector[positions] = values.to(vector.dtype)


def contiguous(shape: tuple[int, ...]) -> View:
    """Return the positions of a tensor in the vector of its own elements, row-major."""
    return View(shape, torch.empty(shape, device="meta").stride(), 0)


@dataclass(frozen=True)
class Block:
    """Parameters and tensors of the file that hold the same elements, all of which a vector lists.

    Attributes:
        shapes: The parameters' shapes by name; the vector lists their elements one parameter after
            the other, row-major.
        positions: Where the elements of each tensor lie in the vector, by the file's name for it.
    """

    shapes: Mapping[str, tuple[int, ...]]
    positions: Mapping[str, Positions]

    @property
    def num_elements(self) -> int:
        """The length of the vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """Copy values of all parameters into one vector."""
        return torch.cat([values[name].reshape(-1) for name in self.shapes])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """View a vector as the parameters."""
        parts = torch.split(vector, [math.prod(shape) for shape in self.shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def read(self, entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
        """Read the parameters from the file, unrounded; elements that it does not hold are NaN."""
        dtypes = [TORCH_DTYPES[entries[tensor].dtype] for tensor in self.positions]
        vector = torch.full((self.num_elements,), math.nan, dtype=reduce(torch.promote_types, dtypes))
        for tensor, positions in self.positions.items():
            entry = entries[tensor]
            data = TensorData(entry.dtype, entry.shape, read_tensor(entry))
            put(vector, positions, to_tensor(data))
        return self.split(vector)


@dataclass(frozen=True)
class WeightMap:
    """The map between parameters in memory and the tensors of the checkpoint that hold them.

    It is proven by the values, holds no weights, and is whole in both directions: all elements of its
    parameters are elements of its tensors, and the other way round.

    Attributes:
        entries: The checkpoint's tensors.
        blocks: What belongs together: a parameter and a tensor of any name, as a rule.
    """

    entries: Mapping[str, TensorEntry]
    blocks: tuple[Block, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors' names in the checkpoint, sorted."""
        return tuple(sorted(tensor for block in self.blocks for tensor in block.positions))

    def read(self) -> dict[str, Tensor]:
        """Read the parameters from the checkpoint, unrounded: in the dtype that it stores them in."""
        return {name: value for block in self.blocks for name, value in block.read(self.entries).items()}

    def to_file(self, values: Mapping[str, Tensor]) -> dict[str, TensorData]:
        """Turn parameters into tensors of the checkpoint, rounded to the dtypes that it stores.

        Args:
            values: New values of parameters of the map. Others of its parameters may share a tensor
                with these: they keep what the checkpoint holds.

        Returns:
            The tensors by name, sorted.
        """
        tensors: dict[str, TensorData] = {}
        for block in self.blocks:
            kept = {} if block.shapes.keys() <= values.keys() else block.read(self.entries)
            vector = block.join({**kept, **values})
            for tensor, positions in block.positions.items():
                tensors[tensor] = to_data(take(vector, positions), self.entries[tensor].dtype)
        return dict(sorted(tensors.items()))

    def to_model(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn tensors of the checkpoint into parameters.

        Args:
            model: The model that the map was made for; what `tensors` leave out is taken from it.
            tensors: New values of some of the map's tensors.

        Returns:
            The values of the map's parameters, in the model's dtype.
        """
        values: dict[str, Tensor] = {}
        for block in self.blocks:
            vector = block.join({name: own_value(model, name) for name in block.shapes})
            for tensor in block.positions.keys() & tensors.keys():
                put(vector, block.positions[tensor], tensors[tensor])
            values |= block.split(vector)
        return values


def own_value(model: PreTrainedModel, parameter: str) -> Tensor:
    """Return what a model holds of a parameter, on the CPU; it may be the parameter's own memory."""
    return model.get_parameter(parameter).detach().cpu()


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
