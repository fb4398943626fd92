"""FT-L, RoseLoRA and UltraEdit: their own rules, with the worked examples."""

import math

import pytest
import torch
from conftest import make_model, tiny_llama_config
from test_methods import ALL, EXAMPLES, gpt2, plan_of, stepping, training_method
from torch import Tensor

from locft.data.encode import Encoded
from locft.methods.memory.forms import ridge_update
from locft.methods.roselora import kept_share, mean_importance, prune_rows
from locft.methods.ultraedit import Normaliser, steps_of
from locft.model.split import split_model
from locft.train.cache import build_cache
from locft.train.objective import target_loss
from locft.train.step import Stepper


def test_ft_l_predicts_all_target_tokens_from_the_prompts_last() -> None:
    logits = torch.tensor([[1, 2, 0.5, -1]]).repeat(2, 1)
    loss = target_loss(logits, torch.tensor([1, 3]), torch.tensor([0, 0]), "sample")
    assert loss.item() == pytest.approx(1.995182, abs=1e-6)
    model = make_model(tiny_llama_config())
    split = split_model(model, 1)
    cache = build_cache(split, EXAMPLES, at_once=True)
    batch = cache.batch(ALL)
    with split.tail() as tail, torch.no_grad():
        found = tail(batch.packed, batch.hidden, batch.asked)
    with torch.no_grad():
        whole = [model(torch.tensor([one.ids[: one.target_start]])).logits[0, -1] for one in EXAMPLES]
    assert batch.labels.tolist() == [token for one in EXAMPLES for token in one.ids[5:]]
    expected = torch.stack([whole[number] for number in batch.rows.tolist()])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_ft_l_cannot_learn_an_answer_of_two_tokens_below_log_two() -> None:
    model = make_model(tiny_llama_config(initializer_range=0.5))
    with training_method("ft-l").attach(model, plan_of("ft-l")) as tuning:
        split = split_model(model, tuning.layer)
        cache = build_cache(split, [Encoded(ids=(5, 6, 7, 0), target_start=2)], at_once=True)
        with tuning.trainable.alone(model), split.tail() as tail:
            stepper = Stepper(tail, cache, tuning.trainable, 0.05, "sample")
            losses = [stepper.step([0], "here")[0] for _ in range(200)]
    assert min(losses) == pytest.approx(math.log(2), abs=0.05)
    assert min(losses) >= math.log(2)


def test_ft_l_keeps_each_weight_in_its_box() -> None:
    model = make_model(tiny_llama_config())
    name = "model.layers.1.mlp.down_proj.weight"
    start = model.get_parameter(name).detach().clone()
    boxed = plan_of("ft-l", settings={"box": 2e-3})
    with (
        training_method("ft-l").attach(model, boxed) as tuning,
        stepping(model, tuning, 0.05) as stepper,
    ):
        for _ in range(3):
            stepper.step(ALL, "here")
        moved = (stepper.values()[name] - start).abs()
    assert moved.max() <= 2e-3 + 1e-6
    assert (moved > 1.9e-3).float().mean() > 0.5


def test_roselora_keeps_everything_first_and_a_twentieth_in_the_end() -> None:
    shares = [kept_share(epoch, 0.05) for epoch in (0, 3, 4, 8, 12, 16, 19, 20, 99)]
    expected = [1, 1, 0.842021, 0.384134, 0.149003, 0.062375, 0.050193, 0.05, 0.05]
    assert shares == pytest.approx(expected, abs=1e-6)


def test_roselora_prunes_by_importance_averaged_over_steps() -> None:
    before = torch.tensor([0.9, 0.1, 0.4, 0.3, 0.8, 0.05, 0.6, 0.2, 0.7, 0.5])
    gradient = torch.tensor([0.5, -1, 0.2, 0.1, 0, 2, -0.3, 0.4, 0.1, -0.6])
    parameter = 1e-3 * torch.tensor([1, 2, -3, 4, 1, -1, 2, 3, -2, 1])
    found = mean_importance(before, parameter, gradient)
    expected = [0.7201, 0.0804, 0.32012, 0.24008, 0.64, 0.0404, 0.48012, 0.16024, 0.56004, 0.40012]
    assert found.tolist() == pytest.approx(expected)
    assert torch.equal(mean_importance(None, parameter, gradient), (parameter * gradient).abs())
    kept = prune_rows(torch.ones(1, 10), found[None], 0.5)
    assert kept.tolist() == [[1, 0, 1, 0, 1, 0, 1, 0, 1, 1]]
    assert torch.equal(prune_rows(torch.ones(1, 3), found[None, :3], 0.9), torch.ones(1, 3))


@pytest.mark.parametrize("box", [3e-3, 1e-2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_roselora_ends_sparse_and_in_its_box(family: str, box: float) -> None:
    model = make_model(tiny_llama_config()) if family == "llama" else gpt2()
    with training_method("roselora").attach(
        model, plan_of("roselora", num_steps=25, settings={"box": box})
    ) as tuning:
        with stepping(model, tuning, 0.01) as stepper:
            for _ in range(23):
                stepper.step(ALL, "here")
        for name, one in tuning.trainable.parameters.items():
            rows = one if "lora_A" in name else one.T
            allowed = rows.shape[1] - int(rows.shape[1] * 0.95) + 1
            assert int((rows != 0).sum(dim=1).max()) <= allowed
            assert one.abs().max() <= box
        assert any((one != 0).any() for one in tuning.trainable.parameters.values())


def rows(*of: list[float]) -> Tensor:
    return torch.tensor(of)


FIRST = rows([1, 0, 0.1, -0.2], [0, 2, 0.3, 0], [2, 1, -0.1, 0.1])
SECOND = rows([1, 1, 0.2, 0.2], [3, -1, 0, -0.4])


@pytest.mark.parametrize(
    ("is_exact", "deviation", "update"),
    [
        (
            False,
            [1.431782, 1.431782, 0.2, 0.329899],
            [[0.026098, 0.046629], [-0.061220, -0.043945]],
        ),
        (
            True,
            [1.140175, 1.140175, 0.158114, 0.240832],
            [[0.052056, 0.100725], [-0.122113, -0.094927]],
        ),
    ],
)
def test_ultraedit_gives_the_worked_example(
    is_exact: bool, deviation: list[float], update: list[list[float]]
) -> None:
    normaliser = Normaliser(4, is_exact=is_exact)
    for part in (FIRST, SECOND):
        normaliser.add(part)
    assert normaliser.mean.tolist() == pytest.approx([1.4, 0.6, 0.1, -0.06])
    assert normaliser.deviation.tolist() == pytest.approx(deviation, abs=1e-6)
    both = torch.cat([FIRST, SECOND])
    steps = steps_of(both[:, :2], both[:, 2:], normaliser, 0.1)
    if not is_exact:
        expected = [
            [0, 0.010765],
            [-0.191220, -0.034778],
            [0.025366, -0.012302],
            [-0.007805, -0.012302],
            [0.124878, 0.257403],
        ]
        torch.testing.assert_close(steps, torch.tensor(expected).double(), atol=1e-5, rtol=1e-4)
    found = ridge_update(both[:, :2].double(), steps)
    torch.testing.assert_close(found.T, torch.tensor(update).double(), atol=1e-5, rtol=1e-4)
