"""ROME: one edit at a time as a rank-one change of one layer's down projection.

Source: Meng et al. (2022), Locating and Editing Factual Associations in GPT, section 3.1. Edits are
inserted one by one, and nothing is kept between them but the weights. The published code takes the mean
key for the direction and the bare prompt's for the length; ``same_key`` takes the mean for both, as
Gupta et al. (2024), Rebuilding ROME, which does not collapse.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from locft.methods.base import Editing, Editor, EditorPlan
from locft.methods.memory.edit import (
    Insert,
    choose_layers,
    choose_sites,
    editing,
    flat_mean_keys,
    moments_of,
)
from locft.methods.memory.forms import rome_update
from locft.methods.memory.requests import Request
from locft.methods.memory.site import Site, Splits
from locft.methods.memory.solve import factor
from locft.methods.memory.targets import find_targets, search_of

# Llama-3-8B, as EasyEdit has it; GPT-J has 5 of 28.
PUBLISHED_LAYER = ((5, 32), (5, 32))
LENGTHS = {5: 10, 10: 10}
REMEDY = "give more ordinary text (--neutral-text), or covariance=false"


def make_insert(model: PreTrainedModel, plan: EditorPlan, site: Site) -> Insert:
    """Make what inserts edits one by one, for ROME and what builds on it."""
    settings = plan.settings
    search = search_of(plan, "mlp")
    splits = Splits(model)
    lower = None
    if settings["covariance"]:
        moment = moments_of(model, plan, [site])[site.name]
        lower = factor(moment, f"the second moment of keys at {site.name}", REMEDY)

    def insert(requests: Sequence[Request]) -> None:
        for request in requests:
            [added] = find_targets(splits, site, [request], search)
            bare, mean = flat_mean_keys(splits, site, [request])
            direction = mean if lower is None else torch.cholesky_solve(mean, lower)
            key = mean if settings["same_key"] else bare
            # What the matrix gives for the bare key is what the vector was added to.
            site.add(rome_update(key[:, 0], direction[:, 0], added))

    return insert


def _open(model: PreTrainedModel, plan: EditorPlan) -> AbstractContextManager[Editing]:
    [site] = choose_sites(model, choose_layers(model, plan.settings["layer"], PUBLISHED_LAYER))
    insert = make_insert(model, plan, site)
    return editing(model, plan, [site], LENGTHS, insert, {})


METHOD = Editor(
    name="rome",
    title="a rank-one change of one layer for each edit",
    open=_open,
    lr=0.2,
    settings={
        "layer": "auto",
        "passes": 20,
        "step": "relative",
        "decay": 0.5,
        "clamp": 4.0,
        "covariance": True,
        "same_key": False,
    },
)
