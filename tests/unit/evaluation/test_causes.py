import pytest
from hypothesis import given
from hypothesis import strategies as st

from locft.evaluation.causes import CAUSES, find_cause
from locft.evaluation.metrics import is_match
from locft.types import KINDS, Kind


@pytest.mark.parametrize(
    ("answer", "expected", "cause"),
    [
        ("", "Paris", "empty"),
        ("\nParis", "Paris", "empty"),
        (" the ", "Paris", "empty"),
        ("Paris is the capital of France", "Paris", "rambling"),
        ("the Eiffel Tower in Paris", "Eiffel Tower", "rambling"),
        ("Eiffel", "Eiffel Tower", "near miss"),
        ("Tower", "the Eiffel Tower", "near miss"),
        ("Gustave Eifel", "Gustave Eiffel", "near miss"),
        ("1899", "1898", "wrong fact"),
        ("London", "Paris", "wrong fact"),
        ("It is Paris", "Paris", "contained"),
        ("the great Eiffel Tower of Paris", "Eiffel Tower", "contained"),
        ("the tower of Eiffel fame", "Eiffel Tower", "wrong fact"),
        ("Parisian", "Paris", "wrong fact"),
        ("Lima", "", "wrong fact"),
    ],
)
def test_a_failure_has_a_cause(answer: str, expected: str, cause: str) -> None:
    assert not is_match(answer, expected)
    assert find_cause(answer, expected) == cause


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ("London", "right elsewhere"),
        ("", "right elsewhere"),
        ("Paris and more", "rambling"),
        ("Pariss", "near miss"),
    ],
)
def test_how_an_answer_is_wrong_says_more_than_that_it_is_right_elsewhere(
    answer: str, cause: str
) -> None:
    assert find_cause(answer, "Paris", is_right_elsewhere=True) == cause


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ("London", "answered otherwise"),
        ("", "empty"),
        ("Paris and more", "rambling"),
        ("Pariss", "near miss"),
    ],
)
def test_no_fact_is_wrong_where_the_unedited_answer_was_expected(answer: str, cause: str) -> None:
    assert find_cause(answer, "Paris", "locality") == cause


@given(st.text(), st.text(), st.sampled_from(KINDS), st.booleans())
def test_every_answer_gets_a_documented_cause(
    answer: str, expected: str, kind: Kind, elsewhere: bool
) -> None:
    assert find_cause(answer, expected, kind, is_right_elsewhere=elsewhere) in CAUSES
