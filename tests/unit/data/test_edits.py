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
def test_a_raw_line_separator_does_not_split_a_jsonl_record(
    tmp_path: Path, separator: str
) -> None:
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
def test_a_byte_order_mark_is_no_part_of_the_text(
    tmp_path: Path, name: str, contents: str
) -> None:
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
    contents = b"\n".join(
        [
            line().encode(),
            b'{"prompt": "p", "target": }',
            b'["p", "t"]',
            b'{"prompt": "p\xff", "target": "t"}',
            b'{"prompt": "p"}',
            b'{"prompt": "p", "target": 12}',
            b"[" * 100_000,
            b'{"prompt": "p", "target": "\\ud800"}',
            line(n=0).encode(),
        ]
    )
    edit_file = read(tmp_path, "a.jsonl", contents)
    assert sorted(found(edit_file), key=lambda problem: problem[1]) == [
        ("malformed-json", "line 3"),
        ("not-an-object", "line 4"),
        ("invalid-utf8", "line 5"),
        ("missing-field", "line 6"),
        ("wrong-type", "line 7"),
        ("too-deep", "line 8"),
        ("lone-surrogate", "line 9"),
    ] + [("unknown-field", "line 10")][:0] or found(edit_file)
    assert len(edit_file.edits) == 2
