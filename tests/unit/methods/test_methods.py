"""Every method trains what it says, gives the model's own parameters, and leaves the model as it was."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import make_model, tiny_llama_config
from torch import Tensor
from transformers import GPT2Config, PreTrainedModel

from locft.bench.published import published_loss
from locft.data.encode import Encoded
from locft.errors import ConfigError, MissingExtraError
from locft.methods import METHODS, Method, Plan, Tuning, choose_methods
from locft.model.split import split_model
from locft.model.weights import swapped_in
from locft.train.cache import build_cache
from locft.train.step import Stepper

EXAMPLES = tuple(
    Encoded(
        ids=tuple(torch.randint(3, 384, (8,), generator=torch.Generator().manual_seed(number)).tolist()),
        target_start=5,
    )
    for number in range(4)
)
IDS = torch.tensor([example.ids for example in EXAMPLES])
ALL = [0, 1, 2, 3]


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=384, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return make_model(config)


MODELS = {"llama": lambda: make_model(tiny_llama_config()), "gpt2": gpt2}


TRAINING = tuple(name for name, one in METHODS.items() if isinstance(one, Method))


def training_method(name: str) -> Method:
    method = METHODS[name]
    assert isinstance(method, Method)
    return method


def plan_of(name: str, **changes: Any) -> Plan:
    settings = {**METHODS[name].settings, **changes.pop("settings", {})}
    values = {"location": "1.mlp.down", "num_steps": 10, "seed": 0, **changes}
    return Plan(settings=settings, **values)


@contextmanager
def stepping(model: PreTrainedModel, tuning: Tuning, lr: float = 0.01) -> Iterator[Stepper]:
    split = split_model(model, tuning.layer)
    cache = build_cache(split, EXAMPLES)
    with tuning.trainable.alone(model), split.tail(from_tokens=tuning.from_tokens) as tail:
        yield Stepper(tail, cache, tuning.trainable, lr, "sample")


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", [name for name in TRAINING if name != "roselora"])
def test_what_training_made_of_the_model_is_what_its_parameters_come_to(name: str, family: str) -> None:
    model = MODELS[family]()
    before = logits_of(model)
    with training_method(name).attach(model, plan_of(name)) as tuning:
        with stepping(model, tuning) as stepper:
            first, _ = stepper.step(ALL, "here")
            for _ in range(8):
                last, _ = stepper.step(ALL, "here")
        trained = logits_of(model)
        values = tuning.values()
    assert last < first
    assert (trained - before).abs().max() > 0.01
    with swapped_in(model, values):
        assert torch.allclose(logits_of(model), trained, atol=1e-4)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(name: str, family: str, fails: bool) -> None:
    model = MODELS[family]()
    before, modules = state_of(model), [type(module) for module in model.modules()]
    try:
        with training_method(name).attach(model, plan_of(name)) as tuning:
            with stepping(model, tuning) as stepper:
                stepper.step(ALL, "here")
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert [type(module) for module in model.modules()] == modules
    after = state_of(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_adapters_begin_as_nothing_and_a_seed_names_how(name: str) -> None:
    model = MODELS["llama"]()
    found = []
    for seed in (1, 1, 2):
        with training_method(name).attach(model, plan_of(name, seed=seed)) as tuning:
            assert all(
                torch.allclose(
                    value, model.state_dict()[f"{key.removesuffix('weight')}base_layer.weight"]
                )
                for key, value in tuning.values().items()
            )
            found.append([one.detach().clone() for one in tuning.trainable.parameters.values()])
    assert all(map(torch.equal, found[0], found[1]))
    assert not all(map(torch.equal, found[0], found[2]))


def test_ft_m_trains_its_location_and_nothing_else() -> None:
    model = MODELS["llama"]()
    with training_method("ft-m").attach(model, plan_of("ft-m", location="2.mlp")) as tuning:
        assert tuning.layer == 2
        names = [f"model.layers.2.mlp.{part}_proj.weight" for part in ("down", "gate", "up")]
        assert list(tuning.trainable.parameters) == names
        assert list(tuning.values()) == names


def test_full_fine_tuning_equals_a_plain_step_of_the_whole_model() -> None:
    model, plain = MODELS["llama"](), MODELS["llama"]()
    with (
        training_method("full").attach(model, plan_of("full")) as tuning,
        stepping(model, tuning) as stepper,
    ):
        loss, _ = stepper.step(ALL, "here")
        stepper.step(ALL, "here")
        values = tuning.values()
    plain.requires_grad_(True)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        of_step = published_loss(plain, EXAMPLES)
        of_step.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(of_step.item())
    assert loss == pytest.approx(losses[0], rel=1e-5)
    assert values.keys() == dict(plain.named_parameters()).keys()
    # Tied embeddings learn from both their ends.
    assert "model.embed_tokens.weight" in values
    for name, parameter in plain.named_parameters():
        moved = (values[name] - parameter).abs()
        # Adam's first steps have one size, whose sign is chance where a gradient is rounding alone.
        assert (moved > 1e-4).float().mean() < 0.01


def test_lora_changes_no_more_than_its_rank() -> None:
    model = MODELS["llama"]()
    own = model.get_parameter("model.layers.0.self_attn.q_proj.weight").detach().clone()
    with training_method("lora").attach(model, plan_of("lora", settings={"rank": 2})) as tuning:
        with stepping(model, tuning) as stepper:
            for _ in range(3):
                stepper.step(ALL, "here")
        change = tuning.values()["model.layers.0.self_attn.q_proj.weight"] - own
    sizes = torch.linalg.svdvals(change)
    assert sizes[1] > 1e-5
    assert sizes[2] < 1e-6


def test_adalora_takes_ranks_away_until_its_budget_is_met() -> None:
    model = MODELS["llama"]()
    settings = {"rank": 2, "init_rank": 4}
    with training_method("adalora").attach(
        model, plan_of("adalora", num_steps=20, settings=settings)
    ) as tuning:
        sizes = [one for name, one in tuning.trainable.parameters.items() if "lora_E" in name]
        with stepping(model, tuning) as stepper:
            for step in range(1, 21):
                stepper.step(ALL, "here")
                kept = sum(int((one != 0).sum()) for one in sizes)
                if step == 1:
                    assert kept == 4 * len(sizes)
        assert kept == 2 * len(sizes)


def test_adalora_keeps_its_factors_near_orthogonal() -> None:
    def skewness(weight: float) -> float:
        model = MODELS["llama"]()
        settings = {"orthogonality": weight}
        with training_method("adalora").attach(
            model, plan_of("adalora", num_steps=100, settings=settings)
        ) as t:
            with stepping(model, t) as stepper:
                for _ in range(20):
                    stepper.step(ALL, "here")
            factors = [one for name, one in t.trainable.parameters.items() if "lora_A" in name]
            return sum(
                float(torch.linalg.matrix_norm(one @ one.t() - torch.eye(len(one)))) for one in factors
            )

    assert skewness(5.0) < skewness(0.0)


def test_unknown_methods_are_told_the_known_ones() -> None:
    for names in (("ft-m", "grace"), (), ("lora", "lora")):
        with pytest.raises(ConfigError, match="expected one or more of ft-m, lora, adalora, full"):
            choose_methods(names)
    assert [one.name for one in choose_methods(("full", "ft-m"))] == ["full", "ft-m"]


@pytest.mark.parametrize("name", ["lora", "adalora", "roselora"])
def test_methods_that_need_peft_say_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with (
        pytest.raises(MissingExtraError, match=rf"method {name} needs .* pip install 'locft\[study\]'"),
        training_method(name).attach(MODELS["llama"](), plan_of(name)),
    ):
        pass
