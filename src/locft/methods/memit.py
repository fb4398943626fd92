"""MEMIT: a batch of edits spread over the down projections of several layers.

Source: Meng et al. (2023), Mass-Editing Memory in a Transformer, equations 14, 19 and 20, algorithm 1.
Nothing is kept between batches but the weights, and C is that of the unedited model.
"""

from contextlib import AbstractContextManager

from torch import Tensor
from transformers import PreTrainedModel

from locft.methods.base import Editing, Editor, EditorPlan
from locft.methods.memory.edit import Insert, choose_layers, choose_sites, editing, moments_of, spread
from locft.methods.memory.forms import memit_update
from locft.methods.memory.site import Site, Splits
from locft.methods.memory.solve import factor
from locft.methods.memory.targets import search_of

# Llama-3-8B, as AlphaEdit's repository has it; GPT-J has 3 to 8 of 28, GPT-2 XL 13 to 17 of 48.
PUBLISHED_LAYERS = ((4, 32), (8, 32))
LENGTHS = {10: 5}
SETTINGS = {"layers": "auto", "passes": 25, "step": "relative", "decay": 0.5, "clamp": 0.75}
# lambda is for the inputs of Llama-3-8B's down projection: C^-1 weighs a usual key by their number.
_PUBLISHED_WIDTH = 14_336
REMEDY = "give more ordinary text (--neutral-text)"


def make_insert(model: PreTrainedModel, plan: EditorPlan, sites: list[Site]) -> Insert:
    """Make what inserts a batch of edits, for MEMIT and what builds on it."""
    search = search_of(plan, "block")
    moments = moments_of(model, plan, sites)
    lowers = {
        name: factor(
            plan.settings["lambda"] * len(one) / _PUBLISHED_WIDTH * one,
            f"the second moment of keys at {name}",
            REMEDY,
        )
        for name, one in moments.items()
    }

    def update_of(site: Site, keys: Tensor, residuals: Tensor) -> Tensor:
        return memit_update(keys, residuals, lowers[site.name])

    splits = Splits(model)
    return lambda requests: spread(splits, sites, requests, search, update_of)


def _open(model: PreTrainedModel, plan: EditorPlan) -> AbstractContextManager[Editing]:
    sites = choose_sites(model, choose_layers(model, plan.settings["layers"], PUBLISHED_LAYERS))
    return editing(model, plan, sites, LENGTHS, make_insert(model, plan, sites), {})


METHOD = Editor(
    name="memit",
    title="batches of edits spread over layers",
    open=_open,
    lr=0.2,
    settings={**SETTINGS, "lambda": 15_000.0},
)
