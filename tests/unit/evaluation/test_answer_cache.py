import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from locft.errors import InputError
from locft.evaluation import answer_cache
from locft.evaluation.answer_cache import AnswerCache, Request, default_cache_path

URL = "http://localhost:8000/v1/completions"


def request_of(prompt: str, **more: object) -> Request:
    return Request(url=URL, body={"model": "m", "prompt": prompt, **more})


def contents(path: Path) -> dict[str, str]:
    with AnswerCache(path) as cache:
        found = {prompt: cache.get(request_of(prompt)) for prompt in "abcdef"}
    return {prompt: answer for prompt, answer in found.items() if answer is not None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "answers.sqlite"


def test_answers_are_there_for_the_next_who_opens_the_file(path: Path) -> None:
    with AnswerCache(path) as cache:
        assert cache.get(request_of("a")) is None
        cache.put(request_of("a"), "Zürich 日本\n")
        cache.put(request_of("b"), "")
        assert cache.get(request_of("a")) == "Zürich 日本\n"
    assert contents(path) == {"a": "Zürich 日本\n", "b": ""}


def test_a_later_answer_replaces_an_earlier_one(path: Path) -> None:
    with AnswerCache(path) as cache:
        cache.put(request_of("a"), "one")
        cache.put(request_of("a"), "two")
    assert contents(path) == {"a": "two"}


def test_requests_are_the_same_whatever_the_order_of_their_keys() -> None:
    one = Request(url=URL, body={"model": "m", "stop": ["."], "more": {"a": 1, "b": 2}})
    same = Request(url=URL, body={"more": {"b": 2, "a": 1}, "stop": ["."], "model": "m"})
    assert one.digest() == same.digest()


@pytest.mark.parametrize(
    "other",
    [
        request_of("b"),
        request_of("a", max_tokens=1),
        request_of("a", model="n"),
        Request(url=f"{URL}/", body=request_of("a").body),
    ],
)
def test_another_address_model_or_setting_is_another_request(other: Request) -> None:
    assert request_of("a").digest() != other.digest()


def test_it_counts_what_it_found(path: Path) -> None:
    with AnswerCache(path) as cache:
        cache.put(request_of("a"), "one")
        for prompt in "aba":
            cache.get(request_of(prompt))
        assert cache.num_found == 2


def test_answers_that_are_not_to_stay_go_when_the_body_is_done(path: Path) -> None:
    with AnswerCache(path) as cache:
        cache.put(request_of("a"), "one")
        cache.put(request_of("b"), "two")
    with AnswerCache(path, keep=False) as cache:
        cache.get(request_of("b"))
        cache.put(request_of("c"), "three")
    assert contents(path) == {"a": "one"}  # which nobody had asked for


@pytest.mark.parametrize("error", [InputError("no"), KeyboardInterrupt()])
def test_answers_that_are_not_to_stay_stay_until_a_run_is_whole(
    path: Path, error: BaseException
) -> None:
    def run() -> None:
        with AnswerCache(path, keep=False) as cache:
            cache.put(request_of("a"), "one")
            raise error

    with pytest.raises(type(error)):
        run()
    assert contents(path) == {"a": "one"}


@pytest.mark.parametrize("data", [b"no database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 5000])
def test_a_damaged_file_is_to_be_deleted(path: Path, data: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"is damaged: .*; delete it and run again") as caught:
        AnswerCache(path)
    assert str(path) in str(caught.value)
    path.unlink()
    assert contents(path) == {}


def test_a_file_that_is_cut_off_gives_an_error_and_no_answer(path: Path) -> None:
    with AnswerCache(path) as cache:
        for prompt in "abcdef":
            cache.put(request_of(prompt), "long " * 2000)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + b"\xff" * (len(data) - len(data) // 2))
    with pytest.raises(InputError, match="damaged"):
        contents(path)


def test_an_answer_that_is_no_text_is_damage(path: Path) -> None:
    contents(path)
    database = sqlite3.connect(path)
    with database:
        database.execute("INSERT INTO answers VALUES (?, ?)", (request_of("a").digest(), b"\xff"))
    database.close()
    with pytest.raises(InputError, match="damaged: an answer is no text"):
        contents(path)


def test_a_path_that_cannot_be_written_to_is_refused_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (tmp_path, file / "answers.sqlite"):
        with pytest.raises(InputError, match=r"cannot be used: .*export LOCFT_CACHE=FOLDER") as caught:
            AnswerCache(path)
        assert str(path) in str(caught.value)


def test_a_file_that_stays_locked_is_refused_with_the_reason(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents(path)
    monkeypatch.setattr(answer_cache, "_BUSY_S", 0.02)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(InputError, match="cannot be used: database is locked"):
        contents(path)
    other.close()


def test_threads_and_other_writers_may_use_the_file_at_the_same_time(path: Path) -> None:
    with AnswerCache(path) as one, AnswerCache(path) as two, ThreadPoolExecutor(6) as pool:
        for number, cache in enumerate((one, two) * 20):
            pool.submit(cache.put, request_of(f"{number}"), f"answer {number}")
    with AnswerCache(path) as cache:
        found = [cache.get(request_of(f"{number}")) for number in range(40)]
    assert found == [f"answer {number}" for number in range(40)]


def test_the_default_file_is_in_the_folder_for_what_is_computed_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOCFT_CACHE", str(tmp_path))
    assert default_cache_path() == tmp_path / "answers.sqlite"
