"""Evaluate a model, without and with a patch: the whole story, read top to bottom."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from locft.config import RunConfig
from locft.data.contexts import CONTEXTS, Context
from locft.data.edits import EditFile
from locft.data.gather import check_tokens, gather_edits, say_warnings
from locft.errors import ConfigError, InputError
from locft.evaluation.answer_cache import AnswerCache, default_cache_path
from locft.evaluation.capability import (
    CapabilityTasks,
    TaskResult,
    compare_capability,
    measure_capability,
    plan_tasks,
)
from locft.evaluation.drift import Drift, NeutralText, read_neutral_text
from locft.evaluation.endpoint import Endpoint, endpoint_from_environment
from locft.evaluation.judge import agreement, judge_answers
from locft.evaluation.measure import (
    Readers,
    Way,
    measure_model,
    measure_unedited,
    record_answers,
)
from locft.evaluation.metrics import is_match
from locft.evaluation.protocols import choose_protocols, locft, refuse_without_old, wild
from locft.evaluation.remote import RemoteReader
from locft.evaluation.scoring import Item, Result, guesses_for, items_of, prompts_of
from locft.evaluation.subject import Reader, Subject, drift_between, drift_of_values, load_subject
from locft.model.load import context_tokens
from locft.model.weights import swapped_in
from locft.patch.format import Patch, open_patch
from locft.patch.weights import patched_values
from locft.provenance import (
    Stopwatch,
    count_causes,
    describe_drift,
    describe_edits,
    describe_environment,
    describe_model,
    describe_scores,
    peak_memory_bytes,
)
from locft.report.schema import (
    SCHEMA_VERSION,
    EndpointInfo,
    EvalCost,
    EvalReport,
    JudgeInfo,
    ProtocolScores,
)
from locft.report.words import counted
from locft.types import AnswerRecord, CapabilityScores, Edit, Kind, PassageDrift

ENDPOINT_NAME = "endpoint"
_CAPABILITY_BATCH = 8  # lm-eval takes logits at every position of a batch

# How far an edit carries: locality prompts are no part of it.
_CARRIED: tuple[Kind, ...] = ("reliability", "generalization")


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What `evaluate` measures.

    Attributes:
        protocols: Names of protocols; the first one's scores are the main ones.
        contexts: Names of contexts, for reliability and generalization by the first protocol that takes
            answers; none of them gives no matrix.
        judge: Whether protocol ``wild`` has another model judge the answers: a chat endpoint, named by
            LOCFT_JUDGE_URL, LOCFT_JUDGE_MODEL and LOCFT_JUDGE_KEY in the environment.
        capability: Names of lm-eval's tasks, or ``paper`` for the paper's five.
        capability_data: A folder with NAME.jsonl for each of them; None fetches them from the hub.
        capability_limit: Ask at most so many items of each task.
    """

    protocols: tuple[str, ...] = ("locft",)
    contexts: tuple[Context, ...] = ()
    judge: bool = False
    capability: tuple[str, ...] = ()
    capability_data: Path | None = None
    capability_limit: int | None = None


@dataclass(frozen=True)
class _Ways:
    """The ways of scoring: the protocols, and the contexts of the one that takes answers."""

    protocols: tuple[Way, ...]
    contexts: tuple[Way, ...]

    @property
    def context_names(self) -> tuple[Context, ...]:
        """Every context that a prompt is put into."""
        return tuple(dict.fromkeys(way.context for way in (*self.protocols, *self.contexts)))

    def items(self, edits: Sequence[Edit]) -> dict[Way, list[Item]]:
        """List what each way measures; a way that is in both lists is measured once."""
        whole = {way: items_of(edits) for way in self.protocols}
        return whole | {way: items_of(edits, _CARRIED) for way in self.contexts if way not in whole}


class _Judge:
    """A judge that remembers its verdicts."""

    def __init__(self, endpoint: Endpoint, cache: AnswerCache) -> None:
        self._endpoint = endpoint
        self._cache = cache
        self._verdicts: dict[wild.Triple, bool | None] = {}

    def __call__(self, triples: Sequence[wild.Triple]) -> dict[wild.Triple, bool | None]:
        found = judge_answers(self._endpoint, triples, label="judging", cache=self._cache)
        self._verdicts |= found
        return found

    def describe(self) -> JudgeInfo:
        """Say how often it agreed with exact match, on the answers to prompts and rephrases."""
        # A blank answer is wrong without a judge.
        judged = {triple: verdict for triple, verdict in self._verdicts.items() if triple[2].strip()}
        verdicts = list(judged.values())
        return JudgeInfo(
            model=self._endpoint.model,
            agreement=agreement(verdicts, [is_match(answer, target) for _, target, answer in judged]),
            num_without_verdict=verdicts.count(None),
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` finds.

    Attributes:
        report: The report.
        answers: Every answer beside what was expected.
        passages: The drift of every passage; none where drift was not measured.
    """

    report: EvalReport
    answers: tuple[AnswerRecord, ...]
    passages: tuple[PassageDrift, ...]


def evaluate(
    model: str,
    edits: str | Path | EditFile | Sequence[Edit],
    patch: str | Path | None = None,
    base: str | None = None,
    config: RunConfig | None = None,
    measures: Measures | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Score any model, or a model with a patch, on any edits.

    Args:
        model: A Hugging Face id, a local folder, or ``demo``; or ``endpoint``, a server that speaks
            OpenAI's API of completions, named by LOCFT_ENDPOINT_URL, LOCFT_ENDPOINT_MODEL and
            LOCFT_ENDPOINT_KEY in the environment.
        edits: A file, ``demo`` for the packaged facts, or the edits themselves.
        patch: A patch folder, or a run folder that holds one; `model` is then the unedited model.
        base: The unedited model of an edited checkpoint; without it, and without `patch`, locality
            and drift are not measured.
        config: The settings; those that concern training do not count. If None, the defaults, in
            the format that the patch was trained in.
        measures: What to measure; if None, protocol ``locft``.
        say: Called with a line at each step, and with each warning about the edits.

    Returns:
        The report, every answer beside what was expected, and the drift of every passage.

    Raises:
        InputError: The edits, a model or the patch cannot be used, with the reason.
        EvaluationError: A server does not answer, or predictions are not finite.
    """
    found = None if patch is None else open_patch(Path(patch))
    config = config or RunConfig(format=found.manifest.format if found else "raw")
    measures = measures or Measures()
    if patch is not None and base is not None:
        raise InputError("--patch and --base exclude each other: with a patch, MODEL is the base")
    with ExitStack() as stack:
        judge = endpoint = cache = None
        if measures.judge:
            # Verdicts stay valid: they are on texts, by a model that nobody edits.
            verdicts = stack.enter_context(AnswerCache(default_cache_path()))
            judge = _Judge(endpoint_from_environment("LOCFT_JUDGE"), verdicts)
        ways = _choose_ways(measures, config, judge)
        if model == ENDPOINT_NAME:
            _refuse_for_endpoint(ways, patch, measures)
            endpoint = endpoint_from_environment("LOCFT_ENDPOINT")
            # The server may serve another model under this name tomorrow.
            cache = stack.enter_context(AnswerCache(default_cache_path(), keep=False))
        tasks = None
        if measures.capability:
            data = measures.capability_data
            tasks = plan_tasks(measures.capability, data, measures.capability_limit)
        watch = Stopwatch()
        text = read_neutral_text(config.drift_text)
        gathered = gather_edits(edits, config.on_conflict)
        for way in ways.protocols:
            refuse_without_old(way.protocol, gathered.edits)

        # 1. The models.
        say(
            f"loading {model}" if endpoint is None else f"asking {endpoint.model} at {endpoint.base_url}"
        )
        subject = None if endpoint is not None else load_subject(model, config)
        unedited = None
        if base is not None:
            say(f"loading {base}")
            # A revision is the model's; its base is named without one.
            unedited = load_subject(base, replace(config, revision=None))
        local = subject or unedited
        warnings = gathered.warnings
        if local is not None:
            warnings = check_tokens(gathered, local.codec, context_tokens(local.loaded.model.config))
        say_warnings(gathered, warnings, say)
        watch.lap("load")
        load_s = watch.wall_s

        # 2. What they make of the prompts.
        num_prompts = len(set(prompts_of(gathered.edits)))
        say(f"scoring {counted(num_prompts, 'prompt')} by {', '.join(measures.protocols)}")
        remote: Readers = {}
        if endpoint is not None and cache is not None:
            remote = {name: RemoteReader(endpoint, name, cache) for name in ways.context_names}
        records = _measure(subject or remote, unedited, found, ways, gathered.edits, watch)
        if cache is not None and cache.num_found:
            say(
                f"{counted(cache.num_found, 'answer')} of an evaluation that was cut short, kept in "
                f"{cache.path}: delete it and run again if the server has another model since"
            )

        # 3. What the edit did besides.
        drift = capability = None
        if subject is not None:
            if found is not None or unedited is not None:
                drift = _measure_drift(subject, unedited, found, text)
                watch.lap("drift")
            if tasks is not None:
                capability = _measure_capability(subject, unedited, found, tasks)
                watch.lap("capability")

    # 4. The report.
    has_unedited = unedited is not None or found is not None
    of_protocols = {
        way.protocol.name: describe_scores(
            way.protocol, way.context, records[way], has_unedited=has_unedited
        )
        for way in ways.protocols
    }
    of_contexts: dict[str, ProtocolScores] = {
        way.context: describe_scores(
            way.protocol, way.context, records[way], _CARRIED, has_unedited=has_unedited
        )
        for way in ways.contexts
    }
    device = torch.device("cpu") if local is None else local.loaded.model.device
    report = EvalReport(
        schema_version=SCHEMA_VERSION,
        model=None if subject is None else describe_model(subject.loaded),
        endpoint=None if endpoint is None else EndpointInfo(url=endpoint.base_url, model=endpoint.model),
        patch=None if patch is None else str(patch),
        base=base,
        edits=describe_edits(gathered, len(warnings)),
        protocols=of_protocols,
        contexts=of_contexts,
        judge=None if judge is None else judge.describe(),
        causes=count_causes(records[ways.protocols[0]]),
        drift=None if drift is None else describe_drift(text, drift),
        capability=capability,
        cost=EvalCost(
            load_s=load_s,
            eval_s=watch.wall_s - load_s,
            wall_s=watch.wall_s,
            peak_memory_bytes=peak_memory_bytes(device),
        ),
        parts_s=watch.spent,
        environment=describe_environment(device),
    )
    return Evaluation(
        report=report,
        answers=tuple(record for of_way in records.values() for record in of_way),
        passages=() if drift is None else drift.passages,
    )


def _measure(
    scored: Subject | Readers,
    unedited: Subject | None,
    patch: Patch | None,
    ways: _Ways,
    edits: Sequence[Edit],
    watch: Stopwatch,
) -> dict[Way, list[AnswerRecord]]:
    """Measure a model (or what a server answers) beside the unedited one, if there is one."""
    items = ways.items(edits)
    before: dict[Way, list[Result]] | None = None

    def lap(way: Way) -> None:
        watch.lap(f"{way.protocol.name}, {way.context}")

    if patch is not None and isinstance(scored, Subject):
        unedited = scored
    if unedited is not None:
        items, before = measure_unedited(_readers(unedited, ways, "unedited"), items, lap)
    if isinstance(scored, Subject):
        with swapped_in(scored.loaded.model, _values(scored, patch)):
            after = measure_model(_readers(scored, ways, "scored model", edits), items, lap)
    else:
        after = measure_model(scored, items, lap)
    return record_answers(items, before, after)


def _values(subject: Subject, patch: Patch | None) -> dict[str, Tensor]:
    """Give what a patch puts into a model in memory, by parameter; nothing without a patch."""
    if patch is None:
        return {}
    return patched_values(subject.loaded.model, subject.loaded.checkpoint.folder, patch)


def _measure_drift(
    subject: Subject, unedited: Subject | None, patch: Patch | None, text: NeutralText
) -> Drift:
    if unedited is not None:
        return drift_between(unedited, subject, text)
    return drift_of_values(subject, _values(subject, patch), text)


def _measure_capability(
    subject: Subject, unedited: Subject | None, patch: Patch | None, tasks: CapabilityTasks
) -> CapabilityScores:
    def ask(asked: Subject, label: str) -> dict[str, TaskResult]:
        loaded = asked.loaded
        return measure_capability(
            loaded.model, loaded.tokenizer, tasks, batch_size=_CAPABILITY_BATCH, label=label
        )

    base = subject if patch is not None else unedited
    before = None if base is None else ask(base, "unedited")
    with swapped_in(subject.loaded.model, _values(subject, patch)):
        return compare_capability(before, ask(subject, "scored model"), tasks)


def _choose_ways(measures: Measures, config: RunConfig, judge: _Judge | None) -> _Ways:
    chosen = choose_protocols(measures.protocols)
    unknown = [name for name in measures.contexts if name not in CONTEXTS]
    if unknown or len(set(measures.contexts)) < len(measures.contexts):
        what = f"unknown context {unknown[0]!r}" if unknown else "contexts are named once each"
        raise ConfigError(f"{what}: expected one or more of {', '.join(CONTEXTS)}")
    if judge is not None:
        if wild.PROTOCOL not in chosen:
            raise ConfigError("--judge judges the answers of protocol wild: add --protocols wild")
        chosen = tuple(wild.judged_by(judge) if one is wild.PROTOCOL else one for one in chosen)
    answering = next((one for one in chosen if one.shows_answers), locft.PROTOCOL)
    return _Ways(
        protocols=tuple(Way(protocol, config.format) for protocol in chosen),
        contexts=tuple(Way(answering, context) for context in measures.contexts),
    )


def _refuse_for_endpoint(ways: _Ways, patch: str | Path | None, measures: Measures) -> None:
    if patch is not None:
        raise InputError("a patch cannot be put into an endpoint: serve the edited model there")
    blind = [f"protocol {way.protocol.name}" for way in ways.protocols if way.protocol.needs_logits]
    if measures.capability:
        blind.append("capability")
    if blind:
        raise InputError(
            f"an endpoint gives answers, and {blind[0]} needs a model's predictions: name a model, or "
            "leave it out"
        )


def _readers(subject: Subject, ways: _Ways, label: str, edits: Sequence[Edit] = ()) -> Readers:
    """Make the readers of a model in one state, by context; `edits` are what it may have learnt."""
    # A protocol that shows no answers may still ask for the unedited model's, by `locft`.
    lengths = (way.protocol.max_new_tokens or locft.MAX_NEW_TOKENS for way in ways.protocols)
    longest, trained = max(lengths), ways.protocols[0].context
    return {
        context: Reader(
            subject,
            context,
            label=label,
            max_new_tokens=longest,
            guesses=guesses_for(edits) if context == trained else {},
        )
        for context in ways.context_names
    }
