"""Says what stands in the report of a search for a location."""

from collections.abc import Sequence
from pathlib import Path

from locft.recipe.locate import Found, Outcome
from locft.recipe.run_folder import REPORT_FILE, draw, write_folder
from locft.report.comparison import front_names
from locft.report.page import Block, Command, Fold, Page, Section, Table, Text
from locft.report.pictures import FrontPoint, draw_front
from locft.report.schema import to_bytes
from locft.report.sections import drawn
from locft.report.words import counted, figure_text, seconds_text

_SCORES = ("reliability", "generalization", "drift")


def describe_found(found: Found) -> Page:
    """Describe a search for a location.

    Args:
        found: What was tried, and the recommended location.

    Returns:
        The page.
    """
    *earlier, last = found.rounds
    names = ", ".join(front_of(last))
    return Page(
        title=f"Location {found.location}",
        verdict=_verdict(found),
        tiles=(),
        sections=(
            Section(
                title="The last round",
                blocks=(
                    *drawn(draw_front(_points(last))),
                    _table(last),
                    Text(f"On the front, where no other carries as far for as little harm: {names}."),
                    Text(_how(found)),
                ),
            ),
            Section(title="Earlier rounds", blocks=_rounds(earlier)),
            Section(
                title="To use it",
                blocks=(
                    Command(f"locft edit MODEL EDITS -o RUN --location {found.location}"),
                    Text(f"The search took {seconds_text(found.wall_s)} of {_budget(found)}."),
                ),
            ),
        ),
    )


def save_found(found: Found, folder: Path) -> None:
    """Write the report of a search as a folder of its own.

    Raises:
        InputError: The place is taken, or cannot be written to.
    """
    write_folder(folder, {**draw(describe_found(found)), REPORT_FILE: to_bytes(found)})


def front_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Name the locations that no other one beats in one of the two without losing in the other."""
    return front_names(_points(outcomes))


def _verdict(found: Found) -> str:
    best = found.rounds[-1][0]
    told = f"{found.location} is worth {best.value:.1f} points by {found.prefer}"
    if found.lead is None or found.lead.value is None:
        return f"{told}; nothing else was left to compare it with."
    low, high = found.lead.low, found.lead.high
    assert low is not None
    assert high is not None
    sure = "" if low > 0 else ", which may be chance"
    return (
        f"{told}, {found.lead.value:.1f} [{low:.1f}, {high:.1f}] more than {found.runner_up}{sure}. It "
        f"is the best of the last round in {100 * found.certainty:.0f}% of resamples."
    )


def _points(outcomes: Sequence[Outcome]) -> list[FrontPoint]:
    return [
        FrontPoint(
            name=one.location, generalization=one.scores["generalization"], drift=one.scores["drift"]
        )
        for one in outcomes
        if one.value is not None
    ]


def _table(outcomes: Sequence[Outcome]) -> Table:
    rows = tuple(
        (
            one.location,
            "-" if one.value is None else f"{one.value:+.1f}",
            *(figure_text(name, one.scores[name]) if one.scores else "-" for name in _SCORES),
            seconds_text(one.seconds),
        )
        for one in outcomes
    )
    return Table(columns=("location", "value", *_SCORES, "took"), rows=rows)


def _rounds(rounds: Sequence[Sequence[Outcome]]) -> tuple[Block, ...]:
    return tuple(
        Fold(
            title=f"Round {number}: {counted(len(outcomes), 'location')} on "
            f"{counted(outcomes[0].num_edits, 'edit')}",
            blocks=(_table(outcomes),),
        )
        for number, outcomes in enumerate(rounds, 1)
    )


def _how(found: Found) -> str:
    num_edits = found.rounds[-1][0].num_edits
    return (
        f"Value: {found.rule}. Each location was trained on {counted(num_edits, 'edit')}, "
        "breadth-first, and scored by what the model predicts, teacher-forced: reliability is the share "
        "of prompts after which every token of the target is the likeliest one, generalization the "
        "probability of the target after other wordings, drift the change of predictions on beginnings "
        "of neutral text. In brackets: 95% intervals, by a bootstrap over edits and passages. Scores on "
        "all edits differ: "
        "more edits harm more."
    )


def _budget(found: Found) -> str:
    return f"the {seconds_text(found.budget_s)} that it was given"
