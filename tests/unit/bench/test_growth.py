import json
import mmap
import threading
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import pytest
import torch

from locft import provenance
from locft.bench import growth
from locft.bench.growth import (
    Growth,
    GrowthPlan,
    anonymous_bytes,
    extend_examples,
    fit_line,
    measure_growth,
    sampled_peaks,
)
from locft.cli.main import main
from locft.cli.parser import parse_words
from locft.config import RunConfig
from locft.data.encode import Encoded
from locft.errors import LocationError
from locft.evaluation.subject import load_subject
from locft.model.location import resolve_location
from locft.types import Edit

EXAMPLES = (
    Encoded(ids=(1, 5, 6, 7, 20, 0), target_start=4),
    Encoded(ids=(1, 5, 8, 21, 22, 0), target_start=3),
    Encoded(ids=(9, 23, 24, 25, 0), target_start=1),
)
EDITS = tuple(
    Edit(id=place, prompt=f"The capital of {place} is", target=target)
    for place, target in (("France", "Rome"), ("Italy", "Paris"), ("Oslo", "Madrid"))
)
PLAN = GrowthPlan(
    sizes=(2, 5),
    memory_sizes=(4,),
    locations=("0.mlp.down", "2.mlp.down"),
    num_depth_edits=3,
    num_steps=2,
)
CONFIG = RunConfig(device="cpu", location="1.mlp.down", batch_size=2)
WORDS = (
    *("--sizes", "2,5", "--memory-sizes", "4", "--locations", "0.mlp.down,2.mlp.down"),
    *("--depth-edits", "3", "--steps", "2", "--device", "cpu", "--location", "1.mlp.down"),
)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure memory in this process: another one takes seconds to load torch."""
    monkeypatch.setattr(growth, "run_alone", lambda function, *arguments: function(*arguments))


@pytest.fixture(scope="module")
def found(model_folder: Path) -> Growth:
    """Measure what the plan says, all in this process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(growth, "run_alone", lambda function, *arguments: function(*arguments))
        return measure_growth(str(model_folder), EDITS, PLAN, CONFIG)


@pytest.fixture
def edits_file(tmp_path: Path) -> Path:
    file = tmp_path / "edits.jsonl"
    file.write_text("".join(json.dumps({"prompt": e.prompt, "target": e.target}) + "\n" for e in EDITS))
    return file


def test_points_on_a_line_give_that_line() -> None:
    fit = fit_line([100, 300, 1000, 5000], [0.5 + 0.002 * x for x in (100, 300, 1000, 5000)])
    assert fit.slope_s_per_token == pytest.approx(0.002)
    assert fit.intercept_s == pytest.approx(0.5)
    assert fit.r_squared == pytest.approx(1)
    assert fit.largest_relative_residual == pytest.approx(0, abs=1e-12)


def test_points_off_the_line_give_the_least_relative_squares() -> None:
    # By hand: weights 1, 1, 1/16; residuals 1/7, -2/7, 16/7; spread 6.
    fit = fit_line([1, 2, 3], [1, 1, 4])
    assert fit.slope_s_per_token == pytest.approx(3 / 7)
    assert fit.intercept_s == pytest.approx(3 / 7)
    assert fit.r_squared == pytest.approx(1 - 261 / 49 / 6)
    assert fit.largest_relative_residual == pytest.approx(4 / 7)


@pytest.mark.parametrize(
    ("num_tokens", "seconds"), [([], []), ([7], [1.0]), ([7, 7, 7], [1.0, 2.0, 3.0])]
)
def test_what_determines_no_line_gives_none(num_tokens: list[float], seconds: list[float]) -> None:
    assert set(asdict(fit_line(num_tokens, seconds)).values()) == {None}


def test_times_that_do_not_vary_have_no_variance_to_explain() -> None:
    fit = fit_line([1, 2], [3, 3])
    assert fit.slope_s_per_token == pytest.approx(0, abs=1e-12)
    assert fit.intercept_s == pytest.approx(3)
    assert fit.r_squared is None
    assert set(asdict(fit_line([1, 2], [0, 3])).values()) == {None}


def test_enough_examples_are_taken_as_they_are() -> None:
    assert extend_examples(EXAMPLES, 2) == list(EXAMPLES[:2])
    assert extend_examples(EXAMPLES, 3) == list(EXAMPLES)


def test_made_up_examples_have_the_lengths_of_the_given_ones() -> None:
    extended = extend_examples(EXAMPLES, 3 * 50)
    assert extended[:3] == list(EXAMPLES)
    for index, example in enumerate(extended):
        pattern = EXAMPLES[index % 3]
        assert len(example.ids) == len(pattern.ids)
        assert example.target_start == pattern.target_start
        assert example.ids[-1] == pattern.ids[-1]
        assert {type(token) for token in example.ids} == {int}
        assert set(example.ids[: example.target_start]) <= {1, 5, 6, 7, 8, 9}
        assert set(example.ids[example.target_start : -1]) <= {20, 21, 22, 23, 24, 25}
    assert len(set(extended)) > 30


def test_made_up_examples_share_their_beginning_as_the_given_ones_do() -> None:
    extended = extend_examples(EXAMPLES, 3 * 50)
    assert all(example.ids[:2] == (1, 5) for example in extended[0::3] + extended[1::3])
    assert len({example.ids[2] for example in extended[0::3]}) > 1
    assert len({example.ids[0] for example in extended[2::3]}) > 1


def test_a_prompt_that_another_begins_with_is_made_up_at_its_end() -> None:
    same = [Encoded(ids=(1, 5, 20, 0), target_start=2), Encoded(ids=(1, 5, 6, 20, 0), target_start=3)]
    extended = extend_examples([*same, same[0]], 60)
    assert {example.ids[0] for example in extended} == {1}
    assert len({example.ids[1] for example in extended[3::3]}) > 1


def test_made_up_examples_depend_on_nothing_but_the_given_ones() -> None:
    assert extend_examples(EXAMPLES, 40) == extend_examples(EXAMPLES, 90)[:40]


def test_the_largest_sample_is_taken_and_then_forgotten() -> None:
    samples = iter([3, None, 8, 2])
    enough = threading.Event()

    def read() -> int | None:
        found = next(samples, -1)
        if found == -1:
            enough.set()
            return 1
        return found

    with sampled_peaks(read, every_s=0.001) as take:
        assert enough.wait(timeout=30)
        assert take() == 8
        assert take() == 1
    with sampled_peaks(lambda: None) as take:
        assert take() is None


def test_anonymous_memory_grows_with_what_is_held() -> None:
    before = anonymous_bytes()
    if before is None:
        pytest.skip("this system does not tell")
    num_bytes = 64 * 2**20
    # Not a tensor: it could take what an earlier one has given back.
    with mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held.write(b"x" * num_bytes)
        after = anonymous_bytes()
    assert after is not None
    assert after - before > 0.9 * num_bytes


def test_anonymous_memory_is_unknown_where_the_system_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status = tmp_path / "status"
    monkeypatch.setattr(provenance, "Path", lambda _: status)
    assert anonymous_bytes() is None
    status.write_text("Name:\tpython\n")
    assert anonymous_bytes() is None
    status.write_text("Name:\tpython\nRssAnon:\t     120 kB\n")
    assert anonymous_bytes() == 120 * 1024


def test_times_memory_and_depth_are_measured(found: Growth) -> None:
    assert [(time.num_edits, time.synthetic) for time in found.epochs] == [(2, 0), (5, 2)]
    assert {time.location for time in found.epochs} == {"1.mlp.down"}
    assert [(time.location, time.num_layers_above) for time in found.depth] == [
        ("0.mlp.down", 2),
        ("2.mlp.down", 0),
    ]
    assert {time.num_edits for time in found.depth} == {3}
    assert all(time.seconds_per_epoch > 0 and time.cache_s > 0 for time in found.epochs + found.depth)
    assert found.fit.slope_s_per_token is not None
    (memory,) = found.memory
    assert (memory.num_edits, memory.synthetic, memory.steps, memory.steps_per_epoch) == (4, 1, 2, 2)
    assert memory.device_peak_bytes is None


def test_tokens_are_those_of_the_edits(model_folder: Path) -> None:
    subject = load_subject(str(model_folder), CONFIG)
    encoded = [subject.codec.encode(edit) for edit in EDITS]
    plan = replace(PLAN, sizes=(3,), memory_sizes=(), locations=())
    (found,) = measure_growth(str(model_folder), EDITS, plan, CONFIG).epochs
    assert found.num_prompt_tokens == sum(example.target_start for example in encoded)
    assert found.num_target_tokens == sum(example.num_targets for example in encoded)
    assert found.num_tokens == sum(len(example.ids) for example in encoded)


def test_training_ends_after_the_steps_that_were_asked_for(model_folder: Path) -> None:
    subject = load_subject(str(model_folder), CONFIG)
    network = subject.loaded.model
    location = resolve_location(network, CONFIG.location)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    config = replace(CONFIG, epochs=3, stop_loss=0.0)
    cached: list[int] = []
    for num_steps, num_taken, num_epochs in ((None, 12, 3), (5, 5, 1), (4, 4, 0), (9, 9, 2)):
        times = growth._train(
            subject, location, extend_examples(EXAMPLES, 8), config, num_steps, lambda: cached.append(1)
        )
        assert times.num_steps == num_taken
        assert len(times.epochs_s) == num_epochs
    assert len(cached) == 4
    # The model is given back as it was.
    after = network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_epochs_take_the_median_of_the_seconds_between_their_ends(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()
    monkeypatch.setattr("locft.bench.training.time.perf_counter", lambda: next(ticks) ** 2)
    subject = load_subject(str(model_folder), CONFIG)
    location = resolve_location(subject.loaded.model, CONFIG.location)
    config = replace(CONFIG, epochs=3, stop_loss=0.0)
    found = growth._time(subject, location, EXAMPLES, 3, config, lambda _: None)
    # 0 and 1 around the cache; the epochs begin at 2 and end at 3, 4 and 5, squared.
    assert found.cache_s == 1
    assert found.seconds_per_epoch == 7


@pytest.mark.parametrize("name", ["1.mpl.down", "9.mlp.down"])
def test_a_location_that_is_not_there_is_refused(model_folder: Path, name: str) -> None:
    with pytest.raises(LocationError, match=name):
        measure_growth(str(model_folder), EDITS, replace(PLAN, locations=(name,)), CONFIG)


def test_the_command_prints_json_and_keeps_it_with_a_picture(
    model_folder: Path,
    edits_file: Path,
    at_once: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "growth"
    words = ["bench", "growth", str(model_folder), str(edits_file), *WORDS]
    assert main([*words, "--json", "-o", str(output)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record) == [
        *("schema_version", "model", "epochs", "fit", "memory", "depth", "settings", "environment"),
    ]
    assert {
        "num_edits",
        "synthetic",
        "num_prompt_tokens",
        "num_target_tokens",
        "seconds_per_epoch",
    } <= set(record["epochs"][0])
    assert record["settings"]["epochs"] == 1
    assert record["settings"]["sizes"] == [2, 5]
    assert json.loads((output / "growth.json").read_text()) == record
    assert (output / "growth.svg").read_text().startswith("<?xml")
    assert main([*words, "-o", str(output)]) == 2  # before anything is measured
    assert "not empty" in capsys.readouterr().err


def test_the_command_shows_tables(
    model_folder: Path, edits_file: Path, at_once: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "growth", str(model_folder), str(edits_file), *WORDS]) == 0
    shown = capsys.readouterr().out
    assert "time at 1.mlp.down" in shown
    assert "2 (1 an epoch)" in shown  # steps
    assert "2.mlp.down" in shown
    none = ("--memory-sizes", "", "--locations", "", "--sizes", "2")
    assert main(["bench", "growth", str(model_folder), str(edits_file), *WORDS, *none]) == 0
    shown = capsys.readouterr().out
    assert "a line needs two sizes" in shown
    assert "memory" not in shown


def test_the_picture_does_without_what_was_not_measured(found: Growth) -> None:
    assert len(growth.draw_growth(found).axes) == 3
    untold = tuple(replace(use, loaded_bytes=None, cache_peak_bytes=None) for use in found.memory)
    growth.draw_growth(replace(found, memory=untold))
    nothing = fit_line([], [])
    growth.draw_growth(replace(found, epochs=(), memory=(), depth=(), fit=nothing))


def test_without_words_the_plan_is_that_of_the_function() -> None:
    words = parse_words(["bench", "growth"])
    plan = GrowthPlan()
    assert (words.sizes, words.memory_sizes) == (plan.sizes, plan.memory_sizes)
    assert words.locations == plan.locations
    assert (words.depth_edits, words.steps) == (plan.num_depth_edits, plan.num_steps)


@pytest.mark.parametrize("flag", ["--sizes", "--memory-sizes", "--steps", "--depth-edits"])
@pytest.mark.parametrize("text", ["0", "10,x", "-3", "1.5"])
def test_counts_that_are_none_are_refused(
    flag: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "growth", f"{flag}={text}"])
    assert stopped.value.code == 2
    assert flag in capsys.readouterr().err
