"""Texts that try to be more than texts, and drawings without the time that they take."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from unittest.mock import MagicMock

import pytest

from locft.report import pictures
from locft.report.page import Picture

HOSTILE = (
    "a | b || c",
    r"a \| b \\| c \\",
    "`code` and ``| more``",
    "<script>alert(1)</script> <!-- gone",
    "</td></tr></table></style></svg>\"><img src=x onerror='alert(1)'>",
    "two\nlines\r\nand\x0bmore\u2028end\u0085",
    "[link](http://example.invalid) ![image](x) [r][1] [d]: http://example.invalid",
    "# heading\n\n## other\n- list\n1. list\n> said",
    "**bold** _it_ ~~gone~~ $x$ $\\frac",
    "x" * 5000,
    "|" * 5000,
    "\x1b[31mred\x1b[0m \u202egnp.exe \x00 \ud800",
    "---|---",
    "{{ 7 * 7 }} {% raw %} {# gone #} {%",
    "AT&amp;T &lt;b&gt; &#124;",
    "",
    " ",
)


def named(text: str) -> str:
    """Name a test's parameter."""
    return ascii(text[:12])


@contextmanager
def pictures_blank() -> Iterator[None]:
    """Leave pictures as they are but for their SVG, which takes nearly all of the time."""

    def finish(_: object, title: str, alt: str) -> Picture:
        return Picture(svg="<svg></svg>", title=title, alt=alt)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pictures, "_canvas", lambda _: (MagicMock(), MagicMock()))
        patched.setattr(pictures, "_finish", finish)
        yield


def page_colours() -> frozenset[str]:
    """Give the names of the colours that a page has."""
    style = resources.files("locft.report").joinpath("templates", "page.css").read_text("utf-8")
    return frozenset(re.findall(r"--([\w-]+):", style))
