"""Says what stands in the report of the study of scale."""

from collections.abc import Sequence

from locft.report.page import Block, Page, Section, Table, Text
from locft.report.pictures import draw_groups
from locft.report.sections import drawn
from locft.report.words import SCORE_NAMES, bytes_text, counted, figure_text, seconds_text
from locft.study.records import StudyReport, TrialResult
from locft.study.sections import closing_sections, failure_texts, without_failures


def describe_scale(report: StudyReport) -> Page:
    """Describe the study of scale.

    Args:
        report: Its report; trials may be missing.

    Returns:
        The page.
    """
    topic = report.topic
    done = sorted(without_failures(report.trials), key=lambda one: one.trial.num_edits)
    return Page(
        title=f"More and more edits in {topic.model.id}",
        verdict=_verdict(done),
        tiles=(),
        sections=(
            Section(
                title="Scores",
                blocks=(
                    *_pictures(done),
                    *((_table(done), _how(report, done)) if done else ()),
                    *failure_texts(report.trials),
                ),
            ),
            Section(title="Cost", blocks=(_costs(done),) if done else ()),
            *closing_sections(report, "study scale"),
        ),
    )


def _verdict(done: Sequence[TrialResult]) -> str:
    if not done:
        return "No size was tried yet."
    least, most = done[0], done[-1]

    def told(result: TrialResult) -> str:
        value = result.scores["reliability"].value
        share = "not measured" if value is None else f"{100 * value:.0f}%"
        return f"{share} of {counted(result.trial.num_edits, 'edit')}"

    if len(done) == 1:
        return f"Reliability {told(most)}."
    return f"Reliability from {told(least)} to {told(most)}."


def _pictures(done: Sequence[TrialResult]) -> tuple[Block, ...]:
    lines = {
        name: {
            f"{result.trial.num_edits:,}": result.scores[name]
            for result in done
            if result.scores[name].value is not None
        }
        for name in SCORE_NAMES
        if name != "drift"
    }
    return tuple(drawn(draw_groups("Scores by number of edits", lines)))


def _table(done: Sequence[TrialResult]) -> Table:
    rows = tuple(
        (
            f"{one.trial.num_edits:,}",
            *(figure_text(name, one.scores[name]) for name in SCORE_NAMES),
        )
        for one in done
    )
    return Table(columns=("edits", *SCORE_NAMES), rows=rows)


def _costs(done: Sequence[TrialResult]) -> Table:
    rows = tuple(
        (
            f"{one.trial.num_edits:,}",
            f"{one.seconds_per_edit:.3f}",
            seconds_text(one.cache_s),
            seconds_text(one.train_s),
            f"{one.num_steps:,}",
            "-" if one.final_loss is None else f"{one.final_loss:.4f}",
            bytes_text(one.peak_memory_bytes),
        )
        for one in done
    )
    columns = ("edits", "s per edit", "frozen layers", "training", "steps", "final loss", "peak memory")
    return Table(columns=columns, rows=rows)


def _how(report: StudyReport, done: Sequence[TrialResult]) -> Text:
    trial = done[0].trial
    return Text(
        f"Location {trial.location}, batches of {trial.batch_size:,}, seed {trial.seed}, breadth-first; "
        f"95% intervals over prompts and passages. Scored: the first {report.topic.num_scored:,} edits, "
        "or all where there are fewer, after all edits of a size were in. Memory is what the process "
        "had used at most by then, scoring included."
    )
