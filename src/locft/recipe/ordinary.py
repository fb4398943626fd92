"""Ordinary text for a run: of a file, or written by the unedited model itself."""

import hashlib
import json
import random
from dataclasses import dataclass, replace

from locft.errors import InputError
from locft.evaluation.drift import cut_windows, read_neutral_text
from locft.evaluation.subject import Subject
from locft.model.load import context_tokens
from locft.model.location import Location
from locft.model.moments import input_axis
from locft.model.neutral import fingerprint, written_texts

# Texts that the model writes: enough tokens for the widths of small models, and more for wider ones.
_TEXT_TOKENS = 128
_LEAST_TOKENS = 16_384
_TOKENS_PER_WIDTH = 4
_SEED = 0
_NUM_HELD_BACK = 8


@dataclass(frozen=True, kw_only=True)
class OrdinaryText:
    """Ordinary text, as a model reads it.

    Attributes:
        name: ``model`` if the unedited model wrote it, else the file.
        sequences: Its token ids, in pieces.
        model_sha256: Hash of the model's weights.
    """

    name: str
    sequences: tuple[tuple[int, ...], ...]
    model_sha256: str

    @property
    def sha256(self) -> str:
        """Hash of the token ids."""
        return hashlib.sha256(json.dumps(self.sequences).encode()).hexdigest()

    @property
    def num_tokens(self) -> int:
        """How many tokens it has."""
        return sum(map(len, self.sequences))

    def hold_back(self) -> tuple["OrdinaryText", tuple[tuple[int, ...], ...]]:
        """Set a part aside: what is left, and the part.

        Raises:
            InputError: There is too little text for two parts.
        """
        pieces = [ids for ids in self.sequences if len(ids) > 1]
        num = min(_NUM_HELD_BACK, len(pieces) // 2)
        if not num:
            raise InputError(
                f"neutral text {self.name} is too short to hold back a part of it, which --max-drift "
                f"needs: give at least {2 * _TEXT_TOKENS:,} tokens, or leave --neutral-text out"
            )
        return replace(self, sequences=tuple(pieces[:-num])), tuple(pieces[-num:])


def gather_ordinary_text(subject: Subject, location: Location | None, path: str | None) -> OrdinaryText:
    """Get ordinary text, enough for the widths of a location's matrices.

    Args:
        subject: The model, unedited.
        location: What will be tuned; None where that has no matrices of its own.
        path: A text file; None for texts that the model itself writes.

    Returns:
        The text.

    Raises:
        InputError: The file cannot be read, or is too short.
    """
    network = subject.loaded.model
    axes = {} if location is None else input_axes(subject, location)
    width = max((network.get_parameter(name).shape[axis] for name, axis in axes.items()), default=0)
    model_sha256 = fingerprint(network)
    if path is None:
        num_texts = -(-max(_LEAST_TOKENS, _TOKENS_PER_WIDTH * width) // _TEXT_TOKENS)
        starts = random_starts(subject, num_texts, _SEED)
        sequences = written_texts(network, model_sha256, starts, _TEXT_TOKENS, _SEED)
    else:
        sequences = _read(subject, path, width)
    return OrdinaryText(
        name="model" if path is None else path, sequences=tuple(sequences), model_sha256=model_sha256
    )


def input_axes(subject: Subject, location: Location) -> dict[str, int]:
    """Tell along which axis the input of each of a location's matrices runs, where it can be seen."""
    network = subject.loaded.model
    axes = {name: input_axis(network, name) for name in location.parameters}
    return {name: axis for name, axis in axes.items() if axis is not None}


def random_starts(subject: Subject, num: int, seed: int) -> list[tuple[int, ...]]:
    """Choose what texts begin with: a word or a piece of one, each another."""
    tokenizer = subject.loaded.tokenizer
    special = set(tokenizer.all_special_ids)
    ordinary = [index for index in range(len(tokenizer)) if index not in special]
    begin = tokenizer("")["input_ids"]  # what it puts before every text
    dice = random.Random(seed)
    return [(*begin, dice.choice(ordinary)) for _ in range(num)]


def _read(subject: Subject, path: str, width: int) -> list[tuple[int, ...]]:
    """Read a file of ordinary text, cut into pieces of equal length."""
    limit = context_tokens(subject.loaded.model.config)
    text = read_neutral_text(path)
    windows = cut_windows(subject.loaded.tokenizer, text, limit)
    sequences = [
        tuple(ids[start : start + _TEXT_TOKENS])
        for _, ids in windows
        for start in range(0, len(ids), _TEXT_TOKENS)
    ]
    found = sum(map(len, sequences))
    if found < width:
        raise InputError(
            f"neutral text {path} holds {found:,} tokens, too few for matrices with {width:,} inputs: "
            f"give {_TOKENS_PER_WIDTH * width:,} or more, or leave --neutral-text out"
        )
    return sequences
