"""`locft bench scoring`: answers prompts with guesses and without, and compares what comes of it.

Scoring guesses what an edited model answers, so that a right guess costs one pass. That is worth
something only if it changes no answer, which is what is measured here, on one model in memory.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from locft.config import RunConfig
from locft.data.gather import check_tokens, gather_edits
from locft.evaluation.generate import answer_prompts
from locft.evaluation.metrics import is_match, share
from locft.evaluation.scoring import guesses_for, items_of, prompts_of
from locft.evaluation.subject import Subject, load_subject
from locft.model.load import context_tokens
from locft.model.weights import swapped_in
from locft.patch.format import open_patch
from locft.patch.weights import patched_values
from locft.provenance import describe_environment, describe_model
from locft.recipe.run_folder import edits_of_run
from locft.report.schema import Environment, ModelInfo
from locft.report.words import counted
from locft.types import KINDS, Edit, Figure, Kind

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One way of answering all prompts: the seconds it took, and the scores of its answers."""

    seconds: float
    reliability: Figure
    generalization: Figure
    locality: Figure

    @property
    def scores(self) -> tuple[Figure, Figure, Figure]:
        """The scores alone."""
        return self.reliability, self.generalization, self.locality


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A prompt with two answers.

    Attributes:
        prompt: The prompt.
        without_guesses: The answer that was generated.
        with_guesses: The other answer.
        is_confirmed: Whether that is a guess that one pass confirmed; else it was generated, too, but
            beside other prompts.
    """

    prompt: str
    without_guesses: str
    with_guesses: str
    is_confirmed: bool


@dataclass(frozen=True, kw_only=True)
class ScoringBench:
    """What `locft bench scoring` found.

    Attributes:
        num_prompts: Different prompts that were answered.
        num_guessed: Those that had a guess.
        num_confirmed: Those whose guess one pass confirmed.
        num_generated: The others.
        is_equal: Whether all answers and all scores are equal.
        differences: The prompts whose answers differ.
        speed_up: Seconds without guesses over seconds with them.
    """

    schema_version: int
    model: ModelInfo
    patch: str | None
    num_edits: int
    num_prompts: int
    num_guessed: int
    num_confirmed: int
    num_generated: int
    is_equal: bool
    differences: tuple[Difference, ...]
    without_guesses: Pass
    with_guesses: Pass
    speed_up: float
    settings: dict[str, Any]
    environment: Environment


def measure_scoring(
    model: str = "demo",
    edits: str | Path | Sequence[Edit] | None = None,
    patch: str | Path | None = None,
    num_edits: int = 1000,
    config: RunConfig | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> ScoringBench:
    """Answer the prompts of edits without guesses and with them, on one model.

    Args:
        model: A Hugging Face id, a local folder, or ``demo``.
        edits: A file, ``demo``, or the edits themselves. If None, those of the run folder that `patch`
            is, else ``demo``.
        patch: A patch folder, or a run folder that holds one, to put into the model; on an unedited
            model few guesses are right.
        num_edits: How many edits to take, from the first on.
        config: The settings; those that concern training do not count. If None, the defaults, in the
            format that the patch was trained in.
        say: Called with a line at each step.

    Returns:
        What both gave, and what each took.

    Raises:
        InputError: The edits, the model or the patch cannot be used, with the reason.
    """
    found = None if patch is None else open_patch(Path(patch))
    config = config or RunConfig(format=found.manifest.format if found else "raw")
    gathered = gather_edits(_edits_of_run(patch) if edits is None else edits, config.on_conflict)
    say(f"loading {model}")
    subject = load_subject(model, config)
    check_tokens(gathered, subject.codec, context_tokens(subject.loaded.model.config))
    taken = gathered.edits[:num_edits]
    say(f"answering {counted(len(set(prompts_of(taken))), 'prompt')}, twice")
    # Locality is scored by what the model answered before the edit.
    base_answers = subject.answer(
        [text for edit in taken for text in edit.locality], "answering, unedited"
    )
    folder = subject.loaded.checkpoint.folder
    values = {} if found is None else patched_values(subject.loaded.model, folder, found)
    with swapped_in(subject.loaded.model, values):
        return _compare(subject, taken, base_answers, None if patch is None else str(patch), config)


def _edits_of_run(patch: str | Path | None) -> str | Path:
    return (None if patch is None else edits_of_run(Path(patch))) or "demo"


def _compare(
    subject: Subject,
    edits: Sequence[Edit],
    base_answers: Mapping[str, str],
    patch: str | None,
    config: RunConfig,
) -> ScoringBench:
    prompts = list(dict.fromkeys(prompts_of(edits)))
    guesses = guesses_for(edits)
    _answer(subject, prompts[:1], {})  # what is done once for a device is no part of either
    plain, _, plain_s = _answer(subject, prompts, {})
    guessed, confirmed, guessed_s = _answer(subject, prompts, guesses)
    differences = tuple(
        Difference(
            prompt=prompt,
            without_guesses=plain[prompt],
            with_guesses=guessed[prompt],
            is_confirmed=prompt in confirmed,
        )
        for prompt in prompts
        if plain[prompt] != guessed[prompt]
    )
    without_guesses = _score(edits, plain, base_answers, plain_s)
    with_guesses = _score(edits, guessed, base_answers, guessed_s)
    return ScoringBench(
        schema_version=SCHEMA_VERSION,
        model=describe_model(subject.loaded),
        patch=patch,
        num_edits=len(edits),
        num_prompts=len(prompts),
        num_guessed=len(guesses),
        num_confirmed=len(confirmed),
        num_generated=len(prompts) - len(confirmed),
        is_equal=not differences and without_guesses.scores == with_guesses.scores,
        differences=differences,
        without_guesses=without_guesses,
        with_guesses=with_guesses,
        speed_up=plain_s / guessed_s,
        settings=asdict(config),
        environment=describe_environment(subject.loaded.model.device),
    )


def _answer(
    subject: Subject, prompts: Sequence[str], guesses: Mapping[str, str]
) -> tuple[dict[str, str], set[str], float]:
    """Answer prompts: the answers, the prompts whose guesses were confirmed, and the seconds."""
    confirmed: set[str] = set()
    began = time.perf_counter()
    # The answers are on the CPU when they are here, so no device is still at work.
    answers = answer_prompts(
        subject.loaded.model,
        subject.codec,
        prompts,
        batch_size=subject.batch_size,
        label=f"answering, with{'' if guesses else 'out'} guesses",
        guesses=guesses,
        on_confirmed=confirmed.update,
    )
    return answers, confirmed, time.perf_counter() - began


def _score(
    edits: Sequence[Edit], answers: Mapping[str, str], base_answers: Mapping[str, str], seconds: float
) -> Pass:
    figures: dict[Kind, Figure] = {}
    for kind in KINDS:
        matches = [
            is_match(answers[item.prompt], item.expected or base_answers[item.prompt])
            for item in items_of(edits, [kind])
        ]
        figures[kind] = share(sum(matches), len(matches))
    return Pass(seconds=seconds, **figures)
