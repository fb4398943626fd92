"""Runs are compared on what they share, and drawn again as they were."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from reports import (
    SCORES,
    fit_report,
    make_answer,
    make_answers,
    make_evaluation,
    make_passages,
    make_report,
    make_whole,
)

from locft.errors import InputError, RunError
from locft.recipe import reporting, run_folder
from locft.recipe.reporting import compare_runs, redraw
from locft.recipe.run_folder import Run, draw, read_run, save_evaluation, save_scored
from locft.report.page import Page, Table, Text
from locft.report.schema import ComparisonReport, DriftInfo, ProtocolScores, to_json
from locft.types import AnswerRecord, Figure, Kind, PassageDrift


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save_run(
    folder: Path,
    answers: Sequence[AnswerRecord] = (),
    passages: Sequence[PassageDrift] | None = None,
    **changes: Any,
) -> Path:
    folder.mkdir(parents=True)
    found = make_passages() if passages is None else tuple(passages)
    report = fit_report(make_report(**changes), answers, found)
    save_scored(Run(folder, report, tuple(answers), found))
    return folder


def save_measured(folder: Path, answers: Sequence[AnswerRecord] = (), **changes: Any) -> Path:
    report = make_evaluation(**changes)
    passages = () if report.drift is None else make_passages()
    report = fit_report(report, answers, passages)
    save_evaluation(Run(folder, report, tuple(answers), passages))
    return folder


@pytest.fixture
def pictures() -> None:
    """Let reports have their pictures."""


@pytest.fixture(autouse=True)
def plain_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures, which take most of the time, where a test is not about them."""
    if "pictures" in request.fixturenames:
        return
    monkeypatch.setattr(run_folder, "draw", lambda page: {"report.md": b"", "report.html": b""})
    monkeypatch.setattr(Run, "page", lambda run: None)


def answers_of(kind: Kind, scores: Mapping[str, float | None], **changes: Any) -> list[AnswerRecord]:
    """Give an answer to each prompt, with its score."""
    return [
        make_answer(prompt, kind=kind, score_after=score, **changes) for prompt, score in scores.items()
    ]


def difference(report: ComparisonReport, score: str, run: str = "B") -> Figure:
    [found] = [one for one in report.differences if (one.run, one.score) == (run, score)]
    return found.figure


def counts(report: ComparisonReport, score: str, run: str = "B") -> tuple[int, int]:
    [found] = [one for one in report.differences if (one.run, one.score) == (run, score)]
    return found.num_items, found.num_items_first


def with_drift_on(text_sha256: str = "d" * 64, **changes: Any) -> DriftInfo:
    return dataclasses.replace(make_report().drift, text_sha256=text_sha256, **changes)


def table(page: Page, title: str) -> Table:
    [section] = [section for section in page.sections if section.title == title]
    [found] = [block for block in section.blocks if isinstance(block, Table)]
    return found


def texts(page: Page, title: str) -> list[str]:
    [section] = [section for section in page.sections if section.title == title]
    return [block.text for block in section.blocks if isinstance(block, Text)]


def copy_of(run: Path, name: str = "copy") -> Path:
    return Path(shutil.copytree(run, run.with_name(name)))


def listing(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Differences.


def test_differences_are_the_mean_over_the_items_that_both_have(tmp_path: Path) -> None:
    first = save_run(
        tmp_path / "first",
        answers_of("reliability", {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0, "only here": 1.0}),
    )
    second = save_run(
        tmp_path / "second",
        answers_of("reliability", {"d": 1.0, "c": 1.0, "b": 1.0, "a": 0.0, "x": 0.0, "y": 0.0}),
    )
    report, _ = compare_runs([first, second])
    # a: -1, b: +1, c: +1, d: +1
    figure = difference(report, "reliability")
    assert figure.value == pytest.approx(0.5)
    assert figure.num == 4
    assert counts(report, "reliability") == (6, 5)
    assert figure.low is not None
    assert figure.high is not None
    assert -1 <= figure.low < 0 < figure.high <= 1


def test_differences_come_for_each_kind_of_item(tmp_path: Path) -> None:
    first = [
        *answers_of("reliability", {"a": 1.0, "b": 0.0}),
        *answers_of("generalization", {"a": 0.25, "b": 0.5}),
        *answers_of("locality", {"a": 1.0}),
    ]
    second = [
        *answers_of("reliability", {"a": 1.0, "b": 1.0}),
        *answers_of("generalization", {"a": 0.75, "b": 0.25}),
        *answers_of("locality", {"a": 0.0}),
    ]
    report, _ = compare_runs(
        [save_run(tmp_path / "first", first), save_run(tmp_path / "second", second)]
    )
    assert [one.score for one in report.differences] == [
        "reliability",
        "generalization",
        "locality",
        "drift",
    ]
    assert difference(report, "reliability").value == pytest.approx(0.5)
    assert difference(report, "generalization").value == pytest.approx(0.125)
    assert difference(report, "locality").value == pytest.approx(-1.0)


@pytest.mark.parametrize(("better", "sign"), [(1.0, 1), (0.0, -1)])
def test_the_interval_of_a_clear_difference_is_on_its_side_of_nothing(
    tmp_path: Path, better: float, sign: int
) -> None:
    prompts = [f"prompt {number}" for number in range(40)]
    first = answers_of("reliability", dict.fromkeys(prompts, 1 - better))
    second = answers_of("reliability", dict.fromkeys(prompts, better))
    report, page = compare_runs(
        [save_run(tmp_path / "first", first), save_run(tmp_path / "second", second)]
    )
    figure = difference(report, "reliability")
    assert figure.value == sign
    assert figure.low is not None
    assert figure.high is not None
    assert sign * figure.low > 0
    assert sign * figure.high > 0
    way = "more" if sign > 0 else "less"
    assert f"B against A: {way} reliability ({100 * sign:+.1f} [" in page.verdict


def test_items_are_resampled_as_pairs(tmp_path: Path) -> None:
    # Half of the items are hard for both; each one gains as much, so that pairs leave no doubt.
    prompts = [f"prompt {number}" for number in range(60)]
    first = answers_of("reliability", {name: (number % 2) / 2 for number, name in enumerate(prompts)})
    second = answers_of(
        "reliability", {name: (number % 2) / 2 + 0.5 for number, name in enumerate(prompts)}
    )
    report, _ = compare_runs(
        [save_run(tmp_path / "first", first), save_run(tmp_path / "second", second)]
    )
    figure = difference(report, "reliability")
    assert figure.value == pytest.approx(0.5)
    assert figure.low is not None
    assert figure.low > 0.3


def test_items_with_other_expected_answers_are_not_paired(tmp_path: Path) -> None:
    first = answers_of("locality", {"a": 1.0, "b": 1.0}, expected="Rome")
    second = [
        *answers_of("locality", {"a": 0.0}, expected="Rome"),
        *answers_of("locality", {"b": 0.0}, expected="Paris"),
    ]
    report, _ = compare_runs(
        [save_run(tmp_path / "first", first), save_run(tmp_path / "second", second)]
    )
    assert difference(report, "locality").num == 1
    assert counts(report, "locality") == (2, 2)


def test_items_without_an_expected_answer_pair_by_their_prompt(tmp_path: Path) -> None:
    first = answers_of("locality", {"a": 1.0}, expected=None)
    second = answers_of("locality", {"a": 0.0}, expected=None)
    report, _ = compare_runs(
        [save_run(tmp_path / "first", first), save_run(tmp_path / "second", second)]
    )
    assert difference(report, "locality").value == -1


def test_items_without_a_score_are_not_paired(tmp_path: Path) -> None:
    first = answers_of("reliability", {"a": 1.0, "b": None, "c": 0.0})
    second = answers_of("reliability", {"a": None, "b": 1.0, "c": 1.0})
    report, _ = compare_runs(
        [save_run(tmp_path / "first", first), save_run(tmp_path / "second", second)]
    )
    assert difference(report, "reliability").num == 1
    assert difference(report, "reliability").value == 1
    assert counts(report, "reliability") == (2, 2)


def test_a_prompt_that_comes_twice_pairs_by_its_place_among_its_like(tmp_path: Path) -> None:
    def repeated(*scores: float) -> list[AnswerRecord]:
        return [make_answer("same", kind="locality", score_after=score) for score in scores]

    report, _ = compare_runs(
        [
            save_run(tmp_path / "first", repeated(1.0, 0.0, 1.0)),
            save_run(tmp_path / "second", repeated(0.0, 0.0)),
        ]
    )
    # first with first (-1), second with second (0), and the third has none
    assert difference(report, "locality").value == pytest.approx(-0.5)
    assert difference(report, "locality").num == 2
    assert counts(report, "locality") == (2, 3)


def test_items_of_other_protocols_contexts_and_kinds_do_not_count(tmp_path: Path) -> None:
    first = answers_of("reliability", {"a": 0.0})
    noise = [
        *answers_of("reliability", {"a": 0.0, "z": 1.0}, protocol="wild"),
        *answers_of("reliability", {"a": 0.0, "y": 1.0}, context="chat"),
        *answers_of("generalization", {"a": 0.0}),
    ]
    second = [*noise, *answers_of("reliability", {"a": 1.0})]
    report, _ = compare_runs(
        [save_run(tmp_path / "first", [*noise, *first]), save_run(tmp_path / "second", second)]
    )
    assert difference(report, "reliability").value == 1
    assert counts(report, "reliability") == (1, 1)


def test_runs_of_other_edits_have_no_item_in_common(tmp_path: Path) -> None:
    first = save_run(tmp_path / "first", make_answers("one"))
    second = save_run(tmp_path / "second", make_answers("other"))
    report, page = compare_runs([first, second])
    for score in ("reliability", "generalization", "locality"):
        figure = difference(report, score)
        assert figure == Figure(value=None, num=0, reason="the runs have no item in common")
        assert counts(report, score) == (2, 2)
    rows = {row[0]: row[1:] for row in table(page, "Differences").rows}
    assert rows["B, reliability"] == (
        "not comparable (the runs have no item in common)",
        "0 of 2 and 2",
    )


def test_a_run_differs_from_its_copy_in_nothing(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", make_answers())
    report, page = compare_runs([run, copy_of(run)])
    assert [run.name for run in report.runs] == ["A", "B"]
    assert len(report.differences) == 4
    assert all(one.figure.value == 0 for one in report.differences)
    same = "reliability, generalization, locality, drift"
    assert page.verdict == f"B against A: no clear difference in {same}."
    assert not texts(page, "Settings that differ")
    assert [section.blocks for section in page.sections if section.title == "Settings that differ"] == [
        ()
    ]


def test_the_other_order_turns_only_the_sign(tmp_path: Path) -> None:
    scores = [(number * 7 % 11) / 10 for number in range(30)]
    first = answers_of("reliability", {f"{number}": score for number, score in enumerate(scores)})
    second = answers_of(
        "reliability", {f"{number}": score for number, score in enumerate(reversed(scores), 2)}
    )
    one = save_run(tmp_path / "first", first)
    other = save_run(
        tmp_path / "second",
        second,
        [
            PassageDrift(passage=1, kind="plain", num_tokens=100, drift=0.5),
            PassageDrift(passage=2, kind="plain", num_tokens=300, drift=0.01),
        ],
    )
    there, _ = compare_runs([one, other])
    back, _ = compare_runs([other, one])
    for score in ("reliability", "drift"):
        figure, turned = difference(there, score), difference(back, score)
        assert figure.value is not None
        assert turned.value == pytest.approx(-figure.value)
        assert (turned.num, turned.reason) == (figure.num, figure.reason)
        # Draws are the same, sorted the other way round.
        assert turned.low == pytest.approx(-(figure.high or 0), abs=0.03)
        assert turned.high == pytest.approx(-(figure.low or 0), abs=0.03)
    assert counts(there, "reliability") == counts(back, "reliability")[::-1]


# Protocols.


def scored_by(name: str, context: str = "raw", **scores: Figure) -> ProtocolScores:
    sample = make_evaluation().protocols["locft"]
    protocol = dataclasses.replace(sample.protocol, name=name, context=context)
    return ProtocolScores(protocol=protocol, before=None, after=scores, change=None)


def test_scores_of_likelihood_have_their_own_names(tmp_path: Path) -> None:
    figure = SCORES.reliability
    scores = {"likelihood": scored_by("likelihood", efficacy=figure, paraphrase=figure)}

    def answers(score: float) -> list[AnswerRecord]:
        kinds: tuple[Kind, ...] = ("reliability", "generalization", "locality")
        return [
            make_answer("a", protocol="likelihood", kind=kind, after=None, score_after=score)
            for kind in kinds
        ]

    folders = [
        save_measured(tmp_path / name, answers(score), protocols=scores, contexts={})
        for name, score in (("first", 0.0), ("second", 1.0))
    ]
    report, page = compare_runs(folders)
    assert [one.score for one in report.differences] == ["efficacy", "paraphrase", "drift"]
    assert difference(report, "efficacy").value == 1
    assert "efficacy" in table(page, "Scores").columns


def test_an_edit_run_is_compared_with_an_evaluation_of_its_patch(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", make_answers())
    answers = [dataclasses.replace(one, score_after=1.0) for one in make_answers()]
    evaluation = save_measured(
        tmp_path / "run" / "evaluation",
        [*answers, *(dataclasses.replace(one, protocol="wild") for one in make_answers())],
    )
    for folders in ([run, evaluation], [evaluation, run]):
        report, _ = compare_runs(folders)
        assert {one.kind for one in report.runs} == {"edit", "evaluation"}
        assert all(one.reason is None and one.protocol == "locft" for one in report.runs)
        sign = 1 if folders[0] == run else -1
        assert difference(report, "reliability").value == sign * 0.5
        assert difference(report, "reliability").num == 2
        assert difference(report, "drift").value == 0
    first = compare_runs([run, evaluation])[0].runs
    assert (first[0].location, first[1].location) == ("2.mlp.down", None)
    assert (first[0].patch_bytes, first[1].patch_bytes) == (9_400, None)
    assert (first[0].seconds_per_edit, first[1].seconds_per_edit) == (0.25, None)
    assert first[1].settings == {}
    assert first[1].subject == "plain with plain"
    assert list(first[1].scores) == ["reliability", "generalization", "drift"]


@pytest.mark.parametrize(
    "scores",
    [
        {"wild": scored_by("wild", reliability=SCORES.reliability)},
        {"locft": scored_by("locft", "chat", reliability=SCORES.reliability)},
    ],
    ids=["protocol", "context"],
)
def test_runs_that_were_scored_otherwise_have_a_reason_in_place_of_scores(
    tmp_path: Path, scores: dict[str, ProtocolScores]
) -> None:
    run = save_run(tmp_path / "run", make_answers())
    evaluation = save_measured(tmp_path / "evaluation", make_answers(), protocols=scores, contexts={})
    report, page = compare_runs([run, evaluation])
    told = "was not scored by protocol locft in context raw, as the first run was"
    assert report.runs[1].reason == told
    assert report.runs[1].scores == {}
    assert report.differences == ()
    [own] = scores.values()
    assert (report.runs[1].protocol, report.runs[1].context) == (own.protocol.name, own.protocol.context)
    assert f"B: {told}." in texts(page, "Scores")
    assert table(page, "Scores").rows[1] == ("B", "-", "-", "-", "-")
    assert page.verdict == "B against A: nothing to pair for any score."
    back, _ = compare_runs([evaluation, run])
    assert back.runs[1].reason is not None
    assert back.differences == ()


# Drift.


def passages(*drifts: float, tokens: Sequence[int] = (100, 300)) -> list[PassageDrift]:
    return [
        PassageDrift(passage=number, kind="plain", num_tokens=num, drift=drift)
        for number, (drift, num) in enumerate(zip(drifts, tokens, strict=True), 1)
    ]


def test_the_difference_of_drift_is_the_mean_per_token_over_the_same_passages(tmp_path: Path) -> None:
    first = save_run(tmp_path / "first", passages=passages(0.05, 0.02))
    second = save_run(tmp_path / "second", passages=passages(0.09, 0.01))
    report, page = compare_runs([first, second])
    figure = difference(report, "drift")
    # (0.04 * 100 - 0.01 * 300) / 400
    assert figure.value == pytest.approx(0.0025)
    assert figure.num == 2
    assert figure.low == pytest.approx(-0.01)
    assert figure.high == pytest.approx(0.04)
    assert counts(report, "drift") == (2, 2)
    rows = {row[0]: row[1] for row in table(page, "Differences").rows}
    assert rows["B, drift"] == "+0.0025 [-0.0100, +0.0400] nats per token"


def test_one_passage_gives_a_difference_without_an_interval(tmp_path: Path) -> None:
    folders = [
        save_run(tmp_path / name, passages=passages(drift, tokens=[50]))
        for name, drift in (("first", 0.25), ("second", 0.75))
    ]
    report, page = compare_runs(folders)
    figure = difference(report, "drift")
    assert figure == Figure(value=0.5, num=1, reason="one passage gives no interval")
    rows = {row[0]: row[1] for row in table(page, "Differences").rows}
    assert rows["B, drift"] == "+0.5000 nats per token (one passage gives no interval)"
    assert page.verdict.startswith("B against A: no clear difference in drift; nothing to pair for ")


@pytest.mark.parametrize(
    ("changes", "others"),
    [
        ({"drift": with_drift_on("f" * 64)}, passages(0.05, 0.02)),
        ({}, passages(0.05, 0.02, tokens=(100, 301))),
        ({}, passages(0.05, tokens=[100])),
    ],
    ids=["text", "tokens", "fewer"],
)
def test_drift_on_other_text_is_not_compared(
    tmp_path: Path, changes: dict[str, Any], others: list[PassageDrift]
) -> None:
    first = save_run(tmp_path / "first", passages=passages(0.05, 0.02))
    second = save_run(tmp_path / "second", passages=others, **changes)
    report, page = compare_runs([first, second])
    reason = "drift was measured on different text"
    assert difference(report, "drift") == Figure(value=None, num=0, reason=reason)
    rows = {row[0]: row[1] for row in table(page, "Differences").rows}
    assert rows["B, drift"] == f"not comparable ({reason})"


def test_drift_that_one_run_lacks_is_not_compared(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", make_answers())
    evaluation = save_measured(tmp_path / "evaluation", make_answers(), drift=None)
    report, _ = compare_runs([run, evaluation])
    assert [one.score for one in report.differences] == ["reliability", "generalization"]
    assert "drift" not in report.runs[1].scores


def test_drift_that_was_not_measured_is_told(tmp_path: Path) -> None:
    first = save_run(tmp_path / "first")
    second = save_run(tmp_path / "second", passages=[])
    report, _ = compare_runs([first, second])
    assert difference(report, "drift").reason == "drift was not measured in both"


# What else stands in a comparison.


def test_runs_have_letters_in_the_order_of_their_words(tmp_path: Path) -> None:
    folders = [save_run(tmp_path / name) for name in ("z", "a", "m")]
    report, page = compare_runs(folders)
    assert [one.name for one in report.runs] == ["A", "B", "C"]
    assert [one.folder for one in report.runs] == [str(folder) for folder in folders]
    assert {one.run for one in report.differences} == {"B", "C"}
    assert page.title == "3 runs side by side"
    for name in "BC":
        assert f"{name} against A: no clear difference in drift; nothing to pair for " in page.verdict


@pytest.mark.parametrize("num", [0, 1, 27])
def test_too_few_or_too_many_runs_are_refused_before_any_is_read(tmp_path: Path, num: int) -> None:
    with pytest.raises(InputError, match=f"{num} runs: expected 2 to 26 to compare"):
        compare_runs([tmp_path / "none"] * num)


def test_twenty_six_runs_are_compared(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", make_answers())
    report, _ = compare_runs([run, *(copy_of(run, f"copy {number}") for number in range(25))])
    assert report.runs[-1].name == "Z"
    assert len(report.differences) == 25 * 4


def test_a_run_that_is_named_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "run", make_answers())
    other = copy_of(run)
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(run)
    for again in (run, tmp_path / "link", ".", f"{run}/../run/"):
        with pytest.raises(InputError) as caught:
            compare_runs([run, other, again])
        assert str(caught.value) == f"{Path(again)}: is named twice: expected different runs to compare"


def test_a_run_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    with pytest.raises(RunError, match="there is no such run folder") as caught:
        compare_runs([run, tmp_path / "none"], tmp_path / "comparison")
    assert str(tmp_path / "none") in str(caught.value)
    assert not (tmp_path / "comparison").exists()


def test_only_settings_that_differ_are_listed(tmp_path: Path) -> None:
    common = {"batch_size": 20, "seed": 0, "revision": None, "one": True}
    settings: list[dict[str, Any]] = [
        {**common, "lr": "auto", "location": "2.mlp"},
        {**common, "lr": 0.001, "location": "2.mlp"},
        {**common, "lr": "auto", "location": "1.mlp", "new": "yes"},
    ]
    folders = [
        save_run(tmp_path / str(n), settings=one, resolved={"lr": 0.002} if one["lr"] == "auto" else {})
        for n, one in enumerate(settings)
    ]
    folders.append(save_measured(tmp_path / "evaluation"))
    report, page = compare_runs(folders)
    assert [one.settings for one in report.runs] == [
        {"lr": 0.002, "location": "2.mlp", "new": None},
        {"lr": 0.001, "location": "2.mlp", "new": None},
        {"lr": 0.002, "location": "1.mlp", "new": "yes"},
        {},
    ]
    found = table(page, "Settings that differ")
    assert found.columns == ("run", "lr", "location", "new")
    assert found.rows == (
        ("A", "0.002", "2.mlp", "none"),
        ("B", "0.001", "2.mlp", "none"),
        ("C", "0.002", "1.mlp", "yes"),
        ("D", "-", "-", "-"),
    )


def test_settings_that_came_to_the_same_do_not_differ(tmp_path: Path) -> None:
    chosen = save_run(tmp_path / "first", settings={"lr": "auto"}, resolved={"lr": 0.002})
    given = save_run(tmp_path / "second", settings={"lr": 0.002}, resolved={})
    report, _ = compare_runs([chosen, given])
    assert [one.settings for one in report.runs] == [{}, {}]


def test_one_run_with_both_figures_is_no_front(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    evaluation = save_measured(tmp_path / "evaluation", drift=None)
    _, page = compare_runs([run, evaluation])
    [section] = [one for one in page.sections if one.title == "Generalization against drift"]
    assert section.blocks == ()


def test_the_tables_show_what_the_json_holds(tmp_path: Path) -> None:
    cost = dataclasses.replace(make_report().cost, seconds_per_edit=1.5, wall_s=30.0)
    folders = [
        save_run(tmp_path / "first", make_answers()),
        save_run(tmp_path / "second", make_answers(), cost=cost, patch_bytes=3_500_000),
        save_measured(tmp_path / "third", make_answers()),
    ]
    report, page = compare_runs(folders)
    shown = json.loads(to_json(report))
    assert shown["kind"] == "comparison"
    for row, run in zip(table(page, "Runs").rows, shown["runs"], strict=True):
        assert row == (
            run["name"],
            run["folder"],
            run["subject"],
            run["location"] or "-",
            str(run["num_edits"]),
            run["edits_sha256"][:12],
        )
    scores = table(page, "Scores")
    assert scores.columns == ("run", "reliability", "generalization", "locality", "drift")
    for row, run in zip(scores.rows, shown["runs"], strict=True):
        for name, cell in zip(scores.columns[1:], row[1:], strict=True):
            figure = run["scores"].get(name)
            if figure is None:
                assert cell == "-"
            elif name == "drift":
                assert cell.startswith(f"{figure['value']:.4f} [{figure['low']:.4f}, ")
            else:
                assert cell.startswith(f"{100 * figure['value']:.1f}% [{100 * figure['low']:.1f}, ")
                assert cell.endswith(f"] of {figure['num']}")
    differences = table(page, "Differences")
    assert len(differences.rows) == len(shown["differences"])
    for row, one in zip(differences.rows, shown["differences"], strict=True):
        assert row[0] == f"{one['run']}, {one['score']}"
        assert row[2] == str(one["figure"]["num"])
        value = one["figure"]["value"]
        start = f"{value:+.4f} [" if one["score"] == "drift" else f"{100 * value:+.1f} ["
        assert row[1].startswith(start)
    assert table(page, "Cost").rows == (
        ("A", "0.25 s", "1 h 02 min", "1.5 GB", "9.4 kB"),
        ("B", "1.5 s", "30.0 s", "1.5 GB", "3.5 MB"),
        ("C", "-", "3.5 s", "1.0 MB", "-"),
    )


@pytest.mark.usefixtures("pictures")
def test_a_comparison_is_written_as_it_is_returned(tmp_path: Path) -> None:
    first = save_run(tmp_path / "first", make_answers())
    second = save_run(tmp_path / "second", make_answers(), patch_bytes=1)
    before = listing(first), listing(second)
    output = tmp_path / "new" / "comparison"
    report, page = compare_runs([first, second], output)
    assert listing(output) == {**draw(page), "report.json": to_json(report).encode()}
    assert (listing(first), listing(second)) == before
    again = tmp_path / "again"
    compare_runs([first, second], again)
    assert listing(again) == listing(output)


def test_a_comparison_is_written_only_where_it_is_asked_for(tmp_path: Path) -> None:
    folders = [save_run(tmp_path / name) for name in ("first", "second")]
    before = listing(tmp_path)
    compare_runs(folders)
    assert listing(tmp_path) == before


def test_a_comparison_takes_no_folder_that_is_taken(tmp_path: Path) -> None:
    folders = [save_run(tmp_path / name) for name in ("first", "second")]
    before = listing(tmp_path)
    with pytest.raises(InputError, match="exists and is not empty"):
        compare_runs(folders, folders[0])
    assert listing(tmp_path) == before


def test_runs_in_folders_with_half_characters_are_compared(tmp_path: Path) -> None:
    run = save_run(tmp_path / os.fsdecode(b"caf\xe9"), make_answers())
    report, _ = compare_runs([run, copy_of(run)], tmp_path / "comparison")
    read = json.loads((tmp_path / "comparison" / "report.json").read_bytes())
    assert read["runs"][0]["folder"] == report.runs[0].folder == str(run)


# Drawing again.


@pytest.mark.usefixtures("pictures")
def test_a_run_is_drawn_as_it_was_at_first(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", make_answers())
    whole = listing(run)
    for name in ("report.md", "report.html"):
        (run / name).write_text("gone")
    for _ in range(2):
        assert redraw(run) == (read_run(run).report, [run / "report.md", run / "report.html"])
        assert listing(tmp_path) == {f"run/{name}": data for name, data in whole.items()}
    assert not [path for path in tmp_path.iterdir() if path != run]


@pytest.mark.usefixtures("pictures")
def test_an_evaluation_is_drawn_as_it_was_at_first(tmp_path: Path) -> None:
    folder = save_measured(tmp_path / "evaluation", make_answers())
    whole = listing(folder)
    (folder / "report.md").unlink()
    redraw(str(folder))
    assert listing(folder) == whole


@pytest.mark.usefixtures("pictures")
def test_a_run_is_drawn_with_the_evaluations_within_it(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", make_answers())
    whole = listing(run)
    save_measured(run / "wild", make_answers())
    redraw(run)
    drawn = listing(run)
    assert b"## Capability (wild)" in drawn["report.md"]
    assert b"## Capability (wild)" not in whole["report.md"]
    unchanged = {"answers.jsonl", "drift.jsonl", "report.json"}
    assert {name: drawn[name] for name in unchanged} == {name: whole[name] for name in unchanged}


@pytest.mark.usefixtures("pictures")
def test_a_run_is_drawn_into_another_folder(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", make_answers())
    whole = listing(run)
    (run / "report.md").write_text("gone")
    output = tmp_path / "deep" / "new"
    names = ["report.md", "report.html", "report.json"]
    assert redraw(run, output) == (read_run(run).report, [output / name for name in names])
    assert listing(output) == {name: whole[name] for name in names}
    assert listing(run) == {**whole, "report.md": b"gone"}


def said_of(folder: Path) -> list[str]:
    said: list[str] = []
    redraw(folder, say=said.append)
    return said


def test_what_a_report_does_without_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "draw", lambda page: {})
    run = save_run(tmp_path / "run", make_answers())
    evaluation = save_measured(run / "wild", make_answers())
    make_whole(run)
    assert said_of(run) == said_of(evaluation) == []
    shutil.rmtree(run / "patch")
    assert said_of(run) == [f"{run}: holds no patch/ any more, only what was measured of it"]
    assert said_of(evaluation) == []
    (evaluation / "answers.jsonl").unlink()
    missing, _ = said_of(run)
    assert missing.startswith(f"left out: {evaluation / 'answers.jsonl'}: is missing")


@pytest.mark.parametrize("name", ["edits.jsonl", "train.jsonl"])
def test_a_file_that_a_run_does_not_hold_any_more_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(reporting, "draw", lambda page: {})
    run = make_whole(save_run(tmp_path / "run", make_answers()))
    (run / name).unlink()
    assert said_of(run) == [f"{run}: holds no {name} any more"]


def test_a_patch_that_is_damaged_or_of_other_edits_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "draw", lambda page: {})
    run = make_whole(save_run(tmp_path / "run", make_answers()))
    shutil.rmtree(run / "patch")
    make_whole(run, edits_sha256="f" * 64)
    told = "is of other edits than the report, which says nothing about it"
    assert said_of(run) == [f"{run / 'patch'}: {told}"]
    for alter in (lambda path: path.write_text("{}"), Path.unlink):
        alter(run / "patch" / "patch.json")
        [line] = said_of(run)
        assert line.startswith("the patch cannot be used: ")
        assert str(run / "patch") in line


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_a_folder_in_the_place_of_a_drawing_is_refused_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    run = save_run(tmp_path / "run", make_answers())
    for drawn in ("report.md", "report.html"):
        (run / drawn).unlink()
    (run / name).mkdir()
    before = listing(tmp_path)
    with pytest.raises(InputError) as caught:
        redraw(run)
    assert str(caught.value).startswith(f"{run / name}: is a folder: expected a file")
    assert listing(tmp_path) == before
    redraw(run, tmp_path / "new")
    assert (tmp_path / "new" / name).is_file()


@pytest.mark.usefixtures("pictures")
def test_a_run_is_drawn_into_no_folder_that_is_taken(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", make_answers())
    before = listing(tmp_path)
    with pytest.raises(InputError, match="exists and is not empty"):
        redraw(run, run)
    assert listing(tmp_path) == before


def test_what_is_no_run_is_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no report\.json"):
        redraw(tmp_path, tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("pictures")
def test_a_run_that_cannot_be_written_to_is_told_to_go_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path / "run")
    before = listing(tmp_path)

    def refuse(folder: Path, files: Mapping[str, bytes]) -> None:
        raise OSError(30, "Read-only file system", str(folder))

    monkeypatch.setattr(reporting, "add_files", refuse)
    with pytest.raises(InputError) as caught:
        redraw(run)
    told = "cannot be written to: Read-only file system; choose a place with -o"
    assert str(caught.value) == f"{run}: {told}"
    assert listing(tmp_path) == before


@pytest.mark.usefixtures("pictures")
def test_a_folder_whose_parent_cannot_be_written_to_is_told_to_go_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path / "run")
    real = os.open

    def open_others(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", open_others)
    with pytest.raises(InputError, match=r"Read-only file system; .*-o") as caught:
        redraw(run)
    assert str(run) in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.usefixtures("pictures")
def test_a_run_that_is_read_only_is_told_to_go_elsewhere(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    run.chmod(0o500)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match=r"cannot be written to: .*-o"):
            redraw(run)
    finally:
        tmp_path.chmod(0o700)
        run.chmod(0o700)
