"""RECT: only those entries of another editor's update that change the weights most, relative to them.

Source: Gu et al. (2024), Model Editing Harms General Abilities of Large Language Models: Regularization
to the Rescue, section 5. The paper's base is ROME; it also tries MEMIT, whose layers see one another's
whole updates, as in AlphaEdit's repository, before any is cut. That repository keeps one entry more, and
adds 1e-8 to weights; here exactly the share is kept.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from transformers import PreTrainedModel

from locft.errors import ConfigError
from locft.methods import memit, rome
from locft.methods.base import Editing, Editor, EditorPlan
from locft.methods.memory.edit import Insert, choose_layers, choose_sites, editing
from locft.methods.memory.forms import keep_largest
from locft.methods.memory.requests import Request
from locft.methods.memory.site import Site


def _cut(insert: Insert, sites: Sequence[Site], share: float) -> Insert:
    """Cut down what a batch of edits changes."""

    def insert_cut(requests: Sequence[Request]) -> None:
        before = [site.matrix for site in sites]
        insert(requests)
        for site, weight in zip(sites, before, strict=True):
            update = site.matrix - weight
            site.add(keep_largest(update, weight, share) - update)

    return insert_cut


def _one_by_one(insert: Insert) -> Insert:
    def insert_each(requests: Sequence[Request]) -> None:
        for request in requests:
            insert([request])

    return insert_each


def _open(model: PreTrainedModel, plan: EditorPlan) -> AbstractContextManager[Editing]:
    base, share = plan.settings["base"], plan.settings["share"]
    if base == "rome":
        [site] = choose_sites(model, choose_layers(model, plan.settings["layers"], rome.PUBLISHED_LAYER))
        insert = _one_by_one(_cut(rome.make_insert(model, plan, site), [site], share))
        return editing(model, plan, [site], rome.LENGTHS, insert, {})
    if base != "memit":
        raise ConfigError(f"base is {base!r}: expected rome or memit")
    sites = choose_sites(model, choose_layers(model, plan.settings["layers"], memit.PUBLISHED_LAYERS))
    insert = _cut(memit.make_insert(model, plan, sites), sites, share)
    return editing(model, plan, sites, memit.LENGTHS, insert, {})


METHOD = Editor(
    name="rect",
    title="the largest relative changes of ROME or MEMIT",
    open=_open,
    lr=0.2,
    settings={
        "base": "rome",
        "share": 0.4,
        "layers": "auto",
        **{name: rome.METHOD.settings[name] for name in ("passes", "step", "decay", "clamp")},
        "covariance": True,
        "same_key": False,
        "lambda": memit.METHOD.settings["lambda"],
    },
)
