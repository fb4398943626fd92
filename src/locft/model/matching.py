"""Finds which tensors of its checkpoint hold a model's parameters, and proves it by the values."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from locft.errors import ModelError
from locft.model.conversion import Source, find_positions, trace_sources
from locft.model.weights import TORCH_DTYPES, Block, Positions, WeightMap, contiguous, own_value
from locft.tensorfile import TensorEntry

# What each tensor that a checkpoint may hold is made of, by the tensor's name.
_Layout = Mapping[str, Source]


def map_parameters(
    model: PreTrainedModel, entries: Mapping[str, TensorEntry], parameters: Iterable[str]
) -> WeightMap:
    """Find which tensors of the checkpoint hold some parameters, and prove it by the values.

    Args:
        model: The model as loaded from the checkpoint.
        entries: The checkpoint's tensors.
        parameters: Names of parameters in the model.

    Returns:
        The map. Parameters that share a tensor with these are in it, too.

    Raises:
        ModelError: The elements of a parameter cannot be told in the checkpoint, with the reason.
    """
    layouts = _layouts(model)
    blocks: list[Block] = []
    for parameter in parameters:
        if not any(parameter in block.shapes for block in blocks):
            blocks.append(_find_block(model, entries, [(layout, parameter) for layout in layouts]))
    return WeightMap(entries, tuple(blocks))


def map_tensors(
    model: PreTrainedModel, entries: Mapping[str, TensorEntry], tensors: Iterable[str]
) -> WeightMap:
    """Find which parameters some tensors of the checkpoint are in, and prove it by the values.

    Args:
        model: The model as loaded from the checkpoint.
        entries: The checkpoint's tensors.
        tensors: Names of tensors in the checkpoint.

    Returns:
        The map. It also has the other tensors that hold elements of the same parameters.

    Raises:
        ModelError: A tensor is in no parameter, or `map_parameters` refuses one that it is in.
    """
    layouts = _layouts(model)
    blocks: list[Block] = []
    for tensor in tensors:
        if any(tensor in block.positions for block in blocks):
            continue
        # Any of the parameters in it will do: they are found together.
        candidates = [
            (layout, min(layout[name].parameters))
            for layout in layouts
            for name in _spellings(model, tensor)
            if name in layout
        ]
        block = _find_block(model, entries, candidates) if candidates else None
        if block is None or tensor not in block.positions:
            raise ModelError(f"{type(model).__name__} has no parameter for the tensor {tensor}")
        blocks.append(block)
    return WeightMap(entries, tuple(blocks))


def _layouts(model: PreTrainedModel) -> tuple[_Layout, ...]:
    """List how a checkpoint may hold a model: as transformers would save it, or as it is in memory.

    A checkpoint may be of both kinds: converted in one part, and as it is in memory in another.
    """
    plain = {name: Source(frozenset([name]), is_plain=True) for name, _ in model.named_parameters()}
    try:
        return trace_sources(model), plain
    except ModelError:
        return (plain,)


def _find_block(
    model: PreTrainedModel,
    entries: Mapping[str, TensorEntry],
    candidates: Sequence[tuple[_Layout, str]],
) -> Block:
    """Find the tensors that hold a parameter, and what else they hold, by the first layout that fits.

    Args:
        model: The model as loaded from the checkpoint.
        entries: The checkpoint's tensors.
        candidates: Layouts, each with the parameter to look for in it.

    Raises:
        ModelError: No layout fits, with the reason why the first does not.
    """
    refusals: list[str] = []
    for layout, parameter in candidates:
        try:
            return _prove_block(model, entries, layout, parameter)
        except ModelError as error:
            refusals.append(
                f"{type(model).__name__} is refused: a patch could not say where its checkpoint holds "
                f"{parameter}: {error}"
            )
    raise ModelError(refusals[0])


def _prove_block(
    model: PreTrainedModel, entries: Mapping[str, TensorEntry], layout: _Layout, parameter: str
) -> Block:
    parameters, tensors = _connected(layout, parameter)
    if not tensors:
        raise ModelError("it has no tensor for it")
    names: dict[str, str] = {}
    for tensor in tensors:
        name = next((name for name in _spellings(model, tensor) if name in entries), None)
        if name is None:
            raise ModelError(f"it has no tensor {tensor!r}")
        names[tensor] = name
    shapes = {name: tuple(model.get_parameter(name).shape) for name in parameters}
    if all(layout[tensor].is_plain for tensor in tensors):
        positions: Mapping[str, Positions] = {
            tensor: contiguous(shapes[parameter]) for tensor in tensors
        }
    else:
        positions = find_positions(model, parameters, tensors)
    block = Block(shapes, {name: positions[tensor] for tensor, name in names.items()})
    for name, place in block.positions.items():
        entry, shape = entries[name], tuple(place.shape)
        if entry.dtype not in TORCH_DTYPES or entry.shape != shape:
            raise ModelError(
                f"its tensor {name!r} is {entry.dtype} {entry.shape}, not a float of {shape}"
            )
    for name, stored in block.read(entries).items():
        value = own_value(model, name)
        # Elements that no tensor holds are NaN, and so never equal.
        if not torch.equal(stored.to(value.dtype), value):
            raise ModelError(f"what it holds for {name} differs from what is in memory")
    if sum(math.prod(place.shape) for place in block.positions.values()) != block.num_elements:
        raise ModelError("it holds some elements twice")
    return block


def _connected(layout: _Layout, parameter: str) -> tuple[list[str], list[str]]:
    """Find the parameters and the tensors that share elements with a parameter, directly or not."""
    parameters: set[str] = set()
    more = {parameter}
    while more > parameters:
        parameters = more
        tensors = [tensor for tensor, source in layout.items() if source.parameters & parameters]
        more = parameters.union(*(layout[tensor].parameters for tensor in tensors))
    return sorted(parameters), tensors


def _spellings(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """Spell a name with and without the base model's prefix: files are saved from either class."""
    prefix = f"{model.base_model_prefix}."
    return (name, name.removeprefix(prefix), prefix + name)
