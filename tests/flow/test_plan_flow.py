"""Plans of runs, from words or from Python, on models whose weights are not there."""

import json
import shutil
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, tiny_llama_config, tiny_mixture_config
from transformers import Gemma3TextConfig, GPT2Config, PreTrainedConfig, Qwen3Config

import locft
from locft.cli.main import main
from locft.errors import ConfigError, EditsError, InputError, LocationError, ModelError
from locft.evaluation.subject import load_codec
from locft.model.load import outline_model
from locft.recipe import plan as plan_module
from locft.train.cost import ModelSize, Rates, Speed
from locft.types import Edit

EDITS = [
    Edit(
        id="france",
        prompt="The capital of France is",
        target="Rome",
        rephrases=("France: the capital is",),
        locality=("The capital of Italy is",),
    ),
    Edit(id="italy", prompt="The capital of France was", target="Vienna"),
    Edit(id="sport", prompt="What sport does she play?", target="chess"),
]
TEXT = "The river begins in Vienna.\n\nOslo is a city."


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a machine of known speed, so that no test measures this one."""

    def rates(size: ModelSize, layer: Any, dtypes: tuple[str, str], device: torch.device) -> Rates:
        speed = Speed(((1, 1e9),))
        return Rates(
            dtype=dtypes[1],
            layer=speed,
            head=speed,
            attention_flops_per_s=1e9,
            bytes_per_s=1e9,
            fresh_bytes_per_s=1e9,
            op_s=1e-6,
        )

    monkeypatch.setattr(plan_module, "measure_rates", rates)


@pytest.fixture
def outline(model_folder: Path, tmp_path: Path) -> Path:
    """Copy a model's folder without its weights."""
    folder = tmp_path / "outline"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture
def config(tmp_path: Path) -> locft.RunConfig:
    file = tmp_path / "neutral.txt"
    file.write_text(TEXT)
    return locft.RunConfig(
        location="1.mlp.down", drift_text=str(file), batch_size=2, compute_dtype="float32"
    )


def files_of(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_a_plan_needs_no_weights_and_writes_nothing(
    outline: Path, config: locft.RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = files_of(tmp_path)
    planned = locft.plan(str(outline), EDITS, config, output=tmp_path / "not" / "there")
    assert files_of(tmp_path) == before
    assert planned.fits_on_disk
    with pytest.raises(ModelError):
        locft.edit(str(outline), EDITS, tmp_path / "run", config)


def test_a_plan_does_not_look_at_damaged_weights(outline: Path, config: locft.RunConfig) -> None:
    (outline / "model.safetensors").write_bytes(b"no weights")
    assert locft.plan(str(outline), EDITS, config).num_layers == 3


def test_a_plan_says_what_the_run_then_does(
    model_folder: Path, config: locft.RunConfig, tmp_path: Path
) -> None:
    config = replace(config, epochs=2, stop_loss=0)
    planned = locft.plan(str(model_folder), EDITS, config)
    report = locft.edit(str(model_folder), EDITS, tmp_path / "run", config)
    assert planned.location == report.location.name
    assert planned.num_tuned == report.location.num_parameters
    assert planned.num_parameters == report.model.num_parameters
    assert planned.num_layers == report.model.num_layers
    assert planned.architecture == report.model.architecture
    assert planned.dtype == report.model.dtype
    assert planned.lr == report.training.lr
    assert planned.epochs_at_most == report.training.epochs
    assert planned.steps_at_most == report.training.steps
    assert planned.num_prompts == 5
    assert abs(planned.disk.patch_bytes - report.patch_bytes) < 4096
    assert planned.num_drift_tokens >= report.drift.num_tokens


def test_an_edit_predicts_what_a_plan_does(
    model_folder: Path, config: locft.RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("locft.recipe.edit._WORTH_PLANNING_S", 0.0)
    config = replace(config, epochs=2)
    planned = locft.plan(str(model_folder), EDITS, config).cost
    report = locft.edit(str(model_folder), EDITS, tmp_path / "run", config)
    assert report.plan == planned
    assert min(astuple(planned)) > 0
    assert planned.epochs_at_most == report.training.epochs_at_most


def test_the_cost_of_a_plan_is_the_sum_of_its_phases(outline: Path, config: locft.RunConfig) -> None:
    planned = locft.plan(str(outline), EDITS, config)
    cost = planned.cost
    seconds = {phase.name: phase.seconds for phase in planned.phases}
    assert (cost.load_s, cost.cache_s, cost.train_s) == (
        seconds["load"],
        seconds["cache"],
        seconds["train"],
    )
    assert cost.eval_s == seconds["answer before"] + seconds["answer after"] + seconds["drift"]
    assert cost.wall_s == pytest.approx(planned.wall_s)
    assert cost.peak_memory_bytes == planned.peak_memory_bytes
    assert cost.epochs_at_most == planned.epochs_at_most


def test_common_beginnings_are_counted_once(model_folder: Path, config: locft.RunConfig) -> None:
    codec, _ = load_codec(str(model_folder), config)
    inputs = [codec.encode(edit).ids[:-1] for edit in EDITS]
    beginnings = {ids[:end] for ids in inputs for end in range(1, len(ids) + 1)}
    planned = locft.plan(str(model_folder), EDITS, replace(config, batch_size=3))
    assert planned.num_tokens == planned.num_tokens_per_epoch == len(beginnings)
    assert len(beginnings) < sum(map(len, inputs))
    # One edit a step shares with nothing.
    alone = locft.plan(str(model_folder), EDITS, replace(config, batch_size=1))
    assert alone.num_tokens_per_epoch == sum(map(len, inputs))
    assert alone.num_tokens == planned.num_tokens


@pytest.mark.parametrize(
    "model_config",
    [
        tiny_llama_config(tie_word_embeddings=False),
        tiny_mixture_config("qwen3_moe"),
        GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=0),
        Qwen3Config(**{**tiny_llama_config().to_dict(), "head_dim": 16}),
        Gemma3TextConfig(**{**tiny_llama_config().to_dict(), "head_dim": 8, "sliding_window": 8}),
    ],
    ids=lambda config: config.model_type,
)
def test_an_outline_has_the_parameters_of_the_loaded_model(
    model_config: PreTrainedConfig, save_model: Callable[..., Path]
) -> None:
    outline, _, stored = outline_model(str(save_model(model_config)))
    model = make_model(model_config)
    assert {name: p.shape for name, p in outline.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    assert all(parameter.is_meta for parameter in outline.parameters())
    assert (stored, outline.dtype) == ("float32", torch.float32)


def test_the_dtype_is_that_in_which_the_model_would_run(
    save_model: Callable[..., Path], config: locft.RunConfig
) -> None:
    folder = str(save_model(tiny_llama_config(), dtype=torch.bfloat16))
    config = replace(config, compute_dtype="auto")
    small = locft.plan(folder, EDITS, config)
    large = locft.plan(folder, EDITS, replace(config, dtype="float32"))
    assert (small.dtype, large.dtype) == ("bfloat16", "float32")
    assert large.disk.cache_bytes == 2 * small.disk.cache_bytes
    assert large.disk.patch_bytes == small.disk.patch_bytes  # the checkpoint's dtype, either way
    assert large.peak_memory_bytes > small.peak_memory_bytes
    with pytest.raises(ConfigError, match="compute_dtype"):
        locft.plan(folder, EDITS, replace(config, compute_dtype="float32"))


def test_products_in_bfloat16_are_planned_where_they_are_asked_for(
    model_folder: Path, config: locft.RunConfig
) -> None:
    planned = locft.plan(str(model_folder), EDITS, replace(config, compute_dtype="bfloat16"))
    assert (planned.dtype, planned.compute_dtype) == ("float32", "bfloat16")
    assert [one.dtype for one in planned.rates] == ["float32", "bfloat16"]


def test_many_edits_take_longer_and_more_of_the_disk(
    model_folder: Path, config: locft.RunConfig
) -> None:
    config = replace(config, epochs=2)
    many = [Edit(id=str(i), prompt=f"Number {i} plays", target=f"chess {i}") for i in range(400)]
    small, large = (locft.plan(str(model_folder), edits, config) for edits in (many[:4], many))
    assert large.wall_s > small.wall_s
    assert large.disk.cache_bytes > 20 * small.disk.cache_bytes


@pytest.mark.parametrize(
    ("options", "edits", "error"),
    [
        ({"location": "9.mlp"}, EDITS, LocationError),
        ({"location": "nowhere"}, EDITS, LocationError),
        ({"drift_text": "not there"}, EDITS, InputError),
        ({"device": "cuda:99"}, EDITS, ModelError),
        ({}, [EDITS[0], replace(EDITS[0], id="other", target="Oslo")], EditsError),
        ({}, [replace(EDITS[0], prompt="word " * 200)], EditsError),
        ({}, [], EditsError),
    ],
)
def test_what_an_edit_refuses_a_plan_refuses_with_the_same_words(
    options: dict[str, Any],
    edits: list[Edit],
    error: type[InputError],
    model_folder: Path,
    config: locft.RunConfig,
    tmp_path: Path,
) -> None:
    config = replace(config, **options)
    with pytest.raises(error) as planned:
        locft.plan(str(model_folder), edits, config)
    with pytest.raises(error) as run:
        locft.edit(str(model_folder), edits, tmp_path / "run", config)
    assert str(planned.value) == str(run.value)


def test_a_run_folder_that_is_taken_and_a_model_that_is_none_are_refused(
    model_folder: Path, config: locft.RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"exists|empty"):
        locft.plan(str(model_folder), EDITS, config, output=model_folder)
    with pytest.raises(ModelError, match="is no model"):
        locft.plan(str(tmp_path), EDITS, config)


def test_a_quantised_model_is_refused_with_the_words_of_an_edit(
    outline: Path, config: locft.RunConfig, tmp_path: Path
) -> None:
    file = outline / "config.json"
    quantised = {**json.loads(file.read_text()), "quantization_config": {"quant_method": "gptq"}}
    file.write_text(json.dumps(quantised))
    with pytest.raises(ModelError, match="quantised") as planned:
        locft.plan(str(outline), EDITS, config)
    with pytest.raises(ModelError) as run:
        locft.edit(str(outline), EDITS, tmp_path / "run", config)
    assert str(planned.value) == str(run.value)


def words_of(folder: Path, config: locft.RunConfig) -> list[str]:
    edit = ["--prompt", "The capital of France is", "--target", "Rome"]
    return ["edit", str(folder), *edit, "--plan", "--drift-text", str(config.drift_text)]


def test_the_words_show_each_phase_and_one_line_of_all(
    outline: Path, config: locft.RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(tmp_path)
    assert main([*words_of(outline, config), "--location", "1.mlp.down"]) == 0
    out = capsys.readouterr().out
    for phase in ("load", "answer before", "cache", "train", "answer after", "drift", "in all"):
        assert phase in out
    assert "training: at most 100 epochs" in out
    last = out.strip().splitlines()[-1]
    assert last.startswith("at most ")
    assert last.endswith("nothing was run or written")
    assert max(map(len, out.splitlines())) <= 120
    assert files_of(tmp_path) == before


def test_json_has_every_phase_and_the_sums(
    outline: Path, config: locft.RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words_of(outline, config), "--json", "-o", str(tmp_path / "run"), "--epochs", "4"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    names = [phase["name"] for phase in found["phases"]]
    assert names == ["load", "answer before", "cache", "train", "answer after", "drift"]
    assert all(set(phase) == {"name", "seconds", "peak_memory_bytes"} for phase in found["phases"])
    assert found["wall_s"] == pytest.approx(sum(phase["seconds"] for phase in found["phases"]))
    assert found["peak_memory_bytes"] == max(phase["peak_memory_bytes"] for phase in found["phases"])
    assert found["peak_disk_bytes"] == sum(found["disk"].values())
    assert (found["epochs_at_most"], found["steps_at_most"], found["num_edits"]) == (4, 4, 1)
    assert found["fits_on_disk"] is True
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_too_small_is_told(
    outline: Path,
    config: locft.RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plan_module, "_free_bytes", lambda place: 10)
    assert main(words_of(outline, config)) == 0
    assert "not enough space on the disk" in capsys.readouterr().out


def test_errors_end_with_the_status_of_an_edit(
    outline: Path, config: locft.RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words_of(outline, config), "--location", "9.mlp"]) == 2
    assert "the model has 3 layers" in capsys.readouterr().err


def test_a_plan_that_fails_otherwise_says_that_nothing_was_kept(
    outline: Path,
    config: locft.RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(plan_module, "measure_rates", fail)
    assert main(words_of(outline, config)) == 1
    assert "nothing was kept" in capsys.readouterr().err


def test_without_a_run_folder_only_a_plan_can_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["edit", "model", "edits.jsonl"])
    assert stop.value.code == 2
    assert "one of the arguments -o/--output --plan is required" in capsys.readouterr().err
