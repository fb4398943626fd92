import json
from pathlib import Path
from typing import Any

import pytest

from locft.data.convert import convert
from locft.data.edits import EditFile, read_edits
from locft.data.formats import FORMATS, LOCFT, Format, choose_format
from locft.types import Edit

SAMPLES = Path(__file__).parents[4] / "shared" / "data" / "edits"

COUNTERFACT = {
    "case_id": 0,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "ground_truth": "French",
    "rephrase_prompt": "Danielle Darrieux speaks",
    "locality_prompt": "Michel Rocard speaks",
    "locality_ground_truth": "French",
}
WIKIBIGEDIT = {
    "prompt": "What position does Stefan Mair hold?",
    "target_new": "head coach",
    "subject": "Stefan Mair",
    "rephrase_prompt": "What is Stefan Mair's role?",
    "locality_prompt": "What was Stefan Mautner?",
    "locality_ground_truth": "Holocaust victim",
    "tag": "update",
    "personas": "As a pirate, ...",
    "mhop": "Who employs him?",
    "mhop_ans": "a club",
    "update": "2024",
}
MEMIT = {
    "case_id": 7,
    "pararel_idx": 2796,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Darrieux, a native", "Darrieux speaks"],
    "neighborhood_prompts": ["Rocard speaks"],
    "attribute_prompts": ["Orwell speaks"],
    "generation_prompts": ["Darrieux lives in"],
}
ZSRE = {
    "subject": "Charity Creek",
    "src": "Which river system contains Charity Creek?",
    "pred": "Parramatta River",
    "rephrase": "What river system is Charity Creek in?",
    "alt": " Chichester River",
    "answers": ["Parramatta River"],
    "loc": "nq question: how many books are there",
    "loc_ans": "12",
    "cond": "Parramatta River >> Chichester River || Which river?",
}
MEDEDIT = {
    "id": "41",
    "ori_q": "Which one? A: skin B: bone",
    "subj_word": "bone",
    "0shot_ori_a": "A",
    "gta": "B: bone",
    "re": "The answer is 'bone', because ...",
    "sgr": "The reference states ...",
    "shuffle_ori_qa": {"s_q": "Which one? A: bone B: skin", "s_a": "A: bone"},
    "gen_qa": {"q": "A patient ...", "a": "D: bone", "exp": "..."},
    "ret_qa": {"q": "A patient ...", "a": "C: skin", "exp": "..."},
}
QAEDIT = {
    "id": 1104,
    "source": "NQ",
    "prompt": "who has the most 70 point games?",
    "target": " Wilt Chamberlain ",
    "subject": "70 point games",
    "rephrase": "Who scored 70 points most often?",
    "locality": [{"loc": "who protects police", "loc_ans": "Michael"}, {"loc": "who is Toby"}],
}
KNOWEDIT = {
    "subject": "Leo Arons",
    "prompt": "The place of death of Leo Arons is",
    "target_new": "Berlin",
    "portability": {"Reasoning": [{"prompt": "Is he alive?", "ground_truth": [["no"]]}]},
    "locality": {
        "Relation_Specificity": [{"prompt": "His father is", "ground_truth": [["Albert"]]}],
        "Forgetfulness": [{"prompt": ["His field is"], "ground_truth": "physics"}],
    },
}
OURS = {
    "id": "one",
    "prompt": "The capital of France is ",
    "target": " Lyon",
    "subject": "France",
    "rephrases": ["France's capital:", "Capital of France?"],
    "locality": ["The capital of Spain is"],
    "old": " Paris",
}

PUBLISHED: dict[str, tuple[dict[str, Any], Edit]] = {
    "memit": (
        MEMIT,
        Edit(
            id="7",
            prompt="The mother tongue of Danielle Darrieux is",
            target="English",
            subject="Danielle Darrieux",
            rephrases=("Darrieux, a native", "Darrieux speaks"),
            locality=("Rocard speaks",),
            old="French",
        ),
    ),
    "zsre": (
        ZSRE,
        Edit(
            id="",
            prompt="Which river system contains Charity Creek?",
            target="Chichester River",
            subject="Charity Creek",
            rephrases=("What river system is Charity Creek in?",),
            locality=("nq question: how many books are there",),
        ),
    ),
    "mededit": (
        MEDEDIT,
        Edit(id="41", prompt="Which one? A: skin B: bone", target="B: bone", subject="bone"),
    ),
    "qaedit": (
        QAEDIT,
        Edit(
            id="NQ-1104",
            prompt="who has the most 70 point games?",
            target="Wilt Chamberlain",
            subject="70 point games",
            rephrases=("Who scored 70 points most often?",),
            locality=("who protects police", "who is Toby"),
        ),
    ),
    "counterfact": (
        COUNTERFACT,
        Edit(
            id="0",
            prompt="The mother tongue of Danielle Darrieux is",
            target="English",
            subject="Danielle Darrieux",
            rephrases=("Danielle Darrieux speaks",),
            locality=("Michel Rocard speaks",),
            old="French",
        ),
    ),
    "wikibigedit": (
        WIKIBIGEDIT,
        Edit(
            id="",
            prompt="What position does Stefan Mair hold?",
            target="head coach",
            subject="Stefan Mair",
            rephrases=("What is Stefan Mair's role?",),
            locality=("What was Stefan Mautner?",),
        ),
    ),
    "knowedit": (
        KNOWEDIT,
        Edit(
            id="",
            prompt="The place of death of Leo Arons is",
            target="Berlin",
            subject="Leo Arons",
            locality=("His father is", "His field is"),
        ),
    ),
    "locft": (
        OURS,
        Edit(
            id="one",
            prompt="The capital of France is ",
            target=" Lyon",
            subject="France",
            rephrases=("France's capital:", "Capital of France?"),
            locality=("The capital of Spain is",),
            old=" Paris",
        ),
    ),
}


def form_named(name: str) -> Format:
    return next(form for form in FORMATS if form.name == name)


def write_json(folder: Path, records: object) -> Path:
    path = folder / "edits.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def codes(edit_file: EditFile) -> list[str]:
    return [problem.code for problem in edit_file.problems]


def test_every_format_has_an_example() -> None:
    assert list(PUBLISHED) == [form.name for form in FORMATS]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_record_is_recognised_by_its_fields(name: str) -> None:
    assert choose_format([PUBLISHED[name][0]]).name == name


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_record_becomes_an_edit_without_problems(name: str) -> None:
    record, expected = PUBLISHED[name]
    edit, problems = convert(form_named(name), record, "")
    assert problems == []
    assert edit == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_field_of_a_published_record_is_unknown(name: str) -> None:
    assert set(PUBLISHED[name][0]) <= form_named(name).known


@pytest.mark.parametrize(
    ("name", "file", "num"),
    [
        ("counterfact", "counterfact_10k.json", 10_000),
        ("counterfact", "counterfact_1k.json", 1_000),
        ("wikibigedit", "wikibigedit_1k.json", 1_000),
        ("zsre", "zsre_1k.json", 1_000),
    ],
)
def test_a_published_file_is_read_whole(name: str, file: str, num: int) -> None:
    path = SAMPLES / file
    if not path.exists():
        pytest.skip(f"the sample data set {path} is not here")
    edit_file = read_edits(path)
    assert edit_file.format == name
    assert edit_file.problems == ()
    assert len(edit_file.edits) == num
    assert all(edit.subject and edit.rephrases and edit.locality for edit in edit_file.edits)
    assert all(edit.target == edit.target.strip() for edit in edit_file.edits)


def test_one_record_with_a_missing_field_does_not_change_the_format_of_a_file(
    tmp_path: Path,
) -> None:
    partial = {name: value for name, value in COUNTERFACT.items() if name != "ground_truth"}
    path = write_json(tmp_path, [partial | {"case_id": 1}, COUNTERFACT, COUNTERFACT | {"case_id": 2}])
    edit_file = read_edits(path)
    assert edit_file.format == "counterfact"
    assert edit_file.problems == ()
    assert [edit.old for edit in edit_file.edits] == [None, "French", "French"]


def test_a_tie_goes_to_the_more_specific_format() -> None:
    assert choose_format([OURS, ZSRE]).name == "zsre"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (["prompt", "target"], "locft"),
        (["prompt", "target", "rephrase"], "locft"),
        (["prompt", "target", "rephrase", "locality"], "qaedit"),
        (["prompt", "target_new"], "knowedit"),
        (["prompt", "target_new", "subject", "rephrase_prompt"], "knowedit"),
        (["prompt", "target_new", "ground_truth"], "counterfact"),
        (["prompt", "target_new", "ground_truth", "portability"], "knowedit"),
        (["question", "answer"], "locft"),
        ([], "locft"),
    ],
)
def test_the_fields_decide_between_related_formats(fields: list[str], name: str) -> None:
    assert choose_format([fields]).name == name


def test_an_empty_file_has_our_own_format() -> None:
    assert choose_format([]) is LOCFT


@pytest.mark.parametrize("empty", [None, "", "  ", [], [None, ""]])
@pytest.mark.parametrize("field", ["rephrases", "locality"])
def test_null_and_empty_texts_in_a_list_field_mean_absent(field: str, empty: object) -> None:
    edit, problems = convert(LOCFT, OURS | {field: empty}, "")
    assert problems == []
    assert edit is not None
    assert getattr(edit, field) == ()


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_null_and_empty_optional_texts_mean_absent(empty: object) -> None:
    edit, problems = convert(LOCFT, OURS | {"id": empty, "subject": empty, "old": empty}, "")
    assert problems == []
    assert edit is not None
    assert (edit.id, edit.subject, edit.old) == ("", None, None)


def test_a_string_may_stand_for_a_list() -> None:
    edit, _ = convert(LOCFT, OURS | {"rephrases": "one", "locality": "two"}, "")
    assert edit is not None
    assert (edit.rephrases, edit.locality) == (("one",), ("two",))


def test_a_list_of_one_may_stand_for_a_string() -> None:
    edit, _ = convert(form_named("counterfact"), COUNTERFACT | {"target_new": ["English"]}, "")
    assert edit is not None
    assert edit.target == "English"


def test_a_list_of_prompts_may_stand_for_prompts_with_answers() -> None:
    edit, _ = convert(form_named("qaedit"), QAEDIT | {"locality": ["who?", "when?"]}, "")
    assert edit is not None
    assert edit.locality == ("who?", "when?")


def test_the_first_of_several_old_answers_counts() -> None:
    edit, _ = convert(form_named("knowedit"), KNOWEDIT | {"ground_truth": [["a", "b"], "c"]}, "")
    assert edit is not None
    assert edit.old == "a"


@pytest.mark.parametrize(
    ("name", "changes", "code", "named"),
    [
        ("locft", {"target": 12}, "wrong-type", "put it in quotes"),
        ("locft", {"target": 3.5}, "wrong-type", "put it in quotes"),
        ("locft", {"target": True}, "wrong-type", "true"),
        ("locft", {"target": ["a", "b"]}, "wrong-type", "a list"),
        ("locft", {"prompt": {}}, "wrong-type", "an object"),
        ("locft", {"prompt": " "}, "empty-field", "`prompt`"),
        ("locft", {"target": None}, "empty-field", "`target`"),
        ("locft", {"id": 3.5}, "wrong-type", "`id`"),
        ("locft", {"rephrases": ["fine", 3]}, "wrong-type", "`rephrases`"),
        ("locft", {"locality": {"loc": "x"}}, "wrong-type", "`locality`"),
        ("locft", {"target": "\ud800"}, "lone-surrogate", "`target`"),
        ("locft", {"locality": ["\udfff"]}, "lone-surrogate", "`locality`"),
        ("memit", {"requested_rewrite": None}, "empty-field", "`requested_rewrite.prompt`"),
        ("memit", {"requested_rewrite": "x"}, "wrong-type", "a string, not an object"),
        ("knowedit", {"locality": {"a": "x"}}, "wrong-type", "a string, not an object"),
    ],
)
def test_a_value_that_cannot_be_used_is_an_error(
    name: str, changes: dict[str, object], code: str, named: str
) -> None:
    edit, problems = convert(form_named(name), PUBLISHED[name][0] | changes, "line 3")
    assert edit is None
    assert (problems[0].level, problems[0].code, problems[0].where) == ("error", code, "line 3")
    assert named in problems[0].message


def test_a_missing_field_is_named_by_the_path_that_the_format_has_for_it() -> None:
    edit, problems = convert(form_named("zsre"), {"src": "Who?"}, "")
    assert edit is None
    assert [(problem.code, problem.message) for problem in problems] == [
        ("missing-field", "`alt` is missing, expected a string with something in it")
    ]


def test_all_problems_of_a_record_are_collected() -> None:
    _, problems = convert(LOCFT, {"prompt": 1, "target": "", "subject": 2, "locality": [3]}, "")
    assert len(problems) == 4


def test_a_template_needs_its_subject() -> None:
    rewrite = MEMIT["requested_rewrite"]
    assert isinstance(rewrite, dict)
    record = {"requested_rewrite": {**rewrite, "subject": None}}
    edit, problems = convert(form_named("memit"), record, "")
    assert edit is None
    assert [problem.code for problem in problems] == ["missing-field"]


def test_braces_outside_a_template_are_plain_text() -> None:
    edit, _ = convert(LOCFT, OURS | {"prompt": "In Python {} is a"}, "")
    assert edit is not None
    assert edit.prompt == "In Python {} is a"


@pytest.mark.parametrize("control", ["\0", "\r", "\x1b", "\x7f", "\x85"])
def test_a_control_character_is_a_warning(control: str) -> None:
    edit, problems = convert(LOCFT, {"prompt": f"a{control}b", "target": "c"}, "")
    assert edit is not None
    assert [(problem.level, problem.code) for problem in problems] == [("warning", "control-character")]


def test_tabs_and_line_feeds_are_ordinary_text() -> None:
    _, problems = convert(LOCFT, {"prompt": "a\tb\nc", "target": "d\n"}, "")
    assert problems == []


def test_a_record_nested_beyond_the_recursion_limit_is_walked() -> None:
    nested: object = "deep"
    for _ in range(100_000):
        nested = [nested]
    edit, problems = convert(LOCFT, OURS | {"rephrases": nested}, "")
    assert problems == []
    assert edit is not None
    assert edit.rephrases == ("deep",)
