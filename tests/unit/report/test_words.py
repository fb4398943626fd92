import dataclasses
import json
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import BEFORE, NONE, SCORES

from locft.report.words import (
    bytes_text,
    change_text,
    counted,
    figure_text,
    one_line,
    seconds_text,
    setting_text,
    some,
    verdict,
)
from locft.types import Figure

JOINERS = "\u200c\u200d"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        ("two\nlines", "two lines"),
        ("a\r\nb\tc\x0bd\x0ce", "a  b c d e"),
        ("\u2028\u2029\u0085\xa0\u3000", "     "),
        ("\x1c\x1d\x1e\x1f", "    "),
        ("\x1b[31mred", "\\u001b[31mred"),
        ("a\x00b\x7f", "a\\u0000b\\u007f"),
        ("\u202egnp.exe\u2066x\u2069", "\\u202egnp.exe\\u2066x\\u2069"),
        ("\u200e\u200f\u061c\u200b\ufeff\u00ad", "\\u200e\\u200f\\u061c\\u200b\\ufeff\\u00ad"),
        ("\ud800 \udfff", "\\ud800 \\udfff"),
        ("\U000e0041", "\\udb40\\udc41"),
        ("\ufffe\U0010ffff", "\\ufffe\\udbff\\udfff"),
        ("می\u200cخواهم क्\u200dष 👩\u200d🔬", "می\u200cخواهم क्\u200dष 👩\u200d🔬"),
        ("é e\u0301 日本 ❤\ufe0f 🇫🇷", "é e\u0301 日本 ❤\ufe0f 🇫🇷"),
        (r"\u202e \n is typed", r"\u202e \n is typed"),
        ("", ""),
    ],
)
def test_a_line_shows_what_steers_displays_and_keeps_what_joins_letters(text: str, shown: str) -> None:
    assert one_line(text) == shown


@pytest.mark.parametrize(("num", "limit"), [(200, 200), (201, 200), (5000, 200), (7, 3), (3, 3), (2, 1)])
def test_a_long_line_is_shortened_with_an_ellipsis(num: int, limit: int) -> None:
    shown = one_line("x" * num, limit=limit)
    assert shown == ("x" * num if num <= limit else "x" * (limit - 1) + "…")
    assert one_line("x" * num, limit=None) == "x" * num


def test_what_is_shortened_is_what_is_shown_not_what_was_given() -> None:
    assert len(one_line("\x00" * 100, limit=200)) == 200
    assert one_line("\x00" * 33 + "zz", limit=200) == "\\u0000" * 33 + "zz"


ANY_TEXT = st.text(st.characters(), max_size=80) | st.text(
    st.sampled_from(
        "ab |\\\n\r\t\x00\x1b\x85\u2028\u202e\u2066\u200c\u200d\ud800\udfff\U0001f600\U000e0041"
    )
)


@given(ANY_TEXT, st.none() | st.integers(1, 90))
def test_whatever_the_text_it_is_one_line_of_what_can_be_seen(text: str, limit: int | None) -> None:
    shown = one_line(text, limit=limit)
    assert len(f"{shown}.".splitlines()) == 1
    assert all(c.isprintable() or c in JOINERS for c in shown)
    assert limit is None or len(shown) <= limit
    shown.encode()


@given(ANY_TEXT)
def test_no_text_is_lost_but_the_kind_of_white_space(text: str) -> None:
    shown = one_line(text, limit=None)
    if "\\" in text:  # what was typed as an escape cannot be told from what was made one
        return
    read = "".join(json.loads(f'"{part}"') if part.startswith("\\") else part for part in _parts(shown))
    # Two surrogates that stood side by side are read back as the character that they make.
    flat = "".join(c if c.isprintable() or c in JOINERS or not c.isspace() else " " for c in text)
    assert _utf16(read) == _utf16(flat)


def _parts(shown: str) -> list[str]:
    return re.findall(r"\\u[0-9a-f]{4}|\\.|.", shown)


def _utf16(text: str) -> bytes:
    return text.encode("utf-16-le", "surrogatepass")


@pytest.mark.parametrize(
    ("name", "figure", "text"),
    [
        ("reliability", SCORES.reliability, "97.0% [93.6, 98.6] of 200"),
        ("locality", Figure(value=1.0, num=1234, low=0.997, high=1.0), "100.0% [99.7, 100.0] of 1,234"),
        ("locality", BEFORE.locality, "100% by definition"),
        ("drift", SCORES.drift, "0.0421 [0.0391, 0.0455], 40 passages"),
        ("drift", BEFORE.drift, "0 by definition"),
        ("drift", Figure(value=0.0, num=40, low=0.0, high=0.0), "0.0000 [0.0000, 0.0000], 40 passages"),
        (
            "drift",
            Figure(value=0.3, num=1, reason="one passage gives no interval"),
            "0.3000 (one passage gives no interval)",
        ),
        ("generalization", NONE, "not measured (the edits hold none)"),
        ("drift", Figure(value=None, num=0), "not measured"),
    ],
)
def test_a_figure_is_worded_with_interval_and_count(name: str, figure: Figure, text: str) -> None:
    assert figure_text(name, figure) == text


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure(value=0.12, num=9, low=0.085, high=0.155), "+12.0 [+8.5, +15.5]"),
        (Figure(value=-0.01, num=9, low=-0.035, high=0.015), "-1.0 [-3.5, +1.5]"),
        (Figure(value=0.0, num=9, low=0.0, high=0.0), "+0.0 [+0.0, +0.0]"),
        (NONE, ""),
        (Figure(value=0.1, num=1), ""),
    ],
)
def test_a_change_is_worded_in_points_with_its_interval(figure: Figure, text: str) -> None:
    assert change_text(figure) == text


def test_the_verdict_names_the_harm_beside_the_success() -> None:
    assert verdict(vars(SCORES), 200) == (
        "194 of 200 edits took; 30 of 60 rephrases follow; 10 of 40 other prompts are answered "
        "differently; predictions on neutral text moved by 0.042 nats per token."
    )


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ("reliability", "edits took"),
        ("generalization", "rephrases"),
        ("locality", "other prompts"),
        ("drift", "neutral text"),
    ],
)
def test_the_verdict_leaves_out_what_was_not_measured(missing: str, gone: str) -> None:
    changes: dict[str, Any] = {missing: NONE}
    text = verdict(vars(dataclasses.replace(SCORES, **changes)), 200)
    assert gone not in text
    assert text.count(";") == 2
    assert "None" not in text


def test_the_verdict_says_that_nothing_was_measured() -> None:
    assert verdict({}, 3) == "nothing was measured."
    assert verdict({"reliability": NONE}, 3) == "nothing was measured."


def test_the_verdict_only_names_scores_that_count_no_answers() -> None:
    assert verdict(vars(SCORES), 200, by_answers=False) == (
        "reliability 97%; generalization 50%; locality 75%; "
        "predictions on neutral text moved by 0.042 nats per token."
    )


@given(st.integers(1, 10_000).flatmap(lambda num: st.tuples(st.integers(0, num), st.just(num))))
def test_the_verdict_counts_the_edits_that_took_exactly(counts: tuple[int, int]) -> None:
    taken, num = counts
    scores = {"reliability": Figure(value=taken / num, num=num, low=0.0, high=1.0)}
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


def test_a_count_is_worded_in_singular_and_plural() -> None:
    assert counted(0, "edit") == "0 edits"
    assert counted(1, "edit") == "1 edit"
    assert counted(1000, "edit") == "1,000 edits"
    assert counted(2, "entry", "entries") == "2 entries"


def test_a_long_list_of_names_is_cut_with_its_length() -> None:
    assert some(["a"]) == "a"
    assert some(["a", "b", "c", "d"]) == "a, b, c, d"
    assert some([*"abcdefghijklm"]) == "a, b, c, d and 9 more"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.1 + 0.2, "0.3"),
        (1 / 3, "0.3333"),
        (2e-05, "2e-05"),
        (20, "20"),
        (True, "True"),
        (None, "none"),
        ("auto", "auto"),
    ],
)
def test_settings_are_worded_for_people(value: object, shown: str) -> None:
    assert setting_text(value) == shown


def test_reports_are_imported_without_torch_and_without_what_draws() -> None:
    code = (
        "import pkgutil, sys, importlib, locft.report\n"
        "names = [m.name for m in pkgutil.iter_modules(locft.report.__path__)]\n"
        "for name in names: importlib.import_module('locft.report.' + name)\n"
        "print(*names)\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, loaded = done.stdout.splitlines()
    expected = {"comparison", "content", "html", "json_schema", "markdown", "page", "pictures"}
    assert expected | {"schema", "words"} <= set(names.split())
    assert loaded == "[]"


def test_a_page_is_described_and_drawn_without_torch() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from reports import make_answers, make_report\n"
        "from locft.report.content import describe_edit\n"
        "from locft.report.html import draw_html\n"
        "assert '<svg' in draw_html(describe_edit(make_report(), make_answers()))\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib.pyplot') if m in sys.modules])"
    )
    tests = sys.modules["reports"].__file__
    assert tests is not None
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tests.removesuffix("reports.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
