"""Says what stands in the report of the study of locations."""

from collections.abc import Callable, Mapping, Sequence

from locft.recipe.preference import PREFERENCES, rule_of, value_of
from locft.report.page import Block, Page, Section, Table, Text
from locft.report.pictures import draw_heat_map
from locft.report.sections import drawn
from locft.report.words import SCORE_NAMES, counted, figure_text, seconds_text
from locft.study.records import StudyReport, TrialResult
from locft.study.sections import closing_sections, failure_texts, without_failures

_NUM_BEST = 5


def describe_locations(report: StudyReport) -> Page:
    """Describe the study of locations.

    Args:
        report: Its report; trials may be missing.

    Returns:
        The page.
    """
    topic = report.topic
    done = without_failures(report.trials)
    return Page(
        title=f"{counted(len(done), 'location')} in {topic.model.id}: "
        f"{counted(topic.edits.num_edits, 'edit')} at each",
        verdict=_verdict(done),
        tiles=(),
        sections=(
            Section(title="Maps", blocks=_maps(done)),
            Section(title="The best ones", blocks=_best(done)),
            Section(
                title="All locations",
                blocks=(
                    *((_table(done), _how(done)) if done else ()),
                    *failure_texts(report.trials),
                ),
            ),
            *closing_sections(report, "study locations"),
        ),
    )


def _verdict(done: Sequence[TrialResult]) -> str:
    if not done:
        return "No location was tried yet."
    best = {one: max(done, key=lambda result: value_of(result.scores, one)) for one in PREFERENCES}
    told = ", ".join(f"{_name(result)} by {preference}" for preference, result in best.items())
    return f"Best of {counted(len(done), 'location')}: {told}."


def _name(result: TrialResult) -> str:
    return result.trial.location or ""


def _place(result: TrialResult) -> tuple[str, str]:
    layer, _, module = _name(result).partition(".")
    return layer, module or "entire"


def _maps(done: Sequence[TrialResult]) -> tuple[Block, ...]:
    """Draw each score, and the time, over layers and modules."""
    kinds: dict[str, tuple[Callable[[TrialResult], float | None], str]] = {
        "Reliability (%)": (lambda one: _percent(one, "reliability"), ".0f"),
        "Generalization (%)": (lambda one: _percent(one, "generalization"), ".1f"),
        "Locality (%)": (lambda one: _percent(one, "locality"), ".1f"),
        "Drift (nats per token)": (lambda one: one.scores["drift"].value, ".3f"),
        "Training (seconds)": (lambda one: one.train_s, ".0f"),
    }
    blocks: list[Block] = []
    for title, (value, form) in kinds.items():
        found: Mapping[tuple[str, str], float | None] = {_place(one): value(one) for one in done}
        blocks += drawn(draw_heat_map(title, found, form))
    return tuple(blocks)


def _percent(result: TrialResult, name: str) -> float | None:
    value = result.scores[name].value
    return None if value is None else 100 * value


def _best(done: Sequence[TrialResult]) -> tuple[Block, ...]:
    """Rank the locations under each preference."""
    blocks: list[Block] = []
    for preference in PREFERENCES if done else ():
        ranked = sorted(done, key=lambda one: -value_of(one.scores, preference))[:_NUM_BEST]
        rows = tuple(
            (
                _name(one),
                f"{value_of(one.scores, preference):+.1f}",
                *(figure_text(name, one.scores[name]) for name in SCORE_NAMES),
            )
            for one in ranked
        )
        blocks += [
            Text(f"By {preference}: {rule_of(preference)}."),
            Table(columns=("location", "value", *SCORE_NAMES), rows=rows),
        ]
    return tuple(blocks)


def _table(done: Sequence[TrialResult]) -> Table:
    rows = tuple(
        (
            _name(one),
            *(figure_text(name, one.scores[name]) for name in SCORE_NAMES),
            f"{one.num_parameters:,}",
            f"{one.trial.lr:.2g}",
            f"{one.num_steps:,}",
            seconds_text(one.train_s),
        )
        for one in done
    )
    columns = ("location", *SCORE_NAMES, "parameters", "learning rate", "steps", "training")
    return Table(columns=columns, rows=rows)


def _how(done: Sequence[TrialResult]) -> Text:
    trial = done[0].trial
    return Text(
        f"Breadth-first, batches of {trial.batch_size:,}, seed {trial.seed}; 95% intervals over prompts "
        "and passages, after all edits were in. The learning rate follows the size of a location's "
        "weights. What the layers below hand on is computed from one layer to the next, and is not part "
        "of the time."
    )
