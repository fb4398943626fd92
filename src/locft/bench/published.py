"""The published procedure, written plainly: what locft is measured against.

It shares nothing with locft's engine but the edits, their order and the learning rate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locft.bench.stand import Stand
from locft.bench.training import Clock, Training
from locft.data.encode import Encoded
from locft.model.load import dtype_name
from locft.progress import progress
from locft.train.loop import shuffled_batches


def train_published(stand: Stand) -> Training:
    """Train as published: the whole model on padded batches, a gradient of one matrix, Adam.

    Args:
        stand: What to train, on what.
    """
    model, schedule, examples = stand.model, stand.schedule, stand.encode()
    parameter = stand.parameter.requires_grad_(True)
    optimizer = torch.optim.Adam([parameter], lr=schedule.lr)
    orders = shuffled_batches(len(examples), schedule.batch_size, schedule.seed)
    step_tokens, losses = [], []
    epochs, steps = Clock(model.device), Clock(model.device)
    with progress("training as published", schedule.epochs * len(examples), "edits") as advance:
        for _ in range(schedule.epochs):
            total = 0.0
            for indices in next(orders):
                batch = [examples[index] for index in indices]
                num_padded = len(batch) * max(len(example.ids) for example in batch)
                optimizer.zero_grad()
                loss = published_loss(model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                value = loss.item()
                steps.note()
                step_tokens.append(num_padded)
                total += value * len(batch)
                advance(len(batch), note=f"loss {value:.3f}")
            losses.append(total / len(examples))
            epochs.note()
    return Training(
        matrix=parameter.detach().cpu(),
        dtype=dtype_name(model.dtype),
        losses=tuple(losses),
        epoch_seconds=epochs.laps,
        step_seconds=steps.laps,
        step_tokens=tuple(step_tokens),
    )


def published_loss(model: PreTrainedModel, examples: Sequence[Encoded]) -> Tensor:
    """Run the whole model on a batch; return its loss, in nats.

    It is the cross-entropy of target tokens, averaged over each edit's first and then over the edits.
    The logits are those of all positions; the loss takes the ones it needs, which costs least.

    Args:
        model: The model.
        examples: The edits of the batch.
    """
    ids, mask, is_target = (part.to(model.device) for part in pad_right(examples))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    # The logits at a position predict the next token.
    predicted, labels = logits[:, :-1][is_target[:, 1:]], ids[:, 1:][is_target[:, 1:]]
    losses = torch.nn.functional.cross_entropy(predicted.float(), labels, reduction="none")
    shares = (is_target / is_target.sum(dim=1, keepdim=True))[is_target]
    return (losses * shares).sum() / len(examples)


def pad_right(examples: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """Pad examples on the right to the longest.

    Returns:
        (B, T) token ids, (B, T) the attention mask (1 for tokens), (B, T) which of them are target.
    """
    longest = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros(len(examples), longest, dtype=torch.long)
    is_target = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = 1
        is_target[row, example.target_start : len(example.ids)] = True
    return ids, mask, is_target
