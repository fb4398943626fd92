import re
from functools import cache
from importlib import resources

import pytest
from hostile import HOSTILE, named, page_colours, pictures_blank
from html_reader import Element, read_html, read_tables
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import make_answers, make_comparison, make_evaluation, make_report

from locft.report.comparison import describe_comparison
from locft.report.content import Evaluated, describe_edit, describe_evaluation
from locft.report.html import draw_html
from locft.report.page import Command, Fold, Page, Picture, Section, Table, Text, Tile
from locft.report.words import one_line

STYLE = resources.files("locft.report").joinpath("templates", "page.css").read_text("utf-8")
KINDS = ("edit", "evaluation", "comparison")
PICTURE = Picture(svg='<svg viewBox="0 0 1 1"><text>&lt;</text></svg>', title="Seen", alt="one")


@cache
def drawn(kind: str) -> str:
    if kind == "edit":
        evaluation = Evaluated(name="eval-1", report=make_evaluation(), answers=())
        page = describe_edit(make_report(), make_answers(), [evaluation])
    elif kind == "evaluation":
        page = describe_evaluation(make_evaluation(), make_answers())
    else:
        page = describe_comparison(make_comparison())
    return draw_html(page)


def make_page(text: str) -> Page:
    """Put one text everywhere that a page has room for one."""
    table = Table(columns=("name", text), rows=((text, "x"), ("x", text)), left_out=f"More {text}")
    return Page(
        title=f"1 edit in {text}",
        verdict=f"So: {text}.",
        tiles=(
            Tile(name=text, value="97.0%", note="of 3", change="+1.0"),
            Tile(name="b", value="1", note="n"),
        ),
        sections=(
            Section(title=f"Scores {text}", blocks=(PICTURE, PICTURE, table, Text(text))),
            Section(title="Nothing", blocks=()),
            Section(
                title="Answers",
                blocks=(
                    Fold(title=f"Group {text}", blocks=(table, Text(text)), is_open=True),
                    Fold(title="Other", blocks=(table,)),
                    Command(f"locft {text}"),
                ),
            ),
        ),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_needs_nothing_else(kind: str) -> None:
    text = drawn(kind)
    html = read_html(text)
    elements = [*html.all()]
    for element in elements:
        assert element.tag not in (
            "script",
            "link",
            "img",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "a",
        )
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "srcset", "action", "data", "xlink:href")
            assert name != "href" or value.startswith("#")
            assert not re.search(r"url\((?!#)", value)
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    assert "://" not in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_browser_may_show_a_file_and_nothing_else(kind: str) -> None:
    metas = [*read_html(drawn(kind)).one("head").all("meta")]
    (policy,) = (
        meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy"
    )
    rules = {name: values for name, *values in (rule.split() for rule in policy.split(";"))}
    assert rules == {
        "default-src": ["'none'"],
        "style-src": ["'unsafe-inline'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }
    names = {meta["name"]: meta["content"] for meta in metas if "name" in meta.attributes}
    assert names["viewport"] == "width=device-width, initial-scale=1"
    assert names["referrer"] == "no-referrer"
    assert names["color-scheme"] == "light dark"
    assert metas[0].get("charset") == "utf-8"


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_told_apart_and_read_aloud(kind: str) -> None:
    html = read_html(drawn(kind))
    assert html["lang"] == "en"
    assert html.one("title").text == html.one("h1").text != ""
    ids = [element["id"] for element in html.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    assert not [id_ for id_ in ids if re.search(r"\s", id_)]
    refs = [
        value for e in html.all() for k, value in e.attributes.items() if k.startswith("aria-labelledby")
    ]
    assert set(refs) <= set(ids)
    assert refs
    tables = [*html.all("table")]
    assert tables
    for table in tables:
        header, body = table.children
        (columns,) = header.children
        assert all((cell.tag, cell.get("scope")) == ("th", "col") for cell in columns.children)
        for row in body.children:
            first, *others = row.children
            assert (first.tag, first.get("scope")) == ("th", "row")
            assert {cell.tag for cell in others} <= {"td"}
            assert len(row.children) == len(columns.children)
            # Where rows are cards, which takes a table's meaning from it, cells tell their columns.
            labels = [cell.get("data-label") for cell in row.children]
            assert labels == [None, *(column.text for column in columns.children[1:])]
            assert [cell["role"] for cell in row.children] == ["rowheader", *["cell"] * len(others)]
        assert {cell["role"] for cell in columns.children} == {"columnheader"}
        assert {row["role"] for row in table.all("tr")} == {"row"}
        assert [table["role"], header["role"], body["role"]] == ["table", "rowgroup", "rowgroup"]
        assert (table.get("class") == "stacks") is (len(columns.children) > 3)
    pictures = [*html.all("figure")]
    assert pictures
    assert len(pictures) == len([*html.all("svg")])
    for picture in pictures:
        assert picture["role"] == "img"
        assert picture["aria-label"].startswith(f"{picture.one('figcaption').text}. ")
        assert len(picture["aria-label"]) > len(picture.one("figcaption").text) + 10
    for region in html.all("div"):
        if region.get("role") == "region":
            assert region["tabindex"] == "0"
            assert region["aria-label"].startswith("Table: ")


def _check_no_section_is_empty(html: Element) -> None:
    for section in html.all("section"):
        heading, *rest = section.children
        assert heading.tag == "h2"
        assert "".join(part.text for part in rest).strip()
        for group in rest:
            assert group.children


@pytest.mark.parametrize("kind", KINDS)
def test_no_section_is_empty(kind: str) -> None:
    _check_no_section_is_empty(read_html(drawn(kind)))


def test_a_page_is_drawn_part_by_part() -> None:
    html = read_html(draw_html(make_page("plain")))
    _check_no_section_is_empty(html)
    assert [part.text for part in html.all("h2")] == ["Scores plain", "Answers"]
    tiles = [[part.text for part in tile.children] for tile in html.one("dl").children]
    assert tiles == [["plain", "97.0%of 3change +1.0 points"], ["b", "1n"]]
    scores = html.labelled("Scores plain")
    (beside,) = (part for part in scores.children if part.get("class") == "pictures")
    assert [part.tag for part in beside.children] == ["figure", "figure"]
    assert read_tables(scores) == [[["name", "plain"], ["plain", "x"], ["x", "plain"]]]
    assert [part.text for part in scores.all("p")] == ["More plain", "plain"]
    folds = [*html.labelled("Answers").all("details")]
    assert [("open" in fold.attributes, fold.one("summary").text) for fold in folds] == [
        (True, "Group plain"),
        (False, "Other"),
    ]
    assert html.one("pre").text == "locft plain"
    assert html.one("header").all("p").__next__().text == "So: plain."


@given(
    st.text(st.characters(), max_size=40) | st.text(st.sampled_from("<>&\"'{}%#-/! a\n\0"), max_size=40)
)
@settings(max_examples=30, deadline=None)
def test_whatever_the_text_it_is_shown_and_nothing_more(text: str) -> None:
    plain, html = (read_html(draw_html(make_page(one))) for one in ("plain", text))
    assert [part.tag for part in html.all()] == [part.tag for part in plain.all()]
    assert [part.attributes.keys() - {"class"} for part in html.all()] == [
        part.attributes.keys() - {"class"} for part in plain.all()
    ]
    shown = one_line(text)
    assert html.one("h1").text == f"1 edit in {shown}"
    assert html.one("pre").text == f"locft {shown}"
    assert {str(table) for table in read_tables(html)} == {
        str([["name", shown], [shown, "x"], ["x", shown]])
    }
    draw_html(make_page(text)).encode()


@pytest.mark.parametrize("text", HOSTILE, ids=named)
def test_any_text_of_a_run_is_shown_as_it_is(text: str) -> None:
    def draw(text: str) -> Element:
        evaluation = Evaluated(name=text, report=make_evaluation(text), answers=())
        with pictures_blank():
            page = describe_edit(make_report(text), make_answers(text), [evaluation])
        return read_html(draw_html(page))

    html, plain = draw(text), draw("plain")
    assert [part.tag for part in html.all()] == [part.tag for part in plain.all()]
    answers = read_tables(html.labelled("Answers"))[0][1]
    expected = one_line(text, limit=600)
    assert answers[0] == expected
    assert answers[1] == (expected if text.strip() else "(blank)")


def test_template_syntax_in_texts_is_not_run() -> None:
    text = "{{ 7*7 }}{{7*7}} {% raw %} {% endraw %} {# gone #}"
    drawn = draw_html(make_page(text))
    assert drawn.count("{{7*7}} {% raw %}") > 5
    assert "49" not in drawn.replace(STYLE, "")


def test_a_picture_of_an_evaluation_with_any_name_can_be_written() -> None:
    evaluation = Evaluated(name="eval\udcff\u202e\n", report=make_evaluation(), answers=())
    text = draw_html(describe_edit(make_report(), (), [evaluation]))
    text.encode()
    assert "\u202e" not in text


def test_ids_are_unique_whatever_evaluations_are_called() -> None:
    evaluations = [Evaluated(name=n, report=make_evaluation(), answers=()) for n in ("a.b", "a-b")]
    html = read_html(draw_html(describe_edit(make_report(), (), evaluations)))
    ids = [element["id"] for element in html.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))


def _colours(rule: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", rule))


def _schemes() -> dict[str, dict[str, str]]:
    light, dark, printed = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    assert STYLE.index("prefers-color-scheme: dark") < STYLE.index(dark) < STYLE.index("@media print")
    return {"light": _colours(light), "dark": _colours(dark), "print": _colours(printed)}


def _luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: str, other: str) -> float:
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_computed_as_wcag_does() -> None:
    assert _contrast("#000000", "#ffffff") == pytest.approx(21)
    assert _contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_colours_can_be_told_from_what_is_behind_them(scheme: str) -> None:
    colours = _schemes()[scheme]
    assert colours.keys() == _schemes()["light"].keys()
    for behind in ("paper", "raised"):
        for text in ("ink", "muted", "accent"):
            assert _contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
    for line in ("accent", *(f"fifth-{number}" for number in range(1, 6))):
        assert _contrast(colours[line], colours["paper"]) >= 3.0, line
    assert len({colours[f"fifth-{number}"] for number in range(1, 6)}) == 5


def test_on_paper_all_is_open_dark_on_white_and_in_one_piece() -> None:
    printed = STYLE[STYLE.index("@media print") :]
    assert _schemes()["print"]["paper"] == "#ffffff"
    assert re.search(r"figure, tr,[^{]*\{ break-inside: avoid; \}", printed)
    assert re.search(r"h2,[^{]*\{ break-after: avoid; \}", printed)
    assert re.search(r"details::details-content \{ content-visibility: visible;", printed)
    assert re.search(r"\.scroll \{ overflow: visible; \}", printed)


def test_every_colour_of_the_page_comes_from_its_palette() -> None:
    beyond = re.sub(r":root \{.*?\}", "", STYLE, flags=re.DOTALL)
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b|rgb|hsl", beyond)
    assert set(re.findall(r"var\(--([\w-]+)\)", beyond)) <= page_colours()
