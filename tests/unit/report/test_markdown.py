import itertools
import re
from collections.abc import Iterator

import pytest
from hostile import HOSTILE, named, pictures_blank
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from reports import make_answer, make_answers, make_comparison, make_evaluation, make_report

from locft.report.comparison import describe_comparison
from locft.report.content import Evaluated, describe_edit, describe_evaluation
from locft.report.markdown import draw_markdown
from locft.report.page import Command, Fold, Page, Picture, Section, Table, Text
from locft.report.words import one_line

READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def make_page(text: str) -> Page:
    """Put one text everywhere that a page has room for one."""
    table = Table(
        columns=("name", text), rows=((text, "x"), ("x", text), (text, text)), left_out=f"And {text}"
    )
    return Page(
        title=f"1 edit in {text}",
        verdict=f"So: {text}.",
        tiles=(),
        sections=(
            Section(title=f"Scores ({text})", blocks=(table, Text(f"By {text}."))),
            Section(title="Nothing", blocks=()),
            Section(
                title="Answers",
                blocks=(
                    Picture(svg=f"<svg>{text}</svg>", title=text, alt=text),
                    Fold(title=f"Group {text}", blocks=(table, Text(f"And {text}"))),
                    Command(f"locft {text}"),
                ),
            ),
        ),
    )


def blocks(drawn: str) -> list[Token]:
    return READER.parse(drawn)


def outline(drawn: str) -> list[tuple[str, str]]:
    """Tell what a reader of Markdown takes the lines to be."""
    return [(token.type, token.tag) for token in blocks(drawn)]


def texts(drawn: str, within: str) -> Iterator[tuple[str, list[Token]]]:
    """Find what stands within blocks of some type, as a reader shows it, and what it is made of."""
    tokens = blocks(drawn)
    for opening, inline in itertools.pairwise(tokens):
        if opening.type == f"{within}_open" and inline.type == "inline":
            parts = [*(inline.children or ())]
            yield "".join(part.content for part in parts), parts


def read_tables(drawn: str) -> list[list[list[str]]]:
    """Read all tables, the header first."""
    tables: list[list[list[str]]] = []
    for token in blocks(drawn):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline" and token.level > 2:
            tables[-1][-1].append("".join(part.content for part in token.children or ()))
    return tables


@given(
    st.text(st.characters(), max_size=40)
    | st.text(st.sampled_from("ab1 |\\`*_{}[]()<>#+-.!~$&:;=^\"'/\n\r\t\x00\u202e\u200d"), max_size=40)
)
@settings(deadline=None)
def test_whatever_the_text_every_line_stays_what_it_is_and_shows_the_text(text: str) -> None:
    plain, drawn = draw_markdown(make_page("plain")), draw_markdown(make_page(text))
    assert drawn.count("\n") == plain.count("\n")
    assert len(drawn.splitlines()) == len(plain.splitlines())
    assert outline(drawn) == outline(plain)
    shown = one_line(text).strip()
    for within in ("td", "th", "heading", "paragraph"):
        for found, parts in texts(drawn, within):
            kinds = {part.type for part in parts}
            assert kinds <= {"text", "strong_open", "strong_close"}
            assert within == "paragraph" or kinds <= {"text"}
            assert found in ("x", "name", "Answers") or shown in " ".join(found.split("\n"))
    for table in read_tables(drawn):
        assert table == [["name", shown], [shown, "x"], ["x", shown], [shown, shown]]


@pytest.mark.parametrize("text", HOSTILE, ids=named)
def test_any_text_of_a_run_stays_in_its_cell_or_line(text: str) -> None:
    def draw(text: str) -> str:
        evaluation = Evaluated(name=text, report=make_evaluation(text), answers=())
        with pictures_blank():
            page = describe_edit(make_report(text), [make_answer(text)], [evaluation])
        return draw_markdown(page)

    plain, drawn = draw("plain"), draw(text)
    assert outline(drawn) == outline(plain)
    assert len(drawn.splitlines()) == len(drawn.split("\n")) - 1 == len(plain.splitlines())
    assert [[len(row) for row in table] for table in read_tables(drawn)] == [
        [len(row) for row in table] for table in read_tables(plain)
    ]
    for steering in "\x1b\u202e\x00\ud800":
        assert steering not in drawn
    kinds = {part.type for token in blocks(drawn) for part in token.children or ()}
    assert kinds == {"text", "strong_open", "strong_close"}


@pytest.mark.parametrize("text", HOSTILE, ids=named)
def test_any_text_of_an_evaluation_or_comparison_stays_in_its_cell_or_line(text: str) -> None:
    def draw(text: str) -> str:
        with pictures_blank():
            pages = (
                describe_evaluation(make_evaluation(text), make_answers(text)),
                describe_comparison(make_comparison(text)),
            )
        return "\n".join(map(draw_markdown, pages))

    plain, drawn = draw("plain"), draw(text)
    assert outline(drawn) == outline(plain)
    assert len(drawn.splitlines()) == len(plain.splitlines())


def test_a_text_that_looks_like_markdown_is_shown_as_it_is() -> None:
    cell = r"`a` *b* _c_ {d} <e> | #f ~~g~~ $h$ &amp; \ [i](j) [k][l] [m]: n"
    with pictures_blank():
        drawn = draw_markdown(describe_edit(make_report(), [make_answer(cell)]))
    answers = next(table for table in read_tables(drawn) if table[0][0] == "prompt")
    assert answers[1] == [cell] * 4


def test_a_bracket_is_escaped_only_where_a_link_could_form() -> None:
    page = make_page("97.0% [93.6, 98.6] of 200, [a](b), [c][d], [e]: f, [g] (h)")
    assert r"97.0% [93.6, 98.6] of 200, [a\](b), [c\][d], [e\]: f, [g] (h)" in draw_markdown(page)


def test_a_long_text_is_shortened_in_a_table_and_whole_in_a_paragraph() -> None:
    text = "word " * 2000
    drawn = draw_markdown(make_page(text))
    cell = read_tables(drawn)[0][1][0]
    assert len(cell) <= 200
    assert cell.startswith("word word")
    assert cell.endswith("…")
    assert f"By {text}." in drawn


def test_a_section_without_blocks_and_pictures_are_not_drawn() -> None:
    drawn = draw_markdown(make_page("plain"))
    assert "Nothing" not in drawn
    assert "svg" not in drawn
    only_a_picture = Section(title="Seen", blocks=(Picture(svg="<svg></svg>", title="t", alt="a"),))
    page = Page(title="t", verdict="v", tiles=(), sections=(only_a_picture,))
    assert draw_markdown(page) == "# t\n\n**v**\n"


def test_a_page_is_drawn_line_by_line() -> None:
    table = [
        "| name | plain |",
        "|---|---|",
        "| plain | x |",
        "| x | plain |",
        "| plain | plain |",
        "",
        "And plain",
    ]
    assert draw_markdown(make_page("plain")).splitlines() == [
        "# 1 edit in plain",
        "",
        "**So: plain.**",
        "",
        "## Scores (plain)",
        "",
        *table,
        "",
        "By plain.",
        "",
        "## Answers",
        "",
        "### Group plain",
        "",
        *table,
        "",
        "And plain",
        "",
        "    locft plain",
    ]
    assert draw_markdown(make_page("plain")).endswith("    locft plain\n")
    assert not re.search(r"\n{3}", draw_markdown(make_page("plain")))
