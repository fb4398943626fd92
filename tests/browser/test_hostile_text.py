"""Whatever stands in the texts of users and models, a report shows it as text."""

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from browser.harness import DESKTOP, PHONE, Viewer, without_policy
from browser.pages import PAGES, page_full_of, pictures_page, shown_texts
from browser.payloads import NOTICED, PAYLOADS
from locft.report.html import draw_html
from locft.report.page import Page
from locft.report.words import one_line

pytestmark = pytest.mark.browser

_LOOK = """() => {
    const all = [...document.querySelectorAll('*')];
    const apart = all.filter(one => !one.parentElement?.closest('svg'));
    const drawn = all.filter(one => one.closest('svg'));
    const ids = all.map(one => one.id).filter(id => id);
    const links = drawn.map(one => one.getAttribute('href')).filter(link => link !== null);
    const clips = drawn.map(one => (one.getAttribute('clip-path') || '').slice(5, -1)).filter(x => x);
    const named = all.map(one => one.getAttribute('aria-labelledby')).filter(id => id);
    const attributes = one => [...one.attributes]
        .filter(each => each.name + each.value !== 'classlong')  // of cells with long words
        .map(each => each.name).sort().join(' ');
    return JSON.stringify({  // playwright takes long over lists
        pwned: String(window.pwned),
        title: document.querySelector('title').textContent,
        texts: [...document.querySelectorAll('h1, h2, p, summary, th, td, code, figcaption, dt')]
            .map(one => one.textContent),
        seen: [...document.querySelectorAll('details[open] td')].slice(0, 1).map(one => one.innerText),
        apart: apart.map(one => one.localName + ' ' + attributes(one)),
        drawn: [...new Set(drawn.map(one => one.localName))].sort(),
        handlers: all.flatMap(one => [...one.attributes]).map(each => each.name)
            .filter(name => name.startsWith('on') || ['src', 'srcdoc', 'action', 'data'].includes(name)),
        twice: ids.filter((id, at) => ids.indexOf(id) !== at),
        lost: [...links.map(link => link.slice(1)), ...clips, ...named]
            .filter(id => !ids.includes(id)),
        outside: links.filter(link => !link.startsWith('#')),
        width: document.documentElement.scrollWidth - innerWidth,
        cut: [...document.querySelectorAll('svg text')]
            .map(one => [one.getBoundingClientRect(), one.textContent])
            .filter(([box]) => box.left < 0 || box.right > innerWidth).map(([, text]) => text),
        frames: window.frames.length,
    });
}"""
_POLICY = "meta content http-equiv"
_PER_PICTURE = 36
_LONGEST_LABEL = 24  # as locft.report.pictures has it
_DRAWN = {"svg", "g", "path", "text", "defs", "clipPath", "use", "rect"}


def look(viewer: Viewer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(viewer.tab.evaluate(_LOOK))
    return found


def faults_of(viewer: Viewer, bare_viewer: Viewer, page: Page, elements: list[str]) -> list[str]:
    """Show a page, with its policy on a phone, and without it on a desktop, and say what is wrong."""
    html = draw_html(page)
    texts = shown_texts(page)
    faults = []
    for how, tab, width in (("with policy", viewer, PHONE), ("without", bare_viewer, DESKTOP)):
        if tab is viewer:
            tab.show(html, width)
        else:
            tab.write(without_policy(html), width)
        found = look(tab)
        wrong = list(tab.notes)
        if found["pwned"] != "undefined":
            wrong.append("it ran a script")
        if found["title"] != texts[0]:
            wrong.append(f"its title is {found['title'][:100]!r}")
        if found["texts"] != texts:
            pairs = zip(found["texts"], texts, strict=False)
            first = next((pair for pair in pairs if pair[0] != pair[1]), "their number differs")
            wrong.append(f"texts are not shown as they are: {str(first)[:300]}")
        if found["apart"] != [one for one in elements if tab is viewer or one != _POLICY]:
            wrong.append(f"elements are not those of plain text: {len(found['apart'])}, {len(elements)}")
        if not set(found["drawn"]) <= _DRAWN:
            wrong.append(f"pictures hold {found['drawn']}")
        kinds = ("handlers", "twice", "lost", "outside")
        wrong += [f"{kind}: {str(found[kind])[:300]}" for kind in kinds if found[kind]]
        if found["width"] > 0 or found["cut"]:
            wrong.append(f"it is {found['width']} px too wide at {width}, cuts {found['cut']}")
        if found["frames"]:
            wrong.append("it has frames")
        faults += [f"{how}: {one}" for one in wrong]
    return faults


def elements_of(viewer: Viewer, page: Page) -> list[str]:
    viewer.show(draw_html(page))
    elements: list[str] = look(viewer)["apart"]
    return elements


def test_no_text_becomes_more_than_text_wherever_it_stands(viewer: Viewer, bare_viewer: Viewer) -> None:
    elements = elements_of(viewer, page_full_of("plain"))
    faults = [
        f"{name}: {fault}"
        for name, text in PAYLOADS.items()
        for fault in faults_of(viewer, bare_viewer, page_full_of(text), elements)
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("start", range(0, len(PAYLOADS), _PER_PICTURE))
def test_no_text_becomes_more_than_text_in_pictures(
    viewer: Viewer, bare_viewer: Viewer, start: int
) -> None:
    # Signs as wide as ten letters run out of a picture: how wide they are is up to the browser's fonts.
    texts = [text for name, text in PAYLOADS.items() if name != "widest signs"]
    texts = texts[start : start + _PER_PICTURE]
    plain = pictures_page([f"plain {number}" for number in range(len(texts))])
    assert faults_of(viewer, bare_viewer, pictures_page(texts), elements_of(viewer, plain)) == []
    labels = viewer.tab.locator("svg text").all_text_contents()
    for text in texts:
        assert labels.count(one_line(text, limit=_LONGEST_LABEL)) >= 3, text[:100]


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize("name", ["script", "double quote and bracket", "long word", "mixed scripts"])
def test_no_text_becomes_more_than_text_on_any_page(
    viewer: Viewer, bare_viewer: Viewer, kind: str, name: str
) -> None:
    make = PAGES[kind]
    elements = elements_of(viewer, make("plain"))
    assert faults_of(viewer, bare_viewer, make(PAYLOADS[name]), elements) == []


@pytest.mark.parametrize(("name", "sign"), NOTICED.items())
def test_a_text_that_gets_through_is_noticed(
    open_viewer: Callable[..., Viewer], name: str, sign: str
) -> None:
    """The tests above would see it if nothing were escaped, and the policy alone would stop it."""
    from playwright.sync_api import Error

    viewer = open_viewer()
    page = page_full_of("plain")
    html = draw_html(page).replace("<main>", f"<main>{PAYLOADS[name]}", 1)
    with suppress(Error):  # it may lead elsewhere before it is loaded
        viewer.write(without_policy(html))
    if sign == "script":
        viewer.tab.wait_for_function("window.pwned === 1")
        return
    for _ in range(100):  # what leads elsewhere may take a while
        if any(note.startswith(f"{sign}:") for note in viewer.notes):
            return
        viewer.tab.wait_for_timeout(50)
    pytest.fail(f"only noticed {viewer.notes}")


def test_distinct_payloads_are_many() -> None:
    assert len(set(PAYLOADS.values())) >= 60
