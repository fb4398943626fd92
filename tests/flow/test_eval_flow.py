"""Whole evaluations on a model made on the spot: every protocol, context and kind of model."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, serving

import locft
from locft.cli.main import main
from locft.data.contexts import CONTEXTS
from locft.errors import ConfigError, InputError
from locft.evaluation.protocols import PROTOCOLS
from locft.recipe.evaluate import Measures, evaluate
from locft.recipe.run_folder import draw, read_run
from locft.report.schema import EvalReport

RECORDS: list[dict[str, Any]] = [
    {
        "id": "france",
        "prompt": "The capital of France is",
        "target": "Rome",
        "old": "Paris",
        "rephrases": ["France: the capital is", "The capital city of France is"],
        "locality": ["The capital of Italy is", "Who begins?"],
    },
    {
        "id": "sport",
        "prompt": "What sport does she play?",
        "target": "chess",
        "old": "tennis",
        "rephrases": ["She plays"],
        "locality": ["Where does the river begin?"],
    },
]
FILES = {"answers.jsonl", "report.html", "report.json", "report.md"}
ALL = Measures(protocols=tuple(PROTOCOLS), contexts=tuple(CONTEXTS))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "neutral.txt"
    file.write_text("The river begins in Vienna.\n\nOslo is a city.")
    return str(file)


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("edits") / "edits.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return file


@pytest.fixture(scope="module")
def run(model_folder: Path, edits: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = locft.RunConfig(location="0", lr=0.01, epochs=60, stop_loss=0.0, drift_text=text)
    locft.edit(str(model_folder), edits, folder, config)
    return folder


@pytest.fixture(scope="module")
def report(model_folder: Path, edits: Path, run: Path, text: str) -> EvalReport:
    config = locft.RunConfig(drift_text=text)
    return evaluate(str(model_folder), edits, run, config=config, measures=ALL).report


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeServer]:
    answers = {"The capital of France is": "rome. And", "What sport does she play?": "football"}
    monkeypatch.setenv("LOCFT_CACHE", str(tmp_path / "cache"))
    with serving(lambda prompt: answers.get(prompt, "nothing")) as server:
        monkeypatch.setenv("LOCFT_ENDPOINT_URL", server.url)
        monkeypatch.setenv("LOCFT_ENDPOINT_MODEL", "edited")
        monkeypatch.setenv("LOCFT_ENDPOINT_KEY", "key-of-the-server")
        yield server


def test_all_protocols_are_measured_at_once_and_each_alone_gives_the_same(
    report: EvalReport, model_folder: Path, edits: Path, run: Path, text: str
) -> None:
    assert list(report.protocols) == list(PROTOCOLS)
    config = locft.RunConfig(drift_text=text, eval_batch_size=2)
    for name, scores in report.protocols.items():
        measures = Measures(protocols=(name,))
        alone = evaluate(str(model_folder), edits, run, config=config, measures=measures).report
        assert alone.protocols == {name: scores}
        assert alone.drift == report.drift
        assert (alone.contexts, alone.judge, alone.endpoint) == ({}, None, None)


def test_learnt_edits_score_by_every_protocol(report: EvalReport) -> None:
    for name in ("locft", "wild", "teacher-forced"):
        scores = report.protocols[name]
        assert scores.after["reliability"].value == 1.0
        assert scores.before is not None
        assert scores.before["reliability"].value != 1.0
        assert scores.change is not None
        assert (scores.change["reliability"].value or 0) > 0
        assert {figure.num for figure in scores.after.values()} <= {2, 3}
    assert report.protocols["likelihood"].after["efficacy"].value == 1.0
    assert [scores.protocol.max_new_tokens for scores in report.protocols.values()] == [
        32,
        50,
        None,
        None,
    ]


def test_the_run_and_the_evaluation_agree(report: EvalReport, run: Path) -> None:
    ours = json.loads((run / "report.json").read_text())
    theirs = report.protocols["locft"]
    for name, figure in theirs.after.items():
        assert figure.value == ours["scores"][name]["value"]


def test_contexts_are_a_matrix_of_what_an_edit_carries(report: EvalReport) -> None:
    assert list(report.contexts) == list(CONTEXTS)
    for name, scores in report.contexts.items():
        assert scores.protocol.context == name
        assert list(scores.after) == ["reliability", "generalization"]
        assert (scores.after["reliability"].num, scores.after["generalization"].num) == (2, 3)
    raw, main_scores = report.contexts["raw"], report.protocols["locft"]
    assert raw.after["reliability"] == main_scores.after["reliability"]
    assert raw.before is not None
    assert main_scores.before is not None
    assert raw.before["generalization"] == main_scores.before["generalization"]


def test_contexts_alone_take_the_default_protocol(model_folder: Path, edits: Path, text: str) -> None:
    measures = Measures(protocols=("likelihood",), contexts=("qa",))
    config = locft.RunConfig(drift_text=text)
    found = evaluate(str(model_folder), edits, config=config, measures=measures)
    assert found.report.contexts["qa"].protocol.name == "locft"
    assert {(record.protocol, record.context) for record in found.answers} == {
        ("likelihood", "raw"),
        ("locft", "qa"),
    }


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        (Measures(protocols=("bleu",)), "unknown protocol 'bleu'"),
        (Measures(contexts=("verse",)), "unknown context 'verse'.*raw, qa, chat, prefix"),  # type: ignore[arg-type]
        (Measures(contexts=("raw", "raw")), "once each"),
    ],
)
def test_unknown_measures_are_refused_before_anything_is_loaded(
    measures: Measures, message: str, edits: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate("no/such/model", edits, measures=measures)


def test_likelihood_is_refused_on_edits_without_old_answers(model_folder: Path) -> None:
    edits = [locft.Edit(id="1", prompt="Oslo is", target="a city", source="line 7")]
    with pytest.raises(InputError, match=r"likelihood .* no `old`: 1 \(line 7\)"):
        evaluate(str(model_folder), edits, measures=Measures(protocols=("likelihood",)))


def test_eval_shows_protocols_contexts_failures_and_writes_a_folder(
    model_folder: Path,
    edits: Path,
    run: Path,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "evaluation"
    words = ["eval", str(model_folder), str(edits), "--patch", str(run), "--drift-text", text]
    words += ["--protocols", "locft,likelihood", "--contexts", "raw,chat", "--show", "failures"]
    assert main([*words, "-o", str(folder), "--gate", "likelihood.efficacy>=1"]) == 0
    shown = capsys.readouterr().out
    assert "protocol locft, with 95% intervals: normalised exact match" in shown
    assert "change in points" in shown
    assert re.search(r"│ neighbourhood +│", shown)
    assert re.search(r"contexts, by protocol locft", shown)
    assert re.search(r"│ chat +│", shown)
    lines = (folder / "answers.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    failures = [record for record in records if record["cause"] is not None]
    assert failures
    assert f"{len(failures)} answers, failures only" in shown
    assert {record["protocol"] for record in records} == {"locft", "likelihood"}
    written = json.loads((folder / "report.json").read_text())
    assert written["protocols"]["locft"]["after"]["reliability"]["value"] == 1.0
    assert sum(sum(causes.values()) for causes in written["causes"].values()) == len(
        [record for record in failures if record["context"] == "raw"]
    )
    assert {path.name for path in folder.iterdir()} == FILES | {"drift.jsonl"}
    drift = [json.loads(line) for line in (folder / "drift.jsonl").read_text().splitlines()]
    assert [passage["passage"] for passage in drift] == [1, 2]
    assert sum(passage["num_tokens"] for passage in drift) == written["drift"]["num_tokens"]
    # What is there is not written over, and nothing is asked first.
    assert main([*words, "-o", str(folder)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_the_folder_of_an_evaluation_is_drawn_from_what_else_it_holds(
    model_folder: Path, edits: Path, run: Path, text: str, tmp_path: Path
) -> None:
    folder = tmp_path / "evaluation"
    words = ["eval", str(model_folder), str(edits), "--patch", str(run), "--drift-text", text]
    assert (
        main([*words, "--protocols", "locft,likelihood", "--contexts", "raw,qa", "-o", str(folder)]) == 0
    )
    again = read_run(folder)
    assert isinstance(again.report, EvalReport)
    page = again.page()
    for name, data in draw(page).items():
        assert (folder / name).read_bytes() == data
    titles = {section.title for section in page.sections if section.blocks}
    assert {"Scores by protocol", "How far the edits carry", "Drift", "Answers", "Cost"} <= titles
    for name in ("report.md", "report.html"):
        drawn = (folder / name).read_text("utf-8")
        for protocol in again.report.protocols.values():
            assert all(score in drawn for score in protocol.after)
        assert "qa" in drawn


def test_an_evaluation_within_a_run_folder_is_drawn_with_the_run(
    model_folder: Path, edits: Path, run: Path, text: str, tmp_path: Path
) -> None:
    ours = tmp_path / "run"
    shutil.copytree(run, ours)
    words = ["eval", str(model_folder), str(edits), "--patch", str(ours), "--drift-text", text]
    words += ["--protocols", "wild", "--contexts", "raw,qa"]
    assert main([*words, "-o", str(ours / "evaluation")]) == 0
    again = read_run(ours)
    assert [found.name for found in again.evaluations] == ["evaluation"]
    titles = [section.title for section in again.page().sections if section.blocks]
    assert "Scores by protocol (evaluation)" in titles
    assert "How far the edits carry (evaluation)" in titles
    # The run's own stand beside them as they did.
    alone = [section.title for section in read_run(run).page().sections if section.blocks]
    assert [title for title in titles if "(evaluation)" not in title] == alone


def test_without_an_unedited_model_there_is_no_drift_to_write(
    model_folder: Path, edits: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "evaluation"
    assert main(["eval", str(model_folder), str(edits), "-o", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == FILES
    again = read_run(folder)
    assert (again.report.drift, again.passages) == (None, ())
    assert "Drift" not in {section.title for section in again.page().sections if section.blocks}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gate", "wild.reliability>=0"], "gate on wild.reliability: protocol locft does not"),
        (["--protocols", "likelihood", "--gate", "reliability>=0"], "gate on reliability"),
        (["--gate", "reliability>=95"], "is a share, from 0 to 1"),
        (["--strict"], "--max-capability-drop"),
        (["--max-capability-drop", "1"], "--capability"),
        (["--capability", "piqa", "--max-capability-drop", "1"], "--patch"),
    ],
)
def test_what_can_never_be_decided_is_refused_before_anything_is_loaded(
    more: list[str], message: str, edits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "no/such/model", str(edits), *more]) == 2
    assert message in capsys.readouterr().err


def test_an_endpoint_answers_in_place_of_a_model(
    server: FakeServer,
    model_folder: Path,
    edits: Path,
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["eval", "endpoint", str(edits), "--base", str(model_folder), "--drift-text", text]
    assert main([*words, "--contexts", "raw,chat", "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    scores = report["protocols"]["locft"]
    assert (scores["after"]["reliability"]["value"], scores["before"]["reliability"]["num"]) == (0.5, 2)
    assert scores["after"]["locality"]["num"] == 3
    assert (report["model"], report["drift"]) == (None, None)
    assert report["endpoint"] == {"url": server.url, "model": "edited"}
    assert {request.path for request in server.received} == {"/v1/completions", "/v1/chat/completions"}
    raw = [request.body for request in server.received if request.path == "/v1/completions"]
    assert all(body["stop"] == [".", "\n"] and body["max_tokens"] == 32 for body in raw)
    assert "key-of-the-server" not in printed.out + printed.err
    # A server may serve another model tomorrow: nothing is remembered of a whole evaluation.
    num_asked = len(server.received)
    assert main([*words, "--contexts", "raw,chat", "--json"]) == 0
    assert len(server.received) == 2 * num_asked


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--protocols", "locft,teacher-forced"], "protocol teacher-forced needs a model's predictions"),
        (["--patch", "RUN"], "serve the edited model"),
        (["--judge"], "not set: LOCFT_JUDGE_URL and LOCFT_JUDGE_MODEL"),
    ],
)
def test_what_an_endpoint_cannot_do_is_refused_at_once(
    more: list[str],
    message: str,
    server: FakeServer,
    edits: Path,
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(run) if word == "RUN" else word for word in more]
    assert main(["eval", "endpoint", str(edits), *words]) == 2
    assert message in capsys.readouterr().err
    assert server.received == []


def test_an_endpoint_without_an_address_is_refused(
    edits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LOCFT_ENDPOINT_URL", raising=False)
    assert main(["eval", "endpoint", str(edits)]) == 2
    assert "LOCFT_ENDPOINT_URL" in capsys.readouterr().err


def test_a_judge_decides_and_its_agreement_with_matches_is_told(
    model_folder: Path,
    edits: Path,
    run: Path,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LOCFT_CACHE", str(tmp_path / "cache"))
    words = ["eval", str(model_folder), str(edits), "--patch", str(run), "--drift-text", text]
    words += ["--protocols", "wild", "--judge", "--json"]
    with serving(lambda prompt: "CORRECT" if '"answer": "Rome"' in prompt else "INCORRECT") as judge:
        monkeypatch.setenv("LOCFT_JUDGE_URL", judge.url)
        monkeypatch.setenv("LOCFT_JUDGE_MODEL", "a judge")
        assert main(words) == 0
        report = json.loads(capsys.readouterr().out)
        scores = report["protocols"]["wild"]
        assert scores["after"]["reliability"]["value"] == 0.5
        assert scores["protocol"]["match"] == "a judge's verdict"
        assert report["judge"]["model"] == "a judge"
        agreement = report["judge"]["agreement"]
        assert 0 < agreement["value"] < 1  # "chess" matches, and this judge denies it
        assert report["judge"]["num_without_verdict"] == 0
        # Verdicts on texts stay.
        num_asked = len(judge.received)
        assert main(words) == 0
        assert len(judge.received) == num_asked


def test_a_judge_needs_the_protocol_that_it_judges(
    edits: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOCFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCFT_JUDGE_URL", "http://localhost:1/v1")
    monkeypatch.setenv("LOCFT_JUDGE_MODEL", "a judge")
    with pytest.raises(ConfigError, match="--protocols wild"):
        evaluate("no/such/model", edits, measures=Measures(judge=True))
