"""Draws a page as Markdown, readable in a terminal and on a forge. Pictures are left to HTML."""

import re
from collections.abc import Iterator

from locft.report.page import Block, Command, Fold, Page, Picture, Table, Text
from locft.report.words import one_line


def draw_markdown(page: Page) -> str:
    """Draw a page.

    Args:
        page: The page.

    Returns:
        The text of `report.md`.
    """
    lines = [f"# {_escape(page.title)}", "", f"**{_escape(page.verdict, limit=None)}**", ""]
    for section in page.sections:
        blocks = [line for block in section.blocks for line in _draw(block, level=3)]
        if blocks:
            lines += [f"## {_escape(section.title)}", "", *blocks]
    return "\n".join(lines[:-1]) + "\n"


def _draw(block: Block, level: int) -> Iterator[str]:
    match block:
        case Text(text):
            yield from (_escape(text, limit=None), "")
        case Command(text):
            yield from (f"    {one_line(text, limit=None)}", "")
        case Table():
            yield _row(map(_escape, block.columns))
            yield "|" + "---|" * len(block.columns)
            for row in block.rows:
                yield _row(map(_escape, row))
            yield ""
            if block.left_out:
                yield from (_escape(block.left_out), "")
        case Fold():
            yield from (f"{'#' * level} {_escape(block.title)}", "")
            for part in block.blocks:
                yield from _draw(part, level + 1)
        case Picture():
            return


def _row(cells: Iterator[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str, limit: int | None = 200) -> str:
    """Let any text stand in a line or a cell as what it is; a bracket needs help only in a link."""
    return re.sub(r"[\\`*_{}<>|#~$&]|\](?=[(\[:])", r"\\\g<0>", one_line(text, limit=limit))
