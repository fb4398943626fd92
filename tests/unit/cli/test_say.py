"""Nothing that somebody else named or wrote steers the terminal."""

import ast
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import locft
from locft.cli.main import main
from locft.cli.say import print_json, print_lines, say
from locft.cli.show import make_console, make_table
from locft.patch.format import Patch, PatchTensor, write_patch
from locft.patch.manifest import PatchLocation, PatchManifest, PatchModel
from locft.tensorfile import TensorData, hash_tensor, write_safetensors

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202e\u2028"
# What a folder's name may hold, bytes that are no UTF-8 included.
NAME = ESCAPE + "\r" + os.fsdecode(b"\xff")


def assert_harmless(text: str) -> None:
    assert text.endswith("\n")
    for line in text.removesuffix("\n").split("\n"):
        assert line.isprintable(), line
    text.encode()


def test_line_feeds_are_kept_and_all_else_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"one {NAME}\n  two ü")
    print_lines(f"three {NAME}\nfour")
    captured = capsys.readouterr()
    assert captured.err.startswith(r"locft: one \u001b]0;owned\u0007\u001b[2J\u009b31m\u007f\u202e")
    assert captured.err.endswith("\n  two ü\n")
    assert captured.out.startswith(r"three \u001b]0;")
    assert captured.out.endswith("\nfour\n")
    assert_harmless(captured.err)
    assert_harmless(captured.out)


def test_json_stays_the_same_json(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"ä" + NAME: [NAME, "\n", {"x": 1.5}], "wide": "日本"}
    print_json(value)
    out = capsys.readouterr().out
    assert_harmless(out)
    assert json.loads(out) == value
    assert "日本" in out


def tensor(data: bytes) -> PatchTensor:
    digest = hash_tensor("F32", (2,), data)
    return PatchTensor(dtype="F32", shape=(2,), data=data, old_sha256=digest, new_sha256=digest)


STREAMS = ("sys.stdout.write", "sys.stderr.write")
PATCH = Patch(
    tensors={ESCAPE: tensor(bytes(8))},
    manifest=PatchManifest(
        locft_version=ESCAPE,
        model=PatchModel(id=ESCAPE, revision=ESCAPE),
        location=PatchLocation(name=ESCAPE, layer=0, module=ESCAPE, num_parameters=2),
        dtype="F32",
        settings={ESCAPE: ESCAPE},
        num_edits=1,
        edits_sha256="0" * 64,
    ),
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model, a patch of another one and two edits files; all have hostile names."""
    folder = tmp_path / NAME
    folder.mkdir()
    model = folder / f"model{NAME}"
    model.mkdir()
    (model / "config.json").write_text("{}")
    write_safetensors(model / "model.safetensors", {"w" + ESCAPE: TensorData("F32", (2,), bytes(8))})
    write_patch(PATCH, folder / f"patch{NAME}")
    record = {"prompt": ESCAPE, "target": ESCAPE, ESCAPE: 1, "id": ESCAPE}
    (folder / f"edits{NAME}.jsonl").write_text(json.dumps(record) + "\n")
    other = record | {"target": "x", "id": "y"}
    (folder / f"bad{NAME}.jsonl").write_text(f"{json.dumps(record)}\n{json.dumps(other)}\n{{")
    return folder


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("command", "status"),
    [
        (lambda at: ["lint", f"{at}/edits{NAME}.jsonl"], 0),
        (lambda at: ["lint", f"{at}/bad{NAME}.jsonl"], 2),
        (lambda at: ["lint", f"{at}/none{NAME}.jsonl"], 2),
        (lambda at: ["lint", f"{at}"], 2),
        (lambda at: ["apply", f"{at}/model{NAME}", f"{at}/patch{NAME}", "-o", f"{at}/out{NAME}"], 2),
        (lambda at: ["apply", f"{at}/none{NAME}", f"{at}/patch{NAME}", "-o", f"{at}/out{NAME}"], 2),
        (lambda at: ["apply", f"{at}/model{NAME}", f"{at}/none{NAME}", "-o", f"{at}/out{NAME}"], 2),
        (lambda at: ["apply", f"{at}/model{NAME}", f"{at}/patch{NAME}", "-o", f"{at}/patch{NAME}"], 2),
        (lambda at: ["edit", f"{at}/model{NAME}", f"{at}/bad{NAME}.jsonl", "-o", f"{at}/run{NAME}"], 2),
        (lambda at: ["edit", f"{at}/model{NAME}", "demo", "-o", f"{at}/run", "--gate", NAME], 2),
        (lambda at: ["edit", f"{at}/model{NAME}", "demo", "-o", f"{at}/run", "--config", NAME], 2),
        (lambda at: ["inspect", f"{at}/patch{NAME}"], 0),
        (lambda at: ["status", f"{at}/model{NAME}"], 0),
        (lambda at: ["diff", f"{at}/model{NAME}", f"{at}/patch{NAME}"], 2),
    ],
)
def test_hostile_names_come_out_escaped(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    command: Callable[[Path], list[str]],
    status: int,
    as_json: bool,
) -> None:
    before = sorted(path.name for path in place.iterdir())
    assert main([*command(place), *(["--json"] if as_json else [])]) == status
    captured = capsys.readouterr()
    said = captured.err + captured.out
    assert_harmless(said)
    if status == 2:
        assert r"\u001b]0;owned" in said or r"\x1b]0;owned" in said
    if as_json and status == 0:
        assert isinstance(json.loads(captured.out), dict)
    assert sorted(path.name for path in place.iterdir()) == before


@pytest.mark.parametrize(
    "words",
    [
        [NAME],
        ["lint", "x", NAME],
        ["lint", "x", f"--{NAME}"],
        ["lint", "x", "--format", NAME],
        ["edit", "m", "e", "-o", "r", "--epochs", "\nlocft: all is well\n" + NAME],
        ["lint", "x", "one\ntwo"],
    ],
)
def test_words_that_are_refused_come_out_escaped_on_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert_harmless(captured.err)


def test_a_line_feed_in_a_files_name_makes_no_line_of_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a\nedits.jsonl: 0 errors, 0 warnings\n.jsonl"
    path.write_text("{")
    assert main(["lint", str(path)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(str(tmp_path)) for line in lines)


def test_the_title_of_a_table_is_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    table = make_table(f"[red]{NAME}", "a column that is as wide as the title, " + 80 * "x")
    make_console().print(table)
    out = capsys.readouterr().out
    assert_harmless(out)
    assert r"[red]\u001b]0;owned" in out


def writers(source: str) -> list[int]:
    """Find the lines that write to an output stream of the process, or print."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = {node.lineno: ast.unparse(node.func) for node in calls}
    return [line for line in sorted(names) if names[line] in ("print", *STREAMS)]


def test_only_one_place_writes_to_the_terminal() -> None:
    assert writers("import sys\nsys.stdout.write('x')\nsys.stderr.write('x')\nprint('x')") == [2, 3, 4]
    root = Path(locft.__file__).parent
    found = {
        str(path.relative_to(root)) for path in root.rglob("*.py") if writers(path.read_text("utf-8"))
    }
    # The second is below the command line, and escapes by itself.
    assert found <= {"cli/say.py", "model/demo.py"}
