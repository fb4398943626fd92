"""Predict what an edit costs, without running it: the whole story, read top to bottom."""

import math
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from locft.config import AUTO, RunConfig
from locft.data.edits import EditFile
from locft.data.encode import Codec, Encoded
from locft.data.gather import check_tokens, gather_edits, say_warnings
from locft.errors import ConfigError
from locft.evaluation.drift import TOKENS_PER_PASS, NeutralText, cut_windows, read_neutral_text
from locft.evaluation.generate import MAX_NEW_TOKENS, decoding_stages
from locft.evaluation.scoring import prompts_of
from locft.evaluation.subject import Subject, load_codec
from locft.model.load import choose_device, context_tokens, dtype_name, outline_model
from locft.model.location import Location, parse_location, resolve_location
from locft.model.packing import PrefixTree, merge_prefixes
from locft.model.structure import find_layers
from locft.publish import refuse_taken
from locft.report.schema import PlannedCost
from locft.report.words import counted
from locft.train.cache import TOKENS_PER_PASS as CACHE_TOKENS_PER_PASS
from locft.train.calibrate import measure_rates
from locft.train.cost import (
    Disk,
    ModelSize,
    Pass,
    Phase,
    Rates,
    Tuned,
    Work,
    predict_disk,
    predict_phases,
)
from locft.train.defaults import choose_engine, choose_schedule
from locft.train.loop import Schedule, shuffled_batches
from locft.train.outline import size_model
from locft.types import Edit

_STORED_BYTES = {"float64": 8, "float32": 4}  # in a checkpoint; all other dtypes have 2


@dataclass(frozen=True)
class _Prediction:
    """What a run would do on this machine: its work, how fast that goes, and what it comes to."""

    size: ModelSize
    tuned: Tuned
    schedule: Schedule
    work: Work
    compute_dtype: str
    rates: tuple[Rates, Rates]
    phases: tuple[Phase, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do and cost; its times and epochs are what it takes at most.

    Attributes:
        model: The model's name.
        architecture: Its class in transformers.
        num_parameters: All its parameters.
        num_layers: Its decoder layers.
        dtype: Of the frozen weights.
        compute_dtype: Of the products in training.
        device: Where it would run.
        location: The tuning location, resolved.
        num_tuned: How many parameters are trained.
        num_edits: Edits that are trained.
        num_prompts: Prompts that are answered, before and after.
        num_tokens: Distinct beginnings of the edits' tokens: what the cache holds.
        num_tokens_per_epoch: Tokens that one epoch computes.
        num_drift_tokens: Tokens of neutral text, padding included.
        lr: Adam's learning rate.
        batch_size: Edits per step.
        epochs_at_most: The most epochs; training stops early once the loss is low enough.
        steps_at_most: The most steps.
        phases: The parts of the run, in order.
        disk: What it writes.
        free_disk_bytes: Free space where the run would be.
        rates: How fast this machine was just now: the model's own products, and those of training.
    """

    model: str
    architecture: str
    num_parameters: int
    num_layers: int
    dtype: str
    compute_dtype: str
    device: str
    location: str
    num_tuned: int
    num_edits: int
    num_prompts: int
    num_tokens: int
    num_tokens_per_epoch: int
    num_drift_tokens: int
    lr: float
    batch_size: int
    epochs_at_most: int
    steps_at_most: int
    phases: tuple[Phase, ...]
    disk: Disk
    free_disk_bytes: int
    rates: tuple[Rates, Rates]

    @property
    def cost(self) -> PlannedCost:
        """The same as a report has it."""
        return _cost(self.phases, self.epochs_at_most)

    @property
    def wall_s(self) -> float:
        """Seconds of the whole run, at most."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory that is in use at one time."""
        return max(phase.peak_memory_bytes for phase in self.phases)

    @property
    def fits_on_disk(self) -> bool:
        """Whether there is space for the run."""
        return self.disk.peak_bytes <= self.free_disk_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON has it, with the sums."""
        return {
            **asdict(self),
            "wall_s": self.wall_s,
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_disk_bytes": self.disk.peak_bytes,
            "fits_on_disk": self.fits_on_disk,
        }


def plan(
    model: str,
    edits: str | Path | EditFile | Sequence[Edit],
    config: RunConfig | None = None,
    *,
    output: str | Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Predict time, memory and disk space of `edit`, from the model's shapes and a few seconds of work.

    No weights are loaded, and nothing is written. What only running tells is not known: whether the
    model is refused since it cannot be split, and when training stops.

    Args:
        model: As `edit` takes it.
        edits: As `edit` takes them.
        config: The settings of the run.
        output: Where the run folder would be, for the free space; here if None.
        say: Called with a line at each step, and with each warning about the edits.

    Returns:
        The prediction.

    Raises:
        EditsError: The edits have errors; the message lists the first 20.
        ModelError: The model cannot be used, with the reason.
        LocationError: The model has no such tuning location.
    """
    config = config or RunConfig()
    if output is not None:
        refuse_taken(Path(output))
    if config.location == AUTO:
        raise ConfigError(
            "a plan is for a certain location: name one with --location, or find one with `locft locate`"
        )
    parse_location(config.location, num_layers=sys.maxsize)  # its spelling, before anything is loaded
    text = read_neutral_text(config.drift_text)
    gathered = gather_edits(edits, config.on_conflict)

    # 1. The model's shapes, and what is tuned of them.
    device = choose_device(config.device)
    network, checkpoint, stored = outline_model(model, dtype=config.dtype, revision=config.revision)
    codec, limit = load_codec(model, config)
    say_warnings(gathered, check_tokens(gathered, codec, limit), say)
    location = resolve_location(network, config.location)
    encoded = [codec.encode(edit) for edit in gathered.edits]

    # 2. What that comes to.
    say(f"measuring {device} at the shapes of {counted(len(find_layers(network)), 'layer')}")
    windows = [ids for _, ids in cut_windows(codec.tokenizer, text, limit)]
    found = _predict(network, location, codec, gathered.edits, encoded, windows, config, device)

    # 3. The prediction.
    size, schedule, work = found.size, found.schedule, found.work
    return Plan(
        model=checkpoint.name,
        architecture=type(network).__name__,
        num_parameters=size.num_parameters,
        num_layers=len(size.layers),
        dtype=dtype_name(network.dtype),
        compute_dtype=found.compute_dtype,
        device=str(device),
        location=location.name,
        num_tuned=location.num_parameters,
        num_edits=len(encoded),
        num_prompts=work.num_prompts,
        num_tokens=work.cache_tokens,
        num_tokens_per_epoch=sum(step.tokens for step in work.steps),
        num_drift_tokens=sum(one.tokens for one in work.drift),
        lr=schedule.lr,
        batch_size=schedule.batch_size,
        epochs_at_most=schedule.epochs,
        steps_at_most=schedule.epochs * len(work.steps),
        phases=found.phases,
        disk=predict_disk(size, found.tuned, work, _STORED_BYTES.get(stored, 2)),
        free_disk_bytes=_free_bytes(Path() if output is None else Path(output)),
        rates=found.rates,
    )


def predict_cost(
    subject: Subject,
    location: Location,
    edits: Sequence[Edit],
    encoded: Sequence[Encoded],
    text: NeutralText,
    config: RunConfig,
) -> PlannedCost:
    """Predict what a run costs whose model is in memory already, from a few seconds of work.

    Args:
        subject: The model.
        location: What is tuned.
        edits: The edits.
        encoded: The same as training sees them.
        text: What drift is measured on.
        config: The settings of the run.

    Returns:
        The prediction for the whole run, loading included.
    """
    network = subject.loaded.model
    limit = context_tokens(network.config)
    windows = [ids for _, ids in cut_windows(subject.codec.tokenizer, text, limit)]
    found = _predict(network, location, subject.codec, edits, encoded, windows, config, network.device)
    return _cost(found.phases, found.schedule.epochs)


def _cost(phases: Iterable[Phase], epochs_at_most: int) -> PlannedCost:
    seconds = {phase.name: phase.seconds for phase in phases}
    return PlannedCost(
        load_s=seconds["load"],
        cache_s=seconds["cache"],
        train_s=seconds["train"],
        eval_s=seconds["answer before"] + seconds["answer after"] + seconds["drift"],
        wall_s=sum(seconds.values()),
        peak_memory_bytes=max(phase.peak_memory_bytes for phase in phases),
        epochs_at_most=epochs_at_most,
    )


def _predict(
    network: PreTrainedModel,
    location: Location,
    codec: Codec,
    edits: Sequence[Edit],
    encoded: Sequence[Encoded],
    windows: Sequence[Sequence[int]],
    config: RunConfig,
    device: torch.device,
) -> _Prediction:
    """Count what a run does, and measure how fast this machine is."""
    engine = choose_engine(config, network, device)
    size = size_model(network)
    tuned = Tuned(layer=location.layer, module=location.module, num_parameters=location.num_parameters)
    schedule = choose_schedule(config, len(edits), location.shapes)
    work = _count_work(edits, encoded, schedule, codec, windows, config.eval_batch_size)
    dtype, compute_dtype = dtype_name(network.dtype), engine.compute_dtype(network)
    at_tuned = size.layers[location.layer]
    running = measure_rates(size, at_tuned, (dtype, dtype), device)
    training = running
    if compute_dtype != dtype:
        training = measure_rates(size, at_tuned, (dtype, compute_dtype), device)
    phases = predict_phases(size, tuned, work, running, training, on_cpu=device.type == "cpu")
    return _Prediction(size, tuned, schedule, work, compute_dtype, (running, training), phases)


def _count_work(
    edits: Sequence[Edit],
    encoded: Sequence[Encoded],
    schedule: Schedule,
    codec: Codec,
    windows: Sequence[Sequence[int]],
    eval_batch_size: int,
) -> Work:
    """Count the tokens of every pass of a run."""
    tree = merge_prefixes([example.ids[:-1] for example in encoded])
    steps: list[Pass] = []
    for batch in next(shuffled_batches(len(encoded), schedule.batch_size, schedule.seed)):
        packed, _ = tree.pack(batch)
        sequences, longest = packed.grid.shape
        asked = sum(encoded[index].num_targets for index in batch)
        steps.append(Pass(tokens=len(packed.ids), sequences=sequences, longest=longest, asked=asked))
    prompts = {prompt: len(codec.prompt_ids(prompt)) for prompt in prompts_of(edits)}
    # What was trained is answered with its target, if all goes well.
    guesses = {
        edit.prompt: example.num_targets - 1 for edit, example in zip(edits, encoded, strict=True)
    }
    confirmed = [(prompts[prompt] + guess, guess + 1) for prompt, guess in guesses.items()]
    # What is compared on neutral text is every position, padding included.
    texts = _batches([(len(ids), 0) for ids in windows], lambda longest: TOKENS_PER_PASS // longest)
    return Work(
        cache_tokens=len(tree.tokens),
        cache_passes=_cache_passes(tree),
        steps=tuple(steps),
        epochs=schedule.epochs,
        answers=_batches([(length, 1) for length in prompts.values()], lambda _: eval_batch_size),
        guesses=_batches(confirmed, lambda _: eval_batch_size),
        scored_share=1 - len({edit.prompt for edit in edits}) / len(prompts),
        drift=tuple(replace(one, asked=one.tokens) for one in texts),
        stages=decoding_stages(MAX_NEW_TOKENS),
    )


def _cache_passes(tree: PrefixTree) -> tuple[Pass, ...]:
    """Divide the sequences of a tree among passes of about equal size."""
    lengths = np.diff(tree.starts)
    longest = int(lengths.max())
    num_passes = math.ceil(len(lengths) * longest / CACHE_TOKENS_PER_PASS)
    one = Pass(
        tokens=math.ceil(len(tree.tokens) / num_passes),
        sequences=math.ceil(len(lengths) / num_passes),
        longest=longest,
        asked=0,
    )
    return (one,) * num_passes


def _batches(sequences: Iterable[tuple[int, int]], most: Callable[[int], int]) -> tuple[Pass, ...]:
    """Put sequences (tokens, asked positions) into padded batches, the longest first.

    `most` says how many a batch takes, from the length of its longest; it takes one at least.
    """
    pending = sorted(sequences, reverse=True)
    passes: list[Pass] = []
    while pending:
        longest = pending[0][0]
        num = max(1, most(longest))
        taken, pending = pending[:num], pending[num:]
        asked = sum(positions for _, positions in taken)
        tokens = len(taken) * longest
        passes.append(Pass(tokens=tokens, sequences=len(taken), longest=longest, asked=asked))
    return tuple(passes)


def _free_bytes(place: Path) -> int:
    """Return the free space of the disk that a folder is, or would be, on."""
    folder = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(folder).free
