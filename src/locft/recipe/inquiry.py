"""Ask a model, and evaluate it, without and with a patch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from locft.config import RunConfig
from locft.data.edits import EditFile
from locft.data.gather import check_tokens, gather_edits, lint_tokens, say_warnings
from locft.data.problems import Problem
from locft.errors import InputError
from locft.evaluation.drift import Drift, read_neutral_text
from locft.evaluation.scoring import (
    AnswerRecord,
    answer_records,
    guesses_for,
    prompts_of,
    score,
    score_unedited,
)
from locft.evaluation.subject import drift_between, drift_of_values, load_codec, load_subject
from locft.model.load import context_tokens
from locft.model.weights import swapped_in
from locft.patch.format import open_patch
from locft.patch.weights import patched_values
from locft.provenance import (
    Stopwatch,
    describe_drift,
    describe_edits,
    describe_environment,
    describe_model,
    describe_protocol,
    peak_memory_bytes,
)
from locft.report.schema import SCHEMA_VERSION, EvalCost, EvalReport
from locft.report.words import counted
from locft.types import Edit


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt, and what the model answers without and with the patch (None if there is none)."""

    prompt: str
    before: str
    after: str | None


def ask(
    model: str,
    prompts: Sequence[str],
    patch: str | Path | None = None,
    config: RunConfig | None = None,
) -> list[Asked]:
    """Ask a model, without and with a patch: greedy decoding, at most 32 tokens, the first line.

    Args:
        model: A Hugging Face id, a local folder, or ``demo``.
        prompts: What to ask.
        patch: A patch folder, or a run folder that holds one; `model` is then the unedited model.
        config: The settings; `format`, `dtype` and `device` count here. If None, the defaults, in
            the format that the patch was trained in.

    Returns:
        The answers, in the order of the prompts.

    Raises:
        InputError: The model or the patch cannot be used, with the reason.
    """
    found = None if patch is None else open_patch(Path(patch))
    config = config or RunConfig(format=found.manifest.format if found else "raw")
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise InputError("there is nothing to ask: a prompt is empty")
    subject = load_subject(model, config)
    values = (
        patched_values(subject.loaded.model, subject.loaded.checkpoint.folder, found) if found else {}
    )
    before = subject.answer(prompts, "answering", "line")
    if found is None:
        return [Asked(prompt=prompt, before=before[prompt], after=None) for prompt in prompts]
    with swapped_in(subject.loaded.model, values):
        after = subject.answer(prompts, "answering, edited", "line")
    return [Asked(prompt=prompt, before=before[prompt], after=after[prompt]) for prompt in prompts]


def evaluate(
    model: str,
    edits: str | Path | EditFile | Sequence[Edit],
    patch: str | Path | None = None,
    base: str | None = None,
    config: RunConfig | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[EvalReport, list[AnswerRecord]]:
    """Score any model, or a model with a patch, on any edits.

    Args:
        model: A Hugging Face id, a local folder, or ``demo``.
        edits: A file, ``demo`` for the packaged facts, or the edits themselves.
        patch: A patch folder, or a run folder that holds one; `model` is then the unedited model.
        base: The unedited model of an edited checkpoint; without it, and without `patch`, locality
            and drift are not measured.
        config: The settings; those that concern training do not count. If None, the defaults, in
            the format that the patch was trained in.
        say: Called with a line at each step, and with each warning about the edits.

    Returns:
        The report, and every answer beside what was expected.

    Raises:
        InputError: The edits, a model or the patch cannot be used, with the reason.
    """
    found = None if patch is None else open_patch(Path(patch))
    config = config or RunConfig(format=found.manifest.format if found else "raw")
    if patch is not None and base is not None:
        raise InputError("--patch and --base exclude each other: with a patch, MODEL is the base")
    watch = Stopwatch()
    text = read_neutral_text(config.drift_text)
    gathered = gather_edits(edits, config.on_conflict)
    say(f"loading {model}")
    subject = load_subject(model, config)
    unedited = None
    if base is not None:
        say(f"loading {base}")
        # A revision is the model's; its base is named without one.
        unedited = load_subject(base, replace(config, revision=None))
    warnings = check_tokens(gathered, subject.codec, context_tokens(subject.loaded.model.config))
    say_warnings(gathered, warnings, say)
    watch.lap("load")
    prompts = prompts_of(gathered.edits)
    say(f"answering {counted(len(set(prompts)), 'prompt')}")
    base_answers: dict[str, str] | None = None
    drift: Drift | None = None
    if found is not None:
        values = patched_values(subject.loaded.model, subject.loaded.checkpoint.folder, found)
        base_answers = subject.answer(prompts, "answering, unedited")
        with swapped_in(subject.loaded.model, values):
            guesses = guesses_for(gathered.edits)
            answers = subject.answer(prompts, "answering, edited", guesses=guesses)
        drift = drift_of_values(subject, values, text)
    else:
        answers = subject.answer(prompts, "answering", guesses=guesses_for(gathered.edits))
    if unedited is not None:
        base_answers = unedited.answer(prompts, "answering, unedited")
        drift = drift_between(unedited, subject, text)
    watch.lap("eval")
    before = None
    if base_answers is not None and drift is not None:
        before = score_unedited(gathered.edits, base_answers, drift.overall.num)
    device = subject.loaded.model.device
    report = EvalReport(
        schema_version=SCHEMA_VERSION,
        model=describe_model(subject.loaded),
        patch=None if patch is None else str(patch),
        base=base,
        edits=describe_edits(gathered, len(warnings)),
        protocol=describe_protocol(config.format),
        scores_before=before,
        scores=score(gathered.edits, answers, base_answers, drift.overall if drift else None),
        drift=None if drift is None else describe_drift(text, drift),
        cost=EvalCost(
            load_s=watch.spent["load"],
            eval_s=watch.spent["eval"],
            wall_s=watch.wall_s,
            peak_memory_bytes=peak_memory_bytes(device),
        ),
        environment=describe_environment(device),
    )
    return report, list(answer_records(gathered.edits, answers, base_answers))


def lint_for_model(file: EditFile, model: str, config: RunConfig) -> tuple[Problem, ...]:
    """Report all problems of an edits file, those that a model's tokenizer makes included.

    Raises:
        ModelError: There is no such model, or its tokenizer cannot be used.
    """
    codec, max_context_tokens = load_codec(model, config)
    return lint_tokens(file, codec, max_context_tokens)
