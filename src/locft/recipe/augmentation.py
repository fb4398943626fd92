"""Gets ready what a run is trained on: the edits' own prompts, and further ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from locft.config import Augment
from locft.data.augment import (
    Augmented,
    Example,
    find_sentences,
    in_frames,
    join_examples,
    scored_texts,
    take_examples,
    with_prefixes,
)
from locft.data.encode import Encoded, PromptFormat
from locft.evaluation.subject import Subject
from locft.model.load import context_tokens
from locft.recipe.ordinary import OrdinaryText
from locft.recipe.rephrasing import Rephraser, find_wordings
from locft.report.schema import AugmentedInfo
from locft.report.words import counted
from locft.types import Edit

_NUM_FRAMES = 2


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What is trained on.

    Attributes:
        encoded: All examples: of one edit after the other, its own prompt's first.
        groups: The indices of each edit's examples.
        added: Those beside the edits' own prompts, for each edit.
        info: How many of them there are; None where none were asked for.
    """

    encoded: tuple[Encoded, ...]
    groups: tuple[range, ...]
    added: tuple[tuple[Example, ...], ...]
    info: AugmentedInfo | None


def prepare_examples(
    subject: Subject,
    edits: Sequence[Edit],
    augment: Augment,
    text: OrdinaryText | None,
    seed: int,
    rephraser: Rephraser = "model",
    say: Callable[[str], None] = lambda _: None,
) -> Examples:
    """Encode the edits, and what they are augmented by.

    Args:
        subject: The model, unedited.
        edits: The edits.
        augment: What to add.
        text: Ordinary text, which sentences before prompts are taken from; None where none are asked
            for.
        seed: Names what is drawn at random.
        rephraser: Who writes other wordings where the edits bring none.
        say: Called with a line where there is less than was asked for.

    Returns:
        The examples. None but the edits' own prompts is scored.
    """
    own = [subject.codec.encode(edit) for edit in edits]
    if augment.is_none:
        return _grouped(own, [()] * len(edits), [()] * len(edits), None)
    scored = scored_texts(edits)
    form = subject.codec.format
    parts: list[Augmented] = []
    if augment.prefixes:
        written = [] if text is None else [list(ids) for ids in text.sequences]
        sentences = find_sentences(
            subject.loaded.tokenizer.batch_decode(written, skip_special_tokens=True)
        )
        candidates = with_prefixes(edits, sentences, seed)
        parts.append(take_examples(edits, "prefix", candidates, augment.prefixes, scored, form))
    if augment.rephrases:
        wordings = find_wordings(subject, edits, augment.rephrases, rephraser)
        parts.append(take_examples(edits, "rephrase", wordings, augment.rephrases, scored, form))
    if augment.formats:
        parts.append(take_examples(edits, "format", in_frames(edits), _NUM_FRAMES, scored, form))
        other: PromptFormat = "raw" if form == "chat" else "chat"
        prompts = [(edit.prompt,) for edit in edits]
        if other == "raw" or subject.loaded.tokenizer.chat_template:
            parts.append(take_examples(edits, "format", prompts, 1, scored, other))
    found = join_examples(parts, len(edits))
    kept, encoded = _encode(subject, edits, found)
    num = sum(map(len, kept))
    if num < found.num_asked:
        say(
            f"{counted(found.num_asked, 'further example')} were asked for, and {num:,} were found: "
            "training goes on with those"
        )
    overlap = sum(
        " ".join(example.prompt.split()) in scored for examples in kept for example in examples
    )
    info = AugmentedInfo(
        num_asked=found.num_asked,
        num_by_kind=_count(kept),
        num_left_out=found.num_left_out,
        num_scored=overlap,
    )
    return _grouped(own, kept, encoded, info)


def _encode(
    subject: Subject, edits: Sequence[Edit], found: Augmented
) -> tuple[list[tuple[Example, ...]], list[tuple[Encoded, ...]]]:
    """Encode examples; those that the model cannot take are left out."""
    limit = context_tokens(subject.loaded.model.config)
    codecs = {form: subject.codec_for(form) for form in {e.format for of in found.examples for e in of}}
    kept: list[tuple[Example, ...]] = []
    encoded: list[tuple[Encoded, ...]] = []
    for edit, examples in zip(edits, found.examples, strict=True):
        pairs: list[tuple[Example, Encoded]] = []
        for example in examples:
            asked = Edit(id=edit.id, prompt=example.prompt, target=edit.target, source=edit.source)
            one = codecs[example.format].encode(asked)
            if limit is None or len(one.ids) <= limit:
                pairs.append((example, one))
        kept.append(tuple(example for example, _ in pairs))
        encoded.append(tuple(one for _, one in pairs))
    return kept, encoded


def _count(kept: Sequence[Sequence[Example]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for examples in kept:
        for example in examples:
            counts[example.kind] = counts.get(example.kind, 0) + 1
    return counts


def _grouped(
    own: Sequence[Encoded],
    added: Sequence[tuple[Example, ...]],
    encoded: Sequence[tuple[Encoded, ...]],
    info: AugmentedInfo | None,
) -> Examples:
    sizes = [1 + len(more) for more in encoded]
    ends = list(accumulate(sizes))
    return Examples(
        encoded=tuple(one for first, more in zip(own, encoded, strict=True) for one in (first, *more)),
        groups=tuple(range(end - size, end) for end, size in zip(ends, sizes, strict=True)),
        added=tuple(added),
        info=info,
    )
