import math
from typing import Any

import pytest
import torch
from conftest import make_model, tiny_llama_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from locft.data.encode import Codec, make_codec
from locft.errors import EvaluationError
from locft.evaluation.generate import decode_prompts, read_answers
from locft.evaluation.likelihood import Continuation, Pair, score_continuations

PAIRS = (
    ("The capital of France is", "Paris"),
    ("The capital of France is", "Rome, the eternal city"),
    ("Who wrote the play?", "London"),
    ("Who", "a"),
    ("What sport does she play?", "table tennis in the evening, and chess at night"),
    ("Where does the river begin?", ""),
    ("It costs 5", "0 pounds"),
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    model = make_model(tiny_llama_config())
    with torch.no_grad():  # predictions that are worth comparing
        model.get_parameter("model.embed_tokens.weight").mul_(20)
    return model


def scored(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *pairs: Pair, batch_size: int = 4
) -> dict[Pair, Continuation]:
    codec = make_codec(tokenizer, "raw")
    return score_continuations(model, codec, pairs, batch_size=batch_size, label="test")


def by_hand(model: PreTrainedModel, tokenizer: Any, prompt: str, text: str) -> tuple[int, int, float]:
    """Score token by token: one forward for each, without padding."""
    joined = tokenizer(f"{prompt} {text}", return_offsets_mapping=True)
    ids = joined["input_ids"]
    num, right, nll = 0, 0, 0.0
    for place, (_, end) in enumerate(joined["offset_mapping"]):
        if end > len(prompt):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1].double()
            num += 1
            right += int(logits.argmax()) == ids[place]
            nll -= float(logits.log_softmax(-1)[ids[place]])
    return num, right, nll


def test_figures_are_those_of_single_forward_passes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = scored(model, tokenizer, *PAIRS)
    assert set(found) == set(PAIRS)
    for prompt, text in PAIRS:
        if not text:
            continue
        num, right, nll = by_hand(model, tokenizer, prompt, text)
        one = found[prompt, text]
        assert (one.num_tokens, one.num_right) == (num, right)
        assert one.nll == pytest.approx(nll, rel=1e-4)
        assert one.mean_nll == pytest.approx(nll / num, rel=1e-4)
        assert one.share_right == right / num


def test_a_text_without_tokens_has_no_score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    [found] = scored(model, tokenizer, ("Who", "")).values()
    assert found == Continuation(num_tokens=0, num_right=0, nll=0.0)
    assert (found.mean_nll, found.share_right) == (None, None)


@given(st.permutations(PAIRS), st.integers(1, 8))
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_scores_depend_neither_on_the_order_nor_on_the_batch_size(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], batch_size: int
) -> None:
    alone = scored(model, tokenizer, *PAIRS, batch_size=1)
    found = scored(model, tokenizer, *pairs, batch_size=batch_size)
    for pair, one in alone.items():
        assert (found[pair].num_tokens, found[pair].num_right) == (one.num_tokens, one.num_right)
        assert found[pair].nll == pytest.approx(one.nll, rel=1e-4, abs=1e-6)


def test_a_likelihood_that_is_not_finite_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    broken = make_model(tiny_llama_config())
    with torch.no_grad():
        broken.get_parameter("model.norm.weight").fill_(math.nan)
    with pytest.raises(EvaluationError, match="'Paris' after 'The capital of France is'"):
        scored(broken, tokenizer, PAIRS[0])


def test_what_a_model_generated_is_what_it_finds_likeliest(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    codec = make_codec(tokenizer, "raw")
    prompts = [prompt for prompt, _ in PAIRS]
    rows = decode_prompts(model, codec, prompts, batch_size=4, label="", max_new_tokens=6)
    answers = read_answers(codec, rows)
    pairs = [
        (prompt, answer)
        for prompt, answer in answers.items()
        # Read back, it may be other tokens, which nobody generated.
        if rows[prompt][: len(ids := generated(codec, prompt, answer))] == ids and ids
    ]
    assert pairs
    found = score_continuations(model, codec, pairs, batch_size=4, label="", as_generated=True)
    assert {one.share_right for one in found.values()} == {1.0}


def generated(codec: Codec, prompt: str, answer: str) -> list[int]:
    encoded = codec.encode_pair(prompt, answer, as_generated=True)
    return list(encoded.ids[encoded.target_start :])
