import hashlib
import json
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, tiny_llama_config
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from locft.errors import InputError, LocftError
from locft.evaluation import drift as drift_module
from locft.evaluation.drift import (
    Drift,
    Forward,
    NeutralText,
    Passage,
    measure_drift,
    read_neutral_text,
)
from locft.evaluation.metrics import mean_per_token
from locft.types import Figure

PASSAGES = (
    Passage(kind="prose", text="The capital of France is Paris."),
    Passage(kind="prose", text="Where does the river begin? " * 20),
    Passage(kind="code", text="x = play(chess)"),
    Passage(kind="code", text="a"),  # one token: nothing in it is predicted
    Passage(kind="talk", text="What sport does she play? tennis"),
    Passage(kind="talk", text=""),
)
CPU = torch.device("cpu")


def text_of(*passages: Passage) -> NeutralText:
    return NeutralText(name="test", sha256="0", passages=passages)


def forward_of(model: PreTrainedModel) -> Forward:
    def forward(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    return forward


def two_models() -> tuple[PreTrainedModel, PreTrainedModel]:
    models = make_model(tiny_llama_config(), 0), make_model(tiny_llama_config(), 1)
    with torch.no_grad():
        for model in models:  # predictions that are worth comparing
            model.get_parameter("model.embed_tokens.weight").mul_(20)
    return models


def naive_kl(before: PreTrainedModel, after: PreTrainedModel, ids: list[int]) -> list[float]:
    """KL at each position, over one unpadded passage, in float64."""
    with torch.no_grad():
        p = before(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
        q = after(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
    return [float((p[t] * (p[t].log() - q[t].log())).sum()) for t in range(len(ids) - 1)]


def measured(before: Forward, after: Forward, tokenizer: Any, *passages: Passage) -> Drift:
    return measure_drift(before, after, tokenizer, text_of(*passages), CPU)


def test_drift_is_the_kl_of_each_passage_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    before, after = two_models()
    drift = measured(forward_of(before), forward_of(after), tokenizer, *PASSAGES)
    kls = {
        passage: naive_kl(before, after, tokenizer(passage.text)["input_ids"])
        for passage in (PASSAGES[0], PASSAGES[1], PASSAGES[2], PASSAGES[4])
    }
    everything = [kl for values in kls.values() for kl in values]
    mean = sum(everything) / len(everything)
    assert mean > 0.1
    assert drift.overall.value == pytest.approx(mean, rel=1e-4)
    assert drift.num_tokens == len(everything)
    assert drift.overall.num == 4
    reverse = measured(forward_of(after), forward_of(before), tokenizer, *PASSAGES).overall.value
    assert reverse != pytest.approx(mean, rel=1e-2)  # KL has a direction


def test_each_kind_has_its_own_mean_weighted_by_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    before, after = two_models()
    drift = measured(forward_of(before), forward_of(after), tokenizer, *PASSAGES)
    assert list(drift.by_kind) == ["code", "prose", "talk"]
    sums, counts = [], []
    for passage in PASSAGES[:2]:
        kls = naive_kl(before, after, tokenizer(passage.text)["input_ids"])
        sums.append(sum(kls))
        counts.append(len(kls))
    expected = mean_per_token(sums, counts)
    prose = drift.by_kind["prose"]
    assert (prose.value, prose.low, prose.high) == pytest.approx(
        (expected.value, expected.low, expected.high), rel=1e-4
    )
    assert {kind: figure.num for kind, figure in drift.by_kind.items()} == {
        "code": 1,
        "prose": 2,
        "talk": 1,
    }


def test_equal_models_do_not_drift(tokenizer: PreTrainedTokenizerBase) -> None:
    forward = forward_of(two_models()[0])
    drift = measured(forward, forward, tokenizer, *PASSAGES)
    assert (drift.overall.value, drift.overall.low, drift.overall.high) == (0.0, 0.0, 0.0)


def test_what_stands_at_padding_does_not_count(tokenizer: PreTrainedTokenizerBase) -> None:
    before, after = two_models()
    lengths = [len(tokenizer(passage.text)["input_ids"]) for passage in PASSAGES]
    shapes: list[tuple[int, ...]] = []

    def spoilt(ids: Tensor) -> Tensor:
        shapes.append(tuple(ids.shape))
        logits = forward_of(after)(ids)
        for row in range(len(ids)):
            end = next(n for n in lengths if n > 1 and is_row(ids[row], n))
            # The last token's prediction has nothing to be compared with; the rest is padding.
            logits[row, end - 1 :] = float("nan")
        return logits

    def is_row(row: Tensor, length: int) -> bool:
        rows = [tokenizer(passage.text)["input_ids"] for passage in PASSAGES]
        return any(len(ids) == length and row[:length].tolist() == ids for ids in rows)

    drift = measured(forward_of(before), spoilt, tokenizer, *PASSAGES)
    clean = measured(forward_of(before), forward_of(after), tokenizer, *PASSAGES)
    assert any(rows > 1 for rows, _ in shapes)  # or nothing would be padded
    assert drift == clean


def test_the_order_of_the_passages_only_orders_the_resampling(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    before, after = (forward_of(model) for model in two_models())
    drift = measured(before, after, tokenizer, *PASSAGES)
    again = measured(before, after, tokenizer, *reversed(PASSAGES))
    assert again.overall.value == pytest.approx(drift.overall.value, rel=1e-6)
    assert again.by_kind.keys() == drift.by_kind.keys()


def test_few_tokens_are_passed_at_a_time_however_long_a_passage_is(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    shapes: list[tuple[int, ...]] = []

    def forward(ids: Tensor) -> Tensor:
        shapes.append(tuple(ids.shape))
        return torch.zeros(*ids.shape, 4)

    short = [Passage(kind="s", text="chess " * 100) for _ in range(25)]
    drift = measured(forward, forward, tokenizer, *short, Passage(kind="l", text="chess " * 3000))
    assert max(length for _, length in shapes) == 1024
    assert all(rows * length <= 1024 for rows, length in shapes)
    windows = -(-len(tokenizer("chess " * 3000)["input_ids"]) // 1024)
    assert windows > 1
    assert drift.overall.num == 25 + windows
    assert sum(rows for rows, _ in shapes) == 2 * (25 + windows)


MANY = (
    *PASSAGES,
    Passage(kind="talk", text="Who wrote the play? London"),
    Passage(kind="code", text="painter = singer(physicist)"),
    Passage(kind="prose", text="Oslo, Vienna, Madrid and Berlin."),
    Passage(kind="prose", text="The capital of Italy is Rome, and the river begins there."),
)


def beginning_of(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:399]}…"


def test_passages_add_up_to_the_figures(tokenizer: PreTrainedTokenizerBase) -> None:
    before, after = (forward_of(model) for model in two_models())
    drift = measured(before, after, tokenizer, *MANY)
    # Of one token or none nothing is predicted.
    assert [passage.passage for passage in drift.passages] == list(range(1, len(MANY) - 1))
    of_two = [passage for passage in MANY if len(tokenizer(passage.text)["input_ids"]) > 1]
    assert [passage.kind for passage in drift.passages] == [passage.kind for passage in of_two]
    assert sum(passage.num_tokens for passage in drift.passages) == drift.num_tokens
    for kind, figure in (("", drift.overall), *drift.by_kind.items()):
        ours = [passage for passage in drift.passages if kind in ("", passage.kind)]
        assert figure.num == len(ours)
        mean = sum(passage.drift * passage.num_tokens for passage in ours) / sum(
            passage.num_tokens for passage in ours
        )
        assert figure.value == pytest.approx(mean)


def test_passages_are_in_the_order_of_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    before, after = two_models()
    drift = measured(forward_of(before), forward_of(after), tokenizer, *MANY)
    of_two = [passage for passage in MANY if len(tokenizer(passage.text)["input_ids"]) > 1]
    for passage, found in zip(of_two, drift.passages, strict=True):
        kls = naive_kl(before, after, tokenizer(passage.text)["input_ids"])
        assert found.num_tokens == len(kls)
        assert found.drift == pytest.approx(sum(kls) / len(kls), rel=1e-4)


def test_the_passages_that_moved_most_are_told_with_how_they_begin(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    before, after = (forward_of(model) for model in two_models())
    drift = measured(before, after, tokenizer, *MANY)
    farthest = sorted(drift.passages, key=lambda passage: -passage.drift)
    assert len(farthest) > 5
    assert [moved.drift for moved in drift.most_moved] == [one.drift for one in farthest[:5]]
    of_two = [passage for passage in MANY if len(tokenizer(passage.text)["input_ids"]) > 1]
    for moved in drift.most_moved:
        passage = drift.passages[moved.passage - 1]
        told = (passage.passage, passage.kind, passage.num_tokens, passage.drift)
        assert (moved.passage, moved.kind, moved.num_tokens, moved.drift) == told
        assert moved.text == beginning_of(of_two[moved.passage - 1].text)


@pytest.mark.parametrize("num_chars", [399, 400, 401, 3000])
def test_of_a_long_passage_the_beginning_is_told(
    num_chars: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    before, after = (forward_of(model) for model in two_models())
    text = ("chess, tennis; " * 300)[:num_chars]
    drift = measured(before, after, tokenizer, Passage(kind="prose", text=text))
    for moved in drift.most_moved:
        whole = tokenizer.decode(tokenizer(text)["input_ids"][(moved.passage - 1) * 1024 :])
        assert isinstance(whole, str)
        assert moved.text == beginning_of(whole)


def test_of_a_long_passage_the_beginning_is_told_however_many_tokens_a_character_has(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    before, after = (forward_of(model) for model in two_models())
    for text in ("パリはフランスの首都。" * 20, "パリはフランスの首都。" * 40):  # bytes are its tokens
        drift = measured(before, after, tokenizer, Passage(kind="prose", text=text))
        [first] = [moved for moved in drift.most_moved if moved.passage == 1]
        whole = tokenizer.decode(tokenizer(text)["input_ids"][:1024])
        assert isinstance(whole, str)
        assert first.text == beginning_of(whole)


def test_of_an_unedited_model_no_passage_moved(tokenizer: PreTrainedTokenizerBase) -> None:
    forward = forward_of(two_models()[0])
    drift = measured(forward, forward, tokenizer, *MANY)
    assert drift.most_moved == ()
    assert {passage.drift for passage in drift.passages} == {0.0}


def test_fewer_passages_than_five_moved_most_are_all_that_moved(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    before, after = (forward_of(model) for model in two_models())
    drift = measured(before, after, tokenizer, *PASSAGES)
    assert sorted(moved.passage for moved in drift.most_moved) == [1, 2, 3, 4]


def test_of_passages_that_moved_alike_the_first_come_first(tokenizer: PreTrainedTokenizerBase) -> None:
    before, after = (forward_of(model) for model in two_models())
    drift = measured(before, after, tokenizer, *[PASSAGES[0]] * 7)
    assert len({passage.drift for passage in drift.passages}) == 1
    assert [moved.passage for moved in drift.most_moved] == [1, 2, 3, 4, 5]


def test_text_without_a_passage_of_two_tokens_gives_no_value(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    forward = forward_of(two_models()[0])
    drift = measured(forward, forward, tokenizer, PASSAGES[3], PASSAGES[5])
    assert drift.overall == Figure(value=None, num=0, reason="the text holds no passage of two tokens")
    assert (drift.by_kind, drift.num_tokens) == ({}, 0)


def test_a_model_that_predicts_no_numbers_is_not_reported_as_unmoved(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    before = forward_of(two_models()[0])

    def broken(ids: Tensor) -> Tensor:
        return torch.full_like(before(ids), float("nan"))

    try:
        drift = measured(before, broken, tokenizer, *PASSAGES)
    except LocftError:
        return
    assert drift.overall.value != 0.0


def test_the_packaged_text_holds_four_kinds_and_4000_tokens_of_any_tokenizer() -> None:
    text = read_neutral_text(None)
    assert text.name == "packaged"
    kinds = Counter(passage.kind for passage in text.passages)
    assert set(kinds) == {"encyclopedic", "narrative", "dialogue", "code"}
    assert min(kinds.values()) >= 8
    # No tokenizer in use joins words, so that there are as many tokens as words at least.
    assert sum(len(passage.text.split()) for passage in text.passages) >= 4000
    assert len({passage.text for passage in text.passages}) == len(text.passages)


def test_plain_text_is_split_at_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    data = "\ufeffOne\nstill one.\r\n\r\nTwo ü.\n\n\n\n  Three\n".encode()
    file.write_bytes(data)
    text = read_neutral_text(str(file))
    assert [passage.text for passage in text.passages] == ["One\nstill one.", "Two ü.", "Three"]
    assert {passage.kind for passage in text.passages} == {"text"}
    assert text.name == str(file)
    assert text.sha256 == hashlib.sha256(data).hexdigest()


def test_a_line_of_spaces_is_a_blank_line(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One.\n \t\nTwo.\n")
    assert [passage.text for passage in read_neutral_text(str(file)).passages] == ["One.", "Two."]


def test_jsonl_has_a_passage_a_line(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    first = {"text": "One\u2028still one", "kind": "odd", "more": 1}
    file.write_text(json.dumps(first, ensure_ascii=False) + '\n\n{"text": "Two"}', "utf-8")
    assert read_neutral_text(str(file)).passages == (
        Passage(kind="odd", text="One\u2028still one"),
        Passage(kind="text", text="Two"),
    )


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"", "holds no passage"),
        ("a.txt", b"\n \n\n", "holds no passage"),
        ("a.jsonl", b"\n", "holds no passage"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.jsonl", b'{"text": "One"}\n{"text": "Tw', "line 2: no JSON"),
        ("a.jsonl", b'{"text": "One"}\n\n"Two"', 'line 3: expected an object with a "text"'),
        ("a.jsonl", b'{"txt": "One"}', 'line 1: expected an object with a "text"'),
        ("a.jsonl", b'{"text": 1}', 'line 1: expected an object with a "text"'),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: the text holds half of a character"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(
    tmp_path: Path, name: str, data: bytes, said: str
) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_neutral_text(str(file))
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_neutral_text(str(path))


def test_a_long_passage_is_measured_to_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    before, after = (forward_of(model) for model in two_models())
    text = NeutralText(
        name="long", sha256="", passages=(Passage(kind="text", text="Who wrote the play? " * 30),)
    )
    num_tokens = len(tokenizer(text.passages[0].text)["input_ids"])
    drift = measure_drift(before, after, tokenizer, text, torch.device("cpu"), 50)
    windows = -(-num_tokens // 50)
    assert drift.overall.num == windows
    # The first token of each window is given, not predicted.
    assert drift.num_tokens == num_tokens - windows


def test_one_passage_has_no_interval(tokenizer: PreTrainedTokenizerBase) -> None:
    before, after = (forward_of(model) for model in two_models())
    drift = measured(before, after, tokenizer, PASSAGES[0])
    assert drift.overall.value is not None
    assert (drift.overall.low, drift.overall.high) == (None, None)
    assert drift.overall.reason


def test_the_logits_of_one_pass_are_gone_before_those_of_the_next_are_there(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift_module, "TOKENS_PER_PASS", 1)
    before, after = (forward_of(model) for model in two_models())
    given: list[weakref.ref[Tensor]] = []

    def watched(ids: Tensor) -> Tensor:
        assert all(logits() is None for logits in given)
        logits = before(ids)
        given.append(weakref.ref(logits))
        return logits

    measured(watched, after, tokenizer, *PASSAGES)
    assert len(given) == 4


def test_long_passages_are_compared_piece_by_piece_with_the_same_result(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = (forward_of(model) for model in two_models())
    whole = measured(before, after, tokenizer, *PASSAGES)
    monkeypatch.setattr(drift_module, "_POSITIONS_AT_ONCE", 3)
    pieces = measured(before, after, tokenizer, *PASSAGES)
    assert pieces.overall.value == pytest.approx(whole.overall.value, rel=1e-5)
    assert pieces.num_tokens == whole.num_tokens
