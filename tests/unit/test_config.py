import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from locft.config import (
    RunConfig,
    choices_of,
    parse_setting,
    read_config,
    to_toml,
    with_settings,
)
from locft.config import settings as all_settings
from locft.errors import ConfigError

# Any text that a file can hold: lone surrogates cannot be encoded.
TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
CONFIGS = st.builds(
    RunConfig,
    location=TEXT,
    format=st.sampled_from(["raw", "chat"]),
    lr=st.just("auto") | POSITIVE,
    batch_size=st.integers(1, 10**12),
    epochs=st.just("auto") | st.integers(1, 10**12),
    stop_loss=st.floats(min_value=0, allow_infinity=False),
    loss_mean=st.sampled_from(["sample", "token"]),
    seed=st.integers(0, 2**63),
    on_conflict=st.sampled_from(["error", "keep-last", "keep-first"]),
    dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
    device=TEXT,
    eval_batch_size=st.integers(1, 10**12),
    drift_text=st.none() | TEXT,
    revision=st.none() | TEXT,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


@given(config=CONFIGS)
@example(config=RunConfig())
@example(config=RunConfig(location="\"quoted\" 'twice' \\n C:\\dir\\ \n\r\n\t\x00\x1f end"))
@example(config=RunConfig(device="# no comment", revision="[table]", drift_text="a = 1"))
@example(config=RunConfig(location="\x7f\x80 delete"))
@example(config=RunConfig(lr=5e-324, stop_loss=1.7976931348623157e308))
@example(config=RunConfig(lr=1e16, stop_loss=0.0))
@settings(deadline=None, max_examples=200)
def test_a_written_config_reads_back_equal(module_folder: Path, config: RunConfig) -> None:
    path = write(module_folder, to_toml(config))
    # Over another base, too, but for None, which TOML cannot say.
    assert read_config(path) == config
    base = RunConfig(location="1", lr=1.0, seed=99, dtype="float32")
    assert read_config(path, base) == config


def test_what_a_file_leaves_out_is_the_bases(tmp_path: Path) -> None:
    path = write(tmp_path, "seed = 3\n")
    base = RunConfig(lr=0.5, seed=1)
    assert read_config(path, base) == RunConfig(lr=0.5, seed=3)
    assert read_config(path) == RunConfig(seed=3)
    assert base == RunConfig(lr=0.5, seed=1)


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("learning_rate", "known: location, format, lr, batch_size, "),
        ("batchsize", "did you mean 'batch_size'?"),
        ("batch-size", "did you mean 'batch_size'?"),
        ("epoch", "did you mean 'epochs'?"),
        ("locaton", "did you mean 'location'?"),
        ("on-conflicts", "did you mean 'on_conflict'?"),
        ("xyzzy", "known: location, "),
        ("", "known: location, "),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(tmp_path: Path, key: str, advice: str) -> None:
    path = write(tmp_path, f'"{key}" = 1\n')
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert f"{path}: unknown setting {key!r}: " in str(caught.value)
    assert advice in str(caught.value)


def test_a_table_is_an_unknown_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown setting 'train'"):
        read_config(write(tmp_path, "[train]\nlr = 1.0\n"))


NUMBERS = ["lr", "batch_size", "epochs", "stop_loss", "seed", "eval_batch_size"]
WHOLE = ["batch_size", "epochs", "seed", "eval_batch_size"]
TEXTS = ["location", "device", "drift_text", "revision"]


def made(values: dict[str, Any]) -> RunConfig:
    return RunConfig(**values)


def replaced(values: dict[str, Any]) -> RunConfig:
    return with_settings(RunConfig(), values)


@pytest.mark.parametrize("make", [made, replaced])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "much") for name in NUMBERS),
        *((name, True) for name in NUMBERS),
        *((name, [1]) for name in NUMBERS),
        *((name, 1.0) for name in WHOLE),
        *((name, False) for name in TEXTS),
        *((name, 2.5) for name in TEXTS),
        ("seed", "auto"),
        ("batch_size", "auto"),
        ("lr", "Auto"),
        ("format", "Raw"),
        ("format", ""),
        ("format", ["raw"]),
        ("loss_mean", "tokens"),
        ("on_conflict", "keep_last"),
        ("dtype", "float16"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name_and_value(
    make: Callable[[dict[str, Any]], RunConfig], name: str, value: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        make({name: value})
    assert str(caught.value).startswith(f"{name} is {value!r}: expected ")


def test_a_value_is_named_as_it_was_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device is 1: expected text"):
        read_config(write(tmp_path, "device = 1\n"))


@pytest.mark.parametrize(
    ("name", "least_good", "most_bad"),
    [
        ("lr", 5e-324, 0.0),
        ("lr", 5e-324, -1e-3),
        ("batch_size", 1, 0),
        ("batch_size", 1, -20),
        ("epochs", 1, 0),
        ("stop_loss", 0.0, -5e-324),
        ("seed", 0, -1),
        ("eval_batch_size", 1, 0),
    ],
)
def test_a_number_out_of_range_is_refused_and_the_bound_is_exact(
    name: str, least_good: float, most_bad: float
) -> None:
    assert getattr(made({name: least_good}), name) == least_good
    with pytest.raises(ConfigError, match=rf"^{name} is .*: expected .*number (over|of at least) 0"):
        made({name: most_bad})


def test_a_seed_beyond_what_torch_takes_is_refused() -> None:
    assert RunConfig(seed=2**64 - 1).seed == 2**64 - 1
    with pytest.raises(ConfigError, match=r"^seed is"):
        RunConfig(seed=2**64)


@pytest.mark.parametrize("name", ["lr", "stop_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is"):
        made({name: value})
    with pytest.raises(ConfigError, match=f"^{name} is"):
        parse_setting(name, str(value))
    with pytest.raises(ConfigError, match=f"{name} is"):
        read_config(write(tmp_path, f"{name} = {value}\n"))


@pytest.mark.parametrize(("name", "value"), [("lr", 1), ("stop_loss", 0), ("stop_loss", 2)])
def test_a_whole_number_will_do_where_a_float_is_expected(tmp_path: Path, name: str, value: int) -> None:
    for config in (
        read_config(write(tmp_path, f"{name} = {value}\n")),
        with_settings(RunConfig(), {name: value}),
    ):
        found = getattr(config, name)
        assert (found, type(found)) == (value, float)
    assert parse_setting(name, str(value)) == float(value)


@pytest.mark.parametrize(("name", "value"), [("lr", 1), ("stop_loss", 0)])
def test_a_whole_number_will_do_in_python_too(name: str, value: int) -> None:
    assert getattr(made({name: value}), name) == value


@pytest.mark.parametrize("name", ["lr", "stop_loss"])
def test_a_whole_number_beyond_all_floats_is_not_finite_either(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, f"{name} = 1{'0' * 400}\n")
    with pytest.raises(ConfigError, match=f"{name} is"):
        read_config(path)


@pytest.mark.parametrize("name", ["batch_size", "epochs", "eval_batch_size"])
def test_a_whole_number_beyond_all_floats_is_a_number_still(name: str) -> None:
    assert parse_setting(name, f"1{'0' * 400}") == 10**400


@pytest.mark.parametrize(
    "text",
    [
        "lr =",
        "lr: 1",
        "lr = 1\nlr = 2",
        "seed = 01",
        '"location = 1',
        "a.b.c",
        "lr = 1e",
        "seed = " + "9" * 5000,
    ],
)
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=r"run\.toml is no TOML file: "):
        read_config(path)


def test_a_file_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes('device = "é"'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.toml is no TOML file: "):
        read_config(path)


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml cannot be read: No such file"):
        read_config(tmp_path / "run.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "auto", "auto"),
        ("lr", "1e-3", 1e-3),
        ("lr", "1", 1.0),
        ("epochs", "auto", "auto"),
        ("epochs", "7", 7),
        ("batch_size", "20", 20),
        ("stop_loss", "0", 0.0),
        ("seed", "0", 0),
        ("format", "chat", "chat"),
        ("location", "20", "20"),  # a text that looks like a number
        ("device", "cuda:1", "cuda:1"),
        ("revision", "0123456", "0123456"),
        ("revision", "1e5", "1e5"),
        ("drift_text", "", ""),
    ],
)
def test_a_flags_text_becomes_a_value_of_the_settings_type(name: str, text: str, value: Any) -> None:
    found = parse_setting(name, text)
    assert (found, type(found)) == (value, type(value))
    assert getattr(with_settings(RunConfig(), {name: found}), name) == value


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("lr", "fast", "a number or auto"),
        ("lr", "0", "a number over 0 or auto"),
        ("lr", "", "a number or auto"),
        ("epochs", "2.5", "a whole number or auto"),
        ("epochs", "-1", "a whole number over 0 or auto"),
        ("batch_size", "2e1", "a whole number"),
        ("batch_size", "auto", "a whole number"),
        ("seed", "-1", "a whole number of at least 0"),
        ("seed", "True", "a whole number"),
        ("stop_loss", "none", "a number"),
        ("format", "prose", "raw or chat"),
        ("on_conflict", "keep", "error or keep-last or keep-first"),
    ],
)
def test_a_flags_text_that_will_not_do_is_refused_with_what_would(
    name: str, text: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_setting(name, text)
    message = str(caught.value)
    assert message.startswith(f"{name} is ")
    assert message.endswith(f": expected {expected}")


def test_only_closed_lists_have_choices() -> None:
    choices = {setting.name: choices_of(setting) for setting in all_settings()}
    assert {name: words for name, words in choices.items() if words is not None} == {
        "format": ("raw", "chat"),
        "loss_mean": ("sample", "token"),
        "rephraser": ("model", "endpoint"),
        "prefer": ("generalization", "balanced", "preservation"),
        "on_conflict": ("error", "keep-last", "keep-first"),
        "dtype": ("auto", "float32", "bfloat16"),
        "compute_dtype": ("auto", "float32", "bfloat16"),
        "compile": ("auto", "on", "off"),
    }


def test_every_setting_says_what_it_is() -> None:
    for setting in all_settings():
        # argparse formats help texts: a percent sign must be doubled.
        assert setting.metadata["help"] % {} != "", setting.name
        assert setting.metadata["group"]


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 1  # type: ignore[misc]
