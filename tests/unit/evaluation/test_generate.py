import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import make_model, make_tokenizer, tiny_llama_config
from transformers import (
    GenerationConfig,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from locft.data.encode import make_codec
from locft.data.normalise import cut_answer
from locft.evaluation.generate import Stop, answer_prompts

PROMPTS = (
    "The capital of France is",
    "Who",
    "Where does the river begin? What sport does she play?",
    "Oslo football",
    "a",
    "What sport does she play? London Berlin Madrid Vienna Oslo football tennis chess painter singer",
    "tennis. chess",
    "physicist\n",
)
EOS = 0


def chatty_model(config: PreTrainedConfig | None = None, seed: int = 0) -> PreTrainedModel:
    """Make a random model that does not just repeat itself: strong layers, and an untied head."""
    config = config or tiny_llama_config(tie_word_embeddings=False)
    model = make_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                scale = 1.0 if parameter.shape[0] == config.vocab_size else parameter.shape[1] ** -0.5
                parameter.copy_(2.0 * scale * torch.randn(parameter.shape, generator=generator))
    return model


def raise_logits(model: PreTrainedModel, ids: list[int], by: float) -> None:
    """Make some tokens likelier, whatever stands before them."""
    head: Any = model.get_output_embeddings()
    bias = torch.zeros(head.out_features)
    bias[ids] = by
    head.bias = torch.nn.Parameter(bias, requires_grad=False)


def naive_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    ends: tuple[int, ...] = (EOS,),
) -> tuple[str, list[int]]:
    """Answer one prompt: no padding, no cache, no generate()."""
    ids: list[int] = list(tokenizer(prompt)["input_ids"])
    new: list[int] = []
    for _ in range(32):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1]
        new.append(int(logits.argmax()))
        if new[-1] in ends:
            break
        if new[-1] < len(tokenizer):
            text = tokenizer.decode([new[-1]])
            if "." in text or "\n" in text:
                break
    said = new[:-1] if new[-1] in ends else new  # the end is no part of the answer
    text = str(tokenizer.decode(said, skip_special_tokens=True))
    return cut_answer(text).strip(), new


def answers_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: tuple[str, ...] = PROMPTS,
    batch_size: int = 64,
    stop: Stop = "protocol",
    guesses: Mapping[str, str] | None = None,
) -> dict[str, str]:
    codec = make_codec(tokenizer, "raw")
    return answer_prompts(
        model, codec, prompts, batch_size=batch_size, label="test", stop=stop, guesses=guesses
    )


def dictate(
    monkeypatch: pytest.MonkeyPatch,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
) -> list[int]:
    """Make a model say a text after any prompt, and then end. Lists a 1 for each step it takes."""
    new = [*tokenizer(text)["input_ids"], EOS]
    forward: Any = model.forward
    said: list[int] = []

    def say(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        output.logits = torch.zeros_like(output.logits)
        output.logits[:, -1, new[min(len(said), len(new) - 1)]] = 1.0
        said.append(1)
        return output

    monkeypatch.setattr(model, "forward", say)
    return said


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[tuple[int, ...]]]:
    """Note the shape of each batch that is generated from."""
    shapes: list[tuple[int, ...]] = []
    original: Any = model.generate

    def generate(ids: torch.Tensor, **options: Any) -> Any:
        shapes.append(tuple(ids.shape))
        return original(ids, **options)

    with patch.object(model, "generate", generate):
        yield shapes


@pytest.mark.parametrize("seed", range(4))
def test_answers_are_those_of_a_loop_over_single_prompts(
    tokenizer: PreTrainedTokenizerBase, seed: int
) -> None:
    model = chatty_model(seed=seed)
    ends = [i for i in range(len(tokenizer)) if any(c in tokenizer.decode([i]) for c in ".\n")]
    raise_logits(model, [EOS, *ends], 12.0)
    expected = {prompt: naive_answer(model, tokenizer, prompt) for prompt in PROMPTS}
    assert answers_of(model, tokenizer) == {prompt: text for prompt, (text, _) in expected.items()}
    # What is compared is of all lengths, ended in all ways.
    lengths = {len(new) for _, new in expected.values()}
    assert len(lengths) >= 3


def test_the_seeds_above_end_answers_in_every_way(tokenizer: PreTrainedTokenizerBase) -> None:
    last: set[str] = set()
    for seed in range(4):
        model = chatty_model(seed=seed)
        ends = [i for i in range(len(tokenizer)) if any(c in tokenizer.decode([i]) for c in ".\n")]
        raise_logits(model, [EOS, *ends], 12.0)
        for prompt in PROMPTS:
            _, new = naive_answer(model, tokenizer, prompt)
            last.add("length" if len(new) == 32 else str(tokenizer.decode([new[-1]])))
    assert {"length", "<|end|>", "."} <= last
    assert any("\n" in text for text in last)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_the_batch_size_changes_no_answer(tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
    model = chatty_model()
    together = answers_of(model, tokenizer)
    with counted(model) as shapes:
        assert answers_of(model, tokenizer, batch_size=batch_size) == together
    sizes = [min(batch_size, len(PROMPTS) - start) for start in range(0, len(PROMPTS), batch_size)]
    assert [rows for rows, _ in shapes][: len(sizes)] == sizes
    assert max(rows for rows, _ in shapes) == batch_size


def test_answers_that_have_ended_are_left_behind(tokenizer: PreTrainedTokenizerBase) -> None:
    model = chatty_model(seed=1)
    ends = [i for i in range(len(tokenizer)) if any(c in tokenizer.decode([i]) for c in ".\n")]
    raise_logits(model, [EOS, *ends], 12.0)
    lengths = [len(naive_answer(model, tokenizer, prompt)[1]) for prompt in PROMPTS]
    with counted(model) as shapes:
        answers_of(model, tokenizer)
    going_on = [sum(length > num for length in lengths) for num in (0, 4, 12)]
    assert len(PROMPTS) > going_on[1] >= going_on[2] > 0
    assert [rows for rows, _ in shapes] == going_on


def test_absolute_positions_are_those_of_the_unpadded_prompt(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    config = GPT2Config(
        vocab_size=384, n_positions=128, n_embd=32, n_layer=2, n_head=4, eos_token_id=0, bos_token_id=1
    )
    model = make_model(config)
    with torch.no_grad():
        model.get_parameter("transformer.wpe.weight").mul_(50)
    expected = {prompt: naive_answer(model, tokenizer, prompt)[0] for prompt in PROMPTS}
    assert answers_of(model, tokenizer) == expected


def test_repeated_prompts_are_answered_once(tokenizer: PreTrainedTokenizerBase) -> None:
    model = chatty_model()
    with counted(model) as shapes:
        answers = answers_of(model, tokenizer, ("Who", "Oslo", "Who", "Who"))
    assert sorted(answers) == ["Oslo", "Who"]
    assert {rows for rows, _ in shapes} == {2}


def test_no_prompts_give_no_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    assert answers_of(chatty_model(), tokenizer, ()) == {}


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 0, "top_p": 1.0},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"min_length": 200},
        {"min_new_tokens": 20},
        {"max_new_tokens": 2},
        {"max_length": 4},
        {"forced_bos_token_id": 7, "forced_eos_token_id": 8},
        {"suppress_tokens": list(range(40, 380))},
        {"bad_words_ids": [[i] for i in range(40, 380)]},
        {"num_beams": 3},
        {"stop_strings": ["e", "o", " "]},
        {"use_cache": False},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_the_models_own_generation_settings_change_no_answer_and_are_given_back(
    tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> None:
    model = chatty_model()
    prompts = PROMPTS[:4]
    expected = {prompt: naive_answer(model, tokenizer, prompt)[0] for prompt in prompts}
    assert any(len(text) > 20 for text in expected.values())
    own = GenerationConfig(eos_token_id=EOS, pad_token_id=EOS, **settings)
    model.generation_config = own
    before = own.to_dict()
    assert answers_of(model, tokenizer, prompts) == expected
    assert model.generation_config is own
    assert own.to_dict() == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_generation_settings_are_given_back_after_an_exception(
    tokenizer: PreTrainedTokenizerBase, error: type[BaseException]
) -> None:
    model = chatty_model()
    own = model.generation_config

    def fail(*_: Any, **__: Any) -> None:
        assert model.generation_config is not own
        raise error

    with patch.object(model, "generate", fail), pytest.raises(error):
        answers_of(model, tokenizer)
    assert model.generation_config is own


def test_an_answer_ends_at_each_of_several_end_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    model = chatty_model()
    prompt = next(p for p in PROMPTS if len(set(naive_answer(model, tokenizer, p)[1])) > 8)
    _, free = naive_answer(model, tokenizer, prompt)
    second = next(token for token in free[3:] if token not in free[:3])
    model.generation_config = GenerationConfig(eos_token_id=[EOS, second])
    answer = answers_of(model, tokenizer, (prompt,))[prompt]
    expected, new = naive_answer(model, tokenizer, prompt, ends=(EOS, second))
    assert new == free[: free.index(second) + 1]
    assert answer == expected
    assert answer != naive_answer(model, tokenizer, prompt)[0]


def test_the_tokenizers_end_token_stops_a_model_whose_settings_name_another() -> None:
    tokenizer = make_tokenizer(eos_token="<|stop|>")
    stop = tokenizer.get_vocab()["<|stop|>"]
    model = chatty_model()
    model.generation_config = GenerationConfig(eos_token_id=EOS)
    for end in (stop, EOS):
        raise_logits(model, [end], 1e4)
        assert answers_of(model, tokenizer, ("Who",)) == {"Who": ""}


def test_a_vocabulary_padded_past_the_tokenizers_is_fine(tokenizer: PreTrainedTokenizerBase) -> None:
    model = chatty_model(tiny_llama_config(vocab_size=512, tie_word_embeddings=False))
    raise_logits(model, list(range(len(tokenizer), 512)), 6.0)
    expected = {prompt: naive_answer(model, tokenizer, prompt) for prompt in PROMPTS}
    assert any(token >= len(tokenizer) for _, new in expected.values() for token in new)
    assert answers_of(model, tokenizer) == {prompt: text for prompt, (text, _) in expected.items()}


def test_an_answer_is_cut_before_the_full_stop_within_a_token() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["Rome. Or"])
    token = tokenizer.get_vocab()["Rome. Or"]
    model = chatty_model(tiny_llama_config(vocab_size=512, tie_word_embeddings=False))
    raise_logits(model, [token], 1e4)
    assert answers_of(model, tokenizer, ("Who", "Oslo is")) == {"Who": "Rome", "Oslo is": "Rome"}


@pytest.mark.parametrize(
    ("text", "protocol", "line"),
    [
        ("Rome. Italy\nOslo", "Rome", "Rome. Italy"),
        ("\n\n Rome. Italy\nOslo", "", "Rome. Italy"),
        ("\nRome", "", "Rome"),
        (" . Rome", "", ". Rome"),
        ("Rome", "Rome", "Rome"),
        ("\n \n", "", ""),
    ],
)
def test_a_person_is_shown_the_first_line_and_the_protocol_takes_the_first_sentence(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    protocol: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected: tuple[tuple[Stop, str], ...] = (("protocol", protocol), ("line", line))
    for stop, answer in expected:
        model = make_model(tiny_llama_config())
        dictate(monkeypatch, model, tokenizer, text)
        assert answers_of(model, tokenizer, ("Who", "Who is"), stop=stop) == {
            "Who": answer,
            "Who is": answer,
        }


@pytest.mark.parametrize(("stop", "end"), [("protocol", "."), ("protocol", "\n"), ("line", "\n")])
def test_decoding_ends_with_the_answer(
    tokenizer: PreTrainedTokenizerBase, stop: Stop, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tiny_llama_config())
    steps = dictate(monkeypatch, model, tokenizer, f"Rome{end}Oslo London Vienna")
    assert answers_of(model, tokenizer, ("Who",), stop=stop) == {"Who": "Rome"}
    assert len(steps) == len(tokenizer(f"Rome{end}")["input_ids"])


def brief_model(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    """Make a random model that often ends its answers: by a stop, or by the end of sequence."""
    model = chatty_model(seed=seed)
    stops = [i for i in range(len(tokenizer)) if set(tokenizer.decode([i])) & set(".\n")]
    raise_logits(model, [EOS], 40.0)
    head: Any = model.get_output_embeddings()
    head.bias[stops] = 15.0
    return model


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["right", "wrong", "begun", "blank", "with a stop", "too long"])
def test_guesses_never_change_an_answer(
    tokenizer: PreTrainedTokenizerBase, seed: int, kind: str
) -> None:
    model = brief_model(tokenizer, seed)
    plain = answers_of(model, tokenizer)
    guesses = {
        "right": plain,
        "wrong": dict.fromkeys(plain, "chess"),
        "begun": {prompt: answer[: len(answer) // 2] for prompt, answer in plain.items()},
        "blank": dict.fromkeys(plain, ""),
        "with a stop": {prompt: f"{answer}. Oslo" for prompt, answer in plain.items()},
        "too long": dict.fromkeys(plain, "Oslo " * 40),
    }[kind]
    assert answers_of(model, tokenizer, guesses=guesses, batch_size=3) == plain


def test_a_right_guess_is_not_generated(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tiny_llama_config())
    codec = make_codec(tokenizer, "raw")
    prompt, other = "The capital of France is", "Who wrote the play?"
    start, said = codec.prompt_ids(prompt), codec.continuation(prompt, "Rome")
    assert said
    wanted = [*start, *said, EOS]

    def speak(input_ids: torch.Tensor, **_: Any) -> Any:
        # Whatever stands before it, each token is followed by the next one of what is wanted.
        logits = torch.zeros(*input_ids.shape, 384)
        following = dict(zip(wanted[len(start) - 1 :], wanted[len(start) :], strict=False))
        for place in itertools.product(*map(range, input_ids.shape)):
            logits[(*place, following.get(int(input_ids[place]), EOS))] = 1.0
        return logits

    monkeypatch.setattr(
        "locft.evaluation.generate.logits_at",
        lambda model, rows, columns, **inputs: speak(**inputs)[rows, columns],
    )
    guesses = {prompt: "Rome", other: "chess", "never asked": "Oslo"}
    confirmed: list[str] = []
    with counted(model) as shapes:
        answers = answer_prompts(
            model,
            codec,
            (prompt, other),
            batch_size=64,
            label="test",
            guesses=guesses,
            on_confirmed=confirmed.extend,
        )
    assert answers[prompt] == "Rome"
    assert {rows for rows, _ in shapes} == {1}
    assert confirmed == [prompt]


@pytest.mark.parametrize(
    ("dtype", "best", "lowest", "lead", "is_generated"),
    [
        (torch.float32, 1.0, 0.0, 0.0005, True),
        (torch.float32, 1.0, 0.0, 0.01, False),
        # The others say how large logits are where the largest happens to lie near 0.
        (torch.float32, 0.001, -20.0, 0.0005, True),
        (torch.float32, 0.0, -20.0, 0.01, True),
        (torch.float32, -1.0, -20.0, 0.1, False),
        (torch.bfloat16, 0.0, -20.0, 0.5, True),
        (torch.bfloat16, 0.0, -20.0, 2.0, False),
        (torch.float32, float("nan"), 0.0, 0.1, True),
    ],
)
def test_a_near_tie_is_generated(
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    best: float,
    lowest: float,
    lead: float,
    is_generated: bool,
) -> None:
    def hesitate(model: Any, rows: torch.Tensor, columns: torch.Tensor, **_: Any) -> torch.Tensor:
        logits = torch.full((len(rows), 384), lowest, dtype=dtype)
        logits[:, EOS] = best
        logits[:, 17] = best - lead
        return logits

    monkeypatch.setattr("locft.evaluation.generate.logits_at", hesitate)
    model = make_model(tiny_llama_config())
    with counted(model) as shapes:
        answers_of(model, tokenizer, ("Who",), guesses={"Who": ""})
    assert bool(shapes) == is_generated


def test_a_guess_after_which_the_prompt_reads_differently_is_left_out(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    codec = make_codec(tokenizer, "raw")
    # "London " ends in a token for the space, which "London Berlin" does not have.
    assert codec.continuation("London ", "Berlin") is None
    said = codec.continuation("London", "Berlin")
    assert said is not None
    assert codec.prompt_ids("London") + said == codec.prompt_ids("London Berlin")
    assert codec.continuation("London ", "") == ()
