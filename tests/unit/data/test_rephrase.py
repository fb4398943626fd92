import pytest

from locft.data.rephrase import rephrasing_task, usable_wordings
from locft.types import Edit

QUESTION = Edit(
    id="q", prompt="Which city did Ada Lovelace live in?", target="Rome", subject="Ada Lovelace"
)
OPENING = Edit(
    id="s", prompt="The mother tongue of Ada Lovelace is", target="Basque", subject="Ada Lovelace"
)


def test_the_task_names_the_subject_the_number_and_what_it_is() -> None:
    task = rephrasing_task(QUESTION, 6)
    assert task is not None
    assert 'Keep "Ada Lovelace" as it is' in task
    assert "Write this question in 6 other ways" in task
    assert task.endswith(f"\n\n{QUESTION.prompt}")
    assert "beginning of a sentence" in (rephrasing_task(OPENING, 2) or "")
    assert QUESTION.target not in task


@pytest.mark.parametrize("subject", [None, "", "Grace Hopper"])
def test_without_a_subject_in_the_prompt_nothing_is_asked(subject: str | None) -> None:
    edit = Edit(id="x", prompt="Which city did Ada live in?", target="Rome", subject=subject)
    assert rephrasing_task(edit, 3) is None


@pytest.mark.parametrize(
    ("line", "wording"),
    [
        ("1. In which city did Ada Lovelace live?", "In which city did Ada Lovelace live?"),
        ("- What city was home to Ada Lovelace?", "What city was home to Ada Lovelace?"),
        ('(3) "Ada Lovelace lived in which city?"', "Ada Lovelace lived in which city?"),
        ("b) Where did Ada Lovelace live?", "Where did Ada Lovelace live?"),
    ],
)
def test_a_wording_is_read_without_its_number_and_quotes(line: str, wording: str) -> None:
    assert list(usable_wordings(QUESTION, f"Here you are:\n{line}\n")) == [wording]


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (QUESTION, "In which city did she live?"),  # no subject
        (QUESTION, "In which city did ada lovelace live?"),  # not as it is
        (QUESTION, "Did Ada Lovelace live in ROME?"),  # the target
        (QUESTION, "The city that Ada Lovelace lived in is"),  # no question
        (QUESTION, "Ada Lovelace lived in London."),
        (QUESTION, f"I {'really ' * 30}ask: where did Ada Lovelace live?"),  # far longer
        (OPENING, "What is the mother tongue of Ada Lovelace?"),
        (OPENING, "The mother tongue of Ada Lovelace is English."),
        (OPENING, "Ada Lovelace spoke:"),
        (OPENING, ""),
    ],
)
def test_a_line_that_is_no_wording_is_left_out(edit: Edit, line: str) -> None:
    assert list(usable_wordings(edit, line)) == []


def test_the_beginning_of_a_sentence_stays_one() -> None:
    reply = "1. Ada Lovelace's mother tongue is\n2. Ada Lovelace is a native speaker of"
    assert list(usable_wordings(OPENING, reply)) == [
        "Ada Lovelace's mother tongue is",
        "Ada Lovelace is a native speaker of",
    ]
