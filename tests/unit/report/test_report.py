import dataclasses
import json
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locft.report.markdown import Example, draw_markdown
from locft.report.schema import (
    SCHEMA_VERSION,
    Cost,
    DriftInfo,
    EditReport,
    EditsInfo,
    Environment,
    EvalCost,
    EvalReport,
    LocationInfo,
    MatrixInfo,
    ModelInfo,
    Protocol,
    ProtocolScores,
    TrainingInfo,
    to_json,
)
from locft.report.words import SCORE_NAMES, bytes_text, figure_text, seconds_text, some, verdict
from locft.types import Figure, Scores

BY_DEFINITION = "by definition: the unedited model is compared with itself"
NONE = Figure(value=None, num=0, reason="the edits hold none")
SCORES = Scores(
    reliability=Figure(value=0.97, num=200, low=0.936, high=0.986),
    generalization=Figure(value=0.5, num=60, low=0.377, high=0.623),
    locality=Figure(value=0.75, num=40, low=0.598, high=0.858),
    drift=Figure(value=0.0421, num=40, low=0.0391, high=0.0455),
)
CHANGE = Figure(value=0.97, num=200, low=0.94, high=0.99)
BEFORE = Scores(
    reliability=Figure(value=0.0, num=200, low=0.0, high=0.019),
    generalization=NONE,
    locality=Figure(value=1.0, num=40, low=1.0, high=1.0, reason=BY_DEFINITION),
    drift=Figure(value=0.0, num=40, low=0.0, high=0.0, reason=BY_DEFINITION),
)
HOSTILE = [
    "a | b || c",
    r"a \| b \\| c \\",
    "`code` and ``| more``",
    "<script>alert(1)</script> <!-- gone",
    "two\nlines\r\nand\x0bmore\u2028end\u0085",
    "[link](http://example.invalid) ![image](x) [r][1]",
    "# heading\n\n## other",
    "**bold** _it_ ~~gone~~ $x$",
    "x" * 5000,
    "|" * 5000,
    "\x1b[31mred\x1b[0m \u202egnp.exe \x00",
    "---|---",
    "",
]
ENTITY = "AT&amp;T &lt;b&gt; &#124;"


def make_report(hostile: str = "plain", **changes: Any) -> EditReport:
    report = EditReport(
        schema_version=SCHEMA_VERSION,
        model=ModelInfo(
            id=hostile,
            revision=None,
            architecture="LlamaForCausalLM",
            num_parameters=40_000,
            num_layers=3,
            dtype="float32",
        ),
        edits=EditsInfo(
            file=hostile,
            format="locft",
            num_edits=200,
            num_rephrases=60,
            num_locality=40,
            num_dropped=1,
            num_warnings=2,
            file_sha256=None,
            sha256="e" * 64,
        ),
        location=LocationInfo(
            name="2.mlp.down",
            layer=2,
            module="mlp.down",
            matrices=(MatrixInfo(tensor="layers.2.w", shape=(32, 64), dtype="BF16", change=0.125),),
            num_parameters=2048,
        ),
        settings={"lr": "auto", "drift_text": hostile, "revision": None},
        training=TrainingInfo(
            lr=0.002,
            batch_size=20,
            epochs_at_most=25,
            epochs=7,
            steps=70,
            final_loss=0.0091,
            stopped_early=True,
        ),
        protocol=Protocol(
            name="locft",
            rule="Match answers.",
            context="raw",
            max_new_tokens=32,
            stop=(".", "\n"),
            match="exact",
            meanings={},
        ),
        scores_before=BEFORE,
        scores=SCORES,
        change={"reliability": CHANGE},
        drift=DriftInfo(
            text=hostile,
            text_sha256="d" * 64,
            num_tokens=22_655,
            overall=SCORES.drift,
            by_kind={hostile: SCORES.drift},
        ),
        cost=Cost(
            seconds_per_edit=0.25,
            load_s=1.0,
            cache_s=10.0,
            train_s=40.0,
            eval_s=125.0,
            wall_s=3725.0,
            peak_memory_bytes=1_500_000_000,
        ),
        patch_bytes=9_400,
        environment=Environment(
            locft="0.1.0",
            python="3.11.7",
            torch="2.13.0",
            transformers="5.23.0",
            platform=hostile,
            device=hostile,
            num_threads=1,
        ),
    )
    return dataclasses.replace(report, **changes)


def example(text: str, is_match: bool = False) -> Example:
    return Example(prompt=text, expected=text, before=text, after=text, is_match=is_match)


def cells(row: str) -> list[str]:
    """Split a table row at its unescaped pipes, as GitHub does."""
    return [cell.strip() for cell in re.split(r"(?<!\\)(?:\\\\)*\|", row)[1:-1]]


def tables(text: str) -> list[list[list[str]]]:
    """Read all tables: a block of lines that begin with a pipe, of which the second is dashes."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [cells(line) for line in block.splitlines()]
        assert all(re.fullmatch("-+", cell) for cell in rows[1])
        found.append([rows[0], *rows[2:]])
    return found


def shape_of(text: str) -> list[tuple[int, set[int]]]:
    return [(len(rows), {len(row) for row in rows}) for rows in tables(text)]


def unescaped(cell: str) -> str:
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", cell)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:12]))
def test_any_text_stays_in_its_cell_or_line(text: str) -> None:
    plain = draw_markdown(make_report(), [example("plain")])
    drawn = draw_markdown(make_report(text), [example(text)])
    assert shape_of(drawn) == shape_of(plain)
    assert len(drawn.split("\n")) == len(plain.split("\n"))
    assert len(drawn.splitlines()) == len(plain.splitlines())
    assert re.findall("^#+ ", drawn, re.MULTILINE) == re.findall("^#+ ", plain, re.MULTILINE)
    assert "\x1b" not in drawn
    assert "\u202e" not in drawn


@pytest.mark.parametrize("text", [text for text in HOSTILE if len(text) < 100] + [ENTITY])
def test_no_character_of_a_users_text_has_a_meaning_in_markdown(text: str) -> None:
    drawn = draw_markdown(make_report(), [example(text)])
    cell = tables(drawn)[2][1][1]
    shown = "".join(c if c.isprintable() else " " for c in text)
    assert unescaped(cell) == shown.strip()
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*<>\[\]_~$]", cell)
    assert not re.search(r"(?<!\\)&\w+;|(?<!\\)&#\d+;", cell)


def test_a_long_text_is_shortened() -> None:
    cell = tables(draw_markdown(make_report(), [example("word " * 2000)]))[2][1][1]
    assert len(cell) <= 200
    assert cell.startswith("word word")
    assert cell.endswith("…")


@given(st.text(max_size=60))
def test_whatever_the_text_every_table_keeps_its_shape(text: str) -> None:
    plain = draw_markdown(make_report(), [example("plain")] * 2)
    drawn = draw_markdown(make_report(text), [example(text)] * 2)
    assert shape_of(drawn) == shape_of(plain)
    assert drawn.count("\n") == plain.count("\n")


def test_the_first_twelve_answers_are_shown_failures_first() -> None:
    examples = [example(f"prompt {i}", is_match=i not in (7, 14)) for i in range(15)]
    # Of those that took, the ones that change nothing to see come last.
    examples[0] = dataclasses.replace(examples[0], before="")
    rows = tables(draw_markdown(make_report(), examples))[2][1:]
    assert [row[:2] for row in rows[:3]] == [
        ["NO", "prompt 7"],
        ["NO", "prompt 14"],
        ["yes", "prompt 1"],
    ]
    assert "prompt 0" not in [row[1] for row in rows]
    assert len(rows) == 12
    assert "## Answers (12 of 15, failures first)" in draw_markdown(make_report(), examples)


def test_the_markdown_tells_scores_cost_and_change() -> None:
    drawn = draw_markdown(make_report(), [])
    scores, kinds, answers, matrices, settings = tables(drawn)
    assert scores[1] == [
        "reliability",
        "0.0% [0.0, 1.9] of 200",
        "97.0% [93.6, 98.6] of 200",
        "+97.0 [+94.0, +99.0]",
        "prompts answered with the target",
    ]
    assert scores[2][3] == ""
    assert scores[2][1] == "not measured (the edits hold none)"
    assert scores[3][1] == "100% by definition"
    assert scores[4][1:3] == ["0 by definition", "0.0421 [0.0391, 0.0455], 40 passages"]
    assert [row[0] for row in scores[1:]] == list(SCORE_NAMES)
    assert kinds[1] == ["plain", "0.0421 [0.0391, 0.0455], 40 passages"]
    assert len(answers) == 1
    assert matrices[1] == ["`layers.2.w`", "32 x 64", "BF16", "12.5%"]
    assert settings[1:] == [["lr", "auto"], ["drift_text", "plain"], ["revision", "none"]]
    for part in (
        "2,048 of 40,000 parameters (5.12%)",
        "The patch takes 9.4 kB",
        "7 epochs of at most 25, 70 steps of 20 edits, learning rate 0.002",
        "final loss 0.0091 (under the threshold, so it stopped).",
        "0.25 s per edit",
        "scoring: 2 min 05 s; in all 1 h 02 min; peak memory 1.5 GB.",
        "22,655 tokens, sha256 dddddddddddd",
    ):
        assert part in drawn
    training = dataclasses.replace(make_report().training, stopped_early=False)
    assert "so it stopped" not in draw_markdown(make_report(training=training), [])


def test_json_holds_the_classes_of_the_schema_field_by_field() -> None:
    report = make_report(HOSTILE[4])
    text = to_json(report)
    assert text.endswith("}\n")
    read = json.loads(text)
    assert list(read) == [field.name for field in dataclasses.fields(EditReport)]
    for name in SCORE_NAMES:
        figure = getattr(SCORES, name)
        assert read["scores"][name] == {
            "value": figure.value,
            "num": figure.num,
            "low": figure.low,
            "high": figure.high,
            "reason": None,
        }
    assert read["scores_before"]["generalization"]["value"] is None
    assert read["scores_before"]["generalization"]["reason"] == "the edits hold none"
    assert read["cost"] == {
        "seconds_per_edit": 0.25,
        "load_s": 1.0,
        "cache_s": 10.0,
        "train_s": 40.0,
        "eval_s": 125.0,
        "wall_s": 3725.0,
        "peak_memory_bytes": 1_500_000_000,
    }
    assert read["edits"]["file"] == HOSTILE[4]
    assert read["location"]["matrices"] == [
        {"tensor": "layers.2.w", "shape": [32, 64], "dtype": "BF16", "change": 0.125}
    ]
    assert read["drift"]["by_kind"][HOSTILE[4]]["value"] == 0.0421
    # What is read back is what was written: lists stand for tuples.
    assert json.loads(json.dumps(dataclasses.asdict(report))) == read


def test_json_of_an_evaluation_without_a_base_says_null() -> None:
    edit = make_report()
    report = EvalReport(
        schema_version=SCHEMA_VERSION,
        model=edit.model,
        endpoint=None,
        patch=None,
        base=None,
        edits=edit.edits,
        protocols={
            "locft": ProtocolScores(
                protocol=edit.protocol,
                before=None,
                after={"reliability": SCORES.reliability},
                change=None,
            )
        },
        contexts={},
        judge=None,
        causes={"reliability": {"empty": 6}},
        drift=None,
        capability=None,
        parts_s={"load": 1.0},
        cost=EvalCost(load_s=1.0, eval_s=2.0, wall_s=3.5, peak_memory_bytes=1),
        environment=edit.environment,
    )
    read = json.loads(to_json(report))
    assert read["cost"] == {"load_s": 1.0, "eval_s": 2.0, "wall_s": 3.5, "peak_memory_bytes": 1}
    assert list(read) == [field.name for field in dataclasses.fields(EvalReport)]
    scores = read["protocols"]["locft"]
    assert (scores["before"], scores["change"], read["drift"], read["base"]) == (None,) * 4
    assert scores["after"]["reliability"]["num"] == 200
    assert scores["protocol"]["rule"] == "Match answers."


@pytest.mark.parametrize(
    ("name", "figure", "text"),
    [
        ("reliability", SCORES.reliability, "97.0% [93.6, 98.6] of 200"),
        ("locality", Figure(value=1.0, num=1234, low=0.997, high=1.0), "100.0% [99.7, 100.0] of 1,234"),
        ("locality", BEFORE.locality, "100% by definition"),
        ("drift", SCORES.drift, "0.0421 [0.0391, 0.0455], 40 passages"),
        ("drift", BEFORE.drift, "0 by definition"),
        ("drift", Figure(value=0.0, num=40, low=0.0, high=0.0), "0.0000 [0.0000, 0.0000], 40 passages"),
        ("generalization", NONE, "not measured (the edits hold none)"),
        ("drift", Figure(value=None, num=0), "not measured"),
    ],
)
def test_a_figure_is_worded_with_interval_and_count(name: str, figure: Figure, text: str) -> None:
    assert figure_text(name, figure) == text


def test_the_verdict_names_the_harm_beside_the_success() -> None:
    assert verdict(SCORES, 200) == (
        "194 of 200 edits took; 50% of rephrases follow; 25% of other prompts are answered "
        "differently; predictions on neutral text moved by 0.042 nats per token."
    )


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ("generalization", "rephrases"),
        ("locality", "other prompts"),
        ("drift", "neutral text"),
    ],
)
def test_the_verdict_leaves_out_what_was_not_measured(missing: str, gone: str) -> None:
    changes: dict[str, Any] = {missing: NONE}
    text = verdict(dataclasses.replace(SCORES, **changes), 200)
    assert gone not in text
    assert text.count(";") == 2
    assert "None" not in text


@given(st.integers(1, 10_000).flatmap(lambda num: st.tuples(st.integers(0, num), st.just(num))))
def test_the_verdict_counts_the_edits_that_took_exactly(counts: tuple[int, int]) -> None:
    taken, num = counts
    scores = dataclasses.replace(
        SCORES, reliability=Figure(value=taken / num, num=num, low=0.0, high=1.0)
    )
    assert verdict(scores, num).startswith(f"{taken:,} of {num:,} edits took")


@pytest.mark.parametrize(
    ("num", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (3_540_000, "3.5 MB"),
        (540_000_000, "540.0 MB"),
        (1_500_000_000, "1.5 GB"),
        (2_000_000_000_000, "2000.0 GB"),
        (999_999, "1.0 MB"),
    ],
)
def test_sizes_are_worded(num: int, text: str) -> None:
    assert bytes_text(num) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (2.14, "2.1 s"),
        (59.9, "59.9 s"),
        (60.0, "1 min 00 s"),
        (185.2, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3725.0, "1 h 02 min"),
        (100_000.0, "27 h 46 min"),
        (59.97, "1 min 00 s"),
    ],
)
def test_durations_are_worded(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_reports_are_read_and_drawn_without_torch() -> None:
    code = (
        "import pkgutil, sys, importlib, locft.report\n"
        "names = [m.name for m in pkgutil.iter_modules(locft.report.__path__)]\n"
        "for name in names: importlib.import_module('locft.report.' + name)\n"
        "print(sorted(names), [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['markdown', 'schema', 'words'] []\n"


def test_a_long_list_of_names_is_cut_with_its_length() -> None:
    assert some(["a"]) == "a"
    assert some(["a", "b", "c", "d"]) == "a, b, c, d"
    assert some([*"abcdefghijklm"]) == "a, b, c, d and 9 more"


def test_many_matrices_are_cut_to_a_page() -> None:
    matrices = tuple(
        MatrixInfo(tensor=f"experts.{i}.w", shape=(2, 2), dtype="F32", change=0.1) for i in range(23)
    )
    report = make_report()
    location = dataclasses.replace(report.location, matrices=matrices)
    text = draw_markdown(dataclasses.replace(report, location=location), [])
    assert "experts.19.w" in text
    assert "experts.20.w" not in text
    assert "3 more, in report.json" in text
