"""Progress that a person can read: a bar with rate and time left; silent where stderr is piped."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class Step(Protocol):
    """Called with how many units were done since the last call, and what to show beside the bar."""

    def __call__(self, units: int = 1, note: str = "") -> None:
        """Advance the bar."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {task.fields['unit']}/s")


def _ignore(units: int = 1, note: str = "") -> None:
    """Advance nothing."""


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Step]:
    """Show a progress bar on stderr while the body runs, if stderr is a terminal.

    Args:
        label: What is being done.
        total: How many units there are.
        unit: What a unit is, in the plural ("edits", "bytes").

    Yields:
        A function to call as units are done.
    """
    if not sys.stderr.isatty():
        yield _ignore
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, unit=unit, note="")

        def step(units: int = 1, note: str = "") -> None:
            bar.update(task, advance=units, note=note)

        yield step
