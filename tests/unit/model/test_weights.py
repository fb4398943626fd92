from pathlib import Path

import pytest
import torch
from conftest import make_model, tiny_llama_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import PreTrainedModel

from locft.checkpoint import read_checkpoint
from locft.model.weights import swapped_in, to_data, to_tensor
from locft.tensorfile import TensorData, read_tensor

DOWN = "model.layers.1.mlp.down_proj.weight"
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


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
