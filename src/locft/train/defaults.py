"""Chooses learning rate and number of epochs where the user leaves them to us: one rule for all models.

The evidence stands in docs/defaults.md.
"""

import math
from collections.abc import Sequence

from locft.config import RunConfig
from locft.train.loop import Schedule

_LR_SCALE = 0.08
_EPOCH_LIMIT = 25
_STEP_LIMIT = 100


def choose_schedule(config: RunConfig, num_edits: int, shapes: Sequence[Sequence[int]]) -> Schedule:
    """Resolve every `auto` of the settings that concern training.

    Learning rate: 0.08 / (k sqrt(n)), with n the longer side of the largest tuned matrix and k the
    number of tuned matrices. Adam moves every weight by about the learning rate, so a matrix's
    output moves with the square root of its width, and the moves of k matrices add up. The rule
    gives 2e-3 for the MLP down projection of a 135M model, where it was measured, and 6.7e-4 for
    Llama-3-8B's, where the paper has 5e-4.

    Epochs: 25 as in the paper, more where that would be fewer than 100 steps. Both are limits: a
    run ends when the loss is under `stop_loss`.

    Args:
        config: The settings.
        num_edits: How many edits there are.
        shapes: The shapes of the tuned parameters.

    Returns:
        The schedule.
    """
    matrices = [shape for shape in shapes if len(shape) >= 2] or list(shapes)
    width = max(max(shape) for shape in matrices)
    lr = _LR_SCALE / (len(matrices) * math.sqrt(width)) if config.lr == "auto" else config.lr
    steps_per_epoch = math.ceil(num_edits / config.batch_size)
    enough = max(_EPOCH_LIMIT, math.ceil(_STEP_LIMIT / steps_per_epoch))
    return Schedule(
        lr=lr,
        batch_size=config.batch_size,
        epochs=enough if config.epochs == "auto" else config.epochs,
        stop_loss=config.stop_loss,
        loss_mean=config.loss_mean,
        seed=config.seed,
    )
