from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locft.data.edits import EditFile, read_edits
from locft.data.lint import Measured, lint, resolve_conflicts
from locft.data.problems import Problem
from locft.errors import EditsError
from locft.types import Edit

SAMPLE = Path(__file__).parents[4] / "shared" / "data" / "edits" / "counterfact_10k.json"


def edit_file(*edits: Edit, problems: tuple[Problem, ...] = ()) -> EditFile:
    return EditFile(Path("edits.jsonl"), "locft", edits, problems, "")


def edits_of(*pairs: tuple[str, str]) -> list[Edit]:
    return [
        Edit(id=str(i), prompt=prompt, target=target, source=f"line {i}")
        for i, (prompt, target) in enumerate(pairs, start=1)
    ]


def found(problems: tuple[Problem, ...]) -> list[tuple[str, str, str]]:
    return [(problem.level, problem.code, problem.where) for problem in problems]


def test_sound_edits_have_no_problems() -> None:
    edits = edits_of(("Who wrote it?", "Ann"), ("Who read it?", "Ann"))
    assert lint(edit_file(*edits)) == ()


def test_the_problems_of_reading_come_first() -> None:
    problem = Problem("error", "missing-field", "line 9", "m")
    edits = edits_of(("p", "t"), ("p", "t"))
    assert [each.code for each in lint(edit_file(*edits, problems=(problem,)))] == [
        "missing-field",
        "duplicate",
    ]


def test_a_repeated_edit_is_a_warning() -> None:
    edits = edits_of(("Who?", "The Who"), (" Who?", "who."))
    problems = lint(edit_file(*edits))
    assert found(problems) == [("warning", "duplicate", "line 2")]
    assert "line 1" in problems[0].message


def test_two_targets_for_one_prompt_are_an_error_that_names_both() -> None:
    edits = edits_of(("Who  is it?", "Ann"), ("x", "y"), (" Who is it?\n", "Bob"))
    problems = lint(edit_file(*edits))
    assert found(problems) == [("error", "contradiction", "line 3")]
    for part in ("line 1", "'Ann'", "'Bob'", "--on-conflict keep-last|keep-first"):
        assert part in problems[0].message


def test_a_repetition_of_a_contradiction_is_reported_as_a_repetition() -> None:
    edits = edits_of(("p", "a b"), ("p", "c"), ("p", "c"), ("p", "a b"))
    assert found(lint(edit_file(*edits))) == [
        ("error", "contradiction", "line 2"),
        ("warning", "duplicate", "line 3"),
        ("warning", "duplicate", "line 4"),
    ]


def test_different_punctuation_is_no_repetition() -> None:
    edits = edits_of(("p", "?"), ("p", "!"))
    codes = [problem.code for problem in lint(edit_file(*edits))]
    assert codes.count("contradiction") == 1
    assert "duplicate" not in codes


@pytest.mark.parametrize("target", ["St. Petersburg", "one\ntwo", "\nParis", "3.14", "?!", "The"])
def test_a_target_that_no_answer_can_match_is_a_warning(target: str) -> None:
    problems = lint(edit_file(*edits_of(("p", target))))
    assert found(problems) == [("warning", "unmatchable-target", "line 1")]


@pytest.mark.parametrize("target", ["Paris.", "Paris\n", "Paris. ", " Paris", "The Hague."])
def test_a_target_that_loses_nothing_when_cut_is_fine(target: str) -> None:
    assert lint(edit_file(*edits_of(("p", target)))) == ()


def test_a_rephrase_that_is_the_prompt_is_a_warning() -> None:
    [edit] = edits_of(("Who is it?", "Ann"))
    problems = lint(edit_file(replace(edit, rephrases=("Who?", "Who is  it? "))))
    assert found(problems) == [("warning", "rephrase-equals-prompt", "line 1")]


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (Measured(5, 4, prompt_is_prefix=True), []),
        (Measured(5, 5, prompt_is_prefix=True), ["prompt-too-long"]),
        (Measured(6, 1, prompt_is_prefix=True), ["prompt-too-long"]),
        (Measured(5, 4, prompt_is_prefix=True, longest_scored_tokens=6), ["prompt-too-long"]),
        (Measured(5, 0, prompt_is_prefix=True), ["target-no-tokens"]),
        (Measured(2, 6, prompt_is_prefix=True), ["target-too-long"]),
        (Measured(2, 5, prompt_is_prefix=True), []),
        (Measured(5, 4, prompt_is_prefix=False), ["boundary"]),
    ],
)
def test_tokens_are_checked_where_they_can_be_measured(measured: Measured, expected: list[str]) -> None:
    problems = lint(
        edit_file(*edits_of(("p", "t"))),
        measure=lambda edit: measured,
        max_context_tokens=10,
        max_answer_tokens=5,
    )
    assert [problem.code for problem in problems] == expected


def test_a_model_without_a_limit_takes_any_prompt() -> None:
    edits = edits_of(("p", "t"))
    measured = Measured(10**9, 2, prompt_is_prefix=True)
    assert lint(edit_file(*edits), measure=lambda edit: measured) == ()


def test_levels_tell_what_forbids_training() -> None:
    problems = lint(
        edit_file(*edits_of(("p", "t"))),
        measure=lambda edit: Measured(1, 0, prompt_is_prefix=False),
        max_context_tokens=0,
    )
    assert {problem.code: problem.level for problem in problems} == {
        "prompt-too-long": "error",
        "target-no-tokens": "error",
        "boundary": "warning",
    }


def test_the_conflicts_of_counterfact_are_found_and_resolved() -> None:
    if not SAMPLE.exists():
        pytest.skip(f"the sample data set {SAMPLE} is not here")
    read = read_edits(SAMPLE)
    codes = [problem.code for problem in lint(read)]
    assert codes.count("contradiction") == 79
    assert codes.count("duplicate") == 4
    resolved = replace(read, edits=resolve_conflicts(read.edits, "keep-last"))
    assert "contradiction" not in [problem.code for problem in lint(resolved)]


@pytest.mark.parametrize(
    ("policy", "kept"), [("keep-first", ["1", "2", "4"]), ("keep-last", ["2", "3", "5"])]
)
def test_all_edits_with_the_winning_target_are_kept_in_order(
    policy: Literal["keep-first", "keep-last"], kept: list[str]
) -> None:
    edits = edits_of(("p", "a b"), ("q", "x"), (" p", "c"), ("p", "A b."), ("p", "c"))
    assert [edit.id for edit in resolve_conflicts(edits, policy)] == kept


def test_contradictions_are_listed_where_they_are_not_to_be_resolved() -> None:
    edits = edits_of(("p", "x"), ("p", "y"), ("q", "x"), ("q", "y"))
    with pytest.raises(EditsError) as caught:
        resolve_conflicts(edits, "error")
    assert str(caught.value).splitlines()[0] == "the edits contradict each other:"
    assert [part.split(":")[0].strip() for part in str(caught.value).splitlines()[1:]] == [
        "line 2",
        "line 4",
    ]


def test_edits_made_in_code_are_named_by_their_id() -> None:
    edits = [Edit(id=name, prompt="p", target=name) for name in ("x", "y")]
    with pytest.raises(EditsError, match="edit y: contradicts edit x"):
        resolve_conflicts(edits, "error")


def test_nothing_is_dropped_where_nothing_contradicts() -> None:
    edits = edits_of(("p", "x"), ("q", "y"), ("p", "X"))
    for policy in ("error", "keep-first", "keep-last"):
        assert resolve_conflicts(edits, policy) == tuple(edits)


few_texts = st.sampled_from(["p", " p", "q", "p q", "the", "?", "!", ""])


@given(
    st.lists(st.tuples(few_texts, few_texts)),
    st.sampled_from(["keep-first", "keep-last"]),
)
def test_resolving_leaves_each_prompt_but_no_contradiction(
    pairs: list[tuple[str, str]], policy: Literal["keep-first", "keep-last"]
) -> None:
    edits = edits_of(*pairs)
    kept = resolve_conflicts(edits, policy)
    assert "contradiction" not in [problem.code for problem in lint(edit_file(*kept))]
    assert {edit.prompt.strip() for edit in kept} == {edit.prompt.strip() for edit in edits}
    assert [edit for edit in edits if edit in kept] == list(kept)
