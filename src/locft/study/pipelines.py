"""Depth-first against breadth-first, everything else equal (the paper's Table 1, Figures 3 and 4)."""

from collections.abc import Callable, Sequence
from pathlib import Path

from locft.config import RunConfig
from locft.errors import ConfigError
from locft.methods import choose_methods
from locft.model.location import resolve_location
from locft.report.page import Page
from locft.study.pages import describe_pipelines
from locft.study.plans import PipelinesPlan
from locft.study.records import Pipeline, StudyReport, Trial
from locft.study.run import choose_lr, prepare, run_trials, settings_of
from locft.types import Edit


def study_pipelines(
    model: str,
    edits: str | Path | Sequence[Edit],
    output: str | Path,
    plan: PipelinesPlan | None = None,
    config: RunConfig | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[StudyReport, Page]:
    """Train edits depth-first and breadth-first by several methods, everything else equal.

    Trials are kept as they are done: with the same `output` a study that was cut short goes on, and one
    that is asked for more does what is missing.

    Args:
        model: The model.
        edits: The edits' file, or the edits.
        output: The study's folder.
        plan: What to compare; if None, the defaults.
        config: The settings that all trials share.
        say: Called with a line at each step.

    Returns:
        The report, and the page that shows it.

    Raises:
        ConfigError: A method or setting is unknown.
        InputError: The edits, the model or the folder cannot be used.
    """
    plan, config = plan or PipelinesPlan(), config or RunConfig()
    methods = choose_methods(plan.methods)
    unasked = [name for name in plan.method_settings if name not in plan.methods]
    if unasked:
        raise ConfigError(f"settings of method {unasked[0]!r}, which is not among the methods")
    given = {one.name: dict(plan.method_settings.get(one.name, {})) for one in methods}
    rates = {name: settings.pop("lr", None) for name, settings in given.items()}
    own = {one.name: settings_of(one, given[one.name]) for one in methods}
    ground = prepare("pipelines", model, edits, plan.num_edits, plan.num_passages, config, say)
    ways: tuple[tuple[Pipeline, int], ...] = (
        ("depth-first", 1),
        *(("breadth-first", size) for size in plan.batches),
    )
    location = resolve_location(ground.subject.loaded.model, config.location).name
    trials = [
        Trial(
            method=method.name,
            settings=own[method.name],
            location=location if method.uses_location else None,
            pipeline=pipeline,
            batch_size=batch_size,
            lr=choose_lr(ground, method, config.location, rates[method.name]),
            seed=seed,
            num_edits=plan.num_edits,
        )
        for seed in plan.seeds
        for method in methods
        for pipeline, batch_size in ways
    ]
    return run_trials(ground, trials, Path(output), describe_pipelines, say)
