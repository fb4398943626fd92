"""Edit a model: the whole story, read top to bottom."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from locft.config import AUTO, RunConfig, seconds_of, settings
from locft.data.edits import EditFile
from locft.data.gather import GatheredEdits, check_tokens, gather_edits, say_warnings
from locft.evaluation.drift import NeutralText, read_neutral_text
from locft.evaluation.endpoint import endpoint_from_environment
from locft.evaluation.measure import Way, measure_model, measure_unedited, record_answers
from locft.evaluation.protocols import locft
from locft.evaluation.scoring import drift_of_unedited, guesses_for, items_of, prompts_of
from locft.evaluation.subject import Reader, Subject, drift_of_values, load_subject
from locft.model.experts import count_served
from locft.model.load import context_tokens, dtype_name
from locft.model.location import Location, parse_location, resolve_location
from locft.model.matching import map_parameters
from locft.model.paging import give_back_freed
from locft.model.split import Split, split_model
from locft.model.structure import find_experts
from locft.model.weights import swapped_in
from locft.patch.format import PATCH_FOLDER, read_patch
from locft.patch.manifest import PatchLocation, PatchManifest, PatchModel
from locft.patch.weights import make_patch, patched_values
from locft.provenance import (
    Stopwatch,
    count_causes,
    describe_drift,
    describe_edits,
    describe_environment,
    describe_location,
    describe_model,
    describe_scores,
    peak_memory_bytes,
)
from locft.publish import refuse_taken, reserved, staged_folder
from locft.recipe.locate import find_location
from locft.recipe.locate_page import describe_found
from locft.recipe.material import Wanted, cache_material, prepare_material
from locft.recipe.plan import predict_cost
from locft.recipe.run_folder import TRAINING_FILE, Run, save_scored, save_trained
from locft.report.schema import (
    SCHEMA_VERSION,
    Cost,
    EditReport,
    ExpertsInfo,
    HeldBackInfo,
    TextInfo,
    TrainingInfo,
)
from locft.report.words import counted, limit_in_words, seconds_text
from locft.train.cache import PrefixCache
from locft.train.defaults import choose_engine, choose_schedule
from locft.train.loop import Engine, Schedule, fifths_of, train_breadth_first
from locft.types import Edit, Epoch, Scores

# To predict what a run costs takes some seconds itself: shorter ones are done before it is.
_WORTH_PLANNING_S = 20.0
_COUNTED_TOGETHER = 50  # edits


def edit(
    model: str,
    edits: str | Path | EditFile | Sequence[Edit],
    output: str | Path,
    config: RunConfig | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> EditReport:
    """Edit facts in a model: train one location, write a patch, and score it on a fresh model.

    Example::

        report = locft.edit("demo", [locft.Edit(id="1", prompt="The sky is", target="green")], "run")
        print(report.scores.reliability.value)

    Args:
        model: A Hugging Face id, a local folder, or ``demo``, the embedded model.
        edits: A file (JSONL, JSON or CSV), ``demo`` for the packaged facts, or the edits themselves.
        output: The run folder to make; it may exist if it is empty. It gets ``patch/``,
            ``report.json``, ``report.md``, ``answers.jsonl``, ``train.jsonl``, and ``run.toml`` and
            ``edits.jsonl`` to repeat the run with.
        config: The settings; the defaults need no tuning.
        say: Called with a line at each step, and with each warning about the edits.

    Returns:
        The report, as `report.json` holds it.

    Raises:
        EditsError: The edits have errors; the message lists the first 20. Nothing is written.
        ModelError: The model cannot be used, with the reason. Nothing is written.
        LocationError: The model has no such tuning location. Nothing is written.
        TrainingError: A loss, gradient or weight is not finite. No patch is written.
    """
    config = config or RunConfig()
    run = Path(output)
    watch = Stopwatch()
    refuse_taken(run)
    if config.location != AUTO:  # its spelling, before anything is loaded
        parse_location(config.location, num_layers=sys.maxsize)
    if config.rephraser == "endpoint":  # that there is one
        endpoint_from_environment("LOCFT_REPHRASER")
    text = read_neutral_text(config.drift_text)
    gathered = gather_edits(edits, config.on_conflict)
    with reserved(run):
        return _edit(model, gathered, text, run, config, watch, say)


def _edit(
    model: str,
    gathered: GatheredEdits,
    text: NeutralText,
    run: Path,
    config: RunConfig,
    watch: Stopwatch,
    say: Callable[[str], None],
) -> EditReport:
    # 1. The unedited model, and what it answers.
    say(f"loading {model}")
    subject = load_subject(model, config)
    network, checkpoint = subject.loaded.model, subject.loaded.checkpoint
    warnings = check_tokens(gathered, subject.codec, context_tokens(subject.loaded.model.config))
    say_warnings(gathered, warnings, say)
    given = config
    if config.location == AUTO:
        budget_s = seconds_of(config.budget)
        say(f"looking for a location, for at most {seconds_text(budget_s)}")
        found = find_location(subject, gathered.edits, text, budget_s, config.prefer, config, say=say)
        say(describe_found(found).verdict)
        config = dataclasses.replace(config, location=found.location)
        watch.lap("locate")
    location = resolve_location(network, config.location)
    weights = map_parameters(network, subject.entries, location.parameters)
    engine = choose_engine(config, network)
    split = split_model(network, location.layer)
    model_info = describe_model(subject.loaded)
    watch.lap("load")
    wanted = Wanted(
        preserve=config.preserve,
        augment=config.augment,
        max_drift=config.max_drift,
        neutral_text=config.neutral_text,
        rephraser=config.rephraser,
        seed=config.seed,
    )
    material = prepare_material(subject, location, gathered.edits, wanted, say)
    preservation = material.preservation
    watch.lap("prepare")
    num_prompts = len(set(prompts_of(gathered.edits)))
    say(f"answering {counted(num_prompts, 'prompt')} before the edit")
    way = Way(locft.PROTOCOL, config.format)
    items, before = measure_unedited(
        {way.context: _reader(subject, config, "unedited", {})}, {way: items_of(gathered.edits)}
    )
    watch.lap("eval")
    planned = None
    if watch.spent["eval"] > _WORTH_PLANNING_S:
        planned = predict_cost(
            subject, location, gathered.edits, material.examples.encoded, text, config
        )
        watch.lap("plan")

    with staged_folder(run) as staging:
        # 2. Training: the frozen layers once, then the rest in every epoch.
        schedule = choose_schedule(config, len(gathered.edits), location.shapes, preservation.gain)
        say(
            f"training {location.name} ({location.num_parameters:,} parameters"
            + (f": only {location.part_in_words}" if location.parts else "")
            + ") on "
            f"{counted(len(gathered.edits), 'edit')}: at most {schedule.epochs} epochs, batches of "
            f"{schedule.batch_size}, learning rate {schedule.lr:.3g}"
            + (f"; at most {seconds_text(planned.train_s)}" if planned is not None else "")
        )
        caches = cache_material(split, material, staging)
        cache = caches.examples
        watch.lap("cache")
        experts = _experts(split, location, cache)
        with (staging / TRAINING_FILE).open("w", encoding="utf-8") as log:

            def write_epoch(epoch: Epoch) -> None:
                log.write(json.dumps(asdict(epoch)) + "\n")
                log.flush()

            initial = weights.read()
            trained = train_breadth_first(
                split,
                location,
                cache,
                schedule,
                write_epoch,
                initial,
                engine,
                preservation.preconditioners,
                material.examples.groups,
                caches.anchors,
                caches.held_back,
            )
        watch.lap("train")
        limit = trained.limit
        held_back = None
        if limit is not None:
            held_back = HeldBackInfo(
                num_tokens=sum(len(one.ids) for one in material.held_back),
                drift=limit.drift,
                wanted=limit.wanted,
                num_shrunk=limit.num_shrunk,
                is_met=limit.is_met,
            )
            say(limit_in_words(held_back, limit.most))

        # 3. The patch, in the checkpoint's dtype: from here on it is what counts.
        dtypes = [weights.entries[name].dtype for name in weights.tensors]
        manifest = _manifest(
            subject, location, config, gathered, schedule, engine, dtypes, material.text
        )
        patch, changes = make_patch(weights, trained.matrices, manifest)
        save_trained(staging, patch, gathered.edits, material.examples.added, config)
    del subject, network, split, cache, caches  # a large model fits into memory once
    give_back_freed()

    # 4. A fresh model with the patch as it stands on disk, scored.
    say("loading the model afresh and applying the patch")
    subject = load_subject(model, config)
    patch = read_patch(run / PATCH_FOLDER)
    values = patched_values(subject.loaded.model, checkpoint.folder, patch)
    watch.lap("load")
    say("answering after the edit, and measuring drift")
    with swapped_in(subject.loaded.model, values):
        reader = _reader(subject, config, "edited", guesses_for(gathered.edits))
        after = measure_model({way.context: reader}, items)
    drift = drift_of_values(subject, values, text)
    watch.lap("eval")

    # 5. The report.
    records = record_answers(items, before, after)[way]
    scores = describe_scores(way.protocol, way.context, records, has_unedited=True)
    device = subject.loaded.model.device
    report = EditReport(
        schema_version=SCHEMA_VERSION,
        model=model_info,
        edits=describe_edits(gathered, len(warnings)),
        location=describe_location(location, patch, changes, experts),
        settings=asdict(given),
        resolved=_resolved(given, location, manifest, device),
        training=TrainingInfo(
            lr=schedule.lr,
            batch_size=schedule.batch_size,
            epochs_at_most=schedule.epochs,
            epochs=len(trained.epochs),
            steps=sum(epoch.steps for epoch in trained.epochs),
            final_loss=trained.epochs[-1].loss,
            stopped_early=trained.stopped_early,
            fifths=fifths_of(len(gathered.edits)),
            course=trained.epochs,
            text=material.text,
            preserved=material.preserved,
            held_back=held_back,
            augmented=material.examples.info,
        ),
        protocol=scores.protocol,
        scores_before=Scores(**(scores.before or {}), drift=drift_of_unedited(drift.overall.num)),
        scores=Scores(**scores.after, drift=drift.overall),
        change=scores.change or {},
        causes=count_causes(records),
        drift=describe_drift(text, drift),
        cost=Cost(
            seconds_per_edit=(watch.spent["cache"] + watch.spent["train"]) / len(gathered.edits),
            load_s=watch.spent["load"],
            prepare_s=watch.spent["prepare"],
            cache_s=watch.spent["cache"],
            train_s=watch.spent["train"],
            eval_s=watch.spent["eval"],
            wall_s=watch.wall_s,
            peak_memory_bytes=peak_memory_bytes(device),
        ),
        plan=planned,
        patch_bytes=sum(file.stat().st_size for file in (run / PATCH_FOLDER).iterdir()),
        environment=describe_environment(device),
    )
    save_scored(Run(run, report, tuple(records), drift.passages))
    return report


def _experts(split: Split, location: Location, cache: PrefixCache) -> ExpertsInfo | None:
    """Count how often the experts that are to be tuned serve the edits."""
    edited = location.experts
    if edited is None or find_experts(split.layers, split.layer) is None:
        return None
    batches = [
        cache.batch(range(first, min(first + _COUNTED_TOGETHER, cache.num_examples)))
        for first in range(0, cache.num_examples, _COUNTED_TOGETHER)
    ]
    served = count_served(split, [(batch.packed, batch.hidden) for batch in batches])
    return ExpertsInfo(
        edited=edited or tuple(range(len(served or ()))),
        served=served,
        num_tokens=sum(len(batch.packed.ids) for batch in batches),
    )


def _resolved(
    config: RunConfig, location: Location, manifest: PatchManifest, device: torch.device
) -> dict[str, Any]:
    """Tell what settings came to that were not given as they were used."""
    used = {**asdict(config), **manifest.settings, "location": location.name, "device": device.type}
    return {name: used[name] for name, given in asdict(config).items() if used[name] != given}


def _reader(subject: Subject, config: RunConfig, label: str, guesses: Mapping[str, str]) -> Reader:
    return Reader(
        subject, config.format, label=label, max_new_tokens=locft.MAX_NEW_TOKENS, guesses=guesses
    )


def _manifest(
    subject: Subject,
    location: Location,
    config: RunConfig,
    gathered: GatheredEdits,
    schedule: Schedule,
    engine: Engine,
    dtypes: Sequence[str],
    neutral_text: TextInfo | None,
) -> PatchManifest:
    """Describe the patch by what decides its bytes: no time, no hardware, no setting of the scores."""
    checkpoint = subject.loaded.checkpoint
    resolved = dataclasses.replace(config, lr=schedule.lr, epochs=schedule.epochs)
    method = {setting.name for setting in settings() if setting.metadata["group"] == "method"}
    return PatchManifest(
        locft_version=version("locft"),
        model=PatchModel(id=checkpoint.name, revision=checkpoint.revision),
        location=PatchLocation(
            name=location.name,
            layer=location.layer,
            module=location.module,
            num_parameters=location.num_parameters,
        ),
        dtype=", ".join(sorted(set(dtypes))),
        settings={
            **{name: value for name, value in asdict(resolved).items() if name in method},
            "dtype": dtype_name(subject.loaded.model.dtype),
            "compute_dtype": engine.compute_dtype(subject.loaded.model),
            "compile": "off" if engine.compiled is None else "on",
            # Not where the text stands, but which it was.
            "neutral_text": None if neutral_text is None else neutral_text.sha256,
        },
        num_edits=len(gathered.edits),
        edits_sha256=gathered.sha256,
    )
