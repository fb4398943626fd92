"""Depth-first against breadth-first, everything else equal (the paper's Table 1, Figures 3 and 4)."""

from collections.abc import Callable, Sequence
from pathlib import Path

from locft.config import RunConfig
from locft.errors import ConfigError
from locft.methods import METHODS, Editor
from locft.report.page import Page
from locft.study.pipelines_page import describe_pipelines
from locft.study.plans import PipelinesPlan
from locft.study.records import Pipeline, StudyReport
from locft.study.run import make_trial, prepare, run_trials
from locft.study.specs import parse_specs
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
    # Depth-first goes from example to example, one each: neither of the last two is for it.
    varied = ("pipeline", "batch_size", "augment", "max_drift")
    specs = parse_specs(plan.methods, varied=varied)
    editors = [spec.text for spec in specs if isinstance(spec.method, Editor)]
    if editors:
        trained = ", ".join(name for name, one in METHODS.items() if not isinstance(one, Editor))
        raise ConfigError(
            f"method {editors[0]!r} inserts batches of edits, neither depth-first nor breadth-first: "
            f"expected some of {trained}; `locft compare` takes all"
        )
    ground = prepare("pipelines", model, edits, plan.num_edits, plan.num_passages, config, say)
    ways: tuple[tuple[Pipeline, int], ...] = (
        ("depth-first", 1),
        *(("breadth-first", size) for size in plan.batches),
    )
    trials = [
        make_trial(ground, spec, pipeline=pipeline, batch_size=batch_size, seed=seed)
        for seed in plan.seeds
        for spec in specs
        for pipeline, batch_size in ways
    ]
    return run_trials(ground, trials, Path(output), describe_pipelines, say)
