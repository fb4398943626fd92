"""Tables for the terminal; user text is shown as text, whatever it holds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from locft.errors import printable
from locft.report.markdown import NUM_EXAMPLES, Example, in_order
from locft.report.schema import Cost, EditReport
from locft.report.words import (
    MEANINGS,
    SCORE_NAMES,
    bytes_text,
    counted,
    figure_text,
    seconds_text,
    some,
    verdict,
)
from locft.types import Scores

if TYPE_CHECKING:  # recipes load torch
    from locft.recipe.export import LoraExport

_WIDTH_PIPED = 120


def make_console() -> Console:
    """Make the console for results: stdout, without colour where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_PIPED)


def show_edit(console: Console, report: EditReport, examples: Sequence[Example], run: str) -> None:
    """Show an edit run: answers before and after, scores, cost, and where the patch is."""
    shown = in_order(examples)[:NUM_EXAMPLES]
    title = f"{len(shown)} of {counted(len(examples), 'edit')}, failures first; all: {run}/answers.jsonl"
    table = make_table(title, "prompt", "target", "before", "after", "")
    for example in shown:
        mark = Text("ok", style="green") if example.is_match else Text("missed", style="red")
        answers = (example.before or "(blank)", example.after or "(blank)")
        table.add_row(*map(plain, (example.prompt, example.expected, *answers)), mark)
    console.print(table)
    show_scores(console, report.scores_before, report.scores)
    console.print(Text(verdict(report.scores, report.edits.num_edits), style="bold"))
    location = report.location
    share = 100 * location.num_parameters / report.model.num_parameters
    console.print(
        _line(
            f"changed {location.name}: {some([m.tensor for m in location.matrices])}, "
            f"{location.num_parameters:,} parameters ({share:.2f}% of the model)"
        )
    )
    console.print(Text(_cost(report.cost)))
    console.print(
        _line(f"patch: {run}/patch ({bytes_text(report.patch_bytes)}); report: {run}/report.md")
    )


def show_scores(console: Console, before: Scores | None, after: Scores) -> None:
    """Show the scores, beside those of the unedited model where there is one."""
    columns = ["score", "before", "after", "what it is"]
    if console.width < _WIDTH_PIPED:
        columns.pop()
    table = make_table("scores, with 95% intervals", *columns)
    for name in SCORE_NAMES:
        was = "" if before is None else figure_text(name, getattr(before, name))
        row = (name, was, figure_text(name, getattr(after, name)), MEANINGS[name])
        table.add_row(*row[: len(columns)])
    console.print(table)


def show_answers(console: Console, rows: Sequence[tuple[str, str, str | None]]) -> None:
    """Show prompts with the answers before and, where there is a patch, after."""
    is_edited = any(after is not None for _, _, after in rows)
    table = make_table("", "prompt", *(("before", "after") if is_edited else ("answer",)))
    for prompt, before, after in rows:
        answers = (before, after or "") if is_edited else (before,)
        table.add_row(plain(prompt), *(plain(answer or "(blank)") for answer in answers))
    console.print(table)


def show_lora(console: Console, report: "LoraExport", output: str) -> None:
    """Show an adapter: size, error and loss by rank, and how to serve it."""
    columns = ["rank", "bytes", "change left out"]
    if report.num_edits is not None:
        columns += ["edits answered right", "lost"]
    table = make_table(
        f"{report.location}, {bytes_text(report.matrices_bytes)} as whole matrices", *columns
    )
    for row in report.ranks:
        cells = [str(row.rank), f"{row.num_bytes:,}", f"{100 * row.error:.1f}%"]
        if row.num_right is not None:
            cells += [f"{row.num_right:,} of {report.num_edits:,}", f"{row.num_lost:,}"]
        table.add_row(*cells, style="bold" if row.rank == report.rank else None)
    console.print(table)
    if report.num_edits is not None:
        total = counted(report.num_edits, "edit")
        console.print(Text(f"the full patch answers {report.num_right:,} of {total} right"))
    size = bytes_text(report.chosen.num_bytes)
    console.print(_line(f"adapter: {output}, rank {report.rank} ({size}); {output}/README.md loads it"))
    console.print(Text(f"vLLM: --enable-lora --max-lora-rank {report.max_lora_rank}"))


def plain(text: str, limit: int = 160) -> Text:
    """Turn any text into a cell: no markup, no control characters, nothing endless."""
    flat = "".join(c if c.isprintable() else " " for c in text)
    return Text(flat if len(flat) <= limit else flat[: limit - 1] + "…")


def _line(text: str) -> Text:
    """Turn a line of ours into text that shows the names in it whole, and escaped."""
    return Text(printable(text))


def make_table(title: str, *columns: str) -> Table:
    """Make a table; without any named column it has no header."""
    heading = Text(printable(title), style="dim") if title else None
    table = Table(title=heading, show_header=any(columns), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _cost(cost: Cost) -> str:
    return (
        f"cost: {cost.seconds_per_edit:.3g} s per edit (cache {seconds_text(cost.cache_s)}, training "
        f"{seconds_text(cost.train_s)}), scoring {seconds_text(cost.eval_s)}, in all "
        f"{seconds_text(cost.wall_s)}, peak memory {bytes_text(cost.peak_memory_bytes)}"
    )
