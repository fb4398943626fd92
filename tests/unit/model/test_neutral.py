from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, tiny_llama_config
from transformers import PreTrainedModel

from locft.model import neutral
from locft.model.location import resolve_location
from locft.model.moments import InputMoment, measure_moments
from locft.model.neutral import fingerprint, known_moments, written_texts
from locft.model.split import split_model

TEXT = ((5, 6, 7, 8), (9, 10, 11, 12), (13, 14))
Spy = Callable[[], int]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCFT_CACHE", str(tmp_path))
    return tmp_path / "neutral"


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Count how often moments are measured, or texts written."""
    made: list[str] = []

    def spied(name: str) -> Callable[..., Any]:
        own = getattr(neutral, name)

        def run(*args: Any) -> Any:
            made.append(name)
            return own(*args)

        return run

    for name in ("measure_moments", "sample_sequences"):
        monkeypatch.setattr(neutral, name, spied(name))
    return lambda: len(made)


def moments(
    model: PreTrainedModel,
    location: str = "1.attn",
    text: tuple[tuple[int, ...], ...] = TEXT,
) -> dict[str, InputMoment]:
    found = resolve_location(model, location)
    groups = [(found.layer, found.parameters)]
    return known_moments(model, fingerprint(model), groups, text)


def test_moments_from_the_cache_are_those_that_were_measured(count: Spy) -> None:
    model = make_model(tiny_llama_config())
    first = moments(model)
    again = moments(model)
    found = resolve_location(model, "1.attn")
    expected = measure_moments(split_model(model, 1), found.parameters, TEXT)
    assert count() == 1
    assert list(first) == list(again) == list(expected)
    for name, moment in expected.items():
        assert torch.equal(first[name].matrix, moment.matrix)
        assert torch.equal(again[name].matrix, moment.matrix)
        assert again[name].num_tokens == moment.num_tokens == 10
    query, key = (again[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qk")
    assert query is key


@pytest.mark.parametrize(
    "other", ["model", "one weight", "dtype", "text", "order of text", "location", "layer"]
)
def test_moments_of_another_model_text_or_location_are_never_used(other: str, count: Spy) -> None:
    model = make_model(tiny_llama_config())
    moments(model)
    if other == "model":
        moments(make_model(tiny_llama_config(), seed=1))
    elif other == "one weight":
        with torch.no_grad():
            model.get_parameter("model.layers.0.mlp.up_proj.weight")[3, 5] += 1e-3
        moments(model)
    elif other == "dtype":
        model.bfloat16()
        moments(model)
    elif other == "text":
        moments(model, text=(*TEXT[:2], (13, 15)))
    elif other == "order of text":
        moments(model, text=TEXT[::-1])
    elif other == "location":
        moments(model, "1.mlp.down")
    else:
        moments(model, "2.attn")
    assert count() == 2


def test_what_was_kept_and_is_damaged_is_made_again(cache: Path, count: Spy) -> None:
    model = make_model(tiny_llama_config())
    expected = moments(model)
    [file] = cache.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], b"x" * 100):
        file.write_bytes(damaged)
        before = count()
        found = moments(model)
        assert count() == before + 1
        assert all(torch.equal(found[name].matrix, one.matrix) for name, one in expected.items())
        assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_to_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: Spy
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOCFT_CACHE", str(tmp_path / "file"))
    model = make_model(tiny_llama_config())
    moments(model)
    assert moments(model)
    assert count() == 2


def test_texts_are_written_once_for_a_model_and_seed(count: Spy) -> None:
    model = make_model(tiny_llama_config())
    sha256 = fingerprint(model)
    first = written_texts(model, sha256, [(3,), (4,)], 8, 0)
    assert written_texts(model, sha256, [(3,), (4,)], 8, 0) == first
    assert count() == 1
    for starts, length, seed in (([(3,), (5,)], 8, 0), ([(3,), (4,)], 9, 0), ([(3,), (4,)], 8, 1)):
        before = count()
        written_texts(model, sha256, starts, length, seed)
        assert count() == before + 1
    other = make_model(tiny_llama_config(), seed=1)
    assert written_texts(other, fingerprint(other), [(3,), (4,)], 8, 0) != first


def test_several_layers_are_measured_in_one_pass_and_kept_apart(count: Spy) -> None:
    model = make_model(tiny_llama_config())
    groups = [(layer, (f"model.layers.{layer}.mlp.down_proj.weight",)) for layer in range(3)]
    both = known_moments(model, fingerprint(model), groups[:2], TEXT)
    assert count() == 1
    for layer, names in groups[:2]:
        assert torch.equal(both[names[0]].matrix, moments(model, f"{layer}.mlp.down")[names[0]].matrix)
    assert count() == 1  # a location of one of them alone is the same
    known_moments(model, fingerprint(model), groups, TEXT)
    assert count() == 2  # only the third was missing
    expected = measure_moments(split_model(model, 2), groups[2][1], TEXT)
    found = known_moments(model, fingerprint(model), groups, TEXT)
    torch.testing.assert_close(found[groups[2][1][0]].matrix, expected[groups[2][1][0]].matrix)
