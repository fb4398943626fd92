"""Capability: what a model is good at that its edits have nothing to do with, asked by lm-eval.

lm-evaluation-harness (lm-eval) has the tasks, puts them to the model and scores its answers. It asks the
model that is in memory. Of each task locft takes the scores of single items, so that two models can be
compared on the same items. Tasks come by name from the Hugging Face hub, or from local files.
"""

import codecs
import copy
import difflib
import hashlib
import json
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from locft.errors import ConfigError, EvaluationError, InputError, MissingExtraError, brief, first_line
from locft.evaluation.metrics import (
    Floats,
    mean,
    middle_of,
    paired_difference,
    resampled_means,
    share,
    unanimous_interval,
)
from locft.openfile import read_limited
from locft.progress import Step, progress
from locft.strictjson import parse_json
from locft.types import CapabilityScores, Figure, TaskScores

PAPER = "paper"
PAPER_TASKS = ("mmlu", "nq_open", "sst2", "wmt16-de-en", "gsm8k")

Verdict = Literal["exceeded", "cannot be excluded", "excluded"]

_MAX_FILE_BYTES = 1 << 30
_MAX_NAMED_FILES = 10
_SEED = 1234  # lm-eval's own; which examples stand before an item depends on it

# Scores of single items, the first of which a task has counts. chrF of a corpus is no mean over its
# items; what is averaged here is chrF of each item alone. BLEU is hardly defined for one sentence.
_CHRF = "chrf"
_PREFERRED = ("acc", "exact_match", _CHRF)

# What tells how a task was asked. A group of tasks has those that are the same for all of them.
_RECORDED = (
    "dataset_path",
    "dataset_name",
    "output_type",
    "num_fewshot",
    "description",
    "doc_to_text",
    "doc_to_choice",
    "doc_to_target",
    "target_delimiter",
    "fewshot_delimiter",
    "generation_kwargs",
)


@dataclass(frozen=True, kw_only=True)
class LocalTask:
    """How the records of a local file are put to a model, in the words of lm-eval.

    Attributes:
        output_type: ``multiple_choice`` for records of `query`, `choices` and `gold` (the index of the
            right one); ``loglikelihood`` for records of `context` and `continuation`.
        doc_to_text: Template of the prompt, or the field that is the prompt.
        doc_to_target: Template of the answer, or the field that is the index of the right choice.
        doc_to_choice: The field with the choices; each is put behind the prompt with a space between.
    """

    output_type: Literal["multiple_choice", "loglikelihood"]
    doc_to_text: str
    doc_to_target: str
    doc_to_choice: str | None


def _choices(doc_to_text: str) -> LocalTask:
    return LocalTask(
        output_type="multiple_choice",
        doc_to_text=doc_to_text,
        doc_to_target="gold",
        doc_to_choice="choices",
    )


# Prompts and answers are those of lm-eval's tasks of these names, given how the files hold them: the
# queries of PIQA and ARC begin with "Question: ", and those of PIQA end with a line feed. Only COPA
# differs, where lm-eval puts two spaces before a choice.
LOCAL_TASKS: Mapping[str, LocalTask] = {
    "lambada_openai": LocalTask(
        output_type="loglikelihood",
        doc_to_text="context",
        doc_to_target="{{' ' + continuation}}",
        doc_to_choice=None,
    ),
    "piqa": _choices("{{query}}Answer:"),
    "arc_easy": _choices("{{query}}\nAnswer:"),
    "copa": _choices("query"),
    "openbook_qa": _choices("query"),
}


@dataclass(frozen=True, kw_only=True)
class PlannedTask:
    """A task that is loaded and can be asked.

    Attributes:
        name: Its name.
        score: The score of an item, as lm-eval names it.
        filter: Which of lm-eval's ways of reading an answer the score is taken from.
        parts: The tasks of lm-eval that it consists of: one, or all of a group.
    """

    name: str
    score: str
    filter: str
    parts: tuple[Any, ...] = field(repr=False)

    @property
    def metric(self) -> str:
        """The score and, where there is a choice of them, the filter, as lm-eval prints them."""
        return self.score if self.filter == "none" else f"{self.score},{self.filter}"


@dataclass(frozen=True, kw_only=True)
class CapabilityTasks:
    """The tasks of a measurement, with their items in memory.

    Attributes:
        tasks: The tasks, in the order in which they were named.
        data: The folder of the local files; None if they come from the hub.
        limit: How many items of each task are asked at most, the first ones; None for all. A group is
            limited in each of its tasks.
    """

    tasks: tuple[PlannedTask, ...]
    data: str | None
    limit: int | None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What one model scored on the items of one task.

    Attributes:
        name: The task.
        metric: The score of an item.
        version: lm-eval's version of the task; of a local file, locft's version of its template.
        num: How many items were asked.
        values: The score of each item, from 0 to 1, in the order of the task.
        document_sha256: Hash of the items, their prompts and their answers.
        settings: How the task was asked: number of examples, templates, what was generated.
    """

    name: str
    metric: str
    version: str
    num: int
    values: tuple[float, ...]
    document_sha256: str
    settings: dict[str, Any]


def require_lm_eval() -> None:
    """Check that lm-eval is there, and what it needs to ask a model of transformers.

    Raises:
        MissingExtraError: They are not.
    """
    if find_spec("lm_eval") is None or find_spec("accelerate") is None:
        raise MissingExtraError("measuring capability", "capability")


def plan_tasks(
    names: Sequence[str], data: Path | None = None, limit: int | None = None
) -> CapabilityTasks:
    """Check which tasks are asked for and load their items, before a model is loaded.

    Args:
        names: The tasks. With `data`, names of `LOCAL_TASKS`; else those of lm-eval's tasks, groups and
            tags, or ``paper`` for `PAPER_TASKS`.
        data: A folder with ``NAME.jsonl`` for each task; nothing is fetched then. None fetches the tasks
            from the Hugging Face hub, which keeps them in its cache.
        limit: Ask at most so many items of each task.

    Returns:
        The tasks.

    Raises:
        MissingExtraError: lm-eval is not installed.
        ConfigError: There is no such task, one is named twice, or the limit is under 1.
        InputError: The items cannot be read, or the hub cannot be reached.
    """
    require_lm_eval()
    if limit is not None and limit < 1:
        raise ConfigError(f"capability limit is {limit}, expected 1 or more items of each task")
    if data is None:
        names = [part for name in names for part in (PAPER_TASKS if name == PAPER else (name,))]
    if not names:
        raise ConfigError(f"no capability task is named; known: {', '.join((PAPER, *LOCAL_TASKS))}")
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise ConfigError(f"capability task {brief(twice[0])} is named twice; name it once")
    with _undisturbed(torch.device("cpu")):
        tasks = _from_hub(names) if data is None else _from_files(names, data)
    return CapabilityTasks(tasks=tasks, data=None if data is None else str(data), limit=limit)


def measure_capability(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: CapabilityTasks,
    *,
    batch_size: int,
    label: str,
) -> dict[str, TaskResult]:
    """Put tasks to a model as lm-eval does.

    The model stays as and where it is, and so do the tokenizer, the state of random numbers and the
    environment of the process. Log-likelihoods are taken in float32 whatever the model computes in.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        tasks: What to ask.
        batch_size: How many sequences run through the model at a time.
        label: Stands beside the progress bar.

    Returns:
        The results by task.

    Raises:
        EvaluationError: The model's predictions are not finite, or its context is too short for a task.
    """
    with _undisturbed(model.device), _without_bars():
        from lm_eval.models.huggingface import HFLM

        asked = HFLM(
            pretrained=_Untouched(model),
            backend="causal",
            # lm-eval gives it a padding token where it has none.
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        return {
            task.name: _ask(_Asked(asked, f"{label}: {task.name}"), task, tasks.limit)
            for task in tasks.tasks
        }


def compare_capability(
    before: Mapping[str, TaskResult] | None, after: Mapping[str, TaskResult], tasks: CapabilityTasks
) -> CapabilityScores:
    """Compare what two models scored on the same items.

    Scores that are 0 or 1 have a Wilson interval, and their changes Newcombe's; others, and the means
    over tasks, have a bootstrap interval (2,000 resamples, percentiles, fixed seed). Items are resampled
    within their task.

    Args:
        before: The unedited model's results; None if it was not asked.
        after: The edited model's.
        tasks: What was asked.

    Returns:
        The scores by task, and the mean over tasks, each of which weighs the same.

    Raises:
        InputError: The two models were not asked the same items in the same way.
    """
    if before is not None and list(before) != list(after):
        named = f"{', '.join(before)} before, {', '.join(after)} after"
        raise InputError(f"capability was measured on different tasks: {named}; measure both anew")
    changes: list[list[float]] = []
    scores: dict[str, TaskScores] = {}
    for name, late in after.items():
        early = None if before is None else before[name]
        if early is not None:
            if (early.document_sha256, early.metric) != (late.document_sha256, late.metric):
                raise InputError(
                    f"capability task {name} was measured on other items, or by another metric, before "
                    "than after; measure both anew"
                )
            changes.append([b - a for a, b in zip(early.values, late.values, strict=True)])
        scores[name] = TaskScores(
            metric=late.metric,
            num_items=late.num,
            before=None if early is None else _score(early.values),
            after=_score(late.values),
            change=None if early is None else paired_difference(early.values, late.values),
            version=late.version,
            document_sha256=late.document_sha256,
            settings=late.settings,
        )
    return CapabilityScores(
        tasks=scores,
        before=None if before is None else _mean_over_tasks([r.values for r in before.values()]),
        after=_mean_over_tasks([result.values for result in after.values()]),
        change=None if before is None else _mean_over_tasks(changes, least=-1.0),
        lm_eval=metadata.version("lm_eval"),
        limit=tasks.limit,
        data=tasks.data,
    )


def drop_verdict(change: Figure, max_drop_points: float) -> Verdict:
    """Judge whether capability dropped by more than it may, as far as the interval tells.

    Args:
        change: The change of a score from 0 to 1, with its interval.
        max_drop_points: How much it may drop, in percentage points.

    Returns:
        ``exceeded`` if the whole interval lies beyond the bound, ``cannot be excluded`` if a part of it
        does, else ``excluded``.
    """
    if change.low is None or change.high is None:
        return "cannot be excluded"
    # Rounded: 7 points of drop are no more than 7 allowed ones.
    least, most = (round(-100 * end, 9) for end in (change.high, change.low))
    if least > max_drop_points:
        return "exceeded"
    return "cannot be excluded" if most > max_drop_points else "excluded"


class _Untouched:
    """What lm-eval sees of a model: it can be asked, but not be moved, tied or set to another mode.

    Of a whole model lm-eval would tie the weights that the configuration calls tied, and change a model
    whose checkpoint has them apart.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.device, self.config = model.device, model.config

    def __call__(self, ids: Tensor) -> Any:
        return self._model(input_ids=ids, use_cache=False)

    def generate(self, **settings: Any) -> Any:
        """Generate as the model does."""
        generate: Any = self._model.generate
        return generate(**settings)


class _Asked:
    """A model as lm-eval asks it, with locft's progress bar in the place of lm-eval's."""

    rank, world_size = 0, 1

    def __init__(self, lm: Any, label: str) -> None:
        self._lm, self._label = lm, label

    def loglikelihood(self, requests: list[Any]) -> Any:
        """Give the log-likelihood of answers."""
        return self._with_bar(self._lm.loglikelihood, requests)

    def generate_until(self, requests: list[Any]) -> Any:
        """Generate answers."""
        return self._with_bar(self._lm.generate_until, requests)

    def _with_bar(self, ask: Callable[..., Any], requests: list[Any]) -> Any:
        with progress(self._label, len(requests), "requests") as step:
            self._lm.set_cache_hook(_Counter(step))
            return ask(requests, disable_tqdm=True)


class _Counter:
    """Told of each answer, as what keeps answers for lm-eval is."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def add_partial(self, *_: Any) -> None:
        """Count an answer."""
        self._step()


def _from_hub(names: Sequence[str]) -> tuple[PlannedTask, ...]:
    """Load tasks of lm-eval's; all names are looked at before anything is fetched."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            raise _unknown(name, manager.all_tasks, f"; of {len(manager.all_tasks):,} tasks of lm-eval")
    return tuple(_plan(name, _fetch(manager, name)) for name in names)


def _fetch(manager: Any, name: str) -> tuple[Any, ...]:
    try:
        return tuple(manager.load([name])["tasks"].values())
    # The hub, the library that reads its data sets, and the tasks' own code have no error in common.
    except Exception as error:
        raise InputError(
            f"capability task {name} cannot be loaded from the Hugging Face hub "
            f"({type(error).__name__}: {first_line(error)}); set up network access, or give tasks as "
            f"local files: --capability-data DIR, with NAME.jsonl for NAME in {', '.join(LOCAL_TASKS)}"
        ) from error


def _from_files(names: Sequence[str], data: Path) -> tuple[PlannedTask, ...]:
    for name in names:
        if name not in LOCAL_TASKS:
            raise _unknown(name, list(LOCAL_TASKS), f"; from files: {', '.join(LOCAL_TASKS)}")
    if not data.is_dir():
        raise InputError(f"capability data {data}: there is no such folder; expected NAME.jsonl in it")
    return tuple(_plan(name, (_local_task(name, _read(data, name)),)) for name in names)


def _unknown(name: str, known: Sequence[str], rest: str) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    return ConfigError(f"unknown capability task {brief(name)}: did you mean {near!r}?{rest}")


def _plan(name: str, parts: tuple[Any, ...]) -> PlannedTask:
    """Choose the score by which a task is compared, before it is asked."""
    from lm_eval.api import metrics

    if any(getattr(part, kind, False) for part in parts for kind in ("UNSAFE_CODE", "MULTIMODAL")):
        raise ConfigError(f"capability task {name} runs code or shows pictures, which locft does not do")
    better = parts[0].higher_is_better()
    scores = [
        score
        for score, aggregate in parts[0].aggregation().items()
        if (aggregate is metrics.mean or score == _CHRF) and better.get(score, True)
        if all(score in part.aggregation() for part in parts)
    ]
    chosen = next((score for score in (*_PREFERRED, *scores) if score in scores), None)
    if chosen is None:
        raise ConfigError(
            f"capability task {name} has no score of single items on which two models can be compared; "
            "name tasks that have acc or exact_match"
        )
    filters = parts[0].get_config("filter_list")
    return PlannedTask(
        name=name, score=chosen, filter=filters[0]["name"] if filters else "none", parts=parts
    )


def _local_task(name: str, records: list[dict[str, Any]]) -> Any:
    """Make a task of lm-eval from records in memory; no library's cache comes to hold them."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    def items(**_: Any) -> dict[str, Any]:
        return {"test": Dataset.from_list(records)}

    task = LOCAL_TASKS[name]
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": items,
            "test_split": "test",
            "output_type": task.output_type,
            "doc_to_text": task.doc_to_text,
            "doc_to_target": task.doc_to_target,
            "doc_to_choice": task.doc_to_choice,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "num_fewshot": 0,
            "metadata": {"version": 1},
        }
    )


def _read(data: Path, name: str) -> list[dict[str, Any]]:
    """Read the records of a local file, and of them the fields that are asked."""
    path = data / f"{name}.jsonl"
    if not path.exists():
        there = sorted(file.name for file in data.glob("*.jsonl"))
        more = ", ..." if len(there) > _MAX_NAMED_FILES else ""
        held = ", ".join(there[:_MAX_NAMED_FILES]) + more if there else "no .jsonl file"
        raise InputError(f"capability data {data}: there is no {path.name} in it; it holds {held}")
    try:
        raw = read_limited(path, _MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"capability data {path} cannot be read: {reason}") from error
    read = _read_choices if LOCAL_TASKS[name].output_type == "multiple_choice" else _read_continuation
    records = [
        read(_parse(line, where), where)
        for number, line in enumerate(raw.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1)
        if line.strip()
        for where in [f"capability data {path}: line {number}"]
    ]
    if not records:
        raise InputError(f"capability data {path} holds no record")
    return records


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        return parse_json(line)
    except ValueError as error:
        raise InputError(f"{where}: no record: {first_line(error)}; expected a JSON object") from error


def _read_choices(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    choices = record.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise _wrong(record, "choices", where, "a list of two texts or more")
    for index, choice in enumerate(choices):
        _check_text(choice, f"{where}: `choices[{index}]`")
    gold = record.get("gold")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise _wrong(record, "gold", where, f"the index of the right choice, 0 to {len(choices) - 1}")
    query = _read_text(record, "query", where)
    if query.rstrip().endswith("Answer:"):
        raise _wrong(record, "query", where, "a text without 'Answer:', which is added where it belongs")
    return {"query": query, "choices": choices, "gold": gold}


def _read_continuation(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = {name: _read_text(record, name, where) for name in ("context", "continuation")}
    if found["continuation"].startswith(" "):
        raise _wrong(record, "continuation", where, "a text without the space before it, which is added")
    return found


def _read_text(record: Mapping[str, Any], name: str, where: str) -> str:
    if name not in record:
        raise _wrong(record, name, where, "a text")
    return _check_text(record[name], f"{where}: `{name}`")


def _check_text(value: object, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{place} is {brief(value)}, expected a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place} holds half of a character") from error
    return value


def _wrong(record: Mapping[str, Any], name: str, where: str, expected: str) -> InputError:
    got = f"is {brief(record[name])}" if name in record else "is missing"
    return InputError(f"{where}: `{name}` {got}, expected {expected}")


def _ask(asked: _Asked, task: PlannedTask, limit: int | None) -> TaskResult:
    from lm_eval import evaluate

    for part in task.parts:
        part.set_fewshot_seed(_SEED)
    try:
        found = evaluate(
            lm=asked,
            task_dict={"tasks": {part.task_name: part for part in task.parts}},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    except AssertionError as error:  # so lm-eval says that a context is too short
        raise EvaluationError(
            f"capability task {task.name} cannot be put to this model: its context is too short for "
            f"what is asked or generated (lm-eval: {first_line(error)}); leave the task out"
        ) from error
    digest = hashlib.sha256()
    values: list[float] = []
    for part in task.parts:
        for sample in found["samples"][part.task_name]:
            if sample["filter"] != task.filter:
                continue
            _require_finite(sample, task.name)
            hashes = [sample[name] for name in ("doc_hash", "prompt_hash", "target_hash")]
            digest.update((json.dumps(hashes) + "\n").encode())
            score = sample[task.score]
            values.append(part.aggregation()[_CHRF]([score]) / 100 if task.score == _CHRF else score)
    configs = [found["configs"][part.task_name] for part in task.parts]
    return TaskResult(
        name=task.name,
        metric=task.metric,
        version=", ".join(sorted({str(found["versions"][part.task_name]) for part in task.parts})),
        num=len(values),
        values=tuple(map(float, values)),
        document_sha256=digest.hexdigest(),
        settings={
            name: configs[0][name]
            for name in _RECORDED
            if name in configs[0] and all(config.get(name) == configs[0][name] for config in configs)
        },
    )


def _require_finite(sample: Mapping[str, Any], name: str) -> None:
    """Refuse to count choices that a broken model made: of what is no number, the first is largest."""
    for response in sample["filtered_resps"]:
        if isinstance(response, tuple) and not math.isfinite(response[0]):
            raise EvaluationError(
                f"capability cannot be measured: the model's predictions on {name} are not finite"
            )


def _score(values: Sequence[float]) -> Figure:
    if set(values) <= {0.0, 1.0}:
        return share(round(sum(values)), len(values))
    return mean(values)


def _mean_over_tasks(tasks: Sequence[Sequence[float]], *, least: float = 0.0) -> Figure:
    """Give the mean of the tasks' means, with the interval of the tasks' items being resampled.

    A task whose items all have the same value adds what `unanimous_interval` says of it.
    """
    random_numbers = np.random.default_rng(0)
    means: list[Floats] = []
    below = above = 0.0
    for values in tasks:
        if min(values) == max(values):
            ends = unanimous_interval(values[0], len(values), least, 1.0)
            below += (values[0] - ends[0]) / len(tasks)
            above += (ends[1] - values[0]) / len(tasks)
        means.append(resampled_means(values, random_numbers))
    low, high = middle_of(np.mean(means, axis=0))
    value = sum(sum(values) / len(values) for values in tasks) / len(tasks)
    return Figure(value=value, num=sum(map(len, tasks)), low=low - below, high=high + above)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Give back what lm-eval and its tasks change for the whole process.

    lm-eval sets variables of the environment when it is imported. Some of its tasks draw from the common
    random states, which start here as lm-eval starts them.
    """
    environment, logger = dict(os.environ), logging.getLogger("lm_eval")
    level, state = logger.level, random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            logger.setLevel(logging.ERROR)
            random.seed(0)
            np.random.seed(_SEED)  # noqa: NPY002
            torch.default_generator.manual_seed(_SEED)
            if devices:
                torch.cuda.manual_seed(_SEED)
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(state)
            logger.setLevel(level)
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep a bar from the terminal that lm-eval shows while it puts prompts together."""
    from lm_eval.api import task

    shown = task.tqdm
    task.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        task.tqdm = shown
