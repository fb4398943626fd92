"""Reads an HTML file as strictly as XML: every element is closed where it must be."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = frozenset({"meta", "link", "img", "br", "hr", "input", "base"})


@dataclass
class Element:
    """An element.

    Attributes:
        tag: Its name.
        attributes: What it was given, unescaped.
        parts: Texts and elements, in their order.
    """

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    parts: "list[Element | str]" = field(default_factory=list)

    def __getitem__(self, name: str) -> str:
        return self.attributes[name]

    def get(self, name: str) -> str | None:
        """Give an attribute, None if there is no such one."""
        return self.attributes.get(name)

    @property
    def children(self) -> "list[Element]":
        """The elements right within it."""
        return [part for part in self.parts if isinstance(part, Element)]

    @property
    def text(self) -> str:
        """All text within it."""
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)

    def all(self, *tags: str) -> "Iterator[Element]":
        """Find elements within it, those of some names if any are given."""
        for child in self.children:
            if not tags or child.tag in tags:
                yield child
            yield from child.all(*tags)

    def one(self, tag: str) -> "Element":
        """Find the only element of a name."""
        (found,) = self.all(tag)
        return found

    def labelled(self, title: str) -> "Element":
        """Find the section under a heading."""
        (found,) = (part for part in self.all("section") if part.children[0].text == title)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("")]
        self.declarations: list[str] = []
        self.comments: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag}: an attribute is given twice"
        element = Element(tag, {name: "" if value is None else value for name, value in attrs})
        self.open[-1].parts.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert any(element.tag == "svg" for element in self.open), f"{tag}: closes itself beyond SVG"
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> within {self.open[-1].tag}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].parts.append(data)

    def handle_decl(self, decl: str) -> None:
        self.declarations.append(decl)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def read_html(text: str) -> Element:
    """Read a file.

    Args:
        text: All of it.

    Returns:
        Its `html` element.
    """
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.declarations == ["doctype html"]
    assert reader.comments == []
    (root,) = reader.open
    (html,) = root.children
    return html


def read_tables(within: Element) -> list[list[list[str]]]:
    """Read all tables, the header first."""
    return [
        [[cell.text for cell in row.children] for row in table.all("tr")]
        for table in within.all("table")
    ]
