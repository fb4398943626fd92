import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locft.data.edits import EditFile, edits_sha256, read_edits, write_edits
from locft.data.formats import FORMATS
from locft.data.problems import Problem, format_problems
from locft.errors import EditsError
from locft.types import Edit

SUFFIXES = [".jsonl", ".ndjson", ".json", ".csv", ".txt", ""]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the examples of one property test share."""
    return tmp_path_factory.mktemp("edits")


def read(folder: Path, name: str, contents: str | bytes) -> EditFile:
    path = folder / name
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return read_edits(path)


def found(edit_file: EditFile) -> list[tuple[str, str]]:
    return [(problem.code, problem.where) for problem in edit_file.problems]


def message(edit_file: EditFile) -> str:
    [problem] = edit_file.problems
    return problem.message


def line(**fields: object) -> str:
    return json.dumps({"prompt": "p", "target": "t"} | fields) + "\n"


def test_jsonl_json_and_csv_say_the_same(tmp_path: Path) -> None:
    records = [
        {"prompt": "p, q", "target": " t", "rephrases": ["r", "s"], "locality": ["l"]},
        {"prompt": "u", "target": "v\nw", "rephrases": ["x"]},
    ]
    jsonl = read(tmp_path, "a.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    document = read(tmp_path, "a.json", json.dumps(records))
    table = read(
        tmp_path,
        "a.csv",
        'prompt,target,rephrases,locality\n"p, q", t,"[""r"", ""s""]",l\nu,"v\nw",x,\n',
    )
    assert jsonl.problems == document.problems == table.problems == ()
    assert len({edits_sha256(file.edits) for file in (jsonl, document, table)}) == 1
    assert [edit.source for edit in jsonl.edits] == ["line 1", "line 2"]
    assert [edit.source for edit in document.edits] == ["record [0]", "record [1]"]
    assert [edit.source for edit in table.edits] == ["line 2", "line 3"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_raw_line_separator_does_not_split_a_jsonl_record(tmp_path: Path, separator: str) -> None:
    record = json.dumps({"prompt": f"a{separator}b", "target": "t"}, ensure_ascii=False)
    edit_file = read(tmp_path, "a.jsonl", f"{record}\n{line()}")
    assert [edit.prompt for edit in edit_file.edits] == [f"a{separator}b", "p"]
    assert edit_file.edits[1].source == "line 2"


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.jsonl", f"\n{line()}  \r\n\n{line()}")
    assert edit_file.problems == ()
    assert [edit.source for edit in edit_file.edits] == ["line 2", "line 5"]


@pytest.mark.parametrize(
    ("name", "contents"),
    [("a.jsonl", line()), ("a.json", line()), ("a.csv", "prompt,target\r\np,t\r\n")],
)
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name: str, contents: str) -> None:
    edit_file = read(tmp_path, name, b"\xef\xbb\xbf" + contents.encode())
    assert edit_file.problems == ()
    assert [edit.prompt for edit in edit_file.edits] == ["p"]


def test_one_object_is_one_edit(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.json", '{\n "prompt": "p",\n "target": "t"\n}')
    assert edit_file.problems == ()
    assert [edit.source for edit in edit_file.edits] == ["record [0]"]


@pytest.mark.parametrize("name", ["edits", "data"])
def test_a_list_within_an_object_is_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    edit_file = read(tmp_path, "a.json", json.dumps({name: [{"prompt": "p", "target": "t"}]}))
    assert found(edit_file) == [("wrapped-list", "")]
    assert f"jq '.{name}'" in message(edit_file)
    assert edit_file.edits == ()


@pytest.mark.parametrize(
    ("name", "contents", "source"),
    [
        ("edits.txt", "\n " + line(), "line 2"),
        ("edits", f"[{line()}]", "record [0]"),
        ("EDITS.JSONL", line(), "line 1"),
        ("edits.ndjson", line(), "line 1"),
    ],
)
def test_name_or_contents_tell_the_kind_of_file(
    tmp_path: Path, name: str, contents: str, source: str
) -> None:
    edit_file = read(tmp_path, name, contents)
    assert [edit.source for edit in edit_file.edits] == [source]


def test_a_file_of_unknown_kind_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(EditsError, match=r"expected a name that ends in \.jsonl"):
        read(tmp_path, "edits.txt", "prompt: p")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EditsError, match=r"no\.jsonl: No such file"):
        read_edits(tmp_path / "no.jsonl")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EditsError, match="directory"):
        read_edits(tmp_path)


def test_an_impossible_path_is_refused() -> None:
    with pytest.raises(EditsError, match="null"):
        read_edits(Path("a\0b.jsonl"))


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("a.jsonl", ""),
        ("a.jsonl", "\n \n"),
        ("a.json", ""),
        ("a.json", "[]"),
        ("a.csv", ""),
        ("a.csv", "prompt,target\n,\n"),
        ("a.txt", ""),
    ],
)
def test_a_file_without_edits_is_an_error(tmp_path: Path, name: str, contents: str) -> None:
    edit_file = read(tmp_path, name, contents)
    assert found(edit_file) == [("no-records", "")]


def test_every_problem_of_a_file_is_collected(tmp_path: Path) -> None:
    lines = [
        b'{"prompt": "p", "target": "t"}',
        b'{"prompt": "p", "target": }',
        b'["p", "t"]',
        b'{"prompt": "p\xff", "target": "t"}',
        b'{"prompt": "p"}',
        b'{"prompt": "p", "target": 12}',
        b"[" * 100_000,
        b'{"prompt": "p", "target": "\\ud800"}',
        b'{"prompt": "p", "target": "t", "targets": "t"}',
    ]
    edit_file = read(tmp_path, "a.jsonl", b"\n".join(lines))
    assert sorted(found(edit_file), key=lambda item: item[1]) == [
        ("malformed-json", "line 2"),
        ("not-an-object", "line 3"),
        ("invalid-utf8", "line 4"),
        ("missing-field", "line 5"),
        ("wrong-type", "line 6"),
        ("too-deep", "line 7"),
        ("lone-surrogate", "line 8"),
        ("unknown-field", "line 9"),
    ]
    assert [edit.source for edit in edit_file.edits] == ["line 1", "line 9"]


def test_malformed_json_is_reported_with_its_column(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.jsonl", line() + '{"prompt": oops}\n')
    assert found(edit_file) == [("malformed-json", "line 2")]
    assert "column 12" in message(edit_file)


def test_malformed_json_in_a_document_is_reported_with_its_line(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.json", '[\n {"prompt": "p",\n]')
    assert found(edit_file)[0][0] == "malformed-json"
    assert edit_file.problems[0].where in {"line 2", "line 3"}


def test_jsonl_under_the_name_of_json_is_told_apart(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.json", line() + line())
    assert found(edit_file) == [("malformed-json", "line 2")]
    assert "name the file .jsonl" in message(edit_file)


def test_a_json_list_under_the_name_of_jsonl_is_told_apart(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.jsonl", "[]\n")
    assert found(edit_file) == [("not-an-object", "line 1")]
    assert "named .json" in message(edit_file)


@pytest.mark.parametrize("item", ["null", "true", "3", '"p"', "[]"])
def test_a_record_that_is_no_object_is_an_error(tmp_path: Path, item: str) -> None:
    edit_file = read(tmp_path, "a.json", f"[{line()}, {item}]")
    assert found(edit_file) == [("not-an-object", "record [1]")]
    assert len(edit_file.edits) == 1


def test_a_document_nested_too_deeply_is_a_problem(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.json", "[" * 100_000)
    assert found(edit_file) == [("too-deep", "line 1")]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        ("9" * 5000, "number-too-large"),
        ("1e999", "number-too-large"),
        ("NaN", "malformed-json"),
        ("-Infinity", "malformed-json"),
        ("-0.0", "wrong-type"),
    ],
)
def test_an_odd_number_is_an_error(tmp_path: Path, number: str, code: str) -> None:
    edit_file = read(tmp_path, "a.jsonl", f'{{"prompt": "p", "target": {number}}}')
    assert found(edit_file) == [(code, "line 1")]


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_each_line_that_is_not_utf8_is_reported(tmp_path: Path, name: str) -> None:
    edit_file = read(tmp_path, name, b"prompt,target\nD\xfcren,t\np,t\nK\xf6ln,t\n")
    assert found(edit_file) == [("invalid-utf8", "line 2"), ("invalid-utf8", "line 4")]
    assert "byte 0xfc at byte 2" in edit_file.problems[0].message


def test_an_unknown_field_is_reported_once_with_the_nearest_known_one(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.jsonl", line() + line(rephrase="r") * 3)
    assert found(edit_file) == [("unknown-field", "line 2")]
    assert message(edit_file) == (
        "unknown field 'rephrase' is ignored, here and in 2 more; did you mean `rephrases`?"
    )


def test_an_unknown_field_like_no_other_gets_no_suggestion(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.jsonl", line(**{"zzz": 1, "q" * 10_000: 2}))
    assert found(edit_file) == [("unknown-field", "line 1")] * 2
    assert not any("did you mean" in problem.message for problem in edit_file.problems)


def test_a_message_can_always_be_printed(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.jsonl", '{"prompt":"p","target":"t","\\ud800\\u001b[2J":1}')
    assert message(edit_file).encode().isascii()
    assert "\x1b" not in message(edit_file)


def test_a_csv_record_stands_on_the_line_where_it_starts(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.csv", 'prompt,target\n\n"p\nq",t\n,,\nu,v\n')
    assert [edit.source for edit in edit_file.edits] == ["line 3", "line 6"]
    assert edit_file.problems == ()


def test_a_csv_row_with_another_number_of_cells_is_an_error(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.csv", "prompt,target\np\np,t\np,t,u\n")
    assert found(edit_file) == [("cell-count", "line 2"), ("cell-count", "line 4")]
    assert len(edit_file.edits) == 1


def test_a_csv_header_without_a_needed_column_is_one_error(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.csv", "prompt,targt\np,t\np,t\n")
    assert found(edit_file) == [("missing-column", "line 1"), ("unknown-field", "line 2")]
    assert "did you mean `target`?" in edit_file.problems[1].message


def test_a_csv_column_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.csv", "prompt,target,target\np,t,u\n")
    assert found(edit_file) == [("duplicate-column", "line 1")]


def test_a_csv_header_that_is_no_text_is_one_error(tmp_path: Path) -> None:
    columns = ",".join(f"column {i}" for i in range(20))
    edit_file = read(tmp_path, "a.csv", f"prompt,target,{columns}\0\np,t\nq,t\n")
    assert found(edit_file) == [("malformed-csv", "line 1")]


def test_an_open_quote_in_csv_is_an_error_where_its_record_starts(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.csv", 'prompt,target\np,t\n"p,t\nq,u\n')
    assert found(edit_file) == [("malformed-csv", "line 3")]


def test_a_csv_cell_that_is_no_json_list_is_an_error(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.csv", "prompt,target,locality\n[p,[t,[l\n")
    assert found(edit_file) == [("malformed-json", "line 2")]
    assert "`locality`" in message(edit_file)
    assert edit_file.edits == ()


def test_a_published_set_may_come_as_csv(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.csv", "case_id,prompt,target_new,ground_truth\n3,p, t,o\n")
    assert edit_file.format == "counterfact"
    assert edit_file.edits == (Edit(id="3", prompt="p", target="t", old="o", source="line 2"),)


def test_an_id_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.jsonl", line(id="1") + line(id=2) + line(id=1))
    assert found(edit_file) == [("duplicate-id", "line 3")]
    assert "line 1" in message(edit_file)


def test_an_id_made_by_us_never_clashes_with_one_of_the_file(tmp_path: Path) -> None:
    edit_file = read(tmp_path, "a.jsonl", line() + line(id=0) + line(id="#0") + line())
    assert edit_file.problems == ()
    assert [edit.id for edit in edit_file.edits] == ["##0", "0", "#0", "3"]


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    assert read(tmp_path, "a.jsonl", line()).sha256 == hashlib.sha256(line().encode()).hexdigest()


def test_the_hash_of_edits_depends_on_all_but_their_source() -> None:
    edit = Edit(id="1", prompt="p", target="t", rephrases=("r",), source="line 1")
    same = edits_sha256([replace(edit, source="record [0]")])
    others = [
        replace(edit, id="2"),
        replace(edit, prompt="q"),
        replace(edit, target="u"),
        replace(edit, subject="s"),
        replace(edit, rephrases=("r", "r")),
        replace(edit, rephrases=(), locality=("r",)),
        replace(edit, old="o"),
    ]
    assert edits_sha256([edit]) == same
    assert len({edits_sha256([other]) for other in others} | {same}) == len(others) + 1


def test_edits_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EditsError, match="cannot write"):
        write_edits(tmp_path / "no" / "a.jsonl", [])
    with pytest.raises(EditsError, match="cannot write"):
        write_edits(tmp_path / "a.jsonl", [Edit(id="1", prompt="\ud800", target="t")])


texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: text.strip() != "")
edits = st.builds(
    Edit,
    id=texts,
    prompt=texts,
    target=texts,
    subject=st.none() | texts,
    rephrases=st.lists(texts, max_size=3).map(tuple),
    locality=st.lists(texts, max_size=3).map(tuple),
    old=st.none() | texts,
)


@given(st.lists(edits, min_size=1, max_size=5, unique_by=lambda edit: edit.id))
def test_edits_that_were_written_are_read_back(scratch: Path, written: list[Edit]) -> None:
    path = scratch / "written.jsonl"
    write_edits(path, written)
    edit_file = read_edits(path)
    assert edit_file.format == "locft"
    assert [replace(edit, source="") for edit in edit_file.edits] == written
    assert not any(problem.level == "error" for problem in edit_file.problems)
    assert edits_sha256(edit_file.edits) == edits_sha256(written)


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(data=st.binary() | st.text('[]{}",:\\\n\r ptu\u2028').map(str.encode))
def test_reading_any_bytes_raises_nothing_but_edits_errors(
    scratch: Path, suffix: str, data: bytes
) -> None:
    path = scratch / f"any{suffix}"
    path.write_bytes(data)
    try:
        edit_file = read_edits(path)
    except EditsError:
        return
    assert edit_file.edits or edit_file.problems
    format_problems(edit_file.problems, path).encode()


field_names = st.sampled_from(sorted({name for form in FORMATS for name in form.known} | {"x"}))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["prompt", "target_new", "str", "subject", "loc", "x"]), inner)
    ),
    max_leaves=5,
)
form_fields = st.sampled_from(FORMATS).flatmap(
    lambda form: st.fixed_dictionaries(
        dict.fromkeys(form.required | form.marks, json_values),
        optional=dict.fromkeys(form.known - form.required - form.marks, json_values),
    )
)


@given(st.lists(form_fields | st.dictionaries(field_names, json_values), max_size=4))
def test_reading_any_records_raises_nothing(scratch: Path, records: list[object]) -> None:
    path = scratch / "records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    edit_file = read_edits(path)
    num_errors = sum(problem.level == "error" for problem in edit_file.problems)
    assert len(edit_file.edits) + num_errors >= len(records)
    for edit in edit_file.edits:
        assert edit.id
        assert edit.prompt.strip()
        assert edit.target.strip()


def test_problems_are_shown_in_the_order_of_the_file_and_counted() -> None:
    problems = [
        Problem("warning", "b", "line 10", "second"),
        Problem("error", "a", "line 9", "first"),
        Problem("error", "c", "", "all"),
    ]
    assert format_problems(problems, Path("f.jsonl")).splitlines() == [
        "f.jsonl: error: all [c]",
        "f.jsonl: line 9: error: first [a]",
        "f.jsonl: line 10: warning: second [b]",
        "f.jsonl: 2 errors, 1 warning",
    ]


def test_a_limit_hides_warnings_before_errors() -> None:
    problems = [
        Problem("warning", "w", "record [0]", "m"),
        Problem("error", "e", "record [1]", "m"),
    ]
    assert format_problems(problems, Path("f.json"), limit=1).splitlines() == [
        "f.json: record [1]: error: m [e]",
        "f.json: 1 more not shown",
        "f.json: 1 error, 1 warning",
    ]
