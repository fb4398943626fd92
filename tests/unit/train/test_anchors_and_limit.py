from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from locft.data.encode import Encoded
from locft.model.location import Location, resolve_location
from locft.model.split import split_model
from locft.train import anchors as anchors_module
from locft.train import step as step_module
from locft.train.anchors import Anchors, make_anchors, mean_divergence
from locft.train.cache import build_cache
from locft.train.limit import DriftLimit
from locft.train.loop import Schedule, train_breadth_first
from locft.train.objective import kept_divergence
from locft.train.step import Stepper, Trainable

TEXTS = tuple(
    Encoded(ids=tuple(range(3 * n + 1, 3 * n + 9 + n)), target_start=1 + n % 2) for n in range(11)
)
EDITS = tuple(Encoded(ids=(5 + n, 9, 40 - n, 2), target_start=2) for n in range(6))
SCHEDULE = Schedule(lr=0.02, batch_size=3, epochs=8, stop_loss=0.0, loss_mean="sample", seed=0)


def exact_divergence(kept: Tensor, now: Tensor) -> Tensor:
    before, after = kept.log_softmax(1), now.log_softmax(1)
    return (before.exp() * (before - after)).sum(1).mean()


def told_apart(logits: Tensor, num: int) -> tuple[Tensor, Tensor]:
    scores = logits.log_softmax(1)
    likeliest = scores.topk(num, dim=1)
    others = (1 - likeliest.values.exp().sum(1, keepdim=True)).clamp(min=0).log()
    return likeliest.indices, torch.cat([likeliest.values, others], 1)


@given(seed=st.integers(0, 99), num=st.integers(1, 6))
def test_the_divergence_is_never_over_that_of_all_tokens_and_has_its_gradient(
    seed: int, num: int
) -> None:
    torch.manual_seed(seed)
    kept, now = torch.randn(5, 7), torch.randn(5, 7).requires_grad_()
    tokens, log_probs = told_apart(kept, num)
    found = kept_divergence(now, tokens, log_probs)
    found.backward()  # type: ignore[no-untyped-call]
    assert found.item() <= exact_divergence(kept, now.detach()).item() + 1e-6
    probs, own = log_probs.exp(), now.detach().clone().requires_grad_()
    q = own.softmax(1)
    told = q.gather(1, tokens)
    gone = torch.cat([told, 1 - told.sum(1, keepdim=True)], 1).log()
    expected = (probs * (log_probs - gone)).sum(1).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    assert now.grad is not None
    assert own.grad is not None
    torch.testing.assert_close(now.grad, own.grad, atol=1e-5, rtol=1e-4)


def test_the_divergence_from_what_is_kept_is_zero_with_no_gradient() -> None:
    logits = torch.randn(4, 9).requires_grad_()
    found = kept_divergence(logits, *told_apart(logits.detach(), 4))
    found.backward()  # type: ignore[no-untyped-call]
    assert found.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def test_a_prediction_of_certainty_is_kept_without_a_number_that_is_not_finite() -> None:
    logits = torch.zeros(2, 6).requires_grad_()
    tokens = torch.tensor([[1, 2], [3, 4]])
    sure = torch.tensor([[0.0, -torch.inf, -torch.inf]]).expand(2, 3)
    found = kept_divergence(logits, tokens, sure)
    found.backward()  # type: ignore[no-untyped-call]
    assert found.item() == pytest.approx(torch.tensor(6.0).log().item())
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@contextmanager
def ready(model: PreTrainedModel) -> Iterator[tuple[Anchors, Stepper, Location]]:
    location = resolve_location(model, "1.mlp.down")
    split = split_model(model, 1)
    trainable = Trainable(parameters={name: model.get_parameter(name) for name in location.parameters})
    cache, texts = build_cache(split, EDITS), build_cache(split, TEXTS)
    with trainable.alone(model), split.tail() as tail:
        anchors = make_anchors(tail, texts)
        stepper = Stepper(tail, cache, trainable, 0.02, "sample", may_shrink=True)
        yield anchors, stepper, location


def test_anchors_measure_the_divergence_of_whole_texts(
    tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchors_module, "_NUM_TOLD_APART", 10_000)
    before = [tiny_model(torch.tensor([one.ids])).logits[0, one.target_start - 1 : -1] for one in TEXTS]
    with ready(tiny_model) as (anchors, stepper, _):
        assert mean_divergence(anchors, stepper.tail) == pytest.approx(0, abs=1e-6)
        for _ in range(4):
            stepper.step([0, 1, 2], "here")
        found = mean_divergence(anchors, stepper.tail)
    after = [tiny_model(torch.tensor([one.ids])).logits[0, one.target_start - 1 : -1] for one in TEXTS]
    expected = exact_divergence(torch.cat(before), torch.cat(after)).item()
    assert expected > 1e-4
    assert found == pytest.approx(expected, rel=1e-2)


def test_shrinking_takes_back_a_part_of_the_update(tiny_model: PreTrainedModel) -> None:
    with ready(tiny_model) as (_, stepper, location):
        [name] = location.parameters
        start = tiny_model.get_parameter(name).detach().clone()
        stepper.step([0, 1], "here")
        changed = tiny_model.get_parameter(name).detach() - start
        stepper.shrink(0.25)
        left = tiny_model.get_parameter(name).detach() - start
        torch.testing.assert_close(left, 0.25 * changed, atol=1e-7, rtol=1e-4)
        torch.testing.assert_close(stepper.values()[name], tiny_model.get_parameter(name).detach())
        assert changed.abs().max() > 0


def test_a_limit_brings_drift_back_within_and_says_what_it_would_have_been(
    tiny_model: PreTrainedModel,
) -> None:
    with ready(tiny_model) as (anchors, stepper, _):
        for _ in range(5):
            stepper.step([0, 1, 2], "here")
        free = mean_divergence(anchors, stepper.tail)
        limit = DriftLimit(free / 10, anchors)
        assert limit.hold(stepper)
        assert limit.wanted > limit.most
        assert limit.wanted == pytest.approx(free)
        assert limit.drift == pytest.approx(mean_divergence(anchors, stepper.tail))
        assert 0.5 * limit.most < limit.drift <= limit.most
        assert not limit.hold(stepper)
        assert limit.num_shrunk == 1


def test_anchors_and_limits_lower_the_drift_of_a_training(
    tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "_ANCHOR_WEIGHT", 500.0)  # of a model that predicts next to nothing
    location = resolve_location(tiny_model, "1.mlp.down")
    split = split_model(tiny_model, 1)
    cache, texts = build_cache(split, EDITS), build_cache(split, TEXTS)
    start = {name: tiny_model.get_parameter(name).detach().clone() for name in location.parameters}
    with split.tail() as tail:
        judge = make_anchors(tail, texts)

    def train(schedule: Schedule, **keeps: object) -> float:
        with torch.no_grad():
            for name, value in start.items():
                tiny_model.get_parameter(name).copy_(value)
        train_breadth_first(split, location, cache, schedule, **keeps)  # type: ignore[arg-type]
        with split.tail() as tail:
            return mean_divergence(judge, tail)

    plain = train(SCHEDULE)
    assert train(SCHEDULE, anchors=texts) < 0.8 * plain
    limited = Schedule(**{**vars(SCHEDULE), "max_drift": plain / 5})
    assert train(limited, held_back=texts) <= plain / 5


def test_every_step_takes_the_next_anchors(
    tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "_ANCHORS_PER_STEP", 4)
    taken: list[list[int]] = []
    own = Anchors.divergence
    monkeypatch.setattr(
        Anchors,
        "divergence",
        lambda self, tail, indices: taken.append(list(indices)) or own(self, tail, indices),  # type: ignore[func-returns-value]
    )
    location = resolve_location(tiny_model, "1.mlp.down")
    split = split_model(tiny_model, 1)
    schedule = Schedule(**{**vars(SCHEDULE), "epochs": 2})
    train_breadth_first(
        split, location, build_cache(split, EDITS), schedule, anchors=build_cache(split, TEXTS)
    )
    assert taken == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 0], [1, 2, 3, 4]]
