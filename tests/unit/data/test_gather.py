import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import make_tokenizer

from locft.data.edits import write_edits
from locft.data.encode import Codec, make_codec
from locft.data.gather import check_tokens, gather_edits
from locft.errors import EditsError
from locft.types import Edit

ANN = Edit(id="a", prompt="Who wrote it?", target="Ann")
BOB = Edit(id="b", prompt="Who wrote it?", target="Bob")
ROME = Edit(
    id="c", prompt="Where is it?", target="Rome", rephrases=("Its place?",), locality=("Who am I?",)
)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return make_codec(make_tokenizer(), "raw")


def test_edits_from_a_file_and_from_memory_are_the_same_edits(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    write_edits(path, [ANN, ROME])
    from_file = gather_edits(path)
    from_memory = gather_edits([ANN, ROME])
    assert from_file == gather_edits(str(path))
    assert (from_file.path, from_file.format) == (path, "locft")
    assert (from_memory.path, from_memory.format) == (None, "python")
    assert [edit.source for edit in from_file.edits] == ["line 1", "line 2"]
    assert [edit.source for edit in from_memory.edits] == ["edit [0]", "edit [1]"]
    for gathered in (from_file, from_memory):
        assert [replace(edit, source="") for edit in gathered.edits] == [ANN, ROME]
        assert (gathered.num_dropped, gathered.warnings) == (0, ())
    assert from_file.sha256 == from_memory.sha256


def test_a_source_that_an_edit_brings_is_kept() -> None:
    assert gather_edits([replace(ANN, source="line 9")]).edits[0].source == "line 9"


def test_the_hash_is_of_the_edits_that_are_left() -> None:
    both = gather_edits([ANN, BOB, ROME], "keep-first")
    assert both.sha256 == gather_edits([ANN, ROME]).sha256
    assert both.sha256 != gather_edits([BOB, ROME]).sha256


def test_the_packaged_facts_are_sound_and_can_be_scored_on_everything() -> None:
    demo = gather_edits("demo")
    assert len(demo.edits) == 60
    assert demo.warnings == ()
    assert demo.path == Path("demo")
    for edit in demo.edits:
        assert len(set(edit.rephrases)) >= 2, edit.id
        assert len(set(edit.locality)) >= 2, edit.id
        assert edit.prompt not in edit.rephrases
        assert not {edit.prompt, *edit.rephrases} & set(edit.locality), edit.id


def test_the_packaged_facts_suit_a_tokenizer(codec: Codec) -> None:
    assert check_tokens(gather_edits("demo"), codec, 512) == ()


@pytest.mark.parametrize(
    ("policy", "kept"),
    [("keep-first", ["a", "c"]), ("keep-last", ["b", "c"])],
)
def test_a_policy_on_conflicts_drops_what_it_must_and_counts_it(
    policy: Literal["keep-first", "keep-last"], kept: list[str]
) -> None:
    gathered = gather_edits([ANN, BOB, ROME], policy)
    assert [edit.id for edit in gathered.edits] == kept
    assert gathered.num_dropped == 1


def test_conflicts_are_refused_by_default_with_both_places() -> None:
    with pytest.raises(EditsError) as caught:
        gather_edits([ANN, ROME, BOB])
    for part in ("edit [0]", "edit [2]", "'Ann'", "'Bob'", "--on-conflict"):
        assert part in str(caught.value)


def test_duplicates_are_warned_of_and_kept() -> None:
    gathered = gather_edits([ANN, replace(ANN, id="d")])
    assert len(gathered.edits) == 2
    assert [problem.code for problem in gathered.warnings] == ["duplicate"]


def test_all_errors_of_a_file_are_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    records = [
        {"prompt": "Who?", "target": "Ann"},
        {"prompt": "Who?"},
        {"prompt": "Who?", "target": "Bob"},
        {"prompt": "", "target": "x"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    with pytest.raises(EditsError) as caught:
        gather_edits(path)
    message = str(caught.value)
    assert [line for line in (1, 2, 3, 4) if f"{path}: line {line}: error:" in message] == [2, 3, 4]
    assert "3 errors" in message


@pytest.mark.parametrize("policy", ["keep-first", "keep-last"])
def test_a_policy_on_conflicts_forgives_no_other_error(
    tmp_path: Path, policy: Literal["keep-first", "keep-last"]
) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text('{"prompt": "Who?", "target": "Ann"}\n{"prompt": "Who?"}\n', encoding="utf-8")
    with pytest.raises(EditsError, match="line 2: error"):
        gather_edits(path, policy)


def test_a_long_list_of_errors_is_cut_but_counted() -> None:
    rivals = [replace(BOB, id=str(number), target=f"Person {number}") for number in range(30)]
    with pytest.raises(EditsError) as caught:
        gather_edits([ANN, *rivals])
    message = str(caught.value)
    assert message.count("contradicts edit [0]") == 20
    assert "10 more not shown" in message
    assert "30 errors" in message


def test_no_edits_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "edits.jsonl"
    empty.touch()
    sources: tuple[Path | list[Edit], ...] = ([], empty)
    for source in sources:
        with pytest.raises(EditsError, match="no edits"):
            gather_edits(source)


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        (replace(ROME, id="a"), "id"),
        (replace(ROME, prompt=""), "prompt"),
        (replace(ROME, target=""), "target"),
    ],
    ids=["an id twice", "an empty prompt", "an empty target"],
)
def test_edits_from_memory_are_held_to_the_rules_of_a_file(spoilt: Edit, reason: str) -> None:
    with pytest.raises(EditsError, match=rf"edit \[1\].*{reason}"):
        gather_edits([ANN, spoilt])


def test_a_missing_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(EditsError, match=r"nothing\.jsonl"):
        gather_edits(tmp_path / "nothing.jsonl")


def test_an_edit_that_does_not_fit_the_context_is_refused_just_beyond_it(codec: Codec) -> None:
    gathered = gather_edits([ANN, ROME])
    # Scoring decodes 32 tokens after every prompt, rephrases and locality prompts included.
    prompts = [text for one in (ANN, ROME) for text in (one.prompt, *one.rephrases, *one.locality)]
    needed = max(len(codec.prompt_ids(text)) for text in prompts) + 32
    assert check_tokens(gathered, codec, needed) == ()
    assert check_tokens(gathered, codec, None) == ()
    with pytest.raises(EditsError, match=rf"{needed} are needed, and the model takes {needed - 1}"):
        check_tokens(gathered, codec, needed - 1)


def test_all_edits_beyond_the_context_are_listed_at_once(codec: Codec) -> None:
    with pytest.raises(EditsError) as caught:
        check_tokens(gather_edits([ANN, ROME]), codec, 3)
    assert str(caught.value).count("[prompt-too-long]") == 2


def test_warnings_of_reading_and_of_tokens_come_together_and_once(tmp_path: Path, codec: Codec) -> None:
    path = tmp_path / "edits.jsonl"
    records = [
        {"prompt": "Who?", "target": "Ann", "colour": "red"},
        {"prompt": "Who?", "target": "Ann"},
        {"prompt": "What?", "target": "word " * 40},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    gathered = gather_edits(path)
    assert [problem.code for problem in gathered.warnings] == ["unknown-field", "duplicate"]
    found = [problem.code for problem in check_tokens(gathered, codec, None)]
    assert found == ["unknown-field", "duplicate", "target-too-long"]


def test_an_update_may_reuse_the_id_of_what_it_replaces() -> None:
    old, new = Edit(id="1", prompt="It is", target="red"), Edit(id="1", prompt="It is", target="blue")
    with pytest.raises(EditsError, match="duplicate-id"):
        gather_edits([old, new])
    assert [edit.target for edit in gather_edits([old, new], "keep-last").edits] == ["blue"]
    other = Edit(id="1", prompt="She is", target="tall")
    with pytest.raises(EditsError, match="duplicate-id"):
        gather_edits([old, new, other], "keep-last")


def test_a_text_where_a_list_of_texts_belongs_is_one_text() -> None:
    wrong: Any = "Heaven is"
    (edit,) = gather_edits([Edit(id="1", prompt="The sky is", target="red", rephrases=wrong)]).edits
    assert edit.rephrases == ("Heaven is",)
