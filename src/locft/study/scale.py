"""More and more edits, everything else equal (the paper's Figure 6)."""

from collections.abc import Callable, Sequence
from pathlib import Path

from locft.config import RunConfig
from locft.report.page import Page
from locft.study.plans import ScalePlan
from locft.study.records import StudyReport, Trial
from locft.study.run import make_trial, prepare, run_trials
from locft.study.scale_page import describe_scale
from locft.study.specs import parse_specs
from locft.types import Edit


def study_scale(
    model: str,
    edits: str | Path | Sequence[Edit],
    output: str | Path,
    plan: ScalePlan | None = None,
    config: RunConfig | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[StudyReport, Page]:
    """Train more and more edits into one location, breadth-first.

    The first edits are scored, the same at every size. Trials are kept as they are done: with the same
    `output` a study that was cut short goes on, and one of more sizes does what is missing.

    Args:
        model: The model.
        edits: The edits' file, or the edits. Where it holds fewer than the largest size, all are taken.
        output: The study's folder.
        plan: How many edits to compare; if None, the defaults.
        config: The settings that all trials share.
        say: Called with a line at each step.

    Returns:
        The report, and the page that shows it.

    Raises:
        InputError: The edits, the model or the folder cannot be used.
    """
    plan, config = plan or ScalePlan(), config or RunConfig()
    ground = prepare(
        "scale", model, edits, None, plan.num_passages, config, say, num_scored=plan.num_scored
    )
    most = len(ground.edits)
    sizes = sorted({min(size, most) for size in plan.sizes})
    if max(plan.sizes) > most:
        say(f"there are {most:,} edits: the largest size is that")
    [spec] = parse_specs(("ft-m",))
    trials = [
        make_trial(ground, spec, batch_size=config.batch_size, seed=config.seed, num_edits=size)
        for size in sizes
    ]

    def weight(trial: Trial) -> float:
        return trial.num_edits + plan.num_scored

    return run_trials(ground, trials, Path(output), describe_scale, say, weight=weight)
