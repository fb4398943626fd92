import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import pytest
from hostile import HOSTILE, named, page_colours
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from reports import BEFORE, NONE, SCORES, make_comparison, make_report
from svg_reader import Axis, Drawn, Point

from locft.report.page import Picture
from locft.report.pictures import (
    FrontPoint,
    draw_changes,
    draw_drift,
    draw_front,
    draw_loss,
    draw_shares,
    draw_success,
)
from locft.report.schema import to_json
from locft.types import Epoch, Figure

SHARES = {name: figure for name, figure in vars(SCORES).items() if name != "drift"}
# Each takes a tenth of a second to draw: there is no time to look for the simplest that fails.
FEW = settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.generate))


def drawn(picture: Picture | None) -> Drawn:
    assert picture is not None
    return Drawn(picture)


def is_at(axis: Axis, place: float, value: float) -> bool:
    tolerance = axis.resolution + (1e-4 * abs(value) if axis.is_log else 0)
    return abs(axis.value(place) - value) <= tolerance


def check_shares(read: Drawn, name: str, row: int, figure: Figure, factor: float = 100) -> None:
    """Check a mark and its interval, by the horizontal axis."""
    axis = read.axis("x")
    ((x, _),) = read.marks(f"{name}-{row}")
    assert figure.value is not None
    assert is_at(axis, x, factor * figure.value)
    lines = read.before(f"{name}-{row}")
    if figure.low is None or figure.high is None:
        assert lines == []
        return
    (((left, _), (right, _)),) = lines
    assert is_at(axis, left, factor * figure.low)
    assert is_at(axis, right, factor * figure.high)


def make_course(losses: Sequence[float], num_fifths: int = 1) -> list[Epoch]:
    return [
        Epoch(
            epoch=number,
            steps=1,
            loss=loss,
            success=tuple(((number * 37 + part * 11) % 101) / 100 for part in range(num_fifths)),
        )
        for number, loss in enumerate(losses, 1)
    ]


def all_pictures(text: str = "plain") -> dict[str, Picture]:
    """Draw one of each kind, with a text wherever one may be."""
    report, comparison = make_report(text), make_comparison(text)
    points = [
        FrontPoint(name=run.name, generalization=run.scores["generalization"], drift=run.scores["drift"])
        for run in comparison.runs
    ]
    changes = {
        f"{text}{one.score}": one.figure for one in comparison.differences if one.score != "drift"
    }
    found = {
        "shares": draw_shares("Shares", {text: SCORES.locality}, {text: SCORES.reliability}),
        "loss": draw_loss(report.training.course, 0.01),
        "success": draw_success(report.training.course, report.training.fifths),
        "drift": draw_drift({text: SCORES.drift}),
        "front": draw_front(points),
        "changes": draw_changes("Changes", changes),
    }
    assert None not in found.values()
    return {name: picture for name, picture in found.items() if picture is not None}


def test_shares_are_drawn_where_report_json_has_them() -> None:
    read_json = json.loads(to_json(make_report()))
    read = drawn(draw_shares("Scores before and after", vars(BEFORE), SHARES))
    names = ["reliability", "generalization", "locality"]
    assert read.axis("y").labels == names
    assert "% (95% intervals); ring: before, dot: after" in read.texts
    for row, name in enumerate(names):
        now, was = read_json["scores"][name], read_json["scores_before"][name]
        assert f"{100 * now['value']:.1f}%" in read.texts
        check_shares(read, "after", row, Figure(**now))
        if was["value"] is None:
            assert read.group(f"before-{row}") is None
            assert read.group(f"change-{row}") is None
            continue
        check_shares(read, "before", row, Figure(**was))
        (early, _), (late, _) = read.line(f"change-{row}")
        assert is_at(read.axis("x"), early, 100 * was["value"])
        assert is_at(read.axis("x"), late, 100 * now["value"])
    assert [text for text in read.texts if text.endswith(".0%")] == ["97.0%", "50.0%", "75.0%"]


def test_a_ring_is_before_and_a_dot_is_after() -> None:
    read = drawn(draw_shares("Scores", vars(BEFORE), SHARES))
    for name, is_ring in (("before-0", True), ("after-0", False)):
        group = read.group(name)
        assert group is not None
        (use,) = group.iter("use")
        assert ("fill-opacity: 0" in use.attrib["style"]) is is_ring


def test_an_interval_before_does_not_hide_the_one_after() -> None:
    read = drawn(draw_shares("Scores", vars(BEFORE), SHARES))
    first, second, *_ = (place for place, _ in read.axis("y").ticks)
    ((_, after),), ((_, before),) = read.marks("after-0"), read.marks("before-0")
    assert math.isclose(after, first, abs_tol=0.01)
    assert math.isclose(before - after, 0.2 * (second - first), abs_tol=0.01)
    [interval] = read.before("before-0")
    assert {height for _, height in interval} == {before}
    assert [height for _, height in read.line("change-0")] == [before, after]


def test_rows_stand_in_the_order_of_the_names_beside_them() -> None:
    read = drawn(draw_shares("Scores", None, SHARES))
    places = [place for place, _ in read.axis("y").ticks]
    assert places == sorted(places)
    for row, place in enumerate(places):
        ((_, y),) = read.marks(f"after-{row}")
        assert math.isclose(y, place, abs_tol=0.01)
    assert not any("before" in text for text in read.texts)


def test_the_loss_is_drawn_where_report_json_has_it() -> None:
    report = make_report()
    course = json.loads(to_json(report))["training"]["course"]
    read = drawn(draw_loss(report.training.course, 0.01))
    x, y = read.axis("x"), read.axis("y")
    assert x.labels == ["1", "2", "3"]
    assert y.is_log
    for (across, up), epoch in zip(read.marks("loss"), course, strict=True):
        assert is_at(x, across, epoch["epoch"])
        assert is_at(y, up, epoch["loss"])
    ((_, left), (_, right)) = read.line("stop")
    assert left == right
    assert is_at(y, left, 0.01)
    assert "stops under 0.01" in read.texts
    assert ["epoch" in read.texts, "loss (nats)" in read.texts] == [True, True]


def test_a_loss_without_a_threshold_has_no_line_for_it() -> None:
    read = drawn(draw_loss(make_report().training.course, None))
    assert read.group("stop") is None
    assert not any("stops" in text for text in read.texts)


@pytest.mark.parametrize(
    ("losses", "is_log"),
    [
        ([4.5, 2.0, 0.5], False),
        ([4.5, 0.1, 0.0091], True),
        ([4.5, 1.0, 0.0], False),
        ([0.0, 0.0], False),
    ],
)
def test_losses_of_many_sizes_are_drawn_by_factors(losses: list[float], is_log: bool) -> None:
    read = drawn(draw_loss(make_course(losses), None))
    assert read.axis("y").is_log is is_log
    for (_, up), loss in zip(read.marks("loss"), losses, strict=True):
        assert is_at(read.axis("y"), up, loss)


@pytest.mark.parametrize("losses", [[0.45, 0.1, 0.02], [9.0, 0.4], [0.09, 0.05, 0.0012]])
def test_the_axis_of_losses_has_two_labels_at_least(losses: list[float]) -> None:
    axis = drawn(draw_loss(make_course(losses), None)).axis("y")
    assert len(axis.labels) >= 2


def test_one_epoch_is_drawn_at_its_whole_number() -> None:
    course = make_course([0.5])
    for picture, name in ((draw_loss(course, None), "loss"), (draw_success(course, (3,)), "success-0")):
        axis = drawn(picture).axis("x")
        assert axis.labels == ["1"]
        ((x, _),) = drawn(picture).marks(name)
        assert math.isclose(x, axis.ticks[0][0], abs_tol=0.01)


@given(st.lists(st.floats(1e-6, 50), min_size=2, max_size=30))
@FEW
def test_whatever_the_losses_they_are_drawn_where_they_are(losses: list[float]) -> None:
    read = drawn(draw_loss(make_course(losses), None))
    x, y = read.axis("x"), read.axis("y")
    for number, ((across, up), loss) in enumerate(zip(read.marks("loss"), losses, strict=True), 1):
        assert is_at(x, across, number)
        assert is_at(y, up, loss)


def test_the_success_of_each_fifth_is_drawn_where_report_json_has_it() -> None:
    report = make_report()
    training = json.loads(to_json(report))["training"]
    read = drawn(draw_success(report.training.course, report.training.fifths))
    for number in range(5):
        places = read.marks(f"success-{number}")
        for (across, up), epoch in zip(places, training["course"], strict=True):
            assert is_at(read.axis("x"), across, epoch["epoch"])
            assert is_at(read.axis("y"), up, 100 * epoch["success"][number])
    for label in ("first (40)", "fifth (40)", "part (edits)", "% of target tokens right"):
        assert label in read.texts


@pytest.mark.parametrize("num", [1, 2, 5])
def test_fifths_differ_in_colour_and_dashes_and_one_alone_is_no_part(num: int) -> None:
    picture = draw_success(make_course([1.0, 0.5], num), (1_000,) * num)
    read = Drawn(picture)
    styles = []
    for number in range(num):
        group = read.group(f"success-{number}")
        assert group is not None
        path = group.find("path")
        assert path is not None
        styles.append(path.attrib["style"])
        assert f"stroke: var(--fifth-{number + 1})" in styles[-1]
    dashes = [re.findall(r"stroke-dasharray: ([^;]+)", style) for style in styles]
    assert len({str(dash) for dash in dashes}) == num
    assert ("part (edits)" in read.texts) is (num > 1)
    assert ("1,000 edits" in read.texts) is (num == 1)


@pytest.mark.parametrize("num", [31, 300])
def test_a_long_course_is_a_line_through_every_epoch(num: int) -> None:
    losses = [5 * 0.97**number * (1 + 0.3 * math.sin(number)) for number in range(num)]
    course = make_course(losses, 1)
    for picture, name, values in (
        (draw_loss(course, None), "loss", losses),
        (draw_success(course, (3,)), "success-0", [100 * epoch.success[0] for epoch in course]),
    ):
        read = Drawn(picture)
        group = read.group(name)
        assert group is not None
        assert not list(group.iter("use"))
        line, x, y = read.line(name), read.axis("x"), read.axis("y")
        for number, value in enumerate(values, 1):
            up = _height(line, _place(x, number))
            # A tenth of a point, to which matplotlib simplifies long lines.
            near, far = sorted((y.value(up - 1.0), y.value(up + 1.0)))
            assert near <= value <= far


def _place(axis: Axis, value: float) -> float:
    low, high = axis.ticks[0][0], axis.ticks[-1][0]
    first, last = axis.value(low), axis.value(high)
    return low + (high - low) * (value - first) / (last - first)


def _height(line: Sequence[Point], x: float) -> float:
    for (left, early), (right, late) in itertools.pairwise(line):
        if left <= x + 1e-3 and x - 1e-3 <= right:
            return early if right == left else early + (late - early) * (x - left) / (right - left)
    raise AssertionError(f"no line at {x}")


FIGURE = st.floats(0, 1).flatmap(
    lambda value: st.builds(
        lambda below, above: Figure(
            value=value, num=9, low=value * below, high=value + (1 - value) * above
        ),
        st.floats(0, 1),
        st.floats(0, 1),
    )
)
NAMED = st.dictionaries(st.text("abcdef", min_size=1, max_size=9), FIGURE, min_size=1, max_size=6)


@given(NAMED, NAMED)
@FEW
def test_whatever_the_shares_they_are_drawn_where_they_are(
    after: dict[str, Figure], before: dict[str, Figure]
) -> None:
    read = drawn(draw_shares("Any", before, after))
    for row, (name, figure) in enumerate(after.items()):
        check_shares(read, "after", row, figure)
        assert f"{100 * (figure.value or 0):.1f}%" in read.texts
        if name in before:
            check_shares(read, "before", row, before[name])
        else:
            assert read.group(f"before-{row}") is None
    assert read.axis("y").labels == list(after)


def check_drift(by_kind: Mapping[str, Figure]) -> None:
    read = drawn(draw_drift(by_kind))
    axis = read.axis("x")
    assert read.axis("y").labels == list(by_kind)
    for row, figure in enumerate(by_kind.values()):
        assert figure.value is not None
        ends = [x for x, _ in read.line(f"drift-{row}")]
        assert is_at(axis, min(ends), 0)
        assert is_at(axis, max(ends), figure.value)
        assert f"{figure.value:.4f}" in read.texts
        if figure.low is None or figure.high is None:
            assert read.group(f"interval-{row}") is None
        else:
            (low, _), (high, _) = read.line(f"interval-{row}")
            assert is_at(axis, low, figure.low)
            assert is_at(axis, high, figure.high)


def test_drift_is_drawn_where_report_json_has_it() -> None:
    by_kind = {
        "facts": Figure(value=0.0421, num=40, low=0.0391, high=0.0455),
        "stories": Figure(value=0.31, num=1, reason="one passage gives no interval"),
        "code": Figure(value=0.0, num=40, low=0.0, high=0.0),
    }
    report = make_report()
    drift = json.loads(to_json(report))["drift"]["by_kind"]
    check_drift({kind: Figure(**figure) for kind, figure in drift.items()})
    check_drift(by_kind)


@given(st.floats(-6, 1).map(lambda power: 10**power), NAMED)
@FEW
def test_whatever_the_drift_it_is_drawn_where_it_is(scale: float, shares: dict[str, Figure]) -> None:
    def scaled(end: float | None) -> float | None:
        return None if end is None else scale * end

    check_drift(
        {
            name: Figure(value=scaled(f.value), num=9, low=scaled(f.low), high=scaled(f.high))
            for name, f in shares.items()
        }
    )


def check_front(points: Sequence[FrontPoint]) -> None:
    read = drawn(draw_front(points))
    x, y = read.axis("x"), read.axis("y")
    for point in points:
        drift, carried = point.drift, point.generalization
        assert drift.value is not None
        assert carried.value is not None
        ((across, up),) = read.marks(f"run-{point.name}")
        assert is_at(x, across, drift.value)
        assert is_at(y, up, 100 * carried.value)
        assert point.name in read.texts
        (((left, _), (right, _)), ((_, bottom), (_, top))) = read.before(f"run-{point.name}", 2)
        for axis, place, value in (
            (x, left, drift.low),
            (x, right, drift.high),
            (y, bottom, 100 * (carried.low or 0)),
            (y, top, 100 * (carried.high or 0)),
        ):
            assert value is not None
            assert is_at(axis, place, value)


def test_the_front_is_drawn_where_the_comparison_has_it() -> None:
    runs = json.loads(to_json(make_comparison()))["runs"]
    check_front(
        [
            FrontPoint(
                name=run["name"],
                generalization=Figure(**run["scores"]["generalization"]),
                drift=Figure(**run["scores"]["drift"]),
            )
            for run in runs
        ]
    )


@given(st.lists(st.tuples(FIGURE, FIGURE), min_size=2, max_size=5))
@FEW
def test_whatever_the_runs_they_are_drawn_where_they_are(figures: list[tuple[Figure, Figure]]) -> None:
    check_front(
        [
            FrontPoint(name=name, generalization=carried, drift=drift)
            for name, (carried, drift) in zip("ABCDE", figures, strict=False)
        ]
    )


def _difference(read: Drawn, row: int) -> str:
    return "difference" if read.group(f"difference-{row}") is not None else f"difference-{row}"


def test_differences_are_drawn_where_the_comparison_has_them() -> None:
    report = json.loads(to_json(make_comparison()))
    changes = {one["score"]: Figure(**one["figure"]) for one in report["differences"]}
    shares = {name: figure for name, figure in changes.items() if name != "drift"}
    read = drawn(draw_changes("Differences", shares))
    assert read.axis("y").labels == ["reliability", "generalization"]
    for row, name in enumerate(read.axis("y").labels):
        check_shares(read, _difference(read, row), row, changes[name])


@given(st.lists(FIGURE, min_size=1, max_size=5), st.booleans())
@FEW
def test_whatever_the_differences_they_are_drawn_where_they_are(
    figures: list[Figure], is_loss: bool
) -> None:
    def turned(end: float | None) -> float:
        assert end is not None
        return -end if is_loss else end

    changes = {
        name: Figure(
            value=turned(figure.value),
            num=9,
            low=min(turned(figure.low), turned(figure.high)),
            high=max(turned(figure.low), turned(figure.high)),
        )
        for name, figure in zip("abcde", figures, strict=False)
    }
    read = drawn(draw_changes("Any", changes))
    for row, figure in enumerate(changes.values()):
        check_shares(read, _difference(read, row), row, figure)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: draw_shares("t", None, {}),
        lambda: draw_shares("t", {"a": SCORES.locality}, {"a": NONE}),
        lambda: draw_drift({}),
        lambda: draw_drift({"a": NONE}),
        lambda: draw_front([]),
        lambda: draw_front([FrontPoint(name="A", generalization=SCORES.locality, drift=SCORES.drift)]),
        lambda: draw_front([FrontPoint(name=n, generalization=NONE, drift=SCORES.drift) for n in "AB"]),
        lambda: draw_changes("t", {}),
        lambda: draw_changes("t", {"a": NONE}),
    ],
)
def test_nothing_measured_is_no_picture(draw: Callable[[], Picture | None]) -> None:
    assert draw() is None


def test_what_was_not_measured_has_no_row() -> None:
    for picture in (
        draw_shares("t", None, {"a": NONE, "b": SCORES.locality}),
        draw_drift({"a": NONE, "b": SCORES.drift}),
        draw_changes("t", {"a": NONE, "b": SCORES.locality}),
    ):
        assert drawn(picture).axis("y").labels == ["b"]


def test_a_picture_has_forty_rows_at_most() -> None:
    many = {f"task {number}": SCORES.locality for number in range(45)}
    for picture in (draw_shares("t", None, many), draw_drift(many), draw_changes("t", many)):
        assert drawn(picture).axis("y").labels == list(many)[:40]


LABELS = (
    "$x$",
    "$\\frac",
    "$",
    "$$",
    "\\alpha_",
    "^_{}",
    "日本語の文",
    "العربية",
    "עברית",
    "हिन्दी",
    "👩\u200d🔬 😀",
    "\U00020000",
    "﷽",
    "<b>&amp;</b>",
    "]]>",
)


@pytest.mark.parametrize("label", LABELS, ids=named)
def test_any_label_is_drawn_as_it_is(label: str) -> None:
    pictures = (
        draw_shares("t", None, {label: SCORES.locality}),
        draw_drift({label: SCORES.drift}),
        draw_changes("t", {label: SCORES.locality}),
    )
    for picture in pictures:
        assert label in drawn(picture).texts
        assert picture is not None
        assert picture.alt.startswith(f"{label}: ")


@pytest.mark.parametrize("text", HOSTILE, ids=named)
def test_any_text_is_drawn_in_one_short_line(text: str) -> None:
    picture = draw_shares("Shares", {text: SCORES.locality}, {text: SCORES.reliability})
    assert picture is not None
    read = Drawn(picture)
    assert {part.tag for part in read.root.iter()} == {
        "svg",
        "g",
        "defs",
        "path",
        "use",
        "text",
        "clipPath",
        "rect",
    }
    assert picture.alt.isprintable()
    assert len(picture.alt) <= 1000
    (label,) = read.axis("y").labels or [""]
    assert 0 < len(label) <= 24 or not text.strip()
    picture.svg.encode()


@given(st.text(st.characters(), max_size=30))
@FEW
def test_whatever_the_label_it_is_drawn_without_a_warning(label: str) -> None:
    read = drawn(draw_drift({label: SCORES.drift}))
    assert is_at(read.axis("x"), read.line("interval-0")[0][0], 0.0391)


def test_titles_hold_no_more_than_one_line_either() -> None:
    for draw in (draw_changes("a\n\u202e\x00\ud800", SHARES), draw_shares("\u202e\ud800", None, SHARES)):
        assert draw is not None
        assert draw.title.isprintable()
        draw.svg.encode()


def test_the_same_figures_make_the_same_bytes_whatever_style_is_set_elsewhere() -> None:
    first = all_pictures()
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "text.parse_math": True}):
        before = dict(matplotlib.rcParams)
        second = all_pictures()
        assert dict(matplotlib.rcParams) == before
    assert second == first


def test_all_colours_are_the_pages_own() -> None:
    used: set[str] = set()
    for picture in all_pictures().values():
        read = Drawn(picture)
        for part in read.root.iter():
            for name in ("style", "fill", "stroke"):
                value = part.get(name, "")
                assert not re.search(r"#[0-9a-fA-F]{3,8}\b", value.replace("url(#", ""))
                colours = re.findall(r"(?:^|[ ;])(?:fill|stroke|color): ([^;]+)", value)
                used |= {value} - {""} if name != "style" else set(colours)
        assert "#0a0" not in picture.svg
    assert used <= {"none", *(f"var(--{name})" for name in page_colours())}
    expected = {"ink", "muted", "line", "accent", *(f"fifth-{number}" for number in range(1, 6))}
    assert {f"var(--{name})" for name in expected} <= used


def test_pictures_refer_only_to_their_own_parts() -> None:
    for picture in all_pictures().values():
        root = Drawn(picture).root
        ids = [part.attrib["id"] for part in root.iter() if "id" in part.attrib]
        assert len(ids) == len(set(ids))
        assert not any(re.search(r"\s", id_) for id_ in ids)
        text = picture.svg
        named = re.findall(r"url\(#([^)]*)\)", text) + re.findall(r'href="#([^"]*)"', text)
        assert named
        assert set(named) <= set(ids)
        assert text.count("url(") == text.count("url(#")
        assert text.count("href=") == text.count('href="#')
        assert "xlink" not in text
        assert "<metadata" not in text
        assert "<!" not in text
        assert "<?" not in text
        assert "<style" not in text
        assert not {part.tag for part in root.iter()} & {"script", "foreignObject", "image", "a"}


def test_the_alternative_text_has_the_figures() -> None:
    alts = {name: picture.alt for name, picture in all_pictures().items()}
    assert alts["shares"] == "plain: 75.0% [59.8, 85.8] of 40 before, 97.0% [93.6, 98.6] of 200 after"
    assert alts["drift"] == "plain: 0.0421 [0.0391, 0.0455], 40 passages"
    assert "from 4.5 in the first epoch to 0.0091 in the last, after 3 epochs" in alts["loss"]
    assert alts["success"].endswith("100.0%, 99.0%, 100.0%, 100.0%, 98.0%")
    assert "A: generalization 50.0% [37.7, 62.3] of 60, drift 0.0421" in alts["front"]
    assert "plaingeneralization: +20.0 [+8.3, +31.7] points" in alts["changes"]
