"""Draws figures as SVG that takes the colours of the page around it, in light and in dark."""

import functools
import hashlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, TypeVar
from xml.etree import ElementTree

from locft.report.page import Picture
from locft.report.words import change_text, counted, figure_text, one_line
from locft.types import Epoch, Figure

if TYPE_CHECKING:  # it takes half a second to load
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

Given = ParamSpec("Given")
Made = TypeVar("Made")

# Of a phone's width; a page puts two side by side where it has the room.
_WIDTH_IN = 4.6
_WIDE_IN = 9.4  # of a page's width
_COLUMNS = 3  # of small pictures
_POINTS_PER_INCH = 72
# What matplotlib draws in these colours takes those that the page has under these names.
_INK, _MUTED, _LINE, _ACCENT = "#0a0101", "#0a0202", "#0a0303", "#0a0404"
_FIFTHS = ("#0a0511", "#0a0512", "#0a0513", "#0a0514", "#0a0515")
_NAMES = {
    _INK: "ink",
    _MUTED: "muted",
    _LINE: "line",
    _ACCENT: "accent",
    **{colour: f"fifth-{number}" for number, colour in enumerate(_FIFTHS, 1)},
}
_DASHES = ("-", (0, (6, 1.5)), (0, (4, 2)), (0, (2, 1.5)), (0, (1, 1.5)))
_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_MOST_MARKED = 30  # epochs that get a mark each
_MOST_ROWS = 40  # tables have them all
_LABEL_CHARS = 24
_DARKEST = 0.55  # of the accent
_APART = 0.2  # rows between two intervals that would hide each other
_HIGHEST = 1e15  # threshold that can be drawn
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_STYLE = {
    "svg.hashsalt": "locft",  # the same figures make the same bytes
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar is a dollar
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}


def _styled(draw: Callable[Given, Made]) -> Callable[Given, Made]:
    """Let a function draw in the style of reports, whatever style is set elsewhere."""

    @functools.wraps(draw)
    def drawn(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        import matplotlib

        with matplotlib.rc_context(), warnings.catch_warnings():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            return draw(*args, **kwargs)

    return drawn


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """A run on the front of generalization against drift, under a short name."""

    name: str
    generalization: Figure
    drift: Figure


@_styled
def draw_shares(
    title: str, before: Mapping[str, Figure] | None, after: Mapping[str, Figure]
) -> Picture | None:
    """Draw shares before and after, a line for each, with their intervals.

    Args:
        title: What they are.
        before: The unedited model's, by name; None if there is none.
        after: The scored model's.

    Returns:
        The picture; None where nothing was measured.
    """
    names = [name for name, figure in after.items() if figure.value is not None][:_MOST_ROWS]
    if not names:
        return None
    drawing, axes = _canvas(0.75 + 0.42 * len(names))
    early = before or {}
    for row, name in enumerate(names):
        was, now = early.get(name), after[name]
        if was is not None and was.value is not None:
            axes.plot(
                [100 * was.value, 100 * _value(now)],
                [row + _APART, row],
                color=_MUTED,
                linewidth=1,
                gid=f"change-{row}",
            )
            _point(axes, was, row, _MUTED, "before", filled=False, below=_APART)
        _point(axes, now, row, _ACCENT, "after", filled=True)
        axes.annotate(
            f"{100 * _value(now):.1f}%",
            (100 * _value(now), row),
            (0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(names)), [_label(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.7)
    axes.set_xlim(-4, 104)
    axes.set_xlabel("% (95% intervals)" + ("; ring: before, dot: after" if early else ""), loc="right")
    axes.grid(visible=False, axis="y")
    parts = [
        f"{name}: "
        + (f"{figure_text(name, early[name])} before, " if name in early else "")
        + figure_text(name, after[name])
        + (" after" if name in early else "")
        for name in names
    ]
    return _finish(drawing, title, ". ".join(parts))


@_styled
def draw_loss(course: Sequence[Epoch], stop_loss: float | None) -> Picture:
    """Draw the loss over the epochs, and the threshold that ends training."""
    from matplotlib.ticker import NullFormatter

    drawing, axes = _canvas(2.7)
    losses = [epoch.loss for epoch in course]
    axes.plot(
        [epoch.epoch for epoch in course], losses, color=_ACCENT, marker=_marker(course), gid="loss"
    )
    if min(losses) > 0 and max(losses) > 100 * min(losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if stop_loss is not None and 0 < stop_loss <= _HIGHEST:
        axes.axhline(stop_loss, color=_MUTED, linestyle=":", linewidth=1, gid="stop")
        axes.annotate(
            f"stops under {stop_loss:g}",
            (0.02, stop_loss),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=8,
            color=_MUTED,
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss (nats)")
    _whole_numbers(axes)
    alt = (
        f"The mean loss goes from {losses[0]:.3g} in the first epoch to {losses[-1]:.3g} in the last, "
        f"after {counted(len(course), 'epoch')}"
    )
    return _finish(drawing, "Loss over the epochs", alt)


@_styled
def draw_success(course: Sequence[Epoch], fifths: Sequence[int]) -> Picture:
    """Draw the teacher-forced success of each fifth of the edits (the paper's Figure 3)."""
    drawing, axes = _canvas(2.7)
    is_parted = len(fifths) > 1
    epochs = [epoch.epoch for epoch in course]
    for number, num_edits in enumerate(fifths):
        axes.plot(
            epochs,
            [100 * epoch.success[number] for epoch in course],
            color=_FIFTHS[number],
            linestyle=_DASHES[number],
            marker=_marker(course),
            markersize=3.5,
            label=f"{_ORDINALS[number]} ({num_edits:,})" if is_parted else counted(num_edits, "edit"),
            gid=f"success-{number}",
        )
    axes.set_ylim(-4, 104)
    axes.set_xlabel("epoch")
    axes.set_ylabel("% of target tokens right")
    # Beside the curves, which may run anywhere.
    drawing.legend(
        loc="outside right upper",
        fontsize=8,
        title="part (edits)" if len(fifths) > 1 else None,
        title_fontsize=8,
    )
    _whole_numbers(axes)
    last = ", ".join(f"{100 * share:.1f}%" for share in course[-1].success)
    alt = f"Share of target tokens right in the last epoch, for each part of the edits: {last}"
    return _finish(drawing, "Teacher-forced success of each fifth of the edits", alt)


@_styled
def draw_drift(by_kind: Mapping[str, Figure]) -> Picture | None:
    """Draw the drift on each kind of text, with its interval; None where nothing was measured."""
    measured = [(kind, figure) for kind, figure in by_kind.items() if figure.value is not None]
    found = dict(measured[:_MOST_ROWS])
    if not found:
        return None
    drawing, axes = _canvas(0.7 + 0.36 * len(found))
    most = max(figure.high or _value(figure) for figure in found.values())
    for row, figure in enumerate(found.values()):
        axes.barh(row, _value(figure), height=0.55, color=_ACCENT, gid=f"drift-{row}")
        if figure.low is not None and figure.high is not None:
            axes.plot(
                [figure.low, figure.high], [row, row], color=_INK, linewidth=1.2, gid=f"interval-{row}"
            )
        end = figure.high or _value(figure)
        axes.annotate(
            f"{_value(figure):.4f}",
            (end, row),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(found)), [_label(kind) for kind in found])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * most or 1)
    axes.set_xlabel("nats per token (95% intervals)", loc="right")
    axes.grid(visible=False, axis="y")
    parts = [f"{kind}: {figure_text('drift', figure)}" for kind, figure in found.items()]
    return _finish(drawing, "Drift by kind of text", ". ".join(parts))


@_styled
def draw_front(points: Sequence[FrontPoint]) -> Picture | None:
    """Draw the runs by what they carry and what they harm: up and to the left is better.

    Returns:
        The picture; None where fewer than two runs have both.
    """
    found = [p for p in points if p.generalization.value is not None and p.drift.value is not None]
    if len(found) < 2:
        return None
    drawing, axes = _canvas(3.2)
    for point in found:
        x, y = _value(point.drift), 100 * _value(point.generalization)
        across, up = point.drift, point.generalization
        if across.low is not None and across.high is not None:
            axes.plot([across.low, across.high], [y, y], color=_MUTED, linewidth=1)
        if up.low is not None and up.high is not None:
            axes.plot([x, x], [100 * up.low, 100 * up.high], color=_MUTED, linewidth=1)
        axes.plot([x], [y], marker="o", color=_ACCENT, linestyle="none", gid=f"run-{point.name}")
        axes.annotate(point.name, (x, y), (6, 5), textcoords="offset points", fontweight="bold")
    axes.set_xlabel("drift (nats per token)")
    axes.set_ylabel("generalization (%)")
    axes.margins(0.12)
    parts = [
        f"{p.name}: generalization {figure_text('generalization', p.generalization)}, drift "
        f"{figure_text('drift', p.drift)}"
        for p in found
    ]
    return _finish(
        drawing, "Generalization against drift; up and to the left is better", ". ".join(parts)
    )


@_styled
def draw_changes(title: str, changes: Mapping[str, Figure]) -> Picture | None:
    """Draw paired differences in points, with their intervals; None where there are none."""
    measured = [(name, figure) for name, figure in changes.items() if figure.value is not None]
    found = dict(measured[:_MOST_ROWS])
    if not found:
        return None
    drawing, axes = _canvas(0.75 + 0.36 * len(found))
    axes.axvline(0, color=_MUTED, linewidth=1)
    for row, figure in enumerate(found.values()):
        _point(axes, figure, row, _ACCENT, "difference", filled=True)
    axes.set_yticks(range(len(found)), [_label(name) for name in found])
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.25)
    axes.set_xlabel("points (95% intervals)", loc="right")
    axes.grid(visible=False, axis="y")
    parts = [f"{name}: {change_text(figure)} points" for name, figure in found.items()]
    return _finish(drawing, title, ". ".join(parts))


@_styled
def draw_groups(title: str, lines: Mapping[str, Mapping[str, Figure]]) -> Picture | None:
    """Draw shares of several ways, a line for each of several methods.

    Args:
        title: What they are.
        lines: The share by way, by method; not every method needs to have every way.

    Returns:
        The picture; None where nothing was measured.
    """
    found = {
        name: {way: figure for way, figure in line.items() if figure.value is not None}
        for name, line in list(lines.items())[: len(_FIFTHS)]
    }
    ways = list(dict.fromkeys(way for line in found.values() for way in line))
    if not ways:
        return None
    drawing, axes = _canvas(2.9)
    parts = []
    for number, (name, line) in enumerate(found.items()):
        # A little apart, so that no interval hides another.
        places = [ways.index(way) + 0.06 * (number - (len(found) - 1) / 2) for way in line]
        for place, figure in zip(places, line.values(), strict=True):
            if figure.low is not None and figure.high is not None:
                ends = [100 * max(0.0, figure.low), 100 * min(1.0, figure.high)]
                axes.plot([place, place], ends, color=_FIFTHS[number], linewidth=1)
        axes.plot(
            places,
            [100 * _value(figure) for figure in line.values()],
            color=_FIFTHS[number],
            linestyle=_DASHES[number],
            marker="o",
            markersize=4.5,
            label=_label(name),
            gid=f"line-{number}",
        )
        parts.append(
            f"{name}: " + ", ".join(f"{way} {100 * _value(figure):.1f}%" for way, figure in line.items())
        )
    axes.set_xticks(range(len(ways)), [_label(way) for way in ways])
    axes.set_xlim(-0.3, len(ways) - 0.7)
    axes.set_ylim(-4, 104)
    axes.set_ylabel("% (95% intervals)")
    axes.legend(fontsize=8)
    return _finish(drawing, title, ". ".join(parts))


@_styled
def draw_courses(
    title: str, courses: Mapping[str, Sequence[tuple[float, Sequence[float]]]]
) -> Picture | None:
    """Draw how each fifth of the edits is learnt, and lost, in a small picture for each way of training.

    Args:
        title: What they are.
        courses: By way, the share of the training that was done at each moment, from 0 to 1, and the
            success of each fifth then.

    Returns:
        The picture; None where there are none.
    """
    from matplotlib.figure import Figure as Drawing

    found = list(courses.items())[:_MOST_ROWS]
    if not found:
        return None
    columns = min(_COLUMNS, len(found))
    rows = -(-len(found) // columns)
    drawing = Drawing(figsize=(_WIDE_IN, 0.5 + 1.55 * rows), layout="constrained")
    grid = drawing.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for place in range(rows * columns):
        axes = grid[place // columns][place % columns]
        if place >= len(found):
            axes.set_axis_off()
            continue
        name, course = found[place]
        for fifth in range(len(course[0][1])):
            axes.plot(
                [100 * done for done, _ in course],
                [100 * success[fifth] for _, success in course],
                color=_FIFTHS[fifth],
                linestyle=_DASHES[fifth],
                linewidth=1.3,
                label=_ORDINALS[fifth],
                gid=f"course-{place}-{fifth}",
            )
        axes.set_title(one_line(name, limit=2 * _LABEL_CHARS), fontsize=8, color=_INK)
        axes.set_ylim(-4, 104)
        axes.set_xlim(0, 102)
        axes.tick_params(labelsize=8)
    lines, labels = grid[0][0].get_legend_handles_labels()
    drawing.legend(lines, labels, loc="outside upper right", ncols=len(lines), fontsize=8)
    drawing.supxlabel("% of the training done", fontsize=9)
    drawing.supylabel("% of target tokens right", fontsize=9)
    parts = [
        f"{name}: at the end " + ", ".join(f"{100 * share:.0f}%" for share in course[-1][1])
        for name, course in found
    ]
    return _finish(drawing, title, ". ".join(parts))


@_styled
def draw_heat_map(
    title: str, values: Mapping[tuple[str, str], float | None], form: str
) -> Picture | None:
    """Draw a value over rows and columns, with its figure in every cell; the highest is the darkest.

    Args:
        title: What it is, with its unit.
        values: The value by row and column; None, or nothing, where it was not measured.
        form: How figures are written, as `format` takes it.

    Returns:
        The picture; None where nothing was measured.
    """
    from matplotlib.patches import Rectangle

    found = {place: value for place, value in values.items() if value is not None}
    if not found:
        return None
    rows = list(dict.fromkeys(row for row, _ in values))[:_MOST_ROWS]
    columns = list(dict.fromkeys(column for _, column in values))[:_MOST_ROWS]
    low, high = min(found.values()), max(found.values())
    drawing, axes = _canvas(0.7 + 0.26 * len(rows))
    parts = []
    for (row, column), value in found.items():
        if row not in rows or column not in columns:
            continue
        x, y = columns.index(column), rows.index(row)
        # Never so dark that the figure on it cannot be read.
        shade = _DARKEST * (value - low) / (high - low) if high > low else 0.0
        axes.add_patch(
            Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=_ACCENT, alpha=shade, gid=f"cell-{y}-{x}")
        )
        axes.annotate(format(value, form), (x, y), ha="center", va="center", fontsize=8)
        parts.append(f"{row} {column} {format(value, form)}")
    axes.set_xticks(range(len(columns)), [_label(column) for column in columns])
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.tick_top()
    axes.set_ylabel("layer")
    axes.grid(visible=False)
    return _finish(drawing, title, f"{title} by layer and module: {', '.join(parts)}")


def _canvas(height_in: float) -> tuple["Drawing", "Axes"]:
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(_WIDTH_IN, height_in), layout="constrained")
    return drawing, drawing.subplots()


def _point(
    axes: "Axes", figure: Figure, row: int, colour: str, gid: str, *, filled: bool, below: float = 0.0
) -> None:
    height = row + below
    if figure.low is not None and figure.high is not None:
        axes.plot([100 * figure.low, 100 * figure.high], [height, height], color=colour, linewidth=2.2)
    axes.plot(
        [100 * _value(figure)],
        [height],
        marker="o",
        markersize=7,
        linestyle="none",
        color=colour,
        markerfacecolor=colour if filled else "none",
        gid=f"{gid}-{row}",
    )


def _value(figure: Figure) -> float:
    assert figure.value is not None
    return figure.value


def _marker(course: Sequence[Epoch]) -> str:
    return "o" if len(course) <= _MOST_MARKED else ""


def _whole_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))


def _label(text: str) -> str:
    return one_line(text, limit=_LABEL_CHARS) or "(blank)"


def _finish(drawing: "Drawing", title: str, alt: str) -> Picture:
    """Write a drawing as SVG to stand within a page."""
    file = io.StringIO()
    with warnings.catch_warnings():
        # It measures letters that its own font lacks; the page's fonts will show them.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        # Counts of fifteen digits leave their picture no room.
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
        drawing.savefig(file, format="svg", metadata={"Date": None})
    svg = _embeddable(file.getvalue(), title)
    return Picture(svg=svg, title=one_line(title), alt=one_line(alt, limit=1000))


def _embeddable(svg: str, title: str) -> str:
    """Keep of an SVG file what a page needs: no prologue or metadata, and ids of its own."""
    root = ElementTree.fromstring(svg)
    for part in (*root.findall(f"{_SVG}metadata"), *root.findall(f"{_SVG}defs[{_SVG}style]")):
        root.remove(part)
    # Several pictures share a page.
    prefix = f"picture-{hashlib.sha256(title.encode(errors='backslashreplace')).hexdigest()[:8]}"
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        for name, value in list(element.attrib.items()):
            if name == "id":
                element.set(name, f"{prefix}-{value}")
            elif name == _LINK:
                del element.attrib[name]
                element.set("href", f"#{prefix}-{value.removeprefix('#')}")
            elif name in ("style", "clip-path", "fill", "stroke"):
                element.set(name, _in_colours_of_the_page(value.replace("url(#", f"url(#{prefix}-")))
    width, height = (float(number) for number in root.attrib["viewBox"].split()[2:])
    root.attrib.pop("width")
    root.attrib.pop("height")
    root.set(
        "style", f"max-width: {width / _POINTS_PER_INCH:.2f}in; aspect-ratio: {width:g} / {height:g}"
    )
    return ElementTree.tostring(root, encoding="unicode")


def _in_colours_of_the_page(style: str) -> str:
    for colour, name in _NAMES.items():
        style = style.replace(colour, f"var(--{name})")
    return style
