import io
import json
import logging
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from fake_server import Fault, drip, hang, hang_up, replies, serving

from locft.errors import ConfigError, EvaluationError, InputError, LocftError
from locft.evaluation.answer_cache import AnswerCache
from locft.evaluation.endpoint import Endpoint, complete_prompts, endpoint_from_environment

KEY = "sk-very-secret-0123456789"
PROMPTS = [f"prompt {number}" for number in range(10)]
WRONG_SHAPES: tuple[object, ...] = (
    [],
    None,
    {},
    {"choices": []},
    {"choices": {"text": "no"}},
    {"choices": [{"text": None}]},
    {"choices": [{"text": 1}]},
    {"choices": [{"message": "no"}]},
    {"choices": [{"message": {}}]},
    {"error": {"message": "overloaded"}},
)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def cache_path(tmp_path: Path) -> Path:
    return tmp_path / "answers.sqlite"


def endpoint_at(url: str, **options: Any) -> Endpoint:
    settings = {"key": KEY, "first_wait_s": 0.001, "timeout_s": 10.0, **options}
    return Endpoint(name="LOCFT_ENDPOINT", base_url=url, model="tiny", **settings)


def asked(
    endpoint: Endpoint, *prompts: str, cache: AnswerCache | None = None, **options: Any
) -> dict[str, str]:
    settings = {"max_new_tokens": 32, "stop": (), "label": "answering", **options}
    return complete_prompts(endpoint, prompts, cache=cache, **settings)


def echo(prompt: str) -> str:
    return f"Answer to {prompt}"


# Where to ask.


def test_an_endpoint_is_read_from_the_environment() -> None:
    variables = {
        "LOCFT_JUDGE_URL": " https://example.org/v1/ ",
        "LOCFT_JUDGE_MODEL": "large",
        "LOCFT_JUDGE_KEY": f"{KEY}\n",
        "LOCFT_ENDPOINT_URL": "http://[::1]:8000",
    }
    endpoint = endpoint_from_environment("LOCFT_JUDGE", variables)
    assert (endpoint.name, endpoint.model, endpoint.key) == ("LOCFT_JUDGE", "large", KEY)
    assert endpoint.address("/completions") == "https://example.org/v1/completions"
    assert KEY not in repr(endpoint)


def test_the_key_may_be_missing() -> None:
    for more in ({}, {"LOCFT_ENDPOINT_KEY": " "}):
        variables = {"LOCFT_ENDPOINT_URL": "http://a", "LOCFT_ENDPOINT_MODEL": "m", **more}
        assert endpoint_from_environment("LOCFT_ENDPOINT", variables).key is None


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"LOCFT_ENDPOINT_MODEL": "m"},
            "LOCFT_ENDPOINT_URL; for example: export LOCFT_ENDPOINT_URL=http://localhost:8000/v1",
        ),
        (
            {"LOCFT_ENDPOINT_URL": "http://a", "LOCFT_ENDPOINT_MODEL": " "},
            "LOCFT_ENDPOINT_MODEL; for example: export LOCFT_ENDPOINT_MODEL=NAME",
        ),
        ({}, "LOCFT_ENDPOINT_URL and LOCFT_ENDPOINT_MODEL; for example: export LOCFT_ENDPOINT_URL="),
    ],
)
def test_a_missing_variable_is_named_with_an_example(variables: Mapping[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        endpoint_from_environment("LOCFT_ENDPOINT", {**variables, "LOCFT_ENDPOINT_KEY": KEY})
    assert said in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            f"localhost:8000/{KEY}",
            "no http or https address; for example: export LOCFT_ENDPOINT_URL=http",
        ),
        (f"ftp://localhost/{KEY}", "no http or https address"),
        (f"http:///{KEY}", "no http or https address"),
        (f"http://[::1/{KEY}", "no http or https address"),
        (f"http://a\n{KEY}", "no http or https address"),
        (f"http://a..b/{KEY}", "no http or https address"),
        (f"http://localhost:80000/{KEY}", "no http or https address"),
        (KEY, "no http or https address"),
        (f"http://user:{KEY}@localhost:8000/v1", "a key belongs in LOCFT_ENDPOINT_KEY"),
        (f"http://{KEY}@localhost:8000/v1", "a key belongs in LOCFT_ENDPOINT_KEY"),
        (f"http://localhost:8000/v1?key={KEY}", "a key belongs in LOCFT_ENDPOINT_KEY"),
        (f"http://localhost:8000/v1#{KEY}", "a key belongs in LOCFT_ENDPOINT_KEY"),
    ],
)
def test_an_address_that_is_none_or_holds_a_secret_is_refused_and_not_shown(url: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        endpoint_at(url)
    assert said in str(caught.value)
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("key", [f"{KEY}\nX-More: 1", f"{KEY} more", f"{KEY}é", ""])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="LOCFT_ENDPOINT_KEY is no key") as caught:
        endpoint_at("http://localhost", key=key)
    assert KEY not in str(caught.value)


# What is asked, and what comes of it.


def test_prompts_are_sent_to_completions_and_answers_come_back_as_they_are() -> None:
    texts = {"one": "  a. b\n\nc ", "two": "", "Zürich 日本 🦜 \n": "Ωμέγα 🎉\u2028 \x00"}
    with serving(texts.__getitem__) as server:
        endpoint = endpoint_at(f"{server.url}/")
        assert asked(endpoint, *texts, max_new_tokens=7, stop=("\n", ".")) == texts
    assert sorted(server.prompts) == sorted(texts)
    for request in server.received:
        assert request.path == "/v1/completions"
        assert request.headers["authorization"] == f"Bearer {KEY}"
        assert request.body == {
            "model": "tiny",
            "prompt": request.prompt,
            "max_tokens": 7,
            "temperature": 0,
            "n": 1,
            "stop": ["\n", "."],
        }


def test_a_chat_is_one_message_of_the_user() -> None:
    with serving(echo) as server:
        assert asked(endpoint_at(server.url, key=None), "hi", chat=True) == {"hi": "Answer to hi"}
    [request] = server.received
    assert request.path == "/v1/chat/completions"
    assert "authorization" not in request.headers
    assert request.body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 32,
        "temperature": 0,
        "n": 1,
    }


def test_half_characters_are_replaced_in_answers_and_survive_in_prompts() -> None:
    body = b'{"choices": [{"text": "a \\ud83d b \\ud83d\\ude00"}]}'
    with serving(echo, replies(200, body)) as server:
        assert asked(endpoint_at(server.url), "\ud83d") == {"\ud83d": "a \ufffd b 😀"}
        assert server.prompts == ["\ud83d"]


def test_repeated_prompts_are_asked_once_and_answers_keep_the_order_of_the_prompts() -> None:
    with serving(echo) as server:
        assert list(asked(endpoint_at(server.url), "b", "a", "b", "c", "a")) == ["b", "a", "c"]
        assert sorted(server.prompts) == ["a", "b", "c"]
        assert asked(endpoint_at(server.url)) == {}


def test_answers_do_not_depend_on_the_order_in_which_they_arrive() -> None:
    def slow_at_random(prompt: str) -> str:
        time.sleep(random.Random(prompt).uniform(0, 0.02))
        return echo(prompt)

    with serving(slow_at_random) as server:
        forward = asked(endpoint_at(server.url), *PROMPTS)
        backward = asked(endpoint_at(server.url, max_concurrent=3), *reversed(PROMPTS))
    assert forward == backward == {prompt: echo(prompt) for prompt in PROMPTS}
    assert list(forward) == PROMPTS


def test_as_many_requests_are_under_way_as_may_be_and_no_more() -> None:
    together = threading.Barrier(3)

    def wait_for_others(prompt: str) -> str:
        together.wait(10)  # fails where fewer come
        return echo(prompt)

    with serving(wait_for_others) as server:
        assert len(asked(endpoint_at(server.url, max_concurrent=3), *PROMPTS[:9])) == 9
        assert server.most_at_once == 3


def test_a_terminal_sees_how_far_it_is(monkeypatch: pytest.MonkeyPatch, cache_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    with serving(echo) as server, AnswerCache(cache_path) as cache:
        asked(endpoint_at(server.url), "a", cache=cache)
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setenv("TERM", "xterm")
        asked(endpoint_at(server.url), "a", "b", cache=cache, label="answering, edited")
    assert "answering, edited" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()


# What may pass.


@pytest.mark.parametrize(
    "fault",
    [
        *(pytest.param(replies(n), id=f"{n}") for n in (408, 409, 425, 429, 500, 502, 503, 504, 529)),
        pytest.param(hang_up, id="hangs-up"),
        pytest.param(replies(200, b'{"choices": [{"text": "cut o'), id="cut-off"),
        pytest.param(
            replies(200, b'{"choi', {"Content-Length": "99", "Connection": "close"}), id="short"
        ),
        pytest.param(replies(200, b"<html>busy</html>"), id="no-json"),
        pytest.param(replies(200, b"\xff\xfe"), id="no-text"),
        pytest.param(replies(200, b"[" * 100_000), id="deep"),
        pytest.param(replies(200, b""), id="empty"),
        pytest.param(replies(204), id="no-content"),
        *(
            pytest.param(replies(200, json.dumps(record).encode()), id=f"shape-{number}")
            for number, record in enumerate(WRONG_SHAPES)
        ),
    ],
)
def test_what_may_pass_is_tried_again(fault: Fault) -> None:
    with serving(echo, fault, fault) as server:
        assert asked(endpoint_at(server.url), "a") == {"a": "Answer to a"}
        assert len(server.received) == 3


def test_a_reply_that_takes_too_long_is_tried_again() -> None:
    with serving(echo, hang) as server:
        assert asked(endpoint_at(server.url, timeout_s=0.3), "a") == {"a": "Answer to a"}
        assert len(server.received) >= 2


def test_a_reply_that_never_ends_is_tried_again() -> None:
    with serving(echo, drip) as server:
        assert asked(endpoint_at(server.url, timeout_s=0.3), "a") == {"a": "Answer to a"}
        assert len(server.received) >= 2


@pytest.mark.parametrize(
    "retry_after",
    [
        "3600",
        "3600.5",
        "9" * 400,
        formatdate(time.time() + 3600, usegmt=True),
        formatdate(time.time() + 3600),  # of no named zone
    ],
    ids=["seconds", "half-seconds", "endless", "date", "date-without-zone"],
)
def test_the_wait_that_a_server_asks_for_is_kept_up_to_a_limit(retry_after: str) -> None:
    with serving(echo, replies(429, headers={"Retry-After": retry_after})) as server:
        start = time.monotonic()
        asked(endpoint_at(server.url, max_wait_s=0.2), "a")
        assert 0.2 <= time.monotonic() - start < 10


@pytest.mark.parametrize(
    "retry_after", ["0", "-5", "nan", "soon", "", formatdate(0, usegmt=True), "Mon, 99 Jan 99999 1:1:1"]
)
def test_a_wait_that_is_over_or_makes_no_sense_is_left_out(retry_after: str) -> None:
    with serving(echo, replies(503, headers={"Retry-After": retry_after})) as server:
        start = time.monotonic()
        asked(endpoint_at(server.url), "a")
        assert time.monotonic() - start < 10


def test_waits_grow_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("locft.evaluation.endpoint._Halt.wait", lambda _, seconds: waits.append(seconds))
    with serving(echo, *[replies(500)] * 5) as server:
        asked(endpoint_at(server.url, first_wait_s=1.0, max_wait_s=5.0), "a")
    for wait, longest in zip(waits, (1, 2, 4, 8, 16), strict=True):
        assert min(longest / 2, 5) <= wait <= min(longest, 5)


# What does not pass.


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            replies(503, b'{"error": {"message": "model is loading"}}'),
            "answered 503: 'model is loading'",
        ),
        (replies(500), "the last one: the server answered 500; "),
        (replies(200, b"<html>"), "its reply is no JSON"),
        (replies(200, b'{"object": "error"}'), 'its reply holds no answer: \'{"object": "error"}\''),
        (hang_up, "disconnected"),
    ],
)
def test_after_the_last_attempt_it_says_what_failed(fault: Fault, said: str) -> None:
    with serving(echo, *[fault] * 3) as server, pytest.raises(EvaluationError) as caught:
        asked(endpoint_at(server.url, max_attempts=3), "a")
    assert f"{server.url}/completions: no answer in 3 attempts" in str(caught.value)
    assert said in str(caught.value)
    assert "no answer is kept" in str(caught.value)
    assert len(server.received) == 3


def test_a_server_that_is_not_there_is_an_error_with_the_reason() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        port = taken.getsockname()[1]
        with pytest.raises(EvaluationError, match=r"no answer in 2 attempts; .*refused"):
            asked(endpoint_at(f"http://127.0.0.1:{port}/v1", max_attempts=2), *PROMPTS)


def test_a_run_goes_on_where_a_server_that_died_left_it(cache_path: Path) -> None:
    with serving(echo) as server:

        def die_after_four(prompt: str) -> str:
            server.is_dead = len(server.received) >= 4
            return echo(prompt)

        server.answer = die_after_four
        endpoint = endpoint_at(server.url, max_attempts=2, max_concurrent=1)
        with (
            pytest.raises(EvaluationError, match=r"; 4 answers are kept in .*running again") as caught,
            AnswerCache(cache_path, keep=False) as cache,
        ):
            asked(endpoint, *PROMPTS, cache=cache)
        assert str(cache_path) in str(caught.value)
        server.is_dead = False
        server.answer = echo
        server.received.clear()
        with AnswerCache(cache_path, keep=False) as cache:
            assert asked(endpoint, *PROMPTS, cache=cache) == {prompt: echo(prompt) for prompt in PROMPTS}
            assert cache.num_found == 4
        # What was on its way when the run broke off may arrive late, too.
        assert set(server.prompts) == set(PROMPTS[4:])
        # The run is whole, and the server may get another model now.
        with AnswerCache(cache_path, keep=False) as cache:
            asked(endpoint, *PROMPTS, cache=cache)
            assert cache.num_found == 0


def test_kept_answers_need_no_server(cache_path: Path) -> None:
    with serving(echo) as server, AnswerCache(cache_path) as cache:
        answers = asked(endpoint_at(server.url), *PROMPTS, cache=cache)
    with AnswerCache(cache_path) as cache:
        assert asked(endpoint_at(server.url, key="another"), *PROMPTS, cache=cache) == answers


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 33}, {"stop": (".",)}, {"chat": True}], ids=["tokens", "stop", "chat"]
)
def test_answers_to_another_question_are_not_taken(cache_path: Path, options: dict[str, Any]) -> None:
    with serving(echo) as server, AnswerCache(cache_path) as cache:
        asked(endpoint_at(server.url), "a", cache=cache)
        asked(endpoint_at(server.url), "a", cache=cache, **options)
        assert len(server.received) == 2


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (
            400,
            b'{"error": {"message": "too long: 9000 tokens"}}',
            "answered 400: 'too long: 9000 tokens'",
        ),
        (400, b'{"object": "error", "message": "no\\u001b[31m"}', r"400: 'no\x1b[31m'"),
        (422, b'{"detail": "no stop"}', "answered 422: 'no stop'"),
        (413, b"x" * 5000, "answered 413: 'xxx"),
        (405, b"", "answered 405; it refuses this request, so it was not tried again: 'the prompt'"),
        (401, b'{"error": "who?"}', "answered 401: 'who?'; LOCFT_ENDPOINT_KEY is wrong"),
        (403, b'{"detail": {}}', "LOCFT_ENDPOINT_KEY is wrong, or may not use this model"),
        (404, b"", "no model 'tiny': see to LOCFT_ENDPOINT_URL (mostly it ends in /v1)"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(status: int, body: bytes, said: str) -> None:
    with serving(echo, replies(status, body)) as server, pytest.raises(InputError) as caught:
        asked(endpoint_at(server.url), "the prompt")
    assert said in str(caught.value)
    assert f"{server.url}/completions: the server answered {status}" in str(caught.value)
    assert len(str(caught.value)) < 600
    assert len(server.received) == 1


def test_a_chat_that_is_refused_is_shown_too() -> None:
    with serving(echo, replies(400)) as server, pytest.raises(InputError, match="the prompt"):
        asked(endpoint_at(server.url), "the prompt", chat=True)


def test_a_missing_key_is_said_to_be_missing() -> None:
    with (
        serving(echo, replies(401)) as server,
        pytest.raises(InputError, match="LOCFT_ENDPOINT_KEY is missing"),
    ):
        asked(endpoint_at(server.url, key=None), "a")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with serving(echo) as other:
        target = {"Location": f"{other.url}/completions?{KEY}"}
        with (
            serving(echo, replies(status, headers=target)) as server,
            pytest.raises(InputError, match=f"answered {status} and points to .*not followed") as caught,
        ):
            asked(endpoint_at(server.url), "a")
    assert other.received == []
    assert other.url in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_reply_without_end_is_not_read_to_its_end() -> None:
    huge = replies(200, b" " * (10 * 2**20 + 1))
    with serving(echo, huge) as server, pytest.raises(InputError, match="larger than 10,485,760 bytes"):
        asked(endpoint_at(server.url), "a")


def test_one_failure_ends_the_others_at_once() -> None:
    with serving(
        echo, hang, hang, replies(500, headers={"Retry-After": "3600"}), replies(401)
    ) as server:
        start = time.monotonic()
        with pytest.raises(InputError, match="401"):
            asked(endpoint_at(server.url, max_concurrent=4), *map(str, range(1000)))
        assert time.monotonic() - start < 5
        assert len(server.received) < 200


def test_answers_of_what_was_asked_before_count_as_kept(cache_path: Path) -> None:
    with serving(echo) as server, AnswerCache(cache_path, keep=False) as cache:
        endpoint = endpoint_at(server.url, max_attempts=1)
        asked(endpoint, *PROMPTS[:3], cache=cache)
        server.is_dead = True
        with pytest.raises(EvaluationError, match="; 3 answers are kept in "):
            asked(endpoint, *PROMPTS[3:], cache=cache)


@pytest.fixture
def _heeds_interrupts() -> Iterator[None]:
    """What a shell starts in the background ignores interrupts, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heeds_interrupts")
def test_an_interrupt_ends_all_at_once_and_answers_are_kept(cache_path: Path) -> None:
    def interrupt(prompt: str) -> str:
        if prompt == PROMPTS[2]:
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)
            server.closing.wait(10)
        return echo(prompt)

    with serving(interrupt) as server:
        endpoint = endpoint_at(server.url, max_concurrent=1)
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt), AnswerCache(cache_path, keep=False) as cache:
            asked(endpoint, *PROMPTS, cache=cache)
        assert time.monotonic() - start < 5
        assert server.prompts == PROMPTS[:3]
        with AnswerCache(cache_path) as cache:
            assert asked(endpoint, *PROMPTS[:2], cache=cache) == {p: echo(p) for p in PROMPTS[:2]}
            assert cache.num_found == 2


def test_a_damaged_cache_ends_all(cache_path: Path) -> None:
    def damage(prompt: str) -> str:
        cache_path.write_bytes(b"no database" * 1000)
        return echo(prompt)

    with (
        serving(damage) as server,
        AnswerCache(cache_path) as cache,
        pytest.raises(InputError, match="delete it"),
    ):
        asked(endpoint_at(server.url, max_concurrent=1), *PROMPTS, cache=cache)


# The key.


def _says_the_key(status: int) -> Fault:
    return replies(status, json.dumps({"error": {"message": f"no such key: {KEY}"}}).encode())


@pytest.mark.parametrize(
    "fault",
    [
        *(
            pytest.param(_says_the_key(status), id=f"{status}")
            for status in (200, 400, 401, 403, 404, 500)
        ),
        pytest.param(replies(400, ("x" * 90 + KEY + "x" * 9000).encode()), id="where-it-is-shortened"),
        pytest.param(replies(200, f'{{"{KEY}": 1, "{KEY}": 2}}'.encode()), id="double-field"),
        pytest.param(hang_up, id="hangs-up"),
    ],
)
def test_no_error_shows_the_key(
    fault: Fault,
    cache_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(echo, *[fault] * 2) as server:
        endpoint = endpoint_at(server.url, max_attempts=2)
        with pytest.raises(LocftError) as caught, AnswerCache(cache_path) as cache:
            asked(endpoint, "a", cache=cache)
        assert server.received[0].headers["authorization"] == f"Bearer {KEY}"  # or nothing is shown
    assert caplog.text  # httpx2 does log
    shown = "".join(traceback.format_exception(caught.value))
    for text in (shown, repr(caught.value), repr(endpoint), caplog.text, *capfd.readouterr()):
        assert KEY not in text
        assert KEY[:12] not in text


def test_no_error_shows_the_key_where_the_reply_is_no_http() -> None:
    def babble(handler: Any) -> None:
        handler.wfile.write(f"HTTP/1.1 {KEY}\r\n\r\n".encode())
        handler.close_connection = True

    with serving(echo, babble) as server, pytest.raises(EvaluationError) as caught:
        asked(endpoint_at(server.url, max_attempts=1), "a")
    assert "***" in str(caught.value)
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_the_key_is_not_kept(cache_path: Path) -> None:
    with serving(echo) as server, AnswerCache(cache_path) as cache:
        asked(endpoint_at(server.url), *PROMPTS, cache=cache)
    assert echo(PROMPTS[0]).encode() in cache_path.read_bytes()
    assert KEY.encode() not in cache_path.read_bytes()


@pytest.mark.parametrize("act", [repr, str, lambda endpoint: f"{endpoint}"])
def test_an_endpoint_does_not_show_its_key(act: Callable[[Endpoint], str]) -> None:
    shown = act(endpoint_at("http://localhost"))
    assert "tiny" in shown
    assert KEY not in shown
