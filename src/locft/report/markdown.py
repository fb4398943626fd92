"""Draws a report as Markdown, readable in a terminal and on a forge."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from locft.report.schema import EditReport
from locft.report.words import (
    MEANINGS,
    SCORE_NAMES,
    bytes_text,
    change_text,
    counted,
    figure_text,
    seconds_text,
    verdict,
)

NUM_EXAMPLES = 12

_NUM_MATRICES = 20


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt with its answers, to be shown."""

    prompt: str
    expected: str
    before: str
    after: str
    is_match: bool


def draw_markdown(report: EditReport, examples: Sequence[Example]) -> str:
    """Draw the report of an edit run.

    Args:
        report: The report.
        examples: The edits' prompts with their answers; the first twelve are shown, failures first.

    Returns:
        The text of `report.md`.
    """
    failures_first = in_order(examples)[:NUM_EXAMPLES]
    lines = [
        f"# {counted(report.edits.num_edits, 'edit')} in {_escape(report.model.id)}",
        "",
        f"**{verdict(report.scores, report.edits.num_edits)}**",
        "",
        "| score | before | after | change in points | what it is |",
        "|---|---|---|---|---|",
    ]
    for name in SCORE_NAMES:
        before = figure_text(name, getattr(report.scores_before, name))
        after = figure_text(name, getattr(report.scores, name))
        change = change_text(report.change[name]) if name in report.change else ""
        lines.append(f"| {name} | {before} | {after} | {change} | {MEANINGS[name]} |")
    lines += [
        "",
        "In brackets: 95% intervals (Wilson for shares, bootstrap over passages for drift, and over "
        "pairs of answers to the same prompts for changes). Scored on "
        "a freshly loaded model with the patch applied, all edits being in: greedy decoding, at most "
        f'{report.protocol.max_new_tokens} new tokens, stop at ".", newline or end of sequence, '
        "normalised exact match.",
        "",
        "## Drift by kind of text",
        "",
        "| kind | nats per token |",
        "|---|---|",
        *(
            f"| {_escape(kind)} | {figure_text('drift', figure)} |"
            for kind, figure in report.drift.by_kind.items()
        ),
        "",
        f"Text: {_escape(report.drift.text)} ({report.drift.num_tokens:,} tokens, "
        f"sha256 {report.drift.text_sha256[:12]}).",
        "",
        f"## Answers ({len(failures_first)} of {len(examples):,}, failures first)",
        "",
        "| | prompt | target | before | after |",
        "|---|---|---|---|---|",
        *(
            f"| {'yes' if e.is_match else 'NO'} | {_escape(e.prompt)} | {_escape(e.expected)} "
            f"| {_escape(e.before or '(blank)')} | {_escape(e.after or '(blank)')} |"
            for e in failures_first
        ),
        "",
        "All answers, those to rephrases and locality prompts too: `answers.jsonl`.",
        "",
        "## What was changed",
        "",
        f"Location `{report.location.name}`: {report.location.num_parameters:,} of "
        f"{report.model.num_parameters:,} parameters "
        f"({100 * report.location.num_parameters / report.model.num_parameters:.2f}%). The patch "
        f"takes {bytes_text(report.patch_bytes)}.",
        "",
        "| tensor | shape | dtype | relative change |",
        "|---|---|---|---|",
        *(
            f"| `{matrix.tensor}` | {' x '.join(map(str, matrix.shape))} | {matrix.dtype} "
            f"| {100 * matrix.change:.1f}% |"
            for matrix in report.location.matrices[:_NUM_MATRICES]
        ),
        *(
            [f"| {num_more:,} more, in report.json | | | |"]
            if (num_more := len(report.location.matrices) - _NUM_MATRICES) > 0
            else []
        ),
        "",
        "## How",
        "",
        f"Breadth-first: {report.training.epochs} epochs of at most "
        f"{report.training.epochs_at_most}, {report.training.steps} steps of "
        f"{report.training.batch_size} edits, learning rate {report.training.lr:.3g}; final loss "
        f"{report.training.final_loss:.4f}"
        + (" (under the threshold, so it stopped)." if report.training.stopped_early else "."),
        "",
        "| setting | value |",
        "|---|---|",
        *(
            f"| {name} | {_escape('none' if value is None else str(value))} |"
            for name, value in report.settings.items()
        ),
        "",
        "## Cost",
        "",
        f"{report.cost.seconds_per_edit:.3g} s per edit (frozen layers once: "
        f"{seconds_text(report.cost.cache_s)}; training: {seconds_text(report.cost.train_s)}); "
        f"scoring: {seconds_text(report.cost.eval_s)}; in all {seconds_text(report.cost.wall_s)}; "
        f"peak memory {bytes_text(report.cost.peak_memory_bytes)}.",
        "",
        "## Where",
        "",
        f"locft {report.environment.locft}, torch {report.environment.torch}, transformers "
        f"{report.environment.transformers}, Python {report.environment.python}, "
        f"{_escape(report.environment.platform)}; {_escape(report.environment.device)}, "
        f"{report.environment.num_threads} threads, {report.model.dtype}. Edits: "
        f"{_escape(str(report.edits.file))} ({report.edits.format} format, sha256 "
        f"{report.edits.sha256[:12]}). To repeat: `locft edit MODEL RUN/edits.jsonl --config "
        "RUN/run.toml -o NEW`, from where this run was made.",
    ]
    return "\n".join(lines) + "\n"


def in_order(examples: Sequence[Example]) -> list[Example]:
    """Put failures first, and then what had an answer before, which shows the change best."""
    return sorted(examples, key=lambda example: (example.is_match, not example.before))


def _escape(text: str) -> str:
    """Let any text stand in a table cell as what it is."""
    flat = "".join(c if c.isprintable() else " " for c in text)
    flat = re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", flat)
    return flat if len(flat) <= 200 else flat[:199] + "…"
