"""Tries a family out on a tiny model: all that an edit relies on, at each module of a middle layer."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from locft.checkpoint import read_checkpoint
from locft.data.encode import Encoded
from locft.errors import LocftError
from locft.families.records import Verdict
from locft.families.tiny import NUM_LAYERS, VOCABULARY, class_name, tiny_config, tiny_model
from locft.model.experts import count_served
from locft.model.location import MIXTURE_MODULES, MODULES, Location, resolve_location
from locft.model.matching import map_parameters
from locft.model.refusals import why_refused
from locft.model.split import Split, split_model
from locft.model.structure import find_layers, find_modules
from locft.model.weights import swapped_in
from locft.patch.apply import apply_patch
from locft.patch.manifest import PatchLocation, PatchManifest, PatchModel
from locft.patch.weights import make_patch, patched_values
from locft.tensorfile import read_tensor
from locft.train.cache import build_cache
from locft.train.loop import Schedule, train_breadth_first

LAYER = NUM_LAYERS // 2
# Lengths that differ, so that padding matters.
_LENGTHS = (9, 6, 4)
_LARGEST_DIFFERENCE = 1e-5  # of logits, to the largest of them
_LARGEST_BEND = 1e-3  # of what is affine but for rounding
_LR = 0.01


class CheckFailedError(LocftError):
    """A tiny model is not edited right, though nothing refuses it."""


def check_family(name: str) -> Verdict:
    """Try a family out.

    Args:
        name: Its `model_type`.

    Returns:
        The verdict.

    Raises:
        CheckFailedError: Nothing refuses it, and still an edit goes wrong.
    """
    told = _refused_by_configuration(name)
    if told is not None:
        return told
    try:
        config = tiny_config(name)
        model = tiny_model(config)
        split = split_model(model, LAYER)
    except LocftError as error:
        return _refused(name, str(error), "trial")
    _check_tail(name, split)
    modules = find_modules(
        find_layers(model), LAYER, (*MODULES, *MIXTURE_MODULES, *_expert_modules(split))
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        model.save_pretrained(folder)
        config.save_pretrained(folder)  # of all of it, where this is the decoder of something larger
        for module in modules:
            _check_module(name, model, folder, module, Path(place) / module)
    named = tuple(dict.fromkeys(re.sub(r"\[\d+\]", "[N]", module) for module in modules))
    return Verdict(name=name, class_name=class_name(name), status="supported", modules=named)


def _refused_by_configuration(name: str) -> Verdict | None:
    try:
        config = tiny_config(name)
    except LocftError:
        config = None
    reason = why_refused({"model_type": name} if config is None else config.to_dict())
    return None if reason is None else _refused(name, reason, "configuration")


def _refused(name: str, reason: str, by: Literal["configuration", "trial"]) -> Verdict:
    return Verdict(name=name, class_name=class_name(name), status="refused", reason=reason, by=by)


def _sequences() -> list[list[int]]:
    """Make sequences that begin alike, of spread ids that every tiny vocabulary has."""
    shared = [5, 12, 19]
    rows = [[(11 + 13 * row + 7 * index) % VOCABULARY for index in range(9)] for row in range(3)]
    return [(shared + rest)[:length] for rest, length in zip(rows, _LENGTHS, strict=True)]


def _examples() -> list[Encoded]:
    """Make examples whose last two tokens are the target."""
    return [Encoded(ids=tuple(ids), target_start=len(ids) - 2) for ids in _sequences()]


def _full_logits(model: PreTrainedModel) -> Tensor:
    """Run the whole model, padded on the right; give the logits (N, V) of all real positions."""
    sequences = _sequences()
    ids = torch.zeros((len(sequences), max(_LENGTHS)), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return torch.cat([logits[row, :length] for row, length in enumerate(_LENGTHS)])


def _difference(found: Tensor, expected: Tensor) -> float:
    """Give the largest difference between logits, as a share of the largest of them."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _expert_modules(split: Split) -> list[str]:
    """Name the modules of the expert that serves the most tokens of the examples."""
    cache = build_cache(split, _examples())
    batch = cache.batch(range(cache.num_examples))
    served = count_served(split, [(batch.packed, batch.hidden)])
    most = 0 if served is None else served.index(max(served))
    return [f"mlp.expert[{most}].{direction}" for direction in ("up", "down")]


def _check_tail(name: str, split: Split) -> None:
    """Compare the tail on cached states with the full forward at every position."""
    examples = [Encoded(ids=(*ids, 0), target_start=1) for ids in _sequences()]
    cache = build_cache(split, examples)
    batch = cache.batch(range(len(examples)))
    with torch.no_grad(), split.tail() as tail:
        found = tail(batch.packed, batch.hidden, batch.asked)
    expected = _full_logits(split.model)
    difference = _difference(found, expected)
    if not difference < _LARGEST_DIFFERENCE:
        raise CheckFailedError(
            f"{name}: the tail on cached states differs from the full forward by {difference:.2g} of "
            f"the largest logit, under {_LARGEST_DIFFERENCE:g} expected"
        )


def _check_module(
    name: str, model: PreTrainedModel, folder: Path, module: str, edited_folder: Path
) -> None:
    """Edit one module, from a training step to the reloaded model, and leave the model unedited."""
    location = resolve_location(model, str(LAYER) if module == "entire" else f"{LAYER}.{module}")
    where = f"{name}, {location.name}"
    _check_projection(where, model, location)
    own = {key: value.detach().clone() for key, value in model.named_parameters()}
    split = split_model(model, location.layer)
    cache = build_cache(split, _examples())
    weights = map_parameters(model, read_checkpoint(folder), location.parameters)
    schedule = Schedule(
        lr=_LR, batch_size=len(_LENGTHS), epochs=1, stop_loss=0.0, loss_mean="sample", seed=0
    )
    try:
        trained = train_breadth_first(split, location, cache, schedule)
        _check_changed(where, model, location, own)
    finally:
        with torch.no_grad():
            for key, value in own.items():
                model.get_parameter(key).copy_(value)
    entries = weights.entries
    patch, _ = make_patch(weights, trained.matrices, _manifest(location))
    apply_patch(folder, patch, edited_folder)
    written = read_checkpoint(edited_folder)
    if written.keys() != entries.keys():
        raise CheckFailedError(f"{where}: the edited model has other tensors than the original")
    for tensor, entry in entries.items():
        same = read_tensor(written[tensor]) == read_tensor(entry)
        if same == (tensor in patch.tensors):
            what = "is as it was, though edited" if same else "changed, though not edited"
            raise CheckFailedError(f"{where}: tensor {tensor} {what}")
    expected = _logits_with(model, patched_values(model, folder, patch))
    again = AutoModelForCausalLM.from_pretrained(edited_folder, dtype=torch.float32).eval()
    difference = _difference(_full_logits(again), expected)
    if not difference < _LARGEST_DIFFERENCE:
        raise CheckFailedError(
            f"{where}: the logits of the reloaded model differ from the edited ones by {difference:.2g}"
        )
    if not _difference(_full_logits(model), expected) > _LARGEST_DIFFERENCE:
        raise CheckFailedError(f"{where}: the edit changes no logits")


def _check_projection(where: str, model: PreTrainedModel, location: Location) -> None:
    """Refuse what is called a projection, and does not act as one.

    What an MLP gives is affine in its down projection, and in its up projection where that is multiplied
    by a gate; in the gate it is not.
    """
    if location.module.endswith((".up", ".down")):
        head, _, direction = location.name.rpartition(".")
        twin = resolve_location(model, f"{head}.{'down' if direction == 'up' else 'up'}")
        if twin.num_parameters != location.num_parameters:
            raise CheckFailedError(
                f"{where}: up and down differ in size, {location.num_parameters:,} and "
                f"{twin.num_parameters:,} numbers"
            )
    if not location.module.endswith("down") and not location.parts:
        return
    [name] = location.parameters[:1]
    part = location.parts.get(name, ())
    holder = name.removesuffix(".weight").rpartition(".")[0]
    names = find_layers(model).names
    if holder.rpartition(".")[2] not in (*names.mlp, *names.shared, *names.experts):
        return  # the layer holds it itself
    taken: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken.append((args, kwargs))

    module = model.get_submodule(holder)
    handle = module.register_forward_pre_hook(take, with_kwargs=True)
    try:
        _full_logits(model)
    finally:
        handle.remove()
    args, kwargs = taken[0]

    def given(scale: float) -> Tensor:
        changed = model.get_parameter(name).detach().clone()
        changed[part] *= scale
        with swapped_in(model, {name: changed}), torch.no_grad():
            found = module(*args, **kwargs)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output

    nothing, once, twice = given(0), given(1), given(2)
    bend = (twice - 2 * once + nothing).abs().max() / (once - nothing).abs().max()
    if not bend < _LARGEST_BEND:  # also where nothing changed
        raise CheckFailedError(
            f"{where}: {name} does not act as a projection: its MLP is not affine in it ({bend:.2g})"
        )


def _check_changed(
    where: str, model: PreTrainedModel, location: Location, own: Mapping[str, Tensor]
) -> None:
    """Refuse a step that changed something else than the location, or nothing."""
    moved = 0
    for key, value in model.named_parameters():
        changed = value.detach() != own[key]
        if key in location.parameters:
            part = location.parts.get(key, ())
            moved += int(changed[part].sum())
            changed[part] = False
        if changed.any():
            raise CheckFailedError(f"{where}: a training step changed {key} where it is frozen")
    if not moved:
        raise CheckFailedError(f"{where}: a training step changed nothing")


def _logits_with(model: PreTrainedModel, values: Mapping[str, Tensor]) -> Tensor:
    with swapped_in(model, values):
        return _full_logits(model)


def _manifest(location: Location) -> PatchManifest:
    return PatchManifest(
        locft_version="0",
        model=PatchModel(id="tiny", revision=None),
        location=PatchLocation(
            name=location.name,
            layer=location.layer,
            module=location.module,
            num_parameters=location.num_parameters,
        ),
        dtype="F32",
        settings={},
        num_edits=1,
        edits_sha256="0" * 64,
    )
