"""Editors beside training, in one comparison on a tiny model."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CORPUS, tiny_llama_config

from locft.config import RunConfig
from locft.errors import ConfigError, InputError
from locft.study.compare import compare
from locft.study.pipelines import study_pipelines
from locft.study.plans import ComparePlan, PipelinesPlan
from locft.types import Edit

EDITS = tuple(
    Edit(id=str(number), prompt=f"The home of {name} is", target=target, subject=name)
    for number, (name, target) in enumerate({"Ada": "Rome", "Bo": "Oslo", "Cleo": "Paris"}.items())
)
METHODS = (
    "ft-m",
    "ft-l",
    "roselora",
    "rome:passes=3,covariance=false,layer=1",
    "memit:passes=3,layers=1-2,lambda=0.1",
    "rect:passes=3,covariance=false,layers=1",
    "alphaedit:passes=3,layers=1-2,threshold=0.5",
    "ultraedit:layers=1-2,micro_batch=2",
)


@pytest.fixture
def folder(save_model: Callable[..., Path]) -> str:
    return str(save_model(tiny_llama_config(num_hidden_layers=4, initializer_range=0.2)))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("LOCFT_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{CORPUS} Passage {number}." for number in range(9)))
    return RunConfig(location="1.mlp.down", epochs=2, neutral_text=str(text))


def test_all_editors_are_compared_like_methods_that_train(
    folder: str, config: RunConfig, tmp_path: Path
) -> None:
    plan = ComparePlan(methods=METHODS, num_passages=2)
    report, _ = compare(folder, EDITS, tmp_path / "study", plan, config)
    found = {one.trial.method: one for one in report.trials}
    assert [one.failure for one in report.trials] == [None] * len(METHODS)
    assert set(found) == {text.partition(":")[0] for text in METHODS}
    for name in ("rome", "memit", "rect", "alphaedit", "ultraedit"):
        result = found[name]
        assert (result.trial.pipeline, result.trial.batch_size) == ("sequential", 100)
        assert result.num_steps == 1
        assert result.seconds_per_edit > 0
        drift = result.scores["drift"].value
        assert drift is not None
        assert drift > 0
    assert found["memit"].notes["layers"] == [1, 2]
    assert found["memit"].notes["statistics_tokens"] > 64
    assert len(found["memit"].notes["prefixes"]) == 5
    assert len(found["rome"].notes["prefixes"]) == 20
    assert found["alphaedit"].notes["unused_directions"]
    told = (tmp_path / "study/report.md").read_text()
    assert all(name in told for name in found)
    again, _ = compare(folder, EDITS, tmp_path / "study", plan, config)
    assert again.trials == report.trials


def test_edits_without_subjects_are_refused_before_anything_is_asked(
    folder: str, config: RunConfig, tmp_path: Path
) -> None:
    edits = (*EDITS, Edit(id="x", prompt="Who?", target="Rome"))
    said: list[str] = []
    with pytest.raises(InputError, match=r"1 of 4 edits name no `subject`.*edit \[3\]"):
        compare(
            folder,
            edits,
            tmp_path / "study",
            ComparePlan(methods=("ft-m", "memit")),
            config,
            say=said.append,
        )
    assert not any("asking" in line or "trial" in line for line in said)
    report, _ = compare(
        folder,
        edits,
        tmp_path / "other",
        ComparePlan(methods=("ultraedit:layers=1",), num_passages=2),
        config,
    )
    assert report.trials[0].failure is None


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("memit:lamda=3", "no setting 'lamda': expected some of lr, batch_size, layers, .* lambda"),
        ("rome:covariance=maybe", "covariance is 'maybe': expected covariance=TRUE|FALSE"),
        ("rome:location=3.mlp", "no setting 'location'"),
        ("memit:layers=9", "expected auto, or layers from 0 to 2"),
        ("ultraedit:module=all", "module is 'all': expected up"),
        ("ultraedit:variance=none", "variance is 'none': expected published or exact"),
        ("memit:clamp=0", "clamp is 0.0: expected a number over 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    folder: str, config: RunConfig, tmp_path: Path, method: str, message: str
) -> None:
    with pytest.raises(InputError, match=message.replace("|", r"\|")):
        compare(folder, EDITS, tmp_path / "study", ComparePlan(methods=(method,)), config)


def test_what_inserts_has_no_pipelines(folder: str, config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected some of ft-m, lora, adalora, full, ft-l, roselora"):
        study_pipelines(
            folder, EDITS, tmp_path / "study", PipelinesPlan(methods=("memit",), num_edits=3), config
        )
