import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locft.strictjson import MAX_DEPTH, StrictJsonError, load_json, parse_json

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**600), 10**600)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters() | st.sampled_from('"\\[]{}')),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@settings(deadline=None)
@given(json_values, st.booleans(), st.sampled_from([None, 0, 3]))
def test_what_json_can_say_is_read_as_the_json_module_reads_it(
    value: object, escape: bool, indent: int | None
) -> None:
    assert load_json(json.dumps(value, ensure_ascii=escape, indent=indent)) == value


@settings(deadline=None)
@given(st.text('[]{}",:\\\n ab1.-') | st.text())
def test_what_is_no_json_is_refused_by_value_errors_alone(text: str) -> None:
    try:
        value = load_json(text)
    except ValueError:
        return
    assert json.loads(text) == value


def depth_of(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


@settings(deadline=None)
@given(json_values, st.booleans())
def test_the_bound_holds_for_the_depth_of_values_whatever_their_texts_hold(
    value: object, escape: bool
) -> None:
    text = json.dumps(value, ensure_ascii=escape)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("locft.strictjson.MAX_DEPTH", depth_of(value))
        assert load_json(text) == value
        patched.setattr("locft.strictjson.MAX_DEPTH", depth_of(value) - 1)
        with pytest.raises(StrictJsonError, match="nested too deeply"):
            load_json(text)


def nested(depth: int) -> str:
    return '[{"a":' * (depth // 2) + "[" * (depth % 2) + "]" * (depth % 2) + "}]" * (depth // 2)


@pytest.mark.parametrize("text", [nested(MAX_DEPTH + 1), "[" * 10**6, '{"a":' * 10**6, "[" * 101])
def test_nesting_beyond_the_bound_is_refused_before_parsing(text: str) -> None:
    with pytest.raises(StrictJsonError, match="nested too deeply: over 100 levels") as caught:
        load_json(text)
    assert caught.value.code == "too-deep"


@pytest.mark.parametrize(
    "text",
    [
        nested(MAX_DEPTH).replace('{"a":}', "{}"),
        json.dumps("[" * 1000),
        json.dumps('\\"[{' * 1000),
        json.dumps({"[" * 200 + "\\": "]"}),
        "[" + "[]," * 1000 + "[]]",
    ],
)
def test_brackets_count_only_where_they_nest(text: str) -> None:
    assert load_json(text) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        '"' + "\\\\" * 2_000_000,
        '"\\"' * 1_000_000,
        '"' * 2_000_001,
        '["' + "a" * 5_000_000,
        "{" * 50 + '"\\' * 1_000_000,
        '{"a":[1,2]}' * 400_000,
        "[" + '{"name": "[{\\"", "shape": [1, 2]}, ' * 100_000,
    ],
    ids=["escapes", "escaped quotes", "quotes", "open string", "open escapes", "many", "open list"],
)
def test_long_texts_are_refused_in_linear_time(text: str) -> None:
    # At quadratic cost each of these would take minutes.
    with pytest.raises(json.JSONDecodeError):
        load_json(text)


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "duplicate-key", "the same key twice: 'a'"),
        ('[{"x": {"a": 1, "\\u0061": 2}}]', "duplicate-key", "the same key twice: 'a'"),
        ("[NaN]", "malformed-json", "JSON has no NaN"),
        ("-Infinity", "malformed-json", "JSON has no -Infinity"),
        ("Infinity", "malformed-json", "JSON has no Infinity"),
        ("1e999", "number-too-large", "digits: '1e999'"),
        ("[-1E+400]", "number-too-large", "digits: '-1E[+]400'"),
        ("9" * 641, "number-too-large", "too large, or has over 640 digits"),
        ("[-" + "9" * 10**6 + "]", "number-too-large", "or has over 640 digits"),
        ("0." + "0" * 10**6, "number-too-large", "or has over 640 digits"),
    ],
)
def test_what_readers_differ_on_is_refused_by_name(text: str, code: str, message: str) -> None:
    with pytest.raises(StrictJsonError, match=message) as caught:
        load_json(text)
    assert caught.value.code == code
    assert len(str(caught.value)) < 400


def test_a_long_key_is_shortened_in_the_message() -> None:
    key = json.dumps("\x1b" + "k" * 10**6)
    with pytest.raises(StrictJsonError) as caught:
        load_json(f"{{{key}: 1, {key}: 2}}")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_numbers_keep_their_kind_and_value() -> None:
    assert load_json("[0, -7, 1.0, 1e3, -0.5]") == [0, -7, 1.0, 1000.0, -0.5]
    assert [type(value) for value in json.loads(json.dumps(load_json("[1, 1.0]")))] == [int, float]
    assert load_json("9" * 640) == 10**640 - 1


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b"\xff", b"\xef\xbb\xbf{}", b"{}\0", b"{\0}"])
def test_only_an_object_in_utf8_is_parsed(raw: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(raw)


def test_an_object_is_parsed() -> None:
    assert parse_json('{"ä": [1]}'.encode()) == {"ä": [1]}
