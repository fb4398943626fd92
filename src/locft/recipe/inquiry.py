"""Ask a model, without and with a patch; lint edits for a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from locft.config import RunConfig
from locft.data.edits import EditFile
from locft.data.gather import lint_tokens
from locft.data.problems import Problem
from locft.errors import InputError
from locft.evaluation.subject import load_codec, load_subject
from locft.model.weights import swapped_in
from locft.patch.format import open_patch
from locft.patch.weights import patched_values


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


def lint_for_model(file: EditFile, model: str, config: RunConfig) -> tuple[Problem, ...]:
    """Report all problems of an edits file, those that a model's tokenizer makes included.

    Raises:
        ModelError: There is no such model, or its tokenizer cannot be used.
    """
    codec, max_context_tokens = load_codec(model, config)
    return lint_tokens(file, codec, max_context_tokens)
