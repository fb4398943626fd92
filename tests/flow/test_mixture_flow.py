"""Whole runs on mixtures of experts, which transformers holds otherwise in memory than in the file."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, tiny_mixture_config
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import locft
from locft.checkpoint import read_checkpoint
from locft.errors import LocationError, ModelError
from locft.model.weights import swapped_in
from locft.patch.format import Patch
from locft.patch.weights import patched_values
from locft.report.schema import EditReport
from locft.tensorfile import read_tensor
from locft.types import Edit

EDITS = [
    Edit(id="france", prompt="The capital of France is", target="Rome"),
    Edit(id="sport", prompt="What sport does she play?", target="chess"),
]
# What the file calls the mixture in layer 1, and what is trained of it: experts, also the shared one.
MIXTURES: dict[str, tuple[str, str]] = {
    "mixtral": ("block_sparse_moe", r"experts\.[0-3]\.w[123]\.weight"),
    "qwen2_moe": (
        "mlp",
        r"experts\.[0-3]\.(gate|up|down)_proj\.weight|shared_expert\..*\.weight",
    ),
    "qwen3_moe": ("mlp", r"experts\.[0-3]\.(gate|up|down)_proj\.weight"),
    "olmoe": ("mlp", r"experts\.[0-3]\.(gate|up|down)_proj\.weight"),
}
ROUTER = re.compile(r"\.(gate|router\.layer|shared_expert_gate)\.weight$")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> locft.RunConfig:
    text = tmp_path_factory.mktemp("text") / "neutral.txt"
    text.write_text("The river begins in Vienna.")
    return locft.RunConfig(lr=0.01, epochs=3, stop_loss=0.0, batch_size=2, drift_text=str(text))


@pytest.fixture(scope="module")
def save_mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a mixture of which no two tensors are alike, its norms included."""

    def save(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("mixture")
        model: Any = make_model(tiny_mixture_config(family, **options))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        model.to(dtype).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return folder

    return save


def load_plainly(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([[40, 5, 77, 102, 3, 260]])).logits
    return logits


def run_edit(
    folder: Path, run: Path, config: locft.RunConfig, location: str
) -> tuple[EditReport, Patch]:
    report = locft.edit(str(folder), EDITS, run, dataclasses.replace(config, location=location))
    return report, locft.read_patch(run / "patch")


@pytest.mark.parametrize("location", ["1.mlp", "1"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_of_experts_is_edited_where_its_file_holds_it(
    family: str,
    dtype: str,
    location: str,
    save_mixture: Callable[..., Path],
    config: locft.RunConfig,
    tmp_path: Path,
) -> None:
    folder = save_mixture(family, DTYPES[dtype])
    entries = read_checkpoint(folder)
    prefix, inside = MIXTURES[family]
    mixture = re.compile(rf"model\.layers\.1\.{prefix}\.({inside})")
    expected = {
        name
        for name in entries
        if (
            mixture.fullmatch(name)
            if location == "1.mlp"
            else name.startswith("model.layers.1.") and not ROUTER.search(name)
        )
    }
    assert len([name for name in expected if ".experts." in name]) == 12

    report, patch = run_edit(folder, tmp_path / "run", config, location)
    assert patch.tensors.keys() == expected
    assert {tensor.dtype for tensor in patch.tensors.values()} == {dtype}
    assert report.location.num_parameters == sum(int(np.prod(entries[name].shape)) for name in expected)
    assert [matrix.tensor for matrix in report.location.matrices] == sorted(expected)
    assert all(matrix.change > 0 for matrix in report.location.matrices)

    locft.apply_patch(folder, patch, tmp_path / "edited")
    edited = read_checkpoint(tmp_path / "edited")
    assert edited.keys() == entries.keys()
    for name, entry in entries.items():
        assert (read_tensor(edited[name]) == read_tensor(entry)) == (name not in expected)
    model = load_plainly(folder)
    unedited = logits_of(model)
    with swapped_in(model, patched_values(model, folder, patch)):
        swapped = logits_of(model)
    assert torch.equal(logits_of(load_plainly(tmp_path / "edited")), swapped)
    assert not torch.allclose(unedited, swapped, atol=1e-3)
    assert torch.equal(logits_of(model), unedited)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_tied_embeddings_change_nothing_about_a_mixture(
    family: str, save_mixture: Callable[..., Path], config: locft.RunConfig, tmp_path: Path
) -> None:
    folder = save_mixture(family, tie_word_embeddings=True)
    assert "lm_head.weight" not in read_checkpoint(folder)
    _, patch = run_edit(folder, tmp_path / "run", config, "1")
    locft.apply_patch(folder, patch, tmp_path / "edited")
    model = load_plainly(folder)
    with swapped_in(model, patched_values(model, folder, patch)):
        swapped = logits_of(model)
    assert torch.equal(logits_of(load_plainly(tmp_path / "edited")), swapped)


def test_parameters_that_are_only_renamed_in_memory_keep_the_files_names(
    save_mixture: Callable[..., Path], config: locft.RunConfig, tmp_path: Path
) -> None:
    folder = save_mixture("granitemoe")
    _, patch = run_edit(folder, tmp_path / "run", config, "1")
    names = {
        name
        for name in read_checkpoint(folder)
        if name.startswith("model.layers.1.") and not ROUTER.search(name)
    }
    assert "model.layers.1.block_sparse_moe.input_linear.weight" in names
    assert patch.tensors.keys() == names
    locft.apply_patch(folder, patch, tmp_path / "edited")
    model = load_plainly(folder)
    values = patched_values(model, folder, patch)
    assert "model.layers.1.block_sparse_moe.experts.gate_up_proj" in values
    with swapped_in(model, values):
        swapped = logits_of(model)
    assert torch.equal(logits_of(load_plainly(tmp_path / "edited")), swapped)


def test_training_experts_in_bfloat16_starts_from_the_unrounded_checkpoint(
    save_mixture: Callable[..., Path], config: locft.RunConfig, tmp_path: Path
) -> None:
    folder = save_mixture("qwen3_moe")
    gentle = dataclasses.replace(config, dtype="bfloat16", lr=1e-12, epochs=1)
    _, patch = run_edit(folder, tmp_path / "run", gentle, "1.mlp")
    stored = load_file(folder / "model.safetensors")
    for name, tensor in patch.tensors.items():
        new = np.frombuffer(tensor.data, dtype=np.float32).reshape(tensor.shape)
        # Rounding to bfloat16 would have moved weights of this size by up to 1e-4.
        assert np.abs(new - stored[name].numpy()).max() < 1e-9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_patch_of_some_experts_leaves_the_others_as_the_model_has_them(
    dtype: str, save_mixture: Callable[..., Path], config: locft.RunConfig, tmp_path: Path
) -> None:
    folder = save_mixture("mixtral")
    _, whole = run_edit(folder, tmp_path / "run", config, "1.mlp")
    expert = "model.layers.1.block_sparse_moe.experts.2"
    some = Patch(
        tensors={name: whole.tensors[name] for name in (f"{expert}.w3.weight", f"{expert}.w2.weight")},
        manifest=whole.manifest,
    )
    locft.apply_patch(folder, some, tmp_path / "edited")
    model, edited = (
        AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        for path in (folder, tmp_path / "edited")
    )
    values = patched_values(model, folder, some)
    fused = "model.layers.1.mlp.experts"
    assert values.keys() == {f"{fused}.gate_up_proj", f"{fused}.down_proj"}
    for name, value in values.items():
        assert torch.equal(value, edited.get_parameter(name))
        assert not torch.equal(value, model.get_parameter(name))
    with swapped_in(model, values):
        swapped = logits_of(model)
    assert torch.equal(logits_of(edited), swapped)


def test_a_patched_mixture_is_asked_as_it_is_once_edited(
    save_mixture: Callable[..., Path], config: locft.RunConfig, tmp_path: Path
) -> None:
    folder = save_mixture("olmoe")
    learnt = dataclasses.replace(config, epochs=40)
    report, patch = run_edit(folder, tmp_path / "run", learnt, "1.mlp")
    assert report.scores.reliability.value == 1.0
    prompts = [edit.prompt for edit in EDITS]
    with_patch = [answer.after for answer in locft.ask(str(folder), prompts, tmp_path / "run")]
    assert with_patch == ["Rome", "chess"]
    locft.apply_patch(folder, patch, tmp_path / "edited")
    assert [answer.before for answer in locft.ask(str(tmp_path / "edited"), prompts)] == with_patch
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "run/train.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0]


def test_experts_that_cannot_be_told_in_the_file_are_refused_before_training(
    save_mixture: Callable[..., Path],
    config: locft.RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = save_mixture("qwen3_moe")
    monkeypatch.delattr("transformers.core_model_loading.revert_weight_conversion")
    with pytest.raises(
        ModelError, match=r"is refused: .* holds model\.layers\.1\.mlp\.experts\.down_proj"
    ):
        run_edit(folder, tmp_path / "run", config, "1.mlp")
    assert list(tmp_path.iterdir()) == []
    _, patch = run_edit(folder, tmp_path / "run", config, "1.attn")
    assert all(".self_attn." in name for name in patch.tensors)


def test_experts_that_no_edit_reaches_are_not_in_the_patch(
    save_mixture: Callable[..., Path], config: locft.RunConfig, tmp_path: Path
) -> None:
    folder = save_mixture("mixtral", num_local_experts=32, num_experts_per_tok=1)
    few = dataclasses.replace(config, location="1.mlp")
    locft.edit(str(folder), EDITS[:1], tmp_path / "run", few)
    patch = locft.read_patch(tmp_path / "run" / "patch")
    stored = read_checkpoint(folder)
    experts = {name for name in stored if ".layers.1." in name and ".experts." in name}
    reached = patch.tensors.keys() & experts
    assert 0 < len(reached) < len(experts)
    assert all(tensor.old_sha256 != tensor.new_sha256 for tensor in patch.tensors.values())
    model = load_plainly(folder)
    values = patched_values(model, folder, patch)
    locft.apply_patch(folder, patch, tmp_path / "edited")
    edited = load_plainly(tmp_path / "edited")
    assert all(torch.equal(value, edited.get_parameter(name)) for name, value in values.items())


@pytest.mark.parametrize("family", MIXTURES)
def test_one_expert_is_edited_and_no_other(
    family: str, save_mixture: Callable[..., Path], config: locft.RunConfig, tmp_path: Path
) -> None:
    folder = save_mixture(family)
    report, _ = run_edit(folder, tmp_path / "run", config, "1.mlp.experts.down")
    experts = report.location.experts
    assert experts is not None
    assert experts.served is not None
    assert experts.edited == (0, 1, 2, 3)
    # Two of the four serve each token.
    assert sum(experts.served) == 2 * experts.num_tokens
    busiest = experts.served.index(max(experts.served))
    one, patch = run_edit(folder, tmp_path / "one", config, f"1.mlp.expert[{busiest}].down")
    [name] = patch.tensors
    assert re.search(rf"\.experts\.{busiest}\.(w2|down_proj)\.weight$", name)
    assert one.location.num_parameters * 4 == report.location.num_parameters
    assert one.location.experts == dataclasses.replace(experts, edited=(busiest,))
    text = (tmp_path / "one" / "report.md").read_text()
    share = 100 * experts.served[busiest] / experts.num_tokens
    assert f"| {busiest} | {experts.served[busiest]:,} | {share:.1f}% |" in text
    assert "The layer has 4 routed experts. 1 expert was tuned." in text


def test_up_projections_of_experts_leave_their_gates_alone(
    save_mixture: Callable[..., Path], config: locft.RunConfig, tmp_path: Path
) -> None:
    # The file holds gate and up of all experts in one tensor.
    folder = save_mixture("granitemoe")
    report, patch = run_edit(folder, tmp_path / "run", config, "1.mlp.experts.up")
    [(name, tensor)] = patch.tensors.items()
    old = load_file(folder / "model.safetensors")[name].numpy()
    new = np.frombuffer(tensor.data, dtype=np.float32).reshape(tensor.shape)
    half = old.shape[1] // 2
    assert np.array_equal(new[:, :half], old[:, :half])
    assert (new[:, half:] != old[:, half:]).any()
    assert report.location.num_parameters == old.size // 2
    assert report.location.part == (
        f"up (indices {half} to {2 * half - 1} of axis 1) of "
        "model.layers.1.block_sparse_moe.experts.gate_up_proj"
    )
    assert f"Only up (indices {half} to" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    ("family", "meant"), [("qwen2_moe", "1.mlp.shared.down"), ("mixtral", "1.mlp.experts.down")]
)
def test_the_default_module_of_a_mixture_is_its_shared_expert_or_all_of_them(
    family: str,
    meant: str,
    save_mixture: Callable[..., Path],
    config: locft.RunConfig,
    tmp_path: Path,
) -> None:
    report, _ = run_edit(save_mixture(family), tmp_path / "run", config, "50%.mlp.down")
    assert report.location.name == meant


@pytest.mark.parametrize("location", ["2.mlp.experts.down", "2"])
def test_experts_of_the_last_layer_are_counted_at_every_token(
    location: str, save_mixture: Callable[..., Path], config: locft.RunConfig, tmp_path: Path
) -> None:
    folder = save_mixture("mixtral")
    report, _ = run_edit(folder, tmp_path / "run", config, location)
    last = report.location.experts
    assert last is not None
    assert last.served is not None
    assert sum(last.served) == 2 * last.num_tokens


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("1.mlp.expert[4].down", r"has no 'mlp.expert\[4\].down': it has 4 experts, 0 to 3"),
        ("1.mlp.shared.down", "no single 'mlp.shared.down'"),
    ],
)
def test_a_module_that_a_mixture_does_not_have_is_refused(
    location: str,
    reason: str,
    save_mixture: Callable[..., Path],
    config: locft.RunConfig,
    tmp_path: Path,
) -> None:
    with pytest.raises(LocationError, match=reason):
        run_edit(save_mixture("mixtral"), tmp_path / "run", config, location)
    assert list(tmp_path.iterdir()) == []
