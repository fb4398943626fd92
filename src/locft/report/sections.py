"""Puts the parts of reports into tables, texts and pictures, the same in every report."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from locft.data.normalise import normalise
from locft.report.page import Block, Fold, Picture, Table, Text
from locft.report.pictures import draw_drift, draw_loss, draw_shares, draw_success
from locft.report.schema import (
    Cost,
    DriftInfo,
    EditReport,
    EditsInfo,
    Environment,
    EvalCost,
    ExpertsInfo,
    PlannedCost,
    Protocol,
    ProtocolScores,
    TrainingInfo,
)
from locft.report.words import (
    bytes_text,
    change_text,
    counted,
    figure_text,
    limit_in_words,
    seconds_text,
    setting_text,
)
from locft.types import AnswerRecord, CapabilityScores, Figure

_MOST_ANSWERS = 100  # of one kind and cause
_MOST_MATRICES = 20
_MOST_EPOCHS = 200


def with_drift(scores: Mapping[str, Figure], drift: DriftInfo | None) -> dict[str, Figure]:
    """Put drift beside the scores of a protocol, where it was measured."""
    return dict(scores) if drift is None else {**scores, "drift": drift.overall}


def no_drift(drift: DriftInfo) -> Figure:
    """Give the drift of the unedited model from itself, on the same text."""
    num = drift.overall.num
    return Figure(value=0.0, num=num, low=0.0, high=0.0, reason="by definition")


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


def how_scored(protocol: Protocol) -> str:
    """Say how scores were taken, and what their intervals are."""
    names = {".": '"."', "\n": "newline"}
    stops = [names.get(stop, stop) for stop in protocol.stop]
    ended = f" Answers end at {', '.join(stops)}." if stops else ""
    return (
        "In brackets: 95% intervals (Wilson for shares, Newcombe for changes of shares on the same "
        "prompts; for other means a bootstrap over items or passages, or, where all of them agree, the "
        "bound on what was not seen, by Clopper and Pearson). Scored after all edits were in, on a "
        f"freshly loaded model. Protocol {protocol.name}, context {protocol.context}: {protocol.rule}"
        f"{ended}"
    )


def blank_locality(answers: Sequence[AnswerRecord], protocol: Protocol) -> tuple[Text, ...]:
    """Tell how much of locality is agreement on nothing, as between "?" and a blank, if any is."""
    own = (protocol.name, protocol.context, "locality")
    asked = [one for one in answers if (one.protocol, one.context, one.kind) == own]
    blank = [one for one in asked if one.after is not None and not normalise(one.expected or "")]
    if not blank:
        return ()
    agreed = sum(one.score_after == 1 for one in blank)
    asked_text = counted(len(asked), "locality prompt")
    return (
        Text(
            f"To {len(blank):,} of {asked_text} the unedited model answers nothing that counts (blank, "
            f"or punctuation alone). The edited model agrees on {agreed:,} of these by answering "
            "nothing, either."
        ),
    )


def learning_blocks(training: TrainingInfo, settings: Mapping[str, Any]) -> tuple[Block, ...]:
    """Show the course of training: loss, and success of each fifth of the edits, by epoch."""
    course, parts = training.course, training.fifths
    stop_loss = settings.get("stop_loss")
    threshold = stop_loss if isinstance(stop_loss, float) else None
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
    told = Text(
        f"Breadth-first: {counted(training.epochs, 'epoch')} of at most "
        f"{training.epochs_at_most:,}, {counted(training.steps, 'step')} of at most "
        f"{counted(training.batch_size, 'edit')}, learning rate {training.lr:.3g}; final loss "
        f"{training.final_loss:.4f}{ended}. Success is the share of target tokens that were "
        "predicted right, the true ones before them given, as training met each edit; the parts are "
        "fifths of the edits in the order of their file."
    )
    kept = tuple(map(Text, _material_texts(training)))
    if not course:
        return (told, *kept)
    by_epoch = Table(
        columns=("epoch", "steps", "loss", *columns),
        rows=tuple(rows),
        left_out=_rest(len(course) - _MOST_EPOCHS, "epoch", "train.jsonl"),
    )
    return (
        told,
        *kept,
        draw_loss(course, threshold),
        draw_success(course, parts),
        Fold(title="The figures by epoch", blocks=(by_epoch,)),
    )


def context_blocks(contexts: Mapping[str, ProtocolScores]) -> tuple[Block, ...]:
    """Show how far the edits carry, if any context was asked for."""
    if not contexts:
        return ()
    name = next(iter(contexts.values())).protocol.name
    return (
        context_table(contexts),
        Text(f"By protocol {name}: the same prompts, put into different contexts."),
    )


def context_table(contexts: Mapping[str, ProtocolScores]) -> Table:
    """Put how far the edits carry into a table, a row for each context; there is one at least."""
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
            figures = (scores.after,) if first.before is None else (scores.before or {}, scores.after)
            cells += [figure_text(name, found[name]) if name in found else "-" for found in figures]
        rows.append((context, *cells))
    return Table(columns=("context", *columns), rows=tuple(rows))


def capability_blocks(capability: CapabilityScores, suffix: str) -> tuple[Block, ...]:
    """Show each task before and after, and the mean over tasks."""
    tasks = capability.tasks
    before = {name: task.before for name, task in tasks.items() if task.before is not None}
    after = {name: task.after for name, task in tasks.items()}
    source = "the hub" if capability.data is None else capability.data
    limit = "all items" if capability.limit is None else f"at most {counted(capability.limit, 'item')}"
    return (
        *drawn(draw_shares(f"Capability before and after{suffix}", before or None, after)),
        capability_table(capability),
        Text(f"By lm-eval {capability.lm_eval}, items from {source}, {limit} of each task."),
    )


def capability_table(capability: CapabilityScores) -> Table:
    """Put each task, and the mean over tasks if there are several, into a table."""
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
    return Table(columns=("task", "metric", "before", "after", "change in points"), rows=tuple(rows))


def drift_blocks(drift: DriftInfo) -> tuple[Block, ...]:
    """Show the drift by kind of text, and the passages that moved most."""
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
        *drawn(draw_drift(drift.by_kind)),
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


def answer_blocks(answers: Sequence[AnswerRecord], protocol: Protocol) -> tuple[Block, ...]:
    """Show answers in groups, the failures first, those of the edits' own prompts before others."""
    way = (protocol.name, protocol.context)
    shown = [one for one in answers if one.after is not None and (one.protocol, one.context) == way]
    if not shown:
        return ()
    failed = [one for one in shown if one.score_after is not None and one.score_after < 1]
    right = [one for one in shown if one.score_after is not None and one.score_after >= 1]
    open_ = [one for one in shown if one.score_after is None]
    groups: list[tuple[str, list[AnswerRecord]]] = []
    kinds = tuple(dict.fromkeys(one.kind for one in shown))
    for kind in kinds:
        by_cause: dict[str, list[AnswerRecord]] = {}
        for one in failed:
            if one.kind == kind:
                by_cause.setdefault(one.cause or "not as expected", []).append(one)
        largest_first = sorted(by_cause.items(), key=lambda item: -len(item[1]))
        groups += [(f"{kind}, failed: {cause}", found) for cause, found in largest_first]
    for kind in kinds:
        # What had an answer before shows the change best.
        found = sorted((one for one in right if one.kind == kind), key=lambda one: not one.before)
        groups.append((f"{kind}, as expected", found))
        groups.append((f"{kind}, not scored", [one for one in open_ if one.kind == kind]))
    filled = [(title, found) for title, found in groups if found]
    folds = [
        Fold(title=f"{title}: {len(found):,}", blocks=(_answers_table(found),), is_open=number == 0)
        for number, (title, found) in enumerate(filled)
    ]
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


def change_blocks(report: EditReport) -> tuple[Block, ...]:
    """Show which matrices were changed, and how far."""
    location, model = report.location, report.model
    share = 100 * location.num_parameters / max(1, model.num_parameters)
    matrices = location.matrices
    return (
        Text(
            f"Location {location.name}: {location.num_parameters:,} of {model.num_parameters:,} "
            f"parameters ({share:.2f}%). The patch takes {bytes_text(report.patch_bytes)}."
        ),
        *(() if location.part is None else (Text(f"Only {location.part} was tuned."),)),
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
        *(() if location.experts is None else _experts(location.experts)),
    )


def _experts(experts: ExpertsInfo) -> tuple[Block, ...]:
    """Show how often the tuned experts serve the edits, the most often used first."""
    frozen = "Routers are frozen."
    if experts.served is None:
        return (Text(f"The model does not say which of its experts serve which tokens. {frozen}"),)
    served = experts.served
    ranked = sorted(experts.edited, key=lambda number: -served[number])
    unused = sum(served[number] == 0 for number in ranked)
    told = f", {unused:,} of them on no token, so that nothing changed there" if unused else ""
    return (
        Text(
            f"The layer has {counted(len(served), 'routed expert')}. "
            f"{counted(len(ranked), 'expert')} {'was' if len(ranked) == 1 else 'were'} tuned{told}. The "
            f"edits have {counted(experts.num_tokens, 'token')}. {frozen}"
        ),
        Table(
            columns=("expert", "tokens of the edits", "share"),
            rows=tuple(
                (
                    str(number),
                    f"{served[number]:,}",
                    f"{100 * served[number] / max(1, experts.num_tokens):.1f}%",
                )
                for number in ranked[:_MOST_MATRICES]
            ),
            left_out=_rest(len(ranked) - _MOST_MATRICES, "expert", "report.json"),
        ),
    )


def edit_cost_blocks(cost: Cost, plan: PlannedCost | None, training: TrainingInfo) -> tuple[Block, ...]:
    """Show what an edit run cost, beside what it was expected to cost."""
    parts = {
        "loading": "load_s",
        **({} if not _material_texts(training) else {"what training keeps and is given": "prepare_s"}),
        "frozen layers, once": "cache_s",
        "training": "train_s",
        "scoring, before and after": "eval_s",
        "in all": "wall_s",
    }
    at_most = {"train_s", "wall_s"}

    def planned(name: str) -> tuple[str, ...]:
        if plan is None:
            return ()
        if name == "prepare_s":
            return ("",)
        return (("at most " if name in at_most else "") + seconds_text(getattr(plan, name)),)

    rows = [(title, seconds_text(getattr(cost, name)), *planned(name)) for title, name in parts.items()]
    memory = () if plan is None else (bytes_text(plan.peak_memory_bytes),)
    rows.append(("peak memory", bytes_text(cost.peak_memory_bytes), *memory))
    table = Table(columns=("part", "took", *(("planned",) if plan else ())), rows=tuple(rows))
    per_edit = f"{cost.seconds_per_edit:.3g} s per edit (frozen layers and training)."
    if plan is not None:
        per_edit += (
            f" The plan allowed for {plan.epochs_at_most:,} epochs, and training took "
            f"{training.epochs:,}; it takes the machine to be as fast as it was before training."
        )
    return (Text(per_edit), table)


def eval_cost_table(cost: EvalCost, parts_s: Mapping[str, float]) -> Table:
    """Show what an evaluation cost, part by part."""
    rows = [(part, seconds_text(seconds)) for part, seconds in parts_s.items()]
    rows += [
        ("in all", seconds_text(cost.wall_s)),
        ("peak memory", bytes_text(cost.peak_memory_bytes)),
    ]
    return Table(columns=("part", "took"), rows=tuple(rows))


def settings_blocks(settings: Mapping[str, Any], resolved: Mapping[str, Any]) -> tuple[Block, ...]:
    """Show the settings, and what those came to that were left open; nothing where there are none."""
    rows = tuple(
        (name, setting_text(value) + (f" ({setting_text(resolved[name])})" if name in resolved else ""))
        for name, value in settings.items()
    )
    return (Table(columns=("setting", "value"), rows=rows),) if rows else ()


def provenance_table(environment: Environment, edits: EditsInfo) -> Table:
    """Show versions, hardware and the edits."""
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


def drawn(picture: Picture | None) -> Iterable[Picture]:
    """Give a picture as the blocks that it is, or that it is not."""
    return () if picture is None else (picture,)


def _material_texts(training: TrainingInfo) -> tuple[str, ...]:
    """Say what training was given beside the edits, and what it kept."""
    texts: list[str] = []
    added, kept, held = training.augmented, training.preserved, training.held_back
    if added is not None:
        kinds = ", ".join(f"{num:,} {kind}" for kind, num in added.num_by_kind.items())
        texts.append(
            f"Edits were also trained on further examples ({kinds or 'none'}; {added.num_asked:,} asked "
            f"for): examples.jsonl. Scored prompts among them: {added.num_scored:,}."
        )
    if kept is not None and kept.strength is not None and training.text is not None:
        whose = "of its own" if training.text.text == "model" else f"of {training.text.text}"
        plain = counted(len(kept.left_plain), "other parameter")
        texts.append(
            "Updates were kept off the directions that ordinary text uses (covariance, strength "
            f"{kept.strength:g}), as the unedited model reads {kept.num_tokens:,} tokens {whose}"
            + (f"; {plain} of the location were trained plainly." if kept.left_plain else ".")
        )
    if kept is not None and kept.num_anchors:
        texts.append(
            f"{counted(kept.num_anchors, 'text')} were held to what the unedited model makes of them "
            "(anchors)."
        )
    if held is not None and kept is not None and kept.max_drift is not None:
        words = limit_in_words(held, kept.max_drift)
        texts.append(words[0].upper() + words[1:] + ".")
    return tuple(texts)


def _rest(num: int, noun: str, file: str) -> str:
    return f"{counted(num, f'more {noun}')}: {file}" if num > 0 else ""
