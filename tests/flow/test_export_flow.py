"""Exporting an edit for serving, from a run to an adapter that answers."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama_config
from safetensors.torch import load_file
from transformers import GPT2Config, MixtralConfig, PreTrainedConfig, Qwen2Config

import locft
from locft.cli.main import main
from locft.errors import EditsError, InputError, ModelError, PatchError
from locft.evaluation.subject import load_subject
from locft.model.resolve import CheckpointFolder
from locft.model.weights import swapped_in
from locft.patch.weights import patched_values
from locft.recipe.export import LoraExport, RankFigures, _find_rank, export_lora
from locft.types import Edit

EDITS = [
    Edit(id="france", prompt="The capital of France is", target="Rome"),
    Edit(id="sport", prompt="What sport does she play?", target="chess"),
    Edit(id="play", prompt="Who wrote the play?", target="London", rephrases=("The play is by",)),
]
PROMPTS = [edit.prompt for edit in EDITS]
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
MIXTRAL = MixtralConfig(
    vocab_size=384,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    bos_token_id=1,
    eos_token_id=0,
)
ADAPTER_FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]

EditModel = Callable[..., Path]


@pytest.fixture(scope="module")
def edit_model(tmp_path_factory: pytest.TempPathFactory) -> EditModel:
    """Edit a model until it knows all edits, or only a little, and return the run folder."""
    text = tmp_path_factory.mktemp("text") / "neutral.txt"
    text.write_text("The river begins in Vienna.")

    def edit(model: Path, **settings: Any) -> Path:
        run = tmp_path_factory.mktemp("runs") / "run"
        learn = {"location": "1.mlp", "lr": 0.01, "epochs": 60, "stop_loss": 0.0, "batch_size": 2}
        config = locft.RunConfig(drift_text=str(text), **{**learn, **settings})
        locft.edit(str(model), EDITS, run, config)
        return run

    return edit


@pytest.fixture(scope="module")
def run(model_folder: Path, edit_model: EditModel) -> Path:
    """A run that tuned the three matrices of an MLP; tests must not change it."""
    return edit_model(model_folder)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def answers_with_peft(model: Path, adapter: Path) -> dict[str, str]:
    """Answer the edits' prompts as PEFT serves the adapter, by the protocol of the scores."""
    from peft import PeftModel

    subject = load_subject(str(model), locft.RunConfig())
    with warnings.catch_warnings():
        # PEFT reads a property of transformers that is on its way out.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # It puts its layers into the model that it is given.
        PeftModel.from_pretrained(subject.loaded.model, str(adapter))
    return subject.answer(PROMPTS, "answering")


def num_right(answers: dict[str, str]) -> int:
    return sum(answers[edit.prompt] == edit.target for edit in EDITS)


def by_rank(report: LoraExport) -> dict[int, tuple[int | None, int | None]]:
    return {row.rank: (row.num_right, row.num_lost) for row in report.ranks}


def test_auto_takes_the_smallest_rank_that_loses_nothing(
    run: Path, model_folder: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    report = locft.export_lora(run, tmp_path / "adapter", say=said.append)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ADAPTER_FILES
    assert (report.num_edits, report.num_right, report.largest_rank) == (3, 3, 21)
    chosen = report.chosen
    assert (chosen.num_right, chosen.num_lost) == (3, 0)
    below = [row for row in report.ranks if row.rank < report.rank]
    assert below
    assert below[-1].rank == report.rank - 1
    assert all(row.num_lost == 3 - (row.num_right or 0) > 0 for row in below)
    errors = [row.error for row in report.ranks]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < errors[0] < 1
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert chosen.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert chosen.num_bytes == report.rank * 3 * (32 + 64) * 4
    assert report.matrices_bytes == 3 * 32 * 64 * 4
    assert num_right(answers_with_peft(model_folder, tmp_path / "adapter")) == 3
    assert said[:3] == [
        f"loading {model_folder}",
        "factorising the change of 1.mlp (6,144 parameters)",
        "answering 3 edits with the full patch",
    ]
    assert f"rank {report.rank}: 3 of 3 edits, 0 lost" in said


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_given_rank_is_measured_as_it_is_served(
    rank: int, run: Path, model_folder: Path, tmp_path: Path
) -> None:
    report = export_lora(run, tmp_path / "adapter", rank=rank)
    table = by_rank(report)
    assert list(table) == sorted({1, 2, 4, 8, 16, 21, rank})
    right = num_right(answers_with_peft(model_folder, tmp_path / "adapter"))
    assert table[rank] == (right, 3 - right)
    assert all((row == (None, None)) == (step > rank) for step, row in table.items())
    assert (report.rank, report.chosen.rank, report.max_lora_rank) == (rank, rank, 1 if rank == 1 else 8)


def test_the_answers_of_a_low_rank_are_those_of_peft(
    run: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, dict[str, str]] = {}
    answer = locft.evaluation.subject.Subject.answer

    def keep(subject: Any, prompts: Any, label: str, **options: Any) -> Any:
        asked[label] = answer(subject, prompts, label, **options)
        return asked[label]

    with monkeypatch.context() as patched:
        patched.setattr("locft.evaluation.subject.Subject.answer", keep)
        export_lora(run, tmp_path / "adapter", rank=2)
    assert asked["answering, rank 2"] == answers_with_peft(model_folder, tmp_path / "adapter")
    assert asked["answering, rank 2"] != asked["answering, full patch"]
    assert [asked["answering, full patch"][prompt] for prompt in PROMPTS] == ["Rome", "chess", "London"]


@pytest.mark.parametrize("case", ["untied", "gpt2", "bfloat16"])
def test_other_models_are_exported_too(
    case: str, save_model: Callable[..., Path], edit_model: EditModel, tmp_path: Path
) -> None:
    config = {"gpt2": GPT2, "untied": tiny_llama_config(tie_word_embeddings=False)}
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    model = save_model(config.get(case, tiny_llama_config()), dtype)
    location = "1.mlp.down" if case == "gpt2" else "1.mlp"
    run = edit_model(model, location=location, lr=0.03 if case == "gpt2" else 0.01)
    report = export_lora(run, tmp_path / "adapter")
    assert (report.num_right, report.chosen.num_lost) == (3, 0)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert sum(tensor.nbytes for tensor in tensors.values()) <= report.matrices_bytes
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["fan_in_fan_out"] is (case == "gpt2")
    assert settings["base_model_name_or_path"] == str(model)
    assert num_right(answers_with_peft(model, tmp_path / "adapter")) == 3


def test_at_the_largest_rank_peft_comes_close_to_the_patch(
    run: Path, model_folder: Path, tmp_path: Path
) -> None:
    report = export_lora(run, tmp_path / "adapter", rank=21)
    subject = load_subject(str(model_folder), locft.RunConfig())
    model = subject.loaded.model
    ids = torch.tensor([subject.codec.prompt_ids(PROMPTS[0])])
    with torch.no_grad():
        base = subject.logits(ids)
        with swapped_in(model, patched_values(model, model_folder, locft.read_patch(run / "patch"))):
            wanted = subject.logits(ids)
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
        served = subject.logits(ids)
    rest = (torch.linalg.vector_norm(served - wanted) / torch.linalg.vector_norm(wanted - base)).item()
    assert rest < 2 * report.chosen.error < 0.5


def test_an_edit_in_a_chat_is_asked_in_a_chat(
    model_folder: Path, edit_model: EditModel, tmp_path: Path
) -> None:
    run = edit_model(model_folder, format="chat")
    report = export_lora(run, tmp_path / "adapter", rank=21)
    assert (report.num_right, report.chosen.num_lost) == (3, 0)
    raw = export_lora(run, tmp_path / "raw", rank=21, config=locft.RunConfig(format="raw"))
    assert raw.num_right != 3


def test_where_no_rank_will_do_the_best_is_named_and_nothing_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # What each rank keeps: the best is not the last, and of two alike it is the smaller.
    kept = {
        "full patch": 3,
        "rank 1": 0,
        "rank 2": 1,
        "rank 4": 2,
        "rank 8": 2,
        "rank 16": 1,
        "rank 21": 1,
    }

    def some(subject: Any, edits: Any, label: str) -> set[str]:
        return {edit.id for edit in EDITS[: kept[label.removeprefix("answering, ")]]}

    monkeypatch.setattr("locft.recipe.export._answered_right", some)
    assert main(["export", str(run), "--lora", "-o", str(tmp_path / "adapter")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == (
        "locft: error: no rank up to 21 keeps every edit that the full patch answers right; the best, "
        "rank 4, loses 1: take it with --rank 4, or export with --full"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_edit_that_the_full_patch_misses_is_not_lost(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = {
        "full patch": {"france", "sport"},
        "rank 1": {"france", "play"},
        "rank 2": {"france", "sport"},
    }

    def some(subject: Any, edits: Any, label: str) -> set[str]:
        return right[label.removeprefix("answering, ")]

    monkeypatch.setattr("locft.recipe.export._answered_right", some)
    report = export_lora(run, tmp_path / "adapter")
    assert (report.rank, report.num_right, by_rank(report)) == (2, 2, {1: (2, 1), 2: (2, 0)})


@pytest.mark.parametrize("rank", ["auto", 22, 513, 0, -1])
def test_a_rank_that_does_not_fit_is_refused(rank: Any, run: Path, tmp_path: Path) -> None:
    if rank == "auto":
        with pytest.raises(
            InputError, match="no edits to choose a rank by: name them with --edits FILE"
        ):
            export_lora(run / "patch", tmp_path / "adapter")
    elif rank == 22:
        said = r"rank 22: .* larger than the matrices .*24\.6 kB.*; the largest rank allowed here is 21"
        with pytest.raises(InputError, match=said):
            export_lora(run, tmp_path / "adapter", rank=rank)
    else:
        with pytest.raises(InputError, match=f"rank {rank}: vLLM serves ranks from 1 to 512"):
            export_lora(run, tmp_path / "adapter", rank=rank)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", ["auto", 1])
def test_where_every_adapter_would_be_larger_none_is_made(
    rank: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("locft.recipe.export.largest_rank", lambda changes: 0)
    with pytest.raises(InputError, match=r"an adapter of any rank would be larger .* with --full"):
        export_lora(run, tmp_path / "adapter", rank=rank)
    assert list(tmp_path.iterdir()) == []


def test_without_edits_a_given_rank_is_not_measured_on_any(run: Path, tmp_path: Path) -> None:
    report = export_lora(run / "patch", tmp_path / "adapter", rank=4)
    assert (report.num_edits, report.num_right) == (None, None)
    assert by_rank(report) == dict.fromkeys([1, 2, 4, 8, 16, 21], (None, None))
    assert "It was not asked any edits." in (tmp_path / "adapter" / "README.md").read_text()
    # Edits can be named, and the adapter is the same one.
    named = export_lora(run / "patch", tmp_path / "named", rank=4, edits=run / "edits.jsonl")
    assert named.num_right == 3
    weights = "adapter_model.safetensors"
    assert contents(tmp_path / "named")[weights] == contents(tmp_path / "adapter")[weights]


def test_edits_that_the_patch_does_not_know_choose_no_rank(
    run: Path, model_folder: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    other = [Edit(id="1", prompt="Where does the river begin?", target="Vienna")]
    with pytest.raises(
        InputError, match="answers none of the edits right, so they cannot choose a rank"
    ):
        export_lora(run, tmp_path / "adapter", edits=other, say=said.append)
    assert "the edits are not those that the patch was made of" in said
    assert list(tmp_path.iterdir()) == []
    report = export_lora(run, tmp_path / "adapter", edits=other, rank=2)
    assert (report.num_edits, report.num_right, report.chosen.num_lost) == (1, 0, 0)
    assert list(by_rank(report)) == [1, 2, 4, 8, 16, 21]
    long = [Edit(id="1", prompt="Where does the river begin? " * 30, target="Vienna")]
    with pytest.raises(EditsError, match="the model takes 128"):
        export_lora(run, tmp_path / "long", edits=long)


@pytest.mark.parametrize(
    ("family", "location", "named"),
    [
        (QWEN2, "1", ["input_layernorm.weight", "post_attention_layernorm.weight", "k_proj.bias"]),
        (QWEN2, "1.attn", ["self_attn.k_proj.bias cannot", "q_proj.bias", "v_proj.bias"]),
        (
            MIXTRAL,
            "1.mlp",
            ["experts.down_proj cannot", "a stack of 4 matrices", "experts.gate_up_proj"],
        ),
    ],
)
def test_what_no_adapter_holds_is_refused_by_name_before_anything_is_computed(
    family: PreTrainedConfig,
    location: str,
    named: list[str],
    save_model: Callable[..., Path],
    edit_model: EditModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = edit_model(save_model(family), location=location, epochs=1)
    monkeypatch.setattr("locft.recipe.export.factorise", None)
    assert main(["export", str(run), "--lora", "-o", str(tmp_path / "adapter")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"locft: error: location {location}: model.layers.1.")
    assert all(name in error for name in named)
    assert error.endswith("; export with --full")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_moved_is_named(
    run: Path,
    save_model: Callable[..., Path],
    edit_model: EditModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = save_model(tiny_llama_config(num_hidden_layers=2))
    moved = edit_model(model, epochs=1)
    shutil.move(model, tmp_path / "here")
    for kind in (["--lora", "--rank", "1"], ["--full"]):
        assert main(["export", str(moved), *kind, "-o", str(tmp_path / "out")]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(errors) == 1
        assert "the patch's own model: " in errors[0]
        assert errors[0].endswith("; --model says where it is now")
        words = ["export", str(moved), *kind, "-o", str(tmp_path / kind[0]), "--model"]
        assert main([*words, str(tmp_path / "here")]) == 0
    with pytest.raises(ModelError, match=r"^no model 'no such model'"):
        export_lora(moved, tmp_path / "out", rank=1, model="no such model")
    with pytest.raises(PatchError, match="the patch was made from"):
        export_lora(run, tmp_path / "out", rank=1, model=str(tmp_path / "here"))
    assert not (tmp_path / "out").exists()


def test_a_model_of_the_hub_is_loaded_at_its_commit_and_named_by_its_id(
    run: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def resolve(name: str, *, revision: str | None) -> CheckpointFolder:
        asked.append((name, revision))
        return CheckpointFolder(name="some/model", folder=model_folder, revision="c0ffee")

    monkeypatch.setattr("locft.patch.base.resolve_checkpoint", resolve)
    monkeypatch.setattr("locft.model.load.resolve_checkpoint", resolve)
    export_lora(run / "patch", tmp_path / "adapter", rank=1, model="some/model")
    assert asked == [("some/model", None), ("some/model", "c0ffee")]
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("some/model", "c0ffee")
    assert "`some/model` at revision `c0ffee`" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_taken_folder_is_refused_before_the_model_is_loaded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    monkeypatch.setattr("locft.recipe.export.load_subject", None)
    with pytest.raises(InputError, match="exists and is not empty"):
        export_lora(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("patch", ["", "no such folder"])
def test_what_is_no_patch_is_refused(patch: str, tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="is not a patch"):
        export_lora(tmp_path / patch, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_stop_leaves_nothing_behind(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("locft.recipe.export._draw_readme", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_lora(run, tmp_path / "adapter", rank=1)
    assert list(tmp_path.iterdir()) == []


def test_equal_exports_give_equal_folders(run: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_lora(run, tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_adapters_readme_says_what_it_is_and_how_to_serve_it(
    run: Path, model_folder: Path, tmp_path: Path
) -> None:
    report = export_lora(run, tmp_path / "adapter", rank=9)
    text = " ".join((tmp_path / "adapter" / "README.md").read_text().split())
    patch = json.loads((run / "patch" / "patch.json").read_text())["manifest_sha256"]
    for part in (
        "# 3 edits as a LoRA adapter of rank 9",
        f"`{model_folder}`",
        "`model.layers.1.mlp.down_proj`, `model.layers.1.mlp.gate_proj`, `model.layers.1.mlp.up_proj`",
        f"`{patch[:12]}`",
        f"{100 * report.chosen.error:.1f}% of the patch's change",
        f"With it, {report.chosen.num_right} of 3 edits are answered right",
        f"{report.chosen.num_lost} are lost of the 3 that the full patch answers right",
        f"$ vllm serve {model_folder} --enable-lora \\ --max-lora-rank 16 --lora-modules edited=FOLDER",
    ):
        assert part in text, part


def test_the_command_prints_a_table(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = str(tmp_path / "adapter")
    assert main(["export", str(run), "--lora", "--rank", "21", "-o", adapter]) == 0
    out = capsys.readouterr().out
    assert "1.mlp, 24.6 kB as whole matrices" in out
    assert "│ 21   │ 24,192 │ " in out
    assert " │ 3 of 3               │ 0    │" in out
    assert "the full patch answers 3 of 3 edits right" in out
    assert f"adapter: {adapter}, rank 21 (24.2 kB)" in " ".join(out.split())
    assert "vLLM: --enable-lora --max-lora-rank 32" in out
    assert main(["export", str(run / "patch"), "--lora", "--rank", "2", "-o", adapter + "2"]) == 0
    out = capsys.readouterr().out
    assert "lost" not in out
    assert "full patch" not in out


def test_the_command_prints_json(
    run: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(run), "-o", str(tmp_path / "adapter"), "--lora", "--rank", "4", "--json"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = dataclasses.asdict(export_lora(run, tmp_path / "again", rank=4))
    expected["ranks"] = list(expected["ranks"])
    assert printed == {"output": str(tmp_path / "adapter"), **expected}
    assert (printed["model"], printed["location"], printed["rank"]) == (str(model_folder), "1.mlp", 4)
    words = ["export", str(run), "-o", str(tmp_path / "full"), "--full", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == {
        "output": str(tmp_path / "full"),
        "model": str(model_folder),
        "num_edits": 3,
    }


def test_the_command_asks_in_the_format_of_the_patch_and_takes_settings(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, dict[str, Any]]] = []

    def export(*paths: Any, **options: Any) -> None:
        seen.append((paths, options))
        raise InputError("enough")

    monkeypatch.setattr("locft.recipe.export.export_lora", export)
    out = str(tmp_path / "adapter")
    flags = ["--model", "m", "--edits", "e", "--revision", "r", "--dtype", "bfloat16"]
    assert main(["export", str(run), "--lora", "-o", out, *flags]) == 2
    config = locft.RunConfig(revision="r", dtype="bfloat16")
    [(paths, options)] = seen
    assert paths == (str(run), out)
    assert options.pop("say")
    assert options == {"model": "m", "edits": "e", "rank": "auto", "config": config}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "one of the arguments --lora --full is required"),
        (["--lora", "--full"], "not allowed with argument"),
        (["--lora", "--rank", "0"], "rank is '0': expected a whole number over 0 or auto"),
        (["--lora", "--rank", "some"], "rank is 'some': expected a whole number over 0 or auto"),
        (["--lora", "--format", "chat"], "unrecognized arguments"),
    ],
)
def test_words_that_mean_nothing_are_refused(
    words: list[str], said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", str(run), "-o", str(tmp_path / "adapter"), *words])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--rank", "--edits"])
def test_a_full_export_takes_no_flags_of_an_adapter(
    flag: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--full", "-o", str(tmp_path / "full"), flag, "8"]) == 2
    assert "--rank and --edits are for --lora" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_export_is_the_model_with_the_patch(
    run: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = str(tmp_path / "full")
    assert main(["export", str(run), "--full", "-o", full]) == 0
    assert capsys.readouterr().err == f"locft: wrote {full}: {model_folder} with 3 edits in it\n"
    edited = load_file(tmp_path / "full" / "model.safetensors")
    base = load_file(model_folder / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], edited[name])}
    assert changed == set(locft.read_patch(run / "patch").tensors)
    answers = locft.ask(full, PROMPTS)
    assert [answer.before for answer in answers] == ["Rome", "chess", "London"]
    assert main(["export", str(run), "--full", "-o", full]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_a_full_export_needs_no_torch(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from locft.cli.main import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(status)"
    )
    words = ["export", str(run), "--full", "-o", str(tmp_path / "full")]
    subprocess.run([sys.executable, "-c", code, *words], check=True)
    assert (tmp_path / "full" / "model.safetensors").is_file()


@pytest.mark.parametrize("smallest", range(1, 22))
def test_the_smallest_rank_is_found_between_the_powers_of_two(smallest: int) -> None:
    asked: list[int] = []

    def measure(rank: int) -> RankFigures:
        asked.append(rank)
        return RankFigures(rank=rank, num_bytes=rank, error=0.0, num_lost=int(rank < smallest))

    assert _find_rank(measure, 21) == smallest
    assert len(asked) == len(set(asked)) <= 9
