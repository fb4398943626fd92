"""Tables for the terminal; user text is shown as text, whatever it holds."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from locft.bench.schema import EngineReport
from locft.errors import printable
from locft.recipe.run_folder import Run
from locft.report.page import Block, Command, Fold, Page, Picture
from locft.report.page import Table as PageTable
from locft.report.page import Text as PageText
from locft.report.schema import Cost, EditReport, EvalReport
from locft.report.sections import capability_table, context_table, no_drift
from locft.report.words import (
    MEANINGS,
    SCORE_NAMES,
    bytes_text,
    change_text,
    counted,
    figure_text,
    one_line,
    seconds_text,
    some,
    verdict,
)
from locft.types import AnswerRecord, Figure

if TYPE_CHECKING:  # they load torch
    from locft.bench.growth import Growth
    from locft.bench.scoring import ScoringBench
    from locft.recipe.export import LoraExport
    from locft.recipe.plan import Plan

_WIDTH_PIPED = 120
_NUM_ANSWERS = 12
# What score tables need, so that no cell is folded.
_WIDTH_OF_CHANGE = 110
_WIDTH_OF_MEANING = 150


def make_console() -> Console:
    """Make the console for results: stdout, without colour where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_PIPED)


def show_edit(console: Console, run: Run, name: str) -> None:
    """Show an edit run: answers before and after, scores, cost, and where the patch is."""
    report = run.report
    assert isinstance(report, EditReport)
    edits = [answer for answer in run.answers if answer.kind == "reliability"]
    # What had an answer before shows the change best.
    failures_first = sorted(edits, key=lambda answer: (answer.score_after == 1, not answer.before))
    shown = failures_first[:_NUM_ANSWERS]
    title = f"{len(shown)} of {counted(len(edits), 'edit')}, failures first; all: {name}/answers.jsonl"
    table = make_table(title, "prompt", "target", "before", "after", "")
    for answer in shown:
        ok = answer.score_after == 1
        mark = Text("ok", style="green") if ok else Text("missed", style="red")
        answers = (answer.before or "(blank)", answer.after or "(blank)")
        table.add_row(*map(plain, (answer.prompt, answer.expected or "", *answers)), mark)
    console.print(table)
    before, after = vars(report.scores_before), vars(report.scores)
    show_scores(console, "scores, with 95% intervals", before, after, report.change, MEANINGS)
    console.print(Text(verdict(after, report.edits.num_edits), style="bold"))
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
        _line(f"patch: {name}/patch ({bytes_text(report.patch_bytes)}); report: {name}/report.html")
    )


def show_scores(
    console: Console,
    title: str,
    before: Mapping[str, Figure] | None,
    after: Mapping[str, Figure],
    change: Mapping[str, Figure] | None,
    meanings: Mapping[str, str],
) -> None:
    """Show scores by their names, beside those of the unedited model where there is one."""
    columns = ["score", "value", "what it is"]
    if before is not None:
        columns = ["score", "before", "after", "change in points", "what it is"]
        if console.width < _WIDTH_OF_MEANING:
            columns.pop()
        if console.width < _WIDTH_OF_CHANGE:
            columns.pop()
    table = make_table(title, *columns)
    for name, figure in after.items():
        row = [name, figure_text(name, figure), meanings[name]]
        if before is not None:
            was = figure_text(name, before[name]) if name in before else ""
            changed = change_text(change[name]) if change and name in change else ""
            row[1:2] = [was, row[1], changed]
        table.add_row(*row[: len(columns)])
    console.print(table)


def show_evaluation(
    console: Console, report: EvalReport, records: Sequence["AnswerRecord"], show: str
) -> None:
    """Show an evaluation: the scores of each protocol, the contexts, the causes of failures.

    Args:
        console: Where.
        report: The report.
        records: Every answer.
        show: Which answers to show: ``failures``, ``all`` or ``none``.
    """
    shown = [
        record
        for record in records
        if record.after is not None and (record.cause is not None or show == "all") and show != "none"
    ]
    if shown:
        _show_records(console, shown, "failures only" if show == "failures" else "all")
    drift = report.drift
    for number, (name, scores) in enumerate(report.protocols.items()):
        before, after, meanings = scores.before, scores.after, scores.protocol.meanings
        if drift is not None and number == 0:
            after = {**after, "drift": drift.overall}
            before = None if before is None else {**before, "drift": no_drift(drift)}
            meanings = {**meanings, "drift": MEANINGS["drift"]}
        title = f"protocol {name}, with 95% intervals: {scores.protocol.match}"
        show_scores(console, title, before, after, scores.change, meanings)
    if report.contexts:
        by = next(iter(report.contexts.values())).protocol.name
        _show_table(console, f"contexts, by protocol {by}", context_table(report.contexts))
    if report.capability is not None:
        capability = report.capability
        source = "" if capability.data is None else f", items from {capability.data}"
        title = f"capability, by lm-eval {capability.lm_eval}{source}"
        _show_table(console, title, capability_table(capability))
    if report.judge is not None:
        agreed = figure_text("agreement", report.judge.agreement)
        console.print(
            _line(
                f"judge {report.judge.model}: agrees with exact match on {agreed}; "
                f"{counted(report.judge.num_without_verdict, 'answer')} without a verdict"
            )
        )
    main = next(iter(report.protocols.values())).protocol
    for kind, causes in report.causes.items():
        total = sum(causes.values())
        parts = ", ".join(f"{num:,} {cause}" for cause, num in sorted(causes.items(), key=_most_first))
        where = f"{main.name}, {main.context}"
        console.print(Text(f"{kind}, by {where}: {counted(total, 'failure')}: {parts}"))


def _show_records(console: Console, records: Sequence["AnswerRecord"], which: str) -> None:
    """Show answers, one row for those that protocols share."""
    protocols: dict[tuple[str | None, ...], list[str]] = {}
    for record in records:
        texts = (record.prompt, record.expected, record.before, record.after)
        key = (record.context, record.kind, *texts, record.cause or "")
        protocols.setdefault(key, []).append(record.protocol)
    table = make_table(
        f"{counted(len(protocols), 'answer')}, {which}",
        *("protocol", "context", "kind", "prompt", "expected", "before", "after", "cause"),
    )
    for row, names in protocols.items():
        cells = ("-" if text is None else text or "(blank)" for text in row[:-1])
        table.add_row(", ".join(dict.fromkeys(names)), *map(plain, cells), row[-1] or "")
    console.print(table)


def _most_first(cause: tuple[str, int]) -> tuple[int, str]:
    return -cause[1], cause[0]


def _show_table(console: Console, title: str, table: PageTable) -> None:
    """Show a table of a page."""
    shown = make_table(title, *(one_line(name) for name in table.columns))
    for row in table.rows:
        shown.add_row(*map(plain, row))
    console.print(shown)


def show_page(console: Console, page: Page) -> None:
    """Show a page: its tables and texts, without its pictures, and of what may be opened the titles."""
    console.print(Text(one_line(page.title, limit=None), style="bold"))
    console.print(Text(one_line(page.verdict, limit=None)))
    for section in page.sections:
        for number, block in enumerate(section.blocks):
            _show_block(console, block, section.title if number == 0 else "")


def _show_block(console: Console, block: Block, title: str) -> None:
    match block:
        case PageTable():
            _show_table(console, title, block)
        case PageText(text) | Command(text) | Fold(title=text):
            console.print(Text(one_line(text, limit=None)))
        case Picture():
            return


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


def show_engine(console: Console, report: EngineReport) -> None:
    """Show what each way of training took."""
    settings = report.settings
    table = make_table(
        f"{settings['model'] or settings['shape']}, {settings['location']}: "
        f"{counted(settings['num_edits'], 'edit')}, {counted(settings['epochs'], 'epoch')}, batches of "
        f"{settings['batch_size']}",
        *("variant", "dtype", "per edit", "epoch", "tokens/s", "of matrix rate", "memory", "loss"),
        "reliability",
    )
    for name, variant in report.variants.items():
        if variant is None:
            table.add_row(name, "not measured")
            continue
        table.add_row(
            name,
            variant.dtype,
            f"{variant.seconds_per_edit:.3g} s",
            f"{variant.seconds_per_epoch:.3g} s",
            f"{variant.tokens_per_s:,.0f}",
            f"{100 * variant.share_of_matrix_rate:.1f}%",
            bytes_text(variant.peak_memory_bytes),
            f"{variant.losses[-1]:.3g}",
            "" if variant.reliability is None else f"{100 * variant.reliability:.1f}%",
        )
    console.print(table)
    for pair, ratio in report.ratios["seconds_per_edit"].items():
        other, engine = pair.split("/")
        console.print(Text(f"{other} takes {ratio:.1f} times as long per edit as {engine}"))


def show_growth(console: Console, growth: "Growth") -> None:
    """Show how time grows with the edits and with the depth, and memory with the edits."""
    if growth.epochs:
        title = f"time at {growth.epochs[0].location}, by number of edits"
        table = make_table(title, "edits", "made up", "tokens", "cache", "epoch", "per token")
        for time in growth.epochs:
            counts = f"{time.num_edits:,}", f"{time.synthetic:,}", f"{time.num_tokens:,}"
            per_token = f"{1e6 * time.seconds_per_epoch / time.num_tokens:.1f} µs"
            seconds = _seconds(time.cache_s), _seconds(time.seconds_per_epoch)
            table.add_row(*counts, *seconds, per_token)
        console.print(table)
        console.print(Text(_fit(growth)))
    if growth.memory:
        table = make_table(
            "anonymous memory, by number of edits",
            *("edits", "made up", "model loaded", "edits encoded", "most in caching"),
            *("most in training", "steps"),
        )
        for use in growth.memory:
            sizes = use.loaded_bytes, use.encoded_bytes, use.cache_peak_bytes, use.train_peak_bytes
            texts = ("-" if size is None else bytes_text(size) for size in sizes)
            steps = f"{use.steps:,} ({use.steps_per_epoch:,} an epoch)"
            table.add_row(f"{use.num_edits:,}", f"{use.synthetic:,}", *texts, steps)
        console.print(table)
    if growth.depth:
        table = make_table(
            f"time by depth, {counted(growth.depth[0].num_edits, 'edit')}",
            *("location", "layers above", "cache", "epoch"),
        )
        for place in growth.depth:
            seconds = _seconds(place.cache_s), _seconds(place.seconds_per_epoch)
            table.add_row(plain(place.location), str(place.num_layers_above), *seconds)
        console.print(table)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds < 1 else seconds_text(seconds)


def _fit(growth: "Growth") -> str:
    fit = growth.fit
    if fit.slope_s_per_token is None or fit.intercept_s is None:
        return "a line needs two sizes at least"
    parts = [
        f"line: {1e6 * fit.slope_s_per_token:.3g} µs per token and {fit.intercept_s:.3g} s; it explains "
    ]
    parts.append("-" if fit.r_squared is None else f"{100 * fit.r_squared:.2f}% of the variance")
    if fit.largest_relative_residual is not None:
        parts.append(f", and misses by {100 * fit.largest_relative_residual:.1f}% at most")
    return "".join(parts)


def show_scoring(console: Console, bench: "ScoringBench") -> None:
    """Show what guessing gave: the prompts that it saved, the scores with it and without, the time."""
    table = make_table(
        f"{counted(bench.num_prompts, 'prompt')} of {counted(bench.num_edits, 'edit')}: "
        f"{bench.num_confirmed:,} guesses confirmed by one pass, {bench.num_generated:,} generated",
        *("", "seconds", "reliability", "generalization", "locality"),
    )
    ways = {"without guesses": bench.without_guesses, "with guesses": bench.with_guesses}
    for name, way in ways.items():
        scores = zip(SCORE_NAMES, way.scores, strict=False)
        table.add_row(name, f"{way.seconds:.2f}", *(figure_text(*score) for score in scores))
    console.print(table)
    if bench.differences:
        table = make_table(
            f"{counted(len(bench.differences), 'prompt')} answered differently",
            *("prompt", "without guesses", "with guesses", "by"),
        )
        for one in bench.differences:
            answers = one.without_guesses or "(blank)", one.with_guesses or "(blank)"
            by = "one pass" if one.is_confirmed else "generation"
            table.add_row(*map(plain, (one.prompt, *answers, by)))
        console.print(table)
    same = "all answers and scores are equal" if bench.is_equal else "answers or scores differ"
    console.print(Text(f"{same}; {bench.speed_up:.1f} times as fast with guesses", style="bold"))


def show_plan(console: Console, plan: "Plan") -> None:
    """Show what a run would do and cost, phase by phase and in all."""
    title = (
        f"{plan.location} of {plan.model}: {counted(plan.num_tuned, 'parameter')} on "
        f"{counted(plan.num_edits, 'edit')}"
    )
    table = make_table(title, "phase", "time", "memory")
    for phase in plan.phases:
        most = "at most " if phase.name == "train" else ""
        time = f"{most}{seconds_text(phase.seconds)}"
        table.add_row(phase.name, time, bytes_text(phase.peak_memory_bytes))
    table.add_row(
        "in all",
        f"at most {seconds_text(plan.wall_s)}",
        bytes_text(plan.peak_memory_bytes),
        style="bold",
    )
    console.print(table)
    console.print(
        Text(
            f"training: at most {plan.epochs_at_most} epochs, {plan.steps_at_most:,} steps of "
            f"{plan.batch_size} edits, {plan.num_tokens_per_epoch:,} tokens an epoch, products in "
            f"{plan.compute_dtype} on {plan.device}; it stops early once the loss is low enough"
        )
    )
    disk = plan.disk
    patch, reports, cache = map(bytes_text, (disk.patch_bytes, disk.report_bytes, disk.cache_bytes))
    free = bytes_text(plan.free_disk_bytes)
    console.print(
        Text(f"disk: patch {patch}, reports {reports}, cache while training {cache}; {free} free")
    )
    if not plan.fits_on_disk:
        console.print(Text("there is not enough space on the disk for this run", style="red"))
    console.print(
        Text(
            f"at most {seconds_text(plan.wall_s)}, {bytes_text(plan.peak_memory_bytes)} of memory, "
            f"{bytes_text(disk.peak_bytes)} of disk; nothing was run or written",
            style="bold",
        )
    )


def plain(text: str, limit: int = 160) -> Text:
    """Turn any text into a cell: no markup, no control characters, nothing endless."""
    return Text(one_line(text, limit=limit))


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
