"""Texts that a model writes by itself: what it takes for ordinary, where no text is at hand."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel

from locft.progress import progress

_AT_ONCE = 64  # sequences


def sample_sequences(
    model: PreTrainedModel,
    starts: Sequence[Sequence[int]],
    length: int,
    seed: int,
    *,
    top_k: int = 0,
) -> list[tuple[int, ...]]:
    """Let a model go on from some beginnings, token by token at random, as likely as it finds them.

    A text that ends is followed by what the model writes after an end.

    Args:
        model: A causal language model, in evaluation mode.
        starts: What texts begin with; token ids, one at least, all equally many.
        length: How many tokens each text comes to.
        seed: Names what is drawn.
        top_k: Among how many of the likeliest tokens each is drawn; 0 for all.

    Returns:
        The texts' token ids, beginnings included. They follow from the seed and the device.
    """
    num_start = len(starts[0])
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=top_k,
        top_p=1.0,
        min_new_tokens=length - num_start,
        max_new_tokens=length - num_start,
        pad_token_id=0,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    found: list[tuple[int, ...]] = []
    with (
        torch.random.fork_rng(devices),
        generating(model, settings),
        progress("writing neutral text", len(starts), "texts") as step,
    ):
        torch.manual_seed(seed)
        for first in range(0, len(starts), _AT_ONCE):
            rows = torch.tensor([list(one) for one in starts[first : first + _AT_ONCE]])
            written = model.generate(  # type: ignore[operator]
                rows.to(model.device), attention_mask=torch.ones_like(rows).to(model.device)
            )
            found += [tuple(row) for row in written.tolist()]
            step(len(rows))
    return found


@contextmanager
def generating(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Let a model generate by some settings while the body runs; its own may sample or penalise."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own
