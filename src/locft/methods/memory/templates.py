"""Context templates: what the unedited model writes before a prompt, so that keys are of no one context.

Source: Meng et al. (2022), section 3.1 (ROME), and Meng et al. (2023), appendix B.2 (MEMIT). Which texts
are drawn follows from a seed; special tokens are left out.
"""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from locft.data.encode import Codec
from locft.model.sampling import sample_sequences

STARTS = ("The", "Therefore", "Because", "I", "You")
_TOP_K = 5


def write_prefixes(
    model: PreTrainedModel, codec: Codec, lengths: Mapping[int, int], seed: int
) -> tuple[str, ...]:
    """Let the unedited model write texts that may stand before a prompt.

    Args:
        model: The model, unedited.
        codec: Its tokenizer.
        lengths: How many texts of each number of tokens, the starting word and what the tokenizer puts
            before a text included. They start from `STARTS` in turn.
        seed: Names what is drawn, among the 5 likeliest tokens each.

    Returns:
        The texts.
    """
    begin = tuple(codec.tokenizer("")["input_ids"])
    found: list[str] = []
    for length, num in lengths.items():
        starts = [_start(codec, begin, STARTS[number % len(STARTS)]) for number in range(num)]
        written: dict[int, tuple[int, ...]] = {}
        for size in sorted({len(start) for start in starts}):
            places = [place for place, start in enumerate(starts) if len(start) == size]
            alike = [starts[place] for place in places]
            texts = sample_sequences(model, alike, max(length, size + 1), seed, top_k=_TOP_K)
            written |= dict(zip(places, texts, strict=True))
        rows = [list(written[place]) for place in range(num)]
        found += [
            text.replace("{", " ").replace("}", " ").strip()
            for text in codec.tokenizer.batch_decode(rows, skip_special_tokens=True)
        ]
    return tuple(found)


def _start(codec: Codec, begin: Sequence[int], word: str) -> tuple[int, ...]:
    return (*begin, *codec.tokenizer(word, add_special_tokens=False)["input_ids"])
