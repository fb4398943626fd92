"""What training preserves: by text that the model writes, or by a file, in a run and in studies."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CORPUS, tiny_mixture_config

import locft
from locft.config import Preserve, RunConfig, parse_preserve
from locft.errors import ConfigError, InputError
from locft.model import neutral
from locft.patch.format import read_patch
from locft.recipe import ordinary
from locft.study.compare import compare
from locft.study.plans import ComparePlan
from locft.types import Edit

EDITS = tuple(
    Edit(id=str(number), prompt=f"Number {number} is", target=target)
    for number, target in enumerate(("Rome", "Paris", "Oslo", "Vienna"))
)
CONFIG = RunConfig(location="1.mlp.down", lr=0.01, epochs=4)


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is measured apart from other tests, and the texts few."""
    monkeypatch.setenv("LOCFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ordinary, "_LEAST_TOKENS", 512)


def preserving(preserve: str, **changes: Any) -> RunConfig:
    values = {"location": "1.mlp.down", "lr": 0.01, "epochs": 4, "preserve": preserve, **changes}
    return RunConfig(**values)


def patch_bytes(run: Path) -> dict[str, bytes]:
    return {name: tensor.data for name, tensor in read_patch(run / "patch").tensors.items()}


def test_a_run_says_what_it_preserved_and_by_what(model_folder: Path, tmp_path: Path) -> None:
    report = locft.edit(str(model_folder), EDITS, tmp_path / "run", preserving("covariance:7"))
    preserved, text = report.training.preserved, report.training.text
    assert preserved is not None
    assert text is not None
    assert (preserved.strength, text.text, preserved.num_tokens) == (7.0, "model", 512)
    assert preserved.left_plain == ()
    assert report.cost.prepare_s > 0
    assert "kept off the directions that ordinary text uses" in (tmp_path / "run/report.md").read_text()
    manifest = json.loads((tmp_path / "run/patch/patch.json").read_text())
    assert manifest["settings"]["preserve"] == "covariance:7"
    assert manifest["settings"]["neutral_text"] == text.sha256
    assert read_patch(tmp_path / "run/patch")  # an ordinary patch


def test_the_texts_and_what_they_make_of_inputs_are_computed_once(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = locft.edit(str(model_folder), EDITS, tmp_path / "first", preserving("covariance"))

    def fail(*_: Any) -> None:
        raise AssertionError("it was known already")

    monkeypatch.setattr(neutral, "sample_sequences", fail)
    monkeypatch.setattr(neutral, "measure_moments", fail)
    again = locft.edit(str(model_folder), EDITS, tmp_path / "again", preserving("covariance"))
    assert again.training.preserved == first.training.preserved
    assert patch_bytes(tmp_path / "again") == patch_bytes(tmp_path / "first")


def test_a_preserving_run_gives_another_patch_and_none_the_plain_one(
    model_folder: Path, tmp_path: Path
) -> None:
    for name, config in {
        "plain": CONFIG,
        "none": preserving("none"),
        "kept": preserving("covariance:20"),
    }.items():
        locft.edit(str(model_folder), EDITS, tmp_path / name, config)
    assert patch_bytes(tmp_path / "plain") == patch_bytes(tmp_path / "none")
    assert patch_bytes(tmp_path / "plain") != patch_bytes(tmp_path / "kept")


def test_a_text_of_the_users_own_may_be_preserved(model_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(CORPUS + f"Passage {number}." for number in range(9)))
    config = preserving("covariance", neutral_text=str(text))
    report = locft.edit(str(model_folder), EDITS, tmp_path / "run", config)
    taken = report.training.text
    assert taken is not None
    assert taken.text == str(text)
    assert taken.num_tokens > 64
    own = locft.edit(str(model_folder), EDITS, tmp_path / "own", preserving("covariance"))
    assert own.training.text is not None
    assert own.training.text.sha256 != taken.sha256
    assert patch_bytes(tmp_path / "own") != patch_bytes(tmp_path / "run")


def test_a_text_too_short_for_the_matrix_is_refused_before_anything_is_asked(
    model_folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Too short by far.")
    said: list[str] = []
    config = preserving("covariance", neutral_text=str(text))
    with pytest.raises(InputError, match=r"holds \d+ tokens, too few for matrices with 64 inputs"):
        locft.edit(str(model_folder), EDITS, tmp_path / "run", config, say=said.append)
    assert not any("answering" in line for line in said)
    assert not (tmp_path / "run").exists()


def test_experts_in_a_stack_cannot_be_preserved_and_say_so(
    save_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = str(save_model(tiny_mixture_config("qwen2_moe")))
    config = preserving("covariance", location="1.mlp.experts.down")
    with pytest.raises(
        ConfigError, match=r"not for location 1\.mlp\.experts\.down .* mlp\.shared\.down"
    ):
        locft.edit(folder, EDITS, tmp_path / "run", config)
    report = locft.edit(folder, EDITS, tmp_path / "whole", preserving("covariance", location="1.mlp"))
    assert report.training.preserved is not None
    assert any("experts" in name for name in report.training.preserved.left_plain)


def test_several_matrices_and_vectors_of_a_layer_may_be_tuned(
    model_folder: Path, tmp_path: Path
) -> None:
    report = locft.edit(
        str(model_folder), EDITS, tmp_path / "run", preserving("covariance", location="1")
    )
    assert report.training.preserved is not None
    assert all("norm" in name for name in report.training.preserved.left_plain)
    assert len(report.training.preserved.left_plain) == 2


def test_methods_are_compared_with_and_without_it(model_folder: Path, tmp_path: Path) -> None:
    plan = ComparePlan(methods=("ft-m", "ft-m:preserve=covariance:9"), num_passages=2)
    report, _ = compare(str(model_folder), EDITS, tmp_path / "study", plan, CONFIG)
    assert [one.trial.preserve for one in report.trials] == ["none", "covariance:9"]
    assert report.trials[0].scores["drift"] != report.trials[1].scores["drift"]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("none", Preserve()),
        ("covariance", Preserve(covariance=3.0)),
        ("covariance:0", Preserve(covariance=0.0)),
        ("covariance:2.5", Preserve(covariance=2.5)),
        ("anchors", Preserve(anchors=200)),
        ("anchors:7+covariance:2", Preserve(covariance=2.0, anchors=7)),
    ],
)
def test_what_is_preserved_can_be_read(text: str, read: Preserve) -> None:
    assert parse_preserve(text) == read
    assert RunConfig(preserve=text).preserve == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "all",
        "covariance:",
        "covariance:x",
        "covariance:-1",
        "covariance:nan",
        "covariance:inf",
        "none:1",
        "none+anchors",
        "anchors:0",
        "anchors:1.5",
        "anchors+anchors",
        "covariance+",
    ],
)
def test_what_cannot_be_preserved_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected none, covariance or covariance:STRENGTH"):
        RunConfig(preserve=text)
