import copy
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, tiny_llama_config
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.pytorch_utils import Conv1D

from locft.checkpoint import read_checkpoint
from locft.errors import ModelError, PatchError
from locft.model.resolve import CheckpointFolder
from locft.model.weights import swapped_in, to_data, to_tensor
from locft.patch.format import Patch, PatchTensor
from locft.patch.lora import (
    Factors,
    LinearChange,
    adapted,
    adapter_config,
    cut,
    factorise,
    find_changes,
    largest_rank,
    num_bytes,
    rank_ladder,
    relative_error,
    vllm_rank,
    write_adapter,
)
from locft.patch.manifest import PatchLocation, PatchManifest, PatchModel
from locft.patch.weights import patched_values
from locft.tensorfile import TensorData, hash_tensor, read_tensor

IDS = torch.tensor([[5, 17, 130, 260, 7, 8], [300, 2, 9, 41, 77, 12]])
BASE = CheckpointFolder(name="some/model", folder=Path("/cache/some"), revision="abc")
GPT2 = GPT2Config(
    vocab_size=384, n_positions=128, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=0
)
QWEN2 = Qwen2Config(
    vocab_size=384,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=0,
)
LLAMA_MLP = tuple(f"model.layers.1.mlp.{name}_proj.weight" for name in ("down", "gate", "up"))
# Configuration, dtype of the checkpoint, and what is changed.
CASES: dict[str, tuple[PreTrainedConfig, torch.dtype, tuple[str, ...]]] = {
    "tied llama": (tiny_llama_config(), torch.float32, LLAMA_MLP),
    "untied llama": (tiny_llama_config(tie_word_embeddings=False), torch.float32, LLAMA_MLP[:1]),
    "gpt2": (
        GPT2,
        torch.float32,
        ("transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_fc.weight"),
    ),
    "qwen2": (QWEN2, torch.float32, ("model.layers.1.self_attn.o_proj.weight",)),
    "bfloat16": (tiny_llama_config(), torch.bfloat16, LLAMA_MLP),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def change_of(delta: Tensor, dtype: str = "F32") -> LinearChange:
    size = {"F32": 4, "BF16": 2, "F16": 2}[dtype]
    return LinearChange(
        module="layer",
        delta=delta,
        dtype=dtype,
        num_bytes=size * delta.numel(),
        is_transposed=False,
    )


def patch_of(folder: Path, names: Sequence[str], rank: int, location: str = "1.mlp") -> Patch:
    """Change some matrices of a checkpoint by a product of a rank."""
    entries = read_checkpoint(folder)
    tensors: dict[str, PatchTensor] = {}
    for seed, name in enumerate(names):
        entry = entries[name]
        old = read_tensor(entry)
        rows, columns = entry.shape
        delta = 0.02 * random(rows, rank, seed=seed) @ random(rank, columns, seed=seed + 100)
        before = to_tensor(TensorData(entry.dtype, entry.shape, old))
        new = to_data(before.double() + delta, entry.dtype)
        tensors[name] = PatchTensor(
            dtype=new.dtype,
            shape=new.shape,
            data=new.data,
            old_sha256=hash_tensor(entry.dtype, entry.shape, old),
            new_sha256=hash_tensor(new.dtype, new.shape, new.data),
        )
    return Patch(tensors=tensors, manifest=manifest(location))


def manifest(location: str) -> PatchManifest:
    return PatchManifest(
        locft_version="0.1.0",
        model=PatchModel(id="some/model", revision=None),
        location=PatchLocation(name=location, layer=1, module="mlp", num_parameters=1),
        dtype="F32",
        settings={},
        num_edits=1,
        edits_sha256="a" * 64,
    )


def load(folder: Path) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.requires_grad_(False)
    return model.eval()  # type: ignore[no-any-return]


def load_with_peft(model: PreTrainedModel, adapter: Path, **options: Any) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        # PEFT reads a property of transformers that is on its way out.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return PeftModel.from_pretrained(model, adapter, **options).eval()


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


def exported(
    folder: Path, patch: Patch, rank: int | None, output: Path
) -> tuple[tuple[LinearChange, ...], list[Factors]]:
    """Write an adapter of a rank, or of the largest one."""
    model = load(folder)
    changes = find_changes(model, folder, patch, patched_values(model, folder, patch))
    rank = largest_rank(changes) if rank is None else rank
    factors = [cut(factorise(change, rank), rank) for change in changes]
    output.mkdir()
    write_adapter(output, factors, BASE)
    return changes, factors


@pytest.mark.parametrize("case", CASES)
def test_peft_with_the_adapter_is_the_patched_model_where_the_rank_suffices(
    case: str, save_model: Callable[..., Path], tmp_path: Path
) -> None:
    config, dtype, names = CASES[case]
    folder = save_model(config, dtype)
    patch = patch_of(folder, names, rank=3)
    changes, factors = exported(folder, patch, None, tmp_path / "adapter")
    # Rounding to bfloat16 gives the change of any rank some of every other, too.
    exact = dtype == torch.float32
    assert relative_error(changes, factors) < (1e-6 if exact else 0.1)
    model = load(folder)
    assert model.dtype == dtype
    base = logits_of(model)
    with swapped_in(model, patched_values(model, folder, patch)):
        wanted = logits_of(model)
    moved = (wanted - base).abs().max().item()
    served = logits_of(load_with_peft(model, tmp_path / "adapter"))
    assert moved > 0.01
    assert (served - wanted).abs().max().item() < moved * (1e-4 if exact else 0.2)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_low_rank_is_measured_as_peft_serves_it(
    case: str, rank: int, save_model: Callable[..., Path], tmp_path: Path
) -> None:
    config, dtype, names = CASES[case]
    folder = save_model(config, dtype)
    _, factors = exported(folder, patch_of(folder, names, rank=3), rank, tmp_path / "adapter")
    model = load(folder)
    base = logits_of(model)
    with adapted(model, factors):
        ours = logits_of(model)
    torch.testing.assert_close(logits_of(model), base, rtol=0, atol=0)
    served = load_with_peft(model, tmp_path / "adapter", autocast_adapter_dtype=False)
    assert (ours - base).abs().max().item() > 0.01
    torch.testing.assert_close(logits_of(served), ours, rtol=0, atol=1e-6)


def test_the_product_is_added_in_the_models_dtype_and_never_to_the_weight(tmp_path: Path) -> None:
    model: Any = make_model(tiny_llama_config())
    model.to(torch.bfloat16)
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    change = replace(change_of(random(32, 64), "F32"), module="model.layers.1.mlp.down_proj")
    factors = cut(factorise(change, 4), 4)
    x = random(3, 64, seed=1).to(torch.bfloat16)
    before = layer(x)
    a, b = factors.a.to(torch.bfloat16), factors.b.to(torch.bfloat16)
    with adapted(model, [factors]):
        assert torch.equal(layer(x), before + (x @ a.T) @ b.T)
    assert torch.equal(layer(x), before)


def test_an_adapter_is_taken_off_again_whatever_happens(tiny_model: PreTrainedModel) -> None:
    module = "model.layers.1.mlp.down_proj"
    factors = cut(factorise(replace(change_of(random(32, 64)), module=module), 2), 2)
    base = logits_of(tiny_model)

    def ask_and_stop() -> None:
        with adapted(tiny_model, [factors]):
            assert not torch.equal(logits_of(tiny_model), base)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask_and_stop()
    assert torch.equal(logits_of(tiny_model), base)
    # A module that is not there: those before it are freed, too.
    with pytest.raises(AttributeError), adapted(tiny_model, [factors, replace(factors, module="no")]):
        raise AssertionError
    assert torch.equal(logits_of(tiny_model), base)


def test_a_layer_whose_number_ends_alike_is_left_alone(
    save_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_model(tiny_llama_config(num_hidden_layers=13))
    name = "model.layers.2.mlp.down_proj"
    _, factors = exported(folder, patch_of(folder, [f"{name}.weight"], rank=2), 2, tmp_path / "adapter")
    model = load(folder)
    with adapted(model, factors):
        ours = logits_of(model)
    served = load_with_peft(model, tmp_path / "adapter")
    with_adapter = [key for key, _ in served.named_parameters() if "lora_" in key]
    assert with_adapter == [
        f"base_model.model.{name}.lora_A.default.weight",
        f"base_model.model.{name}.lora_B.default.weight",
    ]
    torch.testing.assert_close(logits_of(served), ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_is_what_vllm_takes(
    dtype: torch.dtype, save_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_model(tiny_llama_config(), dtype)
    _, factors = exported(folder, patch_of(folder, LLAMA_MLP, rank=3), 5, tmp_path / "adapter")
    files = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight": (5, 64),
        "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight": (32, 5),
        "base_model.model.model.layers.1.mlp.gate_proj.lora_A.weight": (5, 32),
        "base_model.model.model.layers.1.mlp.gate_proj.lora_B.weight": (64, 5),
        "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight": (5, 32),
        "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight": (64, 5),
    }
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert num_bytes(factors) == sum(tensor.nbytes for tensor in tensors.values())
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) == {
        "base_model_name_or_path": "some/model",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 5,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 5,
        "revision": "abc",
        "target_modules": [name.removesuffix(".weight") for name in LLAMA_MLP],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def test_conv1d_is_told_to_peft_and_a_folder_is_named_by_its_path() -> None:
    factors = replace(cut(factorise(change_of(random(4, 6)), 1), 1), is_transposed=True)
    local = CheckpointFolder(name="demo", folder=Path("/cache/demo"))
    config = adapter_config([factors], local)
    assert config["fan_in_fan_out"] is True
    assert (config["base_model_name_or_path"], config["revision"]) == ("/cache/demo", None)


def test_a_file_without_the_base_models_prefix_is_the_same_layer(
    save_model: Callable[..., Path], tmp_path: Path
) -> None:
    whole = save_model(GPT2)
    model: Any = load(whole)
    model.transformer.save_pretrained(whole)
    patch = patch_of(whole, ["h.1.mlp.c_proj.weight"], rank=2)
    [change], _ = exported(whole, patch, 2, tmp_path / "adapter")
    assert change.module == "transformer.h.1.mlp.c_proj"
    assert change.is_transposed
    assert tuple(change.delta.shape) == (32, 128)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9)])
def test_the_factors_are_the_best_of_their_rank(shape: tuple[int, int]) -> None:
    delta = random(*shape)
    change = change_of(delta)
    values = torch.linalg.svdvals(delta)
    whole = factorise(change, min(shape))
    for rank in range(1, min(shape) + 1):
        factors = factorise(change, rank)
        assert (factors.rank, factors.a.shape, factors.b.shape) == (
            rank,
            (rank, shape[1]),
            (shape[0], rank),
        )
        rest = values[rank:].square().sum().sqrt() / torch.linalg.vector_norm(delta)
        assert relative_error([change], [factors]) == pytest.approx(rest.item(), abs=1e-9)
        torch.testing.assert_close(factors.a, whole.a[:rank])
        torch.testing.assert_close(factors.b, whole.b[:, :rank])


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_singular_values_are_split_evenly_and_signs_are_fixed(shape: tuple[int, int]) -> None:
    factors = factorise(change_of(random(*shape)), 8)
    roots = torch.linalg.svdvals(random(*shape))[:8].sqrt()
    torch.testing.assert_close(torch.linalg.vector_norm(factors.a, dim=1), roots)
    torch.testing.assert_close(torch.linalg.vector_norm(factors.b, dim=0), roots)
    short = factors.b if shape[0] < shape[1] else factors.a.T
    for column in short.T:
        assert column[column.abs().argmax()] > 0


def test_a_change_that_is_nothing_gives_an_adapter_that_is_nothing() -> None:
    change = change_of(torch.zeros(4, 6, dtype=torch.float64))
    factors = cut(factorise(change, 2), 2)
    assert not (factors.b @ factors.a).any()
    assert relative_error([change], [factors]) == 0.0


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_what_is_measured_is_rounded_as_it_is_saved(dtype: str, torch_dtype: torch.dtype) -> None:
    change = change_of(random(12, 20), dtype)
    exact = factorise(change, 3)
    rounded = cut(exact, 3)
    assert torch.equal(rounded.a, exact.a.to(torch_dtype))
    assert torch.equal(rounded.b, exact.b.to(torch_dtype))
    assert relative_error([change], [rounded]) > relative_error([change], [exact])
    assert num_bytes([rounded]) == 3 * (12 + 20) * 2


def test_a_rank_beyond_a_matrixs_own_is_filled_up_with_zeros() -> None:
    change = change_of(random(3, 20))
    whole = factorise(change, 7)
    assert whole.rank == 3
    factors = cut(whole, 7)
    assert (factors.a.shape, factors.b.shape) == ((7, 20), (3, 7))
    assert not factors.a[3:].any()
    assert not factors.b[:, 3:].any()
    assert relative_error([change], [factors]) < 1e-6


def test_the_error_is_that_of_all_matrices_together() -> None:
    changes = [
        change_of(torch.tensor([[3.0, 0.0], [0.0, 0.0]]).double()),
        change_of(4 * torch.eye(2).double()),
    ]
    factors = [cut(factorise(change, 1), 1) for change in changes]
    assert relative_error(changes, factors) == pytest.approx(4 / (9 + 32) ** 0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("shapes", "largest"),
    [
        ([(4, 4)], 2),  # exactly as large as the matrix
        ([(576, 1536)], 418),
        ([(1, 8)], 0),
        ([(32, 64), (64, 32), (1, 32)], 18),
        ([(4096, 4096)], 512),
        ([(1024, 1024)], 512),
        ([(1024, 1022)], 511),
    ],
)
def test_an_adapter_is_never_larger_than_its_matrices_nor_than_vllm_serves(
    shapes: list[tuple[int, int]], largest: int
) -> None:
    changes = [change_of(torch.zeros(1, dtype=torch.float64).expand(*shape)) for shape in shapes]
    assert largest_rank(changes) == largest


def test_bytes_count_and_not_numbers() -> None:
    # 10 numbers in float32 at 7 per rank, and 100 in bfloat16 at 20.
    changes = [change_of(random(2, 5), "F32"), change_of(random(10, 10), "BF16")]
    assert largest_rank(changes) == (40 + 200) // (28 + 40)


@pytest.mark.parametrize(
    ("largest", "ladder"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (418, (1, 2, 4, 8, 16, 32, 64, 128, 256, 418)),
        (512, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)),
    ],
)
def test_the_ladder_doubles_up_to_the_largest_rank(largest: int, ladder: tuple[int, ...]) -> None:
    assert rank_ladder(largest) == ladder


@pytest.mark.parametrize(
    ("rank", "allowed"),
    [(1, 1), (2, 8), (8, 8), (9, 16), (128, 128), (257, 320), (321, 512), (512, 512)],
)
def test_vllm_is_told_the_next_rank_that_it_takes(rank: int, allowed: int) -> None:
    assert vllm_rank(rank) == allowed


MIXTRAL = MixtralConfig(
    vocab_size=384,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
)


class Squared(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) ** 2


def refused(model: PreTrainedModel, *parameters: str, stored_as: dict[str, str] | None = None) -> str:
    """Return why the change of some parameters is refused, before their values are looked at."""
    tensor = PatchTensor(dtype="F32", shape=(1,), data=bytes(4), old_sha256="", new_sha256="")
    stored_as = stored_as or {}
    patch = Patch(
        tensors={stored_as.get(name, name): tensor for name in parameters}, manifest=manifest("1")
    )
    values = {name: torch.zeros(1) for name in parameters}
    with pytest.raises(PatchError) as caught:
        find_changes(model, Path("no such folder"), patch, values)
    return str(caught.value)


def test_what_is_no_linear_layers_weight_is_refused_by_name(tiny_model: PreTrainedModel) -> None:
    layer = "model.layers.1"
    norms = (f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight")
    said = refused(tiny_model, f"{layer}.mlp.down_proj.weight", *reversed(norms))
    assert said == (
        f"location 1: {norms[0]} cannot be put in a LoRA adapter: it belongs to a LlamaRMSNorm, which "
        f"is no linear layer (nor can {norms[1]}); export with --full"
    )
    assert "it belongs to a Embedding" in refused(tiny_model, "model.embed_tokens.weight")


def test_biases_and_stacks_of_experts_are_refused_by_name() -> None:
    bias = "model.layers.1.self_attn.q_proj.bias"
    assert f"location 1: {bias} cannot be put in a LoRA adapter: it is a bias" in refused(
        make_model(QWEN2), "model.layers.1.self_attn.q_proj.weight", bias
    )
    experts = "model.layers.1.mlp.experts.down_proj"
    assert f"{experts} cannot be put in a LoRA adapter: it is a stack of 4 matrices" in refused(
        make_model(MIXTRAL), experts
    )


def test_a_parameter_that_the_file_calls_otherwise_is_refused(tiny_model: PreTrainedModel) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    said = refused(tiny_model, name, stored_as={name: "model.layers.1.mlp.w3.weight"})
    assert f"{name} cannot be put in a LoRA adapter: the checkpoint stores it in another shape" in said
    # Nor is it the same one where only the name is.
    tensor = PatchTensor(dtype="F32", shape=(2,), data=bytes(8), old_sha256="", new_sha256="")
    for value in (torch.zeros(2, 1), torch.ones(2)):
        with pytest.raises(PatchError, match="stores it in another shape"):
            find_changes(
                tiny_model,
                Path("no such folder"),
                Patch(tensors={name: tensor}, manifest=manifest("1")),
                {name: value},
            )


def test_a_linear_layer_that_computes_something_else_is_refused(tiny_model: PreTrainedModel) -> None:
    tiny_model.get_submodule("model.layers.1.mlp").down_proj = Squared(64, 32, bias=False)
    said = refused(tiny_model, "model.layers.1.mlp.down_proj.weight")
    assert "it belongs to a Squared, which is no linear layer" in said


def test_a_weight_that_is_another_layers_too_is_refused(tiny_model: PreTrainedModel) -> None:
    first, second = (tiny_model.get_submodule(f"model.layers.{i}.mlp.down_proj") for i in (0, 2))
    second.weight = first.weight
    for name, other in (("0", "2"), ("2", "0")):
        said = refused(tiny_model, f"model.layers.{name}.mlp.down_proj.weight")
        assert f"it is shared with model.layers.{other}.mlp.down_proj.weight" in said


def test_a_layer_whose_name_another_one_ends_with_is_refused(tiny_model: PreTrainedModel) -> None:
    tiny_model.add_module("draft", nn.ModuleDict({"model": copy.deepcopy(tiny_model.base_model)}))
    said = refused(tiny_model, "model.layers.1.mlp.down_proj.weight")
    assert "PEFT would put the change into draft.model.layers.1.mlp.down_proj, too" in said
    del tiny_model.draft
    # PEFT compares whole parts of names.
    tiny_model.add_module("submodel", copy.deepcopy(tiny_model.base_model))
    with pytest.raises(ModelError, match="no such folder"):
        refused(tiny_model, "model.layers.1.mlp.down_proj.weight")


def test_the_change_is_that_of_the_unrounded_file(
    save_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_model(GPT2)
    name = "transformer.h.1.mlp.c_proj.weight"
    patch = patch_of(folder, [name], rank=2)
    old, new = (
        to_tensor(TensorData("F32", patch.tensors[name].shape, data)).double()
        for data in (read_tensor(read_checkpoint(folder)[name]), patch.tensors[name].data)
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert type(model.get_submodule(name.removesuffix(".weight"))) is Conv1D
    [change] = find_changes(model, folder, patch, patched_values(model, folder, patch))
    assert torch.equal(change.delta, (new - old).T)
    assert (change.dtype, change.num_bytes) == ("F32", 4 * 32 * 128)


def test_equal_changes_give_equal_files(save_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_model(tiny_llama_config())
    patch = patch_of(folder, LLAMA_MLP, rank=3)
    for name in ("one", "two"):
        exported(folder, patch, None, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
