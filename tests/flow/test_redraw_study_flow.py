"""The report of a study is drawn again from its folder."""

import json
import re
from pathlib import Path

import pytest

from locft.cli.main import main
from locft.config import RunConfig
from locft.study.locations import study_locations
from locft.study.plans import LocationsPlan, ScalePlan
from locft.study.scale import study_scale
from locft.types import Edit

EDITS = tuple(
    Edit(id=str(number), prompt=f"The capital of country {number} is", target=target)
    for number, target in enumerate(("Rome", "Paris", "Oslo", "Vienna"))
)
CONFIG = RunConfig(location="1.mlp.down", lr=0.02, epochs=1)


@pytest.fixture
def study(model_folder: Path, tmp_path: Path) -> Path:
    """Make a study of locations by two commands, the second of which asked for another layer."""
    folder = tmp_path / "study"
    for layer in (2, 0):
        plan = LocationsPlan(layers=(layer,), modules=("mlp.down",), num_edits=4, num_passages=2)
        study_locations(str(model_folder), EDITS, folder, plan, CONFIG)
    return folder


def locations(record: dict[str, object]) -> list[str]:
    trials: list[dict[str, dict[str, str]]] = record["trials"]  # type: ignore[assignment]
    return [one["trial"]["location"] for one in trials]


def test_a_study_is_drawn_again_of_all_its_trials(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert locations(json.loads((study / "report.json").read_text())) == ["0.mlp.down"]
    for name in ("report.html", "report.json"):
        (study / name).unlink()
    assert main(["report", str(study)]) == 0
    assert "Best of 2 locations: " in capsys.readouterr().out
    assert locations(json.loads((study / "report.json").read_text())) == ["2.mlp.down", "0.mlp.down"]
    assert "Best of 2 locations" in (study / "report.html").read_text()


def test_it_is_drawn_elsewhere_and_printed(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in study.iterdir()}
    # A line that is being written is none yet.
    with (study / "trials.jsonl").open("ab") as file:
        file.write(b'{"trial": {"method": "ft')
    before["trials.jsonl"] += b'{"trial": {"method": "ft'
    assert main(["report", str(study), "-o", str(tmp_path / "drawn"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "drawn" / "report.json").read_text())
    assert locations(record) == ["2.mlp.down", "0.mlp.down"]
    assert {path.name: path.read_bytes() for path in study.iterdir()} == before


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("study.json", "{", "study.json: is damaged"),
        ("study.json", '"version": 2', "is of version 2, expected 1"),
        ("trials.jsonl", "{}\n", "trials.jsonl: line 1 is damaged"),
    ],
)
def test_what_cannot_be_drawn_is_told(
    study: Path, file: str, content: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "version" in content:
        (study / file).write_text((study / file).read_text().replace('"version": 1', content, 1))
    else:
        (study / file).write_text(content)
    assert main(["report", str(study)]) == 2
    said = capsys.readouterr().err
    assert re.search(what, said)


def test_trials_of_other_machines_are_told_apart(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (study / "trials.jsonl").read_text().splitlines()
    record = json.loads(first)
    record["environment"]["device"] = "an older processor"
    (study / "trials.jsonl").write_text(f"{json.dumps(record)}\n{second}\n")
    assert main(["report", str(study)]) == 0
    shown = capsys.readouterr().out
    assert "1 trial on another machine or in another way" in shown
    assert "an older processor" in shown


def test_studies_are_not_compared_as_runs(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(study.parent / "run"), str(study)]) == 2
    assert f"{study}: is a study: expected runs to compare" in capsys.readouterr().err


def test_larger_sizes_go_into_the_same_folder(model_folder: Path, tmp_path: Path) -> None:
    for sizes in ((2,), (4,)):
        plan = ScalePlan(sizes=sizes, num_scored=2, num_passages=2)
        study_scale(str(model_folder), EDITS, tmp_path / "study", plan, CONFIG)
    assert main(["report", str(tmp_path / "study")]) == 0
    text = (tmp_path / "study" / "report.md").read_text()
    assert text.index("| 2 |") < text.index("| 4 |")
    assert re.search(r"Reliability from \d+% of 2 edits to \d+% of 4 edits", text)
