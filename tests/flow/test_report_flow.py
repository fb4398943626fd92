"""`locft report` from its words to what it prints and leaves, on runs that are made up."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from reports import (
    fit_report,
    make_answers,
    make_evaluation,
    make_passages,
    make_report,
    make_whole,
)

from locft.cli.main import main
from locft.recipe.run_folder import Run, save_evaluation, save_scored
from locft.report.schema import SCHEMA_VERSION

HOSTILE = "\x1b[31m[bold red]x[/] <script>|`\u202egnp.exe\u2066\x07\x9b2J\r"
NAME = "run\x1b[31m\u202e[red]"
# What steers a terminal, or turns the direction of writing; line feeds are ours.
STEERING = {*map(chr, range(32)), "\x7f", *map(chr, range(0x80, 0xA0)), "\u202e", "\u2066"} - {"\n"}


def save_run(folder: Path, text: str = "plain") -> str:
    folder.mkdir(parents=True)
    answers, passages = make_answers(text), make_passages(text)
    save_scored(Run(folder, fit_report(make_report(text), answers, passages), answers, passages))
    return str(folder)


def save_measured(folder: Path, text: str = "plain") -> str:
    answers, passages = make_answers(text), make_passages(text)
    save_evaluation(Run(folder, fit_report(make_evaluation(text), answers, passages), answers, passages))
    return str(folder)


def listing(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "plain")
    save_run(folder / "hostile", HOSTILE)
    save_measured(folder / "evaluation")
    return {path.name: listing(path) for path in folder.iterdir()}


def fill(folder: Path, files: dict[str, bytes]) -> str:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.fixture
def run(tmp_path: Path, contents: dict[str, dict[str, bytes]]) -> str:
    folder = fill(tmp_path / "run", contents["plain"])
    make_whole(tmp_path / "run")
    return folder


@pytest.fixture
def other(tmp_path: Path, contents: dict[str, dict[str, bytes]]) -> str:
    return fill(tmp_path / "other", contents["plain"])


@pytest.fixture
def evaluation(tmp_path: Path, contents: dict[str, dict[str, bytes]]) -> str:
    return fill(tmp_path / "evaluation", contents["evaluation"])


def report(*words: str) -> int:
    return main(["report", *words])


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run what is wrong: exit status 2, nothing on stdout and one line on stderr."""
    assert report(*words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("locft: error: ")
    assert shown.err.count("\n") == 1
    assert shown.err.endswith("\n")
    return shown.err


def test_a_run_is_drawn_into_its_folder(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = listing(tmp_path)
    (Path(run) / "report.html").unlink()
    assert report(run) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"locft: wrote {run}/report.md, {run}/report.html\n"
    assert listing(tmp_path) == whole


def test_a_run_is_drawn_into_another_folder(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(tmp_path)
    output = tmp_path / "new" / "drawn"
    assert report(run, "-o", str(output)) == 0
    names = ("report.md", "report.html", "report.json")
    written = ", ".join(f"{output}/{name}" for name in names)
    assert capsys.readouterr().err == f"locft: wrote {written}\n"
    assert listing(output) == {name: before[f"run/{name}"] for name in names}


def test_what_a_report_does_without_is_told(
    run: str, contents: dict[str, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    old = fill(Path(run) / "old", {**contents["evaluation"], "report.json": b'{"schema_version": 1}'})
    assert report(run) == 0
    told, _ = capsys.readouterr().err.splitlines()
    assert told.startswith(f"locft: left out: {old}/report.json: an older locft wrote it")
    assert told.endswith(f"`locft eval MODEL {run}/edits.jsonl --patch {run} -o NEW`")
    shutil.rmtree(Path(run) / "patch")
    assert report(run, "--json") == 0
    told, missing = capsys.readouterr().err.splitlines()
    assert "--patch" not in told
    assert missing == f"locft: {run}: holds no patch/ any more, only what was measured of it"


@pytest.mark.parametrize("kind", ["plain", "hostile", "evaluation"])
def test_json_is_the_run_s_own(
    tmp_path: Path,
    contents: dict[str, dict[str, bytes]],
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = fill(tmp_path / "folder", contents[kind])
    make_whole(tmp_path / "folder")
    assert report(folder, "--json") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert json.loads(shown.out) == json.loads(contents[kind]["report.json"])
    if kind != "hostile":  # whose control characters are escaped
        assert shown.out.encode() == contents[kind]["report.json"]
    assert not STEERING & set(shown.out)


def test_runs_are_compared_in_tables(
    run: str, evaluation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(tmp_path)
    assert report(run, evaluation) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for told in (
        "2 runs side by side",
        "B against A: no clear difference in reliability, generalization, drift.",
        "Runs",
        "Scores",
        "50.0% [9.5, 90.5] of 2",
        "Differences",
        "+0.0 [",
        "against A",
        "Cost",
        "Differences are paired: only items that both runs have count",
    ):
        assert told in shown.out
    assert "<svg" not in shown.out
    assert listing(tmp_path) == before


def test_a_comparison_is_written_and_printed(
    run: str, evaluation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(Path(run)), listing(Path(evaluation))
    output = tmp_path / "comparison"
    assert report(run, evaluation, "-o", str(output), "--json") == 0
    shown = capsys.readouterr()
    assert shown.err == f"locft: wrote {output}/report.html, with report.md and report.json\n"
    assert shown.out.encode() == (output / "report.json").read_bytes()
    assert sorted(listing(output)) == ["report.html", "report.json", "report.md"]
    assert json.loads(shown.out)["kind"] == "comparison"
    assert (listing(Path(run)), listing(Path(evaluation))) == before


def test_a_comparison_in_json_is_one_object(
    run: str, other: str, evaluation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(tmp_path)
    assert report(run, other, evaluation, "--json") == 0
    shown = capsys.readouterr()
    assert [one["name"] for one in json.loads(shown.out)["runs"]] == ["A", "B", "C"]
    assert shown.err == ""
    assert listing(tmp_path) == before


def test_a_comparison_is_told_where_it_is_written(
    run: str, evaluation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(run, evaluation, "-o", str(tmp_path / "new")) == 0
    shown = capsys.readouterr()
    assert "side by side" in shown.out
    assert "with report.md and report.json" in shown.err


def test_a_comparison_may_stand_within_a_run_that_is_drawn_later(
    run: str, evaluation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(run, evaluation, "-o", f"{run}/comparison") == 0
    assert report(run) == 0


@pytest.mark.parametrize("num", [1, 2])
def test_a_taken_folder_is_refused_before_anything_is_read(
    run: str, tmp_path: Path, num: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(tmp_path)
    told = refusal(capsys, *["nowhere"] * num, "-o", run)
    assert f"{run}: exists and is not empty" in told
    assert listing(tmp_path) == before


def test_what_is_no_run_is_told(
    run: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half" / "patch").mkdir(parents=True)
    assert "there is no such run folder" in refusal(capsys, str(tmp_path / "none"))
    assert "`locft eval MODEL" in refusal(capsys, str(tmp_path / "half"))
    assert "no report.json" in refusal(capsys, run, str(tmp_path))
    (Path(run) / "answers.jsonl").write_text("{")
    before = listing(tmp_path)
    for words in ([run], [run, other], [run, "--json"], [run, "-o", str(tmp_path / "new")]):
        assert f"{run}/answers.jsonl: line 1 is damaged" in refusal(capsys, *words)
    assert listing(tmp_path) == before


def test_too_many_runs_are_told(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "27 runs: expected 2 to 26 to compare" in refusal(capsys, *[run] * 27)


@pytest.mark.parametrize("words", [[], ["--json"], ["-o", "new"], ["run", "--unknown"]])
def test_words_that_are_wrong_are_told(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        report(*words)
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("locft: error: ")
    assert told.count("\n") == 1


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="names of files are bytes on Linux")
@pytest.mark.parametrize("words", [[], ["-o", "out\x1b]0;x\x07"], ["--json"]])
@pytest.mark.parametrize("names", [[NAME], [NAME, f"other{NAME}"]], ids=["one", "two"])
def test_hostile_names_and_texts_do_not_steer_a_terminal(
    tmp_path: Path,
    contents: dict[str, dict[str, bytes]],
    words: Sequence[str],
    names: Sequence[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in names:
        fill(tmp_path / name, contents["hostile"])
        fill(tmp_path / name / f"inner{NAME}", contents["evaluation"])
        fill(tmp_path / name / f"damaged{NAME}", {"report.json": json.dumps(HOSTILE).encode()})
    assert report(*names, *words) == 0
    shown = capsys.readouterr()
    assert not STEERING & set(shown.out + shown.err)
    if len(names) == 2 and "--json" not in words:
        assert "\\u202e" in shown.out
        assert "[red]" in shown.out


def test_hostile_names_in_errors_do_not_steer_a_terminal(
    tmp_path: Path,
    contents: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not STEERING & set(refusal(capsys, NAME))
    fill(
        tmp_path / NAME,
        {"report.json": json.dumps({"schema_version": SCHEMA_VERSION, "kind": HOSTILE}).encode()},
    )
    assert not STEERING & set(refusal(capsys, NAME))
    damaged = json.loads(contents["evaluation"]["report.json"])
    damaged["parts_s"] = {f"{HOSTILE}\n": 1e300}
    fill(tmp_path / "damaged", {"report.json": json.dumps(damaged).encode()})
    assert not STEERING & set(refusal(capsys, "damaged"))


def test_half_characters_in_names_are_drawn_and_printed(
    tmp_path: Path, contents: dict[str, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill(tmp_path / os.fsdecode(b"caf\xe9"), contents["plain"])
    fill(Path(folder) / os.fsdecode(b"\xe9val"), contents["evaluation"])
    assert report(folder) == 0
    assert "caf\\udce9" in capsys.readouterr().err
    other = fill(tmp_path / os.fsdecode(b"caf\xe9s"), contents["plain"])
    assert report(folder, other, "-o", str(tmp_path / "new")) == 0
    capsys.readouterr()
    assert report(folder, other, "--json") == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["folder"] == folder


def test_nothing_heavy_is_loaded(run: str, evaluation: str, tmp_path: Path) -> None:
    code = (
        "import json, sys\n"
        "from locft.cli.main import main\n"
        "run, evaluation, output = sys.argv[1:]\n"
        "for words in ([run], [run, '--json'], [run, evaluation], [run, evaluation, '-o', output]):\n"
        "    assert main(['report', *words]) == 0, words\n"
        "found = {'torch', 'transformers', 'tokenizers', 'lm_eval'} & sys.modules.keys()\n"
        "assert not found, found\n"
    )
    words = [run, evaluation, str(tmp_path / "new")]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
