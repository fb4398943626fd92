"""Tuning locations: which matrices of a model are trained (layer x module; the paper's section 4)."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from transformers import PreTrainedModel

from locft.errors import LocationError
from locft.model.structure import Index, find_layers, find_parameters, find_stack, spell_out

MODULES = ("entire", "attn", "mlp", "mlp.up", "mlp.down")
MIXTURE_MODULES = ("mlp.shared.up", "mlp.shared.down", "mlp.experts.up", "mlp.experts.down")
_EXPERT = re.compile(r"mlp\.expert\[(0|[1-9]\d{0,5})\]\.(up|down)", re.ASCII)
_EXPECTED = (
    "expected a layer, or a share of the depth, and a module: 20.mlp.down, 20.mlp.up, 20.mlp, "
    "20.attn, 20 (entire layer), 70%.mlp.down; of a mixture of experts also 20.mlp.experts.down (all), "
    "20.mlp.expert[3].down, 20.mlp.shared.down"
)


@dataclass(frozen=True, kw_only=True)
class Location:
    """A tuning location in a certain model.

    Attributes:
        name: The name with the layer's index: ``20.mlp.down``; ``20`` for an entire layer.
        layer: Index of the layer, from 0.
        module: One of `MODULES` or `MIXTURE_MODULES`, or ``mlp.expert[3].down``.
        parameters: Names of the tuned parameters in the model.
        parts: Which part of a parameter is tuned, by name, where that is not all of it.
        num_parameters: How many numbers are tuned.
        shapes: Shapes of what is tuned, in the order of the parameters; that of one expert where experts
            lie behind one another in a tensor.
    """

    name: str
    layer: int
    module: str
    parameters: tuple[str, ...]
    parts: Mapping[str, Index]
    num_parameters: int
    shapes: tuple[tuple[int, ...], ...]

    @property
    def experts(self) -> tuple[int, ...] | None:
        """Number the routed experts that are tuned, if any are; none named means all there are."""
        one = _EXPERT.fullmatch(self.module)
        if one is not None:
            return (int(one[1]),)
        return () if self.module in ("entire", "mlp", "mlp.experts.up", "mlp.experts.down") else None

    @property
    def part_in_words(self) -> str | None:
        """Say which part of its parameters is tuned; None if that is all of them."""
        if not self.parts:
            return None
        expert = _EXPERT.fullmatch(self.module)
        of = "" if expert is None else f"expert {expert[1]} of "
        return "; ".join(
            f"{_words(part[0 if expert is None else 1 :], 0 if expert is None else 1)}{of}"
            f"{name.removesuffix('.weight')}"
            for name, part in self.parts.items()
        )


def _words(part: Index, first: int) -> str:
    """Name a part of a tensor, from its first axis on that is given: of gate and up, it is up."""
    told = []
    for axis, one in enumerate(part, first):
        if one != slice(None):
            which = "every second index" if one.step == 2 else "indices"
            told.append(f"{which} {one.start} to {one.stop - 1} of axis {axis}")
    return f"up ({', '.join(told)}) of " if told else ""


def parse_location(name: str, num_layers: int) -> tuple[int, str]:
    """Read a location's name.

    A share p of the depth N means layer ceil(p N) - 1: 70% is 20 of 30 and 22 of 32, 25% is 6 of
    28 and 19 of 80, the paper's proportional rule.

    Args:
        name: For example ``20.mlp.down``, ``70%.mlp.down`` or ``20``.
        num_layers: How many layers the model has.

    Returns:
        The layer's index, from 0, and the module, as `Location.module` has it.

    Raises:
        LocationError: The name cannot be read, or the model has no such layer.
    """
    match = re.fullmatch(
        r"(\d{1,9}(?:\.\d{1,9})?)%(?:\.(.+))?|(\d{1,9})(?:\.(.+))?", name.strip(), re.ASCII
    )
    if match is None:
        raise LocationError(f"location {name!r} cannot be read: {_EXPECTED}")
    share, module_of_share, index, module_of_index = match.groups()
    module = module_of_share or module_of_index or "entire"
    if module not in (*MODULES, *MIXTURE_MODULES) and _EXPERT.fullmatch(module) is None:
        raise LocationError(f"location {name!r} has an unknown module {module!r}: {_EXPECTED}")
    if share is not None:
        depth = Fraction(share) / 100
        if not 0 < depth <= 1:
            raise LocationError(f"location {name!r}: the depth must be over 0% and at most 100%")
        return math.ceil(depth * num_layers) - 1, module
    layer = int(index)
    if layer >= num_layers:
        raise LocationError(
            f"location {name!r}: the model has {num_layers} layers, 0 to {num_layers - 1}"
        )
    return layer, module


def resolve_location(model: PreTrainedModel, name: str) -> Location:
    """Find the parameters of a tuning location in a model.

    In a mixture of experts, ``mlp.down`` means the shared expert's, which answers for every token, or if
    there is none that of all routed experts; so does ``mlp.up``.

    Args:
        model: A causal language model.
        name: The location's name, as `parse_location` reads it.

    Returns:
        The location, with the names of its parameters.

    Raises:
        LocationError: The name cannot be read, or the model has no such part.
        ModelError: The model's layers cannot be found.
    """
    layers = find_layers(model)
    layer, module = parse_location(name, len(layers))
    module = spell_out(layers, layer, module)
    found = find_parameters(layers, layer, module)
    tuned = {one: model.get_parameter(one)[part] for one, part in found.items()}
    stack = find_stack(layers, layer)
    shapes = tuple(
        tuple(each.shape[1:] if stack is not None and one.startswith(f"{stack}.") else each.shape)
        for one, each in tuned.items()
    )
    return Location(
        name=str(layer) if module == "entire" else f"{layer}.{module}",
        layer=layer,
        module=module,
        parameters=tuple(found),
        parts={one: part for one, part in found.items() if part},
        num_parameters=sum(each.numel() for each in tuned.values()),
        shapes=shapes,
    )
