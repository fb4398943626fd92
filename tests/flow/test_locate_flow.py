"""A location is looked for on a model made on the spot: many on a few edits, few on more."""

import dataclasses
import itertools
import json
import math
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_mixture_config

import locft
from locft.cli.main import main
from locft.config import RunConfig, seconds_of
from locft.errors import ConfigError, InputError, TrainingError
from locft.evaluation.drift import read_neutral_text
from locft.evaluation.metrics import is_match
from locft.evaluation.subject import Subject, load_subject
from locft.methods import Plan, ft_m
from locft.model.split import split_model
from locft.recipe import locate as locate_module
from locft.recipe.locate import Found, Outcome, find_location, locate
from locft.recipe.locate_page import describe_found, front_of
from locft.recipe.plan import plan
from locft.recipe.preference import Preference, value_of
from locft.train.cache import build_cache
from locft.train.loop import Schedule, run_breadth_first
from locft.train.step import Stepper
from locft.types import Edit, Figure

TARGETS = ("Rome", "Paris", "Oslo", "Vienna", "Berlin", "Madrid", "tennis", "chess")
EDITS = tuple(
    Edit(
        id=str(number),
        prompt=f"Number {number} in {number % 3}",
        target=TARGETS[number % len(TARGETS)],
        rephrases=(f"In {number % 3}, number {number}", f"{number} is the number")[: number % 3],
    )
    for number in range(20)
)
CONFIG = RunConfig(lr=0.02)
TEXT = read_neutral_text(None)


@pytest.fixture(scope="module")
def subject(model_folder: Path) -> Subject:
    return load_subject(str(model_folder), CONFIG)


@pytest.fixture(scope="module")
def edits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("edits") / "edits.jsonl"
    records = ({"prompt": edit.prompt, "target": edit.target} for edit in EDITS)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try few locations, shortly."""
    monkeypatch.setattr(locate_module, "_EPOCHS", 2)
    monkeypatch.setattr(locate_module, "_NUM_WINDOWS", 4)


def search(subject: Subject, budget_s: float = 60, prefer: Preference = "balanced") -> Found:
    return find_location(subject, EDITS, TEXT, budget_s, prefer, CONFIG)


def weigh(subject: Subject) -> list[float]:
    return [float(value.double().sum()) for value in subject.loaded.model.state_dict().values()]


@pytest.mark.usefixtures("quick")
def test_the_better_locations_are_tried_again_on_more_edits(subject: Subject) -> None:
    before = weigh(subject)
    found = search(subject)
    assert weigh(subject) == before
    assert not any(one.requires_grad for one in subject.loaded.model.parameters())
    sizes = [len(outcomes) for outcomes in found.rounds]
    edits = [{one.num_edits for one in outcomes} for outcomes in found.rounds]
    assert len(sizes) >= 2
    assert sizes == sorted(sizes, reverse=True)
    assert all(len(nums) == 1 for nums in edits)
    assert [min(nums) for nums in edits] == sorted(min(nums) for nums in edits)
    for earlier, later in itertools.pairwise(found.rounds):
        ranked = [one.location for one in earlier]
        kept = [one.location for one in later if one.location in ranked]
        assert set(ranked[: len(kept)]) == set(kept)
    for outcomes in found.rounds:
        values = [one.value for one in outcomes]
        assert values == sorted(values, key=lambda value: -math.inf if value is None else -value)
        for one in outcomes:
            assert one.value == pytest.approx(value_of(one.scores, "balanced"))
    assert found.location == found.rounds[-1][0].location
    assert found.runner_up == found.rounds[-1][1].location
    assert found.lead is not None
    assert found.lead.value is not None
    assert found.lead.value >= 0
    assert 0 < found.certainty <= 1


@pytest.mark.usefixtures("quick")
def test_a_preference_decides_what_is_recommended(subject: Subject) -> None:
    careful, far = search(subject, prefer="preservation"), search(subject, prefer="generalization")

    def drift(found: Found) -> float:
        value = found.rounds[-1][0].scores["drift"].value
        assert value is not None
        return value

    assert drift(careful) <= drift(far)
    assert careful.rule != far.rule


def test_what_is_predicted_is_what_would_be_answered(model_folder: Path) -> None:
    subject = load_subject(str(model_folder), CONFIG)
    network = subject.loaded.model
    examples = [subject.codec.encode(edit) for edit in EDITS]
    schedule = Schedule(lr=0.01, batch_size=5, epochs=60, stop_loss=0.0, loss_mean="sample", seed=0)
    with ft_m.METHOD.attach(network, Plan(location="0", num_steps=0, seed=0)) as tuning:
        split = split_model(network, 0)
        cache = build_cache(split, examples)
        with tuning.trainable.alone(network), split.tail() as tail:
            run_breadth_first(Stepper(tail, cache, tuning.trainable, 0.01, "sample"), schedule)
            parts = list(locate_module._answers(tail, cache))
            exact = np.concatenate([locate_module._exact(*part) for part in parts])
            likely = np.concatenate([locate_module._likelihood(*part) for part in parts])
        answers = subject.answer([edit.prompt for edit in EDITS], "test")
    right = [is_match(answers[edit.prompt], edit.target) for edit in EDITS]
    assert 0 < sum(right) < len(right)
    assert exact.tolist() == [float(one) for one in right]
    assert ((likely > 0) & (likely < 1)).all()
    assert likely[exact == 1].min() > likely[exact == 0].mean()


@pytest.mark.usefixtures("quick")
def test_time_that_is_up_ends_the_search_with_what_is_there(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []
    real, clock = locate_module._try, time.perf_counter

    def slow(ground: Any, name: str, *rest: Any) -> Any:
        tries.append(name)
        return real(ground, name, *rest)

    monkeypatch.setattr(locate_module, "_try", slow)
    # Once three locations are tried, an hour has passed.
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + (3600 if len(tries) > 4 else 0))
    found = search(subject, budget_s=600)
    assert len(found.rounds) == 1
    assert len(found.rounds[0]) == len(tries) - 2 == 3


@pytest.mark.usefixtures("quick")
def test_a_later_round_that_time_cuts_short_does_not_count(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = search(subject)
    tries: list[str] = []
    real, clock = locate_module._try, time.perf_counter
    enough = 2 + len(whole.rounds[0]) + 1  # the probes, the first round, and one of the second

    def slow(ground: Any, name: str, *rest: Any) -> Any:
        tries.append(name)
        return real(ground, name, *rest)

    monkeypatch.setattr(locate_module, "_try", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + (3600 if len(tries) >= enough else 0))
    found = search(subject, budget_s=600)
    assert len(tries) == enough
    assert len(found.rounds) == 1
    assert found.location == found.rounds[0][0].location


def test_a_budget_too_short_says_how_long_it_takes(subject: Subject) -> None:
    with pytest.raises(InputError, match=r"too short to try two locations: .* takes \d+\.\d s"):
        search(subject, budget_s=1e-3)


@pytest.mark.usefixtures("quick")
def test_a_location_that_cannot_be_trained_is_never_recommended(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = search(subject).location

    def fail(stepper: Stepper, schedule: Schedule) -> Any:
        if tried[-1] == first:
            raise TrainingError("the loss is not finite")
        return run_breadth_first(stepper, schedule)

    tried: list[str] = []
    real = locate_module._try

    def note(ground: Any, name: str, *rest: Any) -> Any:
        tried.append(name)
        return real(ground, name, *rest)

    monkeypatch.setattr(locate_module, "_try", note)
    monkeypatch.setattr(locate_module, "run_breadth_first", fail)
    found = search(subject)
    assert found.location != first
    [failed] = [one for one in found.rounds[0] if one.location == first]
    assert failed.value is None
    assert failed.reason == "the loss is not finite"
    assert describe_found(found)


@pytest.mark.usefixtures("quick")
def test_of_a_mixture_the_projections_of_all_experts_are_tried(save_model: Callable[..., Path]) -> None:
    found = locate(str(save_model(tiny_mixture_config("mixtral"))), EDITS, 60, config=CONFIG)
    names = {one.location for outcomes in found.rounds for one in outcomes}
    assert any(name.endswith("mlp.experts.down") for name in names)
    assert any(name.endswith("mlp.experts.up") for name in names)
    assert not any(name.endswith((".mlp.down", ".mlp.up")) for name in names)


def outcome(name: str, generalization: float, drift: float, value: float | None = 1.0) -> Outcome:
    scores = {
        "reliability": Figure(value=1.0, num=9, low=0.7, high=1.0),
        "generalization": Figure(value=generalization, num=9, low=0.0, high=1.0),
        "drift": Figure(value=drift, num=9, low=0.0, high=1.0),
    }
    return Outcome(location=name, num_edits=9, scores=scores, value=value, seconds=1.0)


def test_the_front_names_what_no_other_beats() -> None:
    outcomes = [outcome("a", 0.5, 0.2), outcome("b", 0.4, 0.1), outcome("c", 0.4, 0.2)]
    assert front_of(outcomes) == ["a", "b"]
    assert front_of([*outcomes, outcome("d", 0.9, 0.0, value=None)]) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("0.5", 0.5)]
)
def test_a_budget_is_a_duration(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds
    assert RunConfig(budget=text).budget == text


@pytest.mark.parametrize("text", ["", "m", "ten", "10d", "0", "-5m", "nan", "inf", "1e400h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a duration over 0"):
        RunConfig(budget=text)


@pytest.mark.usefixtures("quick")
def test_an_edit_may_look_for_its_location(model_folder: Path, tmp_path: Path, edits_file: Path) -> None:
    said: list[str] = []
    config = RunConfig(location="auto", budget="60", epochs=2, lr=0.02)
    report = locft.edit(str(model_folder), edits_file, tmp_path / "run", config, say=said.append)
    assert report.settings["location"] == "auto"
    assert report.resolved["location"] == report.location.name
    assert any(f"{report.location.name} is worth " in line for line in said)
    # The run can be repeated without looking again.
    kept = tomllib.loads((tmp_path / "run" / "run.toml").read_text())
    assert kept["location"] == report.location.name
    again = locft.edit(
        str(model_folder),
        edits_file,
        tmp_path / "again",
        dataclasses.replace(config, location=report.location.name),
    )
    assert again.location == report.location
    patches = [tmp_path / name / "patch" / "patch.safetensors" for name in ("run", "again")]
    assert patches[0].read_bytes() == patches[1].read_bytes()


def test_a_plan_needs_a_location(model_folder: Path, edits_file: Path) -> None:
    with pytest.raises(ConfigError, match="find one with `locft locate`"):
        plan(str(model_folder), edits_file, RunConfig(location="auto"))


@pytest.mark.usefixtures("quick")
def test_the_command_recommends_shows_and_keeps(
    model_folder: Path, tmp_path: Path, edits_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["locate", str(model_folder), str(edits_file), "--budget", "1m", "--lr", "0.02"]
    assert main([*words, "-o", str(tmp_path / "found"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "found" / "report.json").read_text())
    assert record["location"] == record["rounds"][-1][0]["location"]
    assert record["wall_s"] < record["budget_s"] == 60
    page = (tmp_path / "found" / "report.html").read_text()
    assert f"--location {record['location']}" in page
    assert main([*words, "-o", str(tmp_path / "found")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main([*words, "--prefer", "generalization"]) == 0
    assert "points by generalization" in capsys.readouterr().out.replace("\n", " ")


def test_bad_words_are_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["locate", "no model", "no edits", "--budget", "soon"]) == 2
    assert "expected a duration over 0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["locate", "no model", "no edits", "--prefer", "speed"])
    assert caught.value.code == 2
    assert "generalization" in capsys.readouterr().err
