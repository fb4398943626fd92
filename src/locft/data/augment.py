"""More training examples of an edit: the same question in other surroundings, with the same answer.

What is scored is never trained on: a prompt that stands among the edits' rephrases or locality prompts
is left out, and counted.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from locft.data.normalise import collapse_spaces
from locft.types import Edit

ExampleKind = Literal["prefix", "rephrase", "format"]
EXAMPLE_KINDS: tuple[ExampleKind, ...] = ("prefix", "rephrase", "format")

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_FEWEST_WORDS, _MOST_WORDS = 4, 16
_FRAMES = ("Question: {}\nAnswer:", "Here is something to know. {}")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A training example beside an edit's own.

    Attributes:
        kind: How it came about.
        prompt: What is to be answered with the edit's target.
        format: Whether it is put plainly or inside the chat template.
    """

    kind: ExampleKind
    prompt: str
    format: Literal["raw", "chat"]


@dataclass(frozen=True, kw_only=True)
class Augmented:
    """More examples of each edit.

    Attributes:
        examples: For each edit, those beside its own.
        num_asked: How many there were to be.
        num_left_out: How many were left out since they are scored.
    """

    examples: tuple[tuple[Example, ...], ...]
    num_asked: int = 0
    num_left_out: int = 0

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


def with_prefixes(edits: Sequence[Edit], sentences: Sequence[str], seed: int) -> list[Iterator[str]]:
    """Put each edit's prompt behind sentences that have nothing to do with it.

    Source: the random prefixes of MEMIT and AlphaEdit, which the paper takes for CounterFact.

    Args:
        edits: The edits.
        sentences: What may stand before a prompt; none is taken that names the edit's subject or
            target.
        seed: Names their order.

    Returns:
        For each edit, its prompt behind one sentence after the other.
    """

    def draw(number: int, edit: Edit) -> Iterator[str]:
        # Drawn in turn, not shuffled as a whole: there may be many more than are needed.
        dice = random.Random(f"{seed} {number}")
        left = list(range(len(sentences)))
        while left:
            place = dice.randrange(len(left))
            left[place], left[-1] = left[-1], left[place]
            sentence = sentences[left.pop()]
            names_subject = _holds(sentence, edit.subject or "")
            if not names_subject and not names_target(sentence, edit):
                yield f"{sentence} {edit.prompt}"

    return [draw(number, edit) for number, edit in enumerate(edits)]


def in_frames(edits: Sequence[Edit]) -> list[tuple[str, ...]]:
    """Put each edit's prompt as a question that is to be answered, and as a statement.

    Args:
        edits: The edits.

    Returns:
        For each edit, its prompt in one frame after the other.
    """
    return [tuple(frame.format(edit.prompt) for frame in _FRAMES) for edit in edits]


def names_target(text: str, edit: Edit) -> bool:
    """Tell whether a text gives an edit's target away, in small letters or capitals."""
    return _holds(text, edit.target)


def _holds(text: str, words: str) -> bool:
    return bool(words.strip()) and words.strip().casefold() in text.casefold()


def scored_texts(edits: Iterable[Edit]) -> frozenset[str]:
    """Give what is scored beside the edits' own prompts, with single spaces."""
    return frozenset(
        collapse_spaces(text) for edit in edits for text in (*edit.rephrases, *edit.locality)
    )


def take_examples(
    edits: Sequence[Edit],
    kind: ExampleKind,
    candidates: Sequence[Iterable[str]],
    num: int,
    scored: frozenset[str],
    format: Literal["raw", "chat"],
) -> Augmented:
    """Take examples that are not scored.

    Args:
        edits: The edits.
        kind: How the candidates came about.
        candidates: For each edit, prompts in the order in which they are to be taken.
        num: How many to take for each edit; fewer where there are no more.
        scored: What is scored, as `scored_texts` gives it.
        format: How the examples are put.

    Returns:
        The examples: none is scored, and none twice.
    """
    num_left_out = 0
    found: list[tuple[Example, ...]] = []
    for edit, prompts in zip(edits, candidates, strict=True):
        taken: dict[str, Example] = {}
        own = collapse_spaces(edit.prompt) if format == "raw" else None
        for prompt in prompts:
            if len(taken) == num:
                break
            text = collapse_spaces(prompt)
            if text in scored:
                num_left_out += 1
            elif text != own:
                taken.setdefault(text, Example(kind=kind, prompt=prompt, format=format))
        found.append(tuple(taken.values()))
    return Augmented(examples=tuple(found), num_asked=num * len(edits), num_left_out=num_left_out)


def join_examples(parts: Sequence[Augmented], num_edits: int) -> Augmented:
    """Put several kinds of examples together."""
    return Augmented(
        examples=tuple(
            tuple(example for part in parts for example in part.examples[number])
            for number in range(num_edits)
        ),
        num_asked=sum(part.num_asked for part in parts),
        num_left_out=sum(part.num_left_out for part in parts),
    )
