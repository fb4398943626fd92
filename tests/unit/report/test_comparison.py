import pytest
from hostile import pictures_blank
from reports import SCORES, make_compared, make_comparison

from locft.report.comparison import describe_comparison
from locft.report.page import Page, Picture, Table, Text
from locft.report.schema import ComparisonReport
from locft.types import Figure


def describe(report: ComparisonReport) -> Page:
    with pictures_blank():
        return describe_comparison(report)


def table(page: Page, title: str) -> Table:
    (found,) = (s for s in page.sections if s.title == title)
    return next(block for block in found.blocks if isinstance(block, Table))


def drawn_titles(page: Page) -> list[str]:
    return [one.title for one in page.sections if one.blocks]


def test_the_verdict_names_only_differences_beyond_chance() -> None:
    page = describe(make_comparison())
    assert page.title == "2 runs side by side"
    assert page.verdict == (
        "B against A: generalization +20.0 [+8.3, +31.7] points, "
        "drift +0.0212 [+0.0187, +0.0239] nats per token."
    )
    assert describe(make_comparison(differences=())).verdict == "B against A: no clear difference."


def test_differences_are_worded_with_what_they_were_paired_on() -> None:
    rows = table(describe(make_comparison()), "Differences").rows
    assert rows == (
        ("B", "reliability", "-1.0 [-3.5, +1.5] points", "200"),
        ("B", "generalization", "+20.0 [+8.3, +31.7] points", "60"),
        ("B", "locality", "not comparable (the runs have no item in common)", "0 of 40 and 40"),
        ("B", "drift", "+0.0212 [+0.0187, +0.0239] nats per token", "40"),
    )


def test_runs_stand_side_by_side() -> None:
    page = describe(make_comparison())
    assert drawn_titles(page) == [
        "Runs",
        "Scores",
        "Differences",
        "Generalization against drift",
        "Cost",
        "Settings that differ",
    ]
    scores = table(page, "Scores")
    assert scores.columns == ("run", *vars(SCORES))
    assert scores.rows[1][2] == "70.0% [57.5, 80.1] of 60"
    assert table(page, "Cost").rows[0] == ("A", "0.25 s", "1 h 02 min", "1.5 GB", "9.4 kB")
    assert table(page, "Settings that differ").rows[0] == ("A", "plain", "none")


def test_runs_that_cannot_be_compared_say_why_and_leave_no_empty_section() -> None:
    runs = (
        make_compared("A", settings={}),
        make_compared(
            "B",
            kind="evaluation",
            scores={},
            reason="was not scored so",
            location=None,
            seconds_per_edit=None,
            patch_bytes=None,
            settings={},
        ),
    )
    page = describe(make_comparison(runs=runs, differences=()))
    assert drawn_titles(page) == ["Runs", "Scores", "Cost"]
    assert table(page, "Scores").rows[1] == ("B", "-", "-", "-", "-")
    assert table(page, "Cost").rows[1][1] == "-"
    (scores,) = (s for s in page.sections if s.title == "Scores")
    assert Text("B: was not scored so.") in scores.blocks


@pytest.mark.parametrize(
    ("places", "front"),
    [
        ([(0.5, 0.04), (0.7, 0.06)], "A, B"),
        ([(0.5, 0.06), (0.7, 0.04)], "B"),
        ([(0.5, 0.04), (0.5, 0.04)], "A, B"),
        ([(0.5, 0.04), (0.5, 0.05)], "A"),
        ([(0.5, 0.04), (0.7, 0.06), (0.6, 0.07)], "A, B"),
    ],
)
def test_the_front_is_of_runs_that_no_other_beats(places: list[tuple[float, float]], front: str) -> None:
    runs = tuple(
        make_compared(
            name,
            scores={
                "generalization": Figure(value=carried, num=60, low=0.0, high=1.0),
                "drift": Figure(value=drift, num=40, low=0.0, high=1.0),
            },
        )
        for name, (carried, drift) in zip("ABC", places, strict=False)
    )
    page = describe(make_comparison(runs=runs, differences=()))
    (found,) = (s for s in page.sections if s.title == "Generalization against drift")
    picture, text = found.blocks
    assert isinstance(picture, Picture)
    assert isinstance(text, Text)
    assert text.text.endswith(f": {front}.")
