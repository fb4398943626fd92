"""Reads the values that a picture shows back from its SVG alone, by the labels of its axes."""

import math
import re
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from locft.report.page import Picture

Way = Literal["x", "y"]
Point = tuple[float, float]

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
_OFFSET = re.compile(r"(?:1e([-+]?\d+))?([-+]\d+(?:\.\d+)?(?:e[-+]?\d+)?)?")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """How places become values.

    Attributes:
        ticks: Place and label of each tick that has a label.
        factor: What labels are to be multiplied by.
        offset: What is to be added then.
    """

    ticks: tuple[tuple[float, str], ...]
    factor: float
    offset: float

    @property
    def labels(self) -> list[str]:
        """The labels."""
        return [label for _, label in self.ticks]

    def value(self, place: float) -> float:
        """Read a value off, on a linear or a logarithmic scale, as the labels say."""
        (first, low), *_, (last, high) = self._numbers()
        part = (place - first) / (last - first)
        if self.is_log:
            return float(low * (high / low) ** part)
        return low + (high - low) * part

    @property
    def resolution(self) -> float:
        """How far a value may be off, since places are written with six decimals."""
        (first, low), *_, (last, high) = self._numbers()
        return 1e-5 * abs(high - low) / abs(last - first) * 100

    @property
    def is_log(self) -> bool:
        """Whether equal ways are equal factors."""
        numbers = self._numbers()
        if len(numbers) < 3:
            is_power = all(math.isclose(math.log10(n) % 1, 0, abs_tol=1e-9) for _, n in numbers if n > 0)
            return is_power and numbers[0][1] > 0 and numbers[1][1] / numbers[0][1] >= 10
        (a, first), (b, second), *_, (c, last) = numbers
        return not math.isclose((b - a) / (c - a), (second - first) / (last - first), abs_tol=1e-3)

    def _numbers(self) -> list[tuple[float, float]]:
        assert len(self.ticks) >= 2, f"an axis with the labels {self.labels} tells no scale"
        return [(place, self.factor * float(label) + self.offset) for place, label in self.ticks]


class Drawn:
    """A picture, read."""

    def __init__(self, picture: Picture) -> None:
        self.root = ElementTree.fromstring(picture.svg)
        self.texts = ["".join(part.itertext()) for part in self.root.iter("text")]
        self._groups = [
            (re.sub(r"\s", "-", part.get("id", "")), part)
            for part in self.root.iter("g")
            if part.get("id") is not None
        ]

    def group(self, name: str) -> ElementTree.Element | None:
        """Find what was drawn under a name, None if nothing was."""
        ending = re.compile(rf"(?:^|-){re.escape(name)}$")
        found = [part for id_, part in self._groups if ending.search(id_)]
        assert len(found) <= 1
        return found[0] if found else None

    def axis(self, way: Way) -> Axis:
        """Read an axis."""
        (group,) = (part for id_, part in self._groups if id_.endswith(f"axis_{'xy'.index(way) + 1}"))
        ticks = []
        factor, offset = 1.0, 0.0
        for part in group.findall("g"):
            label = "".join(part.itertext()).strip().replace("\u2212", "-")
            if re.search(rf"-{way}tick_\d+$", part.get("id", "")):
                use = part.find(".//use")
                assert use is not None
                if label:
                    ticks.append((float(use.attrib[way]), label))
            elif label and (found := _OFFSET.fullmatch(label)):
                factor = 10.0 ** int(found[1] or 0)
                offset = float(found[2] or 0)
        return Axis(ticks=tuple(ticks), factor=factor, offset=offset)

    def marks(self, name: str) -> list[Point]:
        """Find the places of the marks under a name."""
        group = self.group(name)
        assert group is not None, f"{name} is not drawn"
        return [(float(use.attrib["x"]), float(use.attrib["y"])) for use in group.iter("use")]

    def line(self, name: str) -> list[Point]:
        """Find the places that the line under a name goes through."""
        group = self.group(name)
        assert group is not None, f"{name} is not drawn"
        path = group.find("path")
        assert path is not None
        return places(path)

    def before(self, name: str, num: int = 1) -> list[list[Point]]:
        """Find the lines without a name that were drawn right before what has one, at most so many."""
        group = self.group(name)
        parents = {child: parent for parent in self.root.iter() for child in parent}
        assert group is not None
        siblings = list(parents[group])
        at = siblings.index(group)
        found: list[list[Point]] = []
        for part in reversed(siblings[:at]):
            path = part.find("path")
            is_unnamed = re.search(r"-line2d_\d+$", part.get("id", "")) is not None
            if len(found) == num or not is_unnamed or path is None:
                break
            found.insert(0, places(path))
        return found


def places(path: ElementTree.Element) -> list[Point]:
    """Read the places of a path of straight lines."""
    words = path.attrib["d"].split()
    assert set(words) - {"M", "L", "z"} == {word for word in words if _NUMBER.fullmatch(word)}
    numbers = [float(word) for word in words if word not in ("M", "L", "z")]
    return list(zip(numbers[::2], numbers[1::2], strict=True))
