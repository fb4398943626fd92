"""TRL's trainer on the same edits: what a user would take who wants to tune one matrix.

It trains on pairs of prompt and completion, with the loss on completions only, Adam without weight
decay or clipping and a constant rate. Everything else is as TRL has it: its order of the edits, its mean
over target tokens, its own way around the logits.
"""

import tempfile
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from locft.bench.stand import END_ID, Stand
from locft.bench.training import Clock, Training
from locft.data.encode import join
from locft.errors import MissingExtraError

_LARGEST_SEED = 2**32


def require_trl() -> None:
    """Check that TRL is there.

    Raises:
        MissingExtraError: It is not.
    """
    if find_spec("trl") is None:
        raise MissingExtraError("the variant trl", "bench")


def import_trl() -> tuple[Any, Any, Any]:
    """Import what is used of TRL, which takes seconds: before anything is timed."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return Dataset, SFTConfig, SFTTrainer


def train_trl(stand: Stand, dtype: str, *, num_trial_steps: int | None = None) -> Training:
    """Train with TRL's SFTTrainer.

    In bfloat16 the tuned matrix stays float32 under autocast, as it would be with any adapter: Adam's
    steps are too small for it otherwise.

    Args:
        stand: What to train, on what; the model is in `dtype`.
        dtype: ``float32`` or ``bfloat16``.
        num_trial_steps: End after so many steps, and time each.

    Returns:
        What came of it; the losses are those that TRL logs.
    """
    Dataset, SFTConfig, SFTTrainer = import_trl()  # noqa: N806
    model, schedule, parameter = stand.model, stand.schedule, stand.parameter
    parameter.data = parameter.data.float()
    parameter.requires_grad_(True)
    timer = _Timer(model.device, times_steps=num_trial_steps is not None)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # Of names that only later releases of transformers have others for.
        warnings.simplefilter("ignore", FutureWarning)
        settings = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=schedule.batch_size,
            num_train_epochs=schedule.epochs,
            max_steps=-1 if num_trial_steps is None else num_trial_steps,
            learning_rate=schedule.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            bf16=dtype == "bfloat16",
            gradient_checkpointing=False,
            completion_only_loss=True,
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=model.device.type == "cuda",
            seed=schedule.seed % _LARGEST_SEED,
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="epoch",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_list(_records(stand)),
            processing_class=_wordless() if stand.codec is None else stand.codec.tokenizer,
            callbacks=[timer],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    ours = [(list(example.ids), example.num_targets) for example in stand.encode()]
    theirs = [
        (row["input_ids"], sum(label != -100 for label in row["labels"]))
        for row in trainer.train_dataset
    ]
    return Training(
        matrix=parameter.detach().cpu(),
        dtype=dtype,
        losses=tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
        epoch_seconds=timer.epochs.laps,
        step_seconds=timer.steps.laps if timer.times_steps else (),
        same_tokens=ours == theirs,
    )


class _Timer(TrainerCallback):
    """Notes the end of each epoch, and of each step where it is asked to: that waits for the device."""

    def __init__(self, device: torch.device, *, times_steps: bool) -> None:
        self.device, self.times_steps = device, times_steps

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start: all is built by now."""
        self.epochs, self.steps = Clock(self.device), Clock(self.device)

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Note an epoch."""
        self.epochs.note()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note a step."""
        if self.times_steps:
            self.steps.note()


def _records(stand: Stand) -> list[dict[str, Any]]:
    """Put the edits as TRL reads them: in words, or as ids where the model has no words."""
    if stand.codec is None:
        return [
            {
                "input_ids": list(example.ids),
                "completion_mask": [int(i >= example.target_start) for i in range(len(example.ids))],
            }
            for example in stand.encode()
        ]
    return [
        {"prompt": edit.prompt, "completion": join(edit.prompt, edit.target)[len(edit.prompt) :]}
        for edit in stand.edits
    ]


def _wordless() -> PreTrainedTokenizerBase:
    """Make a tokenizer for a model without words: TRL asks it for what it pads with."""
    words = Tokenizer(WordLevel({"<unknown>": 0, "<end>": END_ID}, unk_token="<unknown>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
