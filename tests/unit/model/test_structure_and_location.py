"""Where tuning locations are; also the tiny models of nine families that test_split.py runs."""

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from conftest import SIZES as LLAMA_SIZES
from conftest import make_model, tiny_llama_config, tiny_phi3_config
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GraniteMoeHybridConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from locft.errors import LocationError, ModelError
from locft.model.location import parse_location, resolve_location
from locft.model.structure import find_layers

SIZES: dict[str, Any] = {**LLAMA_SIZES, "pad_token_id": 0}


def family_config(family: str) -> PreTrainedConfig:
    if family == "gpt2":
        return GPT2Config(
            vocab_size=384,
            n_positions=128,
            n_embd=32,
            n_layer=3,
            n_head=4,
            bos_token_id=1,
            eos_token_id=0,
        )
    if family == "gptj":  # whose layers return a tuple
        return GPTJConfig(
            vocab_size=384,
            n_positions=128,
            n_embd=32,
            n_layer=3,
            n_head=4,
            rotary_dim=8,
            bos_token_id=1,
            eos_token_id=0,
        )
    if family == "opt":
        return OPTConfig(
            vocab_size=384,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=0,
        )
    configs: dict[str, PreTrainedConfig] = {
        "llama": tiny_llama_config(),
        "qwen2": Qwen2Config(**SIZES),
        "qwen3": Qwen3Config(**SIZES, head_dim=8),
        # Windows shorter than the test texts, so that sliding attention really slides.
        "mistral": MistralConfig(**SIZES, sliding_window=8),
        "gemma3": Gemma3TextConfig(
            **SIZES,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "phi3": tiny_phi3_config(),
    }
    return configs[family]


QKVO = ["self_attn.k_proj.weight", "self_attn.o_proj.weight", "self_attn.q_proj.weight"]
QKVO += ["self_attn.v_proj.weight"]
QK_NORMS = ["self_attn.k_norm.weight", "self_attn.q_norm.weight"]
GATED = ["mlp.down_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"]
TWO_NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]
FOUR_NORMS = [*TWO_NORMS, "post_feedforward_layernorm.weight", "pre_feedforward_layernorm.weight"]
QKV_BIASES = ["self_attn.k_proj.bias", "self_attn.q_proj.bias", "self_attn.v_proj.bias"]
GPT2_ATTN = ["attn.c_attn.bias", "attn.c_attn.weight", "attn.c_proj.bias", "attn.c_proj.weight"]
GPT2_MLP = ["mlp.c_fc.bias", "mlp.c_fc.weight", "mlp.c_proj.bias", "mlp.c_proj.weight"]
GPTJ_ATTN = [f"attn.{p}_proj.weight" for p in ("k", "out", "q", "v")]
GPTJ_MLP = [f"mlp.{p}.{kind}" for p in ("fc_in", "fc_out") for kind in ("bias", "weight")]
OPT_ATTN = [f"self_attn.{p}_proj.{kind}" for p in ("k", "out", "q", "v") for kind in ("bias", "weight")]
OPT_MLP = ["fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight"]
OPT_NORMS = [
    f"{n}.{kind}" for n in ("self_attn_layer_norm", "final_layer_norm") for kind in ("bias", "weight")
]

# family: prefix of layer 1, then for each module the names below it and how many numbers they hold.
EXPECTED: dict[str, tuple[str, dict[str, tuple[list[str], int]]]] = {
    "llama": (
        "model.layers.1",
        {
            "mlp.down": (["mlp.down_proj.weight"], 32 * 64),
            "mlp.up": (["mlp.up_proj.weight"], 64 * 32),
            "mlp": (GATED, 3 * 32 * 64),
            "attn": (QKVO, 2 * 32 * 32 + 2 * 16 * 32),
            "entire": (QKVO + GATED + TWO_NORMS, 3072 + 6144 + 2 * 32),
        },
    ),
    "qwen2": (
        "model.layers.1",
        {
            "mlp.down": (["mlp.down_proj.weight"], 32 * 64),
            "mlp.up": (["mlp.up_proj.weight"], 64 * 32),
            "mlp": (GATED, 3 * 32 * 64),
            "attn": (QKVO + QKV_BIASES, 3072 + 32 + 16 + 16),
            "entire": (QKVO + QKV_BIASES + GATED + TWO_NORMS, 3072 + 64 + 6144 + 2 * 32),
        },
    ),
    "qwen3": (
        "model.layers.1",
        {
            "mlp.down": (["mlp.down_proj.weight"], 32 * 64),
            "mlp.up": (["mlp.up_proj.weight"], 64 * 32),
            "mlp": (GATED, 3 * 32 * 64),
            "attn": (QKVO + QK_NORMS, 3072 + 2 * 8),
            "entire": (QKVO + QK_NORMS + GATED + TWO_NORMS, 3072 + 16 + 6144 + 2 * 32),
        },
    ),
    "mistral": (
        "model.layers.1",
        {
            "mlp.down": (["mlp.down_proj.weight"], 32 * 64),
            "mlp.up": (["mlp.up_proj.weight"], 64 * 32),
            "mlp": (GATED, 3 * 32 * 64),
            "attn": (QKVO, 3072),
            "entire": (QKVO + GATED + TWO_NORMS, 3072 + 6144 + 2 * 32),
        },
    ),
    "gemma3": (
        "model.layers.1",
        {
            "mlp.down": (["mlp.down_proj.weight"], 32 * 64),
            "mlp.up": (["mlp.up_proj.weight"], 64 * 32),
            "mlp": (GATED, 3 * 32 * 64),
            "attn": (QKVO + QK_NORMS, 3072 + 2 * 8),
            "entire": (QKVO + QK_NORMS + GATED + FOUR_NORMS, 3072 + 16 + 6144 + 4 * 32),
        },
    ),
    "gpt2": (
        "transformer.h.1",
        {
            "mlp.down": (["mlp.c_proj.weight"], 128 * 32),
            "mlp.up": (["mlp.c_fc.weight"], 32 * 128),
            "mlp": (GPT2_MLP, 2 * 32 * 128 + 128 + 32),
            "attn": (GPT2_ATTN, 32 * 96 + 96 + 32 * 32 + 32),
            "entire": (
                [*GPT2_ATTN, *GPT2_MLP, "ln_1.bias", "ln_1.weight", "ln_2.bias", "ln_2.weight"],
                4224 + 8352 + 4 * 32,
            ),
        },
    ),
    "gptj": (
        "transformer.h.1",
        {
            "mlp.down": (["mlp.fc_out.weight"], 32 * 128),
            "mlp.up": (["mlp.fc_in.weight"], 128 * 32),
            "mlp": (GPTJ_MLP, 2 * 32 * 128 + 128 + 32),
            "attn": (GPTJ_ATTN, 4 * 32 * 32),
            "entire": ([*GPTJ_ATTN, *GPTJ_MLP, "ln_1.bias", "ln_1.weight"], 4096 + 8352 + 2 * 32),
        },
    ),
    "opt": (
        "model.decoder.layers.1",
        {
            "mlp.down": (["fc2.weight"], 32 * 64),
            "mlp.up": (["fc1.weight"], 64 * 32),
            "mlp": (OPT_MLP, 2 * 32 * 64 + 64 + 32),
            "attn": (OPT_ATTN, 4 * (32 * 32 + 32)),
            "entire": (OPT_ATTN + OPT_MLP + OPT_NORMS, 4224 + 4192 + 4 * 32),
        },
    ),
    "phi3": (
        "model.layers.1",
        {
            "mlp.down": (["mlp.down_proj.weight"], 32 * 64),
            "mlp": (["mlp.down_proj.weight", "mlp.gate_up_proj.weight"], 3 * 32 * 64),
            "mlp.up": (["mlp.gate_up_proj.weight"], 32 * 64),
            "attn": (["self_attn.o_proj.weight", "self_attn.qkv_proj.weight"], 32 * 32 + 64 * 32),
            "entire": (
                [
                    *("self_attn.o_proj.weight", "self_attn.qkv_proj.weight"),
                    *("mlp.down_proj.weight", "mlp.gate_up_proj.weight"),
                    *TWO_NORMS,
                ],
                3072 + 6144 + 2 * 32,
            ),
        },
    ),
}
FAMILIES = tuple(EXPECTED)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_names_exactly_its_parameters(family: str) -> None:
    model = make_model(family_config(family))
    prefix, modules = EXPECTED[family]
    for module, (names, num_parameters) in modules.items():
        written = "1" if module == "entire" else f"1.{module}"
        location = resolve_location(model, written)
        assert location.parameters == tuple(sorted(f"{prefix}.{name}" for name in names)), module
        assert location.num_parameters == num_parameters, module
        assert (location.name, location.layer, location.module) == (written, 1, module)


def test_the_output_projection_of_attention_is_no_mlp_down_projection() -> None:
    # GPT-2 calls both c_proj.
    location = resolve_location(make_model(family_config("gpt2")), "70%.mlp.down")
    assert location.parameters == ("transformer.h.2.mlp.c_proj.weight",)
    assert location.name == "2.mlp.down"


def test_of_a_fused_projection_up_is_the_second_half() -> None:
    location = resolve_location(make_model(family_config("phi3")), "1.mlp.up")
    [name] = location.parameters
    assert name == "model.layers.1.mlp.gate_up_proj.weight"
    assert location.parts == {name: (slice(64, 128),)}
    assert location.num_parameters == 64 * 32
    assert location.shapes == ((64, 32),)
    assert location.part_in_words == (
        "up (indices 64 to 127 of axis 0) of model.layers.1.mlp.gate_up_proj"
    )


def test_a_mixture_without_experts_has_an_mlp_like_any_other() -> None:
    config = GraniteMoeHybridConfig(
        **SIZES,
        num_local_experts=0,
        shared_intermediate_size=48,
        mamba_n_heads=4,
        mamba_d_head=16,
        layer_types=["full_attention"] * 3,
    )
    model = make_model(config)
    location = resolve_location(model, "1.mlp.up")
    [name] = location.parameters
    assert name == "model.layers.1.shared_mlp.input_linear.weight"
    assert location.parts == {name: (slice(48, 96),)}
    with pytest.raises(LocationError, match=r"no single 'mlp\.shared\.down'"):
        resolve_location(model, "1.mlp.shared.down")


def test_gate_and_up_that_cannot_be_told_apart_are_refused() -> None:
    model = make_model(family_config("phi3"))
    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.gate_up_proj = nn.Linear(32, 100)
    with pytest.raises(
        LocationError, match=r"gate and up cannot be told apart in a matrix of \[100, 32\]"
    ):
        resolve_location(model, "1.mlp.up")


def test_a_matrix_that_layers_share_is_no_location(tiny_model: PreTrainedModel) -> None:
    first, second = (tiny_model.get_submodule(f"model.layers.{index}.mlp") for index in (0, 1))
    second.down_proj = first.down_proj
    with pytest.raises(LocationError, match=r"layers\.1\.mlp\.down_proj\.weight is shared with another"):
        resolve_location(tiny_model, "1.mlp.down")
    assert resolve_location(tiny_model, "1.mlp.up").layer == 1


@pytest.mark.parametrize(
    ("module", "lacking"), [("attn", "self_attn"), ("mlp", "mlp"), ("mlp.down", "mlp")]
)
def test_a_layer_without_the_part_is_refused_with_what_it_holds(
    tiny_model: PreTrainedModel, module: str, lacking: str
) -> None:
    layer = tiny_model.get_submodule("model.layers.1")
    setattr(layer, "mixer", getattr(layer, lacking))  # noqa: B010 - a module under a new name
    delattr(layer, lacking)
    with pytest.raises(LocationError, match=rf"model\.layers\.1 has no single '{module}'.*mixer"):
        resolve_location(tiny_model, f"1.{module}")


def test_two_candidates_for_one_projection_are_refused(tiny_model: PreTrainedModel) -> None:
    mlp = tiny_model.get_submodule("model.layers.1.mlp")
    mlp.w2 = nn.Linear(2, 2)
    with pytest.raises(LocationError, match=r"mlp has no single 'mlp\.down'.*down_proj.* w2"):
        resolve_location(tiny_model, "1.mlp.down")


def test_a_down_projection_that_is_no_matrix_is_refused(tiny_model: PreTrainedModel) -> None:
    mlp = tiny_model.get_submodule("model.layers.1.mlp")
    mlp.down_proj = nn.LayerNorm(32)  # a weight of one dimension
    with pytest.raises(LocationError, match=r"model\.layers\.1\.mlp\.down_proj is no single matrix"):
        resolve_location(tiny_model, "1.mlp.down")


def test_the_layers_are_the_list_with_the_most_parameters(tiny_model: PreTrainedModel) -> None:
    tiny_model.get_decoder().adapters = nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])
    layers = find_layers(tiny_model)
    assert layers.prefix == "model.layers"
    assert len(layers) == 3


def test_a_list_inside_a_layer_is_not_taken_for_the_layers(tiny_model: PreTrainedModel) -> None:
    experts = nn.ModuleList([nn.Linear(300, 300) for _ in range(3)])
    tiny_model.get_submodule("model.layers.0.mlp").experts = experts
    assert find_layers(tiny_model).prefix == "model.layers"


def test_a_decoder_without_a_list_of_layers_is_refused(tiny_model: PreTrainedModel) -> None:
    decoder = tiny_model.get_decoder()
    decoder.layers = nn.Sequential(*decoder.layers)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM is refused.*no list of layers"):
        resolve_location(tiny_model, "1")


@pytest.mark.parametrize(
    ("share", "num_layers", "layer"),
    [
        ("70%", 30, 20),
        ("70%", 32, 22),
        ("25%", 28, 6),
        ("25%", 80, 19),
        ("100%", 30, 29),
        ("33.3%", 3, 0),  # a hair under a third
        ("33.4%", 3, 1),
        ("0.1%", 30, 0),
        ("70%", 1, 0),
        ("7%", 100, 6),  # in floats 0.07 * 100 is over 7
        ("28%", 25, 6),  # and 0.28 * 25, too
    ],
)
def test_a_share_of_the_depth_is_rounded_up_exactly(share: str, num_layers: int, layer: int) -> None:
    assert parse_location(f"{share}.mlp.down", num_layers) == (layer, "mlp.down")


@given(
    share=st.decimals(min_value="0.0001", max_value=100, places=4).filter(lambda share: share > 0),
    num_layers=st.integers(1, 200),
)
@example(share=Decimal(7), num_layers=100)
@settings(deadline=None)
def test_any_share_names_a_layer_that_begins_at_or_before_it(share: Decimal, num_layers: int) -> None:
    layer, module = parse_location(f"{share!s}%.attn", num_layers)
    assert module == "attn"
    assert 0 <= layer < num_layers
    # The smallest layer whose end is at or beyond the share: ceil(p N) - 1.
    depth = Fraction(share) / 100 * num_layers
    assert layer < depth <= layer + 1


@given(layer=st.integers(0, 120), num_layers=st.integers(1, 120))
@settings(deadline=None)
def test_an_index_is_taken_as_it_is_or_refused(layer: int, num_layers: int) -> None:
    if layer < num_layers:
        assert parse_location(str(layer), num_layers) == (layer, "entire")
    else:
        with pytest.raises(LocationError, match=rf"has {num_layers} layers, 0 to {num_layers - 1}$"):
            parse_location(str(layer), num_layers)


def test_white_space_around_a_name_does_not_count() -> None:
    assert parse_location(" 2.mlp.up\n", 3) == (2, "mlp.up")


@pytest.mark.parametrize("share", ["0%", "0.0%.mlp", "100.1%", "170%.mlp.down"])
def test_a_share_outside_the_depth_is_refused(share: str) -> None:
    with pytest.raises(LocationError, match="must be over 0% and at most 100%"):
        parse_location(share, 30)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "20.",
        "70%.",
        "-1",
        "-1.mlp.down",
        "+1",
        "mlp.down",
        "20%%",
        "20%%.mlp",
        "70 %.mlp",
        ".7%.mlp",
        "1e1%.mlp",
        "1/2%",
        "7_0%.mlp",
        "٣.mlp.down",
        "２.mlp.down",
        "20mlp.down",
        "20/mlp",
        "20.mlp\n.down",
    ],
)
def test_a_name_that_cannot_be_read_is_refused_with_what_is_expected(name: str) -> None:
    with pytest.raises(LocationError, match=r"cannot be read: expected .*20\.mlp\.down") as caught:
        parse_location(name, 80)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    "module", ["down", "%.mlp", "mlp.gate", "MLP.down", "mlp.down.weight", "mlp .down", ".mlp"]
)
def test_an_unknown_module_is_refused_by_name(module: str) -> None:
    for layer in ("2", "70%"):
        with pytest.raises(LocationError, match="has an unknown module") as caught:
            parse_location(f"{layer}.{module}", 3)
        assert repr(module) in str(caught.value)


@pytest.mark.parametrize("written", ["{}", "{}.mlp.down", "{}%"])
def test_a_number_of_thousands_of_digits_is_refused_like_any_other(written: str) -> None:
    # Python itself refuses to convert more than 4,300 digits.
    with pytest.raises(LocationError):
        parse_location(written.format("9" * 5000), 3)
