"""More training examples of an edit: the same question elsewhere, with the same answer.

What is scored is never trained on: a prompt that stands among the edits' own prompts, rephrases or
locality prompts is left out.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from locft.data.normalise import collapse_spaces
from locft.types import Edit

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_FEWEST_WORDS, _MOST_WORDS = 4, 16


@dataclass(frozen=True, kw_only=True)
class Augmented:
    """More examples of each edit.

    Attributes:
        examples: For each edit, the prompts beside its own, as edits that differ in the prompt alone.
        num_asked: How many there were to be.
        num_scored: How many were left out since they are scored.
    """

    examples: tuple[tuple[Edit, ...], ...]
    num_asked: int
    num_scored: int

    @property
    def num(self) -> int:
        """How many there are."""
        return sum(map(len, self.examples))


def find_sentences(texts: Iterable[str]) -> tuple[str, ...]:
    """Find whole sentences of common length in texts, each once, in order.

    Args:
        texts: Texts that may begin and end anywhere; so their first and last sentence do not count.

    Returns:
        The sentences: one line of 4 to 16 words each, from a capital letter to a full stop.
    """
    found: dict[str, None] = {}
    for text in texts:
        for sentence in _SENTENCE_END.split(text)[1:-1]:
            one_line = "\n" not in sentence.strip() and sentence.isprintable()
            if (
                one_line
                and sentence[:1].isupper()
                and _FEWEST_WORDS <= len(sentence.split()) <= _MOST_WORDS
            ):
                found[sentence] = None
    return tuple(found)


def add_prefixes(edits: Sequence[Edit], sentences: Sequence[str], num: int, seed: int) -> Augmented:
    """Put each edit's prompt behind sentences that have nothing to do with it.

    Source: the random prefixes of MEMIT and AlphaEdit, which the paper takes for CounterFact.

    Args:
        edits: The edits.
        sentences: What may stand before a prompt; none is taken that names the edit's subject or
            target.
        num: How many sentences each edit gets, one at a time; fewer where there are no more.
        seed: Names which.

    Returns:
        The examples.
    """
    scored = {
        collapse_spaces(text)
        for edit in edits
        for text in (edit.prompt, *edit.rephrases, *edit.locality)
    }
    dice = random.Random(seed)
    examples: list[tuple[Edit, ...]] = []
    num_scored = 0
    for edit in edits:
        taken: list[Edit] = []
        # Drawn in turn, not shuffled as a whole: there may be many more than are needed.
        for sentence in dice.sample(sentences, k=min(len(sentences), 4 * num)):
            if len(taken) == num:
                break
            if _names(sentence, edit):
                continue
            prompt = f"{sentence} {edit.prompt}"
            if collapse_spaces(prompt) in scored:
                num_scored += 1
                continue
            taken.append(_with_prompt(edit, prompt))
        examples.append(tuple(taken))
    return Augmented(examples=tuple(examples), num_asked=num * len(edits), num_scored=num_scored)


def _names(sentence: str, edit: Edit) -> bool:
    """Tell whether a sentence has to do with an edit."""
    text = sentence.casefold()
    words = (edit.target, edit.subject or "")
    return any(word.strip().casefold() in text for word in words if word.strip())


def _with_prompt(edit: Edit, prompt: str) -> Edit:
    return Edit(id=edit.id, prompt=prompt, target=edit.target, subject=edit.subject, source=edit.source)
