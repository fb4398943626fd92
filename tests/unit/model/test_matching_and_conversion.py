from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, tiny_llama_config, tiny_mixture_config
from safetensors.torch import load_file, save_file
from test_structure_and_location import family_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, core_model_loading
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from locft.checkpoint import read_checkpoint
from locft.errors import ModelError
from locft.model.load import load_model
from locft.model.matching import map_parameters, map_tensors
from locft.model.weights import View, WeightMap, to_tensor
from locft.tensorfile import TensorEntry, read_tensor

MLP = "model.layers.1.mlp"
DOWN = f"{MLP}.down_proj.weight"
GATE = f"{MLP}.gate_proj.weight"
UP = f"{MLP}.up_proj.weight"
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe")


def names_of(weights: WeightMap) -> dict[str, list[str]]:
    """What the checkpoint calls the tensors that hold each parameter."""
    return {name: sorted(block.positions) for block in weights.blocks for name in block.shapes}


def is_listed(weights: WeightMap) -> bool:
    """Whether any tensor's positions are listed one by one."""
    return any(
        isinstance(positions, Tensor)
        for block in weights.blocks
        for positions in block.positions.values()
    )


def save_converted(
    model: Any, folder: Path, conversions: Sequence[WeightTransform]
) -> dict[str, TensorEntry]:
    """Save a model as if it had been loaded from a checkpoint through these conversions."""
    model._weight_conversions = list(conversions)
    model.save_pretrained(folder)
    return read_checkpoint(folder)


def check_both_ways(
    model: PreTrainedModel, entries: dict[str, TensorEntry], parameters: Sequence[str]
) -> WeightMap:
    """Check that values go to the file, and from there to the model, without getting mixed up."""
    weights = map_parameters(model, entries, parameters)
    stored = weights.read()
    for name, value in stored.items():
        assert torch.equal(value, model.get_parameter(name))
    written = weights.to_file(stored)
    assert list(written) == sorted(written) == list(weights.tensors)
    for name, data in written.items():
        assert (data.dtype, data.shape) == (entries[name].dtype, entries[name].shape)
        assert data.data == read_tensor(entries[name])
    # Every element gets a number of its own.
    new = {
        name: torch.arange(value.numel()).view(value.shape) + 1000.0 * number
        for number, (name, value) in enumerate(stored.items())
    }
    tensors = {name: to_tensor(data) for name, data in weights.to_file(new).items()}
    again = weights.to_model(model, tensors)
    assert again.keys() == new.keys()
    for name, value in stored.items():
        assert torch.equal(again[name].to(value.dtype), new[name].to(value.dtype))
    return weights


def test_parameters_and_tensors_of_one_name_match(model_folder: Path) -> None:
    model = load_model(str(model_folder)).model
    entries = read_checkpoint(model_folder)
    names = [name for name, _ in model.named_parameters()]
    weights = check_both_ways(model, entries, names)
    assert names_of(weights) == {name: [name] for name in names}
    assert names_of(weights) == names_of(map_tensors(model, entries, names))
    assert not is_listed(weights)


def test_a_file_saved_from_the_base_class_lacks_its_prefix(tmp_path: Path) -> None:
    base: Any = make_model(family_config("gpt2")).base_model
    base.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    parameter, tensor = "transformer.h.1.mlp.c_proj.weight", "h.1.mlp.c_proj.weight"
    entries = read_checkpoint(tmp_path)
    assert parameter not in entries
    assert names_of(map_parameters(model, entries, [parameter])) == {parameter: [tensor]}
    assert names_of(map_tensors(model, entries, [tensor])) == {parameter: [tensor]}


def test_a_file_saved_with_the_prefix_fits_a_model_without_it(tmp_path: Path) -> None:
    model = make_model(family_config("gpt2"))
    base: Any = model.base_model
    model.save_pretrained(tmp_path)
    parameter, tensor = "h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.weight"
    entries = read_checkpoint(tmp_path)
    assert names_of(map_parameters(base, entries, [parameter])) == {parameter: [tensor]}
    assert names_of(map_tensors(base, entries, [tensor])) == {parameter: [tensor]}


def test_experts_saved_from_the_base_class_lack_its_prefix(tmp_path: Path) -> None:
    base: Any = make_model(tiny_mixture_config("qwen3_moe")).base_model
    base.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = check_both_ways(model, read_checkpoint(tmp_path), [f"{MLP}.experts.down_proj"])
    assert weights.tensors == tuple(f"layers.1.mlp.experts.{i}.down_proj.weight" for i in range(4))


def test_tied_embeddings_match_the_one_tensor_in_the_file(model_folder: Path) -> None:
    model = load_model(str(model_folder)).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    entries = read_checkpoint(model_folder)
    assert "lm_head.weight" not in entries
    tied = "model.embed_tokens.weight"
    assert names_of(map_parameters(model, entries, [tied])) == {tied: [tied]}
    assert names_of(map_tensors(model, entries, [tied])) == {tied: [tied]}
    with pytest.raises(ModelError, match=r"where its checkpoint holds lm_head\.weight"):
        map_parameters(model, entries, ["lm_head.weight"])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_values_are_compared_in_the_models_dtype(
    save_model: Callable[..., Path], stored: torch.dtype, asked: str
) -> None:
    folder = save_model(tiny_llama_config(), dtype=stored)
    model = load_model(str(folder), dtype=asked).model
    weights = map_parameters(model, read_checkpoint(folder), [DOWN])
    assert names_of(weights) == {DOWN: [DOWN]}
    assert weights.read()[DOWN].dtype == stored


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("value", f"what it holds for {DOWN} differs from what is in memory"),
        ("shape", f"its tensor '{DOWN}' is F32 (64, 32), not a float of (32, 64)"),
        ("dtype", f"its tensor '{DOWN}' is I32 (32, 64), not a float of (32, 64)"),
        ("name", f"it has no tensor '{DOWN}'"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, change: str, reason: str) -> None:
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
    with pytest.raises(ModelError) as caught:
        map_parameters(model, read_checkpoint(tmp_path), [DOWN])
    assert str(caught.value) == (
        f"LlamaForCausalLM is refused: a patch could not say where its checkpoint holds {DOWN}: {reason}"
    )


def test_a_tensor_without_parameter_is_refused_by_name(
    tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path)
    entries = read_checkpoint(tmp_path)
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM has no parameter for the tensor model\.norm\.bias"
    ):
        map_tensors(tiny_model, entries, [DOWN, "model.norm.bias"])


def test_a_second_copy_under_another_spelling_is_not_taken_for_the_first(
    tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    value = tiny_model.get_parameter(DOWN).detach()
    copy = DOWN.removeprefix("model.")
    save_file({DOWN: value, copy: value.clone()}, tmp_path / "model.safetensors")
    entries = read_checkpoint(tmp_path)
    assert map_tensors(tiny_model, entries, [DOWN]).tensors == (DOWN,)
    with pytest.raises(ModelError, match=rf"no parameter for the tensor {copy}"):
        map_tensors(tiny_model, entries, [copy])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_is_found_whole_in_its_file(
    family: str, dtype: torch.dtype, save_model: Callable[..., Path]
) -> None:
    folder = save_model(tiny_mixture_config(family), dtype=dtype)
    model = load_model(str(folder), dtype="float32").model
    entries = read_checkpoint(folder)
    assert {name for name, _ in model.named_parameters()} != entries.keys()
    weights = map_parameters(model, entries, [name for name, _ in model.named_parameters()])
    assert weights.tensors == tuple(sorted(entries))
    others = map_tensors(model, entries, entries)
    assert names_of(weights) == names_of(others)
    assert len(weights.blocks) == len(others.blocks)
    assert not is_listed(weights)
    check_both_ways(model, entries, [name for name, _ in model.named_parameters() if ".1." in name])


def test_experts_are_found_by_any_one_of_them(save_model: Callable[..., Path]) -> None:
    folder = save_model(tiny_mixture_config("mixtral"))
    model = load_model(str(folder)).model
    expert = "model.layers.1.block_sparse_moe.experts"
    weights = map_tensors(model, read_checkpoint(folder), [f"{expert}.2.w1.weight"])
    assert names_of(weights) == {
        f"{MLP}.experts.gate_up_proj": [
            f"{expert}.{i}.{w}.weight" for i in range(4) for w in ("w1", "w3")
        ]
    }
    new = torch.full((64, 32), 0.5)
    own = model.get_parameter(f"{MLP}.experts.gate_up_proj").detach()
    before = own.clone()
    [value] = weights.to_model(model, {f"{expert}.2.w1.weight": new}).values()
    assert torch.equal(value[2, :64], new)
    kept = torch.ones(own.shape, dtype=torch.bool)
    kept[2, :64] = False
    assert torch.equal(value[kept], before[kept])
    assert torch.equal(own, before)  # the model itself is as it was


FUSED = {
    "rows": WeightConverter(
        "mlp.fused.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], operations=[Chunk(0)]
    ),
    "columns": WeightConverter(
        "mlp.fused.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], operations=[Chunk(1)]
    ),
}


@pytest.mark.parametrize("fused", FUSED)
def test_a_tensor_that_several_parameters_share_is_changed_where_it_is_trained(
    fused: str, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    stored = save_converted(tiny_model, tmp_path, [FUSED[fused]])
    weights = check_both_ways(tiny_model, stored, [UP])
    assert names_of(weights) == {UP: [f"{MLP}.fused.weight"], GATE: [f"{MLP}.fused.weight"]}
    assert len(map_parameters(tiny_model, stored, [GATE, UP]).blocks) == 1
    assert is_listed(weights) == (fused == "columns")
    tiny_model.bfloat16()
    weights = map_parameters(tiny_model, stored, [UP])
    [data] = weights.to_file({UP: torch.full((64, 32), 0.5)}).values()
    first, second = to_tensor(data).chunk(2, dim=0 if fused == "rows" else 1)
    before = load_file(tmp_path / "model.safetensors")[f"{MLP}.fused.weight"]
    assert torch.equal(second, torch.full((64, 32), 0.5))
    # Not what bfloat16 made of them in memory.
    assert torch.equal(first, before.chunk(2, dim=0 if fused == "rows" else 1)[0])


class Changed(ConversionOps):
    """A conversion that is undone by any function of the tensor."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **_: Any,
    ) -> dict[str, Any]:
        [[tensor]] = input_dict.values()
        return {target_patterns[0]: self.change(tensor)}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def interleaved(tensor: Tensor) -> Tensor:
    return tensor.view(2, 16, 64).transpose(0, 1).reshape(32, 64)


def fails(_: Tensor) -> Tensor:
    raise RuntimeError("not implemented\nat all")


CONVERSIONS = {
    "renamed": (WeightRenaming("mlp.last.", "mlp.down_proj."), False),
    "transposed": (
        WeightConverter("mlp.last.weight", "mlp.down_proj.weight", operations=[Transpose(0, 1)]),
        False,
    ),
    "flipped": (
        WeightConverter(
            "mlp.last.weight", "mlp.down_proj.weight", operations=[Changed(lambda t: t.flip(0))]
        ),
        True,
    ),
    "interleaved": (
        WeightConverter("mlp.last.weight", "mlp.down_proj.weight", operations=[Changed(interleaved)]),
        True,
    ),
    "cut": (
        WeightConverter(
            ["mlp.a.weight", "mlp.b.weight"], "mlp.down_proj.weight", operations=[Concatenate(1)]
        ),
        False,
    ),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_elements_are_followed_through_any_conversion(
    conversion: str, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    converter, listed = CONVERSIONS[conversion]
    entries = save_converted(tiny_model, tmp_path, [converter])
    assert DOWN not in entries
    weights = check_both_ways(tiny_model, entries, [DOWN])
    assert names_of(weights) == names_of(map_tensors(tiny_model, entries, weights.tensors))
    assert is_listed(weights) == listed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensor: -tensor, "transformers computes the tensor"),
        (lambda tensor: tensor * 2, "transformers computes the tensor"),
        (lambda tensor: tensor.exp(), "transformers computes the tensor"),
        (lambda tensor: tensor[:16], "differs from what is in memory"),  # the rest is nowhere
        (lambda tensor: torch.cat([tensor[:16], tensor[:16]]), "differs from what is in memory"),
        (lambda tensor: torch.cat([tensor, tensor]), "it holds some elements twice"),
    ],
)
def test_a_conversion_that_does_not_just_move_elements_is_refused(
    change: Callable[[Tensor], Tensor], reason: str, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    tiny_model.get_parameter(DOWN)[16:] = 0  # what is not in the file must not pass for zero
    converter = WeightConverter("mlp.last.weight", "mlp.down_proj.weight", operations=[Changed(change)])
    entries = save_converted(tiny_model, tmp_path, [converter])
    with pytest.raises(ModelError, match=rf"holds {DOWN}: .*{reason}"):
        map_parameters(tiny_model, entries, [DOWN])
    # What is not converted can be edited nevertheless.
    assert map_parameters(tiny_model, entries, [UP]).tensors == (UP,)


class Paired(ConversionOps):
    """A conversion that wants two parameters at once, and keeps them apart."""

    supports_many_to_many = True

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **_: Any,
    ) -> dict[str, Any]:
        [first], [second] = (input_dict[pattern] for pattern in source_patterns)
        return dict(zip(target_patterns, (first.T, second.T), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def test_a_conversion_gets_all_parameters_that_it_wants(
    tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    names = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    entries = save_converted(
        tiny_model,
        tmp_path,
        [WeightConverter(["mlp.a.weight", "mlp.b.weight"], names, operations=[Paired()])],
    )
    weights = check_both_ways(tiny_model, entries, [UP])
    assert names_of(weights) == {UP: [f"{MLP}.b.weight"]}


def test_parameters_that_are_not_converted_need_no_positions(
    model_folder: Path, save_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("locft.model.matching.find_positions", unwanted)
    for folder in (model_folder, save_model(tiny_mixture_config("granitemoe"))):
        model, entries = load_model(str(folder)).model, read_checkpoint(folder)
        assert map_tensors(model, entries, entries).tensors == tuple(sorted(entries))


@pytest.mark.parametrize("cause", ["it fails", "it is not there"])
def test_without_a_way_back_only_plain_tensors_are_found(
    cause: str, save_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tiny_mixture_config("qwen3_moe"))
    model: Any = load_model(str(folder)).model
    if cause == "it fails":
        model._weight_conversions.append(
            WeightConverter("mlp.last.weight", "mlp.gate.weight", operations=[Changed(fails)])
        )
    else:
        monkeypatch.delattr(core_model_loading, "revert_weight_conversion")
    entries = read_checkpoint(folder)
    plain = f"{MLP}.gate.weight"
    assert names_of(map_parameters(model, entries, [plain])) == {plain: [plain]}
    with pytest.raises(
        ModelError, match=r"it has no tensor 'model\.layers\.1\.mlp\.experts\.down_proj'"
    ):
        map_parameters(model, entries, [f"{MLP}.experts.down_proj"])
    with pytest.raises(ModelError, match=r"no parameter for the tensor .*experts\.0\.down_proj"):
        map_tensors(model, entries, [f"{MLP}.experts.0.down_proj.weight"])


def test_a_file_may_hold_one_layer_converted_and_another_as_it_is(
    save_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = load_model(str(save_model(tiny_mixture_config("qwen3_moe")))).model
    fused = "model.layers.0.mlp.experts.down_proj"
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for expert in range(4):
        del tensors[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"]
    save_file(
        tensors | {fused: model.get_parameter(fused).detach().clone()}, tmp_path / "model.safetensors"
    )
    entries = read_checkpoint(tmp_path)
    weights = check_both_ways(model, entries, [fused, f"{MLP}.experts.down_proj"])
    assert weights.tensors == (
        fused,
        *(f"{MLP}.experts.{expert}.down_proj.weight" for expert in range(4)),
    )
    assert names_of(map_tensors(model, entries, [fused])) == {fused: [fused]}


def test_positions_without_gaps_are_told_by_their_spacing(save_model: Callable[..., Path]) -> None:
    folder = save_model(tiny_mixture_config("qwen3_moe"))
    model = load_model(str(folder)).model
    [block] = map_parameters(model, read_checkpoint(folder), [f"{MLP}.experts.gate_up_proj"]).blocks
    assert block.positions[f"{MLP}.experts.3.up_proj.weight"] == View((16, 32), (32, 1), 3 * 1024 + 512)
