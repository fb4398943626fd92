"""What a run leaves on the disk is read as it was written, or refused in one message."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reports import (
    fit_report,
    make_answer,
    make_answers,
    make_endpoint,
    make_evaluation,
    make_passages,
    make_report,
)

from locft.errors import InputError, RunError
from locft.evaluation.metrics import mean
from locft.recipe import run_folder
from locft.recipe.run_folder import Run, draw, read_run, save_evaluation, save_scored
from locft.report.schema import SCHEMA_VERSION, EditReport
from locft.types import AnswerRecord, PassageDrift

REPORT, ANSWERS, DRIFT = "report.json", "answers.jsonl", "drift.jsonl"
TEXTS = st.text(max_size=30) | st.sampled_from(
    ["", "\r\n", "\u2028\x85", "\x00", "\x1b[31m", "\u202egnp", "é" * 400, '"\\', "\U0010ffff", "NaN"]
)
WRONG: tuple[Any, ...] = ([], "\udc80", True, 1.5, None)
ANY = ("settings", "resolved")  # fields below these may hold any value


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def fitting(
    folder: Path,
    report: Any,
    answers: tuple[AnswerRecord, ...],
    passages: tuple[PassageDrift, ...],
) -> Run:
    return Run(folder, fit_report(report, answers, passages), answers, passages)


def save_edit_run(folder: Path, text: str = "plain", **changes: Any) -> Run:
    folder.mkdir(parents=True)
    run = fitting(folder, make_report(text, **changes), make_answers(text), make_passages(text))
    save_scored(run)
    return run


def save_evaluation_run(folder: Path, text: str = "plain", **changes: Any) -> Run:
    run = fitting(folder, make_evaluation(text, **changes), make_answers(text), make_passages(text))
    save_evaluation(run)
    return run


@pytest.fixture(scope="session")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Give the files of an edit run and of an evaluation, drawn once."""
    folder = tmp_path_factory.mktemp("runs")
    save_edit_run(folder / "edit")
    save_evaluation_run(folder / "evaluation")
    return {kind.name: listing(kind) for kind in folder.iterdir()}


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def run(tmp_path: Path, contents: dict[str, dict[str, bytes]]) -> Path:
    return fill(tmp_path / "run", contents["edit"])


@pytest.fixture
def evaluation(tmp_path: Path, contents: dict[str, dict[str, bytes]]) -> Path:
    return fill(tmp_path / "evaluation", contents["evaluation"])


def listing(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refusal(folder: Path) -> str:
    """Read a folder that is wrong: one error in one line, and nothing is written."""
    before = listing(folder) if folder.is_dir() else {}
    with pytest.raises(RunError) as caught:
        read_run(folder)
    assert caught.value.exit_status == 2
    assert isinstance(caught.value, InputError)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert before == (listing(folder) if folder.is_dir() else {})
    return message


def way_out(run: Path) -> str:
    return f"; to score its patch: `locft eval MODEL {run / 'edits.jsonl'} --patch {run} -o NEW`"


def told(folder: Path) -> str | None:
    """Say why a folder is refused; None if it is not."""
    try:
        read_run(folder)
    except RunError as error:
        return str(error)
    return None


def change(folder: Path, alter: Callable[[dict[str, Any]], object], file: str = REPORT) -> None:
    record = json.loads((folder / file).read_bytes())
    alter(record)
    (folder / file).write_text(json.dumps(record))


def put(record: Any, place: tuple[str | int, ...], value: object) -> Any:
    changed = copy.deepcopy(record)
    inner = changed
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    return changed


def leaves(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from leaves(part, (*place, name))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from leaves(part, (*place, number))
    else:
        yield place, value


def objects(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, dict):
        yield place
        for name, part in value.items():
            yield from objects(part, (*place, name))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from objects(part, (*place, number))


# What is saved is read.


def test_an_edit_run_is_read_as_it_was_saved(tmp_path: Path) -> None:
    saved = save_edit_run(tmp_path / "run")
    assert read_run(tmp_path / "run") == saved
    names = ["answers.jsonl", "drift.jsonl", "report.html", "report.json", "report.md"]
    assert sorted(listing(tmp_path)) == [f"run/{name}" for name in names]


def test_an_evaluation_is_read_as_it_was_saved(tmp_path: Path) -> None:
    saved = save_evaluation_run(tmp_path / "new" / "evaluation")
    assert read_run(tmp_path / "new" / "evaluation") == saved


def test_scores_leave_what_else_is_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run" / "patch").mkdir(parents=True)
    (tmp_path / "run" / "patch" / "weights").write_bytes(b"\x00")
    (tmp_path / "run" / "edits.jsonl").write_text("{}\n")
    save_scored(fitting(tmp_path / "run", make_report(), make_answers(), make_passages()))
    assert {"patch/weights", "edits.jsonl", REPORT} <= listing(tmp_path / "run").keys()
    assert not [path for path in tmp_path.iterdir() if path.name != "run"]


def test_an_evaluation_needs_a_place_of_its_own(tmp_path: Path) -> None:
    saved = save_evaluation_run(tmp_path / "evaluation")
    before = listing(tmp_path)
    with pytest.raises(InputError, match="exists and is not empty"):
        save_evaluation(saved)
    assert listing(tmp_path) == before


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, answer=TEXTS, name=TEXTS)
def test_any_text_is_read_as_it_was_saved(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    answer: str,
    name: str,
) -> None:
    monkeypatch.setattr(Run, "page", lambda run: None)
    monkeypatch.setattr(run_folder, "draw", lambda page: {})  # tests of reports draw any text
    folder = tmp_path_factory.mktemp("texts")
    changes: dict[str, Any] = {"settings": {name: text}, "causes": {name: {text: 3}}}
    report = make_report(text, **changes)
    answers = (
        make_answer(text, before=answer, after=None, expected=None, details_after={name: 0.5}),
        make_answer(answer, score_after=None),
    )
    passages = make_passages(text)
    (folder / "run").mkdir()
    for saved, save in (
        (fitting(folder / "run", report, answers, passages), save_scored),
        (fitting(folder / "new", make_evaluation(text), answers, passages), save_evaluation),
    ):
        save(saved)
        assert read_run(saved.folder) == saved


def test_half_characters_as_names_of_files_have_are_read_as_they_were_saved(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    saved = save_evaluation_run(tmp_path / "evaluation", patch=name)
    assert read_run(tmp_path / "evaluation") == saved
    assert "\\udce9" in (tmp_path / "evaluation" / "report.md").read_text("utf-8")


def test_an_evaluation_without_drift_has_no_file_of_it(tmp_path: Path) -> None:
    report = make_evaluation(
        model=None, endpoint=make_endpoint("there"), patch=None, drift=None, capability=None
    )
    saved = fitting(tmp_path / "evaluation", report, make_answers(), ())
    save_evaluation(saved)
    assert DRIFT not in listing(tmp_path / "evaluation")
    assert read_run(tmp_path / "evaluation") == saved


def test_a_run_without_answers_is_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    saved = fitting(tmp_path / "run", make_report(), (), ())
    save_scored(saved)
    assert read_run(tmp_path / "run") == saved


def test_fields_of_later_versions_are_passed_over(run: Path) -> None:
    change(run, lambda report: report.update(mood="good"))
    assert not hasattr(read_run(run).report, "mood")


# What is no run.


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "there is no such run folder" in refusal(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_file_is_told_from_a_folder(run: Path) -> None:
    assert "is no folder: expected a run folder" in refusal(run / REPORT)


def test_an_empty_folder_is_told_what_would_be_a_run(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert "no report.json" in message
    assert "`locft edit -o`" in message


def test_a_finished_patch_without_scores_is_told_how_to_get_them(tmp_path: Path) -> None:
    (tmp_path / "patch").mkdir()
    message = refusal(tmp_path)
    assert "whose scores are not" in message
    assert message.endswith(way_out(tmp_path))


@pytest.mark.parametrize("name", [ANSWERS, DRIFT])
def test_what_cannot_be_read_is_told_how_to_score_its_patch(
    run: Path, contents: dict[str, dict[str, bytes]], name: str
) -> None:
    for folder in (run, fill(run / "inner", contents["evaluation"])):
        (folder / name).unlink()
        without = refusal(folder)
        assert "--patch" not in without
        (run / "patch").mkdir()
        assert refusal(folder) == without + way_out(run)
        (run / "patch").rmdir()


def test_paths_that_no_system_takes_are_refused(tmp_path: Path) -> None:
    for name in ("a\x00b", "x" * 5000):
        with pytest.raises(RunError):
            read_run(tmp_path / name)


# A report that is damaged.


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"", "is damaged: Expecting value"),
        (b" \n", "is damaged: Expecting value"),
        (b"report", "is damaged: Expecting value"),
        (b"[]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b'{"schema_version": NaN}', "NaN"),
        (b'{"schema_version": -Infinity}', "-Infinity"),
        (b'{"schema_version": 1e999}', "too large"),
        (b'{"schema_version": ' + b"9" * 5000 + b"}", "too large"),
        (b'{"kind": "edit", "kind": "edit"}', "same key twice: 'kind'"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\xff"}', "utf-8"),
        ("{}".encode("utf-16"), "utf-8"),
        (b"\xef\xbb\xbf{}", "is damaged: Expecting value"),
        (b"{} {}", "Extra data"),
    ],
    ids=lambda value: str(value[:30]),
)
def test_what_is_no_strict_json_is_refused(run: Path, raw: bytes, what: str) -> None:
    (run / REPORT).write_bytes(raw)
    message = refusal(run)
    assert str(run / REPORT) in message
    assert what in message


@pytest.mark.parametrize("kind", ["edit", "evaluation"])
def test_a_report_that_is_cut_anywhere_is_refused(
    tmp_path: Path, contents: dict[str, dict[str, bytes]], kind: str
) -> None:
    folder = fill(tmp_path / "run", contents[kind])
    whole = contents[kind][REPORT]
    for end in range(0, len(whole) - 2, 200):
        (folder / REPORT).write_bytes(whole[:end])
        assert f"{folder / REPORT}: is damaged: " in refusal(folder)


def test_a_report_that_is_endless_is_not_read(run: Path) -> None:
    with (run / REPORT).open("r+b") as file:
        file.truncate(100_000_001)  # nothing is written: the rest is a hole
    with pytest.raises(RunError, match=r"100,000,001 bytes long, expected at most 100,000,000"):
        read_run(run)


@pytest.mark.parametrize("name", [REPORT, ANSWERS, DRIFT])
def test_a_pipe_is_never_waited_for(run: Path, name: str) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(RunError, match="is a pipe or a device, expected a regular file") as caught:
        read_run(run)
    assert str(run / name) in str(caught.value)


@pytest.mark.parametrize("name", [REPORT, ANSWERS, DRIFT])
def test_a_folder_in_the_place_of_a_file_is_told(run: Path, name: str) -> None:
    (run / name).unlink()
    (run / name).mkdir()
    assert f"{run / name}: cannot be read: Is a directory" in refusal(run)


@pytest.mark.parametrize("name", [REPORT, ANSWERS, DRIFT])
def test_a_link_that_leads_round_is_told(run: Path, name: str) -> None:
    (run / name).unlink()
    (run / name).symlink_to(name)
    assert f"{run / name}: cannot be read: Too many levels of symbolic links" in refusal(run)


@pytest.mark.parametrize("name", [REPORT, ANSWERS, DRIFT])
def test_what_may_not_be_read_is_told(run: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = os.open

    def open_others(path: Any, *args: Any, **options: Any) -> int:
        if str(path) == str(run / name):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", open_others)
    with pytest.raises(RunError) as caught:
        read_run(run)
    assert str(caught.value) == f"{run / name}: cannot be read: Permission denied"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is hidden from root")
def test_a_folder_that_may_not_be_searched_is_told(run: Path) -> None:
    run.chmod(0)
    try:
        with pytest.raises(RunError, match="Permission denied"):
            read_run(run)
    finally:
        run.chmod(0o700)


@pytest.mark.parametrize("kind", ["comparison", "Edit", "", None, 3, ["edit"], {"edit": 1}])
def test_another_kind_of_report_is_refused(run: Path, kind: object) -> None:
    change(run, lambda report: report.update(kind=kind))
    message = refusal(run)
    assert f"{run / REPORT}: field kind is {kind!r}: expected edit or evaluation" in message


def test_a_report_of_one_kind_is_not_read_as_another(run: Path, evaluation: Path) -> None:
    change(run, lambda report: report.update(kind="evaluation"))
    change(evaluation, lambda report: report.update(kind="edit"))
    for folder in (run, evaluation):
        assert "missing required field" in refusal(folder)


@pytest.mark.parametrize("version", [-1, 0, 1, SCHEMA_VERSION - 1])
def test_a_report_of_an_older_version_is_told(run: Path, version: int) -> None:
    change(run, lambda report: report.update(schema_version=version))
    what = f"an older locft wrote it (report version {version}; this one reads {SCHEMA_VERSION})"
    assert refusal(run) == f"{run / REPORT}: {what}"


def test_a_report_of_a_newer_version_is_told_to_upgrade(run: Path) -> None:
    change(run, lambda report: report.update(schema_version=99))
    message = refusal(run)
    assert f"a newer locft wrote it (report version 99; this one reads {SCHEMA_VERSION})" in message
    assert message.endswith("upgrade locft")


@pytest.mark.parametrize("version", [True, "3", float(SCHEMA_VERSION), None, [3], {}])
def test_a_version_is_a_whole_number(run: Path, version: object) -> None:
    change(run, lambda report: report.update(schema_version=version))
    message = refusal(run)
    assert f"field schema_version is {version!r}: expected the number {SCHEMA_VERSION}" in message


def test_a_report_without_a_version_is_refused(run: Path) -> None:
    change(run, lambda report: report.pop("schema_version"))
    assert f"field schema_version is None: expected the number {SCHEMA_VERSION}" in refusal(run)


@pytest.mark.parametrize("kind", ["edit", "evaluation"])
def test_each_field_that_is_missing_is_named(
    tmp_path: Path, contents: dict[str, dict[str, bytes]], kind: str
) -> None:
    folder = fill(tmp_path / "run", contents[kind])
    whole = json.loads(contents[kind][REPORT])
    num_refused = 0
    for place in objects(whole):
        if any(name in place for name in ANY):
            continue
        inner = whole
        for step in place:
            inner = inner[step]
        for name in inner:
            changed = copy.deepcopy(whole)
            reduced = changed
            for step in place:
                reduced = reduced[step]
            del reduced[name]
            (folder / REPORT).write_text(json.dumps(changed))
            if (message := told(folder)) is not None:
                assert f"{folder / REPORT}: " in message
                # Of names that shall be the same, the message has those of the first context.
                assert name in message or "contexts" in place
                num_refused += 1
    assert num_refused > 80


@pytest.mark.parametrize("kind", ["edit", "evaluation"])
def test_each_value_of_another_type_is_refused_by_the_name_of_its_field(
    tmp_path: Path, contents: dict[str, dict[str, bytes]], kind: str
) -> None:
    folder = fill(tmp_path / "run", contents[kind])
    whole = json.loads(contents[kind][REPORT])
    for place, value in leaves(whole):
        for wrong in WRONG:
            (folder / REPORT).write_text(json.dumps(put(whole, place, wrong)))
            is_any = any(name in place for name in ANY)
            message = told(folder)
            if message is not None:
                assert not is_any, place
                assert f"{folder / REPORT}: " in message
                # Names that a user gave are not said, but that they are within a field is.
                assert wrong == "\udc80" or any(str(name) in message for name in place), message
            elif not is_any:
                # It has a type that the field may have.
                assert wrong != [], place
                assert not isinstance(value, str) or isinstance(wrong, str) or wrong is None, place
                if isinstance(value, bool) or isinstance(wrong, bool):
                    assert isinstance(value, bool) is isinstance(wrong, bool), place
                if isinstance(value, int | float) and value is not None:
                    assert not isinstance(wrong, str), place
                    if isinstance(value, int):
                        assert wrong != 1.5, place


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (("edits", "num_edits"), "field edits.num_edits: expected int, got str"),
        (("training", "course", 1, "loss"), "field training.course[1].loss: expected float, got str"),
        (("scores", "drift", "value"), "field scores.drift.value: expected float | null, got str"),
        (("change", "reliability", "num"), "field change[...].num: expected int, got str"),
        (("location", "matrices", 0, "shape", 1), "field location.matrices[0].shape[1]: expected int"),
    ],
    ids=str,
)
def test_the_message_says_which_field_and_what_was_expected(
    run: Path, place: tuple[str | int, ...], name: str
) -> None:
    whole = json.loads((run / REPORT).read_bytes())
    (run / REPORT).write_text(json.dumps(put(whole, place, "x")))
    assert f"{run / REPORT}: is damaged: {name}" in refusal(run)


@pytest.mark.parametrize(
    ("fifths", "what"),
    [
        ([], "field training.fifths has 0 parts: expected 1 to 5"),
        ([1] * 6, "field training.fifths has 6 parts: expected 1 to 5"),
        ([1] * 4, "field training.course[0].success has 5 shares: expected 4, as training.fifths has"),
    ],
)
def test_fifths_that_no_training_has_are_refused(run: Path, fifths: list[int], what: str) -> None:
    change(run, lambda report: report["training"].update(fifths=fifths))
    assert what in refusal(run)


def test_the_epoch_that_does_not_fit_the_fifths_is_named(run: Path) -> None:
    change(run, lambda report: report["training"]["course"][2].update(success=[]))
    message = refusal(run)
    assert "field training.course[2].success has 0 shares: expected 5" in message


def test_training_without_an_epoch_is_drawn(run: Path) -> None:
    change(run, lambda report: report["training"].update(course=[]))
    assert draw(read_run(run).page())


def test_an_evaluation_without_a_protocol_is_refused(evaluation: Path) -> None:
    change(evaluation, lambda report: report.update(protocols={}))
    assert "field protocols is empty: expected one at least" in refusal(evaluation)


def test_contexts_that_were_scored_differently_are_refused(evaluation: Path) -> None:
    whole = (evaluation / REPORT).read_bytes()
    change(evaluation, lambda report: report["contexts"]["chat"].update(before=None))
    assert "field contexts" in refusal(evaluation)
    (evaluation / REPORT).write_bytes(whole)
    change(evaluation, lambda report: report["contexts"]["chat"]["after"].pop("reliability"))
    assert "field contexts" in refusal(evaluation)
    (evaluation / REPORT).write_bytes(whole)
    change(evaluation, lambda report: report["contexts"]["raw"]["before"].popitem())
    change(evaluation, lambda report: report["contexts"]["chat"]["before"].popitem())
    assert "field contexts" in refusal(evaluation)


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        (("scores", "reliability", "value"), 1e308, "outside its own interval [0.0945"),
        (("scores", "reliability", "low"), -1e308, "field scores.reliability.low"),
        (("scores", "reliability", "low"), None, "field scores.reliability"),
        (("scores", "reliability", "num"), 10**400, "field scores.reliability.num"),
        (("scores", "drift", "high"), 1e308, "field scores.drift.high"),
        (
            ("change", "reliability", "value"),
            1.5,
            "field change.reliability is 1.5, outside its own interval [",
        ),
        (("scores_before", "reliability", "low"), 0.01, "field scores_before.reliability is 0, outside"),
        (("change", "reliability", "num"), -1, "field change.reliability.num is -1: expected 0 or more"),
        (("edits", "num_edits"), -1, "field edits.num_edits is -1: expected 0 or more"),
        (("training", "steps"), -30, "field training.steps is -30: expected 0 or more"),
        (("drift", "by_kind", "plain", "high"), 1e308, "field drift.by_kind.plain.high"),
        (("drift", "num_tokens"), 10**400, "field drift.num_tokens"),
        (("training", "course", 1, "loss"), -1e308, "field training.course[1].loss"),
        (("training", "course", 1, "epoch"), 10**400, "field training.course[1].epoch"),
        (("training", "fifths", 1), 10**400, "field training.fifths[1]"),
        (("location", "num_parameters"), 10**400, "field location.num_parameters"),
        (("model", "num_parameters"), 0, "field model.num_parameters"),
        (("cost", "wall_s"), 1e308, "field cost.wall_s"),
        (("cost", "wall_s"), -0.5, "field cost.wall_s is -0.5: expected 0 or more"),
        (("plan", "train_s"), -0.5, "field plan.train_s is -0.5: expected 0 or more"),
        (("patch_bytes",), 10**400, "field patch_bytes"),
    ],
    ids=str,
)
def test_what_nobody_can_have_measured_is_refused(
    run: Path, place: tuple[str | int, ...], value: object, what: str
) -> None:
    whole = json.loads((run / REPORT).read_bytes())
    (run / REPORT).write_text(json.dumps(put(whole, place, value)))
    message = refusal(run)
    assert f"{run / REPORT}: is damaged: field " in message
    assert what in message


def test_no_part_of_an_evaluation_took_less_than_no_time(evaluation: Path) -> None:
    change(evaluation, lambda report: report["parts_s"].update(load=-0.5))
    assert "field parts_s.load is -0.5: expected 0 or more" in refusal(evaluation)


def test_a_loss_may_be_below_nothing(run: Path) -> None:
    change(run, lambda report: report["training"].update(final_loss=-0.5))
    change(run, lambda report: report["training"]["course"][-1].update(loss=-0.5))
    assert draw(read_run(run).page())


@pytest.mark.parametrize("value", [10**400, 1e308, "\ud800", None, [[1]], {"a": {}}, "x" * 100_000])
def test_settings_may_hold_anything(run: Path, value: object) -> None:
    change(run, lambda report: report.update(settings={"stop_loss": value, "x\n|": value}))
    found = read_run(run)
    assert isinstance(found.report, EditReport)
    assert found.report.settings["stop_loss"] == value
    assert draw(found.page())


# Lines that are damaged.


@pytest.mark.parametrize("name", [ANSWERS, DRIFT])
def test_a_missing_file_is_named(run: Path, name: str) -> None:
    (run / name).unlink()
    assert f"{run / name}: is missing, and the report cannot be drawn without it" in refusal(run)


@pytest.mark.parametrize("name", [ANSWERS, DRIFT])
def test_a_missing_file_of_an_evaluation_is_named(evaluation: Path, name: str) -> None:
    (evaluation / name).unlink()
    assert f"{evaluation / name}: is missing" in refusal(evaluation)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b" ",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"NaN",
        b"\xff",
        b'"\\ud800"',
        b"[" * 100_000,
        b'{"passage": 1e999}',
        b"9" * 5000,
        b"\x00",
    ],
    ids=lambda line: str(line[:20]),
)
@pytest.mark.parametrize(("name", "number"), [(ANSWERS, 1), (ANSWERS, 4), (DRIFT, 2)])
def test_a_line_that_is_damaged_is_named(run: Path, name: str, number: int, line: bytes) -> None:
    lines = (run / name).read_bytes().split(b"\n")
    lines[number - 1] = line
    (run / name).write_bytes(b"\n".join(lines))
    assert f"{run / name}: line {number} is damaged: " in refusal(run)


@pytest.mark.parametrize("name", [ANSWERS, DRIFT])
def test_a_line_that_is_cut_anywhere_is_named(run: Path, name: str) -> None:
    whole = (run / name).read_bytes()
    last = len(whole.splitlines())
    for end in range(len(whole) - len(whole.splitlines()[-1]), len(whole) - 1, 7):
        (run / name).write_bytes(whole[:end])
        assert f"{run / name}: line {last} is damaged: " in refusal(run)


def test_a_blank_line_at_the_end_is_named(run: Path) -> None:
    with (run / ANSWERS).open("ab") as file:
        file.write(b"\n")
    assert "line 7 is damaged" in refusal(run)


def test_the_last_line_may_lack_its_end(run: Path) -> None:
    before = read_run(run)
    (run / ANSWERS).write_bytes((run / ANSWERS).read_bytes().rstrip(b"\n"))
    assert read_run(run) == before


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("kind", "speed", "field kind: invalid enum value 'speed'"),
        ("kind", None, "field kind: expected str, got null"),
        ("cause", "bad luck", "field cause: invalid enum value 'bad luck'"),
        ("prompt", 3, "field prompt: expected str, got int"),
        ("after", [], "field after: expected str | null, got array"),
        ("score_after", "1", "field score_after: expected float | null, got str"),
        ("score_after", True, "field score_after: expected float | null, got bool"),
        ("score_after", 1.5, "field score_after is 1.5: expected 0 to 1"),
        ("score_before", -1e308, "field score_before"),
        ("details_after", {"a": "b"}, "field details_after[...]: expected float"),
        ("details_after", {"a": 1e308}, "field details_after"),
    ],
    ids=str,
)
def test_a_wrong_value_in_an_answer_is_named(run: Path, field: str, value: object, what: str) -> None:
    lines = (run / ANSWERS).read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), field: value})
    (run / ANSWERS).write_text("\n".join(lines))
    assert f"{run / ANSWERS}: line 2 is damaged: {what}" in refusal(run)


def test_each_field_that_an_answer_must_have_is_named(run: Path) -> None:
    lines = (run / ANSWERS).read_text().splitlines()
    for field in json.loads(lines[0]):
        record = json.loads(lines[0])
        del record[field]
        (run / ANSWERS).write_text("\n".join([json.dumps(record), *lines[1:]]))
        if field in ("details_before", "details_after", "cause"):
            assert len(read_run(run).answers) == len(lines)
        else:
            assert f"missing required field {field}" in refusal(run)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_tokens", 0), ("num_tokens", -1), ("num_tokens", 10**400), ("drift", 1e308), ("kind", 1)],
)
def test_a_passage_that_cannot_be_is_named(run: Path, field: str, value: object) -> None:
    line = {"passage": 1, "kind": "plain", "num_tokens": 100, "drift": 0.05, field: value}
    (run / DRIFT).write_text(json.dumps(line))
    message = refusal(run)
    assert f"{run / DRIFT}: line 1 is damaged: " in message
    assert field in message or "out of range" in message


def test_the_drift_of_a_report_that_has_none_is_not_read(tmp_path: Path) -> None:
    save_evaluation(fitting(tmp_path / "evaluation", make_evaluation(drift=None), make_answers(), ()))
    (tmp_path / "evaluation" / DRIFT).write_text("noise")
    assert read_run(tmp_path / "evaluation").passages == ()


# What was measured, and what is said of it.


SCORED = {"value": 0.5, "num": 2, "low": 0.0, "high": 1.0, "reason": None}


@pytest.mark.parametrize(
    ("kind", "place", "value", "what"),
    [
        (
            "edit",
            ("scores", "reliability", "value"),
            0.6,
            "field scores.reliability is 0.6 of 2, and 0.5 of 2 by the answers",
        ),
        (
            "edit",
            ("scores", "locality", "num"),
            200,
            "field scores.locality is 0.5 of 200, and 0.5 of 2 by the answers",
        ),
        (
            "evaluation",
            ("drift", "overall", "value"),
            0.03,
            "field drift.overall is 0.03 of 2, and 0.0275 of 2 by the passages",
        ),
        (
            "edit",
            ("drift", "by_kind", "plain", "num"),
            40,
            "field drift.by_kind.plain is 0.0275 of 40, and 0.0275 of 2 by the passages",
        ),
        (
            "edit",
            ("drift", "by_kind", "poems"),
            SCORED,
            "field drift.by_kind has other kinds than the passages: plain",
        ),
        (
            "evaluation",
            ("contexts", "raw", "after", "generalization", "value"),
            0.4,
            "field contexts.raw.after.generalization is 0.4 of 2, and 0.5 of 2 by the answers",
        ),
        (
            "evaluation",
            ("protocols", "wild", "after", "reliability"),
            SCORED,
            "field protocols.wild.after.reliability is 0.5 of 2, and not measured by the answers",
        ),
    ],
)
def test_figures_that_were_not_measured_so_are_refused(
    tmp_path: Path,
    contents: dict[str, dict[str, bytes]],
    kind: str,
    place: tuple[str, ...],
    value: object,
    what: str,
) -> None:
    folder = fill(tmp_path / "run", contents[kind])
    report = put(json.loads(contents[kind][REPORT]), place, value)
    (folder / REPORT).write_text(json.dumps(report))
    asked = "; are they of another run?" if what.endswith("by the answers") else ""
    assert refusal(folder) == f"{folder / REPORT}: does not fit what it was made from: {what}{asked}"


@pytest.mark.parametrize("kind", ["edit", "evaluation"])
@pytest.mark.parametrize("name", [ANSWERS, DRIFT])
def test_a_line_too_few_or_too_many_is_noticed(
    tmp_path: Path, contents: dict[str, dict[str, bytes]], kind: str, name: str
) -> None:
    folder = fill(tmp_path / "run", contents[kind])
    lines = contents[kind][name].splitlines(keepends=True)
    counted = [line for line in lines if kind == "edit" or b'"locality"' not in line]
    for line in counted:
        for changed in ([other for other in lines if other is not line], [*lines, line]):
            (folder / name).write_bytes(b"".join(changed))
            assert "does not fit what it was made from" in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"score_after": None},
        {"score_before": None},  # it was not scored before, and so is no part of the comparison
        {"context": "chat"},
        {"protocol": "wild"},
    ],
    ids=str,
)
def test_answers_beyond_what_a_score_is_of_do_not_count(run: Path, changes: dict[str, Any]) -> None:
    one = make_answer(is_right=True, **changes)
    with (run / ANSWERS).open("a") as file:
        file.write(json.dumps(asdict(one)))
    if (one.protocol, one.context) == ("locft", "raw"):  # it is an edit's, scored or not
        change(run, lambda report: report["edits"].update(num_edits=3))
    assert len(read_run(run).answers) == 7


def test_scores_of_a_protocol_of_another_version_are_not_checked(run: Path) -> None:
    change(run, lambda report: report["protocol"].update(name="yours"))
    answers = (run / ANSWERS).read_text()
    (run / ANSWERS).write_text(answers.replace('"locft"', '"yours"'))
    change(run, lambda report: report["scores"]["reliability"].update(value=0.6))
    assert draw(read_run(run).page())


# Evaluations within a run folder.


def test_evaluations_within_a_run_come_in_the_order_of_their_names(
    run: Path, contents: dict[str, dict[str, bytes]]
) -> None:
    for name in ("wild", "Chat", "after-stack", "10", "9"):
        fill(run / name, contents["evaluation"])
    found = read_run(run)
    assert [one.name for one in found.evaluations] == ["10", "9", "Chat", "after-stack", "wild"]
    one = found.evaluations[0]
    assert one.report == fit_report(make_evaluation(), make_answers(), make_passages())
    assert one.answers == make_answers()
    titles = [section.title for section in found.page().sections]
    assert "Scores by protocol (10)" in titles
    assert titles.index("Scores by protocol (10)") < titles.index("Scores by protocol (wild)")


def test_other_folders_within_a_run_are_no_evaluations(
    run: Path, contents: dict[str, dict[str, bytes]]
) -> None:
    (run / "patch").mkdir()
    (run / "patch" / "patch.json").write_text("{}")
    (run / "notes" / REPORT).mkdir(parents=True)
    (run / "deep").mkdir()
    fill(run / "deep" / "evaluation", contents["evaluation"])
    said: list[str] = []
    assert read_run(run, said.append).evaluations == ()
    assert said == []


def test_an_edit_run_within_a_run_is_left_out_and_told(
    run: Path, contents: dict[str, dict[str, bytes]]
) -> None:
    again = fill(run / "again", contents["edit"])
    said: list[str] = []
    assert read_run(run, said.append).evaluations == ()
    assert said == [f"left out: {again}: is an edit run of its own, and no evaluation of this one"]


def test_an_evaluation_of_other_edits_within_a_run_is_left_out_and_told(
    run: Path, contents: dict[str, dict[str, bytes]]
) -> None:
    fill(run / "good", contents["evaluation"])
    other = fill(run / "other", contents["evaluation"])
    change(other, lambda report: report["edits"].update(sha256="f" * 64))
    said: list[str] = []
    assert [one.name for one in read_run(run, said.append).evaluations] == ["good"]
    [line] = said
    told = f"is of other edits than the run (sha256 {'f' * 12}, not {'e' * 12})"
    assert line.startswith(f"left out: {other / REPORT}: {told}")
    assert read_run(other).evaluations == ()


def test_a_comparison_within_a_run_is_no_evaluation(run: Path) -> None:
    comparison = {"kind": "comparison", "schema_version": SCHEMA_VERSION, "runs": [], "differences": []}
    fill(run / "comparison", {REPORT: json.dumps(comparison).encode()})
    assert read_run(run).evaluations == ()


def test_what_a_killed_writer_left_within_a_run_is_no_evaluation(
    run: Path, contents: dict[str, dict[str, bytes]]
) -> None:
    fill(run / ".locft-0123abcd-evaluation", contents["evaluation"])
    assert read_run(run).evaluations == ()


def test_a_run_that_links_to_itself_is_read_once(run: Path) -> None:
    for number in range(8):
        (run / f"self-{number}").symlink_to(run, target_is_directory=True)
    assert read_run(run).evaluations == ()


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="names of files are bytes on Linux")
def test_an_evaluation_in_a_folder_with_any_name_is_drawn(
    run: Path, contents: dict[str, dict[str, bytes]]
) -> None:
    names = sorted([os.fsdecode(b"caf\xe9"), "a\x1b[31m\n\u202eb", "<b>|`"])
    for name in names:
        fill(run / name, contents["evaluation"])
    found = read_run(run)
    assert [one.name for one in found.evaluations] == names
    for file in draw(found.page()).values():
        assert not {"\x1b", "\u202e"} & set(file.decode())
        assert b"\n\xe2\x80\xaeb" not in file


def test_evaluations_within_an_evaluation_are_not_looked_for(
    evaluation: Path, contents: dict[str, dict[str, bytes]]
) -> None:
    fill(evaluation / "inner", contents["evaluation"])
    assert read_run(evaluation).evaluations == ()


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        (REPORT, b"{", "is damaged: "),
        (REPORT, b'{"schema_version": 1}', "an older locft wrote it"),
        (ANSWERS, b"{", "line 1 is damaged: "),
        (DRIFT, b"{", "line 1 is damaged: "),
    ],
)
def test_an_evaluation_that_cannot_be_read_is_left_out_and_told(
    run: Path, contents: dict[str, dict[str, bytes]], name: str, data: bytes, what: str
) -> None:
    (run / "patch").mkdir()
    fill(run / "good", contents["evaluation"])
    wild = fill(run / "wild", {**contents["evaluation"], name: data})
    said: list[str] = []
    assert [one.name for one in read_run(run, said.append).evaluations] == ["good"]
    assert said == [f"left out: {refusal(wild)}"]
    assert f"{wild / name}: {what}" in said[0]
    assert said[0].endswith(way_out(run))


# Whatever a file holds, it is drawn or refused.


def read_and_draw(folder: Path) -> bool:
    try:
        found = read_run(folder)
    except RunError:
        return False
    files = draw(found.page())
    assert files["report.md"].startswith(b"# ")
    assert files["report.html"].endswith(b"</html>\n")
    return True


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_byte_is_drawn_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    contents: dict[str, dict[str, bytes]],
    data: st.DataObject,
) -> None:
    kind = data.draw(st.sampled_from(["edit", "evaluation"]))
    name = data.draw(st.sampled_from([REPORT, REPORT, ANSWERS, DRIFT]))
    raw = bytearray(contents[kind][name])
    place = data.draw(st.integers(0, len(raw) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "insert", "delete"])):
        case "flip":
            raw[place] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del raw[place:]
        case "insert":
            raw[place:place] = data.draw(
                st.sampled_from([b"9", b"e", b"e3", b"-", b"\n", b'"', b"\x00"])
            )
        case _:
            del raw[place]
    folder = fill(tmp_path_factory.mktemp("damaged"), {**contents[kind], name: bytes(raw)})
    read_and_draw(folder)


NUMBERS = st.sampled_from(
    [
        0,
        -1,
        1,
        5,
        10**15,
        -(10**15),
        10**16,
        10**400,
        0.0,
        1e-320,
        -1e-320,
        1e-9,
        1e15,
        -1e15,
        1e308,
        -1e308,
    ]
)


def draw_altered(
    folder: Path,
    contents: dict[str, dict[str, bytes]],
    data: st.DataObject,
    alter: Callable[[Any], Any],
) -> None:
    kind = data.draw(st.sampled_from(["edit", "evaluation"]))
    report = alter(json.loads(contents[kind][REPORT]))
    read_and_draw(fill(folder, {**contents[kind], REPORT: json.dumps(report).encode()}))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_numbers_are_drawn_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    contents: dict[str, dict[str, bytes]],
    data: st.DataObject,
) -> None:
    def alter(report: Any) -> Any:
        numbers = [
            (place, value)
            for place, value in leaves(report)
            if isinstance(value, int | float)
            and not isinstance(value, bool)
            and place != ("schema_version",)
        ]
        for place, value in data.draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=4)):
            number = data.draw(NUMBERS)
            report = put(
                report, place, float(min(number, 1e308)) if isinstance(value, float) else number
            )
        return report

    draw_altered(tmp_path_factory.mktemp("numbers"), contents, data, alter)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_parts_that_are_empty_are_drawn_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    contents: dict[str, dict[str, bytes]],
    data: st.DataObject,
) -> None:
    def alter(report: Any) -> Any:
        places = [place for place in objects(report) if place]
        places += [(*place[:-1],) for place, _ in leaves(report) if isinstance(place[-1], int)]
        place = data.draw(st.sampled_from(places))
        inner = report
        for name in place:
            inner = inner[name]
        return put(report, place, data.draw(st.sampled_from([type(inner)(), None])))

    draw_altered(tmp_path_factory.mktemp("empty"), contents, data, alter)


def test_figures_that_were_not_measured_are_drawn(run: Path) -> None:
    def forget(report: dict[str, Any]) -> None:
        for scores in (report["scores"], report["scores_before"]):
            for figure in scores.values():
                figure.update(value=None, low=None, high=None, reason=None, num=0)
        report["drift"].update(overall=report["scores"]["drift"], by_kind={}, most_moved=[])
        report["location"].update(matrices=[])
        report["edits"].update(num_edits=0, num_rephrases=0, num_locality=0)
        report["change"] = {}

    change(run, forget)
    for name in (ANSWERS, DRIFT):
        (run / name).write_bytes(b"")
    assert read_and_draw(run)


@pytest.mark.parametrize(
    ("field", "value"),
    [("scores_before", 1.0), ("change", 0.0), ("scores", None)],
)
def test_what_stands_beside_a_score_must_fit_the_answers_too(
    run: Path, field: str, value: float | None
) -> None:
    def alter(report: dict[str, Any]) -> None:
        report[field]["reliability"].update(value=value, low=-1.0, high=1.0, reason="said so")

    change(run, alter)
    assert f"does not fit what it was made from: field {field}.reliability is " in refusal(run)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"epochs": 4}, "field training has 4 epochs and 30 steps: expected 3 and 30"),
        ({"steps": 31}, "field training has 3 epochs and 31 steps: expected 3 and 30"),
        ({"final_loss": 0.5}, "field training.final_loss is not the loss of the last epoch"),
    ],
    ids=str,
)
def test_training_must_fit_its_course(run: Path, changes: dict[str, Any], what: str) -> None:
    change(run, lambda report: report["training"].update(changes))
    assert what in refusal(run)
    change(run, lambda report: report["training"].update(course=[]))
    assert read_run(run)


@pytest.mark.parametrize("field", ["num_edits", "num_rephrases", "num_locality"])
def test_counts_of_edits_must_fit_the_answers(run: Path, field: str) -> None:
    change(run, lambda report: report["edits"].update({field: 1_000}))
    what = f"field edits.{field} is 1,000, and 2 by the answers"
    assert f"does not fit what it was made from: {what}" in refusal(run)


def test_the_interval_of_a_share_must_fit_the_answers(run: Path, evaluation: Path) -> None:
    change(run, lambda report: report["scores"]["locality"].update(low=0.45))
    what = "field scores.locality has the interval [0.45, 0.905469], and [0.0945312, 0.905469]"
    assert f"{what} by the answers" in refusal(run)
    change(
        evaluation,
        lambda report: report["protocols"]["locft"]["before"]["reliability"].update(high=0.9),
    )
    assert "field protocols.locft.before.reliability has the interval [0, 0.9]" in refusal(evaluation)


def test_the_interval_of_scores_between_0_and_1_is_not_checked(tmp_path: Path) -> None:
    answers = tuple(make_answer(str(score), score_after=score) for score in (0.25, 0.75, 1.0))
    (tmp_path / "run").mkdir()
    save_scored(fitting(tmp_path / "run", make_report(), answers, make_passages()))
    change(tmp_path / "run", lambda report: report["scores"]["reliability"].update(low=0.0))
    assert read_run(tmp_path / "run")


def test_kinds_of_passages_must_be_those_of_the_drift(run: Path) -> None:
    change(run, lambda report: report["drift"].update(by_kind={}))
    assert "field drift.by_kind has other kinds than the passages: plain" in refusal(run)


def test_the_two_places_of_drift_must_agree(run: Path) -> None:
    change(run, lambda report: report["scores"]["drift"].update(value=0.001, low=0.0, high=0.01))
    assert "field scores.drift is not the one of field drift.overall" in refusal(run)


def test_means_that_happen_to_be_whole_keep_their_own_interval(tmp_path: Path) -> None:
    answers = tuple(
        make_answer(str(number), protocol="teacher-forced", score_before=1.0, score_after=1.0)
        for number in range(4)
    )
    scores = make_evaluation().protocols["locft"]
    protocol = replace(scores.protocol, name="teacher-forced")
    figures = {"reliability": mean([1.0] * 4)}
    whole = replace(scores, protocol=protocol, before=figures, after=figures, change={})
    report = make_evaluation(protocols={"teacher-forced": whole}, contexts={}, drift=None)
    saved = Run(tmp_path / "evaluation", report, answers, ())
    save_evaluation(saved)
    assert read_run(tmp_path / "evaluation") == saved
