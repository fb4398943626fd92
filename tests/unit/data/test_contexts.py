import pytest
from hypothesis import given
from hypothesis import strategies as st

from locft.data.contexts import CONTEXTS, Context, in_context


def test_a_question_is_asked_for_an_answer() -> None:
    assert in_context("Who wrote Emma?", "qa") == "Question: Who wrote Emma?\nAnswer:"


@pytest.mark.parametrize("context", ["raw", "chat"])
def test_a_prompt_stays_as_it_is_where_no_text_is_put_around_it(context: Context) -> None:
    assert in_context("Who wrote Emma?", context) == "Who wrote Emma?"


@given(st.text(min_size=1), st.sampled_from(sorted(CONTEXTS)))
def test_every_context_holds_the_prompt_once_and_is_the_same_each_time(
    prompt: str, context: Context
) -> None:
    text = in_context(prompt, context)
    assert prompt in text
    assert in_context(prompt, context) == text


def test_prompts_do_not_all_stand_behind_the_same_sentence() -> None:
    before = {in_context(f"prompt {index}", "prefix").partition(" prompt")[0] for index in range(100)}
    assert len(before) == 8
    assert all(sentence.endswith(".") for sentence in before)
