"""Every location in turn: layers by modules, everything else equal (the paper's Figure 5)."""

from collections.abc import Callable, Sequence
from pathlib import Path

from locft.config import RunConfig
from locft.report.page import Page
from locft.study.locations_page import describe_locations
from locft.study.plans import LocationsPlan
from locft.study.records import StudyReport, Trial
from locft.study.run import make_trial, prepare, run_trials
from locft.study.specs import parse_specs
from locft.train.cache import LayerCaches
from locft.types import Edit

_EVERY = 3  # layers
_SCORING = 0.5  # beside training all layers


def study_locations(
    model: str,
    edits: str | Path | Sequence[Edit],
    output: str | Path,
    plan: LocationsPlan | None = None,
    config: RunConfig | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[StudyReport, Page]:
    """Train edits breadth-first at each of many locations.

    Trials are kept as they are done: with the same `output` a study that was cut short goes on. The
    states that enter a layer are computed from those of the layer before.

    Args:
        model: The model.
        edits: The edits' file, or the edits.
        output: The study's folder.
        plan: Which locations to compare; if None, the defaults.
        config: The settings that all trials share; a learning rate of ``auto`` follows the size of each
            location's weights.
        say: Called with a line at each step.

    Returns:
        The report, and the page that shows it.

    Raises:
        LocationError: The model has no such layer or module.
        InputError: The edits, the model or the folder cannot be used.
    """
    plan, config = plan or LocationsPlan(), config or RunConfig()
    ground = prepare("locations", model, edits, plan.num_edits, plan.num_passages, config, say)
    num_layers = ground.topic.model.num_layers
    layers = sorted(set(plan.layers)) or [*range(0, num_layers - 1, _EVERY), num_layers - 1]
    names = [
        str(layer) if module == "entire" else f"{layer}.{module}"
        for layer in layers
        for module in plan.modules
    ]
    [spec] = parse_specs(("ft-m",))
    trials = [
        make_trial(ground, spec, batch_size=plan.batch_size, seed=plan.seed, location_name=name)
        for name in names
    ]

    def weight(trial: Trial) -> float:
        layer = int((trial.location or "0").partition(".")[0])
        return (num_layers - layer) / num_layers + _SCORING

    return run_trials(
        ground,
        trials,
        Path(output),
        describe_locations,
        say,
        cache_of=LayerCaches(),
        weight=weight,
    )
