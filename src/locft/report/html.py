"""Draws a page as one HTML file that needs nothing else: no network, no script, no other file.

Every text is escaped by the template engine; only pictures, which are made here, go in as they are. What
a browser is allowed to do with the file is said in it, too: show it, and nothing else.
"""

from collections.abc import Sequence
from functools import cache
from importlib import resources

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from locft.report.page import Block, Page, Picture
from locft.report.words import one_line

_LONGEST_CELL = 600
_LONGEST_WORD = 20


def draw_html(page: Page) -> str:
    """Draw a page.

    Args:
        page: The page.

    Returns:
        The text of `report.html`.
    """
    return _template().render(page=page, style=Markup(_resource("page.css"))) + "\n"


def _has_long_word(text: str) -> bool:
    """Tell whether a cell has to break a word rather than to widen its table."""
    return max(map(len, text.split()), default=0) > _LONGEST_WORD


def _kind(block: Block) -> str:
    """Name what the template draws a block as."""
    return type(block).__name__.lower()


def _beside_each_other(blocks: Sequence[Block]) -> list[list[Block]]:
    """Put pictures that follow each other into one group, and every other block into its own."""
    groups: list[list[Block]] = []
    for block in blocks:
        if groups and isinstance(block, Picture) and isinstance(groups[-1][0], Picture):
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["one_line"] = lambda text: one_line(text, limit=_LONGEST_CELL)
    environment.filters["has_long_word"] = _has_long_word
    environment.filters["picture"] = Markup
    environment.filters["kind"] = _kind
    environment.filters["beside_each_other"] = _beside_each_other
    return environment.from_string(_resource("page.html.j2"))


def _resource(name: str) -> str:
    return resources.files("locft.report").joinpath("templates", name).read_text("utf-8")
