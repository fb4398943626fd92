import pytest
import torch
from conftest import make_model, tiny_llama_config, tiny_mixture_config, tiny_phi3_config
from transformers import GPT2Config, PreTrainedConfig, PreTrainedModel

from locft.model import moments as moments_module
from locft.model.location import resolve_location
from locft.model.moments import InputMoment, input_axis, measure_moments
from locft.model.sampling import sample_sequences
from locft.model.split import split_model

TRANSPOSED = GPT2Config(vocab_size=384, n_embd=32, n_layer=3, n_head=4)
# Of several lengths, and with common beginnings.
SEQUENCES = (
    (5, 6, 7, 8),
    (5, 6, 9, 10),
    (11, 12),
    (5, 6, 7, 8, 13, 14, 15),
    (20, 21, 22, 23),
    (30, 31),
    (5, 6, 7, 8),
)


def inputs_by_hand(model: PreTrainedModel, name: str) -> torch.Tensor:
    """Run each sequence by itself, and collect what enters a module."""
    met: list[torch.Tensor] = []
    module = model.get_submodule(name.rpartition(".")[0])
    handle = module.register_forward_pre_hook(lambda _, args: met.append(args[0][0]))
    with torch.no_grad():
        for sequence in SEQUENCES:
            model(input_ids=torch.tensor([sequence]))
    handle.remove()
    return torch.cat(met)


def measure(model: PreTrainedModel, location: str) -> dict[str, InputMoment]:
    found = resolve_location(model, location)
    return measure_moments(split_model(model, found.layer), found.parameters, SEQUENCES)


@pytest.mark.parametrize("location", ["0.mlp", "1.attn", "1", "2.mlp.down", "2"])
def test_a_moment_is_the_mean_of_outer_products_over_all_tokens(location: str) -> None:
    model = make_model(tiny_llama_config())
    found = measure(model, location)
    matrices = {
        name for name in resolve_location(model, location).parameters if not name.endswith("norm.weight")
    }
    assert found.keys() == matrices
    for name, moment in found.items():
        rows = inputs_by_hand(model, name)
        assert moment.num_tokens == len(rows) == sum(map(len, SEQUENCES))
        torch.testing.assert_close(moment.matrix, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [tiny_phi3_config(), TRANSPOSED])
@pytest.mark.parametrize("location", ["1.mlp.up", "2.mlp.down"])
def test_fused_and_transposed_matrices_have_moments_of_their_inputs(
    config: PreTrainedConfig, location: str
) -> None:
    model = make_model(config)
    for name, moment in measure(model, location).items():
        rows = inputs_by_hand(model, name)
        torch.testing.assert_close(moment.matrix, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
        axis = input_axis(model, name)
        assert axis is not None
        assert model.get_parameter(name).shape[axis] == len(moment.matrix)


def test_the_axis_of_the_input_follows_the_module_even_of_a_square_matrix() -> None:
    gpt2 = make_model(GPT2Config(vocab_size=384, n_embd=32, n_layer=1, n_head=4, n_inner=32))
    llama = make_model(tiny_llama_config(intermediate_size=32))
    assert input_axis(gpt2, "transformer.h.0.mlp.c_proj.weight") == 0
    assert input_axis(llama, "model.layers.0.mlp.down_proj.weight") == 1
    assert input_axis(llama, "model.layers.0.input_layernorm.weight") is None
    assert input_axis(gpt2, "transformer.h.0.mlp.c_proj.bias") is None


@pytest.mark.parametrize("tokens_per_pass", [1, 5, 8])
def test_moments_do_not_depend_on_how_many_sequences_run_at_a_time(
    tokens_per_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tiny_llama_config())
    whole = measure(model, "1.mlp")
    monkeypatch.setattr(moments_module, "_TOKENS_PER_PASS", tokens_per_pass)
    pieces = measure(model, "1.mlp")
    for name, moment in whole.items():
        assert pieces[name].num_tokens == moment.num_tokens
        torch.testing.assert_close(pieces[name].matrix, moment.matrix, rtol=1e-5, atol=1e-6)


def test_matrices_that_receive_the_same_share_a_moment() -> None:
    found = measure(make_model(tiny_llama_config()), "1.attn")
    query, key, value, output = (
        found[f"model.layers.1.self_attn.{part}_proj.weight"] for part in ("q", "k", "v", "o")
    )
    assert query is key is value
    assert output is not query


def test_stacked_experts_have_no_moment() -> None:
    model = make_model(tiny_mixture_config("qwen2_moe"))
    assert not measure(model, "1.mlp.experts.down")
    assert len(measure(model, "1.mlp.shared.down")) == 1


def test_sampled_texts_follow_from_the_seed_and_leave_the_model_and_the_dice_alone() -> None:
    model = make_model(tiny_llama_config())
    own = model.generation_config
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = sample_sequences(model, [(3,), (4,)], 12, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert model.generation_config is own
    assert sample_sequences(model, [(3,), (4,)], 12, seed=1) == first
    assert sample_sequences(model, [(3,), (4,)], 12, seed=2) != first
    assert [(len(row), row[0]) for row in first] == [(12, 3), (12, 4)]


def test_a_sampled_text_goes_on_after_an_end() -> None:
    model = make_model(tiny_llama_config())
    with torch.no_grad():
        model.get_parameter(
            "model.embed_tokens.weight"
        ).zero_()  # so that every token is as likely as any other
    rows = sample_sequences(model, [(3,)] * 40, 100, seed=0)
    assert all(len(row) == 100 for row in rows)
    assert any(0 in row[:-1] for row in rows)  # the end of a sequence
