"""Checks of edits before they are trained on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from locft.data.edits import EditFile
from locft.data.normalise import collapse_spaces, cut_answer, normalise
from locft.data.problems import Problem, shown
from locft.errors import EditsError
from locft.types import Edit


@dataclass(frozen=True)
class Measured:
    """What a tokenizer makes of one edit.

    Attributes:
        num_prompt_tokens: Tokens of the prompt alone.
        num_target_tokens: Tokens that the target adds, without the end-of-sequence token.
        prompt_is_prefix: Whether the tokens of prompt and target together begin with those of
            the prompt alone.
        longest_scored_tokens: Tokens of the longest rephrase or locality prompt.
    """

    num_prompt_tokens: int
    num_target_tokens: int
    prompt_is_prefix: bool
    longest_scored_tokens: int = 0


def lint(
    edit_file: EditFile,
    *,
    measure: Callable[[Edit], Measured] | None = None,
    max_context_tokens: int | None = None,
    max_answer_tokens: int = 32,
) -> tuple[Problem, ...]:
    """Find what would make editing fail, or its measurement meaningless.

    Args:
        edit_file: A file as it was read.
        measure: Tokenizes an edit; without it the checks that need a tokenizer are left out.
        max_context_tokens: The most tokens that the model takes, if it has a limit.
        max_answer_tokens: How many tokens scoring decodes.

    Returns:
        The problems of reading, and then those found here.
    """
    problems = list(edit_file.problems)
    problems.extend(_repetitions(edit_file.edits))
    problems.extend(_leaks(edit_file.edits))
    for edit in edit_file.edits:
        problems.extend(_check_texts(edit))
        if measure is not None:
            measured = measure(edit)
            problems.extend(_check_tokens(edit, measured, max_context_tokens, max_answer_tokens))
    return tuple(problems)


def resolve_conflicts(
    edits: Sequence[Edit], policy: Literal["error", "keep-last", "keep-first"]
) -> tuple[Edit, ...]:
    """Drop edits until no prompt has two targets.

    Of the edits with one prompt those are kept that have the target of the first or the last of
    them; targets and prompts are compared as `lint` compares them. So repetitions of the winning
    target stay, with their own rephrases and locality prompts.

    Args:
        edits: In the order of their file.
        policy: ``keep-first`` or ``keep-last``; ``error`` drops nothing.

    Returns:
        The edits that are left, in the order given.

    Raises:
        EditsError: The policy is ``error`` and there are contradictions; the message lists them.
    """
    if policy == "error":
        found = [problem for problem in _repetitions(edits) if problem.code == "contradiction"]
        if found:
            lines = [f"{problem.where}: {problem.message}" for problem in found]
            raise EditsError("\n  ".join(["the edits contradict each other:", *lines]))
        return tuple(edits)
    winners: dict[str, str] = {}
    for edit in edits if policy == "keep-last" else reversed(edits):
        winners[collapse_spaces(edit.prompt)] = _answer(edit)
    return tuple(edit for edit in edits if winners[collapse_spaces(edit.prompt)] == _answer(edit))


def _answer(edit: Edit) -> str:
    """Reduce a target to what tells it from others."""
    # Targets of punctuation alone all have an empty normal form, but are not the same.
    return normalise(edit.target) or collapse_spaces(edit.target)


def _repetitions(edits: Iterable[Edit]) -> Iterator[Problem]:
    """Compare each edit with the earlier ones of the same prompt."""
    seen: dict[str, dict[str, Edit]] = {}
    for edit in edits:
        answer = _answer(edit)
        earlier = seen.setdefault(collapse_spaces(edit.prompt), {})
        if (same := earlier.get(answer)) is not None:
            message = f"repeats {_place(same)}, prompt and target: this edit weighs double"
            yield Problem("warning", "duplicate", _place(edit), message)
            continue
        if earlier:
            first = next(iter(earlier.values()))
            message = (
                f"contradicts {_place(first)}: {shown(edit.prompt)} has the target "
                f"{shown(first.target)} there and {shown(edit.target)} here; remove one, or "
                "choose with --on-conflict keep-last|keep-first"
            )
            yield Problem("error", "contradiction", _place(edit), message)
        earlier[answer] = edit


def _leaks(edits: Sequence[Edit]) -> Iterator[Problem]:
    """Find what would be trained on and is scored, of whichever edit."""
    scored = {
        collapse_spaces(text): edit for edit in edits for text in (*edit.rephrases, *edit.locality)
    }
    for edit in edits:
        for name in ("train_rephrases", "train_locality"):
            for text in getattr(edit, name):
                if (other := scored.get(collapse_spaces(text))) is not None:
                    message = (
                        f"`{name}` holds {shown(text)}, which is scored at {_place(other)}: what is "
                        "trained on measures nothing; remove it from one of them"
                    )
                    yield Problem("error", "trained-and-scored", _place(edit), message)


def _place(edit: Edit) -> str:
    return edit.source or f"edit {edit.id}"


def _check_texts(edit: Edit) -> Iterator[Problem]:
    answer = normalise(edit.target)
    cut = cut_answer(edit.target)
    if not answer:
        message = (
            f"the target {shown(edit.target)} has nothing left to compare once case, punctuation "
            "and articles are gone"
        )
        yield Problem("warning", "unmatchable-target", _place(edit), message)
    elif normalise(cut) != answer:
        message = (
            f"no answer can match the target {shown(edit.target)}: scoring cuts answers at the "
            f'first "." or line break, here to {shown(cut)}'
        )
        yield Problem("warning", "unmatchable-target", _place(edit), message)
    prompt = collapse_spaces(edit.prompt)
    if any(collapse_spaces(rephrase) == prompt for rephrase in edit.rephrases):
        message = "a rephrase is the prompt itself, so it does not measure generalization"
        yield Problem("warning", "rephrase-equals-prompt", _place(edit), message)


def _check_tokens(
    edit: Edit, measured: Measured, max_context_tokens: int | None, max_answer_tokens: int
) -> Iterator[Problem]:
    num_target = measured.num_target_tokens
    longest = max(measured.num_prompt_tokens, measured.longest_scored_tokens)
    # One more for the end-of-sequence token, which is trained; scoring decodes after every prompt.
    num_tokens = max(measured.num_prompt_tokens + num_target + 1, longest + max_answer_tokens)
    if max_context_tokens is not None and num_tokens > max_context_tokens:
        message = (
            f"its longest prompt has {longest:,} tokens; with its target, or an answer of up to "
            f"{max_answer_tokens}, {num_tokens:,} are needed, and the model takes {max_context_tokens:,}"
        )
        yield Problem("error", "prompt-too-long", _place(edit), message)
    if num_target == 0:
        message = f"the target {shown(edit.target)} has no tokens of its own, nothing to learn"
        yield Problem("error", "target-no-tokens", _place(edit), message)
    if num_target > max_answer_tokens:
        message = (
            f"no answer can match the target: it has {num_target:,} tokens, scoring decodes "
            f"{max_answer_tokens:,}"
        )
        yield Problem("warning", "target-too-long", _place(edit), message)
    if not measured.prompt_is_prefix:
        message = (
            "the target changes how the prompt's last characters are split into tokens, but "
            "decoding starts from the prompt alone; end the prompt at a word boundary"
        )
        yield Problem("warning", "boundary", _place(edit), message)
