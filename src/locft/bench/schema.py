"""What `locft bench engine` finds, as engine.json holds it (no torch)."""

from dataclasses import dataclass
from typing import Any, Literal

from locft.report.schema import Environment

SCHEMA_VERSION = 1

Variant = Literal["published", "trl", "engine_fp32", "engine_best"]
VARIANTS: tuple[Variant, ...] = ("published", "trl", "engine_fp32", "engine_best")
ENGINES: tuple[Variant, ...] = ("engine_fp32", "engine_best")
SHAPES = ("tiny", "llama-8b")


@dataclass(frozen=True, kw_only=True)
class VariantReport:
    """What one way of training the same matrix on the same edits took.

    Attributes:
        dtype: What the frozen weights were multiplied in.
        seconds_per_edit: From a loaded model to the final matrix, whatever is built or compiled
            between included, over the number of edits; the median of the runs.
        seconds_per_edit_runs: The same for each run, in a process of its own, in order.
        seconds_per_epoch: The median over all epochs of all runs.
        tokens_per_s: Tokens of the edits, without padding, passed over per second of training.
        share_of_matrix_rate: The work that an epoch needs (`locft.bench.work`), over the seconds that
            it took and over the measured rate of matrix products in `dtype`.
        peak_memory_bytes: The most that a run's process (on CUDA, its device) held until the final
            matrix.
        losses: The mean loss of each epoch in nats, of the last run.
        reliability: Share of the prompts that are answered with the target afterwards; None where
            the model has no words.
    """

    dtype: str
    seconds_per_edit: float
    seconds_per_edit_runs: tuple[float, ...]
    seconds_per_epoch: float
    tokens_per_s: float
    share_of_matrix_rate: float
    peak_memory_bytes: int
    losses: tuple[float, ...]
    reliability: float | None


@dataclass(frozen=True, kw_only=True)
class PublishedReport(VariantReport):
    """What the published procedure took, and whether it was as fast as it can be.

    Attributes:
        seconds_per_step: The median of the faster run's steps.
        predicted_seconds_per_step: The median of what their matrix products alone should take.
        steps_over_prediction: The median of each step's time over its prediction.
        flagged: Whether that is so much that the comparison is not fair to it.
    """

    seconds_per_step: float
    predicted_seconds_per_step: float
    steps_over_prediction: float
    flagged: bool


@dataclass(frozen=True, kw_only=True)
class TrlReport(VariantReport):
    """What TRL's trainer took.

    Attributes:
        version: TRL's version.
        trial_seconds_per_step: By dtype; the run took the faster one.
        same_tokens: Whether TRL made the same token ids and the same targets of the edits.
    """

    version: str
    trial_seconds_per_step: dict[str, float]
    same_tokens: bool


@dataclass(frozen=True, kw_only=True)
class MatrixRate:
    """How fast matrix products run, in 1e9 multiplications and additions per second.

    Attributes:
        whole: Over all products of a plain step.
        by_product: Each kind of product, at the number of tokens of a usual batch.
    """

    whole: float
    by_product: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """The report of `locft bench engine`.

    Attributes:
        schema_version: Of this structure.
        variants: Each variant's measurements; None where it was not measured.
        matrix_rate_gflops: By dtype, the fastest that was measured in any round.
        settings: What was trained on what, and how.
        environment: Versions and hardware.
        ratios: By measurement and engine, how many times as much the others took.
    """

    schema_version: int
    variants: dict[Variant, VariantReport | None]
    matrix_rate_gflops: dict[str, MatrixRate]
    settings: dict[str, Any]
    environment: Environment
    ratios: dict[str, dict[str, float]]
