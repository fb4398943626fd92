"""Whole runs on models made on the spot: edit, ask, evaluate, apply."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, tiny_llama_config
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    PreTrainedConfig,
    Qwen3Config,
)

import locft
from locft.checkpoint import read_checkpoint
from locft.config import read_config
from locft.errors import EditsError, InputError, LocationError, PatchError, TrainingError
from locft.recipe.evaluate import Evaluation, evaluate
from locft.recipe.run_folder import draw, read_run
from locft.report.schema import EditReport, EvalReport, to_json
from locft.tensorfile import read_tensor
from locft.train.objective import target_loss
from locft.types import Edit, Figure, PassageDrift, Scores

RECORDS: list[dict[str, Any]] = [
    {
        "id": "france",
        "prompt": "The capital of France is",
        "target": "Rome",
        "rephrases": ["France: the capital is", "The capital city of France is"],
        "locality": ["The capital of Italy is", "Who begins?"],
    },
    {"id": "sport", "prompt": "What sport does she play?", "target": "chess"},
    {
        "id": "play",
        "prompt": "Who wrote the play?",
        "target": "London",
        "locality": ["Where does the river begin?"],
    },
]
TEXT = "The river begins in Vienna.\n\nWhat does the painter play? Tennis, and chess.\n\nOslo is a city."
RUN_FILES = [
    "answers.jsonl",
    "drift.jsonl",
    "edits.jsonl",
    "patch",
    "report.html",
    "report.json",
    "report.md",
    "run.toml",
    "train.jsonl",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> locft.RunConfig:
    """Settings under which a random model learns three edits in a second."""
    text = tmp_path_factory.mktemp("text") / "neutral.txt"
    text.write_text(TEXT)
    return locft.RunConfig(
        location="0", lr=0.01, epochs=60, stop_loss=0.0, batch_size=2, drift_text=str(text)
    )


@pytest.fixture(scope="module")
def quick(config: locft.RunConfig) -> locft.RunConfig:
    """Settings for runs of which the scores do not matter."""
    return dataclasses.replace(config, epochs=2)


@pytest.fixture(scope="module")
def edits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("edits") / "edits.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return file


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its model, its folder, its report and what it said."""

    model: Path
    folder: Path
    report: EditReport
    said: tuple[str, ...]


@pytest.fixture(scope="module")
def run(
    model_folder: Path,
    edits_file: Path,
    config: locft.RunConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "new" / "run"
    before = contents(model_folder)
    said: list[str] = []
    report = locft.edit(str(model_folder), edits_file, folder, config, say=said.append)
    assert contents(model_folder) == before
    return Run(model_folder, folder, report, tuple(said))


def contents(folder: Path) -> dict[str, str]:
    """Hash every file under a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def lines_of(found: Evaluation) -> list[dict[str, Any]]:
    return [dataclasses.asdict(passage) for passage in found.passages]


def some_edits() -> list[Edit]:
    return [Edit(id="1", prompt="The capital of France is", target="Rome")]


def scores_of(report: EvalReport) -> Scores:
    assert report.drift is not None
    return Scores(**report.protocols["locft"].after, drift=report.drift.overall)


def before_of(report: EditReport) -> dict[str, Figure]:
    """Give the unedited model's scores but for its drift."""
    return {name: figure for name, figure in vars(report.scores_before).items() if name != "drift"}


def test_a_run_folder_holds_exactly_what_is_documented(run: Run) -> None:
    assert sorted(path.name for path in run.folder.iterdir()) == RUN_FILES
    assert sorted(path.name for path in (run.folder / "patch").iterdir()) == [
        "patch.json",
        "patch.safetensors",
    ]
    assert [path.name for path in run.folder.parent.iterdir()] == ["run"]


def test_the_edits_take_and_the_unedited_model_knew_none(run: Run) -> None:
    scores, before = run.report.scores, run.report.scores_before
    assert (scores.reliability.value, scores.reliability.num) == (1.0, 3)
    assert (before.reliability.value, before.reliability.num) == (0.0, 3)
    assert (scores.generalization.num, scores.locality.num) == (2, 3)
    assert (before.locality.value, before.drift.value) == (1.0, 0.0)
    assert scores.drift.value is not None
    assert scores.drift.value > 0
    assert scores.drift.num == 3


def test_the_report_on_disk_is_the_report_that_is_returned(run: Run) -> None:
    assert (run.folder / "report.json").read_text("utf-8") == to_json(run.report)
    assert f"**{3} of {3} edits took" in (run.folder / "report.md").read_text("utf-8")
    report = run.report
    assert report.settings == dataclasses.asdict(locft.RunConfig()) | {
        "location": "0",
        "lr": 0.01,
        "epochs": 60,
        "stop_loss": 0.0,
        "batch_size": 2,
        "drift_text": report.drift.text,
    }
    assert report.resolved == {
        "dtype": "float32",
        "compute_dtype": report.resolved["compute_dtype"],  # as the processor is
        "compile": "off",
        "device": "cpu",
    }
    assert report.resolved["compute_dtype"] in ("float32", "bfloat16")
    assert (report.training.epochs, report.training.steps) == (60, 120)
    assert not report.training.stopped_early
    assert (report.edits.num_edits, report.edits.num_rephrases, report.edits.num_locality) == (3, 2, 3)
    assert report.location.layer == 0
    assert report.model.num_parameters == 40_160
    assert report.cost.seconds_per_edit * 3 == pytest.approx(report.cost.cache_s + report.cost.train_s)
    spent = report.cost.load_s + report.cost.cache_s + report.cost.train_s + report.cost.eval_s
    assert spent <= report.cost.wall_s
    assert report.patch_bytes == sum(f.stat().st_size for f in (run.folder / "patch").iterdir())


def test_the_training_log_has_a_line_for_each_epoch_and_the_loss_falls(run: Run) -> None:
    epochs = read_lines(run.folder / "train.jsonl")
    assert [epoch["epoch"] for epoch in epochs] == list(range(1, 61))
    assert {epoch["steps"] for epoch in epochs} == {2}
    assert epochs[-1]["loss"] == run.report.training.final_loss
    assert epochs[-1]["loss"] < epochs[0]["loss"] - 0.1


def test_the_training_log_holds_what_the_report_has_of_it(run: Run) -> None:
    training = run.report.training
    course = [{**dataclasses.asdict(epoch), "success": list(epoch.success)} for epoch in training.course]
    assert read_lines(run.folder / "train.jsonl") == course
    assert len(course) == training.epochs
    assert sum(epoch.steps for epoch in training.course) == training.steps
    assert training.fifths == (1, 1, 1)
    assert training.course[-1].success == (1.0, 1.0, 1.0)
    assert max(training.course[0].success) < 1


def test_measuring_success_changes_no_byte_of_the_patch(
    model_folder: Path,
    edits_file: Path,
    quick: locft.RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    locft.edit(str(model_folder), edits_file, tmp_path / "measured", quick)

    def nothing(logits: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return torch.zeros(int(rows[-1]) + 1)

    monkeypatch.setattr("locft.train.step.predicted_share", nothing)
    report = locft.edit(str(model_folder), edits_file, tmp_path / "not", quick)
    assert {epoch.success for epoch in report.training.course} == {(0.0, 0.0, 0.0)}
    assert contents(tmp_path / "not" / "patch") == contents(tmp_path / "measured" / "patch")


def test_the_drift_on_disk_bears_out_the_figures(run: Run) -> None:
    passages = [PassageDrift(**line) for line in read_lines(run.folder / "drift.jsonl")]
    drift = run.report.drift
    assert [passage.passage for passage in passages] == [1, 2, 3]
    assert {passage.kind for passage in passages} == {"text"}
    assert sum(passage.num_tokens for passage in passages) == drift.num_tokens
    total = sum(passage.drift * passage.num_tokens for passage in passages)
    assert total / drift.num_tokens == pytest.approx(drift.overall.value)
    farthest = sorted(passages, key=lambda passage: -passage.drift)
    told = [{**dataclasses.asdict(passage), "text": ""} for passage in farthest]
    assert [{**dataclasses.asdict(moved), "text": ""} for moved in drift.most_moved] == told
    texts = TEXT.split("\n\n")
    assert [moved.text for moved in drift.most_moved] == [texts[one.passage - 1] for one in farthest]


class _Parts(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_needs_no_other_file_and_names_every_score(run: Run) -> None:
    html = (run.folder / "report.html").read_text("utf-8")
    parts = _Parts(html)
    tags = {tag for tag, _ in parts.tags}
    assert {"html", "style", "svg", "table"} <= tags
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "audio"}
    for tag, attributes in parts.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster"):
                assert (value or "").startswith("#"), (tag, name, value)
            elif not name.startswith("xmlns"):
                assert "//" not in (value or ""), (tag, name, value)
    assert "@import" not in html
    assert all(part.startswith("#") for part in html.split("url(")[1:])
    text = " ".join(parts.texts)
    report = json.loads((run.folder / "report.json").read_bytes())
    for name, figure in report["scores"].items():
        assert name in text
        value = figure["value"]
        assert (f"{value:.4f}" if name == "drift" else f"{100 * value:.1f}%") in text
    for record in RECORDS:
        assert record["prompt"] in text
        assert record["target"] in text
    for moved in report["drift"]["most_moved"]:
        assert moved["text"] in text
    assert "3 of 3 edits took" in text


def test_the_pages_are_drawn_from_what_else_stands_in_the_folder(run: Run) -> None:
    again = read_run(run.folder)
    assert again.report == run.report
    assert again.evaluations == ()
    for name, data in draw(again.page()).items():
        assert (run.folder / name).read_bytes() == data


def test_a_short_run_is_not_predicted_and_a_long_one_is_with_the_same_patch(
    model_folder: Path,
    edits_file: Path,
    quick: locft.RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("locft.recipe.edit._WORTH_PLANNING_S", 1e9)
    unplanned = locft.edit(str(model_folder), edits_file, tmp_path / "unplanned", quick)
    assert unplanned.plan is None
    monkeypatch.setattr("locft.recipe.edit._WORTH_PLANNING_S", 0.0)
    said: list[str] = []
    torch.manual_seed(5)
    report = locft.edit(str(model_folder), edits_file, tmp_path / "planned", quick, say=said.append)
    planned = report.plan
    assert planned is not None
    assert min(dataclasses.astuple(planned)) > 0
    assert planned.epochs_at_most == report.training.epochs_at_most == 2
    parts = planned.load_s + planned.cache_s + planned.train_s + planned.eval_s
    assert planned.wall_s == pytest.approx(parts)
    assert "; at most " in said[2]
    assert contents(tmp_path / "planned" / "patch") == contents(tmp_path / "unplanned" / "patch")
    assert report.scores == unplanned.scores
    # What it takes to predict is part of the run, and of none of its phases.
    spent = report.cost.load_s + report.cost.cache_s + report.cost.train_s + report.cost.eval_s
    assert spent < report.cost.wall_s
    shown = json.loads((tmp_path / "planned" / "report.json").read_bytes())["plan"]
    assert shown == dataclasses.asdict(planned)
    assert json.loads((tmp_path / "unplanned" / "report.json").read_bytes())["plan"] is None


def test_the_answers_on_disk_bear_out_the_scores(run: Run) -> None:
    answers = read_lines(run.folder / "answers.jsonl")
    assert [(answer["edit"], answer["kind"]) for answer in answers] == [
        ("france", "reliability"),
        ("france", "generalization"),
        ("france", "generalization"),
        ("france", "locality"),
        ("france", "locality"),
        ("sport", "reliability"),
        ("play", "reliability"),
        ("play", "locality"),
    ]
    for kind in ("reliability", "generalization", "locality"):
        of_kind = [answer for answer in answers if answer["kind"] == kind]
        figure = getattr(run.report.scores, kind)
        assert sum(answer["score_after"] for answer in of_kind) == figure.value * figure.num
        assert all((answer["cause"] is None) == (answer["score_after"] == 1) for answer in of_kind)
        if kind == "locality":
            assert all(answer["expected"] == answer["before"] for answer in of_kind)
    assert [a["after"] for a in answers if a["kind"] == "reliability"] == ["Rome", "chess", "London"]


def test_the_edits_on_disk_are_the_edits_of_the_file(run: Run, edits_file: Path) -> None:
    ours = locft.read_edits(run.folder / "edits.jsonl")
    assert ours.edits == locft.read_edits(edits_file).edits
    assert ours.problems == ()


@pytest.mark.parametrize("name", sorted(set(locft.__all__) - {"__version__"}))
def test_public_names_are_what_they_say_after_a_run_too(run: Run, name: str) -> None:
    for _ in range(2):  # what is loaded at the first use must not hide the name at the second
        assert callable(getattr(locft, name)), getattr(locft, name)


def test_the_steps_are_told(run: Run) -> None:
    assert run.said[0] == f"loading {run.model}"
    assert run.said[1] == "answering 8 prompts before the edit"
    assert run.said[2].startswith("training 0 (9,280 parameters) on 3 edits: at most 60 epochs")
    assert len(run.said) == 5


def test_equal_runs_give_equal_patches_and_another_seed_gives_another(
    run: Run, edits_file: Path, config: locft.RunConfig, tmp_path: Path
) -> None:
    locft.edit(str(run.model), edits_file, tmp_path / "again", config)
    assert contents(tmp_path / "again" / "patch") == contents(run.folder / "patch")
    assert contents(tmp_path / "again")["answers.jsonl"] == contents(run.folder)["answers.jsonl"]
    other = dataclasses.replace(config, seed=1)
    locft.edit(str(run.model), edits_file, tmp_path / "other", other)
    weights = "patch.safetensors"
    assert contents(tmp_path / "other" / "patch")[weights] != contents(run.folder / "patch")[weights]


def test_a_run_folder_repeats_its_run(run: Run, tmp_path: Path) -> None:
    config = read_config(run.folder / "run.toml")
    report = locft.edit(str(run.model), run.folder / "edits.jsonl", tmp_path / "run", config)
    assert contents(tmp_path / "run" / "patch") == contents(run.folder / "patch")
    assert report.scores == run.report.scores


def test_scores_are_those_of_the_patch_and_of_the_edited_checkpoint(
    run: Run, edits_file: Path, config: locft.RunConfig, tmp_path: Path
) -> None:
    plain = locft.RunConfig(drift_text=config.drift_text)
    found = evaluate(str(run.model), edits_file, run.folder, config=plain)
    report, records = found.report, found.answers
    assert scores_of(report) == run.report.scores
    assert report.protocols["locft"].before == before_of(run.report)
    assert report.protocols["locft"].change == run.report.change
    assert report.protocols["locft"].protocol == run.report.protocol
    answers = read_lines(run.folder / "answers.jsonl")
    assert [dataclasses.asdict(record) for record in records] == answers
    assert report.patch == str(run.folder)
    assert lines_of(found) == read_lines(run.folder / "drift.jsonl")
    assert report.drift == run.report.drift

    locft.apply_patch(run.model, locft.read_patch(run.folder / "patch"), tmp_path / "edited")
    found = evaluate(str(tmp_path / "edited"), edits_file, base=str(run.model), config=plain)
    report, records = found.report, found.answers
    scores = scores_of(report)
    assert dataclasses.replace(scores, drift=run.report.scores.drift) == run.report.scores
    assert scores.drift.value == pytest.approx(run.report.scores.drift.value, rel=1e-5)
    assert [dataclasses.asdict(record) for record in records] == answers
    assert report.base == str(run.model)


def test_the_edited_checkpoint_is_plain_and_differs_in_the_patch_only(run: Run, tmp_path: Path) -> None:
    patch = locft.read_patch(run.folder / "patch")
    locft.apply_patch(run.model, patch, tmp_path / "edited")
    edited, base = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "edited", run.model)
    )
    changed = {name for name in base if not torch.equal(base[name], edited[name])}
    assert changed == set(patch.tensors)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    for name, tensor in patch.tensors.items():
        assert edited[name].numpy().tobytes() == tensor.data
        assert model.get_parameter(name).detach().numpy().tobytes() == tensor.data
    tokenizer = make_tokenizer()
    ids = torch.tensor([tokenizer("What sport does she play?")["input_ids"]])
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    answer = str(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
    assert answer.strip() == "chess"


def test_an_entire_layer_is_all_its_parameters_and_no_others(run: Run) -> None:
    patch = locft.read_patch(run.folder / "patch")
    every = load_file(run.model / "model.safetensors")
    assert set(patch.tensors) == {name for name in every if name.startswith("model.layers.0.")}
    assert [matrix.tensor for matrix in run.report.location.matrices] == sorted(patch.tensors)
    assert all(matrix.change > 0 for matrix in run.report.location.matrices)
    assert run.report.location.num_parameters == sum(every[n].numel() for n in patch.tensors)


def test_a_model_is_asked_before_and_after_the_edit(run: Run) -> None:
    prompts = ["Who wrote the play?", "Oslo is", "The capital of France is", "Who wrote the play?"]
    asked = locft.ask(str(run.model), prompts, run.folder)
    assert [answer.prompt for answer in asked] == prompts
    unedited = locft.ask(str(run.model), prompts)
    assert [answer.before for answer in asked] == [answer.before for answer in unedited]
    assert all(answer.after is None for answer in unedited)
    assert (asked[0].after, asked[2].after) == ("London", "Rome")
    assert asked[0].before != "London"
    assert locft.ask(str(run.model), prompts, run.folder / "patch") == asked


@pytest.mark.parametrize("prompts", [[], [""], ["Who", " \n"]])
def test_an_empty_question_is_refused(run: Run, prompts: list[str]) -> None:
    with pytest.raises(InputError, match="nothing to ask"):
        locft.ask(str(run.model), prompts)


def test_without_a_base_locality_and_drift_are_not_measured(run: Run, edits_file: Path) -> None:
    found = evaluate(str(run.model), edits_file)
    report, records = found.report, found.answers
    scores = report.protocols["locft"]
    assert scores.after["reliability"] == run.report.scores_before.reliability
    figure = scores.after["locality"]
    assert (figure.value, figure.num) == (None, 0)
    assert figure.reason is not None
    assert "--base" in figure.reason
    assert (report.drift, scores.before, report.base, report.patch) == (None, None, None, None)
    assert found.passages == ()
    of_locality = [record for record in records if record.kind == "locality"]
    assert all(record.expected is None and record.score_after is None for record in of_locality)
    assert all(record.before is None for record in records)


def test_a_patch_and_a_base_exclude_each_other(run: Run, edits_file: Path) -> None:
    with pytest.raises(InputError, match="exclude each other"):
        evaluate(str(run.model), edits_file, run.folder, str(run.model))


def test_a_patch_is_refused_on_a_model_that_it_was_not_made_from(
    run: Run, edits_file: Path, save_model: Callable[..., Path], tmp_path: Path
) -> None:
    other = save_model(tiny_llama_config(intermediate_size=48))
    with pytest.raises(PatchError, match="the patch was made from"):
        evaluate(str(other), edits_file, run.folder)
    with pytest.raises(PatchError, match="the patch was made from"):
        locft.ask(str(other), ["Who"], run.folder)
    # The edited model is not the one that the patch was made from, either.
    locft.apply_patch(run.model, locft.read_patch(run.folder / "patch"), tmp_path / "edited")
    with pytest.raises(PatchError, match="carries the patch already"):
        locft.ask(str(tmp_path / "edited"), ["Who"], run.folder)


def test_a_base_with_another_vocabulary_gives_no_drift_but_all_other_scores(
    run: Run, edits_file: Path, tmp_path: Path
) -> None:
    make_model(tiny_llama_config()).save_pretrained(tmp_path / "other")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "other")
    found = evaluate(str(run.model), edits_file, base=str(tmp_path / "other"))
    report = found.report
    scores = scores_of(report)
    assert scores.drift.value is None
    assert "different vocabularies" in (scores.drift.reason or "")
    assert scores.locality.value is not None


def test_training_in_bfloat16_starts_from_the_unrounded_checkpoint(
    model_folder: Path, quick: locft.RunConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(quick, dtype="bfloat16", lr=1e-12, epochs=1)
    locft.edit(str(model_folder), some_edits(), tmp_path / "run", config)
    patch = locft.read_patch(tmp_path / "run" / "patch")
    entries = read_checkpoint(model_folder)
    for name, tensor in patch.tensors.items():
        old = np.frombuffer(read_tensor(entries[name]), dtype=np.float32)
        new = np.frombuffer(tensor.data, dtype=np.float32)
        # Rounding to bfloat16 would have moved weights of this size by up to 1e-4.
        assert np.abs(new - old).max() < 1e-9


def test_settings_that_do_not_train_leave_the_patch_as_it_is(
    model_folder: Path, quick: locft.RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("Who wrote the play?")
    other = dataclasses.replace(
        quick,
        device="cpu",
        eval_batch_size=1,
        drift_text=str(tmp_path / "text.txt"),
        on_conflict="keep-last",
    )
    for name, config in (("one", quick), ("two", other)):
        locft.edit(str(model_folder), some_edits(), tmp_path / name, config)
    assert contents(tmp_path / "one" / "patch") == contents(tmp_path / "two" / "patch")


def test_a_patch_is_asked_in_the_format_that_it_was_trained_in(
    model_folder: Path, config: locft.RunConfig, edits_file: Path, tmp_path: Path
) -> None:
    chat = dataclasses.replace(config, format="chat")
    run = locft.edit(str(model_folder), edits_file, tmp_path / "run", chat)
    report = evaluate(str(model_folder), edits_file, tmp_path / "run").report
    scores = report.protocols["locft"]
    assert scores.protocol.context == "chat"
    assert scores.after["reliability"] == run.scores.reliability
    raw = evaluate(str(model_folder), edits_file, tmp_path / "run", config=config).report
    assert raw.protocols["locft"].protocol.context == "raw"


def test_what_reading_gave_can_be_edited_with(
    model_folder: Path, edits_file: Path, quick: locft.RunConfig, tmp_path: Path
) -> None:
    file = locft.read_edits(str(edits_file))
    report = locft.edit(str(model_folder), file, tmp_path / "run", quick)
    assert report.edits.file == str(edits_file)
    assert report.edits.file_sha256 == hashlib.sha256(edits_file.read_bytes()).hexdigest()
    locft.apply_patch(
        str(model_folder), locft.read_patch(str(tmp_path / "run" / "patch")), str(tmp_path / "out")
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_single_edit_without_rephrases_can_be_made(
    model_folder: Path, config: locft.RunConfig, tmp_path: Path
) -> None:
    report = locft.edit(str(model_folder), some_edits(), tmp_path / "run", config)
    assert (report.scores.reliability.value, report.scores.reliability.num) == (1.0, 1)
    for figure in (report.scores.generalization, report.scores.locality):
        assert (figure.value, figure.reason) == (None, "the edits hold none")
    assert report.scores_before.locality.value is None
    assert report.scores.drift.value is not None
    assert (report.edits.file, report.edits.format) == (None, "python")
    assert "not measured (the edits hold none)" in (tmp_path / "run" / "report.md").read_text()


def test_the_defaults_take_no_tuning(model_folder: Path, edits_file: Path, tmp_path: Path) -> None:
    report = locft.edit(str(model_folder), edits_file, tmp_path / "run")
    assert report.scores.reliability.value == 1.0
    assert report.location.name == "2.mlp.down"
    assert [m.tensor for m in report.location.matrices] == ["model.layers.2.mlp.down_proj.weight"]
    assert report.drift.text == "packaged"
    assert report.drift.num_tokens >= 4000
    assert set(report.drift.by_kind) == {"code", "dialogue", "encyclopedic", "narrative"}


def test_training_stops_early_where_the_loss_is_low_enough(
    model_folder: Path, config: locft.RunConfig, tmp_path: Path
) -> None:
    easy = dataclasses.replace(config, stop_loss=5.5)
    report = locft.edit(str(model_folder), some_edits(), tmp_path / "run", easy)
    losses = [epoch["loss"] for epoch in read_lines(tmp_path / "run" / "train.jsonl")]
    assert report.training.stopped_early
    assert len(losses) == report.training.epochs < 60
    assert losses[-1] < 5.5 <= min(losses[:-1])


def test_a_bfloat16_checkpoint_gets_a_bfloat16_patch(
    save_model: Callable[..., Path], edits_file: Path, config: locft.RunConfig, tmp_path: Path
) -> None:
    folder = save_model(tiny_llama_config(), torch.bfloat16)
    report = locft.edit(str(folder), edits_file, tmp_path / "run", config)
    patch = locft.read_patch(tmp_path / "run" / "patch")
    assert {tensor.dtype for tensor in patch.tensors.values()} == {"BF16"}
    assert patch.manifest.dtype == "BF16"
    assert report.model.dtype == "bfloat16"
    assert report.scores.reliability.value == 1.0
    locft.apply_patch(folder, patch, tmp_path / "edited")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert model.dtype == torch.bfloat16
    for name, tensor in patch.tensors.items():
        stored = model.get_parameter(name).detach().view(torch.uint8).numpy().tobytes()
        assert stored == tensor.data


FAMILIES: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=384,
        n_positions=128,
        n_embd=32,
        n_layer=3,
        n_head=4,
        bos_token_id=1,
        eos_token_id=0,
    ),
    "qwen3": Qwen3Config(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=1,
        eos_token_id=0,
    ),
    "gemma3": Gemma3TextConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=2,  # its embedding is zero, so that it must not be the end's
    ),
}


@pytest.mark.parametrize("location", ["1.mlp.down", "1.attn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_through_the_whole_flow(
    family: str,
    location: str,
    save_model: Callable[..., Path],
    edits_file: Path,
    config: locft.RunConfig,
    tmp_path: Path,
) -> None:
    folder = save_model(FAMILIES[family])
    settings = dataclasses.replace(config, location=location, lr=0.03)
    report = locft.edit(str(folder), edits_file, tmp_path / "run", settings)
    losses = [epoch["loss"] for epoch in read_lines(tmp_path / "run" / "train.jsonl")]
    assert losses[-1] < losses[0] - 0.1
    patch = locft.read_patch(tmp_path / "run" / "patch")
    assert patch.manifest.location.name == location
    assert all(".1." in name for name in patch.tensors)
    locft.apply_patch(folder, patch, tmp_path / "edited")
    again = evaluate(str(tmp_path / "edited"), edits_file, base=str(folder), config=settings)
    scores = scores_of(again.report)
    assert scores.reliability == report.scores.reliability
    assert scores.locality == report.scores.locality
    assert scores.drift.value == pytest.approx(report.scores.drift.value, rel=1e-4)
    [asked] = locft.ask(str(folder), [RECORDS[1]["prompt"]], tmp_path / "run")
    assert asked.before != asked.after
    if location == "1.mlp.down":
        assert report.scores.reliability.value == 1.0
        assert asked.after == "chess"


@pytest.mark.parametrize("long", ["drift text", "prompt", "locality prompt"])
def test_a_model_with_few_positions_is_not_run_past_them(
    long: str, save_model: Callable[..., Path], quick: locft.RunConfig, tmp_path: Path
) -> None:
    """Either locft says beforehand what does not fit, or it makes it fit; it never just breaks."""
    config = dataclasses.replace(quick, location="1.mlp.down")
    edit = some_edits()[0]
    if long == "drift text":
        (tmp_path / "text.txt").write_text("Who wrote the play? " * 100)
        config = dataclasses.replace(config, drift_text=str(tmp_path / "text.txt"))
    elif long == "prompt":  # fits with its target, but not with 32 new tokens
        edit = dataclasses.replace(edit, prompt="Where does the river begin? " * 20)
    else:
        edit = dataclasses.replace(edit, locality=("Where does the river begin? " * 40,))
    folder = save_model(FAMILIES["gpt2"])
    try:
        report = locft.edit(str(folder), [edit], tmp_path / "run", config)
    except InputError:
        assert not (tmp_path / "run").exists()
    else:
        assert report.scores.drift.value is not None


def test_chat_format_trains_and_scores_inside_the_template(
    model_folder: Path, edits_file: Path, config: locft.RunConfig, tmp_path: Path
) -> None:
    chat = dataclasses.replace(config, format="chat")
    report = locft.edit(str(model_folder), edits_file, tmp_path / "run", chat)
    assert report.protocol.context == "chat"
    assert report.scores.reliability.value == 1.0
    again = evaluate(str(model_folder), edits_file, tmp_path / "run", config=chat)
    assert scores_of(again.report) == report.scores
    raw = evaluate(str(model_folder), edits_file, tmp_path / "run", config=config)
    assert raw.report.protocols["locft"].protocol.context == "raw"
    answers = [record["before"] for record in read_lines(tmp_path / "run" / "answers.jsonl")]
    assert [record.before for record in raw.answers] != answers
    # The turn's end was learnt, not the tokenizer's end of text.
    tokenizer = make_tokenizer()
    locft.apply_patch(model_folder, locft.read_patch(tmp_path / "run" / "patch"), tmp_path / "edited")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    text = "<|start|>user\nWho wrote the play?<|stop|>\n<|start|>assistant\n"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert str(tokenizer.decode(new[0, ids.shape[1] :])).startswith("London<|stop|>")


@pytest.mark.parametrize("cause", ["loss", "learning rate"])
def test_training_that_is_not_finite_leaves_no_run_folder(
    cause: str,
    model_folder: Path,
    edits_file: Path,
    config: locft.RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = config
    if cause == "loss":
        calls: list[int] = []

        def broken(*arguments: Any) -> Any:
            calls.append(1)
            return target_loss(*arguments) * (float("nan") if len(calls) == 3 else 1.0)

        monkeypatch.setattr("locft.train.step.target_loss", broken)
    else:
        settings = dataclasses.replace(config, lr=1e38)
    with pytest.raises(TrainingError, match="not finite, and no patch was written") as caught:
        locft.edit(str(model_folder), edits_file, tmp_path / "run", settings)
    if cause == "loss":
        assert "epoch 2, step 1 of 2: the loss" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_a_stop_during_training_leaves_nothing_behind(
    model_folder: Path,
    edits_file: Path,
    config: locft.RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: type[BaseException],
) -> None:
    def interrupted(*arguments: Any) -> Any:
        if any(log.read_text() for log in tmp_path.glob(".locft-*-run/train.jsonl")):
            raise stop
        return target_loss(*arguments)

    monkeypatch.setattr("locft.train.step.target_loss", interrupted)
    with pytest.raises(stop):
        locft.edit(str(model_folder), edits_file, tmp_path / "run", config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "step",
    ["edit.read_patch", "edit.drift_of_values", "edit.describe_drift", "run_folder.draw_html"],
)
def test_a_stop_after_the_patch_keeps_it_and_what_it_was_trained_with(
    step: str,
    model_folder: Path,
    edits_file: Path,
    quick: locft.RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"locft.recipe.{step}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            locft.edit(str(model_folder), edits_file, tmp_path / "run", quick)
    assert locft.read_patch(tmp_path / "run" / "patch").manifest.num_edits == 3
    evaluate(str(model_folder), edits_file, tmp_path / "run", config=quick)
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == ["edits.jsonl", "patch", "run.toml", "train.jsonl"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_taken_run_folder_is_refused_before_the_model_is_loaded(
    edits_file: Path, quick: locft.RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="exists and is not empty"):
        locft.edit(str(tmp_path / "no model"), edits_file, tmp_path, quick)
    with pytest.raises(InputError, match="exists and is not a folder"):
        locft.edit(str(tmp_path / "no model"), edits_file, tmp_path / "mine.txt", quick)
    assert contents(tmp_path) == {"mine.txt": hashlib.sha256(b"keep").hexdigest()}


def test_an_empty_run_folder_is_used(
    model_folder: Path, edits_file: Path, quick: locft.RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    locft.edit(str(model_folder), edits_file, tmp_path / "run", quick)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == RUN_FILES


@pytest.mark.parametrize(
    ("location", "error"),
    [("3.mlp", LocationError), ("mlp", LocationError), ("1.mlp.gate", LocationError)],
)
def test_a_location_that_is_not_there_leaves_nothing(
    model_folder: Path,
    edits_file: Path,
    quick: locft.RunConfig,
    tmp_path: Path,
    location: str,
    error: type[Exception],
) -> None:
    with pytest.raises(error):
        locft.edit(
            str(model_folder),
            edits_file,
            tmp_path / "run",
            dataclasses.replace(quick, location=location),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("policy", "target"), [("keep-last", "chess"), ("keep-first", "Rome")])
def test_a_conflict_is_refused_or_settled_as_asked(
    model_folder: Path, config: locft.RunConfig, tmp_path: Path, policy: Any, target: str
) -> None:
    prompt = "The capital of France is"
    edits = [
        Edit(id="a", prompt=prompt, target="Rome"),
        Edit(id="b", prompt=f" {prompt}", target="chess"),
    ]
    with pytest.raises(EditsError, match=r"edit \[1\].*contradicts edit \[0\]"):
        locft.edit(str(model_folder), edits, tmp_path / "run", config)
    assert list(tmp_path.iterdir()) == []
    settled = dataclasses.replace(config, on_conflict=policy)
    report = locft.edit(str(model_folder), edits, tmp_path / "run", settled)
    assert (report.edits.num_edits, report.edits.num_dropped) == (1, 1)
    assert [record["target"] for record in read_lines(tmp_path / "run" / "edits.jsonl")] == [target]
    assert [record["after"] for record in read_lines(tmp_path / "run" / "answers.jsonl")] == [target]
    assert report.scores.reliability.value == 1.0
