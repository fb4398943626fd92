"""The contexts in which a prompt may meet a model: how far an edit carries beyond its own wording."""

import hashlib
from typing import Literal

Context = Literal["raw", "qa", "chat", "prefix"]

CONTEXTS: dict[Context, str] = {
    "raw": "the prompt alone",
    "qa": "as a question that an answer is asked for",
    "chat": "as a user's turn in the model's own chat template",
    "prefix": "behind a sentence that has nothing to do with it",
}

# Written for locft, about nothing that an edit set asks for.
_PREFIXES = (
    "The kettle had just begun to sing when the rain stopped.",
    "Nobody remembered who had left the ladder against the wall.",
    "By noon the fog over the field was gone.",
    "She folded the map twice and put it into her coat.",
    "There were three chairs in the room, and none of them matched.",
    "The last bus leaves a little earlier on Sundays.",
    "He counted the steps, lost count, and began again.",
    "A cat slept on the warm roof of the shed.",
)


def in_context(prompt: str, context: Context) -> str:
    """Put a prompt into a context, as text; a chat is rendered by the codec, from the prompt alone.

    Args:
        prompt: The prompt.
        context: One of `CONTEXTS`.

    Returns:
        What stands before the answer. The sentence of ``prefix`` follows from the prompt.
    """
    if context == "qa":
        return f"Question: {prompt}\nAnswer:"
    if context == "prefix":
        index = hashlib.sha256(prompt.encode()).digest()[0] % len(_PREFIXES)
        return f"{_PREFIXES[index]} {prompt}"
    return prompt
