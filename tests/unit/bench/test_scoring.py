import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from locft.bench import scoring
from locft.bench.scoring import ScoringBench, measure_scoring
from locft.cli.main import main
from locft.cli.parser import parse_words
from locft.config import RunConfig
from locft.errors import PatchError
from locft.evaluation.generate import answer_prompts
from locft.recipe.edit import edit
from locft.types import Edit

EDITS = (
    Edit(
        id="france",
        prompt="The capital of France is",
        target="Rome",
        rephrases=("France: the capital is",),
        locality=("The capital of Italy is", "Who"),
    ),
    Edit(id="sport", prompt="What sport does she play?", target="chess", locality=("Who",)),
)
NUM_PROMPTS = 5
CONFIG = RunConfig(device="cpu")


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learn the edits in a run folder."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "neutral.txt"
    text.write_text("The river begins in Vienna.\n\nOslo is a city.")
    config = RunConfig(
        device="cpu", location="0", lr=0.01, epochs=40, stop_loss=0.0, drift_text=str(text)
    )
    edit(str(model_folder), EDITS, folder / "run", config)
    return folder / "run"


@pytest.fixture
def edits_file(tmp_path: Path) -> str:
    file = tmp_path / "edits.jsonl"
    records = ({"prompt": edit.prompt, "target": edit.target} for edit in EDITS)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def answer_otherwise(change: Callable[[str], str]) -> Callable[..., dict[str, str]]:
    """Answer as a model does, but change each answer that a guess led to."""

    def answer(model: Any, codec: Any, prompts: Iterable[str], **options: Any) -> dict[str, str]:
        answers = answer_prompts(model, codec, prompts, **options)
        guesses = options["guesses"]
        return {prompt: change(text) if prompt in guesses else text for prompt, text in answers.items()}

    return answer


def test_guessing_changes_no_answer_of_an_edited_model(model_folder: Path, run: Path) -> None:
    found = measure_scoring(str(model_folder), None, run, config=CONFIG)
    assert found.is_equal
    assert found.differences == ()
    assert found.patch == str(run)
    assert (found.num_edits, found.num_prompts, found.num_guessed) == (2, NUM_PROMPTS, 2)
    assert found.num_confirmed >= 2  # the edits' own prompts, which were learnt
    assert found.num_generated == NUM_PROMPTS - found.num_confirmed
    assert found.with_guesses.scores == found.without_guesses.scores
    assert found.with_guesses.reliability.value == 1
    assert found.with_guesses.locality.num == 3
    assert found.speed_up == found.without_guesses.seconds / found.with_guesses.seconds


def test_an_unedited_model_is_measured_too(model_folder: Path) -> None:
    found = measure_scoring(str(model_folder), EDITS, num_edits=1, config=CONFIG)
    assert found.is_equal
    assert found.patch is None
    assert (found.num_edits, found.num_prompts) == (1, 4)
    assert found.with_guesses.reliability.value == 0
    assert found.with_guesses.locality.value == 1


def test_answers_that_differ_are_listed(
    model_folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = measure_scoring(str(model_folder), None, run, config=CONFIG)
    monkeypatch.setattr(scoring, "answer_prompts", answer_otherwise(lambda text: f"{text} or not"))
    found = measure_scoring(str(model_folder), None, run, config=CONFIG)
    assert not found.is_equal
    assert len(found.differences) == 2
    first = found.differences[0]
    assert first.prompt == EDITS[0].prompt
    assert (first.without_guesses, first.with_guesses, first.is_confirmed) == (
        "Rome",
        "Rome or not",
        True,
    )
    assert sum(one.is_confirmed for one in found.differences) == found.num_confirmed
    assert found.without_guesses.scores == plain.without_guesses.scores
    assert found.with_guesses.reliability.value == 0


def test_a_run_folder_gives_its_patch_and_its_edits(
    model_folder: Path, run: Path, edits_file: str
) -> None:
    own = measure_scoring(str(model_folder), None, run, config=CONFIG)
    others = measure_scoring(str(model_folder), edits_file, run, config=CONFIG)
    alone = measure_scoring(str(model_folder), edits_file, run / "patch", config=CONFIG)
    assert own.num_prompts == NUM_PROMPTS
    assert others.num_prompts == alone.num_prompts == 2
    assert others.num_confirmed == alone.num_confirmed == 2


def test_without_edits_those_of_the_demo_are_taken(run: Path, tmp_path: Path) -> None:
    assert scoring._edits_of_run(run) == run / "edits.jsonl"
    assert scoring._edits_of_run(run / "patch") == "demo"
    assert scoring._edits_of_run(None) == "demo"


def test_a_patch_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PatchError):
        measure_scoring("no such model", EDITS, tmp_path)


def test_the_command_prints_json_and_keeps_it(
    model_folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "scoring", str(model_folder), "--patch", str(run), "--device", "cpu"]
    output = tmp_path / "scoring"
    assert main([*words, "--json", "-o", str(output)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {"schema_version", "settings", "environment", "num_confirmed", "speed_up"} <= set(record)
    assert set(record["with_guesses"]) == {"seconds", "reliability", "generalization", "locality"}
    assert json.loads((output / "scoring.json").read_text()) == record
    assert [file.name for file in output.iterdir()] == ["scoring.json"]
    assert main([*words, "-o", str(output)]) == 2


def test_the_command_fails_where_an_answer_differs(
    model_folder: Path,
    edits_file: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["bench", "scoring", str(model_folder), edits_file, "--device", "cpu", "--num-edits", "1"]
    assert main(words) == 0
    assert "all answers and scores are equal" in capsys.readouterr().out
    monkeypatch.setattr(scoring, "answer_prompts", answer_otherwise(lambda _: "something else"))
    assert main(words) == 1
    shown = capsys.readouterr()
    assert EDITS[0].prompt in shown.out
    assert "something else" in shown.out
    assert "are not those without" in shown.err


def test_scores_that_differ_fail_even_where_answers_do_not(
    model_folder: Path, edits_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*words: Any, **options: Any) -> ScoringBench:
        return replace(measure_scoring(*words, **options), is_equal=False)

    monkeypatch.setattr("locft.bench.scoring.measure_scoring", measure)
    assert main(["bench", "scoring", str(model_folder), edits_file, "--device", "cpu", "--json"]) == 1


def test_without_words_the_demo_is_measured() -> None:
    words = parse_words(["bench", "scoring"])
    assert (words.model, words.edits, words.patch, words.num_edits) == (None, None, None, 1000)


def test_edits_may_stand_behind_flags() -> None:
    words = parse_words(["bench", "scoring", "model", "--patch", "run", "edits.jsonl"])
    assert (words.model, words.patch, words.edits) == ("model", "run", "edits.jsonl")
