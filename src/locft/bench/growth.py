"""`locft bench growth`: how the cost of training grows with the edits, and with the location's depth.

Time should grow with the tokens of the edits and with the layers that are trained through; memory
should not grow with the edits.
"""

import gc
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.utils import logging

from locft.bench.process import run_alone
from locft.bench.training import Clock
from locft.config import RunConfig
from locft.data.encode import Encoded
from locft.data.gather import check_tokens, gather_edits
from locft.evaluation.subject import Subject, load_subject
from locft.model.load import context_tokens
from locft.model.location import Location, parse_location, resolve_location
from locft.model.packing import count_shared
from locft.model.split import split_model
from locft.model.structure import find_layers
from locft.model.weights import swapped_in
from locft.provenance import describe_environment, describe_model, process_bytes
from locft.report.schema import Environment, ModelInfo
from locft.report.words import counted
from locft.train.cache import build_cache
from locft.train.defaults import choose_engine, choose_schedule
from locft.train.loop import train_breadth_first
from locft.types import Edit

if TYPE_CHECKING:  # it takes half a second to load
    from matplotlib.figure import Figure as Picture

SCHEMA_VERSION = 1

_SAMPLING_S = 0.02  # a step takes longer, and reading memory takes far less


@dataclass(frozen=True, kw_only=True)
class GrowthPlan:
    """What to measure.

    Attributes:
        sizes: Numbers of edits to time an epoch with.
        memory_sizes: Numbers of edits to measure memory with, each in a process of its own.
        locations: Tuning locations to time an epoch at.
        num_depth_edits: How many edits they are timed with.
        num_steps: After how many steps training ends where memory is measured.
    """

    sizes: tuple[int, ...] = (100, 300, 1000, 3000, 10_000)
    memory_sizes: tuple[int, ...] = (1000, 10_000, 100_000)
    locations: tuple[str, ...] = ("10.mlp.down", "20.mlp.down", "29.mlp.down")
    num_depth_edits: int = 1000
    num_steps: int = 50


@dataclass(frozen=True, kw_only=True)
class Amount:
    """What was trained on.

    Attributes:
        num_edits: How many edits.
        synthetic: How many of them were made from the others (`extend_examples`).
        num_prompt_tokens: Tokens of their prompts.
        num_target_tokens: Tokens of their targets, ends of sequence included.
    """

    num_edits: int
    synthetic: int
    num_prompt_tokens: int
    num_target_tokens: int

    @property
    def num_tokens(self) -> int:
        """All of them."""
        return self.num_prompt_tokens + self.num_target_tokens


@dataclass(frozen=True, kw_only=True)
class EpochTime(Amount):
    """How long training took.

    Attributes:
        location: What was trained.
        num_layers_above: How many layers follow the tuned one.
        cache_s: Seconds in which the frozen layers were run, once.
        seconds_per_epoch: The median of the epochs.
    """

    location: str
    num_layers_above: int
    cache_s: float
    seconds_per_epoch: float


@dataclass(frozen=True, kw_only=True)
class MemoryUse(Amount):
    """The anonymous memory of a process that trains: what no file backs (None where it is not told).

    Attributes:
        steps: After how many steps training was ended.
        steps_per_epoch: How many a whole epoch has.
        loaded_bytes: With the model loaded, before the edits.
        encoded_bytes: With the edits as token ids.
        cache_peak_bytes: The most while the frozen layers were run.
        train_peak_bytes: The most while training.
        device_peak_bytes: The most memory of the device; None where that is the process's own.
    """

    steps: int
    steps_per_epoch: int
    loaded_bytes: int | None
    encoded_bytes: int | None
    cache_peak_bytes: int | None
    train_peak_bytes: int | None
    device_peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A straight line through times, by least squares; None where they do not determine a value.

    Attributes:
        slope_s_per_token: Seconds per token.
        intercept_s: Seconds at no tokens.
        r_squared: The share of the variance that the line explains.
        largest_relative_residual: The largest distance from the line, over the time itself.
    """

    slope_s_per_token: float | None
    intercept_s: float | None
    r_squared: float | None
    largest_relative_residual: float | None


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What `locft bench growth` found.

    Attributes:
        epochs: Times by number of edits.
        fit: The line through them over prompt and target tokens together.
        memory: Memory by number of edits.
        depth: Times by location.
    """

    schema_version: int
    model: ModelInfo
    epochs: tuple[EpochTime, ...]
    fit: Fit
    memory: tuple[MemoryUse, ...]
    depth: tuple[EpochTime, ...]
    settings: dict[str, Any]
    environment: Environment


@dataclass(frozen=True)
class _Times:
    """Seconds of building the cache, and of each whole epoch; how many steps were taken."""

    cache_s: float
    epochs_s: tuple[float, ...]
    num_steps: int


def measure_growth(
    model: str = "demo",
    edits: str | Path | Sequence[Edit] = "demo",
    plan: GrowthPlan | None = None,
    config: RunConfig | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Growth:
    """Measure how time and memory grow with the edits, and time with the depth of the location.

    Args:
        model: A Hugging Face id, a local folder, or ``demo``.
        edits: A file, ``demo``, or the edits themselves. Where more are asked for than there are, the
            rest is made of them: the same lengths, the tokens in another order.
        plan: What to measure.
        config: The settings; ``auto`` epochs are one, and training never stops early. Where layers are
            compiled, another epoch before those is not timed.
        say: Called with a line at each step.

    Returns:
        What was found.

    Raises:
        InputError: The edits, the model or a location cannot be used, with the reason.
        LocftError: A process that measured memory was ended.
    """
    plan, config = plan or GrowthPlan(), config or RunConfig()
    config = replace(config, epochs=1 if config.epochs == "auto" else config.epochs, stop_loss=0.0)
    for name in (config.location, *plan.locations):
        parse_location(name, num_layers=sys.maxsize)  # its spelling, before anything is loaded
    most = max((*plan.sizes, *plan.memory_sizes, plan.num_depth_edits))
    gathered = gather_edits(edits, config.on_conflict)
    gathered = replace(gathered, edits=gathered.edits[:most])
    say(f"loading {model}")
    subject = load_subject(model, config)
    check_tokens(gathered, subject.codec, context_tokens(subject.loaded.model.config))
    model_info, device = describe_model(subject.loaded), subject.loaded.model.device
    encoded = [subject.codec.encode(edit) for edit in gathered.edits]
    epochs, depth = _measure_times(subject, encoded, plan, config, say)
    del subject  # the processes that follow load the model themselves
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no such device
    memory = []
    for num in plan.memory_sizes:
        say(f"measuring memory with {counted(num, 'edit')}")
        threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
        arguments = (model, gathered.edits[:num], num, plan.num_steps, config, threads, verbosity)
        memory.append(run_alone(_measure_memory, *arguments))
    return Growth(
        schema_version=SCHEMA_VERSION,
        model=model_info,
        epochs=epochs,
        fit=fit_line(
            [time.num_tokens for time in epochs],
            [time.seconds_per_epoch for time in epochs],
        ),
        memory=tuple(memory),
        depth=depth,
        settings={**asdict(config), **asdict(plan)},
        environment=describe_environment(device),
    )


def _measure_times(
    subject: Subject,
    encoded: Sequence[Encoded],
    plan: GrowthPlan,
    config: RunConfig,
    say: Callable[[str], None],
) -> tuple[tuple[EpochTime, ...], tuple[EpochTime, ...]]:
    network = subject.loaded.model
    location = resolve_location(network, config.location)
    places = [resolve_location(network, name) for name in plan.locations]
    # What a device does only once is no part of any epoch.
    _train(subject, location, extend_examples(encoded, min((100, *plan.sizes))), config)
    epochs = [_time(subject, location, encoded, num, config, say) for num in plan.sizes]
    num = plan.num_depth_edits
    depth = [_time(subject, place, encoded, num, config, say) for place in places]
    return tuple(epochs), tuple(depth)


def _time(
    subject: Subject,
    location: Location,
    encoded: Sequence[Encoded],
    num: int,
    config: RunConfig,
    say: Callable[[str], None],
) -> EpochTime:
    """Time training on some of the edits, or on more than there are."""
    say(f"timing {location.name} with {counted(num, 'edit')}")
    examples = extend_examples(encoded, num)
    times = _train(subject, location, examples, config)
    return EpochTime(
        **_amount(examples, len(encoded)),
        location=location.name,
        num_layers_above=len(find_layers(subject.loaded.model)) - 1 - location.layer,
        cache_s=times.cache_s,
        seconds_per_epoch=statistics.median(times.epochs_s),
    )


def _amount(examples: Sequence[Encoded], num_real: int) -> dict[str, int]:
    """Return the fields of `Amount`."""
    return {
        "num_edits": len(examples),
        "synthetic": max(0, len(examples) - num_real),
        "num_prompt_tokens": sum(example.target_start for example in examples),
        "num_target_tokens": sum(example.num_targets for example in examples),
    }


def _train(
    subject: Subject,
    location: Location,
    examples: Sequence[Encoded],
    config: RunConfig,
    num_steps: int | None = None,
    on_cached: Callable[[], None] = lambda: None,
) -> _Times:
    """Train a location as `locft edit` does, and give the model its own weights back.

    Args:
        subject: The model.
        location: What to train.
        examples: What to train on.
        config: The settings.
        num_steps: How many steps to take instead of the epochs of `config`.
        on_cached: Called between building the cache and training.
    """
    network = subject.loaded.model
    tuned = {name: network.get_parameter(name).detach() for name in location.parameters}
    schedule = choose_schedule(config, len(examples), [tensor.shape for tensor in tuned.values()])
    engine = choose_engine(config, network)
    num_unmeasured = 0 if engine.compiled is None else 1  # an epoch that compiles
    # Enough for a number of steps, as an epoch has one at least.
    num_epochs = num_unmeasured + schedule.epochs if num_steps is None else num_steps
    split = split_model(network, location.layer)
    caching = Clock(network.device)
    cache = build_cache(split, examples)
    caching.note()
    on_cached()
    epochs = Clock(network.device)
    schedule = replace(schedule, epochs=num_epochs)
    with swapped_in(network, tuned), _ended_after(num_steps) as steps:
        train_breadth_first(split, location, cache, schedule, lambda _: epochs.note(), engine=engine)
    [cache_s] = caching.laps
    return _Times(cache_s, epochs.laps[num_unmeasured:], len(steps))


class _EnoughStepsError(Exception):
    """Ends training."""


@contextmanager
def _ended_after(num_steps: int | None) -> Iterator[list[int]]:
    """End the training in the body after some steps; lists a 1 for each step that was taken."""
    steps: list[int] = []

    def count(*_: Any) -> None:
        steps.append(1)
        if len(steps) == num_steps:
            raise _EnoughStepsError

    handle = register_optimizer_step_post_hook(count)
    try:
        yield steps
    except _EnoughStepsError:
        pass
    finally:
        handle.remove()


def _measure_memory(
    model: str,
    edits: Sequence[Edit],
    num: int,
    num_steps: int,
    config: RunConfig,
    num_threads: int,
    verbosity: int,
) -> MemoryUse:
    """Measure this process while it trains on some of the edits, or on more than there are."""
    torch.set_num_threads(num_threads)
    logging.set_verbosity(verbosity)
    subject = load_subject(model, config)
    device = subject.loaded.model.device
    location = resolve_location(subject.loaded.model, config.location)
    loaded = anonymous_bytes()
    examples = extend_examples([subject.codec.encode(edit) for edit in edits], num)
    encoded = anonymous_bytes()
    peaks: list[int | None] = []
    with sampled_peaks(anonymous_bytes) as take:
        times = _train(
            subject, location, examples, config, num_steps, on_cached=lambda: peaks.append(take())
        )
        peaks.append(take())
    return MemoryUse(
        **_amount(examples, len(edits)),
        steps=times.num_steps,
        steps_per_epoch=-(-len(examples) // config.batch_size),
        loaded_bytes=loaded,
        encoded_bytes=encoded,
        cache_peak_bytes=peaks[0],
        train_peak_bytes=peaks[1],
        device_peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def anonymous_bytes() -> int | None:
    """Read how much memory of this process no file backs; None where the system does not tell."""
    return process_bytes("RssAnon")


@contextmanager
def sampled_peaks(
    read: Callable[[], int | None], every_s: float = _SAMPLING_S
) -> Iterator[Callable[[], int | None]]:
    """Sample a number in a thread while the body runs.

    Args:
        read: Reads the number; None where it cannot.
        every_s: Seconds from one sample to the next.

    Yields:
        A function that returns the largest sample since it was last called, or since the start.
    """
    samples: list[int | None] = []
    is_over = threading.Event()

    def sample() -> None:
        while not is_over.wait(every_s):
            samples.append(read())

    def take() -> int | None:
        samples.append(read())  # one at least
        taken, samples[:] = list(samples), []
        return max((value for value in taken if value is not None), default=None)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield take
    finally:
        is_over.set()
        thread.join()


def extend_examples(examples: Sequence[Encoded], num: int) -> list[Encoded]:
    """Take the first examples, and where there are too few make more of them.

    Each that is made has the lengths of a given one, in turn. Its prompt begins as that one does as far
    as another of them does, too, since what examples have in common may cost less; the other tokens
    are drawn from those of all prompts, or of all targets. They cost what others cost, and mean nothing.

    Args:
        examples: One at least.
        num: How many are wanted.

    Returns:
        That many. They depend on nothing but `examples`, and fewer are the first of more.
    """
    taken = list(islice(examples, num))
    if len(taken) == num:
        return taken
    draw = np.random.default_rng(0)
    of_prompts = np.array([token for one in examples for token in one.ids[: one.target_start]])
    of_targets = np.array([token for one in examples for token in one.ids[one.target_start : -1]])
    shared = _shared_lengths([one.ids[: one.target_start] for one in examples])
    for index in range(len(taken), num):
        pattern = examples[index % len(examples)]
        kept = pattern.ids[: shared[index % len(examples)]]
        prompt = of_prompts[draw.integers(len(of_prompts), size=pattern.target_start - len(kept))]
        target = of_targets[draw.integers(len(of_targets), size=pattern.num_targets - 1)]
        ids = (*kept, *prompt.tolist(), *target.tolist(), pattern.ids[-1])
        taken.append(Encoded(ids=ids, target_start=pattern.target_start))
    return taken


def _shared_lengths(prompts: Sequence[tuple[int, ...]]) -> list[int]:
    """Count for each prompt the tokens in front that another begins with, too; never all of its own."""
    order = sorted(range(len(prompts)), key=lambda index: prompts[index])
    lengths = [0] * len(prompts)
    # Whatever shares the most with a prompt stands beside it.
    for index, following in pairwise(order):
        num = count_shared(prompts[index], prompts[following])
        for each in (index, following):
            lengths[each] = min(max(lengths[each], num), len(prompts[each]) - 1)
    return lengths


def fit_line(num_tokens: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Fit a straight line by least squares of the relative residuals: small runs count as large ones do.

    Args:
        num_tokens: The tokens of each measurement.
        seconds: What each took.

    Returns:
        The line; without values where there are not two different numbers of tokens, or something
        took no time.
    """
    x, y = np.asarray(num_tokens, dtype=float), np.asarray(seconds, dtype=float)
    if len(set(num_tokens)) < 2 or not y.all():
        return Fit(
            slope_s_per_token=None, intercept_s=None, r_squared=None, largest_relative_residual=None
        )
    slope, intercept = map(float, np.polyfit(x, y, 1, w=1 / y))
    residuals = y - (slope * x + intercept)
    spread = float(((y - y.mean()) ** 2).sum())
    return Fit(
        slope_s_per_token=slope,
        intercept_s=intercept,
        r_squared=1 - float((residuals**2).sum()) / spread if spread else None,
        largest_relative_residual=float(np.abs(residuals / y).max()),
    )


def draw_growth(growth: Growth) -> "Picture":
    """Draw time over tokens, memory over edits, and time over depth, side by side."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(12, 3.6), layout="constrained")
    over_tokens, over_edits, over_depth = picture.subplots(1, 3)
    tokens = [time.num_tokens for time in growth.epochs]
    over_tokens.plot(tokens, [time.seconds_per_epoch for time in growth.epochs], "o")
    slope, intercept = growth.fit.slope_s_per_token, growth.fit.intercept_s
    if slope is not None and intercept is not None:
        line = f"{1e6 * slope:.3g} µs per token"
        over_tokens.plot(tokens, [slope * num + intercept for num in tokens], label=line)
        over_tokens.legend()
    over_tokens.set(xlabel="prompt and target tokens", ylabel="seconds per epoch")
    nums = [use.num_edits for use in growth.memory]
    for label, peaks in _memory_peaks(growth).items():
        told = [(num, peak / 1e6) for num, peak in zip(nums, peaks, strict=True) if peak is not None]
        over_edits.plot([num for num, _ in told], [peak for _, peak in told], "o-", label=label)
    over_edits.set(xlabel="edits", ylabel="anonymous memory, MB", ylim=(0, None))
    if nums:
        over_edits.set_xscale("log")
        over_edits.legend()
    depth = growth.depth
    over_depth.plot(
        [time.num_layers_above for time in depth], [time.seconds_per_epoch for time in depth], "o-"
    )
    over_depth.set(xlabel="layers above the location", ylabel="seconds per epoch", ylim=(0, None))
    return picture


def _memory_peaks(growth: Growth) -> Mapping[str, list[int | None]]:
    return {
        "model loaded": [use.loaded_bytes for use in growth.memory],
        "building the cache": [use.cache_peak_bytes for use in growth.memory],
        "training": [use.train_peak_bytes for use in growth.memory],
    }
