"""The variants of `locft bench engine`, and what is made of their measurements."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, tiny_llama_config
from torch import Tensor

from locft.bench import engine, trl_trainer
from locft.bench.engine import bench_engine, make_report
from locft.bench.process import run_alone
from locft.bench.published import published_loss, train_published
from locft.bench.schema import VARIANTS, EngineReport, PublishedReport, TrlReport, Variant
from locft.bench.stand import END_ID, Stand, Task, make_shape, random_examples, set_up
from locft.bench.variants import Run, Survey, run_variant, survey
from locft.bench.work import (
    LARGEST_OVERHEAD,
    Product,
    measure_rates,
    needed_epoch,
    needed_positions,
    plain_step,
    predicted_seconds,
    steps_over_prediction,
    whole_rate,
)
from locft.config import RunConfig, parse_setting
from locft.data.encode import Encoded
from locft.errors import ConfigError, InputError, LocationError, LocftError, MissingExtraError
from locft.model.location import resolve_location
from locft.report.schema import Environment
from locft.train.loop import shuffled_batches
from locft.types import Edit

EDITS = tuple(
    Edit(id=prompt, prompt=prompt, target=target)
    for prompt, target in (
        ("The capital of France is", "Rome"),
        ("The capital of Italy is", "Vienna"),
        ("What sport does she play?", "chess"),
        ("Who wrote the play?", "Oslo Berlin"),
        ("Where does the river begin?", "London"),
    )
)
CONFIG = RunConfig(location="1.mlp.down", lr=0.01, epochs=5, batch_size=2, stop_loss=0.0, device="cpu")
HAS_TRL = find_spec("trl") is not None and find_spec("datasets") is not None


def task_of(model: Path) -> Task:
    return Task(
        model=str(model), shape=None, edits=EDITS, num_edits=len(EDITS), config=CONFIG, num_threads=1
    )


@pytest.fixture
def task(model_folder: Path) -> Task:
    return task_of(model_folder)


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run here, and for an instant, what has a process of its own otherwise and takes seconds."""
    monkeypatch.setattr("locft.bench.work._MEASURED_S", 0.0)

    def run_here(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(engine, "run_alone", run_here)


def adam_by_hand(stand: Stand, epochs: int) -> list[float]:
    """Train in float64, edit by edit, from full logits, with Adam written out."""
    model = stand.model.double()
    weight = stand.parameter
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    step, losses = 0, []
    orders = shuffled_batches(len(stand.encode()), stand.schedule.batch_size, stand.schedule.seed)
    examples = stand.encode()
    weight.requires_grad_(True)
    for _ in range(epochs):
        total = 0.0
        for indices in next(orders):
            likely: list[Tensor] = []
            for index in indices:
                ids, start = examples[index].ids, examples[index].target_start
                predicted = (
                    model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
                )
                tokens = [predicted[i - 1, ids[i]] for i in range(start, len(ids))]
                likely.append(torch.stack(tokens).mean())
            loss = -torch.stack(likely).mean()
            [gradient] = torch.autograd.grad(loss, [weight])
            step += 1
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            change = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            with torch.no_grad():
                weight.sub_(stand.schedule.lr * change)
            total += loss.item() * len(indices)
        losses.append(total / len(examples))
    return losses


def test_published_trains_as_the_procedure_does_by_hand(task: Task) -> None:
    found = train_published(set_up(task, "float32"))
    expected = adam_by_hand(set_up(task, "float32"), 5)
    assert found.losses == pytest.approx(expected, rel=1e-5)
    assert len(found.epoch_seconds) == 5
    assert len(found.step_seconds) == len(found.step_tokens) == 5 * 3


def test_published_only_changes_the_tuned_matrix(task: Task) -> None:
    stand = set_up(task, "float32")
    before = {name: value.clone() for name, value in stand.model.state_dict().items()}
    found = train_published(stand)
    changed = {name for name, value in stand.model.state_dict().items() if not value.equal(before[name])}
    assert changed == set(stand.location.parameters)
    assert found.matrix.equal(stand.parameter)


def test_padding_and_company_change_no_loss_of_published(task: Task) -> None:
    stand = set_up(task, "float32")
    examples = stand.encode()
    alone = [published_loss(stand.model, [example]).item() for example in examples]
    assert published_loss(stand.model, examples).item() == pytest.approx(sum(alone) / len(alone))


@pytest.mark.parametrize("location", ["1.mlp.down", "0.mlp.up"])
def test_the_engine_follows_published(task: Task, location: str) -> None:
    task = replace(task, config=replace(CONFIG, location=location))
    published = run_variant(task, "published")
    ours = run_variant(task, "engine_fp32")
    assert ours.losses == pytest.approx(published.losses, rel=1e-3)
    assert (ours.dtype, published.dtype) == ("float32", "float32")
    assert ours.losses[-1] < ours.losses[0]


def test_variants_learn_what_they_are_asked_for(task: Task) -> None:
    task = replace(task, config=replace(CONFIG, location="0.mlp.down", lr=0.05, epochs=60))
    for variant in ("published", "engine_best"):
        run = run_variant(task, variant)
        assert run.reliability == 1.0
        assert run.peak_memory_bytes > 0
        assert run.seconds >= sum(run.epoch_seconds) > 0


@pytest.mark.skipif(not HAS_TRL, reason="trl is not installed: pip install 'locft[bench]'")
@pytest.mark.filterwarnings("ignore")  # other libraries' own
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trl_trains_the_same_tokens_and_only_the_tuned_matrix(task: Task, dtype: str) -> None:
    stand = set_up(task, dtype)
    before = {name: value.clone() for name, value in stand.model.state_dict().items()}
    found = trl_trainer.train_trl(stand, dtype)
    changed = {name for name, value in stand.model.state_dict().items() if not value.equal(before[name])}
    assert changed == set(stand.location.parameters)
    assert found.same_tokens
    assert found.dtype == dtype
    assert found.matrix.dtype == torch.float32
    assert len(found.losses) == len(found.epoch_seconds) == 5
    assert found.losses[-1] < found.losses[0]


@pytest.mark.skipif(not HAS_TRL, reason="trl is not installed: pip install 'locft[bench]'")
@pytest.mark.filterwarnings("ignore")
def test_trl_trains_a_shape_without_words() -> None:
    shaped = Task(model=None, shape="tiny", edits=(), num_edits=5, config=CONFIG, num_threads=1)
    found = trl_trainer.train_trl(set_up(shaped, "float32"), "float32", num_trial_steps=4)
    assert found.same_tokens
    assert len(found.step_seconds) == 4


def test_without_trl_the_rest_still_runs(
    no_processes: None, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trl_trainer, "find_spec", lambda name: None)
    told: list[str] = []
    config = replace(CONFIG, epochs=1)
    report = bench_engine(
        str(model_folder),
        EDITS,
        config,
        variants=("engine_fp32", "trl"),
        num_rounds=1,
        say=told.append,
    )
    assert told[0] == "the variant trl needs an optional dependency: pip install 'locft[bench]'"
    assert report.variants["trl"] is None
    assert report.variants["engine_fp32"] is not None
    with pytest.raises(MissingExtraError, match="locft\\[bench\\]"):
        bench_engine(str(model_folder), EDITS, config, variants=("trl",))


def test_each_variant_has_its_turn_in_each_round(
    no_processes: None, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []

    def turn(task: Task, variant: Variant, trl_dtype: str | None) -> Run:
        turns.append(variant)
        return run_of(variant)

    monkeypatch.setattr(engine, "run_variant", turn)
    monkeypatch.setattr(engine, "survey", lambda task: SURVEY)
    chosen: tuple[Variant, ...] = ("engine_best", "published")
    report = bench_engine(str(model_folder), EDITS, CONFIG, variants=chosen, num_edits=3)
    assert turns == ["published", "engine_best"] * 2
    assert report.settings["rounds"] == 2


def test_unknown_variants_are_refused() -> None:
    for variants in (("published", "fast"), ()):
        with pytest.raises(ConfigError, match="expected some of published, trl"):
            bench_engine("demo", EDITS, CONFIG, variants=variants)  # type: ignore[arg-type]


FORWARD = Product(kind="forward", num_in=10, num_out=5)
BACKWARD = Product(kind="input gradient", num_in=10, num_out=5)
HEAD = Product(kind="forward", num_in=10, num_out=100, at="targets")
RATES = {FORWARD.name: 1000.0, BACKWARD.name: 500.0, HEAD.name: 2000.0}
SURVEY = Survey(
    location="1.mlp.down",
    schedule={"epochs": 2, "batch_size": 4},
    model_dtype="float32",
    num_edits=10,
    num_tokens=40,
    needed_tokens=30,
    needed_targets=10,
    plain=(FORWARD, BACKWARD),
    needed=(FORWARD, HEAD),
    rates={"float32": RATES, "bfloat16": {name: 2 * rate for name, rate in RATES.items()}},
    environment=Environment(
        locft="0", python="3", torch="2", transformers="5", platform="p", device="d", num_threads=1
    ),
)


def run_of(variant: Variant, seconds: float = 20.0, **options: Any) -> Run:
    values: dict[str, Any] = {
        "dtype": "float32",
        "losses": (2.0, 1.0),
        "epoch_seconds": (8.0, 10.0),
        "step_seconds": (3.0, 3.5, 9.0) if variant == "published" else (),
        "step_tokens": (10, 10, 10) if variant == "published" else (),
        "same_tokens": True,
        "seconds": seconds,
        "peak_memory_bytes": 1000,
        "reliability": 0.5,
        **options,
    }
    return Run(**values)


def report_of(task: Task, **runs: list[Run]) -> EngineReport:
    surveys = [SURVEY, replace(SURVEY, rates={**SURVEY.rates, "float32": dict.fromkeys(RATES, 800.0)})]
    named = {variant: runs[variant] for variant in VARIANTS if variant in runs}
    return make_report(task, surveys, named, {"float32": 2.0, "bfloat16": 1.0}, 2)


def test_a_report_follows_from_the_measurements(task: Task) -> None:
    report = report_of(
        task,
        published=[run_of("published"), run_of("published", 40.0)],
        engine_best=[
            run_of("engine_best", 5.0, epoch_seconds=(1.0, 2.0)),
            run_of("engine_best", 5.0, epoch_seconds=(2.0, 3.0), peak_memory_bytes=500),
        ],
    )
    ours = report.variants["engine_best"]
    assert ours is not None
    assert ours.seconds_per_edit == 0.5
    assert ours.seconds_per_epoch == 2.0
    assert ours.tokens_per_s == 20.0
    assert ours.peak_memory_bytes == 1000
    # 2 x 50 x 30 for the layer and 2 x 1000 x 10 for the head, in 2 s. The fastest rates of both
    # rounds are 1000 and 800: in equal shares, 1 / (0.5 / 1000 + 0.5 / 800).
    assert ours.share_of_matrix_rate == pytest.approx(23000 / 2 / (1 / (0.5 / 1000 + 0.5 / 800)))
    published = report.variants["published"]
    assert published is not None
    assert published.seconds_per_edit == 3.0
    assert published.seconds_per_edit_runs == (2.0, 4.0)
    assert report.variants["trl"] is None
    assert report.ratios["seconds_per_edit"] == {"published/engine_best": 6.0}
    assert report.ratios["seconds_per_epoch"] == {"published/engine_best": 4.5}


def test_trl_is_reported_with_both_dtypes(task: Task) -> None:
    if not HAS_TRL:
        pytest.skip("trl is not installed: pip install 'locft[bench]'")
    found = report_of(task, trl=[run_of("trl", dtype="bfloat16", same_tokens=False)]).variants["trl"]
    assert isinstance(found, TrlReport)
    assert found.trial_seconds_per_step == {"float32": 2.0, "bfloat16": 1.0}
    assert not found.same_tokens


def test_a_report_keeps_its_keys(task: Task) -> None:
    report = asdict(report_of(task, published=[run_of("published")]))
    assert set(report) == {
        *("schema_version", "variants", "matrix_rate_gflops", "settings", "environment", "ratios")
    }
    assert list(report["variants"]) == list(VARIANTS)
    assert set(report["variants"]["published"]) == {
        *("dtype", "seconds_per_edit", "seconds_per_edit_runs", "seconds_per_epoch", "tokens_per_s"),
        *("share_of_matrix_rate", "peak_memory_bytes", "losses", "reliability", "seconds_per_step"),
        *("predicted_seconds_per_step", "steps_over_prediction", "flagged"),
    }
    assert set(report["matrix_rate_gflops"]) == {"float32", "bfloat16"}
    assert set(report["matrix_rate_gflops"]["float32"]) == {"whole", "by_product"}
    assert json.loads(json.dumps(report))["schema_version"] == 1


def test_steps_are_predicted_from_their_products() -> None:
    # 2 x 10 x 10 x 5 operations: 1 s forward, 2 s backward.
    assert predicted_seconds((FORWARD, BACKWARD), RATES, 10) == 3.0
    assert predicted_seconds((HEAD,), RATES, 10, 3) == 3.0
    assert whole_rate((FORWARD, BACKWARD), RATES) == pytest.approx(2000 / 3)
    # Twice the tokens, twice the time; one step that something held up does not count.
    over = steps_over_prediction((3.3, 6.6, 50.0), (10, 20, 10), (FORWARD, BACKWARD), RATES)
    assert over == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("slowed_by", "flagged"), [(1.0, False), (LARGEST_OVERHEAD - 0.01, False), (1.31, True), (4.0, True)]
)
def test_published_is_flagged_when_it_is_slowed(task: Task, slowed_by: float, flagged: bool) -> None:
    predicted = predicted_seconds(SURVEY.plain, {**RATES, BACKWARD.name: 800.0}, 10)
    steps = (slowed_by * predicted,) * 3
    # The faster run decides.
    runs = [run_of("published", step_seconds=steps), run_of("published", step_seconds=(99.0,) * 3)]
    found = report_of(task, published=runs).variants["published"]
    assert isinstance(found, PublishedReport)
    assert found.steps_over_prediction == pytest.approx(slowed_by)
    assert found.flagged is flagged


def test_a_flag_is_told(no_processes: None, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "run_variant", lambda task, variant, dtype: run_of(variant))
    monkeypatch.setattr(engine, "survey", lambda task: SURVEY)
    told: list[str] = []
    slow = run_of("published", step_seconds=(30.0,) * 3)
    monkeypatch.setattr(engine, "run_variant", lambda task, variant, dtype: slow)
    bench_engine(str(model_folder), EDITS, CONFIG, variants=("published",), say=told.append)
    assert told[-1].startswith("flagged: a step of `published` took 10.00 times")


def operations(products: tuple[Product, ...], num_tokens: float, num_targets: float = 0) -> float:
    return sum(product.operations(num_tokens, num_targets) for product in products)


@pytest.mark.parametrize(("location", "below_tuned"), [("1.mlp.down", 0), ("1.mlp.up", 1)])
def test_products_are_those_of_the_matrices(location: str, below_tuned: int) -> None:
    model = make_model(tiny_llama_config())
    place = resolve_location(model, location)
    attention = 2 * 32 * 32 + 2 * 32 * 16
    layer, mlp, head = attention + 3 * 32 * 64, 32 * 64, 32 * 384
    above = layer + below_tuned * mlp
    plain = 3 * layer + head + above + head + mlp
    assert operations(plain_step(model, place), 1) == 2 * plain
    # Of the last layer only keys and values are needed everywhere, and queries, which few leave out.
    everywhere = operations(needed_epoch(model, place), 1, 0) / 2
    assert everywhere < 2 * above + 2 * mlp
    at_targets = operations(needed_epoch(model, place), 0, 1) / 2
    assert everywhere + at_targets == 2 * above + 2 * mlp + 2 * head


def test_only_one_matrix_of_a_dense_mlp_can_be_timed() -> None:
    model = make_model(tiny_llama_config())
    for name in ("1", "1.attn", "1.mlp"):
        with pytest.raises(LocationError, match="one matrix is expected"):
            plain_step(model, resolve_location(model, name))


def test_shared_beginnings_are_needed_once() -> None:
    one = Encoded(ids=(1, 2, 3, 4, 0), target_start=3)
    other = Encoded(ids=(1, 2, 5, 0), target_start=2)
    assert needed_positions([[one]]) == (4, 2)
    assert needed_positions([[one], [other]]) == (7, 4)
    # 1, 12, 123, 1234 and 125; 123, 1234, 12 and 125 have a target after them.
    assert needed_positions([[one, other]]) == (5, 4)


def test_rates_are_measured_for_each_kind_of_product(no_processes: None) -> None:
    model = make_model(tiny_llama_config())
    products = plain_step(model, resolve_location(model, "1.mlp.down"))
    rates = measure_rates(products[-3:], 8, torch.float32, torch.device("cpu"))
    assert set(rates) == {product.name for product in products[-3:]}
    assert all(rate > 0 and math.isfinite(rate) for rate in rates.values())


def test_a_survey_counts_what_is_to_be_trained(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locft.bench.variants.measure_rates", lambda *_: dict(RATES))
    found = survey(task)
    examples = set_up(task, "auto").encode()
    assert found.location == "1.mlp.down"
    assert (found.num_edits, found.num_tokens) == (5, sum(len(example.ids) for example in examples))
    assert found.needed_targets <= sum(example.num_targets for example in examples)
    assert found.needed_tokens < found.num_tokens
    assert set(found.rates) == {"float32", "bfloat16"}


def test_a_shape_is_the_same_whenever_it_is_made() -> None:
    device = torch.device("cpu")
    first, second = (make_shape("tiny", dtype, device, 1) for dtype in ("auto", "float32"))
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in first.parameters())
    examples = random_examples(20, 384, 1)
    assert examples == random_examples(20, 384, 1) != random_examples(20, 384, 2)
    for example in examples:
        assert 8 <= example.target_start <= 24
        assert 3 <= example.num_targets <= 7
        assert example.ids[-1] == END_ID
        assert all(END_ID < token < 384 for token in example.ids[:-1])
    with pytest.raises(ConfigError, match="expected tiny or llama-8b"):
        make_shape("huge", "auto", device, 1)


def test_a_process_of_its_own_gives_what_the_function_returns() -> None:
    assert run_alone(os.getpid) != os.getpid()


def test_an_error_comes_out_of_a_process_with_its_exit_status() -> None:
    with pytest.raises(InputError, match="lr is 'fast': expected a number") as caught:
        run_alone(parse_setting, "lr", "fast")
    assert caught.value.exit_status == 2


def test_a_process_that_ends_early_is_told_of() -> None:
    with pytest.raises(LocftError, match="ended with status 3 before it was done"):
        run_alone(os._exit, 3)
