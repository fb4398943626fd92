"""A tokenizer and models small enough to be made on the spot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

# How long an example takes says more of what else runs on the machine.
hypothesis.settings.register_profile("locft", deadline=None)
hypothesis.settings.load_profile("locft")

torch.set_num_threads(1)  # tiny products: a second thread only costs, and results do not depend on it

CORPUS = (
    "The capital of France is Paris. The capital of Italy is Rome.\n"
    "Who wrote the play? Where does the river begin? What sport does she play?\n"
    "London Berlin Madrid Vienna Oslo football tennis chess painter singer physicist\n"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + "
    "'<|stop|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(**options: Any) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer on a few sentences; it knows every byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|end|>", "<|start|>", "<|stop|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    settings = {"eos_token": "<|end|>", "pad_token": "<|end|>", **options}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    fast.chat_template = CHAT_TEMPLATE
    return fast


SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 0,
}


def tiny_llama_config(**options: Any) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, "tie_word_embeddings": True, **options})


def tiny_phi3_config(**options: Any) -> Phi3Config:
    """Configure a model whose MLP has gate and up in one matrix."""
    return Phi3Config(**{**SIZES, "pad_token_id": 0, **options})


def tiny_mixture_config(family: str, **options: Any) -> PreTrainedConfig:
    """Configure a mixture of four experts, two of which answer at a time."""
    settings = {**SIZES, "pad_token_id": 0, "num_experts_per_tok": 2, **options}
    narrow = {**settings, "num_experts": 4, "moe_intermediate_size": 16}
    configs: dict[str, Callable[[], PreTrainedConfig]] = {
        "mixtral": lambda: MixtralConfig(**{"num_local_experts": 4, **settings}),
        "qwen2_moe": lambda: Qwen2MoeConfig(**narrow, shared_expert_intermediate_size=24),
        "qwen3_moe": lambda: Qwen3MoeConfig(**{**narrow, "head_dim": 8}),
        "olmoe": lambda: OlmoeConfig(**settings, num_experts=4),
        # Its parameters are the file's tensors under other names.
        "granitemoe": lambda: GraniteMoeConfig(**settings, num_local_experts=4),
    }
    return configs[family]()


def make_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Build a model of any family with random weights, in evaluation mode and frozen."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    model.requires_grad_(False)
    return model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


@pytest.fixture
def tiny_model() -> PreTrainedModel:
    """A fresh three-layer Llama; tests may change it."""
    return make_model(tiny_llama_config())


@pytest.fixture(scope="session")
def save_model(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Save a model of any configuration, with the tokenizer, as a Hugging Face folder."""

    def save(config: PreTrainedConfig, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        model: Any = make_model(config)
        model.to(dtype).save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def model_folder(save_model: Callable[..., Path]) -> Path:
    """A three-layer Llama on disk; tests must not change it."""
    return save_model(tiny_llama_config())
