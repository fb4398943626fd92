"""Sets up what a benchmark trains: a model and its edits, or a shape with random weights and tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from locft.config import RunConfig, with_settings
from locft.data.encode import Codec, Encoded
from locft.errors import ConfigError
from locft.evaluation.metrics import is_match
from locft.evaluation.scoring import guesses_for
from locft.evaluation.subject import load_subject
from locft.model.load import DTYPES, choose_device
from locft.model.location import Location, resolve_location
from locft.train.defaults import choose_schedule
from locft.train.loop import Schedule
from locft.types import Edit

END_ID = 2  # the end-of-sequence token of a shape; its first three tokens are special
_PROMPT_TOKENS, _TARGET_TOKENS = (8, 24), (2, 6)  # as those of ZsRE


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all processes of a benchmark have in common.

    Attributes:
        model: A model's name, as `load_model` takes it; None for a shape.
        shape: A name of `SHAPES`; None for a model.
        edits: The edits; none for a shape.
        num_edits: How many edits there are.
        config: The settings.
        num_threads: How many threads torch has.
    """

    model: str | None
    shape: str | None
    edits: tuple[Edit, ...]
    num_edits: int
    config: RunConfig
    num_threads: int


@dataclass(frozen=True)
class Stand:
    """A model to train, and on what.

    Attributes:
        model: The model, frozen, in evaluation mode.
        location: What is tuned: one matrix.
        schedule: How long and how fast.
        codec: What encodes edits; None for a shape.
        edits: The edits; none for a shape.
        random_examples: What stands for them in a shape.
    """

    model: PreTrainedModel
    location: Location
    schedule: Schedule
    codec: Codec | None
    edits: tuple[Edit, ...]
    random_examples: tuple[Encoded, ...]

    @property
    def parameter(self) -> torch.nn.Parameter:
        """The tuned matrix."""
        return self.model.get_parameter(self.location.parameters[0])

    def encode(self) -> list[Encoded]:
        """Turn the edits into token ids."""
        if self.codec is None:
            return list(self.random_examples)
        return [self.codec.encode(edit) for edit in self.edits]


def set_up(task: Task, dtype: str) -> Stand:
    """Load or make the model of a task.

    Args:
        task: The task.
        dtype: What to hold the frozen weights in; ``auto`` is the model's own.

    Raises:
        InputError: The model or the location cannot be used.
    """
    torch.set_num_threads(task.num_threads)
    config = with_settings(task.config, {"dtype": dtype})
    codec: Codec | None = None
    examples: tuple[Encoded, ...] = ()
    if task.shape is None:
        assert task.model is not None
        subject = load_subject(task.model, config)
        model, codec = subject.loaded.model, subject.codec
    else:
        model = make_shape(task.shape, dtype, choose_device(config.device), config.seed)
        examples = random_examples(task.num_edits, model.config.vocab_size, config.seed)
    location = resolve_location(model, config.location)
    schedule = choose_schedule(config, task.num_edits, location.shapes)
    return Stand(model, location, schedule, codec, task.edits, examples)


def answers_right(task: Task, matrix: torch.Tensor) -> float | None:
    """Say for which share of the edits a model with a trained matrix gives the target.

    It is a fresh model in its own dtype, however the matrix was trained.

    Args:
        task: The task.
        matrix: The trained matrix.

    Returns:
        The share; None for a shape, which has no words.
    """
    if task.model is None:
        return None
    subject = load_subject(task.model, task.config)
    network = subject.loaded.model
    name = resolve_location(network, task.config.location).parameters[0]
    with torch.no_grad():
        network.get_parameter(name).copy_(matrix)
    prompts = [edit.prompt for edit in task.edits]
    answers = subject.answer(prompts, "answering", guesses=guesses_for(task.edits))
    matches = [is_match(answers[edit.prompt], edit.target) for edit in task.edits]
    return sum(matches) / len(matches)


def make_shape(name: str, dtype: str, device: torch.device, seed: int) -> PreTrainedModel:
    """Make a Llama of some shape with random weights, frozen, on its device.

    Args:
        name: ``llama-8b``, of Llama-3-8B's shape, or ``tiny``, to try a benchmark with.
        dtype: What to hold the weights in; ``auto`` is bfloat16 for the former, else float32.
        device: Where to make it.
        seed: Names the weights.

    Raises:
        ConfigError: There is no such shape.
    """
    if name == "llama-8b":
        own_dtype = torch.bfloat16
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
        )
    elif name == "tiny":
        own_dtype = torch.float32
        config = LlamaConfig(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    else:
        raise ConfigError(f"shape is {name!r}: expected tiny or llama-8b")
    torch.manual_seed(seed)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=own_dtype)
    model.requires_grad_(False)
    model.eval()
    return model if dtype == "auto" else model.to(DTYPES[dtype])  # type: ignore[arg-type]


def random_examples(num: int, num_tokens: int, seed: int) -> tuple[Encoded, ...]:
    """Make edits of random tokens, as long as those of ZsRE.

    Args:
        num: How many.
        num_tokens: How many tokens the model knows.
        seed: Names them.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, num: int) -> Sequence[int]:
        return [int(number) for number in torch.randint(low, high, (num,), generator=generator)]

    examples = []
    for _ in range(num):
        [num_prompt], [num_target] = (
            draw(low, high + 1, 1) for low, high in (_PROMPT_TOKENS, _TARGET_TOKENS)
        )
        ids = draw(END_ID + 1, num_tokens, num_prompt + num_target)
        examples.append(Encoded(ids=(*ids, END_ID), target_start=num_prompt))
    return tuple(examples)
