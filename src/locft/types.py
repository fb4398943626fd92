"""The central types, shared by every part of the package."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["reliability", "generalization", "locality"]
KINDS: tuple[Kind, ...] = ("reliability", "generalization", "locality")

Cause = Literal[
    "empty", "rambling", "contained", "near miss", "right elsewhere", "wrong fact", "answered otherwise"
]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One fact to write into a model: `prompt` shall be answered with `target`.

    Attributes:
        id: Unique within its file; the record's position where the file names none.
        prompt: The text that the model is given.
        target: The answer that it shall give, without end-of-sequence token.
        subject: What the fact is about, if the file says so.
        rephrases: Other wordings of `prompt`; they measure generalization.
        locality: Prompts whose answers shall stay as they are; they measure locality.
        train_rephrases: Wordings of `prompt` that may be trained on; they are never scored.
        train_locality: Prompts that training may keep as they are; they are never scored.
        old: The answer before the edit, if the file says so.
        source: Where the edit stands: ``line 3`` (JSONL, CSV) or ``record [2]`` (JSON).
    """

    id: str
    prompt: str
    target: str
    subject: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[str, ...] = ()
    train_rephrases: tuple[str, ...] = ()
    train_locality: tuple[str, ...] = ()
    old: str | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured value with its count and its 95% interval.

    Attributes:
        value: A share from 0 to 1, or nats per token for drift; None if not measured.
        num: How many items it was measured on (prompts; passages for drift).
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        reason: Why there is no `value` or no interval, or what holds by definition; else None.
    """

    value: float | None
    num: int
    low: float | None = None
    high: float | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one model scores on one set of edits, all edits being in.

    Attributes:
        reliability: Share of prompts answered with the target.
        generalization: Share of rephrases answered with the target.
        locality: Share of locality prompts answered as the unedited model answers them.
        drift: KL(unedited || edited) on neutral text, in nats per token.
    """

    reliability: Figure
    generalization: Figure
    locality: Figure
    drift: Figure


@dataclass(frozen=True, kw_only=True)
class AnswerRecord:
    """An item with what the unedited and the scored model make of it: a line of `answers.jsonl`.

    Attributes:
        protocol: Name of the protocol.
        context: Name of the context that the prompt was put into.
        edit: Id of the edit that the prompt belongs to.
        kind: What the prompt measures.
        prompt: The prompt.
        expected: What shall be answered; for locality the unedited model's answer. None if unknown.
        before: The unedited model's answer; None if there is no such model, or nobody was asked.
        after: The scored model's answer; None if nobody was asked.
        score_before: The unedited model's score, from 0 to 1; None if it has none.
        score_after: The scored model's score.
        details_before: What the unedited model's score was made of, where that is more than the answer.
        details_after: The same of the scored model.
        cause: Why an answer after the edit is not what was expected; None if it is.
    """

    protocol: str
    context: str
    edit: str
    kind: Kind
    prompt: str
    expected: str | None
    before: str | None
    after: str | None
    score_before: float | None
    score_after: float | None
    details_before: Mapping[str, float] | None = None
    details_after: Mapping[str, float] | None = None
    cause: Cause | None = None


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What training did in one epoch: a line of `train.jsonl`.

    Attributes:
        epoch: Its number, from 1.
        steps: How many steps it took.
        loss: Mean loss over the edits, in nats.
        success: For each fifth of the edits, in their order, the mean share of target tokens that were
            predicted right, each edit being met before the step that it takes part in (teacher-forced).
    """

    epoch: int
    steps: int
    loss: float
    success: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class PassageDrift:
    """How far predictions moved on a passage of neutral text: a line of `drift.jsonl`.

    Attributes:
        passage: Its number, from 1; of a long passage each window counts.
        kind: The kind of text.
        num_tokens: How many predictions were compared.
        drift: Mean KL(unedited || edited), in nats per token.
    """

    passage: int
    kind: str
    num_tokens: int
    drift: float


@dataclass(frozen=True, kw_only=True)
class MovedPassage(PassageDrift):
    """A passage on which predictions moved much.

    Attributes:
        text: How it begins.
    """

    text: str


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """What two models scored on one task, or one did.

    Attributes:
        metric: The score of an item.
        num_items: How many items were asked.
        before: The unedited model's score, from 0 to 1; None if it was not asked.
        after: The edited model's.
        change: The mean of what the edited model scored more on the same items.
        version: lm-eval's version of the task; of a local file, locft's version of its template.
        document_sha256: Hash of the items, their prompts and their answers.
        settings: How the task was asked: number of examples, templates, what was generated.
    """

    metric: str
    num_items: int
    before: Figure | None
    after: Figure
    change: Figure | None
    version: str
    document_sha256: str
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CapabilityScores:
    """What two models scored on all tasks, or one did.

    Attributes:
        tasks: The scores by task.
        before: Mean of the tasks' scores, each of which weighs the same, of the unedited model.
        after: The same of the edited model.
        change: The mean of the tasks' changes.
        lm_eval: The version of lm-eval.
        limit: How many items of each task were asked at most; None for all.
        data: The folder of local files; None if the tasks came from the hub.
    """

    tasks: dict[str, TaskScores]
    before: Figure | None
    after: Figure
    change: Figure | None
    lm_eval: str
    limit: int | None
    data: str | None
