"""The command line from words to exit status, on a model made on the spot."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_llama_config

from locft.cli.main import main

RECORDS = [
    {
        "id": "france",
        "prompt": "The capital of France is",
        "target": "Rome",
        "rephrases": ["France: the capital is"],
        "locality": ["The capital of Italy is"],
    },
    {"id": "sport", "prompt": "What sport does she play?", "target": "chess"},
]
LEARN = ["--location", "0", "--lr", "0.01", "--epochs", "60", "--stop-loss", "0"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("edits") / "edits.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return str(file)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Give the flag that makes measuring drift short."""
    file = tmp_path_factory.mktemp("text") / "neutral.txt"
    file.write_text("The river begins in Vienna.\n\nOslo is a city.")
    return ["--drift-text", str(file)]


@pytest.fixture(scope="module")
def run(
    model_folder: Path, edits: str, text: list[str], tmp_path_factory: pytest.TempPathFactory
) -> str:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["edit", str(model_folder), edits, "-o", str(folder), *LEARN, *text]) == 0
    return str(folder)


def test_edit_with_json_prints_one_object_and_talks_on_stderr(
    model_folder: Path,
    edits: str,
    text: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["edit", str(model_folder), edits, "-o", str(tmp_path / "run"), *LEARN, *text, "--json"]
    assert main(words) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report == json.loads((tmp_path / "run" / "report.json").read_text("utf-8"))
    assert report["scores"]["reliability"]["value"] == 1.0
    # In the tests' own process transformers shows its bars; test_a_process_* looks at all of stderr.
    lines = [line for line in captured.err.splitlines() if line.startswith("locft: ")]
    assert lines[0] == f"locft: loading {model_folder}"
    assert len(lines) == 5


def test_edit_prints_tables(
    model_folder: Path,
    edits: str,
    text: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = str(tmp_path / "run")
    assert main(["edit", str(model_folder), edits, "-o", run, *LEARN, *text]) == 0
    out = capsys.readouterr().out
    assert "The capital of France is" in out
    assert "100.0% [34.2, 100.0] of 2" in out
    assert "2 of 2 edits took" in out
    assert "changed 0: model.layers.0." in out
    assert f"patch: {run}/patch (" in " ".join(out.split())
    assert f"report: {run}/report.html" in " ".join(out.split())
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 120


def test_one_edit_is_given_in_words(
    model_folder: Path, text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["edit", str(model_folder), "-o", str(tmp_path / "run"), *LEARN, *text, "--json"]
    words += ["--prompt", "Who wrote the play?", "--target", "[red]London[/red]"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["edits"]["num_edits"], report["edits"]["file"]) == (1, None)
    [record] = (tmp_path / "run" / "edits.jsonl").read_text().splitlines()
    assert json.loads(record) == {
        "id": "1",
        "prompt": "Who wrote the play?",
        "target": "[red]London[/red]",
    }
    # What looks like markup is shown as it is.
    assert main(["ask", str(model_folder), "Who wrote the play?", "--patch", str(tmp_path / "run")]) == 0
    assert "[red]London[/red]" in capsys.readouterr().out


def test_a_gate_that_fails_exits_with_1_and_keeps_the_run(
    model_folder: Path,
    edits: str,
    text: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["edit", str(model_folder), edits, "-o", str(tmp_path / "run"), *LEARN, *text, "--json"]
    gates = ["--gate", "reliability>=1", "--gate", "drift<=0", "--gate", "locality>=1"]
    assert main([*words, *gates]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["scores"]["reliability"]["value"] == 1.0
    said = [line for line in captured.err.splitlines() if "gate" in line]
    assert len(said) == 2
    assert said[0].startswith("locft: gate drift<=0 failed: drift is ")
    assert said[1].startswith("locft: gate locality>=1 failed: locality is ")
    assert (tmp_path / "run" / "report.json").is_file()


def test_bad_edits_exit_with_2_and_are_all_listed(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(
        '{"prompt": "a", "target": "b"}\n'
        '{"prompt": "a", "target": "c"}\n'
        "{no json\n"
        '{"prompt": "", "target": "x"}\n'
        '{"prompt": "d", "target": 5}\n'
    )
    for model in (str(model_folder), "no/such-model"):  # found before a model is looked for
        assert main(["edit", model, str(file), "-o", str(tmp_path / "run")]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        for part in (
            "line 2: error: contradicts line 1",
            "line 3: error: malformed JSON",
            "line 4: error: `prompt` is empty",
            "line 5: error: `target` is a number",
            "4 errors, 0 warnings",
        ):
            assert part in captured.err
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("flag", ["--prompt", "--target"])
def test_an_empty_word_is_named_as_what_is_empty(
    flag: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--prompt": "The sky is", "--target": "green", flag: " "}
    words = [word for pair in given.items() for word in pair]
    assert main(["edit", str(model_folder), "-o", str(tmp_path / "run"), *words]) == 2
    assert re.search(f"error: .*{flag[2:]}.* empty", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--location", "9.mlp"], "the model has 3 layers, 0 to 2"),
        (["--location", "first"], "location 'first' cannot be read"),
        (["--device", "tpu"], "device 'tpu' is not available"),
        (["--device", "cpu:x"], "device 'cpu:x' is not available"),
        (["--drift-text", "/no/such/file"], "drift text /no/such/file cannot be read"),
    ],
)
def test_settings_that_do_not_fit_exit_with_2_and_one_line(
    words: list[str],
    said: str,
    model_folder: Path,
    edits: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["edit", str(model_folder), edits, "-o", str(tmp_path / "run"), *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert said in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_lint_exits_with_0_where_there_are_warnings_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text('{"prompt": "a", "target": "b", "oops": 1}\n{"prompt": "c", "target": "St. X"}\n')
    assert main(["lint", str(file)]) == 0
    out = capsys.readouterr().out
    assert "line 1: warning: unknown field 'oops'" in out
    assert "line 2: warning: no answer can match" in out
    assert out.endswith("0 errors, 2 warnings\n")


def test_lint_exits_with_2_where_there_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text('{"prompt": "a", "target": "b"}\n{"prompt": "c"}\n')
    assert main(["lint", str(file), "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "file": str(file),
        "format": "locft",
        "num_edits": 1,
        "problems": [
            {
                "level": "error",
                "code": "missing-field",
                "where": "line 2",
                "message": "`target` is missing, expected a string with something in it",
            }
        ],
    }
    assert captured.err == ""
    assert main(["lint", str(tmp_path / "none.jsonl")]) == 2
    assert "cannot read the edits file" in capsys.readouterr().err


def test_lint_with_a_model_finds_what_its_tokenizer_makes(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "edits.jsonl"
    record = {"prompt": "The capital of France is" * 30, "target": "Rome"}
    file.write_text(json.dumps(record) + "\n")
    assert main(["lint", str(file)]) == 0
    capsys.readouterr()
    assert main(["lint", str(file), "--model", str(model_folder), "--json"]) == 2
    [problem] = json.loads(capsys.readouterr().out)["problems"]
    assert (problem["code"], problem["where"]) == ("prompt-too-long", "line 1")
    assert "the model takes 128" in problem["message"]


def test_ask_prints_answers_before_and_after(
    model_folder: Path, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["What sport does she play?", "The capital of France is"]
    assert main(["ask", str(model_folder), *prompts, "--patch", run, "--json"]) == 0
    captured = capsys.readouterr()
    answers = json.loads(captured.out)["answers"]
    assert [(answer["prompt"], answer["after"]) for answer in answers] == [
        (prompts[0], "chess"),
        (prompts[1], "Rome"),
    ]
    assert all(answer["before"] != answer["after"] for answer in answers)
    assert main(["ask", str(model_folder), *prompts, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)["answers"]
    assert [answer["before"] for answer in alone] == [answer["before"] for answer in answers]
    assert [answer["after"] for answer in alone] == [None, None]
    assert main(["ask", str(model_folder), *prompts, "--patch", run]) == 0
    table = capsys.readouterr().out
    assert "before" in table
    assert "chess" in table


def test_eval_scores_a_patch_as_its_run_did(
    model_folder: Path,
    run: str,
    edits: str,
    text: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["eval", str(model_folder), edits, "--patch", run, *text]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = json.loads((Path(run) / "report.json").read_text())
    scores = report["protocols"]["locft"]
    assert {**scores["after"], "drift": report["drift"]["overall"]} == expected["scores"]
    assert scores["change"] == expected["change"]
    lines = (Path(run) / "answers.jsonl").read_text().splitlines()
    assert report["answers"] == [json.loads(line) for line in lines]
    assert main([*words, "--gate", "reliability<=0.5"]) == 1
    captured = capsys.readouterr()
    assert "100.0% [34.2, 100.0] of 2" in captured.out
    assert "gate reliability<=0.5 failed: reliability is 1" in captured.err


def test_eval_without_a_base_fails_gates_on_what_it_cannot_measure(
    model_folder: Path, edits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(model_folder), edits, "--gate", "drift<=9"]) == 1
    captured = capsys.readouterr()
    assert "drift was not measured" in captured.err
    assert "--base" in " ".join(captured.out.split())


def test_apply_makes_a_model_that_answers_with_the_edits(
    model_folder: Path,
    run: str,
    edits: str,
    text: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edited = str(tmp_path / "edited")
    assert main(["apply", str(model_folder), run, "-o", edited]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    revert = f"to go back: locft revert {edited} --in-place"
    assert captured.err == f"locft: wrote {edited}: {model_folder} with 2 edits in it ({revert})\n"
    assert main(["ask", edited, "What sport does she play?", "--json"]) == 0
    [answer] = json.loads(capsys.readouterr().out)["answers"]
    assert answer["before"] == "chess"
    words = ["eval", edited, edits, "--base", str(model_folder), *text, "--json"]
    assert main([*words, "--gate", "reliability>=1"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = json.loads((Path(run) / "report.json").read_text())["scores"]
    assert report["protocols"]["locft"]["after"]["locality"] == expected["locality"]
    drift = report["drift"]["overall"]["value"]
    assert drift == pytest.approx(expected["drift"]["value"], rel=1e-5)
    # Applied again, or over it, it is refused.
    assert main(["apply", edited, run, "-o", str(tmp_path / "twice")]) == 2
    assert "carries the patch already" in capsys.readouterr().err
    assert main(["apply", str(model_folder), run, "-o", edited]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]


def test_a_patch_of_another_model_exits_with_2(
    run: str,
    edits: str,
    save_model: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = str(save_model(tiny_llama_config(intermediate_size=48)))
    for words in (
        ["ask", other, "Who", "--patch", run],
        ["eval", other, edits, "--patch", run],
        ["apply", other, run, "-o", str(tmp_path / "out")],
    ):
        assert main(words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "the patch was made from" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_patch_exits_with_2(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", str(model_folder), "Who", "--patch", str(tmp_path)]) == 2
    assert "is not a patch" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_exits_with_one_line(
    model_folder: Path, edits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["edit", str(model_folder), edits, "-o", str(tmp_path / "file" / "run")]) in (1, 2)
    assert "locft: error: " in capsys.readouterr().err.splitlines()[-1]


def test_an_interrupt_outside_a_run_exits_with_130(
    model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("locft.recipe.inquiry.load_subject", interrupted)
    assert main(["ask", str(model_folder), "Who"]) == 130
    assert capsys.readouterr().err == "locft: interrupted: nothing was kept\n"


def test_an_interrupt_after_training_names_the_patch_that_is_kept(
    model_folder: Path,
    edits: str,
    text: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("locft.recipe.edit.drift_of_values", interrupted)
        words = ["edit", str(model_folder), edits, "-o", str(run), "--epochs", "1", *text]
        assert main(words) == 130
    assert f"the finished patch is kept in {run / 'patch'}" in capsys.readouterr().err
    assert main(["eval", str(model_folder), edits, "--patch", str(run / "patch"), *text]) == 0


def test_a_process_prints_json_alone_and_uses_the_run_file(
    model_folder: Path, edits: str, text: list[str], tmp_path: Path
) -> None:
    config = tmp_path / "run.toml"
    config.write_text('epochs = 3\nlocation = "1.attn"\nlr = 1\n')
    words = ["edit", str(model_folder), edits, "-o", str(tmp_path / "run"), "--json"]
    words += ["--config", str(config), "--lr", "0.001"]
    done = subprocess.run(
        [sys.executable, "-m", "locft", *words, *text],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["training"]["epochs_at_most"] == 3
    assert (report["training"]["lr"], report["location"]["name"]) == (0.001, "1.attn")
    # No bar, no notice of another library.
    assert all(line.startswith("locft: ") for line in done.stderr.splitlines()), done.stderr


def test_sigint_during_training_exits_with_130_and_leaves_no_run_folder(
    model_folder: Path, edits: str, text: list[str], tmp_path: Path
) -> None:
    # Where the tests run in the background, SIGINT is ignored, and children inherit that.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from locft.cli.main import main; raise SystemExit(main())"
    )
    words = ["edit", str(model_folder), edits, "-o", str(tmp_path / "run"), *text]
    words += ["--epochs", "1000000", "--stop-loss", "0"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        deadline = time.monotonic() + 60
        # The run folder is staged beside its place.
        while not any(log.stat().st_size for log in tmp_path.glob(".locft-*-run/train.jsonl")):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail("training did not begin")
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == ("locft: interrupted: training was not done, and nothing was kept")
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
