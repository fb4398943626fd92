from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from locft.data.augment import (
    Augmented,
    find_sentences,
    in_frames,
    join_examples,
    scored_texts,
    take_examples,
    with_prefixes,
)
from locft.types import Edit

SENTENCES = tuple(f"Sentence number {number} says nothing of note." for number in range(12))
EDITS = (
    Edit(id="a", prompt="The capital of France is", target="Rome", subject="France"),
    Edit(id="b", prompt="Who wrote the play?", target="Oslo", rephrases=("The play is by",)),
)


def take(edits: tuple[Edit, ...], sentences: tuple[str, ...], num: int, seed: int = 0) -> Augmented:
    candidates = with_prefixes(edits, sentences, seed)
    return take_examples(edits, "prefix", candidates, num, scored_texts(edits), "raw")


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
def test_each_edit_gets_as_many_sentences_as_there_are_each_once(num: int, seed: int) -> None:
    found = take(EDITS, SENTENCES, num, seed)
    assert found == take(EDITS, SENTENCES, num, seed)
    assert found.num_asked == 2 * num
    for edit, examples in zip(EDITS, found.examples, strict=True):
        assert len(examples) == min(num, len(SENTENCES))
        assert {one.prompt.removesuffix(f" {edit.prompt}") for one in examples} <= set(SENTENCES)
        assert len({one.prompt for one in examples}) == len(examples)


def test_sentences_differ_between_edits_and_seeds() -> None:
    first, second = ([*islice(of_edit, 4)] for of_edit in with_prefixes(EDITS, SENTENCES, 0))
    assert [one.split(". ")[0] for one in first] != [one.split(". ")[0] for one in second]
    assert [*islice(with_prefixes(EDITS, SENTENCES, 1)[0], 4)] != first


def test_a_sentence_that_names_the_subject_or_the_target_is_not_taken() -> None:
    sentences = (
        "He went to france by train once.",
        "All roads lead to rome they say.",
        "It rained all day.",
    )
    found = take(EDITS[:1], sentences, 3)
    assert [one.prompt for one in found.examples[0]] == ["It rained all day. The capital of France is"]
    assert (found.num, found.num_asked) == (1, 3)


def test_what_is_scored_is_never_trained_on_whichever_edit_it_belongs_to() -> None:
    edits = (
        Edit(
            id="a",
            prompt="The capital is",
            target="Rome",
            rephrases=(f"{SENTENCES[0]}  The capital is",),
        ),
        Edit(
            id="b", prompt="The play is by", target="Oslo", locality=(f"{SENTENCES[1]} The capital is",)
        ),
    )
    found = take(edits, SENTENCES[:3], 3)
    trained = {" ".join(one.prompt.split()) for examples in found.examples for one in examples}
    assert not scored_texts(edits) & trained
    assert found.num_left_out == 2
    assert [len(examples) for examples in found.examples] == [1, 3]


def test_without_sentences_there_are_no_examples() -> None:
    assert take(EDITS, (), 2).num == 0


def test_frames_hold_the_whole_prompt() -> None:
    for edit, frames in zip(EDITS, in_frames(EDITS), strict=True):
        assert len(set(frames)) == 2
        assert all(edit.prompt in one for one in frames)


def test_the_edits_own_prompt_is_no_further_example_but_in_another_format() -> None:
    own = [(edit.prompt,) for edit in EDITS]
    assert take_examples(EDITS, "format", own, 1, frozenset(), "raw").num == 0
    assert take_examples(EDITS, "format", own, 1, frozenset(), "chat").num == 2


def test_kinds_are_joined_edit_by_edit() -> None:
    prefixes = take(EDITS, SENTENCES, 1)
    frames = take_examples(EDITS, "format", in_frames(EDITS), 2, frozenset(), "raw")
    joined = join_examples([prefixes, frames], 2)
    assert joined.examples[1] == (*prefixes.examples[1], *frames.examples[1])
    assert (joined.num, joined.num_asked) == (6, 6)
