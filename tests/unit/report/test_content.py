import dataclasses
from collections.abc import Iterator

import pytest
from hostile import pictures_blank
from reports import (
    BEFORE,
    NONE,
    SCORES,
    make_answer,
    make_answers,
    make_endpoint,
    make_evaluation,
    make_report,
)

from locft.report.content import Evaluated, describe_edit, describe_evaluation
from locft.report.page import Block, Fold, Page, Picture, Section, Table, Text
from locft.types import AnswerRecord, Epoch, Figure


@pytest.fixture(autouse=True)
def _pictures_blank() -> Iterator[None]:
    with pictures_blank():
        yield


def section(page: Page, title: str) -> Section:
    (found,) = (one for one in page.sections if one.title == title)
    return found


def drawn_titles(page: Page) -> list[str]:
    return [one.title for one in page.sections if one.blocks]


def tables(blocks: tuple[Block, ...]) -> list[Table]:
    return [block for block in blocks if isinstance(block, Table)]


def folds(page: Page, title: str = "Answers") -> list[Fold]:
    return [block for block in section(page, title).blocks if isinstance(block, Fold)]


def words(page: Page) -> str:
    return " ".join(b.text for one in page.sections for b in one.blocks if isinstance(b, Text))


def test_an_edit_is_told_judgement_first() -> None:
    page = describe_edit(make_report(), make_answers())
    assert page.title == "200 edits in plain"
    assert page.verdict.startswith("194 of 200 edits took; ")
    assert drawn_titles(page) == [
        "Scores",
        "Learning",
        "Drift",
        "Answers",
        "What was changed",
        "Cost",
        "Settings",
        "Where",
    ]
    assert [(tile.name, tile.value, tile.change) for tile in page.tiles] == [
        ("reliability", "97.0%", "+97.0 [+94.0, +99.0]"),
        ("generalization", "50.0%", ""),
        ("locality", "75.0%", ""),
        ("drift", "0.0421", ""),
    ]
    assert page.tiles[0].note == "93.6 to 98.6%, 200 prompts"
    assert page.tiles[3].note == "0.0391 to 0.0455, 40 passages, nats per token"


def test_scores_stand_with_intervals_counts_and_meanings() -> None:
    (scores,) = tables(section(describe_edit(make_report(), ()), "Scores").blocks)
    assert scores.rows[0] == (
        "reliability",
        "0.0% [0.0, 1.9] of 200",
        "97.0% [93.6, 98.6] of 200",
        "+97.0 [+94.0, +99.0]",
        "prompts answered with the target",
    )
    assert scores.rows[1][1] == "not measured (the edits hold none)"
    assert scores.rows[2][1] == "100% by definition"
    assert scores.rows[3][1:3] == ("0 by definition", "0.0421 [0.0391, 0.0455], 40 passages")
    assert [row[0] for row in scores.rows] == list(vars(SCORES))


def test_learning_cost_change_and_settings_are_told() -> None:
    page = describe_edit(make_report(), ())
    told = words(page)
    for part in (
        "3 epochs of at most 25, 30 steps of at most 20 edits, learning rate 0.002; final loss 0.0091",
        "2,048 of 40,000 parameters (5.12%). The patch takes 9.4 kB.",
        "0.25 s per edit",
        "The plan allowed for 25 epochs, and training took 3",
        "22,655 tokens, sha256 dddddddddddd",
        'context raw: Match answers: plain. Answers end at ".", newline.',
    ):
        assert part in told
    (cost,) = tables(section(page, "Cost").blocks)
    assert ("training", "40.0 s", "at most 1 min 00 s") in cost.rows
    assert ("peak memory", "1.5 GB", "1.6 GB") in cost.rows
    (settings,) = tables(section(page, "Settings").blocks)
    assert settings.rows == (
        ("lr", "auto (0.002)"),
        ("drift_text", "plain"),
        ("revision", "none"),
        ("stop_loss", "0.01"),
    )
    (changed,) = tables(section(page, "What was changed").blocks)
    assert changed.rows == (("plain", "32 x 64", "BF16", "12.5%"),)
    (epochs,) = tables(folds(page, "Learning")[0].blocks)
    assert epochs.rows[1] == ("2", "10", "0.5", "70.0%", "72.0%", "69.0%", "71.0%", "68.0%")


def test_a_run_without_a_plan_or_a_threshold_says_nothing_of_them() -> None:
    report = make_report(plan=None)
    training = dataclasses.replace(report.training, stopped_early=False)
    page = describe_edit(dataclasses.replace(report, training=training), ())
    assert "plan" not in words(page)
    assert "it stopped" not in words(page)
    assert all(len(row) == 2 for row in tables(section(page, "Cost").blocks)[0].rows)


def test_one_edit_and_one_epoch_without_rephrases_locality_or_drift_is_a_whole_report() -> None:
    report = make_report()
    one = Figure(value=1.0, num=1, low=0.2, high=1.0)
    scores = dataclasses.replace(SCORES, reliability=one, generalization=NONE, locality=NONE, drift=NONE)
    course = (Epoch(epoch=1, steps=1, loss=0.5, success=(1.0,)),)
    page = describe_edit(
        make_report(
            edits=dataclasses.replace(report.edits, num_edits=1, num_rephrases=0, num_locality=0),
            scores=scores,
            scores_before=dataclasses.replace(BEFORE, locality=NONE, drift=NONE),
            training=dataclasses.replace(report.training, epochs=1, steps=1, fifths=(1,), course=course),
            drift=dataclasses.replace(report.drift, overall=NONE, by_kind={}, most_moved=()),
        ),
        (),
    )
    assert page.title == "1 edit in plain"
    assert page.verdict == "1 of 1 edits took."
    assert [tile.name for tile in page.tiles] == ["reliability"]
    assert "Answers" not in drawn_titles(page)
    assert tables(section(page, "Drift").blocks)[0].rows == (
        ("all", "not measured (the edits hold none)"),
    )
    assert not any(isinstance(block, Picture | Fold) for block in section(page, "Drift").blocks)
    assert "1 epoch of at most 25, 1 step of" in words(page)


def test_failures_come_first_by_cause_and_only_the_first_group_is_open() -> None:
    answers: list[AnswerRecord] = [make_answer("right", is_right=True)]
    answers += [make_answer(f"empty {n}", cause="empty") for n in range(2)]
    answers += [make_answer(f"wrong {n}") for n in range(3)]
    answers += [make_answer("other", kind="locality"), make_answer("open", score_after=None, cause=None)]
    page = describe_edit(make_report(), answers)
    assert [fold.title for fold in folds(page)] == [
        "reliability, failed: wrong fact: 3",
        "reliability, failed: empty: 2",
        "locality, failed: wrong fact: 1",
        "reliability, as expected: 1",
        "reliability, not scored: 1",
    ]
    assert [fold.is_open for fold in folds(page)] == [True, False, False, False, False]
    assert "6 of 8 answers are not as expected." in words(page)


def test_right_answers_that_were_something_else_before_come_first() -> None:
    answers = [make_answer("a", is_right=True, before=""), make_answer("b", is_right=True, before="x")]
    ((table,),) = (fold.blocks for fold in folds(describe_edit(make_report(), answers)))
    assert isinstance(table, Table)
    assert table.rows == (("b", "b", "x", "b"), ("a", "a", "(blank)", "a"))


@pytest.mark.parametrize(
    ("num", "left_out"),
    [(100, ""), (101, "1 more answer: answers.jsonl"), (1234, "1,134 more answers: answers.jsonl")],
)
def test_answers_beyond_a_hundred_of_a_group_are_counted_as_left_out(num: int, left_out: str) -> None:
    page = describe_edit(make_report(), [make_answer(f"prompt {n}") for n in range(num)])
    ((table,),) = (fold.blocks for fold in folds(page))
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == [f"prompt {n}" for n in range(100)]
    assert table.left_out == left_out


def test_long_tables_of_matrices_and_epochs_are_cut_with_their_count() -> None:
    report = make_report()
    (matrix,) = report.location.matrices
    matrices = tuple(dataclasses.replace(matrix, tensor=f"experts.{n}.w") for n in range(23))
    course = tuple(Epoch(epoch=n, steps=1, loss=1.0, success=(0.5,)) for n in range(1, 204))
    page = describe_edit(
        make_report(
            location=dataclasses.replace(report.location, matrices=matrices),
            training=dataclasses.replace(report.training, fifths=(1,), course=course),
        ),
        (),
    )
    (changed,) = tables(section(page, "What was changed").blocks)
    assert (changed.rows[-1][0], changed.left_out) == ("experts.19.w", "3 more tensors: report.json")
    (epochs,) = tables(folds(page, "Learning")[0].blocks)
    assert (epochs.rows[-1][0], epochs.left_out) == ("200", "3 more epochs: train.jsonl")


def test_an_evaluation_tells_protocols_contexts_judge_and_capability() -> None:
    page = describe_evaluation(make_evaluation(), make_answers())
    assert page.title == "plain with plain: 200 edits"
    assert drawn_titles(page) == [
        "Scores by protocol",
        "How far the edits carry",
        "Capability",
        "Drift",
        "Answers",
        "Cost",
        "Where",
    ]
    assert (
        "Judge plain: agrees with exact match on 75.0% [59.8, 85.8] of 40; 2 answers without"
        in words(page)
    )
    contexts = tables(section(page, "How far the edits carry").blocks)[0]
    assert [row[0] for row in contexts.rows] == ["raw", "chat"]
    assert {len(row) for row in contexts.rows} == {len(contexts.columns)} == {5}
    tasks = tables(section(page, "Capability").blocks)[0]
    assert [row[0] for row in tasks.rows] == ["plain", "piqa", "mean over tasks"]
    assert tasks.rows[0][4] == "-25.0 [-35.0, -15.0]"


def test_the_unedited_model_of_an_evaluation_drifts_by_nothing() -> None:
    first, second = tables(
        section(describe_evaluation(make_evaluation(), ()), "Scores by protocol").blocks
    )
    assert first.rows[-1][:3] == ("drift", "0 by definition", "0.0421 [0.0391, 0.0455], 40 passages")
    assert "drift" not in [row[0] for row in second.rows]


def test_an_evaluation_of_a_server_without_a_base_has_no_empty_section() -> None:
    main = dataclasses.replace(make_evaluation().protocols["locft"], before=None, change=None)
    report = make_evaluation(
        model=None,
        endpoint=make_endpoint("srv"),
        patch=None,
        protocols={"locft": main},
        contexts={},
        drift=None,
        capability=None,
        judge=None,
    )
    page = describe_evaluation(report, [make_answer(before=None)])
    assert page.title == "srv at srv: 200 edits"
    assert drawn_titles(page) == ["Scores by protocol", "Answers", "Cost", "Where"]
    (scores,) = tables(section(page, "Scores by protocol").blocks)
    assert scores.columns == ("score", "value", "what it is")
    ((table,),) = (fold.blocks for fold in folds(page))
    assert isinstance(table, Table)
    assert table.columns == ("prompt", "expected", "after")


def test_an_evaluation_that_takes_no_answers_shows_none_and_counts_none() -> None:
    main = make_evaluation().protocols["locft"]
    protocol = dataclasses.replace(main.protocol, name="teacher-forced", max_new_tokens=None)
    report = make_evaluation(protocols={"teacher-forced": dataclasses.replace(main, protocol=protocol)})
    page = describe_evaluation(report, [make_answer(protocol="teacher-forced", after=None)])
    assert "Answers" not in drawn_titles(page)
    assert page.verdict.startswith("reliability 97%; generalization 50%")
    assert "greedy" not in words(page)


def test_answers_of_other_protocols_and_contexts_are_not_mixed_in() -> None:
    answers = [
        make_answer("own"),
        make_answer("wild", protocol="wild"),
        make_answer("chat", context="chat"),
    ]
    page = describe_evaluation(make_evaluation(), answers)
    assert [fold.title for fold in folds(page)] == ["reliability, failed: wrong fact: 1"]


def test_what_else_was_measured_of_a_run_stands_in_its_report_under_its_name() -> None:
    evaluation = Evaluated(name="eval-1", report=make_evaluation(), answers=())
    titles = drawn_titles(describe_edit(make_report(), (), [evaluation]))
    for title in ("Scores by protocol", "How far the edits carry", "Capability"):
        assert f"{title} (eval-1)" in titles


def test_agreement_on_answers_of_nothing_is_told_beside_locality() -> None:
    blank = [make_answer("where", kind="locality", expected=expected) for expected in ("?", "", "!?")]
    agreed = make_answer("where", kind="locality", expected="?", after="", is_right=True)
    said = make_answer("where", kind="locality", expected="here", after="here", is_right=True)
    other = dataclasses.replace(agreed, protocol="wild")
    for page in (
        describe_edit(make_report(), [*blank, agreed, said, other]),
        describe_evaluation(make_evaluation(), [*blank, agreed, said, other]),
    ):
        blocks = [block for one in page.sections for block in one.blocks if isinstance(block, Text)]
        [told, *_] = [block.text for block in blocks if "nothing that counts" in block.text]
        assert told.startswith("To 4 of 5 locality prompts the unedited model answers nothing")
        assert "agrees on 1 of these by answering nothing, either" in told
    nothing_blank = describe_edit(make_report(), [said])
    assert not any("nothing that counts" in str(one.blocks) for one in nothing_blank.sections)
