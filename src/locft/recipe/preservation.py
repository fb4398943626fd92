"""Gets ready what a run preserves: the preconditioners of the matrices that it will tune."""

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from locft.config import parse_preserve
from locft.errors import ConfigError, InputError
from locft.evaluation.drift import cut_windows, read_neutral_text
from locft.evaluation.subject import Subject
from locft.model.load import context_tokens
from locft.model.location import Location
from locft.model.moments import input_axis
from locft.model.neutral import fingerprint, known_moments, written_texts
from locft.model.split import split_model
from locft.report.schema import PreservedInfo
from locft.train.precondition import Preconditioner, make_preconditioners

# Texts that the model writes: enough tokens for the widths of small models, and more for wider ones.
_TEXT_TOKENS = 128
_LEAST_TOKENS = 16_384
_TOKENS_PER_WIDTH = 4
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Preservation:
    """What a run preserves, and by what.

    Attributes:
        preconditioners: What updates are multiplied by, by parameter.
        info: What they were made by; None where nothing is preserved.
    """

    preconditioners: Mapping[str, Preconditioner] = field(default_factory=dict)
    info: PreservedInfo | None = None

    @property
    def gain(self) -> float:
        """How much more updates must move than plain ones; the mean over the matrices."""
        gains = [one.gain for one in self.preconditioners.values()]
        return sum(gains) / len(gains) if gains else 1.0


def prepare_preservation(
    subject: Subject, location: Location, preserve: str, neutral_text: str | None
) -> Preservation:
    """Measure what a location receives of ordinary text, and make its preconditioners.

    Args:
        subject: The model, unedited.
        location: What will be tuned.
        preserve: What is to be preserved, as `parse_preserve` reads it.
        neutral_text: A file of ordinary text; None for texts that the model itself writes.

    Returns:
        The preconditioners, and what they were made by; neither where nothing is to be preserved.

    Raises:
        InputError: The text cannot be read, or is too short for the width of a matrix.
        ConfigError: No parameter of the location has an input that can be seen.
    """
    strength = parse_preserve(preserve).covariance
    if strength is None:
        return Preservation()
    network = subject.loaded.model
    axes = {
        name: axis for name in location.parameters if (axis := input_axis(network, name)) is not None
    }
    if not axes:
        raise ConfigError(
            f"preserve covariance is not for location {location.name} of this model: its matrices are "
            "experts in a stack, whose inputs cannot be seen apart. Choose mlp.shared.down or attn, or "
            "--preserve none"
        )
    width = max(network.get_parameter(name).shape[axis] for name, axis in axes.items())
    model_sha256 = fingerprint(network)
    if neutral_text is None:
        num_texts = -(-max(_LEAST_TOKENS, _TOKENS_PER_WIDTH * width) // _TEXT_TOKENS)
        starts = _starts(subject, num_texts)
        sequences = written_texts(network, model_sha256, starts, _TEXT_TOKENS, _SEED)
    else:
        sequences = _read(subject, neutral_text, width)
    split = split_model(network, location.layer)
    moments = known_moments(split, model_sha256, tuple(axes), sequences)
    return Preservation(
        preconditioners=make_preconditioners(moments, axes, strength, network.device),
        info=PreservedInfo(
            strength=strength,
            text="model" if neutral_text is None else neutral_text,
            text_sha256=hashlib.sha256(json.dumps(sequences).encode()).hexdigest(),
            num_tokens=sum(map(len, sequences)),
            left_plain=tuple(name for name in location.parameters if name not in moments),
        ),
    )


def _starts(subject: Subject, num: int) -> list[tuple[int, ...]]:
    """Choose what texts begin with: a word or a piece of one, each another."""
    tokenizer = subject.loaded.tokenizer
    special = set(tokenizer.all_special_ids)
    ordinary = [index for index in range(len(tokenizer)) if index not in special]
    begin = tokenizer("")["input_ids"]  # what it puts before every text
    dice = random.Random(_SEED)
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
