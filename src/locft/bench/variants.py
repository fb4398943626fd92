"""Trains the same matrix on the same edits in four ways, each to be run in a process of its own.

`published` is the published procedure, written plainly; `trl` is what most people would take instead;
`engine_fp32` and `engine_best` are locft. Time counts from a loaded model to the final matrix, and so
includes whatever each of them builds, tokenises or compiles first.
"""

from dataclasses import asdict, dataclass, replace
from statistics import median, median_high
from typing import Any

from locft.bench.published import train_published
from locft.bench.schema import Variant
from locft.bench.stand import Stand, Task, answers_right, set_up
from locft.bench.training import Clock, Training
from locft.bench.trl_trainer import import_trl, train_trl
from locft.bench.work import Product, measure_rates, needed_epoch, needed_positions, plain_step
from locft.config import RunConfig, with_settings
from locft.model.load import DTYPES, choose_device, dtype_name
from locft.model.split import split_model
from locft.provenance import describe_environment, peak_memory_bytes
from locft.report.schema import Environment
from locft.train.cache import build_cache
from locft.train.defaults import choose_engine
from locft.train.loop import shuffled_batches, train_breadth_first

_TRIAL_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a variant: `Training` without the matrix, and what was measured around it.

    Attributes:
        seconds: From a loaded model to the final matrix.
        peak_memory_bytes: The most that the process, or its device, held until then.
        reliability: Share of the prompts that are answered with the target; None for a shape.
    """

    dtype: str
    losses: tuple[float, ...]
    epoch_seconds: tuple[float, ...]
    step_seconds: tuple[float, ...]
    step_tokens: tuple[int, ...]
    same_tokens: bool
    seconds: float
    peak_memory_bytes: int
    reliability: float | None


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is to be trained, and how fast matrix products run.

    Attributes:
        location: The location's name in the model.
        schedule: How long and how fast, as a record.
        model_dtype: The model's own.
        num_edits: How many edits there are.
        num_tokens: Their tokens, without padding.
        needed_tokens: Positions that an epoch must run on.
        needed_targets: Those of them that it must predict from.
        plain: The products of a step of the published procedure.
        needed: The products that an epoch needs.
        rates: By dtype and product, floating-point operations per second.
        environment: Versions and hardware.
    """

    location: str
    schedule: dict[str, Any]
    model_dtype: str
    num_edits: int
    num_tokens: int
    needed_tokens: int
    needed_targets: int
    plain: tuple[Product, ...]
    needed: tuple[Product, ...]
    rates: dict[str, dict[str, float]]
    environment: Environment


def survey(task: Task) -> Survey:
    """Look at a task, and measure how fast this machine does its matrix products.

    Raises:
        InputError: The model, the edits or the location cannot be used.
    """
    stand = set_up(task, "auto")
    device = stand.model.device
    plain, needed = plain_step(stand.model, stand.location), needed_epoch(stand.model, stand.location)
    examples = stand.encode()
    orders = shuffled_batches(len(examples), stand.schedule.batch_size, stand.schedule.seed)
    batches = [[examples[index] for index in indices] for indices in next(orders)]
    padded = [len(batch) * max(len(example.ids) for example in batch) for batch in batches]
    needed_tokens, needed_targets = needed_positions(batches)
    found = Survey(
        location=stand.location.name,
        schedule=asdict(stand.schedule),
        model_dtype=dtype_name(stand.model.dtype),
        num_edits=len(examples),
        num_tokens=sum(len(example.ids) for example in examples),
        needed_tokens=needed_tokens,
        needed_targets=needed_targets,
        plain=plain,
        needed=needed,
        rates={},
        environment=describe_environment(device),
    )
    del stand  # a large model leaves no room beside it
    rates = {
        name: measure_rates((*plain, *needed), median_high(padded), dtype, device)
        for name, dtype in DTYPES.items()
    }
    return replace(found, rates=rates)


def run_variant(task: Task, variant: Variant, trl_dtype: str | None = None) -> Run:
    """Train in one of the four ways.

    Args:
        task: What to train, on what.
        variant: The way.
        trl_dtype: The dtype for `trl`.

    Raises:
        InputError: The model, the edits or the location cannot be used.
        TrainingError: A loss, gradient or weight is not finite.
    """
    training, seconds, peak = _train(task, variant, trl_dtype)
    measured = {name: value for name, value in vars(training).items() if name != "matrix"}
    return Run(
        **measured,
        seconds=seconds,
        peak_memory_bytes=peak,
        reliability=answers_right(task, training.matrix),
    )


def try_trl(task: Task, dtype: str) -> float:
    """Time a few steps of TRL's trainer in a dtype: the median in seconds, without the first."""
    training = train_trl(set_up(task, dtype), dtype, num_trial_steps=_TRIAL_STEPS)
    return median(training.step_seconds[1:])


def _train(task: Task, variant: Variant, trl_dtype: str | None) -> tuple[Training, float, int]:
    """Train; return what came of it, the seconds it took and the peak memory."""
    config = task.config
    if variant == "engine_fp32":
        config = replace(config, dtype="float32", compute_dtype="float32", compile="off")
    elif variant == "published":
        # On a GPU it is run in the model's own dtype, on a CPU in the one that CPUs are fast in.
        is_on_cpu = choose_device(config.device).type == "cpu"
        config = replace(config, dtype="float32" if is_on_cpu else "auto")
    elif variant == "trl":
        assert trl_dtype is not None
        config = with_settings(config, {"dtype": trl_dtype})
    stand = set_up(task, config.dtype)
    if variant == "trl":
        import_trl()
    device = stand.model.device
    whole = Clock(device)
    if variant == "published":
        training = train_published(stand)
    elif variant == "trl":
        training = train_trl(stand, config.dtype)
    else:
        training = _train_ours(stand, config)
    whole.note()
    [seconds] = whole.laps
    return training, seconds, peak_memory_bytes(device)


def _train_ours(stand: Stand, config: RunConfig) -> Training:
    """Train as `locft edit` does: all that this benchmark asks of the engine is here."""
    model, schedule = stand.model, stand.schedule
    engine = choose_engine(config, model)
    split = split_model(model, stand.location.layer)
    cache = build_cache(split, stand.encode())
    epochs = Clock(model.device)
    trained = train_breadth_first(
        split, stand.location, cache, schedule, lambda _: epochs.note(), engine=engine
    )
    [matrix] = trained.matrices.values()
    return Training(
        matrix=matrix,
        dtype=engine.compute_dtype(model),
        losses=tuple(epoch.loss for epoch in trained.epochs),
        epoch_seconds=epochs.laps,
    )
