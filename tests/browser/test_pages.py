"""What a report looks like in a browser: on a phone, in the dark, on paper, without scripts, by keys."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from browser.harness import DESKTOP, PHONE, Viewer
from browser.pages import PAGES, smallest_pages
from locft.report.html import draw_html

pytestmark = pytest.mark.browser

# WCAG 2.1, success criterion 1.4.3, level AA.
_LEAST_CONTRAST = 4.5
_SMALLEST_PX = 8
_INKS = """() => {
    const isWritten = each => each.nodeType === Node.TEXT_NODE && each.data.trim();
    const shown = [...document.querySelectorAll('body *')]
        .filter(one => one.checkVisibility() && [...one.childNodes].some(isWritten));
    const behind = one => {
        for (let each = one; each; each = each.parentElement) {
            const colour = getComputedStyle(each).backgroundColor;
            if (colour !== 'rgba(0, 0, 0, 0)') return colour;
        }
        return 'none';
    };
    return shown.map(one => {
        const style = getComputedStyle(one);
        const isDrawn = one.closest('svg') !== null;
        return [one.localName, isDrawn ? style.fill : style.color, behind(one), style.opacity];
    });
}"""
_LABELS = """() => [...document.querySelectorAll('svg')].map(svg => [...svg.querySelectorAll('text')]
    .filter(one => one.textContent.trim())
    .map(one => {
        const box = one.getBoundingClientRect();
        const matrix = one.getScreenCTM();
        const size = parseFloat(getComputedStyle(one).fontSize) * Math.hypot(matrix.a, matrix.b);
        return [one.textContent, box.left, box.top, box.right, box.bottom, size];
    }))"""
_EMPTY = """() => {
    for (const one of document.querySelectorAll('details')) one.open = true;
    const isEmpty = one => {
        const box = one.getBoundingClientRect();
        return box.width < 1 || box.height < 1 || !one.textContent.trim();
    };
    const boxes = 'header, main, section, section > div, h1, h2, p, dl, dl > div, figure, svg, '
        + 'figcaption, table, tbody, tr, details, summary, pre, .scroll, .pictures';
    return [
        ...[...document.querySelectorAll(boxes)].filter(isEmpty),
        ...[...document.querySelectorAll('section')].filter(one => one.children.length < 2),
        ...[...document.querySelectorAll('details')].filter(one => one.children.length < 2),
        ...[...document.querySelectorAll('table')].filter(one => !one.tBodies[0]?.rows.length),
    ].map(one => one.outerHTML.slice(0, 300));
}"""

_CARDS = """() => {
    for (const one of document.querySelectorAll('details')) one.open = true;
    const cells = [...document.querySelectorAll('.stacks tbody :is(th, td):not(:empty)')];
    const scrolled = [...document.querySelectorAll('.scroll')]
        .filter(one => one.scrollWidth > one.clientWidth);
    return {
        cells: cells.map(one => [
            one.textContent,
            one.getBoundingClientRect().left,
            one.getBoundingClientRect().right,
            one.scrollWidth - one.clientWidth,
        ]),
        unlabelled: cells.filter(one => one.localName === 'td').filter(one => {
            const columns = one.closest('table').tHead.rows[0].cells;
            const before = getComputedStyle(one, '::before');
            return before.content !== JSON.stringify(columns[one.cellIndex].textContent)
                || before.display !== 'block';
        }).map(one => one.outerHTML),
        scrolled: scrolled.map(one => one.querySelector('thead').rows[0].cells.length),
    };
}"""
_TABLE_ROLES = ("table", "rowgroup", "row", "columnheader", "rowheader", "cell")


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {kind: draw_html(make()) for kind, make in PAGES.items()}


def contrast(ink: str, paper: str) -> float:
    """Give the contrast of two colours (WCAG 2.1, relative luminance)."""
    brighter, darker = sorted((_luminance(ink), _luminance(paper)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    found = re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour)
    assert found is not None, f"{colour} is not opaque"
    shares = [int(part) / 255 for part in found.groups()]
    red, green, blue = (
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def overlaps(labels: list[Any]) -> Iterator[tuple[str, str]]:
    """Name the texts of a picture that cover each other by more than a pixel."""
    for number, (text, left, top, right, bottom, _) in enumerate(labels):
        for other, left2, top2, right2, bottom2, _ in labels[number + 1 :]:
            if min(right, right2) - max(left, left2) > 1 and min(bottom, bottom2) - max(top, top2) > 1:
                yield text, other


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark", "paper"])
def test_every_text_stands_out_from_its_background(
    viewer: Viewer, pages: dict[str, str], kind: str, scheme: str
) -> None:
    is_paper = scheme == "paper"
    viewer.tab.emulate_media(
        color_scheme="dark" if is_paper else scheme, media="print" if is_paper else "screen"
    )
    try:
        viewer.show(pages[kind])
        inks = viewer.tab.evaluate(_INKS)
    finally:
        viewer.tab.emulate_media(color_scheme="light", media="screen")
    assert {"h1", "td", "figcaption", "text"} <= {name for name, *_ in inks}
    faint = {
        (name, ink, paper)
        for name, ink, paper, opacity in inks
        if opacity != "1" or contrast(ink, paper) < _LEAST_CONTRAST
    }
    assert faint == set()


def test_colours_are_those_of_the_readers_scheme(viewer: Viewer, pages: dict[str, str]) -> None:
    viewer.show(pages["edit run"])
    papers = {}
    for scheme in ("dark", "light"):
        viewer.tab.emulate_media(color_scheme=scheme)
        papers[scheme] = viewer.tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert _luminance(papers["light"]) > 0.9
    assert _luminance(papers["dark"]) < 0.05


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_labels_in_pictures_can_be_read(
    viewer: Viewer, pages: dict[str, str], kind: str, width: int
) -> None:
    viewer.show(pages[kind], width)
    pictures = viewer.tab.evaluate(_LABELS)
    assert pictures
    for labels in pictures:
        assert list(overlaps(labels)) == []
        assert min(size for *_, size in labels) >= _SMALLEST_PX
        assert all(left >= 0 and right <= width for _, left, _, right, _, _ in labels)


@pytest.mark.parametrize("kind", PAGES)
def test_no_page_scrolls_sideways(viewer: Viewer, pages: dict[str, str], kind: str) -> None:
    for width in (PHONE, DESKTOP):
        viewer.show(pages[kind], width)
        assert viewer.tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("kind", PAGES)
def test_rows_of_wide_tables_are_cards_on_a_phone(
    viewer: Viewer, pages: dict[str, str], kind: str
) -> None:
    viewer.show(pages[kind], PHONE)
    found = viewer.tab.evaluate(_CARDS)
    assert found["cells"]
    for text, left, right, hidden in found["cells"]:
        assert left >= 0, text
        assert right <= PHONE, text
        assert hidden <= 0, text
    assert found["unlabelled"] == []
    assert all(num_columns <= 3 for num_columns in found["scrolled"])


def test_cards_are_read_aloud_as_the_table_that_they_are(viewer: Viewer, pages: dict[str, str]) -> None:
    viewer.show(pages["edit run"])
    viewer.tab.evaluate("document.querySelectorAll('td:empty').forEach(one => one.append('-'))")
    reader = viewer.tab.context.new_cdp_session(viewer.tab)
    told = {}
    for width in (DESKTOP, PHONE):
        viewer.resize(width)
        nodes = reader.send("Accessibility.getFullAXTree")["nodes"]
        roles = Counter(node["role"]["value"] for node in nodes if not node["ignored"])
        told[width] = {role: roles[role] for role in _TABLE_ROLES}
    reader.detach()
    assert told[PHONE] == told[DESKTOP]
    assert min(told[PHONE].values()) > 0


@pytest.mark.parametrize("kind", smallest_pages())
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_no_box_is_empty_where_little_was_measured(viewer: Viewer, kind: str, width: int) -> None:
    viewer.show(draw_html(smallest_pages()[kind]), width)
    assert viewer.tab.evaluate(_EMPTY) == []


@pytest.mark.parametrize("kind", PAGES)
def test_no_box_is_empty_where_all_was_measured(
    viewer: Viewer, pages: dict[str, str], kind: str
) -> None:
    viewer.show(pages[kind])
    assert viewer.tab.evaluate(_EMPTY) == []


def test_a_page_is_the_same_without_scripts(
    viewer: Viewer, pages: dict[str, str], open_viewer: Callable[..., Viewer]
) -> None:
    plain = open_viewer(java_script_enabled=False)
    for one in (viewer, plain):
        one.show(pages["edit run"])
    assert plain.tab.screenshot() == viewer.tab.screenshot()
    closed = plain.tab.locator("details:not([open])").first
    assert not closed.locator("table").is_visible()
    summary = closed.locator("summary").element_handle()
    summary.click()
    assert summary.query_selector("xpath=..//table").is_visible()


def test_all_that_opens_or_scrolls_is_reached_by_the_keyboard(
    viewer: Viewer, pages: dict[str, str]
) -> None:
    viewer.show(pages["edit run"])
    wanted = viewer.tab.evaluate(
        "[...document.querySelectorAll('summary, .scroll, pre')]"
        ".filter(one => one.checkVisibility()).length"
    )
    viewer.tab.evaluate("window.reached = new Set()")
    for _ in range(wanted):
        viewer.tab.keyboard.press("Tab")
        viewer.tab.evaluate("reached.add(document.activeElement)")
    reached = viewer.tab.evaluate(
        "[...reached].filter(one => one.matches('summary, .scroll, pre')).length"
    )
    assert reached == wanted


def test_a_key_opens_what_is_closed(viewer: Viewer, pages: dict[str, str]) -> None:
    viewer.show(pages["edit run"])
    closed = viewer.tab.locator("details:not([open])")
    before = closed.count()
    closed.first.locator("summary").focus()
    viewer.tab.keyboard.press("Enter")
    assert closed.count() == before - 1


def test_what_is_closed_is_on_paper_too(viewer: Viewer, pages: dict[str, str]) -> None:
    viewer.show(pages["edit run"])
    tables = viewer.tab.locator("details:not([open]) table").all()
    assert tables
    assert not any(table.is_visible() for table in tables)
    try:
        viewer.tab.emulate_media(media="print")
        boxes = [table.bounding_box() for table in tables]
    finally:
        viewer.tab.emulate_media(media="screen")
    assert all(box is not None and box["height"] > 0 for box in boxes)


def test_a_page_can_be_printed(viewer: Viewer, pages: dict[str, str]) -> None:
    viewer.show(pages["edit run"])
    printed = viewer.tab.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    assert viewer.notes == []
