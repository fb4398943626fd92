import pytest
from hypothesis import given
from hypothesis import strategies as st

from locft.data.normalise import collapse_spaces, cut_answer, normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Paris", "paris"),
        ("  The  United\tStates\n", "united states"),
        ("U.S.A.", "usa"),
        ("rock'n'roll", "rocknroll"),
        ("an apple a day", "apple day"),
        ("theatre", "theatre"),
        ("A", ""),
        ("?!", ""),
        ("«Ärger»", "«ärger»"),
    ],
)
def test_case_punctuation_articles_and_spaces_do_not_count(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_an_article_counts_only_as_a_whole_word() -> None:
    assert normalise("a\u0301 la carte") == "a\u0301 la carte"


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Paris. It is", "Paris"),
        ("Paris\nQ:", "Paris"),
        ("St. Petersburg", "St"),
        ("Paris", "Paris"),
        ("\nParis", ""),
        ("Paris\u2028Q", "Paris\u2028Q"),
    ],
)
def test_an_answer_ends_at_a_full_stop_or_line_feed(text: str, expected: str) -> None:
    assert cut_answer(text) == expected


def test_collapsed_prompts_have_single_spaces_and_bare_ends() -> None:
    assert collapse_spaces("  Who\twrote \n it? ") == "Who wrote it?"
