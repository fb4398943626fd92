"""What a protocol is, and what it may ask of a model."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol as Interface

from locft.evaluation.likelihood import Continuation, Pair
from locft.evaluation.scoring import Item, Result
from locft.types import KINDS, Kind

PLAIN_NAMES: Mapping[Kind, str] = {kind: kind for kind in KINDS}
"""Scores that are called what their items measure."""


class Measurable(Interface):
    """A model as protocols see it: in one state, with prompts put into one context."""

    def answer(self, prompts: Iterable[str], max_new_tokens: int) -> Mapping[str, str]:
        """Answer prompts greedily, until ".", newline, end of sequence or the last token.

        The answers have the spaces that they were generated with.
        """
        ...

    def continuations(
        self, pairs: Iterable[Pair], *, as_generated: bool = False
    ) -> Mapping[Pair, Continuation]:
        """Score texts after prompts, teacher-forced; those that were generated there as they are."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Protocol:
    """A way of scoring.

    Attributes:
        name: What it is chosen by.
        measure: Scores a model on items; its docstring states rule and source. An item of which nothing
            is expected yet has no score, and its answer is what will be expected.
        score_names: What its scores are called, and of what items they are.
        meanings: What each of them is, by the name.
        match: How an answer is compared, in words.
        is_share: Whether an item scores 0 or 1.
        max_new_tokens: The longest answer; None if nothing is answered.
        shows_answers: Whether its records hold answers that it scored.
        needs_logits: Whether it needs more of a model than answers.
        needs_old: Whether it compares with the answer before the edit.
    """

    name: str
    measure: Callable[[Measurable, Sequence[Item]], list[Result]]
    score_names: Mapping[Kind, str]
    meanings: Mapping[str, str]
    match: str
    is_share: bool = True
    max_new_tokens: int | None = None
    shows_answers: bool = False
    needs_logits: bool = False
    needs_old: bool = False

    @property
    def rule(self) -> str:
        """The rule in a sentence: the first line of what `measure` says of itself."""
        return (inspect.getdoc(self.measure) or "").partition("\n")[0]
