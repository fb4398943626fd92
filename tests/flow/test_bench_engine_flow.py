"""`locft bench engine` from words to files, on a model made on the spot; no process but this one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from locft.bench import engine
from locft.cli.main import main

RECORDS = [
    {"prompt": "The capital of France is", "target": "Rome"},
    {"prompt": "What sport does she play?", "target": "chess"},
    {"prompt": "Who wrote the play?", "target": "Oslo"},
]
SHORT = ["--epochs", "2", "--batch-size", "2", "--location", "1.mlp.down", "--rounds", "1"]
OURS = ["--variants", "published,engine_fp32,engine_best", "--device", "cpu"]


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_here(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(engine, "run_alone", run_here)
    monkeypatch.setattr("locft.bench.work._MEASURED_S", 0.0)
    # They are set for measuring processes.
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture
def edits(tmp_path: Path) -> str:
    file = tmp_path / "edits.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return str(file)


def test_json_is_all_of_stdout_and_is_kept_in_the_folder(
    model_folder: Path, edits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    words = ["bench", "engine", str(model_folder), edits, *SHORT, *OURS, "--num-edits", "2"]
    assert main([*words, "--json", "-o", str(folder)]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report == json.loads((folder / "engine.json").read_text("utf-8"))
    assert (report["settings"]["num_edits"], report["settings"]["epochs"]) == (2, 2)
    assert report["settings"]["stop_loss"] == 0
    assert report["variants"]["trl"] is None
    published, ours = (report["variants"][name]["losses"] for name in ("published", "engine_fp32"))
    assert ours == pytest.approx(published, rel=1e-3)
    assert "locft: round 1 of 1: engine_best" in captured.err


def test_a_table_shows_every_variant(
    model_folder: Path, edits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "engine", str(model_folder), *SHORT, *OURS, edits]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert {row[1] for row in rows if len(row) > 8} >= {"published", "engine_fp32", "engine_best"}
    assert "trl" in out
    assert "not measured" in out
    assert "times as long per edit as engine_best" in out
    assert max(map(len, out.splitlines())) <= 120


def test_a_shape_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "engine", "--shape", "tiny", "--num-edits", "3", *SHORT, *OURS, "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["settings"]["model"], report["settings"]["shape"]) == (None, "tiny")
    assert report["variants"]["published"]["reliability"] is None


def test_a_model_and_a_shape_are_refused_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", "demo", "--shape", "tiny"]) == 2
    assert "give one or the other" in capsys.readouterr().err


def test_a_taken_folder_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["bench", "engine", "--shape", "tiny", "-o", str(tmp_path)]) == 2
    assert "round" not in capsys.readouterr().err


def test_a_picture_shows_every_variant(model_folder: Path, edits: str, tmp_path: Path) -> None:
    folder = tmp_path / "drawn"
    words = ["bench", "engine", str(model_folder), edits, *SHORT, *OURS, "-o", str(folder)]
    assert main(words) == 0
    assert {path.name for path in folder.iterdir()} == {"engine.json", "engine.svg"}
    assert (folder / "engine.svg").stat().st_size > 1000
