import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import locft
from locft.cli.gates import Gate, parse_gate
from locft.cli.main import main
from locft.cli.parser import build_parser, parse_words
from locft.config import RunConfig, read_config, to_toml
from locft.errors import ConfigError, EvaluationError
from locft.patch.format import Patch, PatchTensor, write_patch
from locft.patch.manifest import PatchLocation, PatchManifest, PatchModel
from locft.report.words import SCORE_NAMES
from locft.tensorfile import TensorData, hash_tensor, write_safetensors
from locft.types import Figure, Scores

COMMANDS = (
    *("edit", "ask", "eval", "lint", "convert", "export", "bench"),
    *("apply", "stack", "revert", "status", "inspect", "diff"),
)
OTHER_VALUES: dict[str, Any] = {
    "location": "5.attn",
    "format": "chat",
    "lr": 0.125,
    "batch_size": 3,
    "epochs": 7,
    "stop_loss": 0.5,
    "loss_mean": "token",
    "seed": 11,
    "preserve": "covariance:7+anchors:9",
    "augment": "prefix:2+formats",
    "rephraser": "endpoint",
    "max_drift": 0.25,
    "neutral_text": "another file.txt",
    "prefer": "preservation",
    "budget": "90s",
    "on_conflict": "keep-last",
    "dtype": "bfloat16",
    "compute_dtype": "bfloat16",
    "compile": "on",
    "device": "cpu",
    "eval_batch_size": 9,
    "drift_text": "some file.txt",
    "revision": "abc",
}
SCORES = Scores(
    reliability=Figure(value=0.95, num=20, low=0.76, high=0.99),
    generalization=Figure(value=None, num=0, reason="the edits hold none"),
    locality=Figure(value=0.5, num=4, low=0.15, high=0.85),
    drift=Figure(value=0.1, num=40, low=0.09, high=0.11),
)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def settings_of(words: argparse.Namespace) -> dict[str, Any]:
    return {
        key.removeprefix("setting_"): value
        for key, value in vars(words).items()
        if key.startswith("setting_")
    }


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Catch the settings that `edit` is run with, and stop it there."""
    configs: list[RunConfig] = []

    def edit(model: str, edits: Any, output: str, config: RunConfig, *, say: Any) -> None:
        configs.append(config)
        raise locft.InputError("enough")

    monkeypatch.setattr("locft.recipe.edit.edit", edit)
    return configs


def run_edit(*words: str) -> int:
    return main(["edit", "model", "edits.jsonl", "-o", "run", *words])


@pytest.mark.parametrize("name", [setting.name for setting in fields(RunConfig)])
def test_every_setting_is_a_flag_of_edit(name: str, seen: list[RunConfig]) -> None:
    value = OTHER_VALUES[name]
    assert value != getattr(RunConfig(), name)
    assert run_edit(flag(name), str(value)) == 2
    assert seen == [replace(RunConfig(), **{name: value})]


def test_without_flags_the_defaults_hold(seen: list[RunConfig]) -> None:
    run_edit()
    assert seen == [RunConfig()]


@pytest.mark.parametrize(
    ("command", "words", "refused"),
    [
        ("ask", ["m", "p"], {"lr", "epochs", "seed", "location", "drift_text", "on_conflict"}),
        ("eval", ["m", "e"], {"lr", "epochs", "seed", "location"}),
        ("lint", ["e"], {"lr", "device", "drift_text"}),
        ("apply", ["m", "p", "-o", "d"], {"lr", "format", "device"}),
        ("convert", ["f", "-o", "d"], {"lr", "revision"}),
    ],
)
def test_other_commands_refuse_flags_that_mean_nothing_to_them(
    command: str, words: list[str], refused: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = build_parser()
    for name, value in OTHER_VALUES.items():
        line = [command, *words, flag(name), str(value)]
        if name in refused:
            with pytest.raises(SystemExit):
                parser.parse_args(line)
            assert flag(name) in capsys.readouterr().err
    if command in ("ask", "eval", "lint"):
        assert settings_of(parser.parse_args([command, *words, "--format", "chat"])) == {
            "format": "chat"
        }


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lr", "fast", "a number or auto"),
        ("lr", "0", "a number over 0 or auto"),
        ("lr", "-1e-3", "a number over 0 or auto"),
        ("lr", "nan", "a number over 0 or auto"),
        ("lr", "inf", "a number over 0 or auto"),
        ("batch_size", "0", "a whole number over 0"),
        ("batch_size", "2.5", "a whole number"),
        ("epochs", "many", "a whole number or auto"),
        ("epochs", "-1", "a whole number over 0 or auto"),
        ("stop_loss", "-0.1", "a number of at least 0"),
        ("stop_loss", "auto", "a number"),
        ("seed", "-1", "a whole number of at least 0"),
        ("seed", "%s", "a whole number"),
        ("eval_batch_size", "0", "a whole number over 0"),
        ("format", "raws", "raw or chat"),
        ("loss_mean", "mean", "sample or token"),
        ("on_conflict", "keep", "error or keep-last or keep-first"),
        ("dtype", "float16", "auto or float32 or bfloat16"),
    ],
)
def test_a_bad_value_is_refused_with_the_setting_and_what_was_expected(
    name: str, value: str, expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_edit(f"{flag(name)}={value}")
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"locft: error: argument {flag(name)}: {name} is")
    assert said.endswith(f": expected {expected} (see locft edit --help)\n")
    # The same from a run file.
    is_number = re.fullmatch(r"-?[\d.]+(e-?\d+)?|nan|inf", value) is not None
    file = tmp_path / "run.toml"
    file.write_text(f"{name} = {value if is_number else json.dumps(value)}\n")
    assert run_edit("--config", str(file)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"locft: error: {file}: {name} is")
    assert said.endswith(f": expected {expected}\n")


def test_flags_win_over_the_run_file_and_that_over_the_defaults(
    tmp_path: Path, seen: list[RunConfig]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('lr = 1\nepochs = 3\nlocation = "1.mlp"\n')
    run_edit("--config", str(file), "--epochs", "auto", "--seed", "4")
    assert seen == [replace(RunConfig(), lr=1.0, location="1.mlp", seed=4)]


def test_a_flag_at_its_default_wins_over_the_run_file_too(tmp_path: Path, seen: list[RunConfig]) -> None:
    file = tmp_path / "run.toml"
    file.write_text("batch_size = 3\n")
    run_edit("--batch-size", "20", "--config", str(file))
    assert seen == [RunConfig()]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("epoch = 3", "unknown setting 'epoch': did you mean 'epochs'?"),
        ("batch-size = 3", "did you mean 'batch_size'?"),
        ("zzz = 3", "known: location, format"),
        ("lr = ", "is no TOML file"),
        ("seed = true", "seed is True: expected a whole number"),
        ("seed = 1.0", "seed is 1.0: expected a whole number"),
        ("[lr]\nvalue = 1", "lr is {'value': 1}: expected a number or auto"),
        ('format = ["raw"]', "format is ['raw']: expected raw or chat"),
    ],
)
def test_a_run_file_that_cannot_be_used_is_refused(
    tmp_path: Path, content: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(content)
    assert run_edit("--config", str(file)) == 2
    error = capsys.readouterr().err
    assert str(file) in error
    assert said in error


def test_a_missing_run_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_edit("--config", str(tmp_path / "none.toml")) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err


@example(config=RunConfig(drift_text='\x7f\u2028"\\\n.txt'))
@given(
    config=st.builds(
        RunConfig,
        location=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20),
        lr=st.one_of(st.just("auto"), st.floats(min_value=0, exclude_min=True, allow_infinity=False)),
        epochs=st.one_of(st.just("auto"), st.integers(1, 2**60)),
        stop_loss=st.floats(min_value=0, allow_infinity=False),
        seed=st.integers(0, 2**60),
        drift_text=st.none() | st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20),
    )
)
def test_a_written_run_file_reads_back_as_the_same_settings(
    config: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "written.toml"
    file.write_text(to_toml(config), "utf-8")
    assert read_config(file) == config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["edit", "m", "-o", "r"], "no edits"),
        (["edit", "m", "-o", "r", "--prompt", "p"], "--prompt TEXT and --target TEXT together"),
        (["edit", "m", "-o", "r", "--target", "t"], "--prompt TEXT and --target TEXT together"),
        (["edit", "m", "e", "-o", "r", "--prompt", "p", "--target", "t"], "either EDITS, or one edit"),
        (["eval", "m", "e", "--gate", "reliabilty>=1"], "gate 'reliabilty>=1' cannot be read"),
        (["edit", "m", "e", "-o", "r", "--gate", "drift<1"], "expected SCORE>=X or SCORE<=X"),
    ],
)
def test_words_that_do_not_go_together_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("locft: error: ")
    assert captured.out == ""


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("reliability>=0.95", Gate("reliability", ">=", 0.95)),
        (" drift <= 0.1 ", Gate("drift", "<=", 0.1)),
        ("locality>=1", Gate("locality", ">=", 1.0)),
        ("generalization<=00.50", Gate("generalization", "<=", 0.5)),
    ],
)
def test_a_gate_is_read(text: str, gate: Gate) -> None:
    assert parse_gate(text) == gate


@pytest.mark.parametrize(
    "text",
    [
        "",
        "reliability",
        "reliability>=",
        ">=0.5",
        "reliability>0.5",
        "reliability==0.5",
        "Reliability>=0.5",
        "reliability>=nan",
        "reliability>=-0.5",
        "reliability>=95%",
        "reliability>=0.5 drift<=1",
        "reliability>=٠",
    ],
)
def test_what_is_no_gate_is_refused_with_the_scores_there_are(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_gate(text)
    assert repr(text) in str(caught.value)
    assert all(name in str(caught.value) for name in SCORE_NAMES)


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("reliability>=0.95", None),
        ("reliability<=0.95", None),
        ("reliability>=0.951", "gate reliability>=0.951 failed: reliability is 0.95"),
        ("locality<=0.4", "gate locality<=0.4 failed: locality is 0.5"),
        ("drift<=0.1", None),
        ("drift<=0.05", "gate drift<=0.05 failed: drift is 0.1"),
        ("generalization<=1", "gate generalization<=1 failed: generalization was not measured"),
    ],
)
def test_a_gate_that_fails_says_why(text: str, failure: str | None) -> None:
    assert parse_gate(text).failure(vars(SCORES)) == failure


@given(st.sampled_from(("reliability", "locality", "drift")), st.integers(0, 2000))
def test_one_of_two_opposite_gates_holds(score: str, thousandths: int) -> None:
    bound = thousandths / (1000 if score == "drift" else 2000)
    value = getattr(SCORES, score).value
    held = [
        parse_gate(f"{score}{sign}{bound:.4f}").failure(vars(SCORES)) is None for sign in (">=", "<=")
    ]
    assert held == [value >= bound, value <= bound]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_prints_and_exits_0(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"usage: locft {command}")
    assert (
        "exit status: 0 done, 1 a gate or the run failed, 2 bad input, 130 interrupted" in captured.out
    )
    assert "%%" not in captured.out
    assert captured.err == ""


def test_help_of_edit_explains_every_setting_with_its_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["edit", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "SHARE%.MODULE" in told
    assert "(default: 70%.mlp.down)" in told
    for setting in fields(RunConfig):
        assert flag(setting.name) in told
        assert setting.metadata["help"].replace("%%", "%") in told


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    assert all(f"\n    {command} " in told for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "COMMAND (see locft --help)"),
        (["fly"], "'fly'"),
        (["edit"], "MODEL (see locft edit --help)"),
        (["edit", "m", "e"], "-o/--output"),
        (["apply", "m", "p"], "-o/--output --in-place is required (see locft apply --help)"),
        (["ask", "m", "p", "--no-such-flag"], "--no-such-flag"),
    ],
)
def test_words_that_argparse_refuses_exit_with_2_and_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("locft: error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_python_m_locft_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "locft", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"locft {locft.__version__}\n"


def heavy_modules_after(words: list[str]) -> tuple[int, list[str], str]:
    """Run the command line in a process of its own, and tell which slow modules it took."""
    code = (
        "import sys\n"
        "from locft.cli.main import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as end: status = end.code\n"
        "heavy = [name for name in ('torch', 'transformers', 'tokenizers') if name in sys.modules]\n"
        "print(f'\\n{status} {heavy}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    status, _, heavy = done.stdout.splitlines()[-1].partition(" ")
    return int(status), json.loads(heavy.replace("'", '"')), done.stderr


def test_help_needs_neither_torch_nor_transformers() -> None:
    status, heavy, _ = heavy_modules_after(["edit", "--help"])
    assert (status, heavy) == (0, [])


def test_lint_without_a_model_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text('{"prompt": "The sky is", "target": "green"}\n')
    status, heavy, error = heavy_modules_after(["lint", str(file)])
    assert status == 0, error
    assert heavy == []


def test_apply_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    old, new = bytes(range(16)), bytes(range(16, 32))
    write_safetensors(model / "model.safetensors", {"w": TensorData("F32", (2, 2), old)})
    manifest = PatchManifest(
        locft_version="0",
        model=PatchModel(id="m", revision=None),
        location=PatchLocation(name="0", layer=0, module="w", num_parameters=4),
        dtype="F32",
        settings={},
        num_edits=1,
        edits_sha256="0" * 64,
    )
    tensor = PatchTensor(
        dtype="F32",
        shape=(2, 2),
        data=new,
        old_sha256=hash_tensor("F32", (2, 2), old),
        new_sha256=hash_tensor("F32", (2, 2), new),
    )
    write_patch(Patch(tensors={"w": tensor}, manifest=manifest), tmp_path / "patch")
    words = ["apply", str(model), str(tmp_path / "patch"), "-o", str(tmp_path / "out")]
    status, heavy, error = heavy_modules_after(words)
    assert status == 0, error
    assert heavy == []
    assert (tmp_path / "out" / "model.safetensors").read_bytes().endswith(new)


def test_edits_and_prompts_may_stand_behind_flags() -> None:
    words = parse_words(["edit", "demo", "-o", "run", "facts.jsonl"])
    assert (words.model, words.edits, words.output) == ("demo", "facts.jsonl", "run")
    words = parse_words(["ask", "demo", "One", "--patch", "run", "Two"])
    assert (words.prompts, words.patch) == (["One", "Two"], "run")


@pytest.mark.parametrize("extra", [["more"], ["--nonsense"]])
def test_words_without_a_place_are_refused(extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_words(["edit", "demo", "facts.jsonl", "-o", "run", *extra])
    assert stopped.value.code == 2
    assert f"unrecognized arguments: {extra[0]}" in capsys.readouterr().err


def failing_with(error: BaseException, output: Path) -> Callable[..., None]:
    """An edit that writes its patch and then fails."""

    def edit(*_: object, **__: object) -> None:
        (output / "patch").mkdir(parents=True)
        raise error

    return edit


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried"), 1, "out of memory (CUDA out of memory. Tried)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "Try a smaller --batch-size"),
        (MemoryError(), 1, "out of memory (MemoryError)"),
        (EvaluationError("not finite"), 1, "error: not finite"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_whatever_stops_a_run_the_finished_patch_is_named(
    error: BaseException,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("locft.recipe.edit.edit", failing_with(error, tmp_path / "run"))
    assert main(["edit", "demo", "demo", "-o", str(tmp_path / "run")]) == status
    message = capsys.readouterr().err
    assert said in message
    assert f"the finished patch is kept in {tmp_path / 'run' / 'patch'}" in message


def test_a_bug_is_not_told_as_a_lack_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("shapes do not fit")
    monkeypatch.setattr("locft.recipe.edit.edit", failing_with(error, tmp_path / "run"))
    with pytest.raises(RuntimeError, match="shapes"):
        main(["edit", "demo", "demo", "-o", str(tmp_path / "run")])
