"""Which elements of a model's parameters each tensor of its checkpoint holds.

From version 5 on, transformers may rename, fuse or split a file's tensors on their way into memory: a
mixture of experts has matrices for each expert in the file, and one for all experts in memory. It can
take that back, which is how it saves a model. Here it takes it back on stand-ins for the weights,
which show what becomes of every element.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locft.errors import ModelError, first_line
from locft.model.weights import Positions, View, take


@dataclass(frozen=True)
class Source:
    """What a tensor of the file is made of.

    Attributes:
        parameters: The parameters that have elements in it.
        is_plain: Whether it is one parameter just as it is, at most under another name.
    """

    parameters: frozenset[str]
    is_plain: bool


def trace_sources(model: PreTrainedModel) -> dict[str, Source]:
    """Find what each tensor of a model's checkpoint is made of.

    Args:
        model: The model as loaded from the checkpoint.

    Returns:
        The sources by the tensors' names, as transformers would save them.

    Raises:
        ModelError: transformers cannot take back what it does to this model's tensors.
    """
    traced = {
        name: _Traced.standing_for(name, parameter) for name, parameter in model.named_parameters()
    }
    return {
        tensor: Source(found.parameters, any(found is traced[name] for name in found.parameters))
        for tensor, found in _take_back(model, traced).items()
        if isinstance(found, _Traced)
    }


def find_positions(
    model: PreTrainedModel, parameters: Iterable[str], tensors: Iterable[str]
) -> dict[str, Positions]:
    """Find where a checkpoint's tensors lie in the vector of all elements of some parameters.

    Args:
        model: The model as loaded from the checkpoint.
        parameters: All parameters that these tensors are made of; the vector lists their elements,
            row-major, one parameter after the other.
        tensors: The tensors' names, as transformers would save them.

    Returns:
        The positions by tensor.

    Raises:
        ModelError: A tensor is more than elements of the parameters in another order.
    """
    shapes = {name: model.get_parameter(name).shape for name in parameters}
    ends = list(accumulate(shape.numel() for shape in shapes.values()))
    # Half the size where it will do: an entire layer of experts has more than 10^9 elements.
    vector = torch.arange(ends[-1], dtype=torch.int32 if ends[-1] < 2**31 else torch.int64)
    # The other parameters take part without elements: some conversions want all of theirs together.
    given = {
        name: torch.empty(parameter.shape, device="meta") for name, parameter in model.named_parameters()
    }
    parts = vector.tensor_split(ends[:-1])
    given |= {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    made = _take_back(model, given)
    return {tensor: _compress(vector, made[tensor], tensor) for tensor in tensors}


def _compress(vector: Tensor, found: Tensor, tensor: str) -> Positions:
    """Describe positions by their spacing where it is even, which nearly all conversions leave it."""
    # Whatever does more than move elements about gives other numbers, or another kind of numbers.
    if found.dtype != vector.dtype or not 0 <= int(found.min()) <= int(found.max()) < len(vector):
        raise ModelError(
            f"transformers computes the tensor {tensor!r}, rather than just reorder elements"
        )
    origin = (0,) * found.dim()
    start = int(found[origin])
    strides = tuple(
        int(found[(*origin[:axis], 1, *origin[axis + 1 :])]) - start if size > 1 else 1
        for axis, size in enumerate(found.shape)
    )
    view = View(tuple(found.shape), strides, start)
    last = start + sum((size - 1) * stride for size, stride in zip(found.shape, strides, strict=True))
    is_even = (
        min(strides, default=1) > 0 and last < len(vector) and torch.equal(take(vector, view), found)
    )
    return view if is_even else found


def _take_back(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn what is in memory into what would be in the file, as transformers does to save a model."""
    try:
        from transformers.core_model_loading import revert_weight_conversion

        made: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    # Whatever it trips over, it could not have saved this model either. A version without the
    # function is one of these cases.
    except Exception as error:
        raise ModelError(f"transformers cannot take its conversion back: {first_line(error)}") from error
    return made


class _Traced(Tensor):
    """A tensor without elements that knows which parameters it was made from."""

    parameters: frozenset[str] = frozenset()

    @classmethod
    def standing_for(cls, name: str, parameter: Tensor) -> "_Traced":
        traced = torch.empty(parameter.shape, device="meta").as_subclass(cls)
        traced.parameters = frozenset([name])
        return traced

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        sources = frozenset(name for one in _traced_in((args, kwargs)) for name in one.parameters)
        for made in _traced_in(result):
            made.parameters = sources
        return result


def _traced_in(value: Any) -> Iterator[_Traced]:
    """Find the traced tensors in an operation's arguments, or in what it returned."""
    if isinstance(value, _Traced):
        yield value
    elif isinstance(value, dict):
        yield from _traced_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _traced_in(item)
