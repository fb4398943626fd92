"""Finds a decoder's layers, attention and MLP by the model's structure, whatever the model is called."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from locft.errors import LocationError, ModelError

# What the parts of a layer are called across the families of transformers. Names of parts, not of
# models: a new family that names its parts as others do needs nothing here.
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "ff", "feedforward")
DOWN_NAMES = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "linear2", "wo")
# Projections of an attention whose result at a position is used at that position alone.
POINTWISE_NAMES = ("q_proj", "o_proj", "out_proj", "dense")
UP_NAMES = ("up_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in", "w3", "linear1", "wi")


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The decoder layers of a model, in the order in which they run."""

    modules: tuple[nn.Module, ...]
    prefix: str  # what their parameters' names begin with: "model.layers"

    def __len__(self) -> int:
        return len(self.modules)


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
    lists: list[nn.ModuleList] = []
    pending: list[nn.Module] = [decoder]
    while pending:
        module = pending.pop()
        if isinstance(module, nn.ModuleList):
            lists.append(module)
        else:
            pending.extend(module.children())
    if not lists:
        raise ModelError(
            f"{type(model).__name__} is refused: its decoder ({type(decoder).__name__}) holds no list "
            "of layers, so a tuning location has no meaning in it"
        )
    layers = max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))
    prefix = next(name for name, module in model.named_modules() if module is layers)
    return Layers(modules=tuple(layers), prefix=prefix)


def find_parameters(layers: Layers, layer: int, module: str) -> tuple[str, ...]:
    """Name the parameters of one module of one layer.

    Args:
        layers: The layers of the model.
        layer: Index of the layer, from 0.
        module: ``entire``, ``attn``, ``mlp``, ``mlp.up`` or ``mlp.down``.

    Returns:
        The parameters' names in the model, sorted. ``mlp.up`` and ``mlp.down`` are one matrix each,
        without bias; the others are all parameters of the part.

    Raises:
        LocationError: The layer has no such part, or it is not a single matrix.
    """
    root = layers.modules[layer]
    prefix = f"{layers.prefix}.{layer}"
    if module == "entire":
        names = [f"{prefix}.{name}" for name, _ in root.named_parameters()]
    elif module == "attn":
        child = _child(root, ATTENTION_NAMES, module, prefix)
        part = root.get_submodule(child)
        names = [f"{prefix}.{child}.{name}" for name, _ in part.named_parameters()]
    elif module == "mlp":
        names = _mlp_parameters(root, prefix)
    else:
        wanted = DOWN_NAMES if module == "mlp.down" else UP_NAMES
        container = _mlp_container(root)
        place = f"{prefix}.{container}" if container else prefix
        part = root.get_submodule(container) if container else root
        child = _child(part, wanted, module, place)
        weight = getattr(part.get_submodule(child), "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            raise LocationError(f"{place}.{child} is no single matrix: choose another module")
        names = [f"{place}.{child}.weight"]
    return tuple(sorted(names))


def find_pointwise(layer: nn.Module) -> tuple[nn.Module, ...]:
    """Find the parts of a layer that work position by position: its MLP, and projections of attention.

    Args:
        layer: A decoder layer.

    Returns:
        Those that have a usual name. What other layers name so may be something else: a probe must tell.
    """
    container = _mlp_container(layer)
    parts = [layer.get_submodule(container)] if container else []
    for name, child in layer.named_children():
        if name in ATTENTION_NAMES:
            parts += [part for part_name, part in child.named_children() if part_name in POINTWISE_NAMES]
    return tuple(parts)


def _mlp_container(layer: nn.Module) -> str | None:
    """Name the child that holds the MLP; None where its projections stand in the layer itself (OPT)."""
    return next((name for name, _ in layer.named_children() if name in MLP_NAMES), None)


def _mlp_parameters(layer: nn.Module, prefix: str) -> list[str]:
    container = _mlp_container(layer)
    if container:
        part = layer.get_submodule(container)
        return [f"{prefix}.{container}.{name}" for name, _ in part.named_parameters()]
    projections = [name for name, _ in layer.named_children() if name in DOWN_NAMES + UP_NAMES]
    if not projections:
        raise LocationError(_no_part("mlp", prefix, MLP_NAMES, layer))
    return [
        f"{prefix}.{child}.{name}"
        for child in projections
        for name, _ in layer.get_submodule(child).named_parameters()
    ]


def _child(part: nn.Module, wanted: tuple[str, ...], module: str, place: str) -> str:
    found = [name for name, _ in part.named_children() if name in wanted]
    if len(found) != 1:
        raise LocationError(_no_part(module, place, wanted, part))
    return found[0]


def _no_part(module: str, place: str, wanted: tuple[str, ...], part: nn.Module) -> str:
    children = ", ".join(name for name, _ in part.named_children()) or "nothing"
    return (
        f"{place} has no single '{module}': it holds {children}; one of {', '.join(wanted)} was "
        "expected. Choose another module, or the entire layer"
    )
