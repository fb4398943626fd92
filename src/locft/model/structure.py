"""Finds a decoder's layers, attention and MLP by the model's structure, whatever the model is called."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from locft.errors import LocationError, ModelError
from locft.model.names import FAMILIES, POINTWISE_NAMES, USUAL, Names

Index = tuple[slice, ...]
"""A part of a tensor, along its first axes."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The decoder layers of a model, in the order in which they run."""

    modules: tuple[nn.Module, ...]
    prefix: str  # what their parameters' names begin with: "model.layers"
    names: Names = USUAL  # what their parts may be called

    def __len__(self) -> int:
        return len(self.modules)

    def at(self, layer: int) -> "_Layer":
        """Look into one layer."""
        return _Layer(self.modules[layer], f"{self.prefix}.{layer}", self.names)


def find_layers(model: PreTrainedModel) -> Layers:
    """Find the decoder layers: the outermost module list of the decoder with the most parameters.

    Args:
        model: A causal language model.

    Returns:
        Its layers and the prefix of their parameters' names.

    Raises:
        ModelError: The decoder has no list of layers.
    """
    decoder = model.get_decoder()
    # Some call their output head a decoder.
    lists = _outermost_lists(decoder) or _outermost_lists(model.base_model)
    if not lists:
        raise ModelError(
            f"{type(model).__name__} is refused: its decoder ({type(decoder).__name__}) holds no list "
            "of layers, so a tuning location has no meaning in it"
        )
    config = model.config.get_text_config(decoder=True)
    # A model that also sees or hears holds other lists, which may be the larger ones.
    as_many = [found for found in lists if len(found) == getattr(config, "num_hidden_layers", None)]
    layers = max(as_many or lists, key=lambda found: sum(p.numel() for p in found.parameters()))
    prefix = next(name for name, module in model.named_modules() if module is layers)
    names = FAMILIES.get(config.model_type, USUAL)
    return Layers(modules=tuple(layers), prefix=prefix, names=names)


def _outermost_lists(root: nn.Module) -> list[nn.ModuleList]:
    lists: list[nn.ModuleList] = []
    pending = [root]
    while pending:
        module = pending.pop()
        if isinstance(module, nn.ModuleList):
            lists.append(module)
        else:
            pending.extend(module.children())
    return lists


def find_parameters(layers: Layers, layer: int, module: str) -> dict[str, Index]:
    """Name the parameters of one module of one layer.

    Args:
        layers: The layers of the model.
        layer: Index of the layer, from 0.
        module: One of `locft.model.location.MODULES`, or an expert's: ``mlp.expert[3].down``.

    Returns:
        The parts of parameters by the parameters' names in the model, sorted; an empty part is the whole
        parameter. Projections are one matrix each, without bias, or one for each expert; the others are
        all parameters of the module but those of routers.

    Raises:
        LocationError: The layer has no such module, or it cannot be told apart.
    """
    here = layers.at(layer)
    if module == "entire":
        found = here.whole("")
    elif module == "attn":
        found = here.whole(here.only(here.names.attn, "", module))
    elif module == "mlp":
        found = here.mlp()
    else:
        found = here.projection(module)
    elsewhere = {
        id(one) for other in layers.modules if other is not here.root for one in other.parameters()
    }
    shared = [name for name in found if id(here.root.get_parameter(name)) in elsewhere]
    if shared:
        raise LocationError(
            f"{here.place}.{shared[0]} is shared with another layer, which would change, too: choose "
            "another layer or module"
        )
    return {f"{here.place}.{name}": found[name] for name in sorted(found)}


def spell_out(layers: Layers, layer: int, module: str) -> str:
    """Say which of a mixture's projections ``mlp.up`` and ``mlp.down`` mean; others mean themselves."""
    here = layers.at(layer)
    if module not in ("mlp.up", "mlp.down") or here.experts() is None:
        return module
    kind = "experts" if here.shared() is None else "shared"
    return module.replace("mlp.", f"mlp.{kind}.")


def find_modules(layers: Layers, layer: int, modules: Sequence[str]) -> list[str]:
    """Tell which modules one layer has.

    Args:
        layers: The layers of the model.
        layer: Index of the layer, from 0.
        modules: Those to try.

    Returns:
        Those of them that it has, in the same order.
    """

    def has(module: str) -> bool:
        try:
            return bool(find_parameters(layers, layer, module))
        except LocationError:
            return False

    return [module for module in modules if has(module)]


def find_experts(layers: Layers, layer: int) -> nn.Module | None:
    """Find the routed experts of a layer: a module that holds them all; None if it has none."""
    here = layers.at(layer)
    path = here.experts()
    return None if path is None else here.root.get_submodule(path)


def find_stack(layers: Layers, layer: int) -> str | None:
    """Find what holds the matrices of all routed experts behind one another; None if nothing does."""
    here = layers.at(layer)
    path = here.experts()
    if path is None or isinstance(here.root.get_submodule(path), nn.ModuleList):
        return None
    return f"{here.place}.{path}"


def find_pointwise(layer: nn.Module, names: Names = USUAL) -> tuple[nn.Module, ...]:
    """Find the parts of a layer that work position by position: its MLP, and projections of attention.

    Args:
        layer: A decoder layer.
        names: What its parts may be called.

    Returns:
        Those that have a usual name. What other layers name so may be something else: a probe must tell.
    """
    parts: list[nn.Module] = []
    for name, child in layer.named_children():
        if name in (*names.mlp, *names.shared):
            parts.append(child)
        elif name in names.attn:
            parts += [part for part_name, part in child.named_children() if part_name in POINTWISE_NAMES]
    return tuple(parts)


@dataclass(frozen=True)
class _Layer:
    """A decoder layer; paths are relative to it."""

    root: nn.Module
    place: str  # the path of the layer in the model, for messages
    names: Names

    def whole(self, path: str) -> dict[str, Index]:
        """Take all parameters of a part but those of routers."""
        part = self.root.get_submodule(path)
        frozen = self.routers()
        named = ((_join(path, name), parameter) for name, parameter in part.named_parameters())
        return {name: () for name, _ in named if not any(_is_in(name, router) for router in frozen)}

    def only(self, wanted: Sequence[str], container: str, module: str) -> str:
        """Find the one child of a container that has one of some names."""
        found = self.children(wanted, container)
        if len(found) != 1:
            raise LocationError(self.lacks(module, container, wanted))
        return found[0]

    def children(self, wanted: Sequence[str], container: str = "") -> list[str]:
        """Find modules and parameters below a container that have one of some names."""
        part = self.root.get_submodule(container)
        return [_join(container, name) for name in wanted if _at(part, name) is not None]

    def lacks(self, module: str, container: str, wanted: Sequence[str]) -> str:
        """Say that a module cannot be told."""
        part = self.root.get_submodule(container)
        held = [name for name, _ in part.named_children()]
        held += [name for name, _ in part.named_parameters(recurse=False)]
        place = _join(self.place, container)
        return (
            f"{place} has no single '{module}': it holds {', '.join(held) or 'nothing'}; one of "
            f"{', '.join(wanted)} was expected. Choose another module, or the entire layer"
        )

    def container(self) -> str | None:
        """Name the child that holds the MLP; None where its projections stand in the layer itself."""
        # What would be the shared expert is the MLP of a mixture without experts.
        return next(iter(self.children((*self.names.mlp, *self.names.shared))), None)

    def experts(self) -> str | None:
        """Find what holds the routed experts; None if there are none."""
        container = self.container()
        if container is None:
            return None
        found = self.children(self.names.experts, container)
        if found:
            return found[0]
        # Or the mixture holds their matrices itself.
        direct = self.children((*self.names.fused_up, *self.names.up), container)
        return container if any(self.weight(path).dim() == 3 for path in direct) else None

    def shared(self) -> str | None:
        """Find the expert that answers for every token, in the mixture or beside it."""
        container = self.container()
        if container is None or self.experts() is None:
            return None
        inside = self.children(self.names.shared, container)
        return next(iter([*inside, *self.children(self.names.shared)]), None)

    def routers(self) -> list[str]:
        """Find what chooses experts, of the MLP's and of others."""
        return [
            path
            for container, part in self.root.named_modules()
            if self.is_mixture(part)
            for path in self.children(self.names.routers, container)
        ]

    def is_mixture(self, part: nn.Module) -> bool:
        """Tell whether a part holds experts, by name or as matrices behind one another."""
        if any(name in self.names.experts for name, _ in part.named_children()):
            return True
        holders = (part, *(one for one in part.children() if not isinstance(one, nn.Conv1d)))
        own = (one for holder in holders for one in holder.parameters(recurse=False))
        return any(one.dim() == 3 and len(one) > 1 for one in own)

    def mlp(self) -> dict[str, Index]:
        """Take all parameters of the MLP."""
        container, beside = self.container(), self.children(self.names.shared)
        if container is not None:
            paths = dict.fromkeys((container, *beside))
            return {name: index for path in paths for name, index in self.whole(path).items()}
        loose = self.children((*self.names.loose_up, *self.names.loose_down))
        if not loose:
            raise LocationError(self.lacks("mlp", "", self.names.mlp))
        return {name: index for path in loose for name, index in self.whole(path).items()}

    def projection(self, module: str) -> dict[str, Index]:
        """Take one projection of the MLP, of the shared expert, or of routed ones."""
        match = re.fullmatch(r"mlp\.(?:(shared|experts|expert\[(\d+)\])\.)?(up|down)", module)
        if match is None:
            raise LocationError(f"{self.place} has no {module!r}")
        kind, number, direction = match.groups()
        if kind is None:
            container = self.container()
            if container is None:
                names = self.names.loose_up if direction == "up" else self.names.loose_down
                return self.matrix(self.only(names, "", module))
            if self.experts() == container:  # their projections, not an MLP's
                raise LocationError(self.lacks(module, container, self.names.up))
            return self.in_mlp(container, direction, module)
        if kind == "shared":
            shared = self.shared()
            if shared is None:
                raise LocationError(self.lacks(module, self.container() or "", self.names.shared))
            return self.in_mlp(shared, direction, module)
        experts = self.experts()
        if experts is None:
            raise LocationError(self.lacks(module, self.container() or "", self.names.experts))
        return self.in_experts(experts, None if number is None else int(number), direction, module)

    def in_mlp(self, container: str, direction: str, module: str) -> dict[str, Index]:
        """Take a projection of an MLP: of gate and up in one matrix, up's part."""
        wanted = self.names.up if direction == "up" else self.names.down
        fused = self.children(self.names.fused_up, container)
        if direction == "up" and fused and not self.children(wanted, container):
            [(name, _)] = self.matrix(self.only(self.names.fused_up, container, module)).items()
            down = self.matrix(self.only(self.names.down, container, module))
            [inner] = [self.weight(one).shape for one in down]
            return {name: self.up_part(self.weight(name), inner)}
        return self.matrix(self.only(wanted, container, module))

    def in_experts(
        self, experts: str, number: int | None, direction: str, module: str
    ) -> dict[str, Index]:
        """Take a projection of all routed experts, or of one."""
        part = self.root.get_submodule(experts)
        if isinstance(part, nn.ModuleList):
            numbers = range(len(part)) if number is None else [number]
            self._check_expert(number, len(part), module)
            return {
                name: index
                for one in numbers
                for name, index in self.in_mlp(f"{experts}.{one}", direction, module).items()
            }
        name = down = self.weight_name(self.only(self.names.down, experts, module))
        num_experts = len(self.weight(down))
        index: Index = ()
        if direction == "up":
            own = self.children(self.names.up, experts)
            wanted = self.names.up if own else self.names.fused_up
            name = self.weight_name(self.only(wanted, experts, module))
            index = () if own else self.up_part(self.weight(name), self.weight(down).shape)
        if self.weight(name).dim() != 3:
            raise LocationError(f"{self.place}.{name} does not hold a matrix for each expert")
        if number is None and len(self.weight(name)) > num_experts:  # what is chosen to do nothing
            return {name: (slice(0, num_experts), *index[1:])}
        if number is None:
            return {name: index}
        self._check_expert(number, num_experts, module)
        return {name: (slice(number, number + 1), *index[1:])}

    def _check_expert(self, number: int | None, num_experts: int, module: str) -> None:
        if number is not None and number >= num_experts:
            raise LocationError(
                f"{self.place} has no {module!r}: it has {num_experts} experts, 0 to {num_experts - 1}"
            )

    def up_part(self, fused: Tensor, down: Sequence[int]) -> Index:
        """Tell which part of a matrix of gate and up (..., 2I, D) or (..., D, 2I) is up."""
        # Stored the other way round, the down projection is (I, D).
        axis = next(
            (axis for axis in (0, 1) if fused.shape[axis - 2] == 2 * down[-1 - axis]),
            None,
        )
        if axis is None:
            raise LocationError(
                f"{self.place}: gate and up cannot be told apart in a matrix of {list(fused.shape)}, "
                f"beside a down projection of {list(down)}: choose another module"
            )
        length = fused.shape[axis - 2]
        part = slice(1, length, 2) if self.names.interleaved else slice(length // 2, length)
        before = (slice(None),) * (fused.dim() - 2 + axis)
        return (*before, part)

    def matrix(self, path: str) -> dict[str, Index]:
        """Take the matrix of a linear layer."""
        name = self.weight_name(path)
        if self.weight(name).dim() != 2:
            raise LocationError(f"{self.place}.{path} is no single matrix: choose another module")
        return {name: ()}

    def weight(self, path: str) -> Tensor:
        """Give the matrix of a linear layer, or the parameter itself."""
        found = _at(self.root, path)
        matrix = found.weight if isinstance(found, nn.Module) else found
        assert isinstance(matrix, Tensor)
        return matrix

    def weight_name(self, path: str) -> str:
        """Name the matrix of a linear layer, or the parameter itself."""
        found = _at(self.root, path)
        if isinstance(found, nn.Parameter):
            return path
        if isinstance(getattr(found, "weight", None), nn.Parameter):
            return f"{path}.weight"
        raise LocationError(f"{self.place}.{path} is no single matrix: choose another module")


def _join(container: str, name: str) -> str:
    return ".".join(filter(None, (container, name)))


def _is_in(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _at(part: nn.Module, path: str) -> nn.Module | nn.Parameter | None:
    """Find a module or parameter by its path; None if there is none."""
    found: object = part
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module | nn.Parameter) else None
