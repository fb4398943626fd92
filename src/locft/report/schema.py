"""The report of a run: what was done, to what, what it gave and what it cost.

`report.json` is exactly these classes, field by field; `docs/report.schema.json` says so to machines.
Every share has its count and interval; every `*_s` is in seconds, every `*_bytes` in bytes, drift in
nats per token.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from locft.types import CapabilityScores, Epoch, Figure, MovedPassage, Scores

SCHEMA_VERSION = 7


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The model.

    Attributes:
        id: Its name, as it was given.
        revision: Its commit, if it has one.
        architecture: Its class in transformers.
        num_parameters: All its parameters.
        num_layers: Its decoder layers.
        dtype: Of the frozen weights while running.
    """

    id: str
    revision: str | None
    architecture: str
    num_parameters: int
    num_layers: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class EditsInfo:
    """The edits.

    Attributes:
        file: Where they came from; None if they came from Python.
        format: The format of the file.
        num_edits: How many there are.
        num_rephrases: How many rephrases they have.
        num_locality: How many locality prompts they have.
        num_dropped: How many were dropped by the policy on conflicts.
        num_warnings: How many warnings the linter gave.
        file_sha256: Hash of the file.
        sha256: Hash of the edits, the same whatever the format.
    """

    file: str | None
    format: str
    num_edits: int
    num_rephrases: int
    num_locality: int
    num_dropped: int
    num_warnings: int
    file_sha256: str | None
    sha256: str


@dataclass(frozen=True, kw_only=True)
class MatrixInfo:
    """One tuned parameter.

    Attributes:
        tensor: Its name in the checkpoint.
        shape: Its shape.
        dtype: Its dtype in the checkpoint, hence in the patch.
        change: Frobenius norm of the change over that of the old values.
    """

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    change: float


@dataclass(frozen=True, kw_only=True)
class ExpertsInfo:
    """How often the routed experts of the tuned layer serve the edits.

    Attributes:
        edited: The numbers of those that were tuned; all if none is named.
        served: How many tokens of the edits each expert of the layer serves, by its number; what edits
            begin with alike counts once. None where the model does not say which it chooses.
        num_tokens: How many tokens there are.
    """

    edited: tuple[int, ...]
    served: tuple[int, ...] | None
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class LocationInfo:
    """The tuning location, resolved.

    Attributes:
        name: Layer and module.
        layer: The layer's number, from 0.
        module: The module.
        matrices: The tuned parameters.
        num_parameters: How many numbers were tuned.
        part: What is tuned of a tensor that also holds something else, in words; None for all of it.
        experts: How often the tuned experts serve the edits; None where none were tuned.
    """

    name: str
    layer: int
    module: str
    matrices: tuple[MatrixInfo, ...]
    num_parameters: int
    part: str | None = None
    experts: ExpertsInfo | None = None


@dataclass(frozen=True, kw_only=True)
class PreservedInfo:
    """What training kept as it was, as the unedited model reads ordinary text.

    Attributes:
        strength: How much updates were kept off the directions that the text uses; None for not at all.
        num_tokens: On how many tokens of the text they were measured; 0 for none.
        left_plain: Tuned parameters whose updates were not preconditioned.
        num_anchors: How many texts were held to what the unedited model makes of them.
        max_drift: The most that drift might come to on text held back, in nats per token; None for no
            limit.
    """

    strength: float | None
    num_tokens: int
    left_plain: tuple[str, ...]
    num_anchors: int
    max_drift: float | None


@dataclass(frozen=True, kw_only=True)
class HeldBackInfo:
    """What training did to text that was held back to limit drift.

    Attributes:
        num_tokens: How many tokens that was.
        drift: KL(unedited || edited) there in the end, in nats per token.
        wanted: What it would have come to without the limit's last correction.
        num_shrunk: After how many epochs the update was made smaller to keep within the limit.
        is_met: Whether the edits were learnt within it.
    """

    num_tokens: int
    drift: float
    wanted: float
    num_shrunk: int
    is_met: bool


@dataclass(frozen=True, kw_only=True)
class TextInfo:
    """The ordinary text that a run took.

    Attributes:
        text: ``model`` for text that the unedited model wrote by itself, or the file.
        sha256: Hash of its token ids.
        num_tokens: How many there are.
    """

    text: str
    sha256: str
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class AugmentedInfo:
    """What edits were trained on beside their own prompts.

    Attributes:
        num_asked: How many further examples there were to be.
        num_by_kind: How many there were: ``prefix``, ``rephrase``, ``format``.
        num_left_out: How many more were not taken since they are scored.
        num_scored: How many of those that were taken are scored: 0.
    """

    num_asked: int
    num_by_kind: dict[str, int]
    num_left_out: int
    num_scored: int


@dataclass(frozen=True, kw_only=True)
class TrainingInfo:
    """How training went.

    Attributes:
        lr: Adam's learning rate: what `auto` came to.
        batch_size: Edits per step.
        epochs_at_most: The most passes over all edits.
        epochs: How many there were.
        steps: Steps in all.
        final_loss: Mean loss of the last epoch, in nats.
        stopped_early: Whether the loss fell under the threshold.
        fifths: How many edits each fifth has, of which `course` tells the success.
        course: What each epoch did.
        text: The ordinary text that was taken; None where none was needed.
        preserved: What training kept as it was; None for nothing.
        held_back: Where drift was limited, what came of that; else None.
        augmented: What edits were trained on beside their own prompts; None for nothing.
    """

    lr: float
    batch_size: int
    epochs_at_most: int
    epochs: int
    steps: int
    final_loss: float
    stopped_early: bool
    fifths: tuple[int, ...]
    course: tuple[Epoch, ...]
    text: TextInfo | None = None
    preserved: PreservedInfo | None = None
    held_back: HeldBackInfo | None = None
    augmented: AugmentedInfo | None = None


@dataclass(frozen=True, kw_only=True)
class DriftInfo:
    """Drift, and what it was measured on.

    Attributes:
        text: ``packaged``, or the file.
        text_sha256: Hash of the text.
        num_tokens: How many predictions were compared.
        overall: Over all of it.
        by_kind: For each kind of text.
        most_moved: The passages on which predictions moved most, the farthest first; `drift.jsonl` has
            all of them.
    """

    text: str
    text_sha256: str
    num_tokens: int
    overall: Figure
    by_kind: dict[str, Figure]
    most_moved: tuple[MovedPassage, ...]


@dataclass(frozen=True, kw_only=True)
class EvalCost:
    """What loading and scoring cost.

    Attributes:
        load_s: Loading.
        eval_s: Scoring, before and after.
        wall_s: All of it.
        peak_memory_bytes: The most that was in use, of the device on CUDA, of the process elsewhere.
    """

    load_s: float
    eval_s: float
    wall_s: float
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Cost(EvalCost):
    """What an edit run cost.

    Attributes:
        seconds_per_edit: Cache and training over the number of edits, as the paper counts it.
        prepare_s: Ordinary text and what is preserved by it, once for a model, location and text;
            anchors and further examples.
        cache_s: The frozen layers, once.
        train_s: Training.
    """

    seconds_per_edit: float
    prepare_s: float
    cache_s: float
    train_s: float


@dataclass(frozen=True, kw_only=True)
class PlannedCost:
    """What `locft edit --plan` would have said, with the machine as fast as it was before training.

    Attributes:
        load_s: Loading.
        cache_s: The frozen layers, once.
        train_s: Training, at most.
        eval_s: Scoring, before and after.
        wall_s: All of it, at most.
        peak_memory_bytes: The most memory in use.
        epochs_at_most: The epochs that `train_s` allows for.
    """

    load_s: float
    cache_s: float
    train_s: float
    eval_s: float
    wall_s: float
    peak_memory_bytes: int
    epochs_at_most: int


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where the run was done: bytes of a patch are equal for equal versions, device and threads.

    Attributes:
        locft: Version of locft.
        python: Version of Python.
        torch: Version of torch.
        transformers: Version of transformers.
        platform: The system.
        device: The processor, or the GPU.
        num_threads: Threads of torch.
    """

    locft: str
    python: str
    torch: str
    transformers: str
    platform: str
    device: str
    num_threads: int


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How scores were taken.

    Attributes:
        name: Name of the protocol.
        rule: Its rule in a sentence.
        context: The context that prompts were put into.
        max_new_tokens: The longest answer; None where nothing is generated.
        stop: What ends an answer.
        match: How answers were compared.
        meanings: What each score is.
    """

    name: str
    rule: str
    context: str
    max_new_tokens: int | None
    stop: tuple[str, ...]
    match: str
    meanings: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class ProtocolScores:
    """What one protocol measured in one context, by the names of its scores.

    Attributes:
        protocol: How.
        before: The unedited model's scores; None where there is no such model.
        after: The scored model's.
        change: The paired differences on the same items; None where there is no unedited model.
    """

    protocol: Protocol
    before: dict[str, Figure] | None
    after: dict[str, Figure]
    change: dict[str, Figure] | None


@dataclass(frozen=True, kw_only=True)
class JudgeInfo:
    """The judge.

    Attributes:
        model: Its model.
        agreement: How often it agreed with exact match.
        num_without_verdict: How often it gave no verdict.
    """

    model: str
    agreement: Figure
    num_without_verdict: int


@dataclass(frozen=True, kw_only=True)
class EndpointInfo:
    """A server that answered in place of a loaded model.

    Attributes:
        url: Its address.
        model: The name of its model.
    """

    url: str
    model: str


@dataclass(frozen=True, kw_only=True)
class EditReport:
    """The report of `locft edit`.

    Attributes:
        kind: That it is one.
        schema_version: Of this structure.
        model: The model.
        edits: The edits.
        location: What was tuned.
        settings: All settings, as they were given.
        resolved: What those that leave it to locft (`auto`, a share of the layers) came to.
        training: How training went.
        protocol: How scores were taken.
        scores_before: The unedited model's scores.
        scores: The edited model's scores.
        change: The paired differences on the same items.
        causes: Counts of failures, by kind of item and cause.
        drift: Drift, and what it was measured on.
        cost: What the run cost.
        plan: What it was expected to cost; None for a run too short to be worth a prediction.
        patch_bytes: Size of the patch.
        environment: Where it was done.
    """

    kind: Literal["edit"] = "edit"
    schema_version: int
    model: ModelInfo
    edits: EditsInfo
    location: LocationInfo
    settings: dict[str, Any]
    resolved: dict[str, Any]
    training: TrainingInfo
    protocol: Protocol
    scores_before: Scores
    scores: Scores
    change: dict[str, Figure]
    causes: dict[str, dict[str, int]]
    drift: DriftInfo
    cost: Cost
    plan: PlannedCost | None
    patch_bytes: int
    environment: Environment


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """The report of `locft eval`.

    Attributes:
        kind: That it is one.
        schema_version: Of this structure.
        model: The model; None where an endpoint answered.
        endpoint: The endpoint; None where a model was loaded.
        patch: The patch that was put into the model, if one was named.
        base: The unedited model, if one was named.
        edits: The edits.
        protocols: The scores of each protocol that was asked for, by name.
        contexts: Those of the first of them that takes answers, by context.
        judge: The judge, if there was one.
        causes: Counts of failures of the first protocol, by kind of item and cause.
        drift: Drift; None where there is no unedited model.
        capability: What the model can do besides, if that was measured.
        cost: What it cost.
        parts_s: Seconds by part; answers that protocols share count for the first of them.
        environment: Where it was done.
    """

    kind: Literal["evaluation"] = "evaluation"
    schema_version: int
    model: ModelInfo | None
    endpoint: EndpointInfo | None
    patch: str | None
    base: str | None
    edits: EditsInfo
    protocols: dict[str, ProtocolScores]
    contexts: dict[str, ProtocolScores]
    judge: JudgeInfo | None
    causes: dict[str, dict[str, int]]
    drift: DriftInfo | None
    capability: CapabilityScores | None
    cost: EvalCost
    parts_s: dict[str, float]
    environment: Environment


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A run among others.

    Attributes:
        name: A letter that stands for it.
        folder: Where it is.
        kind: What it is a report of.
        subject: What was scored: the model, and the patch or server if there is one.
        location: The tuning location; None for an evaluation.
        num_edits: How many edits it has.
        edits_sha256: Hash of the edits.
        protocol: The protocol of `scores`.
        context: The context of `scores`.
        scores: What it scored, drift included, where it was scored as the first run was.
        reason: Why it has no scores; None if it has.
        seconds_per_edit: Cache and training over the number of edits; None for an evaluation.
        wall_s: All of it.
        peak_memory_bytes: The most that was in use.
        patch_bytes: Size of the patch; None for an evaluation.
        settings: Settings that did not come to the same in all edit runs.
    """

    name: str
    folder: str
    kind: Literal["edit", "evaluation"]
    subject: str
    location: str | None
    num_edits: int
    edits_sha256: str
    protocol: str
    context: str
    scores: dict[str, Figure]
    reason: str | None
    seconds_per_edit: float | None
    wall_s: float
    peak_memory_bytes: int
    patch_bytes: int | None
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a run's score is from the first run's, on the items that both have.

    Attributes:
        run: The run's letter.
        score: The score.
        figure: The mean difference, this run less the first one, with its paired interval; without
            value, and with the reason, where nothing can be paired.
        num_items: How many items this run has.
        num_items_first: How many the first one has.
    """

    run: str
    score: str
    figure: Figure
    num_items: int
    num_items_first: int


@dataclass(frozen=True, kw_only=True)
class ComparisonReport:
    """The report of `locft report` on several runs.

    Attributes:
        kind: That it is one.
        schema_version: Of this structure.
        runs: The runs; the others are compared with the first.
        differences: What is between the first run and each other one.
    """

    kind: Literal["comparison"] = "comparison"
    schema_version: int
    runs: tuple[ComparedRun, ...]
    differences: tuple[Difference, ...]


def to_bytes(report: Any) -> bytes:
    """Write a dataclass as a file holds it: half characters, as names of files have, as escapes."""
    return to_json(report).encode(errors="backslashreplace")


def to_json(report: Any) -> str:
    """Write a report as JSON, indented, with a newline at its end."""
    return json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False) + "\n"
