"""What a study keeps: what it is about, and a record of each trial."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from locft.report.schema import EditsInfo, Environment, ModelInfo, Protocol
from locft.types import CapabilityScores, Figure, Kind

STUDY_VERSION = 1
Pipeline = Literal["depth-first", "breadth-first", "sequential"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training and its scores, among those of a study: everything that may differ between two.

    Attributes:
        method: Name of the method.
        settings: The method's own settings.
        location: The tuning location, resolved; None for methods that have none.
        pipeline: ``depth-first`` (each edit until it is learnt, then the next, in a single pass) or
            ``breadth-first`` (epochs over all edits), by training; ``sequential`` (one batch inserted
            after the other), by editors.
        batch_size: Edits per step.
        lr: Adam's learning rate.
        seed: Names the order of the edits, and whatever else is random.
        num_edits: How many edits, from the first of the file on.
        preserve: What training keeps as it is; ``none`` for methods that have no location.
        neutral_text: The ordinary text that is taken for it; None for the model's own.
        augment: What further examples each edit gets.
        max_drift: The most that drift may come to on text held back; None for no limit.
        rephraser: Who writes other wordings.
    """

    method: str
    settings: Mapping[str, Any]
    location: str | None
    pipeline: Pipeline
    batch_size: int
    lr: float
    seed: int
    num_edits: int
    preserve: str = "none"
    neutral_text: str | None = None
    augment: str = "none"
    max_drift: float | None = None
    rephraser: Literal["model", "endpoint"] = "model"

    @property
    def name(self) -> str:
        """Name it on one line."""
        where = "" if self.location is None else f" at {self.location}"
        kept = "" if self.preserve == "none" else f", preserving {self.preserve}"
        kept += "" if self.augment == "none" else f", augmented by {self.augment}"
        kept += "" if self.max_drift is None else f", drift at most {self.max_drift:g}"
        how = f"{self.pipeline}, batch {self.batch_size}, seed {self.seed}"
        return f"{self.method}{where}, {how}{kept}"


@dataclass(frozen=True, kw_only=True)
class Moment:
    """How far the edits were learnt at a moment of training.

    Attributes:
        done: The share of the training that was done by then: of the edits that were gone through,
            depth-first; of the epochs that were taken, breadth-first.
        success: For each fifth of the edits, in the order in which depth-first goes through them, the
            mean share of target tokens that are predicted right, the true ones before them given.
    """

    done: float
    success: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What came of a trial: a line of `trials.jsonl`.

    Attributes:
        trial: The trial.
        failure: Why training could not go on, and there are no scores; None if it did.
        before: The unedited model's scores, by name.
        scores: Scores after all edits, by name, drift included.
        right: Of each kind of prompt, in order, ``1`` where it was answered as expected, else ``0``.
        course: How far the edits were learnt while training went on.
        num_parameters: How many numbers were trained.
        num_steps: How many steps were taken.
        final_loss: Mean loss when training ended, in nats.
        cache_s: The frozen layers, once.
        train_s: Training.
        eval_s: Scoring.
        seconds_per_edit: Frozen layers and training, over the number of edits.
        peak_memory_bytes: The most that was in use by then, of the device on CUDA, of the process
            elsewhere.
        notes: What else decided the result, by the method.
        capability: What the model can do besides, where that was asked for.
        environment: Where it was done; None until it is kept.
    """

    trial: Trial
    failure: str | None = None
    before: dict[str, Figure]
    scores: dict[str, Figure]
    right: dict[Kind, str]
    course: tuple[Moment, ...]
    num_parameters: int
    num_steps: int
    final_loss: float | None
    cache_s: float
    train_s: float
    eval_s: float
    seconds_per_edit: float
    peak_memory_bytes: int
    notes: dict[str, Any] = field(default_factory=dict)
    capability: CapabilityScores | None = None
    environment: Environment | None = None


@dataclass(frozen=True, kw_only=True)
class Topic:
    """What all trials of a study have in common; trials of different ones do not compare.

    Attributes:
        version: Of these records.
        study: Name of the study.
        model: The model.
        edits: The edits' file and hash.
        settings: The settings that all trials share.
        protocol: How scores were taken.
        drift_text_sha256: Hash of the neutral text.
        num_passages: How many of its passages drift was measured on.
        num_scored: How many edits, from the first on, were scored.
    """

    version: int
    study: str
    model: ModelInfo
    edits: EditsInfo
    settings: dict[str, Any]
    protocol: Protocol
    drift_text_sha256: str
    num_passages: int
    num_scored: int


@dataclass(frozen=True, kw_only=True)
class StudyReport:
    """The report of a study.

    Attributes:
        kind: That it is one.
        topic: What all trials have in common.
        trials: What came of each trial, and where it was done.
    """

    kind: Literal["study"] = "study"
    topic: Topic
    trials: tuple[TrialResult, ...]
