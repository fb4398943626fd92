"""Answers prompts by greedy decoding under the published protocol."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
from locft.model.sampling import generating
from locft.model.split import logits_at
from locft.progress import Step, progress

MAX_NEW_TOKENS = 32
# A batch is decoded until its longest answer ends, and most answers are short. So after so many tokens
# those that have ended are left behind, and the others go on together, in new batches.
_STAGES = (4, 12, 32)

# By how much of the logits' size the largest must lead for a guess to count, in each dtype: many
# times what padding on the other side, or keys and values from a cache, make of it. Their size is
# that of the largest in absolute value: it may be another one, and rounding follows it.
_CLEAR_MARGINS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}

Stop = Literal["protocol", "line", "text"]


def answer_prompts(
    model: PreTrainedModel,
    codec: Codec,
    prompts: Iterable[str],
    *,
    batch_size: int,
    label: str,
    stop: Stop = "protocol",
    guesses: Mapping[str, str] | None = None,
    on_confirmed: Callable[[Collection[str]], None] = lambda _: None,
) -> dict[str, str]:
    """Answer prompts greedily: `decode_prompts`, and `read_answers` of what it gives.

    Returns:
        Each prompt's answer, cut at the stop and stripped.
    """
    rows = decode_prompts(
        model,
        codec,
        prompts,
        batch_size=batch_size,
        label=label,
        stop=stop,
        guesses=guesses,
        on_confirmed=on_confirmed,
    )
    return {prompt: answer.strip() for prompt, answer in read_answers(codec, rows, stop).items()}


def decode_prompts(
    model: PreTrainedModel,
    codec: Codec,
    prompts: Iterable[str],
    *,
    batch_size: int,
    label: str,
    stop: Stop = "protocol",
    max_new_tokens: int = MAX_NEW_TOKENS,
    guesses: Mapping[str, str] | None = None,
    on_confirmed: Callable[[Collection[str]], None] = lambda _: None,
) -> dict[str, list[int]]:
    """Decode what follows prompts, greedily; the model's own settings are left out.

    A guess that is right costs one forward pass instead of one for every token: where each of its
    tokens is clearly the likeliest, and then one that ends the answer, decoding would give just that.

    Source: the paper's protocol (section 5).

    Args:
        model: The model, in evaluation mode.
        codec: How prompts become token ids.
        prompts: The prompts; repeated ones are answered once.
        batch_size: How many prompts to answer at a time.
        label: What the progress bar says.
        stop: ``protocol`` ends an answer at the first ".", newline or end of sequence, as scores are
            taken; many a model begins with a newline, and its answer is then empty. ``line`` gives
            the first line that is not blank, for a person to read. ``text`` ends at the end of sequence
            alone.
        max_new_tokens: After how many tokens an answer ends at the latest. What it begins with does
            not depend on it.
        guesses: What some prompts may be answered with; they change the time, never an answer. (The
            other prompts share batches among themselves, which rounding may notice in a near tie,
            as it may notice another `batch_size`.)
        on_confirmed: Called with the prompts whose guesses were right, which need no decoding.

    Returns:
        Each prompt's new tokens, without the one that ends a sequence.
    """
    ids = {prompt: codec.prompt_ids(prompt) for prompt in prompts}
    ends = _end_ids(model, codec)
    stop_at = _StopAt(codec.tokenizer, stop, model.device)
    with progress(label, len(ids), "prompts") as step:
        rows = {}
        if guesses and stop == "protocol":
            rows = _confirm_guesses(
                model, codec, ids, guesses, batch_size, ends, stop_at, max_new_tokens
            )
            step(len(rows))
            on_confirmed(rows.keys())
        pending = {prompt: found for prompt, found in ids.items() if prompt not in rows}
        rows |= _decode_greedily(model, pending, batch_size, ends, stop_at, max_new_tokens, step)
    return rows


def read_answers(codec: Codec, rows: Mapping[str, list[int]], stop: Stop = "protocol") -> dict[str, str]:
    """Read each prompt's answer from its new tokens, cut at the stop, with the spaces around it."""
    texts = codec.tokenizer.batch_decode(list(rows.values()), skip_special_tokens=True) if rows else []
    return {prompt: _cut(text, stop) for prompt, text in zip(rows, texts, strict=True)}


def _cut(text: str, stop: Stop) -> str:
    if stop == "protocol":
        return cut_answer(text)
    return text.strip() if stop == "text" else text.strip().partition("\n")[0]


def decoding_stages(max_new_tokens: int) -> tuple[int, ...]:
    """List after how many new tokens the answers that have ended are left behind."""
    return (*(num for num in _STAGES if num < max_new_tokens), max_new_tokens)


def _decode_greedily(
    model: PreTrainedModel,
    ids: Mapping[str, tuple[int, ...]],
    batch_size: int,
    ends: set[int],
    stop_at: "_StopAt",
    max_new_tokens: int,
    step: Step,
) -> dict[str, list[int]]:
    """Decode the tokens that follow each prompt, without the one that ends a sequence."""
    rows: dict[str, list[int]] = {}
    pending = {prompt: list(of_prompt) for prompt, of_prompt in ids.items()}
    num_decoded = 0
    with generating(model, _greedy(ends)):
        for num_tokens in decoding_stages(max_new_tokens):
            # Longest first: little is padded, and memory is at its peak at once.
            order = sorted(pending, key=lambda prompt: (-len(pending[prompt]), prompt))
            unfinished: dict[str, list[int]] = {}
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                texts = [pending[prompt] for prompt in batch]
                decoded = _decode_some(model, texts, num_decoded, num_tokens - num_decoded, stop_at)
                for prompt, text, (row, has_ended) in zip(batch, texts, decoded, strict=True):
                    whole = text[len(ids[prompt]) :] + row
                    # Not left to skip_special_tokens: a token that ends an answer need not be special.
                    answer = list(takewhile(lambda token: token not in ends, whole))
                    if has_ended or len(answer) < len(whole) or num_tokens == max_new_tokens:
                        rows[prompt] = answer
                    else:
                        unfinished[prompt] = text + row
                step(len(batch) - sum(prompt in unfinished for prompt in batch))
            pending, num_decoded = unfinished, num_tokens
    return rows


def _decode_some(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    num_before: int,
    num_tokens: int,
    stop_at: "_StopAt",
) -> list[tuple[list[int], bool]]:
    """Go on with texts, the last `num_before` tokens of which were decoded, by a number of tokens.

    Returns:
        For each text its new tokens, and whether the last of them holds a stop.
    """
    longest = max(map(len, texts))
    padded = [[0] * (longest - len(text)) + [*text] for text in texts]
    mask = [[int(i >= longest - len(text)) for i in range(longest)] for text in texts]
    stop_at.prompt_length = longest - num_before
    generate: Any = model.generate
    generated: Tensor = generate(
        torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        stopping_criteria=StoppingCriteriaList([stop_at]),
        max_new_tokens=num_tokens,
    )
    has_ended = stop_at(generated, None).tolist()
    return list(zip(generated[:, longest:].tolist(), has_ended, strict=True))


def _confirm_guesses(
    model: PreTrainedModel,
    codec: Codec,
    ids: Mapping[str, tuple[int, ...]],
    guesses: Mapping[str, str],
    batch_size: int,
    ends: set[int],
    stop_at: "_StopAt",
    max_new_tokens: int,
) -> dict[str, list[int]]:
    """Find the guesses that decoding would give, and return their tokens.

    Left out are those that decoding might not give: with a token that is not the likeliest, or hardly,
    as another order of rounding could decide otherwise; that hold a stop or are too long; or that the
    tokenizer would not spell from the prompt's own ids on.
    """
    guessed: dict[str, tuple[int, ...]] = {}
    for prompt in ids.keys() & guesses.keys():
        tokens = codec.continuation(prompt, guesses[prompt])
        if (
            tokens is not None
            and len(tokens) < max_new_tokens
            and not any(token in ends or stop_at.is_end(token) for token in tokens)
        ):
            guessed[prompt] = tokens
    order = sorted(guessed, key=lambda prompt: (-len(ids[prompt]) - len(guessed[prompt]), prompt))
    rows: dict[str, list[int]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        whole = [[*ids[prompt], *guessed[prompt]] for prompt in batch]
        longest = len(whole[0])
        # From the prompt's last token on, each position predicts the next.
        places = [
            (row, column)
            for row, prompt in enumerate(batch)
            for column in range(len(ids[prompt]) - 1, len(whole[row]))
        ]
        at_rows, at_columns = torch.tensor(places, device=model.device).unbind(dim=1)
        padded = [[*row, *[0] * (longest - len(row))] for row in whole]
        mask = [[int(i < len(row)) for i in range(longest)] for row in whole]
        with torch.no_grad():
            logits = logits_at(
                model,
                at_rows,
                at_columns,
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
            )
        best, second = logits.topk(2, dim=1).values.float().unbind(dim=1)
        size = torch.maximum(best.abs(), logits.amin(dim=1).float().abs())
        is_clear = best - second > _CLEAR_MARGINS[logits.dtype] * size
        # Where it is not clear, no token is found.
        found = logits.argmax(dim=1).where(is_clear, -1).tolist()
        for prompt in batch:
            count = len(guessed[prompt]) + 1
            row, found = found[:count], found[count:]
            if tuple(row[:-1]) != guessed[prompt]:
                continue
            if row[-1] in ends:
                rows[prompt] = row[:-1]
            elif stop_at.is_end(row[-1]):
                rows[prompt] = row
    return rows


def _end_ids(model: PreTrainedModel, codec: Codec) -> set[int]:
    """Collect every token that ends an answer: the one learnt, and those that the model names."""
    ends = {codec.eos_id}
    for named in (model.generation_config.eos_token_id, codec.tokenizer.eos_token_id):
        ends.update(named if isinstance(named, list) else [named] if named is not None else [])
    return ends


def _greedy(ends: set[int]) -> GenerationConfig:
    """Make the settings of plain greedy decoding."""
    return GenerationConfig(do_sample=False, eos_token_id=sorted(ends), pad_token_id=min(ends))


class _StopAt(StoppingCriteria):
    """Stops a row once its newest token ends the answer."""

    prompt_length = 0  # of the batch that is being answered

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Stop, device: torch.device) -> None:
        texts = _token_texts(tokenizer)
        marks = {"protocol": (".", "\n"), "line": ("\n",), "text": ()}[stop]
        ends = [any(mark in text for mark in marks) for text in texts]
        # Under the protocol even a blank answer ends; a line must hold something.
        speaks = [stop == "protocol" or bool(text.strip()) for text in texts]
        # A model's vocabulary may be padded past the tokenizer's; what lies there does neither.
        self.ends = torch.tensor([*ends, False], device=device)
        self.speaks = torch.tensor([*speaks, False], device=device)
        self._end_ids = {index for index, is_end in enumerate(ends) if is_end}

    def is_end(self, token: int) -> bool:
        """Tell whether a token holds a stop."""
        return token in self._end_ids

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        new = input_ids[:, self.prompt_length :].clamp(max=len(self.ends) - 1)
        return self.ends[new[:, -1]] & self.speaks[new].any(dim=1)


@lru_cache(maxsize=4)
def _token_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Decode each token of the vocabulary by itself."""
    return tuple(tokenizer.batch_decode([[index] for index in range(len(tokenizer))]))
