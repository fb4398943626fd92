"""Gets ready texts that training holds to what the unedited model makes of them."""

import random
from collections.abc import Sequence

from locft.data.augment import scored_texts
from locft.data.encode import Encoded
from locft.data.normalise import collapse_spaces
from locft.evaluation.generate import decode_prompts
from locft.evaluation.subject import Subject
from locft.model.neutral import fingerprint, written_texts
from locft.recipe.ordinary import random_starts
from locft.types import Edit

# What questions begin with; the model goes on from there, and answers itself.
_QUESTIONS = ("What", "Who", "Where", "When", "Which", "How", "Why", "Is")
_NUM_TOKENS = 24
_ANSWER_TOKENS = 8
_SEED = 1


def prepare_anchors(subject: Subject, edits: Sequence[Edit], num: int) -> tuple[Encoded, ...]:
    """Let the model write questions and other texts, and answer the prompts that are to stay.

    Args:
        subject: The model, unedited.
        edits: The edits; their `train_locality` prompts come beside the texts, whatever their number.
        num: How many texts; none if 0.

    Returns:
        The texts; what is target there is to be held. None holds a prompt that is scored.
    """
    if not num:
        return ()
    network, tokenizer = subject.loaded.model, subject.loaded.tokenizer
    begin = tuple(tokenizer("")["input_ids"])
    words = [tuple(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in _QUESTIONS]
    asked = [(*begin, *words[number % len(words)]) for number in range(num // 2)]
    starts = [*asked, *random_starts(subject, num - len(asked), _SEED)]
    model_sha256 = fingerprint(network)
    texts: list[tuple[int, ...]] = []
    for length in sorted({len(start) for start in starts}):
        alike = [start for start in starts if len(start) == length]
        texts += written_texts(network, model_sha256, alike, length + _NUM_TOKENS, _SEED)
    random.Random(_SEED).shuffle(texts)  # so that every step has some of each
    prompts = dict.fromkeys(prompt for edit in edits for prompt in edit.train_locality)
    answers = decode_prompts(
        network,
        subject.codec,
        list(prompts),
        batch_size=subject.batch_size,
        label="answering what is to stay",
        max_new_tokens=_ANSWER_TOKENS,
    )
    kept = [Encoded(ids=ids, target_start=len(begin) + 1) for ids in texts]
    for prompt, answer in answers.items():
        ids = subject.codec.prompt_ids(prompt)
        if answer:
            kept.append(Encoded(ids=(*ids, *answer), target_start=len(ids)))
    scored = scored_texts(edits)
    read = tokenizer.batch_decode([list(one.ids) for one in kept])
    return tuple(one for one, text in zip(kept, read, strict=True) if not _holds(text, scored))


def _holds(text: str, scored: frozenset[str]) -> bool:
    found = collapse_spaces(text)
    return any(one in found for one in scored)
