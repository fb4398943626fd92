from hypothesis import given
from hypothesis import strategies as st

from locft.data.augment import add_prefixes, find_sentences
from locft.types import Edit

SENTENCES = tuple(f"Sentence number {number} says nothing of note." for number in range(12))
EDITS = (
    Edit(id="a", prompt="The capital of France is", target="Rome", subject="France"),
    Edit(id="b", prompt="Who wrote the play?", target="Oslo", rephrases=("The play is by",)),
)


def test_sentences_are_whole_lines_of_common_length() -> None:
    text = (
        "end of a cut one. The rain had stopped by noon. Too short. and this one begins small here. "
        "A line\nthat is broken in two. Was it ever about the river at all? "
        f"{'Far ' + 'too ' * 20}long. The last one is cut of"
    )
    assert find_sentences([text, text]) == (
        "The rain had stopped by noon.",
        "Was it ever about the river at all?",
    )


@given(num=st.integers(0, 15), seed=st.integers(0, 99))
def test_each_edit_gets_other_sentences_and_keeps_its_target(num: int, seed: int) -> None:
    found = add_prefixes(EDITS, SENTENCES, num, seed)
    assert found == add_prefixes(EDITS, SENTENCES, num, seed)
    assert found.num_asked == 2 * num
    for edit, examples in zip(EDITS, found.examples, strict=True):
        assert len(examples) == min(num, len(SENTENCES))
        assert len({one.prompt for one in examples}) == len(examples)
        for one in examples:
            sentence = one.prompt.removesuffix(f" {edit.prompt}")
            assert sentence in SENTENCES
            assert (one.id, one.target) == (edit.id, edit.target)
            assert not one.rephrases
            assert not one.locality


def test_a_sentence_that_names_the_subject_or_the_target_is_not_taken() -> None:
    sentences = (
        "He went to france by train once.",
        "All roads lead to rome they say.",
        "It rained all day.",
    )
    found = add_prefixes(EDITS[:1], sentences, 3, seed=0)
    assert [one.prompt for one in found.examples[0]] == ["It rained all day. The capital of France is"]
    assert (found.num, found.num_asked) == (1, 3)


def test_what_is_scored_is_never_trained_on() -> None:
    edits = [
        Edit(
            id="a",
            prompt="The capital is",
            target="Rome",
            rephrases=(f"{SENTENCES[0]}  The capital is",),
        ),
        Edit(
            id="b", prompt="The play is by", target="Oslo", locality=(f"{SENTENCES[1]} The capital is",)
        ),
    ]
    found = add_prefixes(edits, SENTENCES[:3], 3, seed=0)
    scored = {" ".join(text.split()) for edit in edits for text in (*edit.rephrases, *edit.locality)}
    trained = {" ".join(one.prompt.split()) for examples in found.examples for one in examples}
    assert not scored & trained
    assert found.num_scored == 2
    assert [len(examples) for examples in found.examples] == [1, 3]


def test_without_sentences_there_are_no_examples() -> None:
    assert add_prefixes(EDITS, (), 2, seed=0).num == 0
