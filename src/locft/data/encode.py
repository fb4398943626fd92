"""Turns edits into token ids, and says which of them are target.

Prompt and target are tokenised together, as the model would meet them in running text, and the
characters decide which tokens are target. The end-of-sequence token is learnt at the target's end.
"""

import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from locft.data.chat import render_chat
from locft.data.lint import Measured
from locft.errors import EditsError, ModelError
from locft.types import Edit

PromptFormat = Literal["raw", "chat"]

# How the Unicode names of the letters and punctuation of scripts without spaces begin.
_UNSPACED = (
    *("CJK ", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "IDEOGRAPHIC", "FULLWIDTH", "BOPOMOFO"),
    *("THAI", "LAO ", "KHMER", "MYANMAR", "TIBETAN"),
)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A prompt with the text that follows it: a training example, or one to score.

    Attributes:
        ids: Token ids of prompt, target and, where it is to be learnt, end-of-sequence token.
        target_start: Index of the first target token; all that follow are target.
    """

    ids: tuple[int, ...]
    target_start: int

    @property
    def num_targets(self) -> int:
        """How many tokens are target, an end-of-sequence token included."""
        return len(self.ids) - self.target_start


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A tokenizer, and how prompts are put before it. Made by `make_codec`."""

    tokenizer: PreTrainedTokenizerBase
    format: PromptFormat
    eos_id: int

    def prompt_ids(self, prompt: str) -> tuple[int, ...]:
        """Encode a prompt as decoding starts from it."""
        return self._without_eos(self._tokenize(self._prompt_text(prompt))["input_ids"])

    def continuation(self, prompt: str, text: str) -> tuple[int, ...] | None:
        """Encode what may follow a prompt; None if it changes how the prompt itself is encoded."""
        start = self.prompt_ids(prompt)
        if not text:
            return ()
        ids = self._without_eos(self._tokenize(join(self._prompt_text(prompt), text))["input_ids"])
        return ids[len(start) :] if ids[: len(start)] == start else None

    def encode(self, edit: Edit) -> Encoded:
        """Encode an edit as one training example.

        Raises:
            EditsError: The target gives no token, or the prompt none before it.
        """
        pair = self.encode_pair(edit.prompt, edit.target)
        if not pair.num_targets or not pair.target_start:
            what = (
                "target gives no token"
                if pair.target_start
                else "prompt gives no token before the target"
            )
            raise EditsError(f"edit {edit.id} ({edit.source}): the {what} in this model's vocabulary")
        return Encoded(ids=(*pair.ids, self.eos_id), target_start=pair.target_start)

    def encode_pair(self, prompt: str, text: str, *, as_generated: bool = False) -> Encoded:
        """Encode a text after a prompt, without an end-of-sequence token; the text may give no token.

        Args:
            prompt: The prompt.
            text: What follows it.
            as_generated: Whether `text` is what a model generated there, with its own spaces or without.
        """
        before = self._prompt_text(prompt)
        tokens = self._tokenize(before + text if as_generated or not text else join(before, text))
        ids = self._without_eos(tokens["input_ids"])
        # A token that straddles the border is target: what it spells can only be learnt whole.
        # Special tokens that the tokenizer adds in front have the empty span (0, 0).
        spans = tokens["offset_mapping"][: len(ids)]
        start = next((i for i, (_, end) in enumerate(spans) if end > len(before)), len(ids))
        return Encoded(ids=ids, target_start=start)

    def last_token_within(self, prompt: str, text: str, end: int) -> int:
        """Find the token that holds the last character of a prompt's first `end` ones.

        Args:
            prompt: The prompt.
            text: What follows it, as for `encode_pair`; nothing if it is empty.
            end: How many characters of the prompt; one at least.

        Returns:
            The token's index in what `encode_pair` gives.
        """
        before = self._prompt_text(prompt)
        last = before.index(prompt) + end
        spans = self._tokenize(join(before, text) if text else before)["offset_mapping"]
        return max(i for i, (start, stop) in enumerate(spans) if start < last and stop > start)

    def measure(self, edit: Edit) -> Measured:
        """Count an edit's tokens for the linter."""
        prompt = self.prompt_ids(edit.prompt)
        others = (len(self.prompt_ids(text)) for text in (*edit.rephrases, *edit.locality))
        longest = max(others, default=0)
        try:
            encoded = self.encode(edit)
        except EditsError:
            return Measured(len(prompt), 0, prompt_is_prefix=True, longest_scored_tokens=longest)
        return Measured(
            num_prompt_tokens=len(prompt),
            num_target_tokens=encoded.num_targets - 1,
            prompt_is_prefix=encoded.ids[: len(prompt)] == prompt,
            longest_scored_tokens=longest,
        )

    def _prompt_text(self, prompt: str) -> str:
        if self.format == "raw":
            return prompt
        return render_chat(self.tokenizer, [{"role": "user", "content": prompt}], prompt_only=True)

    def _tokenize(self, text: str) -> Any:
        # A chat template writes its own special tokens.
        return self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=self.format == "raw")

    def _without_eos(self, ids: list[int]) -> tuple[int, ...]:
        """Drop an end-of-sequence token that the tokenizer adds of its own accord."""
        added = self.format == "raw" and len(ids) > 1 and ids[-1] == self.eos_id
        return tuple(ids[:-1] if added else ids)


def make_codec(
    tokenizer: PreTrainedTokenizerBase, format: PromptFormat, *, eos_id: int | None = None
) -> Codec:
    """Prepare a tokenizer for encoding edits.

    Args:
        tokenizer: A fast tokenizer (one with character offsets).
        format: ``raw`` for the plain prompt, ``chat`` for the model's own chat template.
        eos_id: The end-of-sequence token to learn where the tokenizer names none.

    Returns:
        The codec. In a chat the end-of-sequence token is the one that the template ends a turn
        with, which need not be the tokenizer's.

    Raises:
        ModelError: The model has no end-of-sequence token, or no chat template.
    """
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else eos_id
    if format == "chat":
        if not tokenizer.chat_template:
            raise ModelError(
                "this model has no chat template, which --format chat needs: use --format raw"
            )
        end_of_turn = _end_of_turn(tokenizer)
        eos = eos if end_of_turn is None else end_of_turn
    if eos is None:
        raise ModelError(
            "this model is refused: neither its tokenizer nor its configuration names an "
            "end-of-sequence token, so it cannot learn where a target ends"
        )
    return Codec(tokenizer=tokenizer, format=format, eos_id=eos)


def join(prompt: str, target: str) -> str:
    """Join a prompt and its target as running text.

    One space is put between them, unless either brings its own white space or the prompt's script
    writes without spaces.
    """
    if prompt[-1:].isspace() or target[:1].isspace() or _writes_without_spaces(prompt, target):
        return prompt + target
    return f"{prompt} {target}"


def _writes_without_spaces(prompt: str, target: str) -> bool:
    last = prompt[-1:]
    if last and not last.isascii() and _is_unspaced(last):
        return True
    letters = (letter for letter in reversed(prompt) if letter.isalpha())
    letter = next(letters, target[:1])
    return bool(letter) and _is_unspaced(letter)


def _is_unspaced(character: str) -> bool:
    return unicodedata.name(character, "").startswith(_UNSPACED)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Find the special token with which the chat template ends an answer; None if it shows none."""
    question = {"role": "user", "content": "Q"}
    asked = render_chat(tokenizer, [question], prompt_only=True)
    answer = "ANSWER"
    told = render_chat(
        tokenizer, [question, {"role": "assistant", "content": answer}], prompt_only=False
    )
    if not told.startswith(asked + answer):
        return None
    rest = tokenizer(told[len(asked + answer) :], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return rest[0] if rest and rest[0] in special else None
