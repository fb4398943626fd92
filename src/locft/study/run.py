"""Does the trials of a study one after the other, keeping each as soon as it is done."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from locft.config import RunConfig, parse_preserve
from locft.data.gather import check_tokens, gather_edits, say_warnings
from locft.errors import InputError, TrainingError
from locft.evaluation.drift import NeutralText, first_passages, read_neutral_text
from locft.evaluation.protocols import locft
from locft.evaluation.subject import Subject, load_subject
from locft.methods import METHODS, AnyMethod, Editor
from locft.methods.memory.requests import refuse_without_subject
from locft.model.load import context_tokens
from locft.model.location import Location, resolve_location
from locft.model.split import split_model
from locft.provenance import describe_edits, describe_environment, describe_model, describe_protocol
from locft.recipe.ordinary import gather_ordinary_text
from locft.recipe.preservation import prepare_preservation
from locft.recipe.run_folder import REPORT_FILE, draw
from locft.report.page import Page
from locft.report.schema import Environment, to_bytes
from locft.report.words import seconds_text
from locft.study.records import STUDY_VERSION, Pipeline, StudyReport, Topic, Trial, TrialResult
from locft.study.specs import MethodSpec
from locft.study.store import Store, open_store
from locft.study.trial import Bench, CacheOf, attach, open_editor, run_trial, set_up
from locft.train.defaults import choose_schedule
from locft.train.loop import Schedule
from locft.types import Edit

# What trials differ by, or what has no part in them.
_NOT_SHARED = (
    "lr",
    "batch_size",
    "seed",
    "location",
    "preserve",
    "augment",
    "max_drift",
    "rephraser",
    "neutral_text",
    "prefer",
    "budget",
    "eval_batch_size",
)
_DRAWN_EVERY = 60  # seconds, while trials are done: drawing takes about one


@dataclass(frozen=True, kw_only=True)
class Ground:
    """A model and edits, ready for trials.

    Attributes:
        topic: What all trials have in common.
        subject: The model.
        edits: The edits.
        text: What drift is measured on.
        config: The settings.
    """

    topic: Topic
    subject: Subject
    edits: tuple[Edit, ...]
    text: NeutralText
    config: RunConfig


def prepare(
    study: str,
    model: str,
    edits: str | Path | Sequence[Edit],
    num_edits: int | None,
    num_passages: int,
    config: RunConfig,
    say: Callable[[str], None],
    *,
    num_scored: int | None = None,
) -> Ground:
    """Read the edits and load the model of a study.

    Args:
        study: Name of the study.
        model: The model.
        edits: The edits' file, or the edits.
        num_edits: How many of them to take, from the first on; all if None.
        num_passages: How many passages of neutral text to measure drift on.
        config: The settings.
        say: Called with a line at each step.
        num_scored: How many edits to score, from the first on; all if None.

    Returns:
        The ground of its trials.

    Raises:
        InputError: The edits or the model cannot be used.
    """
    text = first_passages(read_neutral_text(config.drift_text), num_passages)
    gathered = gather_edits(edits, config.on_conflict)
    found = len(gathered.edits)
    if num_edits is not None and found < num_edits:
        raise InputError(
            f"{found:,} edits, and {num_edits:,} are asked for: give more, or ask for fewer with "
            "--num-edits"
        )
    gathered = replace(gathered, edits=gathered.edits[:num_edits])
    taken = len(gathered.edits)
    say(f"loading {model}")
    subject = load_subject(model, config)
    warnings = check_tokens(gathered, subject.codec, context_tokens(subject.loaded.model.config))
    say_warnings(gathered, warnings, say)
    shared = {name: value for name, value in asdict(config).items() if name not in _NOT_SHARED}
    topic = Topic(
        version=STUDY_VERSION,
        study=study,
        model=describe_model(subject.loaded),
        edits=describe_edits(gathered, len(warnings)),
        settings=shared,
        protocol=describe_protocol(locft.PROTOCOL, config.format),
        drift_text_sha256=text.sha256,
        num_passages=len(text.passages),
        num_scored=min(num_scored or taken, taken),
    )
    return Ground(topic=topic, subject=subject, edits=gathered.edits, text=text, config=config)


def _choose_lr(
    ground: Ground, method: AnyMethod, location: Location | None, given: float | None, preserve: str
) -> float:
    """Choose a method's learning rate: the one that is given, its own, or the rule for a location."""
    if given is not None:
        return given
    if ground.config.lr != "auto":
        return ground.config.lr
    if method.lr != "auto":
        return method.lr
    if location is None:
        return choose_schedule(ground.config, 1, [(1, 1)]).lr
    gain = 1.0
    if parse_preserve(preserve).covariance is not None:
        text = gather_ordinary_text(ground.subject, location, ground.config.neutral_text)
        gain = prepare_preservation(ground.subject, location, preserve, text).gain
    return choose_schedule(ground.config, 1, location.shapes, gain).lr


def make_trial(
    ground: Ground,
    spec: MethodSpec,
    *,
    batch_size: int,
    seed: int,
    pipeline: Pipeline = "breadth-first",
    location_name: str | None = None,
    num_edits: int | None = None,
) -> Trial:
    """Make the trial of a method with its own settings; on all edits, and at the usual location."""
    location: Location | None = None
    preserve = "none"
    is_editor = isinstance(spec.method, Editor)
    if not isinstance(spec.method, Editor) and spec.method.uses_location:
        preserve = spec.given.get("preserve", "none")
        name = location_name or spec.given.get("location", ground.config.location)
        location = resolve_location(ground.subject.loaded.model, name)
    augment = spec.given.get("augment", "none")
    max_drift = spec.given.get("max_drift")
    takes_text = is_editor or preserve != "none" or augment != "none" or max_drift is not None
    return Trial(
        method=spec.method.name,
        settings=spec.settings,
        location=None if location is None else location.name,
        pipeline="sequential" if is_editor else pipeline,
        batch_size=1 if pipeline == "depth-first" else batch_size,
        lr=_choose_lr(ground, spec.method, location, spec.given.get("lr"), preserve),
        seed=seed,
        num_edits=num_edits or len(ground.edits),
        preserve=preserve,
        neutral_text=ground.config.neutral_text if takes_text else None,
        augment=augment,
        max_drift=max_drift,
        rephraser=ground.config.rephraser if augment != "none" else "model",
    )


def schedule_of(trial: Trial, config: RunConfig) -> Schedule:
    """Say how long and how fast a trial is trained."""
    own = replace(
        config,
        batch_size=trial.batch_size,
        lr=trial.lr,
        seed=trial.seed,
        max_drift=trial.max_drift,
    )
    return choose_schedule(own, trial.num_edits, [(1, 1)])  # shapes decide on the learning rate alone


def run_trials(
    ground: Ground,
    trials: Sequence[Trial],
    output: Path,
    describe: Callable[[StudyReport], Page],
    say: Callable[[str], None],
    *,
    cache_of: CacheOf | None = None,
    weight: Callable[[Trial], float] = lambda _: 1.0,
) -> tuple[StudyReport, Page]:
    """Do those trials that are not done yet, and write the report of all.

    Args:
        ground: A model and edits.
        trials: The trials, in the order in which they are done and shown.
        output: The study's folder.
        describe: Makes the page of a report.
        say: Called with a line at each step.
        cache_of: Gives the cached states of a trial's examples; they are made for each if None.
        weight: How long a trial takes, beside others; tells the time that is left.

    Returns:
        The report, and its page.

    Raises:
        InputError: The folder cannot be used.
    """
    bench: list[Bench] = []

    def run(trial: Trial) -> TrialResult:
        if not bench:
            try_methods(ground, trials)
            say("asking the unedited model")
            num_scored = ground.topic.num_scored
            bench.append(set_up(ground.subject, ground.edits, num_scored, ground.text, ground.config))
        return run_trial(bench[0], trial, schedule_of(trial, ground.config), cache_of)

    environment = describe_environment(ground.subject.loaded.model.device)
    return do_trials(
        ground.topic, trials, output, run, describe, say, environment=environment, weight=weight
    )


def do_trials(
    topic: Topic,
    trials: Sequence[Trial],
    output: Path,
    run: Callable[[Trial], TrialResult],
    describe: Callable[[StudyReport], Page],
    say: Callable[[str], None],
    *,
    environment: Environment,
    weight: Callable[[Trial], float] = lambda _: 1.0,
) -> tuple[StudyReport, Page]:
    """Do those trials that are not done yet, as `run_trials`, in whatever way `run` does one.

    Args:
        topic: What they have in common.
        trials: The trials, in the order in which they are done and shown.
        output: The folder.
        run: Does a trial.
        describe: Makes the page of a report.
        say: Called with a line at each step.
        environment: Where they are done.
        weight: How long a trial takes, beside others.

    Returns:
        The report, and its page.

    Raises:
        InputError: The folder cannot be used.
    """
    with open_store(output, topic) as store:
        missing = [trial for trial in trials if store.find(trial) is None]
        if len(missing) < len(trials):
            say(f"{len(trials) - len(missing):,} of {len(trials):,} trials are done already")
        drawn = time.monotonic()
        for result in _in_turn(missing, run, say, weight):
            store.add(replace(result, environment=environment))
            if time.monotonic() - drawn > _DRAWN_EVERY:
                _report(store, topic, trials, describe)
                drawn = time.monotonic()
        return _report(store, topic, trials, describe)


def _report(
    store: Store,
    topic: Topic,
    trials: Sequence[Trial],
    describe: Callable[[StudyReport], Page],
) -> tuple[StudyReport, Page]:
    """Write the report of those trials that are done."""
    found = [store.find(trial) for trial in trials]
    done = tuple(result for result in found if result is not None)
    report = StudyReport(topic=topic, trials=done)
    page = describe(report)
    store.write({**draw(page), REPORT_FILE: to_bytes(report)})
    return report, page


def try_methods(ground: Ground, trials: Sequence[Trial]) -> None:
    """Refuse methods that cannot edit this model, before anything is trained.

    Raises:
        ModelError: A method cannot edit it.
        EditsError: A method needs subjects, which edits lack.
        MissingExtraError: A method needs what is not installed.
    """
    for trial in {trial.method: trial for trial in trials}.values():
        method = METHODS[trial.method]
        if isinstance(method, Editor):
            if method.needs_subject:
                refuse_without_subject(ground.edits[: trial.num_edits])
            with open_editor(ground.subject, trial, method, ground.config):
                continue
        with attach(ground.subject, trial, schedule_of(trial, ground.config)) as tuning:
            split_model(ground.subject.loaded.model, tuning.layer)


def _in_turn(
    missing: Sequence[Trial],
    run: Callable[[Trial], TrialResult],
    say: Callable[[str], None],
    weight: Callable[[Trial], float],
) -> Iterator[TrialResult]:
    """Do trials one after the other, and say how long the others will take."""
    began = time.perf_counter()
    done = 0.0
    for number, trial in enumerate(missing):
        left = ""
        if done:
            rest = sum(weight(one) for one in missing[number:])
            left = f"; about {seconds_text((time.perf_counter() - began) / done * rest)} left"
        say(f"trial {number + 1:,} of {len(missing):,}: {trial.name}{left}")
        try:
            yield run(trial)
        except TrainingError as error:
            say(f"it failed: {error}")
            yield failed_trial(trial, str(error))
        done += weight(trial)


def failed_trial(trial: Trial, failure: str) -> TrialResult:
    """Record a trial whose training could not go on."""
    return TrialResult(
        trial=trial,
        failure=failure,
        before={},
        scores={},
        right={},
        course=(),
        num_parameters=0,
        num_steps=0,
        final_loss=None,
        cache_s=0.0,
        train_s=0.0,
        eval_s=0.0,
        seconds_per_edit=0.0,
        peak_memory_bytes=0,
    )
