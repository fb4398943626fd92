"""Gets other wordings of prompts to train on: from the edits' file, from the model, or from a server."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Literal

from locft.data.rephrase import rephrasing_task, usable_wordings
from locft.evaluation.answer_cache import AnswerCache, default_cache_path
from locft.evaluation.endpoint import complete_prompts, endpoint_from_environment
from locft.evaluation.generate import decode_prompts, read_answers
from locft.evaluation.subject import Subject
from locft.types import Edit

Rephraser = Literal["model", "endpoint"]

# Some are not usable, so that more are asked for.
_ASKED_TIMES = 2
_TOKENS_PER_WORDING = 32
_LABEL = "asking for other wordings"


def find_wordings(
    subject: Subject, edits: Sequence[Edit], num: int, rephraser: Rephraser
) -> list[Iterable[str]]:
    """Find other wordings of each edit's prompt.

    Args:
        subject: The model, unedited.
        edits: The edits; their `train_rephrases` come first, and no others are asked for where those
            are enough.
        num: How many each edit needs.
        rephraser: Who writes the others: the model itself, in its chat template, or the server that
            ``LOCFT_REPHRASER_URL`` and ``LOCFT_REPHRASER_MODEL`` name.

    Returns:
        For each edit, usable wordings; they may be fewer or more, and repeat.

    Raises:
        ConfigError: There is no server named.
        InputError: The server refuses the request.
        EvaluationError: The server does not answer.
    """
    lacking = {edit.id: edit for edit in edits if len(edit.train_rephrases) < num}
    asked = {
        name: task
        for name, edit in lacking.items()
        if (task := rephrasing_task(edit, _ASKED_TIMES * num)) is not None
    }
    max_new_tokens = _ASKED_TIMES * num * _TOKENS_PER_WORDING
    replies = _ask(subject, list(asked.values()), rephraser, max_new_tokens)
    return [
        chain(
            edit.train_rephrases,
            usable_wordings(edit, replies.get(asked.get(edit.id, ""), "")),
        )
        for edit in edits
    ]


def _ask(
    subject: Subject, tasks: Sequence[str], rephraser: Rephraser, max_new_tokens: int
) -> dict[str, str]:
    if rephraser == "endpoint":
        endpoint = endpoint_from_environment("LOCFT_REPHRASER")
        # They stay valid: written by a model that nobody edits.
        with AnswerCache(default_cache_path()) as cache:
            return complete_prompts(
                endpoint,
                tasks,
                max_new_tokens=max_new_tokens,
                stop=(),
                label=_LABEL,
                cache=cache,
                chat=True,
            )
    if not subject.loaded.tokenizer.chat_template:
        return {}
    codec = subject.codec_for("chat")
    rows = decode_prompts(
        subject.loaded.model,
        codec,
        tasks,
        batch_size=subject.batch_size,
        label=_LABEL,
        stop="text",
        max_new_tokens=max_new_tokens,
    )
    return read_answers(codec, rows, "text")
