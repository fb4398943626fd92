"""Says what stands in the report of a run, in which order: the judgement first, then its grounds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from locft.report.page import Block, Command, Fold, Page, Picture, Section, Table, Text, Tile
from locft.report.pictures import draw_drift, draw_loss, draw_shares, draw_success
from locft.report.schema import (
    Cost,
    DriftInfo,
    EditReport,
    EditsInfo,
    Environment,
    EvalCost,
    EvalReport,
    PlannedCost,
    Protocol,
    ProtocolScores,
    TrainingInfo,
)
from locft.report.words import (
    MEANINGS,
    bytes_text,
    change_text,
    counted,
    figure_text,
    seconds_text,
    verdict,
)
from locft.types import AnswerRecord, CapabilityScores, Figure

_MOST_ANSWERS = 100  # of one kind and cause
_MOST_MATRICES = 20
_MOST_EPOCHS = 200


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """An evaluation: its report, its answers, and the name of the folder that holds it."""

    name: str
    report: EvalReport
    answers: Sequence[AnswerRecord]


def describe_edit(
    report: EditReport, answers: Sequence[AnswerRecord], evaluations: Sequence[Evaluated] = ()
) -> Page:
    """Describe an edit run.

    Args:
        report: Its report.
        answers: Its answers.
        evaluations: What else was measured of it.

    Returns:
        The page.
    """
    before = vars(report.scores_before)
    after = vars(report.scores)
    shares = {name: figure for name, figure in after.items() if name != "drift"}
    sections = [
        Section(
            title="Scores",
            blocks=(
                *_drawn(draw_shares("Scores before and after", before, shares)),
                scores_table(before, after, report.change, {**MEANINGS, **report.protocol.meanings}),
                Text(_how_scored(report.protocol)),
            ),
        ),
        Section(title="Learning", blocks=_learning(report.training, report.settings.get("stop_loss"))),
        *(section for found in evaluations for section in _evaluation_sections(found)),
        Section(title="Drift", blocks=_drift(report.drift)),
        Section(title="Answers", blocks=_answers(answers, report.protocol)),
        Section(title="What was changed", blocks=_changed(report)),
        Section(title="Cost", blocks=_edit_cost(report.cost, report.plan, report.training)),
        Section(
            title="Settings",
            blocks=(
                Table(
                    columns=("setting", "value"),
                    rows=tuple(
                        (name, "none" if value is None else str(value))
                        for name, value in report.settings.items()
                    ),
                ),
            ),
        ),
        Section(
            title="Where",
            blocks=(
                _provenance(report.environment, report.edits),
                Text("To repeat it, from where this run was made:"),
                Command("locft edit MODEL RUN/edits.jsonl --config RUN/run.toml -o NEW"),
            ),
        ),
    ]
    return Page(
        title=f"{counted(report.edits.num_edits, 'edit')} in {report.model.id}",
        verdict=verdict(after, report.edits.num_edits),
        tiles=_tiles(after, report.change),
        sections=tuple(sections),
    )


def describe_evaluation(report: EvalReport, answers: Sequence[AnswerRecord]) -> Page:
    """Describe an evaluation.

    Args:
        report: Its report.
        answers: Its answers.

    Returns:
        The page.
    """
    main = next(iter(report.protocols.values()))
    figures = with_drift(main.after, report.drift)
    sections = [
        *_evaluation_sections(Evaluated(name="", report=report, answers=answers)),
        Section(title="Drift", blocks=() if report.drift is None else _drift(report.drift)),
        Section(
            title="Answers",
            blocks=_answers(
                [one for one in answers if one.protocol == main.protocol.name], main.protocol
            ),
        ),
        Section(title="Cost", blocks=(_eval_cost(report.cost, report.parts_s),)),
        Section(title="Where", blocks=(_provenance(report.environment, report.edits),)),
    ]
    return Page(
        title=f"{evaluated_name(report)}: {counted(report.edits.num_edits, 'edit')}",
        verdict=verdict(
            figures, report.edits.num_edits, by_answers=main.protocol.max_new_tokens is not None
        ),
        tiles=_tiles(figures, main.change or {}),
        sections=tuple(sections),
    )


def evaluated_name(report: EvalReport) -> str:
    """Name what was evaluated."""
    if report.endpoint is not None:
        return f"{report.endpoint.model} at {report.endpoint.url}"
    name = "" if report.model is None else report.model.id
    return name if report.patch is None else f"{name} with {report.patch}"


def with_drift(scores: Mapping[str, Figure], drift: DriftInfo | None) -> dict[str, Figure]:
    """Put drift beside the scores of a protocol, where it was measured."""
    return dict(scores) if drift is None else {**scores, "drift": drift.overall}


def scores_table(
    before: Mapping[str, Figure] | None,
    after: Mapping[str, Figure],
    change: Mapping[str, Figure] | None,
    meanings: Mapping[str, str],
) -> Table:
    """Put scores into a table, a row for each."""
    early, changed = before or {}, change or {}
    rows = [
        (
            name,
            *((figure_text(name, early[name]) if name in early else "",) if early else ()),
            figure_text(name, figure),
            *((change_text(changed[name]) if name in changed else "",) if early else ()),
            meanings.get(name, ""),
        )
        for name, figure in after.items()
    ]
    columns = ("score", "before", "after", "change in points", "what it is")
    return Table(columns=columns if early else ("score", "value", "what it is"), rows=tuple(rows))


def _tiles(figures: Mapping[str, Figure], change: Mapping[str, Figure]) -> tuple[Tile, ...]:
    tiles = []
    for name, figure in figures.items():
        if figure.value is None:
            continue
        is_drift = name == "drift"
        value = f"{figure.value:.4f}" if is_drift else f"{100 * figure.value:.1f}%"
        note = f"{figure.num:,} {'passages, nats per token' if is_drift else 'prompts'}"
        if figure.low is not None and figure.high is not None:
            ends = (
                f"{figure.low:.4f} to {figure.high:.4f}"
                if is_drift
                else f"{100 * figure.low:.1f} to {100 * figure.high:.1f}%"
            )
            note = f"{ends}, {note}"
        changed = change_text(change[name]) if name in change else ""
        tiles.append(Tile(name=name, value=value, note=note, change=changed))
    return tuple(tiles)


def _how_scored(protocol: Protocol) -> str:
    stops = [
        {"\n": "newline"}.get(stop, f'"{stop}"' if len(stop) == 1 else stop) for stop in protocol.stop
    ]
    answered = (
        f"; greedy decoding, at most {protocol.max_new_tokens} new tokens, stop at {', '.join(stops)}"
        if protocol.max_new_tokens is not None
        else ""
    )
    return (
        "In brackets: 95% intervals (Wilson for shares, bootstrap over items or passages for means, and "
        "over pairs of scores of the same prompts for changes). Scored after all edits were in, on a "
        f"freshly loaded model. Protocol {protocol.name}, context {protocol.context}: "
        f"{protocol.match}{answered}. {protocol.rule}"
    )


def _learning(training: TrainingInfo, stop_loss: object) -> tuple[Block, ...]:
    course, parts = training.course, training.fifths
    ended = "; it stopped since the loss fell under the threshold" if training.stopped_early else ""
    columns = [f"success of part {number}" for number in range(1, len(parts) + 1)]
    rows = [
        (
            f"{epoch.epoch:,}",
            f"{epoch.steps:,}",
            f"{epoch.loss:.4g}",
            *(f"{100 * share:.1f}%" for share in epoch.success),
        )
        for epoch in course[:_MOST_EPOCHS]
    ]
    return (
        Text(
            f"Breadth-first: {counted(training.epochs, 'epoch')} of at most "
            f"{training.epochs_at_most:,}, {counted(training.steps, 'step')} of "
            f"{counted(training.batch_size, 'edit')}, learning rate {training.lr:.3g}; final loss "
            f"{training.final_loss:.4f}{ended}. Success is the share of target tokens that were "
            "predicted right, the true ones before them given, as training met each edit; the parts are "
            "fifths of the edits in the order of their file."
        ),
        *((draw_loss(course, stop_loss if isinstance(stop_loss, float) else None),) if course else ()),
        *((draw_success(course, parts),) if course else ()),
        Fold(
            title="The figures by epoch",
            blocks=(
                Table(
                    columns=("epoch", "steps", "loss", *columns),
                    rows=tuple(rows),
                    left_out=_rest(len(course) - _MOST_EPOCHS, "epoch", "train.jsonl"),
                ),
            ),
        ),
    )


def _evaluation_sections(found: Evaluated) -> list[Section]:
    """Describe what `locft eval` measures beyond a run's own scores."""
    report = found.report
    suffix = f" ({found.name})" if found.name else ""
    of_protocols: list[Block] = []
    for number, (name, scores) in enumerate(report.protocols.items()):
        after, meanings = scores.after, {**MEANINGS, **scores.protocol.meanings}
        if number == 0:
            after = with_drift(after, report.drift)
        of_protocols += _drawn(draw_shares(f"Protocol {name}{suffix}", scores.before, scores.after))
        of_protocols += [
            scores_table(scores.before, after, scores.change, meanings),
            Text(_how_scored(scores.protocol)),
        ]
    if report.judge is not None:
        of_protocols.append(
            Text(
                f"Judge {report.judge.model}: agrees with exact match on "
                f"{figure_text('agreement', report.judge.agreement)}; "
                f"{counted(report.judge.num_without_verdict, 'answer')} without a verdict."
            )
        )
    return [
        Section(title=f"Scores by protocol{suffix}", blocks=tuple(of_protocols)),
        Section(title=f"How far the edits carry{suffix}", blocks=_contexts(report.contexts)),
        Section(
            title=f"Capability{suffix}",
            blocks=() if report.capability is None else _capability(report.capability, suffix),
        ),
    ]


def _contexts(contexts: Mapping[str, ProtocolScores]) -> tuple[Block, ...]:
    if not contexts:
        return ()
    first = next(iter(contexts.values()))
    names = list(first.after)
    columns = [
        f"{name}{when}"
        for name in names
        for when in (("",) if first.before is None else (" before", " after"))
    ]
    rows = []
    for context, scores in contexts.items():
        cells: list[str] = []
        for name in names:
            if scores.before is not None:
                cells.append(figure_text(name, scores.before[name]))
            cells.append(figure_text(name, scores.after[name]))
        rows.append((context, *cells))
    return (
        Table(columns=("context", *columns), rows=tuple(rows)),
        Text(f"By protocol {first.protocol.name}: the same prompts, put into different contexts."),
    )


def _capability(capability: CapabilityScores, suffix: str) -> tuple[Block, ...]:
    tasks = capability.tasks
    rows = [
        (
            name,
            task.metric,
            "" if task.before is None else figure_text(name, task.before),
            figure_text(name, task.after),
            "" if task.change is None else change_text(task.change),
        )
        for name, task in tasks.items()
    ]
    if len(tasks) > 1:
        mean = capability
        rows.append(
            (
                "mean over tasks",
                "",
                "" if mean.before is None else figure_text("capability", mean.before),
                figure_text("capability", mean.after),
                "" if mean.change is None else change_text(mean.change),
            )
        )
    before = {name: task.before for name, task in tasks.items() if task.before is not None}
    after = {name: task.after for name, task in tasks.items()}
    source = "the hub" if capability.data is None else capability.data
    limit = "all items" if capability.limit is None else f"at most {counted(capability.limit, 'item')}"
    return (
        *_drawn(draw_shares(f"Capability before and after{suffix}", before or None, after)),
        Table(columns=("task", "metric", "before", "after", "change in points"), rows=tuple(rows)),
        Text(f"By lm-eval {capability.lm_eval}, items from {source}, {limit} of each task."),
    )


def _drift(drift: DriftInfo) -> tuple[Block, ...]:
    moved = drift.most_moved
    fold = Fold(
        title=f"The {counted(len(moved), 'passage')} that moved most",
        blocks=(
            Table(
                columns=("passage", "kind", "nats per token", "tokens", "text"),
                rows=tuple(
                    (str(one.passage), one.kind, f"{one.drift:.4f}", f"{one.num_tokens:,}", one.text)
                    for one in moved
                ),
            ),
        ),
    )
    return (
        *_drawn(draw_drift(drift.by_kind)),
        Table(
            columns=("kind", "nats per token"),
            rows=(
                *((kind, figure_text("drift", figure)) for kind, figure in drift.by_kind.items()),
                ("all", figure_text("drift", drift.overall)),
            ),
        ),
        *((fold,) if moved else ()),
        Text(
            f"KL(unedited || edited) of the next-token predictions. Text: {drift.text} "
            f"({drift.num_tokens:,} tokens, sha256 {drift.text_sha256[:12]})."
        ),
    )


def _answers(answers: Sequence[AnswerRecord], protocol: Protocol) -> tuple[Block, ...]:
    """Show answers in groups, the failures first, those of the edits' own prompts before others."""
    shown = [one for one in answers if one.after is not None and one.context == protocol.context]
    if not shown:
        return ()
    failed = [one for one in shown if one.score_after is not None and one.score_after < 1]
    right = [one for one in shown if one.score_after is not None and one.score_after >= 1]
    open_ = [one for one in shown if one.score_after is None]
    groups: list[tuple[str, list[AnswerRecord]]] = []
    kinds = tuple(dict.fromkeys(one.kind for one in shown))
    for kind in kinds:
        of_kind = [one for one in failed if one.kind == kind]
        causes = dict.fromkeys(one.cause or "not as expected" for one in of_kind)
        by_cause = {
            cause: [one for one in of_kind if (one.cause or "not as expected") == cause]
            for cause in causes
        }
        largest_first = sorted(by_cause.items(), key=lambda item: -len(item[1]))
        groups += [(f"{kind}, failed: {cause}", found) for cause, found in largest_first]
    for kind in kinds:
        # What had an answer before shows the change best.
        found = sorted((one for one in right if one.kind == kind), key=lambda one: not one.before)
        groups.append((f"{kind}, as expected", found))
        groups.append((f"{kind}, not scored", [one for one in open_ if one.kind == kind]))
    folds = [
        Fold(
            title=f"{title}: {len(found):,}",
            blocks=(_answers_table(found),),
            is_open=False,
        )
        for title, found in groups
        if found
    ]
    folds[0] = Fold(title=folds[0].title, blocks=folds[0].blocks, is_open=True)
    counts = f"{len(failed):,} of {counted(len(shown), 'answer')} are not as expected."
    return (Text(f"{counts} All of them: answers.jsonl."), *folds)


def _answers_table(answers: Sequence[AnswerRecord]) -> Table:
    has_before = any(one.before is not None for one in answers)
    columns = ("prompt", "expected", *(("before",) if has_before else ()), "after")
    rows = [
        (
            one.prompt,
            _answer_text(one.expected),
            *((_answer_text(one.before),) if has_before else ()),
            _answer_text(one.after),
        )
        for one in answers[:_MOST_ANSWERS]
    ]
    rest = _rest(len(answers) - _MOST_ANSWERS, "answer", "answers.jsonl")
    return Table(columns=columns, rows=tuple(rows), left_out=rest)


def _answer_text(text: str | None) -> str:
    return "-" if text is None else text if text.strip() else "(blank)"


def _changed(report: EditReport) -> tuple[Block, ...]:
    location, model = report.location, report.model
    share = 100 * location.num_parameters / model.num_parameters
    matrices = location.matrices
    return (
        Text(
            f"Location {location.name}: {location.num_parameters:,} of {model.num_parameters:,} "
            f"parameters ({share:.2f}%). The patch takes {bytes_text(report.patch_bytes)}."
        ),
        Table(
            columns=("tensor", "shape", "dtype", "relative change"),
            rows=tuple(
                (
                    matrix.tensor,
                    " x ".join(map(str, matrix.shape)),
                    matrix.dtype,
                    f"{100 * matrix.change:.1f}%",
                )
                for matrix in matrices[:_MOST_MATRICES]
            ),
            left_out=_rest(len(matrices) - _MOST_MATRICES, "tensor", "report.json"),
        ),
    )


def _edit_cost(cost: Cost, plan: PlannedCost | None, training: TrainingInfo) -> tuple[Block, ...]:
    parts = {
        "loading": "load_s",
        "frozen layers, once": "cache_s",
        "training": "train_s",
        "scoring, before and after": "eval_s",
        "in all": "wall_s",
    }
    at_most = {"train_s", "wall_s"}

    def planned(name: str) -> tuple[str, ...]:
        if plan is None:
            return ()
        return (("at most " if name in at_most else "") + seconds_text(getattr(plan, name)),)

    rows = [(title, seconds_text(getattr(cost, name)), *planned(name)) for title, name in parts.items()]
    memory = () if plan is None else (bytes_text(plan.peak_memory_bytes),)
    rows.append(("peak memory", bytes_text(cost.peak_memory_bytes), *memory))
    blocks: list[Block] = [
        Table(columns=("part", "took", *(("planned",) if plan else ())), rows=tuple(rows))
    ]
    per_edit = f"{cost.seconds_per_edit:.3g} s per edit (frozen layers and training)."
    if plan is not None:
        per_edit += (
            f" The plan allowed for {plan.epochs_at_most:,} epochs, and training took "
            f"{training.epochs:,}; it takes the machine to be as fast as it was before training."
        )
    return (Text(per_edit), *blocks)


def _eval_cost(cost: EvalCost, parts_s: Mapping[str, float]) -> Table:
    rows = [(part, seconds_text(seconds)) for part, seconds in parts_s.items()]
    rows += [
        ("in all", seconds_text(cost.wall_s)),
        ("peak memory", bytes_text(cost.peak_memory_bytes)),
    ]
    return Table(columns=("part", "took"), rows=tuple(rows))


def _provenance(environment: Environment, edits: EditsInfo) -> Table:
    source = "Python" if edits.file is None else edits.file
    rows = {
        "locft": environment.locft,
        "torch": environment.torch,
        "transformers": environment.transformers,
        "Python": environment.python,
        "system": environment.platform,
        "device": environment.device,
        "threads": str(environment.num_threads),
        "edits": f"{source}, {edits.format} format",
        "rephrases, locality prompts": f"{edits.num_rephrases:,}, {edits.num_locality:,}",
        "sha256 of the edits": edits.sha256,
    }
    return Table(columns=("what", "which"), rows=tuple(rows.items()))


def _drawn(picture: Picture | None) -> Iterable[Picture]:
    return () if picture is None else (picture,)


def _rest(num: int, noun: str, file: str) -> str:
    return f"{counted(num, f'more {noun}')}: {file}" if num > 0 else ""
