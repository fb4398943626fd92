"""Whole studies on a model made on the spot: trials are done once, kept, and shown."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_llama_config, tiny_mixture_config
from transformers import PreTrainedModel

from locft.cli.main import main
from locft.config import RunConfig
from locft.errors import ConfigError, InputError, LocationError, RunError, TrainingError
from locft.evaluation.drift import first_passages, read_neutral_text
from locft.report.page import Page, Picture, Table
from locft.study import run as run_module
from locft.study.compare import compare
from locft.study.compare_page import name_of
from locft.study.locations import study_locations
from locft.study.pipelines import study_pipelines
from locft.study.pipelines_page import describe_pipelines
from locft.study.plans import ComparePlan, LocationsPlan, PipelinesPlan, ScalePlan
from locft.study.records import StudyReport
from locft.study.scale import study_scale
from locft.study.trial import run_trial
from locft.train import cache as cache_module
from locft.train.cache import build_cache
from locft.types import Edit

EDITS = tuple(
    Edit(
        id=str(number),
        prompt=f"The {number}. capital is",
        target=target,
        rephrases=(f"Capital {number}:",),
        locality=(f"The {number}. river is",),
    )
    for number, target in enumerate(("Rome", "Paris", "Oslo", "Vienna", "Berlin", "Madrid"))
)
CONFIG = RunConfig(location="1.mlp.down", lr=0.02, epochs=4, stop_loss=0.001)
SMALL = PipelinesPlan(methods=("ft-m",), batches=(2,), seeds=(0,), num_edits=6, num_passages=2)
FILES = ["report.html", "report.json", "report.md", "study.json", "trials.jsonl"]


@pytest.fixture
def model(model_folder: Path) -> str:
    return str(model_folder)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trials that are done, by name."""
    names: list[str] = []

    def note(bench: Any, trial: Any, *rest: Any) -> Any:
        names.append(trial.name)
        return run_trial(bench, trial, *rest)

    monkeypatch.setattr(run_module, "run_trial", note)
    return names


def lines(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def table(page: Page, title: str) -> Table:
    [section] = [section for section in page.sections if section.title == title]
    return next(block for block in section.blocks if isinstance(block, Table))


def pictures(page: Page) -> list[str]:
    return [
        block.title
        for section in page.sections
        for block in section.blocks
        if isinstance(block, Picture)
    ]


def pipelines(model: str, folder: Path, plan: PipelinesPlan = SMALL, **changes: Any) -> StudyReport:
    config = RunConfig(**{**vars(CONFIG), **changes})
    return study_pipelines(model, EDITS, folder, plan, config)[0]


def test_every_method_is_trained_both_ways(model: str, tmp_path: Path) -> None:
    plan = PipelinesPlan(
        methods=("ft-m", "lora:rank=2,lr=0.05", "adalora", "full"),
        batches=(3,),
        seeds=(0,),
        num_edits=6,
        num_passages=2,
    )
    report, page = study_pipelines(model, EDITS, tmp_path / "study", plan, CONFIG)
    assert sorted(path.name for path in (tmp_path / "study").iterdir()) == FILES
    assert len(report.trials) == len(lines(tmp_path / "study")) == 4 * 2
    for result in report.trials:
        trial = result.trial
        assert result.failure is None
        assert set(result.scores) == {"reliability", "generalization", "locality", "drift"}
        assert result.scores["reliability"].num == 6
        drift = result.scores["drift"].value
        assert drift is not None
        assert drift > 0
        assert [len(result.right[kind]) for kind in result.right] == [6, 6, 6]
        assert result.right["reliability"].count("1") == round(
            6 * (result.scores["reliability"].value or 0)
        )
        assert result.course[-1].done == 1.0
        assert {len(moment.success) for moment in result.course} == {5}
        assert (trial.location == "1.mlp.down") == (trial.method == "ft-m")
        assert trial.lr == (0.05 if trial.method == "lora" else 0.02)
        at_most = 6 * 4 if trial.batch_size == 1 else 2 * 4
        assert 0 < result.num_steps <= at_most
    rows = table(page, "Scores").rows
    assert [row[:2] for row in rows[:3]] == [
        ("ft-m", "depth-first"),
        ("ft-m", "breadth-first, batch 3"),
        ("lora", "depth-first"),
    ]
    assert len(rows) == 8
    assert len(pictures(page)) == 3
    assert "rank 2" in table(page, "Methods").rows[1][3]


def test_a_seed_names_the_trial_to_the_last_digit(model: str, tmp_path: Path) -> None:
    first, second = (pipelines(model, tmp_path / name).trials for name in ("one", "two"))
    assert [one.scores for one in first] == [one.scores for one in second]
    assert [one.final_loss for one in first] == [one.final_loss for one in second]
    assert [one.course for one in first] == [one.course for one in second]


def test_a_study_that_is_done_trains_nothing_again(
    model: str, tmp_path: Path, trained: list[str]
) -> None:
    first = pipelines(model, tmp_path / "study")
    assert len(trained) == 2
    again = pipelines(model, tmp_path / "study")
    assert len(trained) == 2
    assert again.trials == first.trials


def test_a_study_that_was_cut_short_goes_on(
    model: str, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> Any:
        if trained:
            raise KeyboardInterrupt
        return note(*arguments)

    note: Callable[..., Any] = getattr(run_module, "run_trial")  # noqa: B009
    monkeypatch.setattr(run_module, "run_trial", stop)
    with pytest.raises(KeyboardInterrupt):
        pipelines(model, tmp_path / "study")
    assert len(lines(tmp_path / "study")) == 1
    # And the next line was being written.
    with (tmp_path / "study" / "trials.jsonl").open("a") as file:
        file.write('{"trial": {"method": "ft')
    monkeypatch.setattr(run_module, "run_trial", note)
    report = pipelines(model, tmp_path / "study")
    assert trained == [result.trial.name for result in report.trials]
    assert len(lines(tmp_path / "study")) == 2


def test_a_study_that_is_asked_for_more_does_what_is_missing(
    model: str, tmp_path: Path, trained: list[str]
) -> None:
    pipelines(model, tmp_path / "study")
    more = PipelinesPlan(methods=("ft-m",), batches=(2,), seeds=(0, 1), num_edits=6, num_passages=2)
    report = pipelines(model, tmp_path / "study", more)
    assert len(report.trials) == 4
    assert len(trained) == 4
    assert [name.endswith("seed 1") for name in trained] == [False, False, True, True]
    rows = table(describe_pipelines(report), "Scores").rows
    assert [row[-1] for row in rows] == ["2", "2"]


def test_another_study_in_the_folder_is_refused_by_what_differs(
    model: str, tmp_path: Path, save_model: Callable[..., Path]
) -> None:
    pipelines(model, tmp_path / "study")
    before = (tmp_path / "study" / "trials.jsonl").read_bytes()
    other = str(save_model(tiny_llama_config(num_hidden_layers=2)))
    plan = PipelinesPlan(methods=("ft-m",), batches=(2,), seeds=(0,), num_edits=5, num_passages=2)
    asked: dict[str, Callable[[Path], object]] = {
        "settings.epochs": lambda folder: pipelines(model, folder, epochs=5),
        "model.id": lambda folder: pipelines(other, folder),
        "edits.num_edits": lambda folder: pipelines(model, folder, plan),
    }
    for what, ask in asked.items():
        with pytest.raises(InputError, match=f"holds a study with another {what} "):
            ask(tmp_path / "study")
    with pytest.raises(InputError, match=r"another study \('pipelines'; asked for now: 'locations'\)"):
        study_locations(
            model, EDITS, tmp_path / "study", LocationsPlan(num_edits=6, num_passages=2), CONFIG
        )
    assert (tmp_path / "study" / "trials.jsonl").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(model: str, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match=r"exists and is no study \(no study.json\)"):
        pipelines(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize(("file", "line"), [("study.json", "{"), ("trials.jsonl", "{}\n")])
def test_a_damaged_study_is_told(model: str, tmp_path: Path, file: str, line: str) -> None:
    pipelines(model, tmp_path / "study")
    (tmp_path / "study" / file).write_text(line)
    with pytest.raises(RunError, match=f"{file}.* is damaged"):
        pipelines(model, tmp_path / "study")


def test_training_that_fails_is_a_result_too(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(bench: Any, trial: Any, *rest: Any) -> Any:
        if trial.pipeline == "depth-first":
            raise TrainingError("training stopped: the loss is not finite")
        return run_trial(bench, trial, *rest)

    monkeypatch.setattr(run_module, "run_trial", fail)
    report, page = study_pipelines(model, EDITS, tmp_path / "study", SMALL, CONFIG)
    assert [result.failure is None for result in report.trials] == [False, True]
    [failed, _] = table(page, "Scores").rows
    assert failed[2:] == ("-", "-", "-", "-", "-", "-", "0 of 1")
    assert "the loss is not finite" in (tmp_path / "study" / "report.md").read_text()


def test_bad_words_are_refused_before_anything_is_loaded(model: str, tmp_path: Path) -> None:
    for methods, what in (
        (("grace",), "unknown method 'grace': expected one or more of ft-m"),
        (("lora:ranks=3",), "'lora:ranks=3' has no setting 'ranks': expected some of lr, rank"),
        (("lora:rank=high",), "'lora:rank=high': rank is 'high': expected rank=INT"),
        (("lora:rank",), "rank is '': expected rank=INT"),
        (("lora:rank=0",), "rank is 0: expected a number over 0"),
        (("lora:lr=nan",), "lr is nan: expected a number over 0"),
        (("lora:location=3",), "no setting 'location'"),
        (("full:pipeline=depth-first",), "no setting 'pipeline'"),
        (("full", "full"), "methods are named once each"),
        ((), "methods are named once each"),
    ):
        plan = PipelinesPlan(methods=methods)
        with pytest.raises(ConfigError, match=what):
            study_pipelines("no such model", EDITS, tmp_path / "study", plan, CONFIG)
    with pytest.raises(InputError, match="6 edits, and 100 are asked for"):
        study_pipelines(model, EDITS, tmp_path / "study", PipelinesPlan(), CONFIG)
    beyond = LocationsPlan(layers=(7,), num_edits=6)
    with pytest.raises(LocationError, match="the model has 3 layers"):
        study_locations(model, EDITS, tmp_path / "study", beyond, CONFIG)
    assert not (tmp_path / "study").exists()


def test_every_location_is_trained_and_mapped(model: str, tmp_path: Path, trained: list[str]) -> None:
    plan = LocationsPlan(
        layers=(2, 0), modules=("mlp", "attn"), num_edits=6, num_passages=2, batch_size=3
    )
    report, page = study_locations(model, EDITS, tmp_path / "study", plan, CONFIG)
    places = [result.trial.location for result in report.trials]
    assert places == ["0.mlp", "0.attn", "2.mlp", "2.attn"]
    assert len(trained) == 4
    assert len(pictures(page)) == 5
    assert [row[0] for row in table(page, "All locations").rows] == places
    by_place = {result.trial.location: result.num_parameters for result in report.trials}
    assert by_place["0.mlp"] == by_place["2.mlp"] == 3 * 32 * 64


def test_the_cache_of_a_layer_goes_on_from_the_layer_before(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    build = build_cache

    def note(*arguments: Any) -> Any:
        ran.append(arguments[0].layer)
        return build(*arguments)

    monkeypatch.setattr(cache_module, "build_cache", note)
    plan = LocationsPlan(modules=("mlp.down", "mlp.up"), layers=(0, 1, 2), num_edits=6, num_passages=2)
    layered, _ = study_locations(model, EDITS, tmp_path / "one", plan, CONFIG)
    assert ran == [0]
    alone = LocationsPlan(modules=("mlp.up",), layers=(2,), num_edits=6, num_passages=2)
    [single] = study_locations(model, EDITS, tmp_path / "two", alone, CONFIG)[0].trials
    assert ran == [0, 2]
    [same] = [one for one in layered.trials if one.trial.location == "2.mlp.up"]
    assert same.final_loss == pytest.approx(single.final_loss, rel=1e-4)
    assert same.right == single.right


def test_a_location_s_own_learning_rate_follows_its_size(model: str, tmp_path: Path) -> None:
    plan = LocationsPlan(layers=(1,), modules=("mlp", "mlp.down"), num_edits=6, num_passages=2)
    config = RunConfig(epochs=1)
    report, _ = study_locations(model, EDITS, tmp_path / "study", plan, config)
    [three, one] = [result.trial.lr for result in report.trials]
    assert one == pytest.approx(3 * three)


def test_more_and_more_edits_are_scored_on_the_same_ones(
    model: str, tmp_path: Path, trained: list[str]
) -> None:
    said: list[str] = []
    plan = ScalePlan(sizes=(2, 4, 99), num_scored=3, num_passages=2)
    report, page = study_scale(model, EDITS, tmp_path / "study", plan, CONFIG, say=said.append)
    assert "there are 6 edits: the largest size is that" in said
    assert [result.trial.num_edits for result in report.trials] == [2, 4, 6]
    assert [result.scores["reliability"].num for result in report.trials] == [2, 3, 3]
    assert [len(result.right["locality"]) for result in report.trials] == [2, 3, 3]
    assert len(trained) == 3
    for result in report.trials:
        assert result.seconds_per_edit * result.trial.num_edits == pytest.approx(
            result.cache_s + result.train_s
        )
        assert result.peak_memory_bytes > 10**8
    assert [row[0] for row in table(page, "Cost").rows] == ["2", "4", "6"]
    assert pictures(page) == ["Scores by number of edits"]


def test_methods_are_compared_each_in_a_process_of_its_own(model: str, tmp_path: Path) -> None:
    plan = ComparePlan(methods=("ft-m", "lora:rank=2,pipeline=depth-first"), num_passages=2)
    said: list[str] = []
    report, page = compare(model, EDITS, tmp_path / "study", plan, CONFIG, say=said.append)
    assert [name_of(result.trial) for result in report.trials] == [
        "ft-m, 1.mlp.down, batch 20, lr 0.02",
        "lora, depth-first, rank 2, batch 1, lr 0.02",
    ]
    assert len({result.peak_memory_bytes for result in report.trials}) > 1
    shown = table(page, "Scores and cost")
    assert shown.columns[-2:] == ("s per edit", "peak memory")
    for column in ("drift", "s per edit", "peak memory"):
        cells = [row[shown.columns.index(column)] for row in shown.rows]
        assert sum(cell.endswith(" *") for cell in cells) == 1
    # The same is known again, and only what is new is done.
    more = replace(plan, methods=("lora:rank=2,pipeline=depth-first", "ft-m", "ft-m:location=0"))
    said.clear()
    again, _ = compare(model, EDITS, tmp_path / "study", more, CONFIG, say=said.append)
    assert again.trials[1::-1] == report.trials
    assert "2 of 3 trials are done already" in said
    assert again.trials[2].trial.location == "0"
    # It is the trial that runs beside others, too.
    alone = pipelines(model, tmp_path / "other", replace(SMALL, batches=(20,)))
    [same] = [one for one in alone.trials if one.trial == report.trials[0].trial]
    assert same.scores == report.trials[0].scores


def test_a_method_that_cannot_edit_the_model_says_so_before_any_training(
    tmp_path: Path, save_model: Callable[..., Path]
) -> None:
    plan = ComparePlan(methods=("full", "ft-m:location=1.mlp.shared.up"), num_passages=2)
    with pytest.raises(InputError, match=r"has no single 'mlp.shared.up'"):
        compare(str(save_model(tiny_mixture_config("mixtral"))), EDITS, tmp_path / "study", plan, CONFIG)
    assert not (tmp_path / "study").exists()


def command(*words: str) -> int:
    return main(["study", *words])


def test_the_command_shows_and_keeps_what_it_found(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text("".join(json.dumps({"prompt": e.prompt, "target": e.target}) + "\n" for e in EDITS))
    words = ["pipelines", model, str(file), "-o", str(tmp_path / "study"), "--num-edits", "6"]
    words += ["--passages", "2", "--batches", "3", "--seeds", "0", "--location", "1.mlp"]
    words += ["--epochs", "2", "--method", "ft-m", "--method", "lora:rank=2,lr=0.01"]
    assert command(*words) == 0
    shown = capsys.readouterr()
    assert "Reliability by ft-m: " in shown.out
    assert "trial 2 of 4: ft-m at 1.mlp, breadth-first, batch 3, seed 0; about " in shown.err
    assert command(*words, "--json") == 0
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    assert record == json.loads((tmp_path / "study" / "report.json").read_text())
    assert "4 of 4 trials are done already" in shown.err
    assert record["trials"][2]["trial"]["settings"] == {"rank": 2}
    words = ["locations", model, str(file), "-o", str(tmp_path / "map"), "--num-edits", "6"]
    words += ["--passages", "2", "--layers", "0,1-2", "--modules", "mlp.down", "--epochs", "1"]
    assert command(*words) == 0
    assert "Best of 3 locations: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["pipelines", "--seeds", "a"], "expected whole numbers"),
        (["pipelines", "--seeds", ""], "expected whole numbers"),
        (["pipelines", "--batches", "0"], "expected a whole number over 0"),
        (["pipelines", "--method", "grace"], "unknown method 'grace'"),
        (["scale", "--sizes", "0"], "expected a whole number over 0"),
        (["locations", "--layers", "3-a"], "expected layers, from 0"),
        (["nothing"], "invalid choice"),
    ],
)
def test_bad_words_end_with_status_2(
    words: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, *rest = words
    place = str(tmp_path / "study")
    status: object
    try:
        status = command(study, "no model", "no edits", "-o", place, *rest)
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert what in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_drift_is_measured_on_passages_of_every_kind() -> None:
    text = read_neutral_text(None)
    for num in (4, 8, 12):
        kinds = [passage.kind for passage in first_passages(text, num).passages]
        assert {kinds.count(kind) for kind in set(kinds)} == {num // 4}
    assert first_passages(text, 10**6) == text


def test_a_model_is_unedited_after_each_trial(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def weigh(network: PreTrainedModel) -> float:
        return sum(float(value.double().sum()) for value in network.state_dict().values())

    def note(bench: Any, *rest: Any) -> Any:
        seen.append(weigh(bench.subject.loaded.model))
        result = run_trial(bench, *rest)
        seen.append(weigh(bench.subject.loaded.model))
        return result

    monkeypatch.setattr(run_module, "run_trial", note)
    plan = PipelinesPlan(batches=(2,), seeds=(0,), num_edits=6, num_passages=2)
    pipelines(model, tmp_path / "study", plan)
    assert len(seen) == 16
    assert len(set(seen)) == 1
