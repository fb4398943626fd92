"""Every way in which an edits file can be wrong ends in short lines that name it, and status 2."""

import codecs
import gzip
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from locft.cli.main import main
from locft.data.edits import read_edits
from locft.data.gather import gather_edits
from locft.data.lint import lint
from locft.data.problems import format_problems
from locft.errors import EditsError

ANSI = "\x1b]0;owned\x07\x1b[2J\x9b31m"
LONG = 10_000_000
MEMIT = {"prompt": "{} is in", "target_new": {"str": "Rome"}, "subject": "Paris"}


class Case(NamedTuple):
    """A malformed file: what it holds, how its name ends, and what is said of it."""

    id: str
    data: bytes
    suffix: str
    said: tuple[str, ...]


def line(**fields: object) -> str:
    record = {"prompt": "The sky is", "target": "green"} | fields
    return json.dumps(record, ensure_ascii=False) + "\n"


def bare(**fields: object) -> str:
    return json.dumps(fields) + "\n"


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, line())
    return buffer.getvalue()


GOOD = line()
ROWS = "prompt,target\nThe sky is,green\n"


def encodings() -> Iterator[Case]:
    expected: tuple[str, ...]
    for suffix, text in ((".jsonl", GOOD), (".json", f"[{GOOD}]"), (".csv", ROWS)):
        for codec, mark, said in (
            ("utf-16-le", codecs.BOM_UTF16_LE, "is text in UTF-16; save it as UTF-8"),
            ("utf-16-be", codecs.BOM_UTF16_BE, "is text in UTF-16; save it as UTF-8"),
            ("utf-32-le", codecs.BOM_UTF32_LE, "is text in UTF-32; save it as UTF-8"),
            ("utf-32-be", codecs.BOM_UTF32_BE, "is text in UTF-32; save it as UTF-8"),
        ):
            yield Case(f"{codec}{suffix}", mark + text.encode(codec), suffix, (said,))
            said = "holds NUL bytes, as UTF-16 and binary files do; save it as text in UTF-8"
            yield Case(f"{codec}-no-mark{suffix}", text.encode(codec), suffix, (said,))
    bad_bytes = (
        ("latin-1", "Zürich".encode("latin-1"), "byte 0xfc"),
        ("windows-quotes", b"\x93sky\x94", "byte 0x93"),
        ("overlong", b"\xc0\x80", "byte 0xc0"),
        ("overlong-slash", b"\xe0\x80\xaf", "byte 0xe0"),
        ("cesu-surrogates", b"\xed\xa0\xbd\xed\xb8\x80", "byte 0xed"),
        ("beyond-unicode", b"\xf5\x80\x80\x80", "byte 0xf5"),
        ("shift-jis", "空は".encode("shift-jis"), "byte 0x8b"),
        ("cut-character", "ü".encode()[:1], "byte 0xc3"),
    )
    for name, raw, said in bad_bytes:
        expected = ("line 2", "not UTF-8", said, "save the file as UTF-8", "invalid-utf8")
        before = GOOD.encode()
        yield Case(f"{name}.jsonl", before + b'{"prompt": "' + raw + b'"}', ".jsonl", expected)
        yield Case(f"{name}.json", b'[{"prompt":\n"' + raw + b'"}]', ".json", expected)
        yield Case(f"{name}.csv", b"prompt,target\n" + raw + b",b\n", ".csv", expected)
    yield Case("cut-at-the-end", line(target="ü").encode()[:-4], ".jsonl", ("line 1", "byte 0xc3"))
    joined = GOOD.encode() + codecs.BOM_UTF8 + line(prompt="x").encode()
    expected = ("line 2", "a byte order mark in the middle", "remove it")
    yield Case("mark-between-lines", joined, ".jsonl", expected)
    yield Case("two-marks", codecs.BOM_UTF8 * 2 + GOOD.encode(), ".jsonl", ("line 1", *expected[1:]))
    rows = ROWS.encode() + codecs.BOM_UTF8 + b"prompt,target\n"
    yield Case("mark-between-rows", rows, ".csv", ("line 3", *expected[1:]))
    two = codecs.BOM_UTF8 * 2 + ROWS.encode()
    yield Case("two-marks-in-csv", two, ".csv", ("line 1", *expected[1:]))
    inside = b"[" + codecs.BOM_UTF8 + GOOD.encode() + b"]"
    yield Case("mark-in-json", inside, ".json", ("line 1", "malformed JSON at column 2"))


def json_grammar() -> Iterator[Case]:
    on_line_2 = {
        "trailing-comma": '{"prompt": "a", "target": "b",}',
        "single-quotes": "{'prompt': 'a', 'target': 'b'}",
        "python-repr": repr({"prompt": "a", "target": None, "locality": ("b",)}),
        "missing-brace": '{"prompt": "a", "target": "b"',
        "missing-quote": '{"prompt": "a, "target": "b"}',
        "open-string": '{"prompt": "a", "target": "b',
        "missing-colon": '{"prompt" "a"}',
        "missing-comma": '{"prompt": "a" "target": "b"}',
        "missing-value": '{"prompt": "a", "target": }',
        "bare-key": '{prompt: "a", target: "b"}',
        "comma-behind": '{"prompt": "a", "target": "b"},',
        "two-objects": '{"prompt": "a", "target": "b"} {"prompt": "c", "target": "d"}',
        "comment-slashes": '// {"prompt": "a", "target": "b"}',
        "comment-hash": "# a comment",
        "comment-within": '{"prompt": "a", /* b */ "target": "b"}',
        "half-a-word": '{"prompt": "a", "target": nul}',
        "python-words": '{"prompt": "a", "target": None}',
        "bad-escape": r'{"prompt": "a\x41", "target": "b"}',
        "short-escape": r'{"prompt": "\u12", "target": "b"}',
        "raw-tab": '{"prompt": "a\tb", "target": "b"}',
        "raw-escape-sequence": '{"prompt": "' + ANSI + '", "target": "b"}',
        "raw-nul": '{"prompt": "' + "a" * 64 + '\0", "target": "b"}',
        "escape-sequence-outside": ANSI + GOOD,
        "leading-zero": '{"prompt": "a", "target": "b", "id": 01}',
        "plus-sign": '{"prompt": "a", "target": "b", "id": +1}',
        "yaml": "prompt: The sky is",
        "html": "<!DOCTYPE html><html><body>404</body></html>",
        "csv-row": "The sky is,green",
        "bracket": "]",
        "oldest-pickle": pickle.dumps([1], 0).decode().splitlines()[0],
    }
    expected = ("line 2: error: malformed JSON at column ", "expected one object on the line, {")
    for name, text in on_line_2.items():
        yield Case(name, f"{GOOD}{text}\n".encode(), ".jsonl", (*expected, "malformed-json"))
    said: tuple[str, ...]
    objects = "expected an object with the fields of one edit"
    for name, text in {
        "null": "null",
        "boolean": "true",
        "number": "3",
        "string": '"The sky is"',
        "list": '["The sky is", "green"]',
    }.items():
        said = ("line 2", objects, "not-an-object")
        yield Case(f"line-of-{name}", f"{GOOD}{text}\n".encode(), ".jsonl", said)
        data = f"[{GOOD}, {text}]".encode()
        yield Case(f"record-of-{name}", data, ".json", ("record [1]", *said[1:]))
    one = f"[{GOOD.strip()}]".encode()
    yield Case("array-in-jsonl", one, ".jsonl", ("line 1", objects, "JSON list is named .json"))
    several = json.dumps([{"prompt": "a", "target": "b"}] * 2, indent=2).encode()
    said = ("line 1", "malformed JSON", "JSON list is named .json")
    yield Case("pretty-array-in-jsonl", several, ".jsonl", said)
    pretty = json.dumps({"prompt": "a", "target": "b"}, indent=2).encode()
    yield Case("pretty-object-in-jsonl", pretty, ".jsonl", ("line 1", "expected one object on the line"))
    yield Case("jsonl-in-json", (GOOD * 2).encode(), ".json", ("line 2", "name the file .jsonl"))
    said = ("line 3", "malformed JSON at column ", "expected one JSON list, [{")
    yield Case("trailing-comma-in-json", f"[\n{GOOD},]".encode(), ".json", said)
    yield Case("open-json", f"[\n{GOOD}".encode(), ".json", said)
    yield Case("comment-in-json", f"[\n{GOOD}// x\n]".encode(), ".json", said)
    yield Case("two-lists", f"[\n{GOOD}]\n[]".encode(), ".json", ("line 4", "malformed JSON"))
    wrapped = bare(edits=[{"prompt": "a", "target": "b"}]).encode()
    yield Case("wrapped-list", wrapped, ".json", ("expected the list itself", "jq '.edits'"))
    keyed = bare(one={"prompt": "a", "target": "b"}, two={"prompt": "c", "target": "d"}).encode()
    yield Case("object-of-records", keyed, ".json", ("record [0]", "`prompt` is missing"))


def json_beyond_the_grammar() -> Iterator[Case]:
    said: tuple[str, ...]
    twice = '{"prompt": "a", "target": "b", "prompt": "c"}'
    said = ("the same key twice: 'prompt'", "keep one", "duplicate-key")
    yield Case("key-twice", f"{GOOD}{twice}".encode(), ".jsonl", ("line 2", *said))
    yield Case("key-twice-in-json", f"[{GOOD}, {twice}]".encode(), ".json", ("record [1]", *said))
    yield Case("key-twice-in-one", twice.encode(), ".json", ("record [0]", *said))
    behind = '{"prompt": "a", "rephrases": ["x"], "prompt": "c"}'
    yield Case("key-twice-behind-list", behind.encode(), ".json", ("record [0]", *said))
    hidden = r'{"target": "b", "prompt": "a", "pr\u006fmpt": "c"}'
    yield Case("key-twice-escaped", hidden.encode(), ".jsonl", ("line 1", *said))
    deeper = '{"requested_rewrite": {"prompt": "a", "prompt": "b"}}'
    yield Case("key-twice-within", deeper.encode(), ".jsonl", ("line 1", *said))
    unknown = '{"prompt": "a", "target": "b", "x": [{"k": 1, "k": 2}]}'
    yield Case("key-twice-unknown", unknown.encode(), ".jsonl", ("the same key twice: 'k'",))
    ansi = f"{{{json.dumps(ANSI)}: 1, {json.dumps(ANSI)}: 2}}"
    yield Case("key-twice-ansi", ansi.encode(), ".jsonl", (r"twice: '\x1b]0;owned\x07",))
    for word in ("NaN", "Infinity", "-Infinity"):
        said = (f"JSON has no {word}", "malformed-json")
        text = f'{{"prompt": "a", "target": "b", "score": {word}}}'
        yield Case(word, f"{GOOD}{text}".encode(), ".jsonl", ("line 2", *said))
        yield Case(f"{word}-in-json", f"[{GOOD}, {text}]".encode(), ".json", ("record [1]", *said))
    for name, number in (("digits", "9" * 5000), ("exponent", "1e999"), ("million", "1" * 10**6)):
        text = f'{{"prompt": "a", "target": "b", "id": {number}}}'
        said = ("a number that is too large", "put it in quotes", "number-too-large")
        yield Case(f"huge-number-{name}", f"{GOOD}{text}".encode(), ".jsonl", ("line 2", *said))
        yield Case(f"huge-number-{name}-in-json", f"[{text}]".encode(), ".json", ("record [0]", *said))
    said = ("line 1", "nested too deeply: over 100 levels", "too-deep")
    for name, text in (
        ("lists", "[" * 101 + "]" * 101),
        ("open-lists", "[" * 10**6),
        ("objects", '{"a":' * 10**5),
    ):
        data = f'{{"prompt": "a", "target": "b", "x": {text}}}'.encode()
        yield Case(f"deep-{name}", data, ".jsonl", said)
        yield Case(f"deep-{name}-in-json", data, ".json", said)
    cell = '"' + "[" * 200 + '"'
    deep = f"prompt,target,rephrases\na,b,{cell}\n".encode()
    yield Case("deep-cell", deep, ".csv", ("line 2", "`rephrases`", "nested too deeply"))


def fields() -> Iterator[Case]:
    numbers = "put it in quotes"
    for name, changes, said in (
        ("target-number", {"target": 12}, ("`target` is a number, expected a string", numbers)),
        ("target-float", {"target": 3.5}, ("`target` is a number, expected a string", numbers)),
        ("target-boolean", {"target": True}, ("`target` is true, expected a string",)),
        ("target-object", {"target": {"str": "b"}}, ("`target` is an object, expected a string",)),
        ("target-list", {"target": ["a", "b"]}, ("`target` is a list, expected a string",)),
        ("target-nested-list", {"target": [["a"]]}, ("`target` is a list, expected a string",)),
        ("target-list-of-number", {"target": [3]}, ("`target` is a number", numbers)),
        ("target-null", {"target": None}, ("`target` is empty, expected a string",)),
        ("target-empty", {"target": ""}, ("`target` is empty, expected a string",)),
        ("target-blank", {"target": " \t\n\u2003"}, ("`target` is empty, expected a string",)),
        ("target-no-list", {"target": []}, ("`target` is a list, expected a string",)),
        ("prompt-number", {"prompt": 0}, ("`prompt` is a number, expected a string", numbers)),
        ("prompt-boolean", {"prompt": False}, ("`prompt` is false, expected a string",)),
        ("prompt-object", {"prompt": {}}, ("`prompt` is an object, expected a string",)),
        ("prompt-list", {"prompt": ["a", 1]}, ("`prompt` is a list, expected a string",)),
        ("prompt-null", {"prompt": None}, ("`prompt` is empty, expected a string",)),
        ("prompt-blank", {"prompt": "  "}, ("`prompt` is empty, expected a string",)),
        ("subject-number", {"subject": 1}, ("`subject` is a number, expected a string",)),
        ("subject-list", {"subject": ["a", "b"]}, ("`subject` is a list, expected a string",)),
        ("subject-object", {"subject": {"a": 1}}, ("`subject` is an object, expected a string",)),
        ("id-float", {"id": 3.5}, ("`id` is a number, expected a string", numbers)),
        ("id-boolean", {"id": True}, ("`id` is true, expected a string",)),
        ("id-object", {"id": {}}, ("`id` is an object, expected a string",)),
        ("id-list", {"id": [1]}, ("`id` is a list, expected a string",)),
        ("old-number", {"old": 7}, ("`old` holds a number, expected strings only",)),
        ("old-object", {"old": {"str": "a"}}, ("`old` holds an object, expected strings only",)),
        ("rephrases-number", {"rephrases": 3}, ("`rephrases` holds a number", numbers)),
        ("rephrases-boolean", {"rephrases": True}, ("`rephrases` holds true, expected strings only",)),
        ("rephrases-object", {"rephrases": {"a": "b"}}, ("`rephrases` holds an object, expected",)),
        ("rephrases-of-number", {"rephrases": ["a", 3]}, ("`rephrases` holds a number", numbers)),
        ("rephrases-of-object", {"rephrases": [{"a": 1}]}, ("`rephrases` holds an object",)),
        ("rephrases-nested", {"rephrases": [[["a"], [3]]]}, ("`rephrases` holds a number",)),
        ("locality-number", {"locality": -1}, ("`locality` holds a number", numbers)),
        ("locality-of-boolean", {"locality": ["a", False]}, ("`locality` holds false",)),
        ("locality-object", {"locality": {"loc": "a"}}, ("`locality` holds an object",)),
    ):
        data = (GOOD + line(**{"prompt": "a", **changes})).encode()
        yield Case(name, data, ".jsonl", ("line 2: error: ", *said))
    for field in ("prompt", "target", "subject", "id", "old"):
        data = (GOOD + bare(**{"prompt": "a", "target": "b", field: "x\ud800"})).encode()
        said = (f"`{field}` holds a lone surrogate", "lone-surrogate")
        yield Case(f"half-character-{field}", data, ".jsonl", ("line 2", *said))
    for field in ("rephrases", "locality"):
        data = bare(**{"prompt": "a", "target": "b", field: ["fine", "\udfff"]}).encode()
        yield Case(f"half-character-{field}", data, ".jsonl", ("line 1", f"`{field}` holds a lone"))
    missing = "is missing, expected a string with something in it"
    yield Case("no-target", bare(prompt="a").encode(), ".jsonl", ("line 1", f"`target` {missing}"))
    yield Case("no-prompt", bare(target="a").encode(), ".jsonl", ("line 1", f"`prompt` {missing}"))
    yield Case("nothing-known", bare(question="a").encode(), ".jsonl", (f"`prompt` {missing}",))
    yield Case("empty-object", (GOOD + "{}").encode(), ".jsonl", ("line 2", f"`target` {missing}"))
    capital = bare(Prompt="a", Target="b").encode()
    yield Case("capital-fields", capital, ".jsonl", ("line 1", f"`prompt` {missing}"))
    other = bare(prompt="a", target_new="b", ground_truth="c")
    mixed = (GOOD * 1 + other).encode()
    yield Case(
        "mixed-formats", (line(prompt="x") + mixed.decode()).encode(), ".jsonl", ("line 3", missing)
    )
    memit = bare(requested_rewrite={**MEMIT, "subject": None}).encode()
    yield Case("no-subject", memit, ".jsonl", ("line 1", "`requested_rewrite.subject` is missing"))
    memit = bare(requested_rewrite="x").encode() + bare(requested_rewrite=MEMIT).encode()
    yield Case("text-for-object", memit, ".jsonl", ("line 1", "a string, not an object"))
    ids = (line(id="1") + line(id=1, prompt="a")).encode()
    yield Case("id-twice", ids, ".jsonl", ("line 2", "the id '1' is that of line 1 already"))
    rivals = (GOOD + line(target="blue")).encode()
    yield Case("contradiction", rivals, ".jsonl", ("line 2", "contradicts line 1", "remove one"))


def tables() -> Iterator[Case]:
    said: tuple[str, ...]
    names = "comma-separated names such as prompt,target"
    lacks = ("line 1", "the header lacks `prompt` and `target`", names, "missing-column")
    yield Case("semicolons", ROWS.replace(",", ";").encode(), ".csv", lacks)
    yield Case("tabs", ROWS.replace(",", "\t").encode(), ".csv", lacks)
    yield Case("bars", ROWS.replace(",", "|").encode(), ".csv", lacks)
    yield Case("no-header", b"The sky is,green\n", ".csv", lacks)
    yield Case("header-of-ansi", f"{ANSI},x\na,b\n".encode(), ".csv", (r"it has '\x1b]0;", *lacks))
    yield Case("jsonl-in-csv", GOOD.encode(), ".csv", ("line 1",))
    yield Case("column-missing", b"prompt,answer\na,b\n", ".csv", ("the header lacks `target`",))
    twice = b"prompt,target,target\na,b,c\n"
    yield Case("column-twice", twice, ".csv", ("line 1", "the column 'target' is there twice"))
    twice = f"prompt,target,{ANSI},{ANSI}\na,b,c,d\n".encode()
    yield Case("column-of-ansi-twice", twice, ".csv", (r"the column '\x1b]0;owned\x07",))
    cells = "cells where the header has 2; a cell that holds a comma needs quotes"
    yield Case("too-few-cells", ROWS.encode() + b"a\n", ".csv", ("line 3", f"1 {cells}"))
    yield Case("too-many-cells", ROWS.encode() + b"a,b,c\n", ".csv", ("line 3", f"3 {cells}"))
    malformed = ("malformed CSV: ", "expected each quote that opens a cell to be closed")
    yield Case("open-quote", ROWS.encode() + b'"a,b\nc,d\n', ".csv", ("line 3", *malformed))
    yield Case("text-behind-quote", ROWS.encode() + b'"a"b,c\n', ".csv", ("line 3", *malformed))
    large = ROWS.encode() + b"a," + b"b" * 200_000 + b"\n"
    said = ("line 3", "field larger than field limit", "at most 131,072 characters")
    yield Case("oversized-cell", large, ".csv", said)
    nul = ("a cell holds a NUL byte", "save the file as text in UTF-8")
    padded = "prompt,target\n" + "The sky is,green\n" * 4
    yield Case("nul-in-cell", f"{padded}a\0,b\n".encode(), ".csv", ("line 6", *nul))
    wide = "prompt,target," + "x" * 64 + "\0\na,b,c\n"
    yield Case("nul-in-header", wide.encode(), ".csv", ("line 1", *nul))
    empty = "is empty, expected a string with something in it"
    yield Case("empty-cell", ROWS.encode() + b"a,\n", ".csv", ("line 3", f"`target` {empty}"))
    listed = "prompt,target,locality\na,b,{}\n"
    said = ("line 2", "`locality` starts with [ but is no JSON list", "malformed-json")
    yield Case("open-list-cell", listed.format("[x").encode(), ".csv", said)
    said = ("line 2", "`locality` holds a number")
    yield Case("number-list-cell", listed.format("[3]").encode(), ".csv", said)
    quoted = '"[{""a"": 1, ""a"": 2}]"'
    said = ("line 2", "`locality`", "the same key twice")
    yield Case("key-twice-in-cell", listed.format(quoted).encode(), ".csv", said)


def other_files() -> Iterator[Case]:
    for suffix in (".jsonl", ".json", ".csv"):
        empty = ("the file holds no edits", "no-records")
        yield Case(f"empty{suffix}", b"", suffix, empty)
        yield Case(f"blank{suffix}", b"\n \r\n\t\n", suffix, empty)
        yield Case(f"mark-alone{suffix}", codecs.BOM_UTF8, suffix, empty)
        yield Case(f"nuls{suffix}", bytes(1000), suffix, ("holds NUL bytes",))
        gz = gzip.compress(GOOD.encode())
        yield Case(f"gzip{suffix}", gz, suffix, ("is compressed by gzip; unpack it first",))
        yield Case(f"zip{suffix}", zipped("edits.jsonl"), suffix, ("is a zip archive", "unpack it"))
        xlsx = zipped("xl/workbook.xml")
        yield Case(f"spreadsheet{suffix}", xlsx, suffix, ("or a spreadsheet", "export it as CSV"))
        parquet = b"PAR1\x15\x04\x15" + bytes(99) + b"PAR1"
        yield Case(f"parquet{suffix}", parquet, suffix, ("is a Parquet file; export it as JSONL",))
        for protocol in range(2, 6):
            data = pickle.dumps([{"prompt": "a", "target": "b"}], protocol)
            said = ("is a pickle, which is never opened", "expected JSONL, JSON or CSV")
            yield Case(f"pickle-{protocol}{suffix}", data, suffix, said)
    yield Case("empty-list", b"[]", ".json", ("the file holds no edits",))
    yield Case("header-alone", b"prompt,target\n", ".csv", ("the file holds no edits",))
    yield Case("blank-rows", b"prompt,target\n , \n,\n", ".csv", ("the file holds no edits",))
    unknown = ("cannot tell what kind of file this is", "expected a name that ends in .jsonl")
    yield Case("unknown-kind", b"prompt: a", ".txt", unknown)
    yield Case("name-of-ansi", b"{", f"{ANSI}\r\n\u202e.jsonl", ("line 1", "malformed JSON"))
    yield Case("name-of-half-characters", b"{", os.fsdecode(b"\xff\xfe.jsonl"), ("malformed JSON",))


def large_files() -> Iterator[Case]:
    long = "x" * LONG
    column = f"malformed JSON at column {LONG + 14}"
    yield Case("long-line", f'{{"prompt": "{long}"'.encode(), ".jsonl", ("line 1", column))
    yield Case("long-open-string", f'{GOOD}{{"prompt": "{long}'.encode(), ".jsonl", ("line 2",))
    yield Case("long-field", bare(prompt=long).encode(), ".jsonl", ("`target` is missing",))
    yield Case("long-name", bare(prompt="a", **{long: 1}).encode(), ".jsonl", ("`target` is missing",))
    twice = f'{{"{long}": 1, "{long}": 2}}'.encode()
    yield Case("long-key-twice", twice, ".jsonl", ("the same key twice: 'xxx",))
    ids = (line(id=long) + line(id=long, prompt="a")).encode()
    yield Case("long-id-twice", ids, ".jsonl", ("line 2", "is that of line 1 already"))
    rivals = (line(target=long) + line(target=long + "y")).encode()
    yield Case("long-contradiction", rivals, ".jsonl", ("line 2", "contradicts line 1"))
    rivals = (line(prompt=long) + line(prompt=long, target="y")).encode()
    yield Case("long-prompt-contradiction", rivals, ".jsonl", ("line 2", "contradicts line 1"))
    wrapped = bare(**{long: [{}]}).encode()
    yield Case("long-wrapper", wrapped, ".json", ("record [0]", "`prompt` is missing"))
    yield Case("long-wrong-type", line(target=[long, long]).encode(), ".jsonl", ("is a list",))
    quotes = b'{"prompt": "' + b'\\"' * (LONG // 2)
    yield Case("long-escapes", quotes, ".jsonl", ("line 1", "malformed JSON"))
    yield Case("long-number", b"9" * LONG, ".jsonl", ("line 1", "a number that is too large"))
    yield Case("long-brackets", b"[" * LONG, ".json", ("line 1", "nested too deeply"))
    yield Case("long-blank", b" " * LONG, ".jsonl", ("the file holds no edits",))
    yield Case("long-header", f"{long[:100_000]},x\n".encode(), ".csv", ("the header lacks",))
    commas = b"prompt,target" + b"," * (LONG // 10) + b"\n"
    yield Case("many-columns", commas, ".csv", ("line 1", "the column '' is there twice"))
    cells = ROWS.encode() + b"a" + b"," * LONG
    yield Case("many-cells", cells, ".csv", ("line 3", "10000001 cells where the header has 2"))
    fields = {f"prompt{i}": 1 for i in range(100_000)}
    yield Case("many-fields", bare(**fields).encode(), ".jsonl", ("`prompt` is missing",))
    records = b"[" + b"{}," * 20_000 + b'{"a": NaN}]'
    yield Case("many-records", records, ".json", ("record [20000]", "JSON has no NaN"))


SMALL = [
    *encodings(),
    *json_grammar(),
    *json_beyond_the_grammar(),
    *fields(),
    *tables(),
    *other_files(),
]
LARGE = list(large_files())


def assert_told(lines: list[str], path: Path, said: tuple[str, ...]) -> None:
    assert lines
    for each in lines:
        assert each.isprintable(), each
        assert len(each) < 420, each
    shown = path.name if path.name.isprintable() else str(path.parent)
    told = [each for each in lines if all(part in each for part in (shown, *said))]
    assert told, "\n".join(lines)


def errors_of(path: Path) -> list[str]:
    """Read and lint a file; return its errors as a person is shown them."""
    try:
        problems = lint(read_edits(path))
    except EditsError as error:
        return [str(error)]
    errors = [problem for problem in problems if problem.level == "error"]
    return format_problems(errors, path).splitlines()[:-1]


def check(path: Path, said: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Hold a file to all that is promised of a malformed one, read in code or by a command."""
    before = sorted(path.parent.iterdir())
    if path.name.isprintable():
        assert_told(errors_of(path), path, said)
    for words in (["lint"], ["lint", "--json"]):
        assert main([*words, str(path)]) == 2
        captured = capsys.readouterr()
        lines = (captured.out + captured.err).splitlines()
        assert all(each.isprintable() for each in lines)
        assert all(len(each) < 420 for each in lines)
        if words == ["lint"]:
            assert_told(lines, path, said)
        elif captured.out:
            assert any(each["level"] == "error" for each in json.loads(captured.out)["problems"])
    with pytest.raises(EditsError) as caught:
        gather_edits(path)
    assert len(str(caught.value)) < 10_000
    assert sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in SMALL])
def test_malformed_file_is_refused(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"edits{case.suffix}"
    path.write_bytes(case.data)
    check(path, case.said, capsys)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in LARGE])
def test_large_malformed_file_is_refused_in_linear_time_and_few_words(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # At quadratic cost each of these would take minutes, or hours.
    path = tmp_path / f"edits{case.suffix}"
    path.write_bytes(case.data)
    try:
        check(path, case.said, capsys)
    finally:
        path.unlink()


def test_every_case_is_another_one() -> None:
    cases = SMALL + LARGE
    assert len({case.id for case in cases}) == len(cases)
    assert len({(case.data, case.suffix) for case in cases}) == len(cases)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (os.mkfifo, "is a pipe or a device, expected a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a pipe or a device"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: None, "No such file"),
    ],
    ids=["folder", "pipe", "device", "broken-link", "circular-link", "nothing"],
)
def test_what_is_no_file_is_refused_without_waiting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: object, said: str
) -> None:
    path = tmp_path / "edits.jsonl"
    assert callable(make)
    make(path)
    check(path, (said, "cannot read the edits file"), capsys)


def test_a_name_that_no_file_can_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", "x" * 300]) == 2
    assert "File name too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a\0b"}, "`prompt` holds the control character U+0000"),
        ({"prompt": f"a{ANSI}"}, "`prompt` holds the control character U+001B"),
        ({"target": "b\x9b2J"}, "`target` holds the control character U+009B"),
        ({"target": "\ufeffb"}, "`target` holds the control character U+FEFF"),
        ({ANSI: 1}, r"unknown field '\x1b]0;owned\x07\x1b[2J\x9b31m' is ignored"),
        ({"x\ud800": 1}, r"unknown field 'x\ud800' is ignored"),
        ({"x": "\ud800" + ANSI}, "unknown field 'x' is ignored"),
        ({"x" * LONG: "y" * LONG}, "unknown field 'xxx"),
        ({f"x{i}": i for i in range(1000)}, "900 more unknown fields are ignored"),
        ({"target": f"{ANSI}. {ANSI}"}, "no answer can match the target"),
        ({"rephrases": "The sky is"}, "a rephrase is the prompt itself"),
    ],
)
def test_what_is_odd_but_sound_is_warned_of_in_words_that_can_be_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record: dict[str, object], said: str
) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(bare(**{"prompt": "The sky is", "target": "green", **record}))
    assert main(["lint", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(said in each and ": warning: " in each for each in lines), lines
    assert all(each.isprintable() and len(each) < 420 for each in lines)
    assert main(["lint", "--json", str(path)]) == 0
    assert all(each.isprintable() for each in capsys.readouterr().out.splitlines())
    [edit] = read_edits(path).edits
    assert edit.prompt == record.get("prompt", "The sky is")
    assert edit.target == record.get("target", "green")
