import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_model, tiny_llama_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from locft.config import RunConfig
from locft.data.encode import Encoded, make_codec
from locft.errors import ConfigError, InputError, TrainingError
from locft.evaluation.likelihood import score_continuations
from locft.model.location import Location, resolve_location
from locft.model.moments import InputMoment
from locft.model.packing import Packed, merge_prefixes
from locft.model.split import Split, split_model
from locft.train import cache as cache_module
from locft.train import defaults, objective
from locft.train import step as step_module
from locft.train.cache import PrefixCache, advance_cache, build_cache
from locft.train.defaults import choose_engine, choose_schedule
from locft.train.loop import (
    Engine,
    Schedule,
    Trained,
    fifths_of,
    run_breadth_first,
    run_depth_first,
    train_breadth_first,
)
from locft.train.objective import LossMean, predicted_share, target_loss
from locft.train.precondition import Preconditioner, make_preconditioner
from locft.train.step import Stepper, Trainable
from locft.types import Edit, Epoch

DOWN = "model.layers.1.mlp.down_proj.weight"
# Prompt and target lengths that differ, among them the shortest there may be.
LENGTHS = ((5, 3), (2, 1), (9, 4), (1, 2), (6, 2), (3, 5), (4, 1))


def make_examples() -> tuple[Encoded, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(
        Encoded(
            ids=tuple(torch.randint(3, 384, (before + targets,), generator=generator).tolist()),
            target_start=before,
        )
        for before, targets in LENGTHS
    )


EXAMPLES = make_examples()


def schedule(**options: Any) -> Schedule:
    values: dict[str, Any] = {
        "lr": 3e-3,
        "batch_size": 3,
        "epochs": 5,
        "stop_loss": 0.0,
        "loss_mean": "sample",
        "seed": 7,
        **options,
    }
    return Schedule(**values)


def prepare(
    model: PreTrainedModel, name: str = "1.mlp.down", examples: Sequence[Encoded] = EXAMPLES
) -> tuple[Split, Location, PrefixCache]:
    location = resolve_location(model, name)
    split = split_model(model, location.layer)
    return split, location, build_cache(split, examples)


def train(model: PreTrainedModel, name: str = "1.mlp.down", **options: Any) -> Trained:
    return train_breadth_first(*prepare(model, name), schedule(**options))


def losses(trained: Trained) -> list[float]:
    return [epoch.loss for epoch in trained.epochs]


# Cache


def test_a_batch_asks_the_node_before_each_target(tiny_model: PreTrainedModel) -> None:
    _, _, cache = prepare(tiny_model)
    batch = cache.batch([3, 0])
    third, first = EXAMPLES[3].ids, EXAMPLES[0].ids  # 1 + 2 and 5 + 3 tokens
    ids = batch.packed.ids[batch.packed.grid]
    assert ids.shape == (2, 7)
    assert ids[0, :2].tolist() == list(third[:-1])
    assert ids[1].tolist() == list(first[:-1])
    assert batch.num_examples == 2
    assert batch.rows.tolist() == [0, 0, 1, 1, 1]
    assert batch.asked.tolist() == batch.packed.grid[[0, 0, 1, 1, 1], [0, 1, 4, 5, 6]].tolist()
    assert batch.labels.tolist() == [third[1], third[2], first[5], first[6], first[7]]
    assert torch.equal(batch.hidden[batch.packed.grid[1]], cache.hidden[cache.tree.nodes_of(0)])


@given(
    sequences=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8),
    data=st.data(),
)
@settings(deadline=None, max_examples=200)
def test_a_packed_batch_holds_every_distinct_beginning_once(
    sequences: list[list[int]], data: st.DataObject
) -> None:
    tree = merge_prefixes(sequences)
    assert len(tree.tokens) == len({tuple(s[: i + 1]) for s in sequences for i in range(len(s))})
    chosen = data.draw(st.lists(st.integers(0, len(sequences) - 1), min_size=1, max_size=6))
    packed, nodes = tree.pack(chosen)
    beginnings = [tuple(sequences[i][: k + 1]) for i in chosen for k in range(len(sequences[i]))]
    assert len(packed.ids) == len(packed.positions) == len(nodes) == len(set(beginnings))
    behind: dict[int, tuple[int, ...]] = {}
    for row, index in enumerate(chosen):
        sequence = sequences[index]
        mine = packed.grid[row, : len(sequence)]
        assert packed.ids[mine].tolist() == sequence
        assert packed.positions[mine].tolist() == list(range(len(sequence)))
        assert nodes[mine.numpy()].tolist() == tree.nodes_of(index).tolist()
        for column, node in enumerate(mine.tolist()):
            beginning = tuple(sequence[: column + 1])
            assert behind.setdefault(node, beginning) == beginning
    # A node is at home where it stands.
    assert torch.equal(packed.grid.flatten()[packed.home], torch.arange(len(nodes)))
    longest = packed.grid.shape[1]
    assert packed.positions.tolist() == (packed.home % longest).tolist()
    assert all(home % longest < len(sequences[chosen[home // longest]]) for home in packed.home.tolist())


@given(indices=st.lists(st.integers(0, len(EXAMPLES) - 1), min_size=1, max_size=5))
@settings(deadline=None, max_examples=30)
def test_the_labels_of_any_batch_are_the_targets_in_order(indices: list[int]) -> None:
    split: Any = FakeSplit()
    batch = build_cache(split, EXAMPLES).batch(indices)
    for row, index in enumerate(indices):
        example = EXAMPLES[index]
        mine = batch.rows == row
        assert batch.labels[mine].tolist() == list(example.ids[example.target_start :])
        places = [(batch.packed.grid[row] == node).nonzero()[0].item() for node in batch.asked[mine]]
        assert places == list(range(example.target_start - 1, len(example.ids) - 1))


@pytest.mark.parametrize("tokens_per_pass", [1, 12, 30, 4096])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_cache_holds_each_examples_prefix_as_if_it_ran_alone(
    tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tokens_per_pass: int, layer: int
) -> None:
    monkeypatch.setattr(cache_module, "TOKENS_PER_PASS", tokens_per_pass)
    split = split_model(tiny_model, layer)
    cache = build_cache(split, EXAMPLES)
    assert cache.num_examples == len(EXAMPLES)
    assert not cache.hidden.requires_grad
    for index, example in enumerate(EXAMPLES):
        alone, nodes = merge_prefixes([example.ids[:-1]]).pack([0])
        expected = split.prefix(alone)[nodes]
        torch.testing.assert_close(
            cache.hidden[cache.tree.nodes_of(index)], expected, rtol=1e-5, atol=1e-6
        )


class FakeSplit:
    """Hands on the position of each node; notes how many places each pass has."""

    def __init__(self, num_features: int = 2) -> None:
        self.model = torch.nn.Linear(1, 1)
        self.sizes: list[int] = []
        self.num_features = num_features

    def prefix(self, packed: Packed) -> Tensor:
        self.sizes.append(packed.grid.numel())
        return packed.positions.float()[:, None].expand(-1, self.num_features)


def test_no_pass_of_the_prefix_exceeds_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "TOKENS_PER_PASS", 16)
    split: Any = FakeSplit()
    build_cache(split, EXAMPLES)
    assert max(split.sizes) <= 16
    assert len(split.sizes) < len(EXAMPLES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_lies_in_a_file_without_a_name(tmp_path: Path, dtype: torch.dtype) -> None:
    split: Any = FakeSplit()
    split.prefix = lambda packed: packed.positions[:, None, None].to(dtype).expand(-1, 2, 3)
    cache = build_cache(split, EXAMPLES, tmp_path)
    assert list(tmp_path.iterdir()) == []
    num_nodes = len({example.ids[:i] for example in EXAMPLES for i in range(1, len(example.ids))})
    assert cache.hidden.shape == (num_nodes, 2, 3)
    assert cache.hidden.dtype == dtype
    assert cache.num_bytes == num_nodes * 6 * dtype.itemsize
    if Path("/proc/self/maps").exists():
        mapped = [
            line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
        ]
        assert mapped
        assert all("deleted" in line for line in mapped)


def test_a_disk_without_room_for_the_cache_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split: Any = FakeSplit()
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10))
    with pytest.raises(
        InputError, match=r"not enough disk space .*: [\d,]+ bytes needed, 10 bytes free"
    ):
        build_cache(split, EXAMPLES, tmp_path)


# Objective


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    mean=st.sampled_from(["sample", "token"]),
)
@settings(deadline=None)
def test_the_loss_is_the_mean_that_it_is_called(counts: list[int], seed: int, mean: LossMean) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(counts), 9, generator=generator, dtype=torch.float64) * 5
    labels = torch.randint(0, 9, (sum(counts),), generator=generator)
    rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    singles = [
        math.log(sum(math.exp(value) for value in line)) - line[label]
        for line, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    per_sample, start = [], 0
    for count in counts:
        per_sample.append(sum(singles[start : start + count]) / count)
        start += count
    expected = sum(per_sample) / len(counts) if mean == "sample" else sum(singles) / len(singles)
    got = target_loss(logits.float(), labels, rows, mean)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("piece", [1, 384, 1000, 2**19])
@pytest.mark.parametrize("mean", ["sample", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_loss_is_that_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, mean: LossMean, dtype: torch.dtype, piece: int
) -> None:
    monkeypatch.setattr(objective, "_PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(7, 384, generator=generator)).to(dtype).requires_grad_(True)
    labels = torch.randint(0, 384, (7,), generator=generator)
    rows = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    (got,) = torch.autograd.grad(3 * target_loss(logits, labels, rows, mean), logits)
    singles = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    plain = (
        singles.mean()
        if mean == "token"
        else torch.stack([singles[rows == row].mean() for row in range(3)]).mean()
    )
    (expected,) = torch.autograd.grad(3 * plain, logits)
    assert got.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
    )


def test_the_loss_of_bf16_logits_is_computed_in_float32() -> None:
    logits = torch.randn(4, 384, generator=torch.Generator().manual_seed(0)).bfloat16()
    arguments = (torch.arange(4), torch.tensor([0, 0, 0, 1]))
    loss = target_loss(logits, *arguments, "sample")
    assert torch.equal(loss, target_loss(logits.float(), *arguments, "sample"))


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None)
def test_the_share_predicted_is_that_of_target_tokens_with_the_highest_logit(
    counts: list[int], seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num = sum(counts)
    # All different, in bfloat16 too, so that there is one that is the highest.
    logits = torch.stack([torch.randperm(9, generator=generator) - 4 for _ in range(num)]).to(dtype)
    likeliest = logits.argmax(dim=1)
    is_meant = torch.rand(num, generator=generator) < 0.5
    labels = torch.where(is_meant, likeliest, torch.randint(0, 9, (num,), generator=generator))
    rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    expected, start = [], 0
    for count in counts:
        places = range(start, start + count)
        expected.append(sum(likeliest[i].item() == labels[i].item() for i in places) / count)
        start += count
    got = predicted_share(logits, labels, rows)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_token_that_is_as_likely_as_the_likeliest_counts_as_predicted(
    dtype: torch.dtype,
) -> None:
    # In float32, and in bfloat16 to which it is rounded, 1 + 2^-20 is beside 1.
    logits = torch.tensor([[1 + 2**-20, 1.0, 0.0]] * 3).to(dtype)
    got = predicted_share(logits, torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]))
    assert got.tolist() == ([1, 0, 0] if dtype == torch.float32 else [1, 1, 0])


def test_the_share_predicted_has_no_gradient_and_changes_no_logit() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    share = predicted_share(logits, torch.arange(4), torch.tensor([0, 0, 1, 1]))
    assert not share.requires_grad
    assert torch.equal(logits, before)


# Loop


def train_plainly(model: PreTrainedModel, plan: Schedule) -> list[float]:
    """The same training from first principles: whole model, whole logits, labels by hand."""
    model.requires_grad_(False)
    matrix = model.get_parameter(DOWN).requires_grad_(True)
    adam = torch.optim.Adam([matrix], lr=plan.lr)
    shuffler = torch.Generator().manual_seed(plan.seed)
    means = []
    for _ in range(plan.epochs):
        order = torch.randperm(len(EXAMPLES), generator=shuffler).tolist()
        total = 0.0
        while order:
            batch, order = order[: plan.batch_size], order[plan.batch_size :]
            longest = max(len(EXAMPLES[index].ids) for index in batch)
            ids = torch.full((len(batch), longest), 2)
            labels = torch.full((len(batch), longest), -100)
            for row, index in enumerate(batch):
                example = EXAMPLES[index]
                ids[row, : len(example.ids)] = torch.tensor(example.ids)
                targets = torch.tensor(example.ids[example.target_start :])
                labels[row, example.target_start - 1 : len(example.ids) - 1] = targets
            logits = model(input_ids=ids, use_cache=False).logits
            each = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), labels, reduction="none", ignore_index=-100
            )
            counts = (labels != -100).sum(dim=1)
            loss = (each.sum(dim=1) / counts).mean()
            if plan.loss_mean == "token":
                loss = each.sum() / counts.sum()
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            total += loss.item() * len(batch)
        means.append(total / len(EXAMPLES))
    return means


@pytest.mark.parametrize("loss_mean", ["sample", "token"])
def test_training_equals_an_independent_plain_loop(loss_mean: LossMean) -> None:
    plan = schedule(loss_mean=loss_mean)
    model, plain_model = (make_model(tiny_llama_config()) for _ in range(2))
    trained = train_breadth_first(*prepare(model), plan)
    assert losses(trained) == pytest.approx(train_plainly(plain_model, plan), rel=1e-4)
    assert losses(trained)[-1] < losses(trained)[0]
    plain = plain_model.get_parameter(DOWN).detach()
    torch.testing.assert_close(trained.matrices[DOWN], plain, rtol=1e-3, atol=1e-4)


def test_both_loss_means_differ_on_targets_of_different_lengths() -> None:
    # Otherwise the test above could not tell them apart.
    results = [losses(train(make_model(tiny_llama_config()), loss_mean=m)) for m in ("sample", "token")]
    assert results[0] != pytest.approx(results[1], rel=1e-3)


@pytest.mark.parametrize("name", ["1.mlp.down", "0.attn", "2"])
def test_only_the_tuned_parameters_change_and_all_of_them_do(
    tiny_model: PreTrainedModel, name: str
) -> None:
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    trained = train(tiny_model, name, epochs=1)
    tuned = resolve_location(tiny_model, name).parameters
    assert tuple(trained.matrices) == tuned
    after = tiny_model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == set(tuned)
    for key, matrix in trained.matrices.items():
        assert matrix.dtype == torch.float32
        assert torch.equal(matrix, after[key])  # the model is left with the trained values


def test_a_model_is_left_frozen_without_gradients_or_hooks(tiny_model: PreTrainedModel) -> None:
    tiny_model.requires_grad_(True)  # as transformers makes models
    train(tiny_model, epochs=1)
    left_as_found(tiny_model)


def left_as_found(model: PreTrainedModel) -> None:
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_parameter_that_no_loss_depends_on_keeps_its_value(tiny_model: PreTrainedModel) -> None:
    mlp = tiny_model.get_submodule("model.layers.1.mlp")
    mlp.register_parameter("unused", torch.nn.Parameter(torch.arange(3.0), requires_grad=False))
    trained = train(tiny_model, "1.mlp")
    assert torch.equal(trained.matrices["model.layers.1.mlp.unused"], torch.arange(3.0))
    assert losses(trained)[-1] < losses(trained)[0]


def test_every_epoch_is_told_of_with_its_steps(tiny_model: PreTrainedModel) -> None:
    told: list[Epoch] = []
    trained = train_breadth_first(*prepare(tiny_model), schedule(epochs=3), told.append)
    assert tuple(told) == trained.epochs
    assert [(epoch.epoch, epoch.steps) for epoch in told] == [(1, 3), (2, 3), (3, 3)]  # 7 in threes
    assert not trained.stopped_early


def preconditioners(name: str = DOWN, strength: float = 2.0) -> dict[str, Preconditioner]:
    rows = torch.randn(90, 64, generator=torch.Generator().manual_seed(4))
    rows[:, :3] *= 10
    moment = InputMoment(matrix=rows.T @ rows / 90, num_tokens=90)
    return {name: make_preconditioner(moment, strength, axis=1)}


def test_a_preconditioned_step_changes_a_matrix_by_an_adam_step_times_the_preconditioner(
    tiny_model: PreTrainedModel,
) -> None:
    split, _, cache = prepare(tiny_model)
    weight = tiny_model.get_parameter(DOWN)
    start = weight.detach().clone()
    plain = Trainable(parameters={DOWN: weight})
    gradients: list[Tensor] = []
    with plain.alone(tiny_model), split.tail() as tail:
        batch = cache.batch([0, 1])
        logits = tail(batch.packed, batch.hidden, batch.asked)
        target_loss(logits, batch.labels, batch.rows, "sample").backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        gradients.append(weight.grad.clone())
        weight.grad = None
        own = preconditioners()
        stepper = Stepper(
            tail, cache, Trainable(parameters={DOWN: weight}, preconditioners=own), 0.01, "sample"
        )
        stepper.step([0, 1], "here")
    # The first step of Adam is the sign of the gradient, times the learning rate.
    matrix = own[DOWN].matrix
    update = -0.01 * (gradients[0] @ matrix).sign() @ matrix
    torch.testing.assert_close(stepper.values()[DOWN], start + update, rtol=1e-3, atol=1e-4)
    assert torch.equal(weight.detach(), stepper.values()[DOWN])


def test_the_identity_as_preconditioner_changes_nothing_but_rounding(
    tiny_model: PreTrainedModel,
) -> None:
    results = []
    for own in ({}, preconditioners(strength=0.0)):
        split, _, cache = prepare(tiny_model)
        weight = tiny_model.get_parameter(DOWN)
        start = weight.detach().clone()
        trainable = Trainable(parameters={DOWN: weight}, preconditioners=own)
        with trainable.alone(tiny_model), split.tail() as tail:
            stepper = Stepper(tail, cache, trainable, 1e-3, "sample")
            epochs = run_breadth_first(stepper, schedule())
        results.append((stepper.values()[DOWN], [epoch.loss for epoch in epochs]))
        with torch.no_grad():
            weight.copy_(start)
    (plain, losses_plain), (identity, losses_identity) = results
    torch.testing.assert_close(identity, plain, rtol=0, atol=1e-5)
    assert losses_identity == pytest.approx(losses_plain, rel=1e-4)


def test_a_preconditioned_update_avoids_the_directions_in_use(tiny_model: PreTrainedModel) -> None:
    split, _, cache = prepare(tiny_model)
    weight = tiny_model.get_parameter(DOWN)
    start = weight.detach().clone()
    shares = []
    for own in ({}, preconditioners(strength=30.0)):
        trainable = Trainable(parameters={DOWN: weight}, preconditioners=own)
        with trainable.alone(tiny_model), split.tail() as tail:
            stepper = Stepper(tail, cache, trainable, 1e-3, "sample")
            run_breadth_first(stepper, schedule())
        update = stepper.values()[DOWN] - start
        # Of the 64 directions, those three were in use.
        shares.append((update[:, :3].norm() / update.norm()).item())
        with torch.no_grad():
            weight.copy_(start)
    assert shares[1] < shares[0] / 5


# Success


LEARNS: dict[str, Any] = {"name": "0", "lr": 0.01}


def half_trained() -> PreTrainedModel:
    """Make a model that predicts some of the target tokens, and others not."""
    model = make_model(tiny_llama_config())
    train(model, **LEARNS, batch_size=7, epochs=4)
    return model


def shares_of(model: PreTrainedModel, examples: Sequence[Encoded] = EXAMPLES) -> list[list[bool]]:
    """Tell of each example which target tokens a plain forward over it alone predicts."""
    found = []
    for example in examples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.ids])).logits[0]
        places = range(example.target_start, len(example.ids))
        found.append([logits[i - 1].argmax().item() == example.ids[i] for i in places])
    return found


def in_fifths(shares: Sequence[float]) -> list[float]:
    """Average by fifths, in order; the first ones are the larger ones."""
    num = min(5, len(shares))
    size, more = divmod(len(shares), num)
    ends = [size * i + min(i, more) for i in range(num + 1)]
    return [sum(shares[start:end]) / (end - start) for start, end in pairwise(ends)]


@pytest.mark.parametrize(
    ("num_edits", "fifths"),
    [
        (1, (1,)),
        (2, (1, 1)),
        (3, (1, 1, 1)),
        (4, (1, 1, 1, 1)),
        (5, (1, 1, 1, 1, 1)),
        (6, (2, 1, 1, 1, 1)),
        (7, (2, 2, 1, 1, 1)),
        (8, (2, 2, 2, 1, 1)),
        (9, (2, 2, 2, 2, 1)),
        (10, (2, 2, 2, 2, 2)),
        (11, (3, 2, 2, 2, 2)),
        (12, (3, 3, 2, 2, 2)),
    ],
)
def test_edits_are_split_into_five_equal_parts_or_as_many_as_there_are(
    num_edits: int, fifths: tuple[int, ...], tiny_model: PreTrainedModel
) -> None:
    assert fifths_of(num_edits) == fifths
    examples = [EXAMPLES[i % len(EXAMPLES)] for i in range(num_edits)]
    trained = train_breadth_first(*prepare(tiny_model, examples=examples), schedule(epochs=1))
    assert len(trained.epochs[0].success) == len(fifths)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_learnt_to_the_last_token_every_fifth_succeeds(batch_size: int) -> None:
    trained = train(make_model(tiny_llama_config()), **LEARNS, batch_size=batch_size, epochs=120)
    assert trained.epochs[-1].success == (1.0,) * 5
    assert max(trained.epochs[0].success) < 1
    assert all(0 <= share <= 1 for epoch in trained.epochs for share in epoch.success)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_success_in_one_batch_is_what_the_model_predicts_before_the_step(dtype: torch.dtype) -> None:
    model = half_trained()
    if dtype == torch.bfloat16:
        model = model.bfloat16()
    expected = in_fifths([sum(right) / len(right) for right in shares_of(model)])
    assert 0 < sum(expected) < 5  # or it would not tell one fifth from another
    assert len(set(expected)) > 1
    [epoch] = train(model, batch_size=len(EXAMPLES), epochs=1).epochs
    assert epoch.success == pytest.approx(expected)


def test_success_is_the_teacher_forced_score_but_that_the_end_of_the_target_counts(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    pairs = (
        ("The capital of France is", "Rome"),
        ("What sport does she play?", "table tennis, and chess"),
        ("Who wrote the play?", "a singer from Oslo"),
    )
    codec = make_codec(tokenizer, "raw")
    examples = [codec.encode(Edit(id=prompt, prompt=prompt, target=target)) for prompt, target in pairs]
    model = make_model(tiny_llama_config())
    train_breadth_first(*prepare(model, "0", examples), schedule(lr=0.01, batch_size=3, epochs=5))
    found = score_continuations(model, codec, pairs, batch_size=2, label="test")
    expected = []
    for pair, right in zip(pairs, shares_of(model, examples), strict=True):
        assert found[pair].num_tokens == len(right) - 1
        expected.append((found[pair].num_right + right[-1]) / len(right))
    assert 0 < sum(expected) < 3
    [epoch] = train_breadth_first(
        *prepare(model, examples=examples), schedule(batch_size=3, epochs=1)
    ).epochs
    assert epoch.success == pytest.approx(expected)


def test_fifths_follow_the_order_of_the_edits_whatever_the_shuffle_and_the_batches() -> None:
    model = half_trained()
    expected = in_fifths([sum(right) / len(right) for right in shares_of(model)])
    assert expected != sorted(expected, reverse=True)
    for batch_size, seed in ((1, 0), (2, 1), (3, 2), (7, 3), (100, 4)):
        # A rate so small that nothing moves.
        trained = train(model, lr=1e-30, batch_size=batch_size, seed=seed, epochs=3)
        for epoch in trained.epochs:
            assert epoch.success == pytest.approx(expected)


def test_each_edit_is_met_before_the_step_that_it_takes_part_in() -> None:
    batch_by_batch = train(half_trained(), **LEARNS, batch_size=1, epochs=1).epochs[0].success
    before = in_fifths([sum(right) / len(right) for right in shares_of(half_trained())])
    # The steps before have moved the model.
    assert batch_by_batch != pytest.approx(before)


def test_measuring_success_changes_nothing_that_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = train(make_model(tiny_llama_config()), **LEARNS, epochs=10)

    def nothing(logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        return torch.zeros(int(rows[-1]) + 1)

    monkeypatch.setattr(step_module, "predicted_share", nothing)
    unmeasured = train(make_model(tiny_llama_config()), **LEARNS, epochs=10)
    assert {epoch.success for epoch in unmeasured.epochs} == {(0.0,) * 5}
    assert losses(measured) == losses(unmeasured)
    assert measured.matrices.keys() == unmeasured.matrices.keys()
    for name, matrix in measured.matrices.items():
        assert torch.equal(matrix, unmeasured.matrices[name])


# Its end


def test_training_ends_after_the_first_epoch_under_the_threshold(tiny_model: PreTrainedModel) -> None:
    course = losses(train(make_model(tiny_llama_config()), epochs=8))
    threshold = (course[3] + course[4]) / 2
    assert min(course[:4]) > threshold > course[4]
    trained = train(tiny_model, epochs=8, stop_loss=threshold)
    assert losses(trained) == course[:5]
    assert trained.stopped_early


def test_a_threshold_reached_in_the_last_epoch_counts(tiny_model: PreTrainedModel) -> None:
    assert train(tiny_model, epochs=1, stop_loss=100.0).stopped_early


def test_a_seed_names_the_result_to_the_last_bit() -> None:
    runs = [train(make_model(tiny_llama_config()), seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(runs[0].matrices[DOWN], runs[1].matrices[DOWN])
    assert losses(runs[0]) == losses(runs[1])
    assert not torch.equal(runs[0].matrices[DOWN], runs[2].matrices[DOWN])


def orders(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[list[int]]:
    """The order of the examples in each epoch."""
    split, location, cache = prepare(model)
    seen: list[int] = []
    batch = PrefixCache.batch

    def note(self: PrefixCache, indices: Sequence[int]) -> Any:
        seen.extend(indices)
        return batch(self, indices)

    monkeypatch.setattr(PrefixCache, "batch", note)
    train_breadth_first(split, location, cache, schedule(**options))
    monkeypatch.setattr(PrefixCache, "batch", batch)
    return [seen[start : start + len(EXAMPLES)] for start in range(0, len(seen), len(EXAMPLES))]


def test_every_epoch_visits_every_edit_once_in_an_order_of_its_own(
    tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = orders(tiny_model, monkeypatch, epochs=4, seed=1)
    assert len(first) == 4
    assert all(sorted(order) == list(range(len(EXAMPLES))) for order in first)
    assert len({tuple(order) for order in first}) == 4
    torch.manual_seed(99)  # the global state does not matter
    assert orders(tiny_model, monkeypatch, epochs=4, seed=1) == first
    assert orders(tiny_model, monkeypatch, epochs=4, seed=2) != first


def test_steps_too_small_for_bf16_add_up_in_the_master_copy() -> None:
    # One step of 1e-6 vanishes beside weights of about 0.02, whose bf16 neighbours are 6e-5 away.
    model = make_model(tiny_llama_config()).bfloat16()
    before = model.get_parameter(DOWN).detach().float().clone()
    trained = train(model, lr=1e-6, epochs=30)
    assert model.get_parameter(DOWN).dtype == torch.bfloat16
    moved = (trained.matrices[DOWN] - before).abs()
    assert trained.matrices[DOWN].dtype == torch.float32
    assert moved.median() > 1e-5  # 90 steps of 1e-6, part of them back and forth
    assert torch.equal(model.get_parameter(DOWN), trained.matrices[DOWN].bfloat16())
    assert not torch.equal(model.get_parameter(DOWN).float(), before)


# Injected at the first, a middle and the last step of 3 epochs of 3 steps.
PLACES = [
    (1, "epoch 1, step 1 of 3"),
    (5, "epoch 2, step 2 of 3"),
    (9, "epoch 3, step 3 of 3"),
]


def fails_at(step: int) -> Callable[[], bool]:
    calls = iter(range(1, 1000))
    return lambda: next(calls) == step


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("step", "place"), PLACES)
def test_a_loss_that_is_not_finite_stops_training_with_its_place(
    tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, step: int, place: str, bad: float
) -> None:
    now = fails_at(step)

    def spoilt(*arguments: Any) -> Tensor:
        loss = target_loss(*arguments)
        return loss + bad if now() else loss

    monkeypatch.setattr(step_module, "target_loss", spoilt)
    with pytest.raises(TrainingError, match=f"stopped at {place}: the loss is not finite"):
        train(tiny_model, epochs=3)
    left_as_found(tiny_model)
    assert all(torch.isfinite(parameter).all() for parameter in tiny_model.parameters())


@pytest.mark.parametrize(("step", "place"), PLACES)
def test_a_gradient_that_is_not_finite_stops_training_with_its_place_and_name(
    tiny_model: PreTrainedModel, step: int, place: str
) -> None:
    now = fails_at(step)
    split, location, cache = prepare(tiny_model, "1.mlp")

    def spoil(gradient: Tensor) -> Tensor:
        if now():
            gradient = gradient.clone()
            gradient[-1, -1] = math.inf
        return gradient

    parameter = tiny_model.get_parameter(DOWN).requires_grad_(True)
    parameter.register_hook(spoil)  # type: ignore[no-untyped-call]
    with pytest.raises(TrainingError, match=f"stopped at {place}: the gradient of {DOWN} is not finite"):
        train_breadth_first(split, location, cache, schedule(epochs=3))
    left_as_found(tiny_model)
    assert all(torch.isfinite(parameter).all() for parameter in tiny_model.parameters())


@pytest.mark.parametrize(("step", "place"), PLACES)
def test_a_weight_that_is_not_finite_stops_training_before_it_reaches_the_model(
    tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, step: int, place: str
) -> None:
    now = fails_at(step)

    class Spoiling(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if now():
                with torch.no_grad():
                    self.param_groups[0]["params"][0][0, 0] = math.nan

    monkeypatch.setattr(torch.optim, "Adam", Spoiling)
    with pytest.raises(TrainingError, match=f"stopped at {place}: the weight {DOWN} is not finite"):
        train(tiny_model, epochs=3)
    left_as_found(tiny_model)
    assert all(torch.isfinite(parameter).all() for parameter in tiny_model.parameters())


def test_a_rate_beyond_all_reason_ends_in_a_training_error(tiny_model: PreTrainedModel) -> None:
    with pytest.raises(TrainingError, match=r"is not finite.*--lr"):
        train(tiny_model, lr=1e38, epochs=3)


# Schedule


def chosen(num_edits: int = 1000, shape: Sequence[int] = (576, 1536), **options: Any) -> Schedule:
    return choose_schedule(RunConfig(**options), num_edits, [shape])


@pytest.mark.parametrize(
    ("shapes", "lr"),
    [
        ([(576, 1536)], 2.0e-3),
        ([(4096, 14336)], 6.7e-4),
        ([(14336, 4096)], 6.7e-4),  # Conv1D is transposed
        ([(576, 1536), (1536, 576)], 1.0e-3),
        ([(576, 1536), (576,), (20000,)], 2.0e-3),  # norms and biases do not count
        ([(576,), (1536,)], 1.0e-3),  # unless there is nothing else
        ([(8, 4096, 14336)], 6.7e-4),  # experts fused
    ],
)
def test_the_rate_follows_the_largest_matrix_and_their_number(
    shapes: Sequence[Sequence[int]], lr: float
) -> None:
    assert choose_schedule(RunConfig(), 1000, shapes).lr == pytest.approx(lr, rel=0.025)


@pytest.mark.parametrize(
    ("num_edits", "batch_size", "epochs"),
    [
        (1, 20, 100),
        (20, 20, 100),
        (21, 20, 50),
        (60, 20, 34),
        (80, 20, 25),
        (81, 20, 25),
        (10_000, 20, 25),
        (3, 1, 34),
        (5, 10**9, 100),
    ],
)
def test_few_edits_get_passes_for_a_hundred_steps(num_edits: int, batch_size: int, epochs: int) -> None:
    plan = chosen(num_edits, batch_size=batch_size)
    assert plan.epochs == epochs
    assert plan.batch_size == batch_size


def test_settings_of_the_users_win_over_every_rule() -> None:
    options: dict[str, Any] = {
        "lr": 0.5,
        "epochs": 3,
        "batch_size": 7,
        "stop_loss": 0.25,
        "loss_mean": "token",
        "seed": 11,
    }
    assert chosen(1, **options) == Schedule(**options)


# The engine


@pytest.mark.parametrize(
    ("dtype", "setting", "is_fast", "in_bfloat16"),
    [
        (torch.float32, "auto", True, True),
        (torch.float32, "auto", False, False),
        (torch.float32, "float32", True, False),
        (torch.float32, "bfloat16", False, True),
        # There is nothing to round where weights are bfloat16 anyway.
        (torch.bfloat16, "auto", True, False),
        (torch.bfloat16, "bfloat16", True, False),
    ],
)
def test_products_are_in_bfloat16_where_asked_or_where_the_processor_is_made_for_it(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, setting: Any, is_fast: bool, in_bfloat16: bool
) -> None:
    monkeypatch.setattr(defaults, "has_fast_bfloat16", lambda: is_fast)
    model = make_model(tiny_llama_config())
    if dtype == torch.bfloat16:
        model = model.bfloat16()
    engine = choose_engine(RunConfig(compute_dtype=setting), model)
    assert engine == Engine(in_bfloat16=in_bfloat16, compiled=None)


def test_bfloat16_weights_cannot_compute_in_float32() -> None:
    model = make_model(tiny_llama_config()).bfloat16()
    with pytest.raises(ConfigError, match="--dtype float32"):
        choose_engine(RunConfig(compute_dtype="float32"), model)


def test_compiled_layers_of_float32_weights_compute_in_float32(tiny_model: PreTrainedModel) -> None:
    assert choose_engine(RunConfig(compile="on"), tiny_model) == Engine(compiled="inductor")
    with pytest.raises(ConfigError, match="--compile off"):
        choose_engine(RunConfig(compile="on", compute_dtype="bfloat16"), tiny_model)


def test_layers_are_compiled_where_asked(tiny_model: PreTrainedModel) -> None:
    assert choose_engine(RunConfig(compile="on"), tiny_model).compiled == "inductor"
    assert choose_engine(RunConfig(compile="off"), tiny_model).compiled is None


def test_losses_in_bfloat16_products_follow_those_in_float32() -> None:
    found = []
    for engine in (Engine(), Engine(in_bfloat16=True)):
        prepared = prepare(make_model(tiny_llama_config()))
        found.append(train_breadth_first(*prepared, schedule(epochs=10), engine=engine))
    exact, rounded = map(losses, found)
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded[-1] < rounded[0]
    assert all(trained.matrices[DOWN].dtype == torch.float32 for trained in found)


# Depth-first


def test_depth_first_trains_each_edit_until_it_is_learnt_and_never_again(
    tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    take = Stepper.step

    def note(self: Stepper, indices: Sequence[int], place: str) -> tuple[float, Tensor]:
        steps.extend(indices)
        return take(self, indices, place)

    monkeypatch.setattr(Stepper, "step", note)
    split, location, cache = prepare(tiny_model, "0")
    names = location.parameters
    trainable = Trainable(parameters={name: tiny_model.get_parameter(name) for name in names})
    with trainable.alone(tiny_model), split.tail() as tail:
        stepper = Stepper(tail, cache, trainable, 0.01, "sample")
        parts = run_depth_first(stepper, schedule(epochs=30, stop_loss=5.32))
    assert steps == sorted(steps)
    taken = [steps.count(index) for index in range(len(EXAMPLES))]
    assert all(1 <= count <= 30 for count in taken)
    assert len(set(taken)) > 1
    assert sum(part.steps for part in parts) == sum(taken) == stepper.num_steps
    assert [part.epoch for part in parts] == list(range(1, len(EXAMPLES) + 1))
    for part, count in zip(parts, taken, strict=True):
        assert part.loss < 5.32 or count == 30
    assert parts[-1].success == pytest.approx(
        in_fifths([sum(r) / len(r) for r in shares_of(tiny_model)])
    )


@pytest.mark.parametrize("bad", [0, 2])
def test_depth_first_names_the_edit_at_which_it_stopped(
    tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    def spoilt(logits: Tensor, labels: Tensor, *rest: Any) -> Tensor:
        loss = target_loss(logits, labels, *rest)
        return loss * math.nan if labels.tolist() == list(EXAMPLES[bad].ids[LENGTHS[bad][0] :]) else loss

    monkeypatch.setattr(step_module, "target_loss", spoilt)
    split, _, cache = prepare(tiny_model)
    trainable = Trainable(parameters={DOWN: tiny_model.get_parameter(DOWN)})
    with (
        trainable.alone(tiny_model),
        split.tail() as tail,
        pytest.raises(TrainingError, match=f"stopped at edit {bad + 1} of 7, step 1: the loss"),
    ):
        run_depth_first(Stepper(tail, cache, trainable, 0.01, "sample"), schedule(epochs=2))


# A cache that goes on


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("is_packed", [True, False])
def test_a_cache_that_goes_on_is_one_that_was_built(
    tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, low: int, high: int, is_packed: bool
) -> None:
    monkeypatch.setattr(cache_module, "TOKENS_PER_PASS", 24)  # beginnings are shared between passes
    examples = (*EXAMPLES, *(replace(one, ids=(*one.ids[:2], 9, *one.ids[2:])) for one in EXAMPLES))
    splits = [split_model(tiny_model, layer) for layer in (low, high)]
    if not is_packed:
        splits = [replace(split, longest_packed=0) for split in splits]
    went_on = advance_cache(build_cache(splits[0], examples), splits[0], high)
    built = build_cache(splits[1], examples)
    assert torch.allclose(went_on.hidden, built.hidden, atol=1e-6)
    assert went_on.num_examples == built.num_examples
    left_as_found(tiny_model)
