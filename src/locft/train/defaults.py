"""Chooses what the user leaves to us: learning rate and epochs by one rule for all models, and engine.

The evidence stands in docs/defaults.md.
"""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from locft.config import RunConfig
from locft.errors import ConfigError
from locft.model.products import has_fast_bfloat16
from locft.train.loop import Engine, Schedule

_LR_SCALE = 0.08
_EPOCH_LIMIT = 25
_STEP_LIMIT = 100


def choose_schedule(
    config: RunConfig, num_edits: int, shapes: Sequence[Sequence[int]], gain: float = 1.0
) -> Schedule:
    """Resolve every `auto` of the settings that concern training.

    Learning rate: 0.08 / (k sqrt(n)), with n the longer side of the largest tuned matrix and k the
    number of tuned matrices. Adam moves every weight by about the learning rate, so a matrix's
    output moves with the square root of its width, and the moves of k matrices add up. The rule
    gives 2e-3 for the MLP down projection of a 135M model, where it was measured, and 6.7e-4 for
    Llama-3-8B's, where the paper has 5e-4.

    Where updates are preconditioned it is `gain` times that, so that a step changes what a matrix makes
    of ordinary inputs as much as without.

    Epochs: 25 as in the paper, more where that would be fewer than 100 steps. Both are limits: a
    run ends when the loss is under `stop_loss`.

    Args:
        config: The settings.
        num_edits: How many edits there are.
        shapes: The shapes of the tuned parameters; that of one expert, since together they answer as
            one.
        gain: How much more preconditioned updates must move than plain ones.

    Returns:
        The schedule.
    """
    matrices = [shape for shape in shapes if len(shape) >= 2] or list(shapes)
    width = max(max(shape) for shape in matrices)
    rate = gain * _LR_SCALE / (len(matrices) * math.sqrt(width))
    lr = rate if config.lr == "auto" else config.lr
    steps_per_epoch = math.ceil(num_edits / config.batch_size)
    enough = max(_EPOCH_LIMIT, math.ceil(_STEP_LIMIT / steps_per_epoch))
    return Schedule(
        lr=lr,
        batch_size=config.batch_size,
        epochs=enough if config.epochs == "auto" else config.epochs,
        stop_loss=config.stop_loss,
        loss_mean=config.loss_mean,
        seed=config.seed,
        max_drift=config.max_drift,
    )


def choose_engine(
    config: RunConfig, model: PreTrainedModel, device: torch.device | None = None
) -> Engine:
    """Resolve every `auto` of the settings that say what training computes with.

    Args:
        config: The settings.
        model: The model.
        device: Where it will run; where it is if None.

    Returns:
        The engine.

    Raises:
        ConfigError: A bfloat16 model is to compute in float32, or compiled layers of a float32 model in
            bfloat16.
    """
    if model.dtype == torch.bfloat16 and config.compute_dtype == "float32":
        raise ConfigError(
            "compute_dtype float32 is for float32 weights, and this model's are bfloat16: add --dtype"
            " float32, or leave --compute-dtype out"
        )
    kind = (device or model.device).type
    is_compiled = config.compile == "on" or (config.compile == "auto" and kind == "cuda")
    if is_compiled and config.compute_dtype == "bfloat16" and model.dtype == torch.float32:
        raise ConfigError(
            "compute_dtype bfloat16 is for layers that are not compiled: add --compile off, or load the"
            " weights in bfloat16 with --dtype bfloat16"
        )
    wants_bfloat16 = config.compute_dtype == "bfloat16" or (
        # Elsewhere a model's own dtype is the way to choose.
        config.compute_dtype == "auto" and kind == "cpu" and not is_compiled and has_fast_bfloat16()
    )
    return Engine(
        in_bfloat16=wants_bfloat16 and model.dtype == torch.float32,
        compiled="inductor" if is_compiled else None,
    )
