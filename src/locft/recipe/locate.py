"""Finds a good tuning location for a model and edits, without a whole training for every one.

Successive halving (Jamieson and Talwalkar 2016): many locations are tried on a few edits, the better
ones again on more edits, until a few are left. A try is cheap: what the layers below hand on is computed
once for all modules of a layer, and answers are not generated but predicted, teacher-forced: a target
all of whose tokens are the likeliest ones is what greedy decoding gives.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from locft.config import RunConfig
from locft.data.contexts import in_context
from locft.data.encode import Encoded
from locft.data.gather import check_tokens, gather_edits, say_warnings
from locft.errors import InputError, LocationError, TrainingError
from locft.evaluation.drift import NeutralText, cut_windows, first_passages, kl_sum, read_neutral_text
from locft.evaluation.metrics import Floats, mean, mean_per_token, middle_of
from locft.evaluation.subject import Subject, load_subject
from locft.methods import Plan, ft_m
from locft.model.load import context_tokens
from locft.model.location import MIXTURE_MODULES, MODULES, resolve_location
from locft.model.split import Split, Tail, split_model
from locft.model.structure import find_layers, find_modules
from locft.progress import progress
from locft.recipe.preference import Preference, rule_of, value_from, value_of
from locft.report.words import counted, seconds_text
from locft.train.cache import LayerCaches, PrefixCache
from locft.train.defaults import choose_engine, choose_schedule
from locft.train.loop import Engine, Schedule, run_breadth_first
from locft.train.objective import predicted_share
from locft.train.step import Stepper
from locft.types import Edit, Figure

# Depths, in percent, at which each module is tried first. Later layers are the paper's general advice,
# and it found a second peak in early ones; so did the study of all locations of the demo model, where
# the whole MLP was the best module of nearly every layer, or close to it (docs/studies/locations.md).
_FIRST: Mapping[str, tuple[int, ...]] = {
    "mlp": (12, 30, 50, 66, 76, 83, 92),
    "mlp.down": (25, 70, 83),
    "mlp.up": (70,),
    "entire": (80,),
}
_LIKELIEST = 76  # percent
_KEPT = 4  # one of so many goes on
_NUM_REFINED = 2  # whose neighbours are tried, too
_MOST_NEIGHBOURS = 5
_GROWTH = 1.5  # times as many edits at least, where plans are made
_FEWEST_EDITS, _MOST_EDITS = 16, 200
_FEWEST_LEFT = 3
_NUM_WINDOWS, _WINDOW_TOKENS = 8, 96  # of neutral text
_EPOCHS = 25
_FEWEST_STEPS = 5  # of an epoch: locations that have learnt too little cannot be told apart
_FIXED_EDITS = 10  # worth of work that a try costs besides
_MARGIN = 0.9  # of the time that is left may be planned for
_MOST_REPHRASES = 2
_MEASURED_TOGETHER = 20
_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of trying a location.

    Attributes:
        location: The location.
        num_edits: On how many edits.
        scores: Reliability, generalization and drift, by name; the first two by prediction.
        value: What that is worth, in points, under the preference.
        seconds: What it took.
        reason: Why it has no value; None if it has.
    """

    location: str
    num_edits: int
    scores: Mapping[str, Figure]
    value: float | None
    seconds: float
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """A location that was found.

    Attributes:
        location: The recommended one.
        prefer: The preference.
        rule: How it values a location.
        rounds: What was tried in each round, the best first.
        runner_up: The second best of the last round; None if it had no other.
        lead: How much more the recommended one is worth, in points, on the same edits and passages.
        certainty: In which share of resamples of edits and passages it is the best of the last round.
        budget_s: How long it might take.
        wall_s: How long it took, loading included.
    """

    location: str
    prefer: Preference
    rule: str
    rounds: tuple[tuple[Outcome, ...], ...]
    runner_up: str | None
    lead: Figure | None
    certainty: float
    budget_s: float
    wall_s: float


@dataclass(frozen=True)
class _Tried:
    """An outcome with what it was made of: a value for each edit, each rephrase's edit, each passage."""

    outcome: Outcome
    learnt: Floats
    carried: Floats
    drifts: Floats
    weights: Floats


@dataclass(frozen=True)
class _Ground:
    """What locations are tried on."""

    subject: Subject
    engine: Engine
    config: RunConfig
    prefer: Preference
    edits: tuple[Edit, ...]  # in an order that the seed names
    windows: tuple[Encoded, ...]

    @property
    def num_layers(self) -> int:
        return len(find_layers(self.subject.loaded.model))


class _Caches:
    """What enters a layer, of the edits, of their other wordings, and of the neutral text."""

    def __init__(self, ground: _Ground, num_edits: int) -> None:
        encode = ground.subject.codec.encode
        edits = ground.edits[:num_edits]
        self._examples = [encode(edit) for edit in edits]
        wordings = [(number, text) for number, edit in enumerate(edits) for text in _other_words(edit)]
        self._others = [encode(replace(edits[number], prompt=text)) for number, text in wordings]
        self.edit_of = np.asarray([number for number, _ in wordings])
        self._windows = ground.windows
        self._own, self._carried, self._text = LayerCaches(), LayerCaches(), LayerCaches()

    def at(self, split: Split) -> tuple[PrefixCache, PrefixCache, PrefixCache]:
        return (
            self._own(split, self._examples),
            self._carried(split, self._others),
            self._text(split, self._windows),
        )


def locate(
    model: str,
    edits: str | Path | Sequence[Edit],
    budget_s: float,
    prefer: Preference = "balanced",
    config: RunConfig | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Found:
    """Find a good tuning location.

    Args:
        model: The model.
        edits: The edits' file, or the edits; a part of them is trained and scored.
        budget_s: How long it may take, in seconds, loading included.
        prefer: What makes a location good; `rule_of` says how.
        config: The settings; its `location` does not count. If None, the defaults.
        say: Called with a line at each step.

    Returns:
        What was tried, and the recommended location.

    Raises:
        InputError: The edits or the model cannot be used, or the budget is too short to try two
            locations.
    """
    began = time.perf_counter()
    config = config or RunConfig()
    text = read_neutral_text(config.drift_text)
    gathered = gather_edits(edits, config.on_conflict)
    say(f"loading {model}")
    subject = load_subject(model, config)
    warnings = check_tokens(gathered, subject.codec, context_tokens(subject.loaded.model.config))
    say_warnings(gathered, warnings, say)
    return find_location(subject, gathered.edits, text, budget_s, prefer, config, say=say, began=began)


def find_location(
    subject: Subject,
    edits: Sequence[Edit],
    text: NeutralText,
    budget_s: float,
    prefer: Preference,
    config: RunConfig,
    *,
    say: Callable[[str], None] = lambda _: None,
    began: float | None = None,
) -> Found:
    """Find a good tuning location of a model that is loaded, as `locate` does.

    Args:
        subject: The model; it is left as it was.
        edits: The edits.
        text: What drift is measured on.
        budget_s: How long it may take, in seconds, from `began` on.
        prefer: What makes a location good.
        config: The settings.
        say: Called with a line at each step.
        began: When it began, by `time.perf_counter`; now if None.

    Returns:
        What was tried, and the recommended location.

    Raises:
        InputError: The budget is too short to try two locations.
    """
    began = time.perf_counter() if began is None else began
    shuffler = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(edits), generator=shuffler).tolist()[:_MOST_EDITS]
    network = subject.loaded.model
    ground = _Ground(
        subject=subject,
        engine=choose_engine(config, network),
        config=config,
        prefer=prefer,
        edits=tuple(edits[index] for index in order),
        windows=_windows(subject, text),
    )
    rounds = _halve(ground, began + budget_s, say)
    last = rounds[-1]
    lead, certainty = _compare(last, prefer)
    return Found(
        location=last[0].outcome.location,
        prefer=prefer,
        rule=rule_of(prefer),
        rounds=tuple(tuple(one.outcome for one in tried) for tried in rounds),
        runner_up=last[1].outcome.location if lead is not None else None,
        lead=lead,
        certainty=certainty,
        budget_s=budget_s,
        wall_s=time.perf_counter() - began,
    )


def _halve(ground: _Ground, deadline: float, say: Callable[[str], None]) -> list[list[_Tried]]:
    """Try many locations on a few edits, and the better ones again on more.

    Returns:
        What was tried in each round, the best first.
    """
    names = _first_locations(ground)
    most = len(ground.edits)
    fewest = min(_FEWEST_EDITS, most)
    # They tell what a try costs. The first one also warms the machine up, and runs the layers below.
    caches = _Caches(ground, fewest)
    probes = [_try(ground, names[0], fewest, caches) for _ in range(2)]
    second_s = probes[1].outcome.seconds / _work(ground, names[0], fewest)
    left = _MARGIN * (deadline - time.perf_counter()) / second_s
    while len(names) > 1 and _plan_work(ground, names, fewest, is_first=True) > left:
        names.pop()
    if len(names) == 1:
        needed = second_s * _plan_work(ground, names * 2, fewest, is_first=True) / _MARGIN
        raise InputError(
            "the budget is too short to try two locations: on this machine, and once the model is "
            f"loaded, that takes {seconds_text(sum(one.outcome.seconds for one in probes) + needed)}"
        )
    rounds: list[list[_Tried]] = []
    while True:
        left = _MARGIN * (deadline - time.perf_counter()) / second_s
        num_edits = fewest
        while num_edits < most and _plan_work(ground, names, num_edits + 1, not rounds) <= left:
            num_edits += 1
        num_before = rounds[-1][0].outcome.num_edits if rounds else 0
        # Where all edits were in already, only new locations are tried.
        known = {one.outcome.location: one for one in (rounds[-1] if rounds else ())}
        again = [known[name] for name in names if name in known and num_edits == num_before]
        if rounds and (num_edits < num_before or len(again) == len(names)):
            return rounds  # there is no time for more, or nothing more to try
        say(
            f"round {len(rounds) + 1}: {counted(len(names), 'location')} on {counted(num_edits, 'edit')}"
        )
        told = {one.outcome.location for one in again}
        new = [name for name in names if name not in told]
        fresh = _try_all(ground, new, num_edits, deadline)
        if rounds and len(fresh) < len(new):
            return rounds  # time was up before all had their turn
        tried = again + fresh
        ranked = sorted((one for one in tried if one.outcome.value is not None), key=_worst_last)
        if not ranked:
            if not rounds:
                raise InputError("no location could be trained: try a lower learning rate (--lr)")
            return rounds
        failed = [one for one in tried if one.outcome.value is None]
        rounds.append([*ranked, *failed])
        if len(ranked) <= _FEWEST_LEFT or time.perf_counter() > deadline:
            return rounds
        spent = sum(one.outcome.seconds for one in fresh)
        second_s = spent / sum(_work(ground, one.outcome.location, num_edits) for one in fresh)
        names = [one.outcome.location for one in ranked[: _num_kept(len(ranked))]]
        if len(rounds) == 1:
            seen = {one.outcome.location for one in tried}
            names += [name for name in _neighbours(ground, names[:_NUM_REFINED]) if name not in seen]


def _worst_last(tried: _Tried) -> float:
    assert tried.outcome.value is not None
    return -tried.outcome.value


def _num_kept(num: int) -> int:
    return max(_FEWEST_LEFT, math.ceil(num / _KEPT))


def _first_locations(ground: _Ground) -> list[str]:
    """Name the locations of the first round that this model has, what is likeliest to be good first."""
    places = [
        (abs(depth - _LIKELIEST), number, f"{depth}%" + ("" if module == "entire" else f".{module}"))
        for number, (module, depths) in enumerate(_FIRST.items())
        for depth in depths
    ]
    names: dict[str, None] = {}
    reason: LocationError | None = None
    for *_, name in sorted(places):
        # Of a mixture of experts, the shared expert's projections, and those of all routed ones.
        for wanted in dict.fromkeys((name, name.replace(".mlp.", ".mlp.experts."))):
            try:
                names[resolve_location(ground.subject.loaded.model, wanted).name] = None
            except LocationError as error:  # a part that this layer does not have
                reason = error
    if not names:
        assert reason is not None
        raise reason
    return list(names)


def _neighbours(ground: _Ground, names: Sequence[str]) -> list[str]:
    """Name the locations beside some: the same module of layers nearby, and the first one's layer."""
    found: dict[str, None] = {}
    network = ground.subject.loaded.model
    step = max(1, round(ground.num_layers / 20))
    for number, name in enumerate(names):
        layer, _, part = name.partition(".")
        places = [(int(layer) + near, part or "entire") for near in (-step, step)]
        if not number:
            places += [(int(layer), module) for module in _modules(ground, int(layer))]
        for near, module in places:
            is_there = 0 <= near < ground.num_layers and module in _modules(ground, near)
            if is_there and module != "attn":  # which was never good
                wanted = f"{near}.{module}" if module != "entire" else str(near)
                found[resolve_location(network, wanted).name] = None
    return [name for name in found if name not in names][:_MOST_NEIGHBOURS]


def _modules(ground: _Ground, layer: int) -> list[str]:
    layers = find_layers(ground.subject.loaded.model)
    return find_modules(layers, layer, (*MODULES, *MIXTURE_MODULES))


def _work(ground: _Ground, name: str, num_edits: int) -> float:
    """Estimate what a try costs, in units of training one edit through all layers."""
    layer = int(name.partition(".")[0])
    share = (ground.num_layers - layer + 1) / ground.num_layers
    return share * (num_edits + _FIXED_EDITS)


def _plan_work(ground: _Ground, names: Sequence[str], num_edits: int, is_first: bool) -> float:
    """Estimate what this round and those after it cost, from some locations on so many edits on."""
    mean = sum(_work(ground, name, num_edits) for name in names) / len(names)
    num, growth = len(names), 1.0
    total = num * mean
    while num > _FEWEST_LEFT:
        num = _num_kept(num) + (_MOST_NEIGHBOURS if is_first else 0)
        is_first = False
        growth *= _GROWTH
        total += num * growth * mean
    return total


def _try_all(ground: _Ground, names: Sequence[str], num_edits: int, deadline: float) -> list[_Tried]:
    """Try locations in the order of their layers; those that are left when time is up are left out."""
    if not names:
        return []
    caches = _Caches(ground, num_edits)
    in_order = sorted(names, key=lambda name: int(name.partition(".")[0]))
    tried: list[_Tried] = []
    with progress("trying locations", len(in_order), "locations") as advance:
        for name in in_order:
            if tried and time.perf_counter() > deadline:
                break
            tried.append(_try(ground, name, num_edits, caches))
            advance(1, note=name)
    return tried


def _try(ground: _Ground, name: str, num_edits: int, caches: _Caches) -> _Tried:
    """Train one location on some edits, and measure what came of it."""
    began = time.perf_counter()
    network = ground.subject.loaded.model
    schedule = _schedule(ground, name, num_edits)
    plan = Plan(location=name, num_steps=0, seed=ground.config.seed)
    nothing: Floats = np.zeros(0)
    with ft_m.METHOD.attach(network, plan) as tuning:
        split = split_model(network, tuning.layer)
        own, carried, text = caches.at(split)
        with (
            tuning.trainable.alone(network),
            split.tail(in_bfloat16=ground.engine.in_bfloat16, compiled=ground.engine.compiled) as tail,
        ):
            before = _predict(tail, text)
            try:
                stepper = Stepper(tail, own, tuning.trainable, schedule.lr, schedule.loss_mean)
                run_breadth_first(stepper, schedule)
                learnt = np.concatenate([_exact(*part) for part in _answers(tail, own)])
                likely = np.concatenate([_likelihood(*part) for part in _answers(tail, carried)])
                moved = [kl_sum(*pair) for pair in zip(before, _predict(tail, text), strict=True)]
            except TrainingError as error:
                outcome = Outcome(
                    location=name,
                    num_edits=num_edits,
                    scores={},
                    value=None,
                    seconds=time.perf_counter() - began,
                    reason=str(error),
                )
                return _Tried(outcome, nothing, nothing, nothing, nothing)
    of_edits = np.bincount(caches.edit_of, weights=likely) / np.bincount(caches.edit_of)
    weights = np.asarray([len(logits) for logits in before], dtype=float)
    drifts = np.asarray(moved)
    scores = {
        "reliability": mean(learnt.tolist()),
        "generalization": mean(of_edits.tolist()),
        "drift": mean_per_token(drifts.tolist(), weights.astype(int).tolist()),
    }
    outcome = Outcome(
        location=name,
        num_edits=num_edits,
        scores=scores,
        value=value_of(scores, ground.prefer),
        seconds=time.perf_counter() - began,
    )
    return _Tried(outcome, learnt, of_edits, drifts, weights)


def _schedule(ground: _Ground, name: str, num_edits: int) -> Schedule:
    network, config = ground.subject.loaded.model, ground.config
    shapes = resolve_location(network, name).shapes
    batch_size = min(config.batch_size, math.ceil(num_edits / _FEWEST_STEPS))
    schedule = choose_schedule(replace(config, batch_size=batch_size), num_edits, shapes)
    return replace(schedule, epochs=min(schedule.epochs, _EPOCHS))


def _predict(tail: Tail, cache: PrefixCache) -> list[Tensor]:
    """Give the logits (T, V) of each example's targets."""
    found: list[Tensor] = []
    with torch.no_grad():
        for index in range(cache.num_examples):
            batch = cache.batch([index])
            found.append(tail(batch.packed, batch.hidden, batch.asked))
    return found


def _answers(tail: Tail, cache: PrefixCache) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Give logits (M, V), labels (M,) and rows (M,) of all examples, some at a time."""
    with torch.no_grad():
        for start in range(0, cache.num_examples, _MEASURED_TOGETHER):
            batch = cache.batch(range(start, min(start + _MEASURED_TOGETHER, cache.num_examples)))
            yield tail(batch.packed, batch.hidden, batch.asked), batch.labels, batch.rows


def _exact(logits: Tensor, labels: Tensor, rows: Tensor) -> Floats:
    """Tell of each example whether every token of its target is the likeliest one."""
    return (predicted_share(logits, labels, rows) == 1).double().cpu().numpy()


def _likelihood(logits: Tensor, labels: Tensor, rows: Tensor) -> Floats:
    """Give the probability of each example's target."""
    scores = torch.log_softmax(logits.float(), dim=1).gather(1, labels[:, None])[:, 0]
    return torch.bincount(rows, weights=scores.double()).exp().cpu().numpy()


def _other_words(edit: Edit) -> tuple[str, ...]:
    """Give other wordings of an edit's prompt; the prompt behind another sentence if it has none."""
    return edit.rephrases[:_MOST_REPHRASES] or (in_context(edit.prompt, "prefix"),)


def _windows(subject: Subject, text: NeutralText) -> tuple[Encoded, ...]:
    """Cut the beginnings of some passages, as many of each kind as can be."""
    passages = first_passages(text, _NUM_WINDOWS)
    windows = cut_windows(subject.loaded.tokenizer, passages)[:_NUM_WINDOWS]
    return tuple(Encoded(ids=tuple(ids[:_WINDOW_TOKENS]), target_start=1) for _, ids in windows)


def _compare(tried: Sequence[_Tried], prefer: Preference) -> tuple[Figure | None, float]:
    """Tell how far the first is ahead of the second, and how often it is the best of all."""
    rivals = [one for one in tried if one.outcome.value is not None]
    if len(rivals) < 2:
        return None, 1.0
    random = np.random.default_rng(0)
    num_edits, num_passages = len(rivals[0].learnt), len(rivals[0].drifts)
    edits = random.integers(num_edits, size=(_RESAMPLES, num_edits))
    passages = random.integers(num_passages, size=(_RESAMPLES, num_passages))
    values = np.stack(
        [
            value_from(
                one.learnt[edits].mean(axis=1),
                one.carried[edits].mean(axis=1),
                one.drifts[passages].sum(axis=1) / one.weights[passages].sum(axis=1),
                prefer,
            )
            for one in rivals
        ]
    )
    low, high = middle_of(values[0] - values[1])
    best, second = (one.outcome.value for one in rivals[:2])
    assert best is not None
    assert second is not None
    lead = Figure(value=best - second, num=num_edits, low=low, high=high)
    return lead, float((values.argmax(axis=0) == 0).mean())
