from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, tiny_llama_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_structure_and_location import family_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from locft.checkpoint import read_checkpoint
from locft.errors import ModelError
from locft.model.load import load_model
from locft.model.weights import match_parameters, match_tensors, swapped_in, to_data, to_tensor
from locft.tensorfile import TensorData, read_tensor

DOWN = "model.layers.1.mlp.down_proj.weight"
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def test_parameters_and_tensors_of_one_name_match(model_folder: Path) -> None:
    model = load_model(str(model_folder)).model
    entries = read_checkpoint(model_folder)
    names = [name for name, _ in model.named_parameters()]
    assert match_tensors(model, entries, names) == {name: name for name in names}
    assert match_parameters(model, names) == {name: name for name in names}


def test_a_file_saved_from_the_base_class_lacks_its_prefix(tmp_path: Path) -> None:
    base: Any = make_model(family_config("gpt2")).base_model
    base.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    parameter, tensor = "transformer.h.1.mlp.c_proj.weight", "h.1.mlp.c_proj.weight"
    entries = read_checkpoint(tmp_path)
    assert parameter not in entries
    assert match_tensors(model, entries, [parameter]) == {parameter: tensor}
    assert match_parameters(model, [tensor]) == {tensor: parameter}


def test_a_file_saved_with_the_prefix_fits_a_model_without_it(tmp_path: Path) -> None:
    model = make_model(family_config("gpt2"))
    base: Any = model.base_model
    model.save_pretrained(tmp_path)
    parameter, tensor = "h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.weight"
    assert match_tensors(base, read_checkpoint(tmp_path), [parameter]) == {parameter: tensor}


def test_tied_embeddings_match_the_one_tensor_in_the_file(model_folder: Path) -> None:
    model = load_model(str(model_folder)).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    entries = read_checkpoint(model_folder)
    assert "lm_head.weight" not in entries
    tied = "model.embed_tokens.weight"
    assert match_tensors(model, entries, [tied]) == {tied: tied}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_values_are_compared_in_the_models_dtype(
    save_model: Callable[..., Path], stored: torch.dtype, asked: str
) -> None:
    folder = save_model(tiny_llama_config(), dtype=stored)
    model = load_model(str(folder), dtype=asked).model
    assert match_tensors(model, read_checkpoint(folder), [DOWN]) == {DOWN: DOWN}


@pytest.mark.parametrize("change", ["value", "shape", "dtype", "name"])
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, change: str) -> None:
    model = make_model(tiny_llama_config())
    value = model.get_parameter(DOWN).detach().clone()
    name = DOWN
    if change == "value":
        value[-1, -1] += 1e-3
    elif change == "shape":
        value = value.T.contiguous()
    elif change == "dtype":
        value = torch.zeros_like(value, dtype=torch.int32)
        with torch.no_grad():
            model.get_parameter(DOWN).zero_()
    else:
        name = "model.layers.1.mlp.down.weight"
    save_file({name: value}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"does not hold {DOWN} as one plain tensor"):
        match_tensors(model, read_checkpoint(tmp_path), [DOWN])


def test_a_tensor_without_parameter_is_refused_by_name(tiny_model: PreTrainedModel) -> None:
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM has no parameter for the tensor model\.norm\.bias"
    ):
        match_parameters(tiny_model, [DOWN, "model.norm.bias"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_those_that_safetensors_writes(tmp_path: Path, dtype: str) -> None:
    value = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0)) * 100
    save_file({"a": value.to(DTYPES[dtype])}, tmp_path / "model.safetensors")
    entry = read_checkpoint(tmp_path)["a"]
    data = to_data(value, dtype)
    assert data == TensorData(entry.dtype, entry.shape, read_tensor(entry))
    assert torch.equal(to_tensor(data), value.to(DTYPES[dtype]))


@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=12),
    dtype=st.sampled_from(list(DTYPES)),
)
@settings(deadline=None)
def test_a_round_trip_only_rounds_and_does_so_once(values: list[float], dtype: str) -> None:
    value = torch.tensor(values)
    once = to_tensor(to_data(value, dtype))
    assert torch.equal(once, value.to(DTYPES[dtype]))
    assert torch.equal(to_tensor(to_data(once, dtype)), once)
    assert torch.equal(to_tensor(to_data(once, "F32")).to(DTYPES[dtype]), once)


def test_a_view_is_written_in_row_major_order() -> None:
    value = torch.arange(6.0).view(2, 3)
    assert to_data(value.T, "F32").data == value.T.contiguous().numpy().tobytes()
    assert torch.equal(to_tensor(to_data(value[:, 1], "BF16")), torch.tensor([1.0, 4.0]).bfloat16())


def test_a_scalar_keeps_its_shape() -> None:
    data = to_data(torch.tensor(1.5), "BF16")
    assert data.shape == ()
    assert to_tensor(data).item() == 1.5


def test_a_tensor_read_from_bytes_can_be_written_to() -> None:
    data = to_data(torch.zeros(2), "F32")
    to_tensor(data).add_(1)
    assert torch.equal(to_tensor(data), torch.zeros(2))


@pytest.mark.parametrize("fails", [False, True])
def test_swapped_values_hold_in_the_body_and_are_gone_after_it(
    tiny_model: PreTrainedModel, fails: bool
) -> None:
    norm = "model.norm.weight"
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    values = {DOWN: torch.full((32, 64), 0.5), norm: torch.full((32,), 2.0)}
    try:
        with swapped_in(tiny_model, values):
            inside = tiny_model.state_dict()
            assert torch.equal(inside[DOWN], values[DOWN])
            assert torch.equal(inside[norm], values[norm])
            assert all(torch.equal(inside[name], before[name]) for name in before.keys() - values.keys())
            if fails:
                raise RuntimeError("the body fails")
    except RuntimeError:
        assert fails
    after = tiny_model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_swapped_values_take_the_models_dtype() -> None:
    model = make_model(tiny_llama_config()).bfloat16()
    third = torch.full((32, 64), 1 / 3)
    with swapped_in(model, {DOWN: third}):
        assert torch.equal(model.get_parameter(DOWN), third.bfloat16())


def test_a_value_of_another_shape_leaves_the_model_as_it_was(tiny_model: PreTrainedModel) -> None:
    norm = "model.norm.weight"
    before = tiny_model.get_parameter(norm).clone()
    values = {norm: torch.zeros(32), DOWN: torch.zeros(3, 3)}
    with pytest.raises(RuntimeError), swapped_in(tiny_model, values):
        pass
    assert torch.equal(tiny_model.get_parameter(norm), before)
