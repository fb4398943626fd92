"""Answers prompts by greedy decoding under the published protocol."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from locft.data.encode import Codec
from locft.data.normalise import cut_answer
from locft.progress import progress

MAX_NEW_TOKENS = 32


def answer_prompts(
    model: PreTrainedModel, codec: Codec, prompts: Iterable[str], *, batch_size: int, label: str
) -> dict[str, str]:
    """Answer prompts greedily: at most 32 new tokens, stop at ".", newline or end of sequence.

    Source: the paper's protocol (section 5); the model's own sampling settings are left out.

    Args:
        model: The model, in evaluation mode.
        codec: How prompts become token ids.
        prompts: The prompts; repeated ones are answered once.
        batch_size: How many prompts to answer at a time.
        label: What the progress bar says.

    Returns:
        Each prompt's answer, cut before the first "." or newline and stripped.
    """
    ids = {prompt: codec.prompt_ids(prompt) for prompt in prompts}
    # Longest first: little is padded, and memory is at its peak at once.
    pending = sorted(ids, key=lambda prompt: (-len(ids[prompt]), prompt))
    answers: dict[str, str] = {}
    stops = StoppingCriteriaList([_StopAtSentenceEnd(codec.tokenizer, model.device)])
    generate: Any = model.generate
    with _greedy(model, codec), progress(label, len(pending), "prompts") as step:
        for start in range(0, len(pending), batch_size):
            batch = pending[start : start + batch_size]
            longest = len(ids[batch[0]])
            padded = [[0] * (longest - len(ids[prompt])) + [*ids[prompt]] for prompt in batch]
            mask = [[int(i >= longest - len(ids[p])) for i in range(longest)] for p in batch]
            generated: Tensor = generate(
                torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                stopping_criteria=stops,
            )
            texts = codec.tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
            for prompt, text in zip(batch, texts, strict=True):
                answers[prompt] = cut_answer(text).strip()
            step(len(batch))
    return answers


@contextmanager
def _greedy(model: PreTrainedModel, codec: Codec) -> Iterator[None]:
    """Give the model plain greedy decoding: its own generation settings may sample or penalise."""
    own = model.generation_config
    ends = {codec.eos_id}
    for named in (own.eos_token_id, codec.tokenizer.eos_token_id):
        ends.update(named if isinstance(named, list) else [named] if named is not None else [])
    model.generation_config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=codec.eos_id,
    )
    try:
        yield
    finally:
        model.generation_config = own


class _StopAtSentenceEnd(StoppingCriteria):
    """Stops a row once its newest token holds "." or a newline."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        self.ends = torch.tensor(_ends_sentence(tokenizer), device=device)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        newest = input_ids[:, -1]
        # A model's vocabulary may be padded past the tokenizer's.
        return self.ends[newest.clamp(max=len(self.ends) - 1)] & (newest < len(self.ends))


@lru_cache(maxsize=4)
def _ends_sentence(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, ...]:
    """Tell for each token id whether its text holds "." or a newline."""
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    return tuple("." in text or "\n" in text for text in texts)
