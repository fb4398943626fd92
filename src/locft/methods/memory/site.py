"""The down projection of a layer as a memory: its matrix, its keys, and what the block makes of them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from locft.errors import ModelError
from locft.methods.memory.requests import Padded, Row, pad
from locft.model.location import resolve_location
from locft.model.moments import input_axis
from locft.model.packing import lay_out
from locft.model.split import Split, split_model

TOKENS_PER_PASS = 2048


@dataclass(frozen=True, kw_only=True)
class Site:
    """A linear map of a layer.

    Attributes:
        layer: Index of the layer.
        name: The parameter's name: a matrix.
        module: The module that holds it.
        axis: The matrix's axis along which inputs run: 1 in linear layers, 0 in GPT-2's Conv1D.
    """

    layer: int
    name: str
    module: nn.Module
    axis: int

    @property
    def parameter(self) -> nn.Parameter:
        """The matrix itself."""
        parameter: nn.Parameter = self.module.weight  # type: ignore[assignment]
        return parameter

    @property
    def matrix(self) -> Tensor:
        """The matrix as (O, K) in float64: a copy."""
        value = self.parameter.detach().double()
        return value if self.axis else value.T.contiguous()

    def add(self, update: Tensor) -> None:
        """Add an update (O, K) to the matrix."""
        with torch.no_grad():
            change = update if self.axis else update.T
            self.parameter.copy_(self.parameter.double() + change.to(self.parameter.device))


def find_sites(model: PreTrainedModel, layer: int, module: str) -> list[Site]:
    """Find linear maps of a layer.

    Args:
        model: The model.
        layer: Index of the layer.
        module: A location's module.

    Returns:
        Its matrices that belong to linear layers, in the order of their names.

    Raises:
        LocationError: The model has no such layer or module.
        ModelError: None of its matrices belongs to a linear layer.
    """
    location = resolve_location(model, f"{layer}.{module}")
    axes = {name: input_axis(model, name) for name in location.parameters}
    found = [
        Site(
            layer=layer,
            name=name,
            module=model.get_submodule(name.rpartition(".")[0]),
            axis=axis,
        )
        for name, axis in axes.items()
        if axis is not None
    ]
    if not found:
        raise ModelError(
            f"{type(model).__name__}: {location.name} has no matrix of a linear layer (experts in a "
            "stack have none of their own), which this method needs: choose other layers"
        )
    return found


class Splits:
    """A model with the places where it was split, each of which is proven once.

    Args:
        model: The model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._known: dict[int, Split] = {}

    def at(self, layer: int) -> Split:
        """Split the model at a layer.

        Raises:
            ModelError: It cannot be split there.
        """
        if layer not in self._known:
            self._known[layer] = split_model(self.model, layer)
        return self._known[layer]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the layer makes of rows, at the subject's last token of each. R rows.

    Attributes:
        keys: (R, K) what enters the site's matrix, in float64.
        values: (R, O) what the site's module returns.
        states: (R, D) what the layer returns.
    """

    keys: Tensor
    values: Tensor
    states: Tensor


def look_up(splits: Splits, site: Site, rows: Sequence[Row]) -> Seen:
    """See what rows come to at their subjects, in a site's layer, with the weights as they are now.

    Args:
        splits: The model.
        site: The site.
        rows: The rows; only their tokens up to the subject matter.

    Returns:
        What was seen, in the order of the rows.
    """
    split = splits.at(site.layer)
    cut = [Row(ids=row.ids[: row.lookup + 1], target_start=0, lookup=row.lookup) for row in rows]
    order = sorted(range(len(cut)), key=lambda index: len(cut[index].ids))
    parts = [
        _look_up(split, site, pad(batch, splits.model.device))
        for batch in batches_of([cut[index] for index in order])
    ]
    back = torch.argsort(torch.tensor(order))
    return Seen(
        keys=torch.cat([part.keys for part in parts])[back].double(),
        values=torch.cat([part.values for part in parts])[back].double(),
        states=torch.cat([part.states for part in parts])[back].double(),
    )


def batches_of(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Put rows together, as many as a pass may take."""
    batch: list[Row] = []
    for row in rows:
        longest = max(len(one.ids) for one in (*batch, row))
        if batch and longest * (len(batch) + 1) > TOKENS_PER_PASS:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _look_up(split: Split, site: Site, padded: Padded) -> Seen:
    packed = lay_out(padded.ids.cpu()).to(split.model.device)
    places = split.places(packed)
    length = padded.ids.shape[1]
    asked = places[torch.arange(len(padded.ids)) * length + padded.lookup.cpu()]
    seen: dict[str, Tensor] = {}

    def note(name: str, states: Any) -> None:
        one = states[0] if isinstance(states, tuple) else states
        seen[name] = one.detach().reshape(-1, one.shape[-1])[asked.to(one.device)].cpu()

    with ExitStack() as undo:
        block = split.layers.modules[site.layer]
        for hook in (
            site.module.register_forward_pre_hook(lambda _, args: note("keys", args[0])),
            site.module.register_forward_hook(lambda _, __, out: note("values", out)),
            block.register_forward_hook(lambda _, __, out: note("states", out)),
        ):
            undo.callback(hook.remove)
        split.run_through(packed)
    return Seen(keys=seen["keys"], values=seen["values"], states=seen["states"])


@contextmanager
def restored(sites: Sequence[Site]) -> Iterator[None]:
    """Give matrices the values back that they have now, when the body ends."""
    own = {site.name: site.parameter.detach().clone() for site in sites}
    try:
        yield
    finally:
        with torch.no_grad():
            for site in sites:
                site.parameter.copy_(own[site.name])
