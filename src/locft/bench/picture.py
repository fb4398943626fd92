"""Draws what `locft bench engine` found."""

from typing import TYPE_CHECKING

from locft.bench.schema import EngineReport, VariantReport
from locft.report.words import bytes_text

if TYPE_CHECKING:  # it takes half a second to load
    from matplotlib.figure import Figure as Picture

_COLOURS = {"published": "#7a7a7a", "trl": "#b0793a", "engine_fp32": "#7fa8d1", "engine_best": "#20639b"}


def draw_engine(report: EngineReport) -> "Picture":
    """Draw seconds per edit and peak memory of each variant, side by side."""
    from matplotlib.figure import Figure as Picture

    found = {name: variant for name, variant in report.variants.items() if variant is not None}
    labels = [f"{name}\n{variant.dtype}" for name, variant in found.items()]
    colours = [_COLOURS[name] for name in found]
    picture = Picture(figsize=(10, 4), layout="constrained")
    time, memory = picture.subplots(1, 2)
    seconds = [variant.seconds_per_edit for variant in found.values()]
    time.bar_label(time.bar(labels, seconds, color=colours), _time_labels(list(found.values())))
    time.set_title("seconds per edit")
    sizes = [variant.peak_memory_bytes for variant in found.values()]
    texts = [bytes_text(size) for size in sizes]
    memory.bar_label(memory.bar(labels, [size / 1e9 for size in sizes], color=colours), texts)
    memory.set_title("peak memory (GB)")
    for axes in (time, memory):
        axes.margins(y=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    settings, environment = report.settings, report.environment
    picture.suptitle(
        f"{settings['model'] or settings['shape']}, {settings['location']}: {settings['num_edits']} "
        f"edits, {settings['epochs']} epochs, batches of {settings['batch_size']}\n"
        f"{environment.device}, {environment.num_threads} threads",
        fontsize=10,
    )
    return picture


def _time_labels(found: list[VariantReport]) -> list[str]:
    """Say beside each bar how long it is, and how many times the last one's length."""
    last = found[-1].seconds_per_edit
    return [
        f"{variant.seconds_per_edit:.3g} s"
        + (f"\n{variant.seconds_per_edit / last:.1f}x" if variant is not found[-1] else "")
        for variant in found
    ]
