import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locft.errors import brief, printable

any_text = st.text(st.characters())


@settings(deadline=None)
@given(any_text)
def test_a_printable_text_is_one_line_without_controls_and_half_characters(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    shown.encode()
    if text.isprintable():
        assert shown == text


@settings(deadline=None)
@given(any_text, st.booleans())
def test_escapes_leave_json_what_it_says(text: str, escape: bool) -> None:
    raw = json.dumps({text: [text]}, ensure_ascii=escape)
    assert json.loads(printable(raw)) == {text: [text]}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("caf\u00e9 \u4e2d", "caf\u00e9 \u4e2d"),
        ("a\x1b[31mb", "a\\u001b[31mb"),
        ("\x9b2J\x7f", "\\u009b2J\\u007f"),
        ("a\r\n\tb", "a\\r\\n\\tb"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\udcff", "\\udcff"),
        ("\U000e0041", "\\udb40\\udc41"),
    ],
)
def test_what_steers_a_terminal_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("model.layers.20.mlp.down_proj.weight" * 5, repr("model.layers.20.mlp.down_proj.weight" * 5)),
        ("\x1b\n", r"'\x1b\n'"),
        (None, "None"),
        ([3, 2], "[3, 2]"),
        ([1] * 100, "[1, 1, 1, 1, 1, 1, ...]"),
    ],
)
def test_a_value_is_shown_quoted_and_short_names_whole(value: object, shown: str) -> None:
    assert brief(value) == shown


@pytest.mark.parametrize("value", ["x" * 10**7, "\x1b" * 10**6, [["y" * 10**6] * 9] * 10**6, 10**3000])
def test_a_long_value_is_shortened(value: object) -> None:
    assert len(brief(value)) < 310
    assert brief(value).isprintable()
