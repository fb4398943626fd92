"""Measures training one matrix side by side: as published, with TRL, and with locft.

Every run has a process of its own. In each round all variants take their turn, so that a machine that
grows slower meanwhile does so for all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from locft.bench.process import run_alone
from locft.bench.schema import (
    ENGINES,
    SCHEMA_VERSION,
    VARIANTS,
    EngineReport,
    MatrixRate,
    PublishedReport,
    TrlReport,
    Variant,
    VariantReport,
)
from locft.bench.stand import Task
from locft.bench.trl_trainer import require_trl
from locft.bench.variants import Run, Survey, run_variant, survey, try_trl
from locft.bench.work import (
    LARGEST_OVERHEAD,
    predicted_seconds,
    steps_over_prediction,
    whole_rate,
)
from locft.config import RunConfig
from locft.data.gather import gather_edits
from locft.errors import ConfigError, MissingExtraError
from locft.model.load import DTYPES
from locft.report.words import bytes_text, counted, seconds_text
from locft.types import Edit

_MEASUREMENTS = ("seconds_per_edit", "seconds_per_epoch", "peak_memory_bytes")


def bench_engine(
    model: str | None,
    edits: str | Path | Sequence[Edit],
    config: RunConfig,
    *,
    shape: str | None = None,
    num_edits: int = 100,
    variants: Sequence[Variant] = VARIANTS,
    num_rounds: int = 2,
    say: Callable[[str], None] = lambda _: None,
) -> EngineReport:
    """Measure the variants in turn, on the same model, edits, batches, epochs and location.

    Args:
        model: A model, as `locft edit` takes it; None for a shape.
        edits: The edits, as `locft edit` takes them; a shape has its own.
        config: The settings. Training never stops early, whatever they say.
        shape: Time a random model of this shape on random edits: a name of `SHAPES`.
        num_edits: Take the first of the edits.
        variants: Which to measure.
        num_rounds: How often.
        say: Called with a line at each step.

    Returns:
        The report; `trl` is None where TRL is not installed.

    Raises:
        InputError: The model, the edits, the location or a setting cannot be used.
        MissingExtraError: Only `trl` was asked for, and it is not installed.
    """
    chosen = _available(variants, say)
    config = replace(config, stop_loss=0.0)
    given: tuple[Edit, ...] = ()
    if shape is None:
        given = gather_edits(edits, config.on_conflict).edits[:num_edits]
    task = Task(
        model=model,
        shape=shape,
        edits=given,
        num_edits=num_edits if shape else len(given),
        config=config,
        num_threads=torch.get_num_threads(),
    )
    surveys: list[Survey] = []
    runs: dict[Variant, list[Run]] = {variant: [] for variant in chosen}
    trials: dict[str, float] = {}
    for number in range(1, num_rounds + 1):
        say(f"round {number} of {num_rounds}: measuring matrix products")
        surveys.append(run_alone(survey, task))
        if number == 1:
            say(_describe(surveys[0]))
        for variant in chosen:
            if variant == "trl" and not trials:
                trials = _try_trl(task, surveys[0], say)
            dtype = min(trials, key=lambda name: trials[name]) if variant == "trl" else None
            say(f"round {number} of {num_rounds}: {variant}")
            runs[variant].append(run_alone(run_variant, task, variant, dtype))
            say(_describe_run(variant, runs[variant][-1], surveys[0]))
    report = make_report(task, surveys, runs, trials, num_rounds)
    published = report.variants["published"]
    if isinstance(published, PublishedReport) and published.flagged:
        say(
            f"flagged: a step of `published` took {published.steps_over_prediction:.2f} times what its "
            f"matrix products alone should take (at most {LARGEST_OVERHEAD} expected): something held "
            "it up, and what is faster than it is so by less than these figures say"
        )
    return report


def make_report(
    task: Task,
    surveys: Sequence[Survey],
    runs: Mapping[Variant, Sequence[Run]],
    trials: Mapping[str, float],
    num_rounds: int,
) -> EngineReport:
    """Put the measurements together.

    Args:
        task: What was trained, on what.
        surveys: One of each round.
        runs: Those of each variant.
        trials: Seconds per step of TRL by dtype.
        num_rounds: How many rounds there were.
    """
    first = surveys[0]
    # The fastest of all rounds: whatever else ran on the machine made the others slower.
    rates = {
        dtype: {name: max(found.rates[dtype][name] for found in surveys) for name in first.rates[dtype]}
        for dtype in DTYPES
    }
    variants: dict[Variant, VariantReport | None] = {
        name: _report_variant(name, runs[name], first, rates, trials) if runs.get(name) else None
        for name in VARIANTS
    }
    return EngineReport(
        schema_version=SCHEMA_VERSION,
        variants=variants,
        matrix_rate_gflops={
            dtype: MatrixRate(
                whole=whole_rate(first.plain, found) / 1e9,
                by_product={name: rate / 1e9 for name, rate in found.items()},
            )
            for dtype, found in rates.items()
        },
        settings={
            "model": task.model,
            "shape": task.shape,
            "model_dtype": first.model_dtype,
            "location": first.location,
            "num_edits": first.num_edits,
            "num_tokens": first.num_tokens,
            "needed_tokens": first.needed_tokens,
            "needed_targets": first.needed_targets,
            "rounds": num_rounds,
            **first.schedule,
        },
        environment=first.environment,
        ratios=_ratios(variants),
    )


def _available(variants: Sequence[Variant], say: Callable[[str], None]) -> list[Variant]:
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown or not variants:
        raise ConfigError(
            f"variants are {', '.join(variants)!r}: expected some of {', '.join(VARIANTS)}"
        )
    chosen = [name for name in VARIANTS if name in variants]
    if "trl" in chosen:
        try:
            require_trl()
        except MissingExtraError as error:
            chosen.remove("trl")
            if not chosen:
                raise
            say(str(error))
    return chosen


def _try_trl(task: Task, found: Survey, say: Callable[[str], None]) -> dict[str, float]:
    # A model that is kept in bfloat16 is nothing that anyone would train in float32.
    dtypes = ["bfloat16"] if found.model_dtype == "bfloat16" else list(DTYPES)
    if len(dtypes) == 1:
        return {dtypes[0]: run_alone(try_trl, task, dtypes[0])}
    trials: dict[str, float] = {}
    for dtype in dtypes:
        say(f"trying trl in {dtype}")
        trials[dtype] = run_alone(try_trl, task, dtype)
    return trials


def _report_variant(
    variant: Variant,
    runs: Sequence[Run],
    found: Survey,
    rates: Mapping[str, Mapping[str, float]],
    trials: Mapping[str, float],
) -> VariantReport:
    seconds_per_epoch = median(seconds for run in runs for seconds in run.epoch_seconds)
    seconds_per_edit = tuple(run.seconds / found.num_edits for run in runs)
    last = runs[-1]
    operations = sum(
        product.operations(found.needed_tokens, found.needed_targets) for product in found.needed
    )
    common: dict[str, Any] = {
        "dtype": last.dtype,
        "seconds_per_edit": median(seconds_per_edit),
        "seconds_per_edit_runs": seconds_per_edit,
        "seconds_per_epoch": seconds_per_epoch,
        "tokens_per_s": found.num_tokens / seconds_per_epoch,
        "share_of_matrix_rate": operations
        / seconds_per_epoch
        / whole_rate(found.plain, rates[last.dtype]),
        "peak_memory_bytes": max(run.peak_memory_bytes for run in runs),
        "losses": last.losses,
        "reliability": last.reliability,
    }
    if variant == "trl":
        return TrlReport(
            **common,
            version=version("trl"),
            trial_seconds_per_step=dict(trials),
            same_tokens=last.same_tokens,
        )
    if variant == "published":
        fastest = min(runs, key=lambda run: sum(run.step_seconds))
        at = rates[fastest.dtype]
        over = steps_over_prediction(fastest.step_seconds, fastest.step_tokens, found.plain, at)
        return PublishedReport(
            **common,
            seconds_per_step=median(fastest.step_seconds),
            predicted_seconds_per_step=median(
                predicted_seconds(found.plain, at, num) for num in fastest.step_tokens
            ),
            steps_over_prediction=over,
            flagged=over > LARGEST_OVERHEAD,
        )
    return VariantReport(**common)


def _ratios(variants: Mapping[Variant, VariantReport | None]) -> dict[str, dict[str, float]]:
    """Say how many times as much the others took as each engine, where both were measured."""
    ratios: dict[str, dict[str, float]] = {}
    for measurement in _MEASUREMENTS:
        values = {
            name: getattr(found, measurement) for name, found in variants.items() if found is not None
        }
        ratios[measurement] = {
            f"{other}/{engine}": values[other] / values[engine]
            for engine in ENGINES
            for other in VARIANTS
            if other not in ENGINES and other in values and engine in values
        }
    return ratios


def _describe(found: Survey) -> str:
    rates = ", ".join(
        f"{whole_rate(found.plain, rates) / 1e9:,.0f} GFLOP/s in {dtype}"
        for dtype, rates in found.rates.items()
    )
    return (
        f"training {found.location} on {counted(found.num_edits, 'edit')} ({found.num_tokens:,} "
        f"tokens), {counted(found.schedule['epochs'], 'epoch')}; matrix products run at {rates}"
    )


def _describe_run(variant: Variant, run: Run, found: Survey) -> str:
    return (
        f"{variant} in {run.dtype}: {run.seconds / found.num_edits:.3g} s per edit "
        f"({seconds_text(run.seconds)}), peak memory {bytes_text(run.peak_memory_bytes)}"
    )
