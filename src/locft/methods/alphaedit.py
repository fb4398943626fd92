"""AlphaEdit: MEMIT's batches, along directions that ordinary keys do not use, and beside earlier edits.

Source: Fang et al. (2025), AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models,
equations 11 to 14. The paper has ``ridge`` 1, its repository 10; the threshold is the repository's. It
does not follow the size of a model's activations, so that how many directions are left differs by model:
that is recorded.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locft.errors import TrainingError
from locft.methods.base import Editing, Editor, EditorPlan
from locft.methods.memit import LENGTHS, PUBLISHED_LAYERS, SETTINGS
from locft.methods.memory.edit import (
    choose_layers,
    choose_sites,
    editing,
    half_and_half_keys,
    moments_of,
    spread,
)
from locft.methods.memory.forms import alphaedit_update, unused_directions
from locft.methods.memory.requests import Request
from locft.methods.memory.site import Site, Splits
from locft.methods.memory.targets import search_of


def _open(model: PreTrainedModel, plan: EditorPlan) -> AbstractContextManager[Editing]:
    settings, search = plan.settings, search_of(plan, "block")
    sites = choose_sites(model, choose_layers(model, settings["layers"], PUBLISHED_LAYERS))
    unused = {
        name: unused_directions(moment, settings["threshold"])
        for name, moment in moments_of(model, plan, sites).items()
    }
    for site in sites:
        if not unused[site.name].shape[1]:
            raise TrainingError(
                f"AlphaEdit: at {site.name} no direction is used less than threshold "
                f"{settings['threshold']:g} allows for: give a larger threshold, or other layers"
            )
    # Of earlier batches: the sum of k k^T at each site.
    earlier = {name: torch.zeros(len(one), len(one)).double() for name, one in unused.items()}

    def update_of(site: Site, keys: Tensor, residuals: Tensor) -> Tensor:
        directions = unused[site.name]
        return alphaedit_update(keys, residuals, directions, earlier[site.name], settings["ridge"])

    splits = Splits(model)

    def insert(requests: Sequence[Request]) -> None:
        spread(splits, sites, requests, search, update_of)
        for site in sites:  # with all of them changed
            keys = half_and_half_keys(splits, site, requests)
            earlier[site.name] += keys @ keys.T

    dimensions = {name: one.shape[1] for name, one in unused.items()}
    return editing(model, plan, sites, LENGTHS, insert, {"unused_directions": dimensions})


METHOD = Editor(
    name="alphaedit",
    title="batches of edits along unused directions",
    open=_open,
    lr=0.2,
    settings={**SETTINGS, "threshold": 0.02, "ridge": 1.0},
)
