"""What a report consists of, whatever it is drawn as: sections of tables, texts and pictures.

Texts are plain: no character has a meaning in them, whoever wrote them, and each way of drawing sees to
it that none gets one.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a header; its first column names the rows.

    Attributes:
        columns: The header.
        rows: As many texts each as there are columns.
        left_out: What was left out, and where it is; nothing if all is there.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left_out: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Command:
    """A line for a terminal."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture, which tables beside it put in numbers.

    Attributes:
        svg: The picture, without any text of users that would not be escaped.
        title: What it shows.
        alt: The same for who cannot see it, with the main figures.
    """

    svg: str
    title: str
    alt: str


@dataclass(frozen=True, kw_only=True)
class Fold:
    """What one may open: a title, and what it covers."""

    title: str
    blocks: tuple["Block", ...]
    is_open: bool = False


Block = Table | Text | Command | Picture | Fold


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page; one without blocks is not drawn."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A figure to be seen first.

    Attributes:
        name: What it is called.
        value: What it is.
        note: Its interval and count.
        change: How it changed; nothing if there is nothing to compare.
    """

    name: str
    value: str
    note: str
    change: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole report."""

    title: str
    verdict: str
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]
