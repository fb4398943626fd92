import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_model, tiny_llama_config, tiny_mixture_config
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, PreTrainedModel

from locft.model.location import resolve_location
from locft.model.packing import merge_prefixes
from locft.model.split import split_model
from locft.train import calibrate
from locft.train.calibrate import measure_rates
from locft.train.cost import (
    LayerSize,
    ModelSize,
    Pass,
    Phase,
    Rates,
    Speed,
    Tuned,
    Work,
    forward_flops,
    head_flops,
    input_gradient_flops,
    predict_disk,
    predict_phases,
    step_flops,
    step_s,
    tuned_gradient_flops,
    unended_share,
)
from locft.train.outline import size_model

TOKENS = 11
ONE = Pass(tokens=TOKENS, sequences=1, longest=TOKENS, asked=3)


def eager() -> PreTrainedModel:
    """Make a tiny model whose attention is plain products, which the counter counts one by one."""
    return make_model(tiny_llama_config(attn_implementation="eager"))


def count(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    flops: int = counter.get_total_flops()
    return flops


def run_layer(model: PreTrainedModel, states: Tensor) -> Tensor:
    positions = torch.arange(TOKENS)[None]
    rotary: Any = model.model.rotary_emb
    layer: Any = model.model.layers[1]
    output: Tensor = layer(states, position_embeddings=rotary(states, positions))
    return output


def test_a_tiny_model_is_measured_as_counted_by_hand() -> None:
    size = size_model(eager())
    # Four heads of 8, two of them with keys and values; an MLP of 64 with a gate.
    shapes = ((32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32))
    layer = LayerSize(
        queries=32 * 32,
        keys_values=2 * 32 * 16,
        attention_out=32 * 32,
        mlp_in=2 * 32 * 64,
        mlp_out=64 * 32,
        width=32,
        inner=64,
        attention_width=32,
        num_parameters=32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32,
        shapes=shapes,
    )
    assert [dataclasses.replace(one, shapes=()) for one in size.layers] == [
        dataclasses.replace(layer, shapes=())
    ] * 3
    assert sorted(size.layers[0].shapes) == sorted(shapes)
    assert (size.width, size.vocabulary, size.number_bytes) == (32, 384, 4)
    assert size.num_parameters == 3 * layer.num_parameters + 384 * 32 + 32  # embedding tied to the head
    assert size.num_bytes == 4 * size.num_parameters


def test_only_experts_that_answer_are_counted_and_all_are_held() -> None:
    model = make_model(tiny_mixture_config("qwen3_moe"))
    layer = size_model(model).layers[0]
    # Two of four experts of 16, each with a gate; and a router over all four.
    assert (layer.mlp_in, layer.mlp_out, layer.inner) == (2 * 2 * 32 * 16 + 4 * 32, 2 * 32 * 16, 32)
    experts = sum(p.numel() for name, p in model.named_parameters() if "layers.0.mlp" in name)
    assert experts == 4 * 3 * 32 * 16 + 4 * 32
    assert layer.num_parameters > experts


def test_families_that_keep_queries_and_keys_in_one_matrix_are_measured() -> None:
    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    layer = size_model(make_model(config)).layers[0]
    assert (layer.queries, layer.keys_values, layer.attention_out) == (0, 3 * 32 * 32, 32 * 32)
    assert (layer.mlp_in, layer.mlp_out, layer.inner) == (32 * 128, 32 * 128, 128)
    assert layer.attention_width == 32


def test_flops_of_a_layer_are_those_that_torch_counts() -> None:
    model = eager()
    layer = size_model(model).layers[1]
    states = torch.randn(1, TOKENS, 32)
    assert count(lambda: run_layer(model, states)) == forward_flops(layer, ONE)
    states.requires_grad_()
    output = run_layer(model, states)
    assert count(lambda: torch.autograd.backward(output.sum())) == input_gradient_flops(layer, ONE)


@pytest.mark.parametrize("module", ["mlp.down", "mlp.up", "mlp", "attn", "entire"])
def test_flops_of_the_tuned_layers_gradients_are_those_that_torch_counts(module: str) -> None:
    model = eager()
    name = "1" if module == "entire" else f"1.{module}"
    for parameter in resolve_location(model, name).parameters:
        model.get_parameter(parameter).requires_grad_()
    output = run_layer(model, torch.randn(1, TOKENS, 32))
    counted = count(lambda: torch.autograd.backward(output.sum()))
    assert counted == tuned_gradient_flops(size_model(model).layers[1], module, ONE)


def test_flops_of_the_head_are_those_that_torch_counts() -> None:
    model = eager()
    head: Any = model.get_output_embeddings()
    states = torch.randn(3, 32, requires_grad=True)
    assert count(lambda: head(states)) == head_flops(size_model(model), 3)
    logits = head(states)
    assert count(lambda: torch.autograd.backward(logits.sum())) == head_flops(size_model(model), 3)


@pytest.mark.parametrize("name", ["0.mlp.down", "1.mlp", "2.attn", "2.mlp.down", "0"])
def test_flops_of_a_step_are_those_of_the_tail(name: str) -> None:
    model = make_model(tiny_llama_config())
    location = resolve_location(model, name)
    size = size_model(model)
    tuned = Tuned(layer=location.layer, module=location.module, num_parameters=location.num_parameters)
    split = split_model(model, location.layer)
    packed, _ = merge_prefixes([(5, 6, 7, 8, 9), (5, 6, 10, 11)]).pack([0, 1])
    asked = torch.tensor([3, 4, 6])
    batch = Pass(tokens=7, sequences=2, longest=5, asked=3)
    hidden = split.prefix(packed)
    for parameter in location.parameters:
        model.get_parameter(parameter).requires_grad_()
    with split.tail() as tail:
        counted = count(lambda: torch.autograd.backward(tail(packed, hidden, asked).sum()))
    assert counted == step_flops(size, tuned, batch)


def test_pairs_are_those_of_sequences_padded_to_the_longest() -> None:
    assert Pass(tokens=9, sequences=2, longest=6, asked=2).pairs == 2 * 36


def test_speed_is_taken_between_points_and_from_the_nearest_beyond_them() -> None:
    speed = Speed(((1, 1e9), (100, 1e11)))
    assert speed.at(0.5) == 1e9
    assert speed.at(1) == 1e9
    assert speed.at(10) == pytest.approx(1e10)
    assert speed.at(1e6) == 1e11


def test_the_longer_decoding_goes_on_the_fewer_answers_are_left() -> None:
    shares = [unended_share(num) for num in range(50)]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] > 0


def test_what_has_ended_is_decoded_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = rates(flops_per_s=1e9)

    def answer_s() -> float:
        phases = predict_phases(SIZE, TUNED, WORK, machine, machine)
        return next(phase.seconds for phase in phases if phase.name == "answer before")

    some_end = answer_s()
    monkeypatch.setattr("locft.train.cost._UNENDED_SHARES", ((0, 1.0), (32, 1.0)))
    assert some_end < answer_s()


LAYER = LayerSize(
    queries=100,
    keys_values=50,
    attention_out=100,
    mlp_in=400,
    mlp_out=200,
    width=10,
    inner=20,
    attention_width=10,
    num_parameters=870,
    shapes=((10, 10),),
)
SIZE = ModelSize(layers=(LAYER,) * 4, width=10, vocabulary=1000, num_parameters=13_480, number_bytes=4)
TUNED = Tuned(layer=2, module="mlp.down", num_parameters=200)
WORK = Work(
    cache_tokens=90,
    cache_passes=(Pass(tokens=90, sequences=10, longest=12, asked=0),),
    steps=(Pass(tokens=50, sequences=5, longest=12, asked=15),) * 2,
    epochs=3,
    answers=(Pass(tokens=100, sequences=10, longest=10, asked=10),),
    guesses=(Pass(tokens=120, sequences=10, longest=12, asked=30),),
    scored_share=0.5,
    drift=(Pass(tokens=60, sequences=2, longest=30, asked=60),),
    stages=(4, 12, 32),
)


def rates(dtype: str = "float32", flops_per_s: float = math.inf, **options: float) -> Rates:
    """Make a machine that takes no time but for what is said."""
    speed = Speed(((1, flops_per_s),))
    names = ("attention_flops_per_s", "bytes_per_s", "fresh_bytes_per_s")
    others = {**dict.fromkeys(names, math.inf), "op_s": 0.0, **options}
    return Rates(dtype=dtype, layer=speed, head=speed, **others)


def test_flops_are_as_counted_by_hand() -> None:
    batch = Pass(tokens=5, sequences=2, longest=4, asked=2)
    attention = 4 * 10 * 2 * 16
    assert forward_flops(LAYER, batch) == 2 * 5 * 850 + attention
    # Keys and values of all positions, and the rest where something is asked.
    assert forward_flops(LAYER, batch, last=True) == 2 * 5 * 50 + 2 * 2 * 800 + attention
    assert input_gradient_flops(LAYER, batch) == 2 * 5 * 850 + 2 * attention
    assert tuned_gradient_flops(LAYER, "mlp.down", batch) == 2 * 5 * 200
    assert tuned_gradient_flops(LAYER, "mlp.down", batch, last=True) == 2 * 2 * 200
    assert head_flops(SIZE, 3) == 2 * 3 * 10 * 1000
    last = forward_flops(LAYER, batch, last=True) + input_gradient_flops(LAYER, batch, last=True)
    tuned = forward_flops(LAYER, batch) + 2 * 5 * 200
    assert step_flops(SIZE, TUNED, batch) == tuned + last + 2 * head_flops(SIZE, 2)


def phases(work: Work = WORK, **options: Any) -> dict[str, Phase]:
    found = predict_phases(SIZE, TUNED, work, rates(), options.pop("training", rates()), **options)
    return {phase.name: phase for phase in found}


def test_the_time_of_training_is_that_of_its_steps_in_all_epochs() -> None:
    slow = rates(flops_per_s=1e6, op_s=1e-3)
    batch = WORK.steps[0]
    assert phases(training=slow)["train"].seconds == pytest.approx(6 * step_s(SIZE, TUNED, batch, slow))
    assert step_s(SIZE, TUNED, batch, slow) > step_flops(SIZE, TUNED, batch) / 1e6


def test_a_later_layer_a_smaller_batch_and_a_faster_machine_take_less_time() -> None:
    machine = rates(flops_per_s=1e6, bytes_per_s=1e6, op_s=1e-4)
    batch = WORK.steps[0]
    before = step_s(SIZE, TUNED, batch, machine)
    assert step_s(SIZE, dataclasses.replace(TUNED, layer=3), batch, machine) < before
    assert step_s(SIZE, TUNED, dataclasses.replace(batch, tokens=20), machine) < before
    assert step_s(SIZE, TUNED, batch, rates(flops_per_s=2e6)) < before


def test_memory_is_the_model_and_what_each_phase_holds_beside_it() -> None:
    found = phases(on_cpu=False)
    model, cache = 4 * 13_480, 90 * 10 * 4
    assert found["load"].peak_memory_bytes == model
    assert found["cache"].peak_memory_bytes > model + cache
    assert found["train"].peak_memory_bytes > model + cache + 15 * 1000 * 4
    # Both models' logits on a pass of neutral text.
    assert found["drift"].peak_memory_bytes > model + 2 * 60 * 1000 * 4
    assert phases()["load"].peak_memory_bytes - model > 100_000_000


def test_products_in_another_dtype_need_copies_of_the_tail_and_the_head() -> None:
    plain = phases()["train"].peak_memory_bytes
    copied = phases(training=rates("bfloat16"))["train"].peak_memory_bytes
    # The weights that are copied leave memory, and two copies of half their size come.
    tail, tuned = 2 * 870 + 10 * 1000, 200
    assert copied - plain == 2 * 2 * (tail - tuned) - 4 * tail
    slow = rates("bfloat16", fresh_bytes_per_s=1e6)
    many = dataclasses.replace(WORK, epochs=2 * WORK.epochs)
    seconds, doubled = (phases(work, training=slow)["train"].seconds for work in (WORK, many))
    assert doubled < 2 * seconds  # they are made once


def test_prompts_of_edits_alone_are_all_confirmed_and_nothing_is_decoded_again() -> None:
    work = dataclasses.replace(WORK, answers=2 * WORK.answers)
    own = phases(dataclasses.replace(work, scored_share=0.0))["answer after"].seconds
    found = phases(work)
    assert own < found["answer after"].seconds < found["answer before"].seconds


def test_the_disk_holds_the_patch_in_the_checkpoints_dtype_and_the_cache_in_the_models() -> None:
    disk = predict_disk(SIZE, TUNED, WORK, stored_bytes=2)
    assert 200 * 2 < disk.patch_bytes < 200 * 2 + 10_000
    assert disk.cache_bytes == 90 * 10 * 4
    assert disk.peak_bytes == disk.patch_bytes + disk.cache_bytes + disk.report_bytes
    assert WORK.num_prompts == 10


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_a_machine_is_measured_at_the_models_shapes(
    products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "_LEAST_TIMES", 1)
    monkeypatch.setattr(calibrate, "_WEIGHT_BYTES", 20_000)
    monkeypatch.setattr(calibrate, "_FRESH_BYTES", 1_000)
    size = size_model(eager())
    found = measure_rates(size, size.layers[0], ("float32", products), torch.device("cpu"))
    assert found.dtype == products
    assert [rows for rows, _ in found.layer.points] == [1, 4, 16, 64, 256, 1024]
    assert all(speed > 0 for _, speed in (*found.layer.points, *found.head.points))
    assert min(found.attention_flops_per_s, found.bytes_per_s, found.fresh_bytes_per_s, found.op_s) > 0


def test_measuring_ends_where_more_rows_would_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_LONG_S", 0.0)
    monkeypatch.setattr(calibrate, "_FRESH_BYTES", 1_000)
    size = size_model(eager())
    found = measure_rates(size, size.layers[0], ("bfloat16", "bfloat16"), torch.device("cpu"))
    assert len(found.layer.points) == len(found.head.points) == 1
