"""Other wordings of an edit's prompt: how they are asked for, and which of them may be trained on."""

import re
from collections.abc import Iterator

from locft.data.augment import names_target
from locft.types import Edit

_TASK = """\
Write this {what} in {num} other ways that mean the same. Keep "{subject}" as it is, word for word, and
do not {answer} it. \
Reply with {num} lines, one for each way, and nothing else.

{prompt}"""
_MARK = re.compile(r"^\s*(?:[-*•]|\(?\d+[.):]|[A-Za-z][.):])\s+")
_QUOTES = "\"'“”‘’`*"
# A wording may be so many times as long as the prompt, and so many characters longer.
_MOST_TIMES, _MOST_MORE = 2, 20


def rephrasing_task(edit: Edit, num: int) -> str | None:
    """Ask a chat model for other wordings of an edit's prompt.

    Args:
        edit: The edit.
        num: How many to ask for.

    Returns:
        The message; None where the edit names no subject that its prompt holds, since nothing could be
        checked then.
    """
    if not edit.subject or edit.subject not in edit.prompt:
        return None
    is_question = _is_question(edit.prompt)
    return _TASK.format(
        what="question" if is_question else "beginning of a sentence",
        answer="answer" if is_question else "complete",
        num=num,
        subject=edit.subject,
        prompt=edit.prompt,
    )


def usable_wordings(edit: Edit, reply: str) -> Iterator[str]:
    """Find in a reply the wordings that may be trained on.

    Such a wording holds the subject and not the target, is a question if the prompt is one and else the
    beginning of a sentence, and is not much longer.

    Args:
        edit: The edit; it names a subject.
        reply: What was answered to `rephrasing_task`.

    Yields:
        The wordings, in order; they may repeat.
    """
    for line in reply.splitlines():
        text = _MARK.sub("", line).strip().strip(_QUOTES).strip()
        if (
            edit.subject
            and edit.subject in text
            and text.isprintable()
            and not names_target(text, edit)
            and _is_question(text) == _is_question(edit.prompt)
            and (_is_question(text) or text[-1].isalnum())
            and len(text) <= _MOST_TIMES * len(edit.prompt) + _MOST_MORE
        ):
            yield text


def _is_question(text: str) -> bool:
    return text.rstrip().endswith(("?", "？", "؟"))
