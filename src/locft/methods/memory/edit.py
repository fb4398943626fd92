"""How editors that look for target vectors insert a batch of edits; what each adds is its update."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from locft.errors import ConfigError
from locft.methods.base import Editing, EditorPlan
from locft.methods.memory.requests import Request, make_request
from locft.methods.memory.site import Seen, Site, Splits, find_sites, look_up, restored
from locft.methods.memory.targets import Search, find_targets
from locft.methods.memory.templates import write_prefixes
from locft.model.neutral import known_moments
from locft.model.structure import find_layers
from locft.types import Edit

Insert = Callable[[Sequence[Request]], None]
DOWN = "mlp.down"


def choose_layers(model: PreTrainedModel, given: str, published: Sequence[tuple[int, int]]) -> range:
    """Choose the layers that an editor changes.

    Args:
        model: The model.
        given: ``4-8``, ``5``, or ``auto`` for those at the same relative depth as in the paper.
        published: First and last layer there, each with how many layers that model has.

    Returns:
        The layers, ascending; as many as published where that is left to us and the model has so many.

    Raises:
        ConfigError: The text cannot be read, or names the last layer or one that there is not.
    """
    num = len(find_layers(model))
    highest = num - 2  # what a layer hands on must meet another layer
    if given == "auto":
        (first, _), (last, of) = published
        top = min(highest, round(Fraction(last * (num - 1), of - 1)))
        return range(max(0, top - (last - first)), top + 1)
    first_text, _, last_text = given.partition("-")
    bounds = (first_text, last_text or first_text)
    if all(text.isdecimal() for text in bounds):
        low, high = map(int, bounds)
        if low <= high <= highest:
            return range(low, high + 1)
    raise ConfigError(
        f"layers {given!r}: expected auto, or layers from 0 to {highest} (of {num:,}, all but the last) "
        "as 5 or 4-8"
    )


def choose_sites(model: PreTrainedModel, layers: Sequence[int]) -> list[Site]:
    """Find the down projections of some layers, one each.

    Raises:
        ModelError: A layer has none of a linear layer.
    """
    return [find_sites(model, layer, DOWN)[0] for layer in layers]


def moments_of(model: PreTrainedModel, plan: EditorPlan, sites: Sequence[Site]) -> Mapping[str, Tensor]:
    """Give C, the mean of k k^T over ordinary text, (K, K) float64, of each site by name.

    It is of the unedited model, is measured for all sites in one pass, and is kept.
    """
    groups = [(site.layer, (site.name,)) for site in sites]
    found = known_moments(model, plan.model_sha256, groups, plan.sequences)
    return {name: one.matrix.double() for name, one in found.items()}


@contextmanager
def editing(
    model: PreTrainedModel,
    plan: EditorPlan,
    sites: Sequence[Site],
    lengths: Mapping[int, int],
    insert: Insert,
    notes: Mapping[str, Any],
) -> Iterator[Editing]:
    """Edit batches of requests while the body runs, and give the model its weights back.

    Args:
        model: The model, unedited.
        plan: What the editor is told.
        sites: What it changes.
        lengths: How many context templates of each length there are.
        insert: Inserts a batch.
        notes: What is to be recorded.

    Yields:
        The model, ready.
    """
    prefixes = write_prefixes(model, plan.codec, lengths, plan.seed)
    num_tokens = sum(map(len, plan.sequences))

    def insert_edits(edits: Sequence[Edit]) -> None:
        insert([make_request(plan.codec, edit, prefixes) for edit in edits])

    with restored(sites):
        yield Editing(
            insert=insert_edits,
            values=lambda: {site.name: site.parameter.detach().clone() for site in sites},
            num_parameters=sum(site.parameter.numel() for site in sites),
            notes={
                "layers": [site.layer for site in sites],
                "prefixes": list(prefixes),
                "statistics_tokens": num_tokens,
                "seed": plan.seed,
                **notes,
            },
        )


def half_and_half_keys(splits: Splits, site: Site, requests: Sequence[Request]) -> Tensor:
    """Give MEMIT's keys: half that of the bare prompt, half the mean of those behind templates.

    Returns:
        (K, N) float64.
    """
    seen = _look_up_all(splits, site, requests).keys
    groups = seen.view(len(requests), 1 + len(requests[0].prefixed), -1)
    return ((groups[:, 0] + groups[:, 1:].mean(dim=1)) / 2).T


def flat_mean_keys(splits: Splits, site: Site, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    """Give ROME's keys: of the bare prompts, and the means over bare and prefixed ones.

    Returns:
        (K, N) float64, twice.
    """
    seen = _look_up_all(splits, site, requests).keys
    groups = seen.view(len(requests), 1 + len(requests[0].prefixed), -1)
    return groups[:, 0].T, groups.mean(dim=1).T


def _look_up_all(splits: Splits, site: Site, requests: Sequence[Request]) -> Seen:
    return look_up(splits, site, [row for one in requests for row in (one.bare, *one.prefixed)])


def spread(
    splits: Splits,
    sites: Sequence[Site],
    requests: Sequence[Request],
    search: Search,
    update_of: Callable[[Site, Tensor, Tensor], Tensor],
) -> None:
    """Insert edits over several layers, as MEMIT does (Meng et al. 2023, algorithm 1).

    Target vectors are found at the last layer, with the weights at the start of the batch. Each layer
    then takes an equal share of what is still missing, given what those below have done.

    Args:
        splits: The model.
        sites: The layers' matrices, ascending.
        requests: The edits.
        search: How target vectors are looked for.
        update_of: Gives a site's update (O, K) from keys (K, N) and residuals (O, N).
    """
    last = sites[-1]
    bare = [one.bare for one in requests]
    wanted = look_up(splits, last, bare).states + find_targets(splits, last, requests, search)
    for number, site in enumerate(sites):
        keys = half_and_half_keys(splits, site, requests)
        missing = wanted - look_up(splits, last, bare).states
        site.add(update_of(site, keys, missing.T / (len(sites) - number)))
