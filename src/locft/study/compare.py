"""Several methods or settings on the same edits, each in a process of its own (the paper's Table 3)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from locft.bench.process import run_alone
from locft.config import RunConfig
from locft.data.gather import gather_edits
from locft.errors import TrainingError
from locft.evaluation.capability import (
    TaskResult,
    compare_capability,
    measure_capability,
    plan_tasks,
)
from locft.evaluation.scoring import Item, Result
from locft.methods import AnyMethod, Editor
from locft.model.weights import swapped_in
from locft.provenance import describe_edits, describe_environment
from locft.report.page import Page
from locft.report.schema import Environment
from locft.study.compare_page import describe_compare
from locft.study.plans import ComparePlan
from locft.study.records import StudyReport, Topic, Trial, TrialResult
from locft.study.run import (
    Ground,
    do_trials,
    failed_trial,
    make_trial,
    prepare,
    schedule_of,
    try_methods,
)
from locft.study.specs import parse_specs
from locft.study.trial import Bench, run_trial, set_up
from locft.types import CapabilityScores, Edit

_CAPABILITY_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What every process is told."""

    model: str
    edits: tuple[Edit, ...]
    plan: ComparePlan
    config: RunConfig


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """What is the same for all trials, from a process that loaded the model."""

    topic: Topic
    trials: tuple[Trial, ...]
    environment: Environment


@dataclass(frozen=True, kw_only=True)
class _Unedited:
    """What the unedited model makes of everything."""

    items: Sequence[Item]
    before: Sequence[Result]
    capability: Mapping[str, TaskResult] | None


def compare(
    model: str,
    edits: str | Path | Sequence[Edit],
    output: str | Path,
    plan: ComparePlan | None = None,
    config: RunConfig | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[StudyReport, Page]:
    """Compare several methods, or one with several settings, on the same edits.

    Each has a process of its own, so that its memory is its own, too. Trials are kept as they are done:
    with the same `output` a comparison that was cut short goes on, and one of more methods does what is
    missing.

    Args:
        model: The model.
        edits: The edits' file, or the edits.
        output: The comparison's folder.
        plan: What to compare; if None, the defaults.
        config: The settings that all share, where a method has none of its own.
        say: Called with a line at each step.

    Returns:
        The report, and the page that shows it.

    Raises:
        ConfigError: A method or setting is unknown.
        InputError: The edits, the model or the folder cannot be used, or a method cannot edit the model.
    """
    plan, config = plan or ComparePlan(), config or RunConfig()
    parse_specs(plan.methods)
    if plan.capability:
        plan_tasks(plan.capability, plan.capability_data, plan.capability_limit)
    gathered = gather_edits(edits, config.on_conflict)
    num_edits = min(plan.num_edits or len(gathered.edits), len(gathered.edits))
    asked = _Asked(
        model=model,
        edits=gathered.edits[:num_edits],
        plan=replace(plan, num_edits=num_edits),
        config=config,
    )
    say(f"loading {model}")
    prepared: _Prepared = run_alone(_prepare, asked)
    taken = replace(gathered, edits=asked.edits)
    described = describe_edits(taken, prepared.topic.edits.num_warnings)
    unedited: list[_Unedited] = []

    def run(trial: Trial) -> TrialResult:
        if not unedited:
            say("asking the unedited model")
            unedited.append(run_alone(_ask_unedited, asked))
        result: TrialResult = run_alone(_run, asked, unedited[0], trial)
        return result

    return do_trials(
        replace(prepared.topic, edits=described),
        prepared.trials,
        Path(output),
        run,
        describe_compare,
        say,
        environment=prepared.environment,
    )


def _ground(asked: _Asked) -> Ground:
    plan = asked.plan
    return prepare(
        "compare",
        asked.model,
        asked.edits,
        plan.num_edits or len(asked.edits),
        plan.num_passages,
        asked.config,
        lambda _: None,
    )


def _prepare(asked: _Asked) -> _Prepared:
    ground = _ground(asked)
    specs = parse_specs(asked.plan.methods)
    trials = tuple(
        make_trial(
            ground,
            spec,
            pipeline=spec.given.get("pipeline", "breadth-first"),
            batch_size=spec.given.get("batch_size", _batch_size(spec.method, ground.config)),
            seed=seed,
        )
        for seed in asked.plan.seeds
        for spec in specs
    )
    try_methods(ground, trials)
    settings = {
        **ground.topic.settings,
        "capability": ",".join(asked.plan.capability),
        "capability_limit": asked.plan.capability_limit,
    }
    return _Prepared(
        topic=replace(ground.topic, settings=settings),
        trials=trials,
        environment=describe_environment(ground.subject.loaded.model.device),
    )


def _batch_size(method: AnyMethod, config: RunConfig) -> int:
    return method.batch_size if isinstance(method, Editor) else config.batch_size


def _ask_unedited(asked: _Asked) -> _Unedited:
    ground = _ground(asked)
    bench = set_up(ground.subject, ground.edits, ground.topic.num_scored, ground.text, ground.config)
    return _Unedited(
        items=bench.items, before=bench.before, capability=_capability(ground, asked.plan, "unedited")
    )


def _run(asked: _Asked, unedited: _Unedited, trial: Trial) -> TrialResult:
    ground = _ground(asked)
    bench = Bench(
        subject=ground.subject,
        edits=ground.edits,
        text=ground.text,
        config=ground.config,
        num_scored=ground.topic.num_scored,
        items=unedited.items,
        before=unedited.before,
    )
    found: list[CapabilityScores] = []

    def measure(values: Mapping[str, Any]) -> None:
        with swapped_in(ground.subject.loaded.model, values):
            after = _capability(ground, asked.plan, trial.method)
        if after is not None:
            plan = asked.plan
            tasks = plan_tasks(plan.capability, plan.capability_data, plan.capability_limit)
            found.append(compare_capability(unedited.capability, after, tasks))

    try:
        result = run_trial(bench, trial, schedule_of(trial, ground.config), on_trained=measure)
    except TrainingError as error:
        return failed_trial(trial, str(error))
    return replace(result, capability=found[0]) if found else result


def _capability(ground: Ground, plan: ComparePlan, label: str) -> dict[str, TaskResult] | None:
    if not plan.capability:
        return None
    tasks = plan_tasks(plan.capability, plan.capability_data, plan.capability_limit)
    loaded = ground.subject.loaded
    return measure_capability(
        loaded.model, loaded.tokenizer, tasks, batch_size=_CAPABILITY_BATCH, label=label
    )
