"""Answers prompts by greedy decoding under the published protocol."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import takewhile
from typing import Any, Literal

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


Stop = Literal["protocol", "line"]


def answer_prompts(
    model: PreTrainedModel,
    codec: Codec,
    prompts: Iterable[str],
    *,
    batch_size: int,
    label: str,
    stop: Stop = "protocol",
) -> dict[str, str]:
    """Answer prompts greedily, with at most 32 new tokens; the model's own settings are left out.

    Source: the paper's protocol (section 5).

    Args:
        model: The model, in evaluation mode.
        codec: How prompts become token ids.
        prompts: The prompts; repeated ones are answered once.
        batch_size: How many prompts to answer at a time.
        label: What the progress bar says.
        stop: ``protocol`` ends an answer at the first ".", newline or end of sequence, as scores are
            taken; many a model begins with a newline, and its answer is then empty. ``line`` gives
            the first line that is not blank, for a person to read.

    Returns:
        Each prompt's answer, cut at the stop and stripped.
    """
    ids = {prompt: codec.prompt_ids(prompt) for prompt in prompts}
    # Longest first: little is padded, and memory is at its peak at once.
    pending = sorted(ids, key=lambda prompt: (-len(ids[prompt]), prompt))
    answers: dict[str, str] = {}
    generate: Any = model.generate
    ends = _end_ids(model, codec)
    stop_at = _StopAt(codec.tokenizer, stop, model.device)
    with _greedy(model, ends), progress(label, len(pending), "prompts") as step:
        for start in range(0, len(pending), batch_size):
            batch = pending[start : start + batch_size]
            longest = len(ids[batch[0]])
            padded = [[0] * (longest - len(ids[prompt])) + [*ids[prompt]] for prompt in batch]
            mask = [[int(i >= longest - len(ids[p])) for i in range(longest)] for p in batch]
            stop_at.prompt_length = longest
            generated: Tensor = generate(
                torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                stopping_criteria=StoppingCriteriaList([stop_at]),
            )
            # Not left to skip_special_tokens: a token that ends an answer need not be a special one.
            rows = [
                list(takewhile(lambda token: token not in ends, row))
                for row in generated[:, longest:].tolist()
            ]
            texts = codec.tokenizer.batch_decode(rows, skip_special_tokens=True)
            for prompt, text in zip(batch, texts, strict=True):
                whole = cut_answer(text) if stop == "protocol" else text.strip().partition("\n")[0]
                answers[prompt] = whole.strip()
            step(len(batch))
    return answers


def _end_ids(model: PreTrainedModel, codec: Codec) -> set[int]:
    """Collect every token that ends an answer: the one learnt, and those that the model names."""
    ends = {codec.eos_id}
    for named in (model.generation_config.eos_token_id, codec.tokenizer.eos_token_id):
        ends.update(named if isinstance(named, list) else [named] if named is not None else [])
    return ends


@contextmanager
def _greedy(model: PreTrainedModel, ends: set[int]) -> Iterator[None]:
    """Give the model plain greedy decoding: its own generation settings may sample or penalise."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
    )
    try:
        yield
    finally:
        model.generation_config = own


class _StopAt(StoppingCriteria):
    """Stops a row once its newest token ends the answer."""

    prompt_length = 0  # of the batch that is being answered

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Stop, device: torch.device) -> None:
        texts = _token_texts(tokenizer)
        marks = (".", "\n") if stop == "protocol" else ("\n",)
        ends = [any(mark in text for mark in marks) for text in texts]
        # Under the protocol even a blank answer ends; a line must hold something.
        speaks = [stop == "protocol" or bool(text.strip()) for text in texts]
        # A model's vocabulary may be padded past the tokenizer's; what lies there does neither.
        self.ends = torch.tensor([*ends, False], device=device)
        self.speaks = torch.tensor([*speaks, False], device=device)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        new = input_ids[:, self.prompt_length :].clamp(max=len(self.ends) - 1)
        return self.ends[new[:, -1]] & self.speaks[new].any(dim=1)


@lru_cache(maxsize=4)
def _token_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Decode each token of the vocabulary by itself."""
    return tuple(tokenizer.batch_decode([[index] for index in range(len(tokenizer))]))
