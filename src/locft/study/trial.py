"""One trial: a model trained by a method, in some order of the edits, and scored."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from locft.config import RunConfig
from locft.data.encode import Encoded
from locft.evaluation.drift import NeutralText
from locft.evaluation.measure import Way, measure_model, measure_unedited, record_answers
from locft.evaluation.protocols import locft
from locft.evaluation.scoring import Item, Result, guesses_for, items_of
from locft.evaluation.subject import Reader, Subject, drift_of_values
from locft.methods import METHODS, Editor, Method, Plan, Tuning
from locft.methods.base import Editing, EditorPlan
from locft.model.location import resolve_location
from locft.model.split import Split, split_model
from locft.model.weights import swapped_in
from locft.provenance import Stopwatch, describe_scores, peak_memory_bytes
from locft.recipe.material import Material, Wanted, cache_material, prepare_material
from locft.recipe.ordinary import gather_ordinary_text
from locft.report.schema import ProtocolScores
from locft.study.records import Moment, Trial, TrialResult
from locft.train.cache import PrefixCache
from locft.train.defaults import choose_engine
from locft.train.limit import DriftLimit
from locft.train.loop import (
    Schedule,
    make_limit,
    make_stepper,
    run_breadth_first,
    run_depth_first,
)
from locft.train.precondition import Preconditioner
from locft.train.step import Stepper
from locft.types import KINDS, Edit, Kind


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What trials are done with.

    Attributes:
        subject: The model, unedited between trials.
        edits: The edits.
        text: What drift is measured on.
        config: The settings that all trials share.
        num_scored: How many of the edits are scored, from the first on.
        items: What is scored, with the unedited model's answers where they are the standard.
        before: What the unedited model makes of them.
    """

    subject: Subject
    edits: tuple[Edit, ...]
    text: NeutralText
    config: RunConfig
    num_scored: int
    items: Sequence[Item]
    before: Sequence[Result]

    @property
    def way(self) -> Way:
        """How answers are scored."""
        return Way(locft.PROTOCOL, self.config.format)

    def items_of(self, num_edits: int) -> Sequence[Item]:
        """Give what is scored where only the first edits are in."""
        return self.items[: len(items_of(self.edits[: min(num_edits, self.num_scored)]))]

    def score(self, after: Sequence[Result]) -> tuple[dict[Kind, str], ProtocolScores]:
        """Tell what was answered as expected, and the scores that this comes to."""
        way, items, before = self.way, self.items[: len(after)], self.before[: len(after)]
        records = record_answers({way: items}, {way: before}, {way: after})[way]
        scores = describe_scores(way.protocol, way.context, records, has_unedited=True)
        right = {
            kind: "".join("1" if one.score_after == 1 else "0" for one in records if one.kind == kind)
            for kind in KINDS
        }
        return right, scores


def set_up(
    subject: Subject, edits: Sequence[Edit], num_scored: int, text: NeutralText, config: RunConfig
) -> Bench:
    """Ask the unedited model once, for all trials."""
    way = Way(locft.PROTOCOL, config.format)
    reader = _reader(subject, config, "unedited", ())
    items, before = measure_unedited({way.context: reader}, {way: items_of(edits[:num_scored])})
    return Bench(
        subject=subject,
        edits=tuple(edits),
        text=text,
        config=config,
        num_scored=num_scored,
        items=items[way],
        before=before[way],
    )


CacheOf = Callable[[Split, Sequence[Encoded]], PrefixCache]
"""Gives the cached states of some examples, for a model that is split somewhere."""


def run_trial(
    bench: Bench,
    trial: Trial,
    schedule: Schedule,
    cache_of: CacheOf | None = None,
    on_trained: Callable[[Mapping[str, Tensor]], None] = lambda _: None,
) -> TrialResult:
    """Edit a model as a trial says, score it, and leave it unedited.

    Args:
        bench: What trials are done with.
        trial: The trial.
        schedule: How long and how fast.
        cache_of: Gives the cached states of its examples; they are made for it if None.
        on_trained: Called with what training made of the model's parameters, once it is scored.

    Returns:
        What came of it.

    Raises:
        TrainingError: A loss, gradient or weight is not finite.
        ModelError: The method cannot edit this model, or the model cannot be split.
    """
    watch = Stopwatch()
    subject = bench.subject
    network = subject.loaded.model
    edits = bench.edits[: trial.num_edits]
    # A seed names one order of the edits: depth-first goes through them so, and fifths are parts of it.
    shuffler = torch.Generator().manual_seed(trial.seed)
    order = torch.randperm(len(edits), generator=shuffler).tolist()
    in_order = [edits[index] for index in order]
    method = METHODS[trial.method]
    if isinstance(method, Editor):
        made = _insert(bench, trial, method, in_order, watch)
    else:
        made = _train(bench, trial, schedule, in_order, watch, cache_of)
    with swapped_in(network, made.values):
        reader = _reader(subject, bench.config, "edited", edits)
        items = bench.items_of(len(edits))
        after = measure_model({bench.way.context: reader}, {bench.way: items})[bench.way]
    right, scores = bench.score(after)
    drift = drift_of_values(subject, made.values, bench.text)
    watch.lap("eval")
    on_trained(made.values)
    return TrialResult(
        trial=trial,
        before=scores.before or {},
        scores={**scores.after, "drift": drift.overall},
        right=right,
        course=made.course,
        num_parameters=made.num_parameters,
        num_steps=made.num_steps,
        final_loss=made.final_loss,
        cache_s=watch.spent["cache"],
        train_s=watch.spent["train"],
        eval_s=watch.spent["eval"],
        seconds_per_edit=(watch.spent["cache"] + watch.spent["train"]) / len(edits),
        peak_memory_bytes=peak_memory_bytes(network.device),
        notes=dict(made.notes),
    )


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What a method made of the model.

    Attributes:
        values: Its parameters that may have changed, by name.
        num_parameters: How many numbers were to change.
        num_steps: How many steps were taken, or batches inserted.
        final_loss: Mean loss when training ended.
        course: How far the edits were learnt meanwhile.
        notes: What else decided the result.
    """

    values: Mapping[str, Tensor]
    num_parameters: int
    num_steps: int
    final_loss: float | None = None
    course: tuple[Moment, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)


def _train(
    bench: Bench,
    trial: Trial,
    schedule: Schedule,
    edits: Sequence[Edit],
    watch: Stopwatch,
    cache_of: CacheOf | None,
) -> _Made:
    """Train the model as a trial says."""
    subject = bench.subject
    network = subject.loaded.model
    material = _prepare_material(subject, trial, edits)
    with attach(subject, trial, schedule, material.preservation.preconditioners) as tuning:
        split = split_model(network, tuning.layer)
        watch.lap("load")
        at_once = training_method(trial).at_once
        caches = cache_material(split, material, cache_of=cache_of, at_once=at_once)
        watch.lap("cache")
        engine = choose_engine(bench.config, network)
        with (
            tuning.trainable.alone(network),
            split.tail(
                in_bfloat16=engine.in_bfloat16,
                compiled=engine.compiled,
                from_tokens=tuning.from_tokens,
            ) as tail,
        ):
            stepper = make_stepper(tail, caches.examples, tuning.trainable, schedule, caches.anchors)
            limit = make_limit(tail, schedule, caches.held_back)
            course, loss = _run_pipeline(stepper, trial, schedule, material.examples.groups, limit)
        watch.lap("train")
        return _Made(
            values=tuning.values(),
            num_parameters=_num_parameters(tuning),
            num_steps=stepper.num_steps,
            final_loss=loss,
            course=course,
        )


def _insert(
    bench: Bench, trial: Trial, editor: Editor, edits: Sequence[Edit], watch: Stopwatch
) -> _Made:
    """Insert one batch of edits after the other."""
    subject = bench.subject
    watch.lap("load")
    with open_editor(subject, trial, editor, bench.config) as editing:
        watch.lap("cache")
        batches = range(0, len(edits), trial.batch_size)
        for first in batches:
            editing.insert(edits[first : first + trial.batch_size])
        watch.lap("train")
        return _Made(
            values=editing.values(),
            num_parameters=editing.num_parameters,
            num_steps=len(batches),
            notes=editing.notes,
        )


def open_editor(
    subject: Subject, trial: Trial, editor: Editor, config: RunConfig
) -> AbstractContextManager[Editing]:
    """Make a model ready for an editor's batches while the body runs."""
    text = None
    if editor.needs_text:
        text = gather_ordinary_text(subject, None, trial.neutral_text)
    plan = EditorPlan(
        codec=subject.codec,
        lr=trial.lr,
        seed=trial.seed,
        settings=trial.settings,
        sequences=() if text is None else text.sequences,
        model_sha256="" if text is None else text.model_sha256,
        in_bfloat16=choose_engine(config, subject.loaded.model).in_bfloat16,
    )
    return editor.open(subject.loaded.model, plan)


def _prepare_material(subject: Subject, trial: Trial, edits: Sequence[Edit]) -> Material:
    """Get ready what a trial is trained on, and what it keeps."""
    location = None
    if trial.location is not None:
        location = resolve_location(subject.loaded.model, trial.location)
    wanted = Wanted(
        preserve=trial.preserve,
        augment=trial.augment,
        max_drift=trial.max_drift,
        neutral_text=trial.neutral_text,
        rephraser=trial.rephraser,
        seed=trial.seed,
    )
    return prepare_material(subject, location, edits, wanted)


def attach(
    subject: Subject,
    trial: Trial,
    schedule: Schedule,
    preconditioners: Mapping[str, Preconditioner] | None = None,
) -> AbstractContextManager[Tuning]:
    """Make a model ready for a trial's training while the body runs."""
    plan = Plan(
        location=trial.location or "",
        num_steps=num_steps(trial, schedule),
        seed=trial.seed,
        settings=trial.settings,
        preconditioners=preconditioners or {},
        steps_per_epoch=math.ceil(trial.num_edits / trial.batch_size),
    )
    return training_method(trial).attach(subject.loaded.model, plan)


def training_method(trial: Trial) -> Method:
    """Find the method of a trial that trains."""
    method = METHODS[trial.method]
    assert isinstance(method, Method)
    return method


def num_steps(trial: Trial, schedule: Schedule) -> int:
    """Count the most steps that a trial may take."""
    if trial.pipeline == "depth-first":
        return trial.num_edits * schedule.epochs
    return math.ceil(trial.num_edits / trial.batch_size) * schedule.epochs


def _run_pipeline(
    stepper: Stepper,
    trial: Trial,
    schedule: Schedule,
    groups: Sequence[Sequence[int]],
    limit: DriftLimit | None,
) -> tuple[tuple[Moment, ...], float]:
    if trial.pipeline == "depth-first":
        parts = run_depth_first(stepper, schedule)
        course = tuple(Moment(done=part.epoch / len(parts), success=part.success) for part in parts)
        return course, parts[-1].loss
    epochs = run_breadth_first(stepper, schedule, groups=groups, limit=limit)
    course = tuple(Moment(done=epoch.epoch / len(epochs), success=epoch.success) for epoch in epochs)
    return course, epochs[-1].loss


def _num_parameters(tuning: Tuning) -> int:
    trainable = tuning.trainable
    return sum(trainable.part(name, one).numel() for name, one in trainable.parameters.items())


def _reader(subject: Subject, config: RunConfig, label: str, edits: Sequence[Edit]) -> Reader:
    return Reader(
        subject,
        config.format,
        label=label,
        max_new_tokens=locft.MAX_NEW_TOKENS,
        guesses=guesses_for(edits),
    )
