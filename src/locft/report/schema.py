"""The report of a run: what was done, to what, what it gave and what it cost.

`report.json` is exactly these classes, field by field. Every share has its count and interval; every
`*_s` is in seconds, every `*_bytes` in bytes, drift in nats per token.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from locft.types import CapabilityScores, Figure, Scores

SCHEMA_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The model: its name as the user gave it, its commit if it has one, and what it is."""

    id: str
    revision: str | None
    architecture: str
    num_parameters: int
    num_layers: int
    dtype: str  # of the frozen weights while running


@dataclass(frozen=True, kw_only=True)
class EditsInfo:
    """The edits: where they came from, how many there are, and their hash whatever the format."""

    file: str | None
    format: str
    num_edits: int
    num_rephrases: int
    num_locality: int
    num_dropped: int  # by the policy on conflicts
    num_warnings: int  # of the linter
    file_sha256: str | None
    sha256: str


@dataclass(frozen=True, kw_only=True)
class MatrixInfo:
    """One tuned parameter, named as the checkpoint file names it."""

    tensor: str
    shape: tuple[int, ...]
    dtype: str  # in the checkpoint, hence in the patch
    change: float  # Frobenius norm of the change over that of the old values


@dataclass(frozen=True, kw_only=True)
class LocationInfo:
    """The tuning location, resolved."""

    name: str
    layer: int | None
    module: str
    matrices: tuple[MatrixInfo, ...]
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class TrainingInfo:
    """How training went; `lr`, `batch_size` and `epochs_at_most` are what `auto` came to."""

    lr: float
    batch_size: int
    epochs_at_most: int
    epochs: int
    steps: int
    final_loss: float
    stopped_early: bool


@dataclass(frozen=True, kw_only=True)
class DriftInfo:
    """What drift was measured on, and the drift over all of it and for each kind of text."""

    text: str
    text_sha256: str
    num_tokens: int
    overall: Figure
    by_kind: dict[str, Figure]


@dataclass(frozen=True, kw_only=True)
class EvalCost:
    """What loading and scoring cost."""

    load_s: float
    eval_s: float
    wall_s: float
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Cost(EvalCost):
    """What an edit run cost.

    `seconds_per_edit` is cache and training over the number of edits, as the paper counts it.
    """

    seconds_per_edit: float
    cache_s: float
    train_s: float


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where the run was done: bytes of a patch are equal for equal versions, device and threads."""

    locft: str
    python: str
    torch: str
    transformers: str
    platform: str
    device: str
    num_threads: int


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How scores were taken: by what rule, in what context, and what each of them is."""

    name: str
    rule: str
    context: str
    max_new_tokens: int | None  # None where nothing is generated
    stop: tuple[str, ...]
    match: str
    meanings: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class ProtocolScores:
    """What one protocol measured in one context, by the names of its scores.

    `before` is the unedited model's, and `change` the paired difference on the same items; both are
    None where there is no unedited model.
    """

    protocol: Protocol
    before: dict[str, Figure] | None
    after: dict[str, Figure]
    change: dict[str, Figure] | None


@dataclass(frozen=True, kw_only=True)
class JudgeInfo:
    """The judge: its model, how often it agreed with exact match, and how often it gave no verdict."""

    model: str
    agreement: Figure
    num_without_verdict: int


@dataclass(frozen=True, kw_only=True)
class EndpointInfo:
    """A server that answered in place of a loaded model: its address, and the name of its model."""

    url: str
    model: str


@dataclass(frozen=True, kw_only=True)
class EditReport:
    """The report of `locft edit`."""

    schema_version: int
    model: ModelInfo
    edits: EditsInfo
    location: LocationInfo
    settings: dict[str, Any]
    training: TrainingInfo
    protocol: Protocol
    scores_before: Scores
    scores: Scores
    change: dict[str, Figure]
    drift: DriftInfo
    cost: Cost
    patch_bytes: int
    environment: Environment


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """The report of `locft eval`; `base` is the unedited model, if one was named.

    `protocols` are what was asked for, by name, and `contexts` the first of them that takes answers,
    by context. `model` is None where an `endpoint` answered.
    """

    schema_version: int
    model: ModelInfo | None
    endpoint: EndpointInfo | None
    patch: str | None
    base: str | None
    edits: EditsInfo
    protocols: dict[str, ProtocolScores]
    contexts: dict[str, ProtocolScores]
    judge: JudgeInfo | None
    causes: dict[str, dict[str, int]]  # of failures: by kind of item and cause, of the first protocol
    drift: DriftInfo | None
    capability: CapabilityScores | None
    cost: EvalCost
    parts_s: dict[
        str, float
    ]  # seconds by part; answers that protocols share count for the first of them
    environment: Environment


def to_json(report: EditReport | EvalReport) -> str:
    """Write a report as JSON, indented, with a newline at its end."""
    return json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False) + "\n"
