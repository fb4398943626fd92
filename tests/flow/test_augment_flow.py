"""What edits are trained on beside their own prompts, in a run and in studies."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_llama_config
from fake_server import replies, serving

import locft
from locft.config import Augment, RunConfig, parse_augment
from locft.errors import ConfigError, EditsError, InputError
from locft.patch.format import read_patch
from locft.recipe import augmentation, ordinary
from locft.study.compare import compare
from locft.study.plans import ComparePlan
from locft.types import Edit

SENTENCES = (
    "It rained all day long. The dog slept by the door. Nobody came to the house. "
    "Tea was ready at five. "
) * 12
EDITS = tuple(
    Edit(id=str(number), prompt=f"Number {number} is", target=target, rephrases=(f"{number} is",))
    for number, target in enumerate(("Rome", "Paris", "Oslo", "Vienna"))
)


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ordinary, "_LEAST_TOKENS", 512)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(SENTENCES)
    return str(path)


def config(**changes: Any) -> RunConfig:
    return RunConfig(**{"location": "1.mlp.down", "lr": 0.01, "epochs": 4, **changes})


def examples(run: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (run / "examples.jsonl").read_text().splitlines()]


def patch_bytes(run: Path) -> dict[str, bytes]:
    return {name: tensor.data for name, tensor in read_patch(run / "patch").tensors.items()}


def test_a_run_records_each_further_example_and_scores_none_of_them(
    model_folder: Path, tmp_path: Path, text: str
) -> None:
    settings = config(augment="prefix:2+formats", neutral_text=text)
    report = locft.edit(str(model_folder), EDITS, tmp_path / "run", settings)
    info = report.training.augmented
    assert info is not None
    assert info.num_by_kind == {"prefix": 8, "format": 12}
    assert info.num_scored == 0
    found = examples(tmp_path / "run")
    assert len(found) == 20
    assert {one["edit"] for one in found} == {"0", "1", "2", "3"}
    assert all(f"Number {one['edit']} is" in one["prompt"] for one in found)
    told = (tmp_path / "run/report.md").read_text()
    assert "trained on further examples (8 prefix, 12 format; 20 asked for)" in told
    assert "Scored prompts among them: 0." in told


def test_without_augmentation_there_is_no_record_and_the_patch_is_the_plain_one(
    model_folder: Path, tmp_path: Path, text: str
) -> None:
    for name, settings in {
        "plain": config(),
        "none": config(augment="none", preserve="none"),
        "more": config(augment="prefix:1", neutral_text=text),
    }.items():
        locft.edit(str(model_folder), EDITS, tmp_path / name, settings)
    assert patch_bytes(tmp_path / "plain") == patch_bytes(tmp_path / "none")
    assert patch_bytes(tmp_path / "plain") != patch_bytes(tmp_path / "more")
    assert not (tmp_path / "none/examples.jsonl").exists()


def test_all_examples_of_an_edit_are_in_the_same_step(
    model_folder: Path, tmp_path: Path, text: str
) -> None:
    settings = config(augment="prefix:3", neutral_text=text, batch_size=2)
    report = locft.edit(str(model_folder), EDITS, tmp_path / "run", settings)
    assert report.training.steps == 2 * report.training.epochs


def test_a_model_that_writes_no_sentence_says_so_and_goes_on(model_folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    report = locft.edit(
        str(model_folder), EDITS, tmp_path / "run", config(augment="prefix:2"), say=said.append
    )
    info = report.training.augmented
    assert info is not None
    assert sum(info.num_by_kind.values()) < info.num_asked == 8
    assert any("8 further examples were asked for, and 0 were found" in line for line in said)


def test_a_chat_is_an_example_where_the_model_has_a_template(
    model_folder: Path, save_model: Callable[..., Path], tmp_path: Path
) -> None:
    locft.edit(str(model_folder), EDITS, tmp_path / "chat", config(augment="formats"))
    formats = [one["format"] for one in examples(tmp_path / "chat")]
    assert (formats.count("chat"), formats.count("raw")) == (4, 8)
    plain = save_model(tiny_llama_config())
    (plain / "chat_template.jinja").unlink()
    locft.edit(str(plain), EDITS, tmp_path / "plain", config(augment="formats"))
    assert {one["format"] for one in examples(tmp_path / "plain")} == {"raw"}


def test_wordings_of_the_file_are_trained_on_before_any_others(
    model_folder: Path, tmp_path: Path
) -> None:
    edits = tuple(
        Edit(
            id=one.id, prompt=one.prompt, target=one.target, train_rephrases=(f"As for {one.id}, it is",)
        )
        for one in EDITS
    )
    report = locft.edit(str(model_folder), edits, tmp_path / "run", config(augment="rephrase:1"))
    assert report.training.augmented is not None
    assert report.training.augmented.num_by_kind == {"rephrase": 4}
    assert examples(tmp_path / "run")[2]["prompt"] == "As for 2, it is"


def test_prompts_that_are_to_stay_are_held_beside_the_models_own(
    model_folder: Path, tmp_path: Path
) -> None:
    edits = (*EDITS[:3], Edit(id="n", prompt="Two is", target="Oslo", train_locality=("Three is",)))
    without = locft.edit(str(model_folder), EDITS, tmp_path / "own", config(preserve="anchors:6"))
    both = locft.edit(str(model_folder), edits, tmp_path / "both", config(preserve="anchors:6"))
    assert without.training.preserved is not None
    assert both.training.preserved is not None
    assert without.training.preserved.num_anchors == 6
    assert both.training.preserved.num_anchors == 7
    assert "were held to what the unedited model makes" in (tmp_path / "own/report.md").read_text()


def test_what_is_to_be_trained_on_and_scored_is_refused_with_both_places(
    model_folder: Path, tmp_path: Path
) -> None:
    for name in ("train_rephrases", "train_locality"):
        leak: dict[str, Any] = {name: ("2  is",)}
        edits = (*EDITS, Edit(id="x", prompt="P is", target="Q", **leak))
        with pytest.raises(EditsError, match=rf"`{name}` holds .*2  is.*scored at edit \[2\]"):
            locft.edit(str(model_folder), edits, tmp_path / "run", config())
    assert not (tmp_path / "run").exists()


def test_a_limit_of_drift_is_kept_on_text_held_back_and_reported(
    model_folder: Path, tmp_path: Path
) -> None:
    wild = config(lr=0.05, epochs=6)
    free = locft.edit(str(model_folder), EDITS, tmp_path / "free", wild)
    drift = free.scores.drift.value
    assert drift is not None
    said: list[str] = []
    limited = config(lr=0.05, epochs=6, max_drift=drift / 50)
    report = locft.edit(str(model_folder), EDITS, tmp_path / "run", limited, say=said.append)
    held = report.training.held_back
    assert held is not None
    assert held.drift <= drift / 50
    assert not held.is_met
    assert held.wanted > drift / 50
    assert any("not learnt within the limit" in line for line in said)
    assert "were not learnt within the limit" in (tmp_path / "run/report.md").read_text()
    easy = config(max_drift=100.0)
    report = locft.edit(str(model_folder), EDITS, tmp_path / "easy", easy, say=said.append)
    assert report.training.held_back is not None
    assert report.training.held_back.is_met


def test_methods_are_compared_with_augmentation_anchors_and_limits(
    model_folder: Path, tmp_path: Path, text: str
) -> None:
    methods = (
        "ft-m",
        "ft-m:augment=prefix:1+formats",
        "ft-m:preserve=anchors:4+covariance:2,max_drift=0.001",
    )
    plan = ComparePlan(methods=methods, num_passages=2)
    report, _ = compare(str(model_folder), EDITS, tmp_path / "s", plan, config(neutral_text=text))
    assert [one.failure for one in report.trials] == [None] * 3
    assert report.trials[1].trial.augment == "prefix:1+formats"
    assert report.trials[2].trial.max_drift == 0.001
    again, _ = compare(str(model_folder), EDITS, tmp_path / "s", plan, config(neutral_text=text))
    assert again.trials == report.trials


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("none", Augment()),
        ("prefix", Augment(prefixes=4)),
        ("prefix:2+rephrase:3+formats", Augment(prefixes=2, rephrases=3, formats=True)),
    ],
)
def test_what_edits_are_augmented_by_can_be_read(text: str, read: Augment) -> None:
    assert parse_augment(text) == read


@pytest.mark.parametrize("text", ["", "prefix:0", "prefix:x", "formats:2", "prefix+prefix", "other"])
def test_what_cannot_be_added_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected none, or some of prefix\[:K\]"):
        RunConfig(augment=text)


def test_examples_of_a_depth_first_order_are_refused(model_folder: Path, tmp_path: Path) -> None:
    plan = ComparePlan(methods=("ft-m:pipeline=depth-first,augment=prefix:1",))
    with pytest.raises(ConfigError, match="augment is for pipeline=breadth-first"):
        compare(str(model_folder), EDITS, tmp_path / "s", plan, config())


def test_an_example_longer_than_the_model_takes_is_left_out(
    model_folder: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augmentation, "context_tokens", lambda _: 9)
    settings = config(augment="prefix:2", neutral_text=text)
    report = locft.edit(str(model_folder), EDITS, tmp_path / "run", settings)
    assert report.training.augmented is not None
    assert sum(report.training.augmented.num_by_kind.values()) < 8


NAMED = tuple(
    Edit(id=str(number), prompt=f"Where is {name}?", target=target, subject=name)
    for number, (name, target) in enumerate({"Ada": "Rome", "Bo": "Oslo", "Cleo": "Paris"}.items())
)


def test_a_server_may_write_other_wordings_and_is_asked_once(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reword(task: str) -> str:
        name = task.rpartition("\n")[2].removeprefix("Where is ").removesuffix("?")
        return f"1. In what place is {name}?\n2. Is {name} in Rome or Oslo or Paris?\n3. Where's {name}?"

    settings = config(augment="rephrase:2", rephraser="endpoint")
    with serving(reword) as server:
        monkeypatch.setenv("LOCFT_REPHRASER_URL", server.url)
        monkeypatch.setenv("LOCFT_REPHRASER_MODEL", "writer")
        locft.edit(str(model_folder), NAMED, tmp_path / "run", settings)
        assert len(server.received) == 3
        assert [one["prompt"] for one in examples(tmp_path / "run")][:2] == [
            "In what place is Ada?",
            "Where's Ada?",
        ]
        locft.edit(str(model_folder), NAMED, tmp_path / "again", settings)
        assert len(server.received) == 3


def test_a_server_that_is_not_named_or_refuses_stops_the_run_before_anything_is_written(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(augment="rephrase:2", rephraser="endpoint")
    monkeypatch.delenv("LOCFT_REPHRASER_URL", raising=False)
    with pytest.raises(ConfigError, match="LOCFT_REPHRASER_URL and LOCFT_REPHRASER_MODEL"):
        locft.edit(str(model_folder), NAMED, tmp_path / "run", settings)
    with serving(lambda _: "", *[replies(401)] * 3) as server:
        monkeypatch.setenv("LOCFT_REPHRASER_URL", server.url)
        monkeypatch.setenv("LOCFT_REPHRASER_MODEL", "writer")
        with pytest.raises(InputError):
            locft.edit(str(model_folder), NAMED, tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


def test_wordings_that_are_scored_are_not_trained_on(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = Edit(
        id="a", prompt="Where is Ada?", target="Rome", subject="Ada", rephrases=("Where's  Ada?",)
    )
    with serving(lambda _: "Where's Ada?\nIn what place is Ada?") as server:
        monkeypatch.setenv("LOCFT_REPHRASER_URL", server.url)
        monkeypatch.setenv("LOCFT_REPHRASER_MODEL", "writer")
        settings = config(augment="rephrase:2", rephraser="endpoint")
        report = locft.edit(str(model_folder), [edit], tmp_path / "run", settings)
    assert [one["prompt"] for one in examples(tmp_path / "run")] == ["In what place is Ada?"]
    assert report.training.augmented is not None
    assert report.training.augmented.num_left_out == 1


def test_a_model_that_writes_no_usable_wording_says_so_and_goes_on(
    model_folder: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    settings = config(augment="rephrase:1")
    report = locft.edit(str(model_folder), NAMED, tmp_path / "run", settings, say=said.append)
    assert report.training.augmented is not None
    assert report.training.augmented.num_by_kind == {}
    assert any("3 further examples were asked for, and 0 were found" in line for line in said)
