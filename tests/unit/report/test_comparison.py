import dataclasses

import pytest
from hostile import pictures_blank
from reports import SCORES, make_compared, make_comparison

from locft.report.comparison import describe_comparison
from locft.report.page import Page, Picture, Table, Text
from locft.report.schema import ComparisonReport, Difference
from locft.types import Figure


def describe(report: ComparisonReport) -> Page:
    with pictures_blank():
        return describe_comparison(report)


def table(page: Page, title: str) -> Table:
    (found,) = (s for s in page.sections if s.title == title)
    return next(block for block in found.blocks if isinstance(block, Table))


def drawn_titles(page: Page) -> list[str]:
    return [one.title for one in page.sections if one.blocks]


def test_the_verdict_tells_what_is_beyond_chance_from_what_is_not() -> None:
    page = describe(make_comparison())
    assert page.title == "2 runs side by side"
    assert page.verdict == (
        "B against A: more generalization (+20.0 [+8.3, +31.7] points), "
        "more drift (+0.0212 [+0.0187, +0.0239] nats per token); "
        "no clear difference in reliability; nothing to pair for locality."
    )
    nothing = describe(make_comparison(differences=()))
    assert nothing.verdict == "B against A: nothing to pair for any score."


def test_the_verdict_says_which_way_and_of_which_run() -> None:
    less = Figure(value=-0.2, num=60, low=-0.3, high=-0.1)
    differences = tuple(
        Difference(run=run, score="generalization", figure=figure, num_items=60, num_items_first=60)
        for run, figure in (("B", less), ("C", Figure(value=0.0, num=60, low=-0.1, high=0.1)))
    )
    runs = tuple(make_compared(name) for name in "ABC")
    assert describe(make_comparison(runs=runs, differences=differences)).verdict == (
        "B against A: less generalization (-20.0 [-30.0, -10.0] points). "
        "C against A: no clear difference in generalization."
    )


def test_scores_of_other_edits_are_warned_of_where_they_stand_side_by_side() -> None:
    alike, unlike = make_compared("B"), make_compared("C", edits_sha256="f" * 64)
    unscored = dataclasses.replace(unlike, scores={"generalization": SCORES.generalization})
    for other, titles in ((alike, []), (unlike, ["Scores"]), (unscored, ["Scores"])):
        page = describe(make_comparison(runs=(make_compared("A"), alike, other), differences=()))
        warned = [
            section.title
            for section in page.sections
            for block in section.blocks
            if isinstance(block, Text) and block.text.startswith("Not on the same edits as A: C. ")
        ]
        assert warned == titles


def test_differences_are_worded_with_what_they_were_paired_on() -> None:
    found = table(describe(make_comparison()), "Differences")
    assert found.columns == ("run and score", "against A", "paired items")
    assert found.rows == (
        ("B, reliability", "-1.0 [-3.5, +1.5] points", "200"),
        ("B, generalization", "+20.0 [+8.3, +31.7] points", "60"),
        ("B, locality", "not comparable (the runs have no item in common)", "0 of 40 and 40"),
        ("B, drift", "+0.0212 [+0.0187, +0.0239] nats per token", "40"),
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
        ([(0.5, 0.04), (0.6, 0.04)], "B"),
        ([(0.5, 0.04), (0.7, 0.06), (0.6, 0.07)], "A, B"),
        ([(0.5, 0.04), (0.5, 0.04), (0.9, 0.03)], "C"),
        ([(0.2, 0.1), (0.9, 0.3), (0.5, 0.4), (0.6, 0.2)], "A, B, D"),
        ([(0.2, 0.1), (None, 0.0), (0.3, 0.2)], "A, C"),
    ],
)
def test_the_front_is_of_runs_that_no_other_beats(
    places: list[tuple[float | None, float]], front: str
) -> None:
    runs = tuple(
        make_compared(
            name,
            scores={
                "generalization": Figure(value=carried, num=60, low=0.0, high=1.0),
                "drift": Figure(value=drift, num=40, low=0.0, high=1.0),
            },
        )
        for name, (carried, drift) in zip("ABCD", places, strict=False)
    )
    page = describe(make_comparison(runs=runs, differences=()))
    (found,) = (s for s in page.sections if s.title == "Generalization against drift")
    picture, text = found.blocks
    assert isinstance(picture, Picture)
    assert isinstance(text, Text)
    assert text.text.endswith(f": {front}.")


@pytest.mark.parametrize(("num_alike", "front"), [(1, []), (2, ["A, B"])])
def test_runs_on_other_edits_are_left_out_of_the_front(num_alike: int, front: list[str]) -> None:
    better = dict(vars(SCORES), generalization=Figure(value=0.9, num=60, low=0.8, high=0.95))
    runs = (
        *(make_compared(name) for name in "AB"[:num_alike]),
        make_compared("C", edits_sha256="f" * 64, scores=better),
    )
    page = describe(make_comparison(runs=runs, differences=()))
    (found,) = (s for s in page.sections if s.title == "Generalization against drift")
    told = [block.text for block in found.blocks if isinstance(block, Text)]
    assert [text.rsplit(": ")[-1].rstrip(".") for text in told] == front
    assert len([block for block in found.blocks if isinstance(block, Picture)]) == len(front)
