"""Requests, keys, target vectors, and what editors make of a model with them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CORPUS, make_model, tiny_llama_config, tiny_mixture_config
from torch import Tensor
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerBase

from locft.data.encode import Codec, make_codec
from locft.errors import ConfigError, EditsError, ModelError, TrainingError
from locft.methods import METHODS, Editor
from locft.methods.base import EditorPlan
from locft.methods.memory.edit import (
    choose_layers,
    choose_sites,
    flat_mean_keys,
    half_and_half_keys,
    moments_of,
)
from locft.methods.memory.requests import Request, make_request, refuse_without_subject
from locft.methods.memory.site import Splits, find_sites, look_up
from locft.methods.memory.targets import Search, find_targets, search_of
from locft.methods.memory.templates import write_prefixes
from locft.model.neutral import fingerprint
from locft.model.split import Split
from locft.types import Edit

EDITORS = tuple(name for name, one in METHODS.items() if isinstance(one, Editor))
EDITS = tuple(
    Edit(id=str(number), prompt=f"The home of {name} is", target=target, subject=name)
    for number, (name, target) in enumerate(
        {"Ada": "Rome", "Bo Li": "Oslo", "Cleo": "Paris", "Dag the Old": "Bonn"}.items()
    )
)
SEARCH = Search(at="block", num_passes=6, lr=0.3, decay=0.5, clamp=2.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCFT_CACHE", str(tmp_path))


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=384,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=_SPREAD,
    )
    return make_model(config)


def llama() -> PreTrainedModel:
    return make_model(tiny_llama_config(num_hidden_layers=4, initializer_range=_SPREAD))


_SPREAD = 0.2  # of weights, so that what a layer hands on matters
FAMILIES = {"llama": llama, "gpt2": gpt2}


@pytest.fixture
def codec(tokenizer: PreTrainedTokenizerBase) -> Codec:
    return make_codec(tokenizer, "raw")


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return FAMILIES[request.param]()


def requests_of(codec: Codec, prefixes: tuple[str, ...] = ("It rained", "I saw")) -> list[Request]:
    return [make_request(codec, edit, prefixes) for edit in EDITS]


def plan_of(model: PreTrainedModel, codec: Codec, name: str, **settings: Any) -> EditorPlan:
    editor = METHODS[name]
    assert isinstance(editor, Editor)
    ids = codec.tokenizer(CORPUS * 8)["input_ids"]
    return EditorPlan(
        codec=codec,
        lr=0.1,
        seed=0,
        settings={**editor.settings, **settings},
        sequences=[tuple(ids[first : first + 16]) for first in range(0, len(ids), 16)],
        model_sha256=fingerprint(model),
    )


def small(name: str) -> dict[str, Any]:
    """Settings for models of four layers and few tokens of ordinary text."""
    if name == "ultraedit":
        return {"layers": "1-2", "rate": 1e-3, "micro_batch": 2}
    if name == "rome":
        return {"layer": "1", "passes": 20, "covariance": False, "clamp": 50.0}
    more: dict[str, dict[str, Any]] = {
        "rect": {"covariance": False},
        "memit": {"lambda": 0.01},
        "alphaedit": {"threshold": 0.5, "ridge": 1e-3},
    }
    return {"layers": "1" if name == "rect" else "1-2", "passes": 20, "clamp": 50.0, **more[name]}


@pytest.mark.parametrize("before", ["", "It rained all day. "])
@pytest.mark.parametrize("edit", EDITS)
def test_the_lookup_token_ends_the_subject_alone_and_behind_a_text(
    codec: Codec, edit: Edit, before: str
) -> None:
    request = make_request(codec, edit, (before[:-2],) if before else ())
    row = request.prefixed[0] if before else request.bare
    subject = edit.subject or ""
    text = codec.tokenizer.decode(list(row.ids[: row.lookup + 1]))
    assert text == f"{before}The home of {subject}"
    whole = codec.tokenizer.decode(list(row.ids))
    assert whole == f"{before}{edit.prompt} {edit.target}{codec.tokenizer.eos_token}"
    assert row.ids[-1] == codec.eos_id
    essence = codec.tokenizer.decode(list(request.essence.ids[: request.essence.lookup + 1]))
    assert essence == subject


def test_in_a_chat_the_lookup_token_is_within_the_users_turn(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    request = make_request(make_codec(tokenizer, "chat"), EDITS[1], ("It rained",))
    for row in (request.bare, *request.prefixed):
        text = str(tokenizer.decode(list(row.ids[: row.lookup + 1])))
        assert text.endswith("The home of Bo Li")


def test_edits_without_a_subject_in_the_prompt_are_named_before_any_work() -> None:
    wrong = [
        Edit(id=str(number), prompt="Who?", target="x", subject=subject, source=f"line {number}")
        for number, subject in enumerate([None, "", "Ada", "Bo", "Cleo", "Dag"])
    ]
    with pytest.raises(EditsError, match=r"6 of 10 edits .*: line 0, line 1, .*line 4, and 1 more"):
        refuse_without_subject([*EDITS, *wrong])
    refuse_without_subject(EDITS)


def test_templates_have_their_length_and_follow_from_the_seed(
    model: PreTrainedModel, codec: Codec
) -> None:
    found = write_prefixes(model, codec, {6: 5, 9: 3}, seed=1)
    assert len(found) == 8
    assert found == write_prefixes(model, codec, {6: 5, 9: 3}, seed=1)
    assert found != write_prefixes(model, codec, {6: 5, 9: 3}, seed=2)
    assert [text.split()[0][:1] for text in found[:5]] == ["T", "T", "B", "I", "Y"]
    assert not any(mark in text for text in found for mark in ("{", "}", "<|end|>"))


def test_keys_are_what_enters_the_matrix_at_the_subjects_last_token(
    model: PreTrainedModel, codec: Codec
) -> None:
    [site] = find_sites(model, 1, "mlp.down")
    requests = requests_of(codec)
    rows = [row for one in requests for row in (one.bare, *one.prefixed)]
    seen = look_up(Splits(model), site, rows)
    kept: list[Tensor] = []
    handle = site.module.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    for number, row in enumerate(rows):
        with torch.no_grad():
            states = model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
        key = kept[-1][0, row.lookup].double()
        torch.testing.assert_close(seen.keys[number], key, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            seen.states[number], states[2][0, row.lookup].double(), atol=1e-5, rtol=1e-4
        )
        bias = getattr(site.module, "bias", None)
        value = site.matrix @ key + (0 if bias is None else bias.double())
        torch.testing.assert_close(seen.values[number], value, atol=1e-5, rtol=1e-4)
    handle.remove()


def test_memit_weighs_the_bare_key_by_half_and_rome_like_the_others(codec: Codec) -> None:
    keys = torch.tensor(
        [[1, 0, 2], [0.5, 0.5, 1], [0.7, 0.1, 1.4], [0.6, 0.2, 1.6], [0.8, 0, 1.2], [0.4, 0.2, 1.8]]
    ).double()
    half = (keys[0] + keys[1:].mean(dim=0)) / 2
    assert half.tolist() == pytest.approx([0.8, 0.1, 1.7])
    model = FAMILIES["llama"]()
    [site] = find_sites(model, 1, "mlp.down")
    requests = requests_of(codec)
    seen = look_up(
        Splits(model), site, [row for one in requests for row in (one.bare, *one.prefixed)]
    ).keys.view(4, 3, -1)
    found = half_and_half_keys(Splits(model), site, requests)
    torch.testing.assert_close(found.T, (seen[:, 0] + (seen[:, 1] + seen[:, 2]) / 2) / 2)
    bare, mean = flat_mean_keys(Splits(model), site, requests)
    torch.testing.assert_close(bare.T, seen[:, 0])
    torch.testing.assert_close(mean.T, seen.sum(dim=1) / 3)


@pytest.mark.parametrize("at", ["block", "mlp"])
def test_target_vectors_of_many_edits_are_those_of_each_alone(
    model: PreTrainedModel, codec: Codec, at: Any
) -> None:
    [site] = find_sites(model, 1, "mlp.down")
    requests = requests_of(codec)
    search = dataclasses.replace(SEARCH, at=at)
    together = find_targets(Splits(model), site, requests, search)
    for number, request in enumerate(requests):
        [alone] = find_targets(Splits(model), site, [request], search)
        torch.testing.assert_close(together[number], alone, atol=1e-3, rtol=1e-3)
    in_parts = find_targets(Splits(model), site, requests, search, per_pass=1)
    torch.testing.assert_close(together, in_parts, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("at", ["block", "mlp"])
def test_target_vectors_of_a_family_that_cannot_be_packed_are_the_same(
    model: PreTrainedModel, codec: Codec, at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    [site] = find_sites(model, 1, "mlp.down")
    search = dataclasses.replace(SEARCH, at=at)
    found = find_targets(Splits(model), site, requests_of(codec), search)
    monkeypatch.setattr(Split, "packs", lambda *_: False)
    padded = find_targets(Splits(model), site, requests_of(codec), search)
    torch.testing.assert_close(found, padded, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("at", ["block", "mlp"])
def test_a_relative_step_counts_in_root_mean_squares_of_the_edits_own_state(
    model: PreTrainedModel, codec: Codec, at: Any
) -> None:
    [site] = find_sites(model, 1, "mlp.down")
    search = dataclasses.replace(SEARCH, at=at)
    relative = dataclasses.replace(search, is_relative=True)
    requests = requests_of(codec)
    found = find_targets(Splits(model), site, requests, relative)
    for number, request in enumerate(requests):
        seen = look_up(Splits(model), site, [request.bare])
        state = seen.states if at == "block" else seen.values
        rate = search.lr * (state**2).mean().sqrt().item()
        [alone] = find_targets(Splits(model), site, [request], dataclasses.replace(search, lr=rate))
        torch.testing.assert_close(found[number], alone, atol=1e-3, rtol=1e-3)


def test_an_unknown_kind_of_step_is_refused(model: PreTrainedModel, codec: Codec) -> None:
    plan = plan_of(model, codec, "memit", **{**small("memit"), "step": "large"})
    with pytest.raises(ConfigError, match="step is 'large': expected relative or absolute"):
        search_of(plan, "block")


def test_products_in_bfloat16_hardly_change_target_vectors(model: PreTrainedModel, codec: Codec) -> None:
    [site] = find_sites(model, 1, "mlp.down")
    exact = find_targets(Splits(model), site, requests_of(codec), SEARCH)
    search = dataclasses.replace(SEARCH, in_bfloat16=True)
    found = find_targets(Splits(model), site, requests_of(codec), search)
    assert not torch.equal(found, exact)
    assert ((found - exact).norm(dim=1) < 0.15 * exact.norm(dim=1)).all()


def plain_search(model: PreTrainedModel, request: Request, search: Search) -> Tensor:
    """Look for a vector with the whole model, row by row, by PyTorch's Adam: equation by equation."""
    layer = model.get_decoder().layers[1]
    rows = (request.bare, *request.prefixed)
    delta = torch.zeros(32, requires_grad=True)
    place = [0]

    def add(_: Any, __: Any, out: Any) -> Any:
        states = out[0] if isinstance(out, tuple) else out
        added = states.clone()
        added[0, place[0]] += delta
        return (added, *out[1:]) if isinstance(out, tuple) else added

    def run(row: Any) -> Tensor:
        place[0] = row.lookup
        logits: Tensor = model(torch.tensor([row.ids])).logits[0]
        return logits.log_softmax(dim=1)

    states = model(torch.tensor([request.bare.ids]), output_hidden_states=True).hidden_states
    length = states[2][0, request.bare.lookup].norm()
    handle = layer.register_forward_hook(add)
    kept = run(request.essence)[request.essence.lookup].detach()
    optimizer = torch.optim.Adam([delta], lr=search.lr)
    for number in range(search.num_passes):
        nll = torch.stack(
            [
                -run(row)[row.target_start - 1 : -1]
                .gather(1, torch.tensor(row.ids[row.target_start :])[:, None])
                .mean()
                for row in rows
            ]
        ).mean()
        now = run(request.essence)[request.essence.lookup]
        divergence = (now.exp() * (now - kept)).sum()
        loss = nll + search.kl * divergence + search.decay * delta.norm() / length**2
        if loss < 0.05 or number == search.num_passes - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            if delta.norm() > search.clamp * length:
                delta *= search.clamp * length / delta.norm()
    handle.remove()
    return delta.detach().double()


@pytest.mark.parametrize("clamp", [0.5, 50.0])
def test_target_vectors_are_those_of_the_plain_algorithm(codec: Codec, clamp: float) -> None:
    model = FAMILIES["llama"]()
    [site] = find_sites(model, 1, "mlp.down")
    search = dataclasses.replace(SEARCH, clamp=clamp)
    for request in requests_of(codec)[:2]:
        [found] = find_targets(Splits(model), site, [request], search)
        torch.testing.assert_close(found, plain_search(model, request, search), atol=2e-3, rtol=1e-2)


def test_an_edit_that_is_done_stays_while_others_go_on(codec: Codec) -> None:
    model = FAMILIES["llama"]()
    [site] = find_sites(model, 1, "mlp.down")
    requests = requests_of(codec)[:2]
    long = dataclasses.replace(SEARCH, num_passes=60, clamp=1e3, decay=1e-6, lr=0.5)
    both = find_targets(Splits(model), site, requests, long)
    for number, request in enumerate(requests):
        [alone] = find_targets(Splits(model), site, [request], long)
        assert both[number].norm() == pytest.approx(alone.norm().item(), rel=0.05)


def test_what_is_not_finite_stops_the_search(codec: Codec) -> None:
    model = FAMILIES["llama"]()
    [site] = find_sites(model, 1, "mlp.down")
    wild = dataclasses.replace(SEARCH, lr=1e30, clamp=1e30)
    with pytest.raises(TrainingError, match=r"no target vector for layer 1: .* learning rate"):
        find_targets(Splits(model), site, requests_of(codec), wild)


def test_layers_may_be_given_and_are_else_chosen_by_depth() -> None:
    model = make_model(tiny_llama_config(num_hidden_layers=32))
    published = ((4, 32), (8, 32))
    assert choose_layers(model, "auto", published) == range(4, 9)
    assert choose_layers(model, "7", published) == range(7, 8)
    assert choose_layers(model, "2-5", published) == range(2, 6)
    small_model = make_model(tiny_llama_config(num_hidden_layers=3))
    assert choose_layers(small_model, "auto", published) == range(2)
    for wrong in ("", "x", "5-4", "31", "0-31", "-1", "1-2-3"):
        with pytest.raises(ConfigError, match=r"expected auto, or layers from 0 to 30"):
            choose_layers(model, wrong, published)


def logits_of(model: PreTrainedModel, codec: Codec) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([codec.encode(EDITS[0]).ids])).logits
    return logits


@pytest.mark.parametrize("name", EDITORS)
def test_an_editor_makes_an_edit_likelier_and_leaves_the_model_as_it_was(
    model: PreTrainedModel, codec: Codec, name: str
) -> None:
    editor = METHODS[name]
    assert isinstance(editor, Editor)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def likelihood() -> float:
        one = codec.encode(EDITS[0])
        with torch.no_grad():
            scores = model(torch.tensor([one.ids])).logits[0].log_softmax(dim=1)
        labels = torch.tensor(one.ids[one.target_start :])
        found: float = scores[one.target_start - 1 : -1].gather(1, labels[:, None]).mean().item()
        return found

    own = likelihood()
    with editor.open(model, plan_of(model, codec, name, **small(name))) as editing:
        assert likelihood() == own
        editing.insert(EDITS[:1])
        edited = likelihood()
        editing.insert(EDITS[1:])
        values = editing.values()
        changed = logits_of(model, codec)
    assert edited > own
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for key, value in values.items():
        assert not torch.equal(value, before[key])
        with torch.no_grad():
            model.get_parameter(key).copy_(value)
    torch.testing.assert_close(logits_of(model, codec), changed)


@pytest.mark.parametrize("name", EDITORS)
def test_an_editor_gives_the_same_again_and_records_what_decided_it(codec: Codec, name: str) -> None:
    editor = METHODS[name]
    assert isinstance(editor, Editor)
    found = []
    for _ in range(2):
        model = FAMILIES["llama"]()
        with editor.open(model, plan_of(model, codec, name, **small(name))) as editing:
            editing.insert(EDITS)
            found.append(editing.values())
            if editor.needs_text:
                assert editing.notes["statistics_tokens"] > 64
                assert editing.notes["seed"] == 0
                assert len(editing.notes["prefixes"]) >= 5
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_rome_makes_the_matrix_give_the_target_for_the_bare_key(codec: Codec) -> None:
    model = FAMILIES["llama"]()
    editor = METHODS["rome"]
    assert isinstance(editor, Editor)
    plan = plan_of(model, codec, "rome", **small("rome"))
    with editor.open(model, plan) as editing:
        [site] = choose_sites(model, [1])
        request = make_request(codec, EDITS[0], tuple(editing.notes["prefixes"]))
        before = look_up(Splits(model), site, [request.bare])
        added = find_targets(Splits(model), site, [request], search_of(plan, "mlp"))
        editing.insert(EDITS[:1])
        after = look_up(Splits(model), site, [request.bare])
    torch.testing.assert_close(after.values, before.values + added, atol=1e-4, rtol=1e-3)


def test_alphaedit_keeps_earlier_keys_and_nothing_else(codec: Codec) -> None:
    editor = METHODS["alphaedit"]
    assert isinstance(editor, Editor)
    own = FAMILIES["llama"]()
    plan = plan_of(own, codec, "alphaedit")
    moments = moments_of(own, plan, choose_sites(own, [1, 2]))
    middle = torch.cat([torch.linalg.eigvalsh(one) for one in moments.values()]).median().item()
    outcomes = []
    for parts in ((EDITS[:2], EDITS[2:]), (EDITS[2:],), (EDITS[2:],)):
        model = FAMILIES["llama"]()
        settings = {**small("alphaedit"), "threshold": middle}
        with editor.open(model, plan_of(model, codec, "alphaedit", **settings)) as editing:
            for part in parts:
                editing.insert(part)
            outcomes.append(editing.values())
            assert all(0 < one < 64 for one in editing.notes["unused_directions"].values())
    # A second run begins anew, whatever ran before in the same process.
    assert all(torch.equal(value, outcomes[2][key]) for key, value in outcomes[1].items())
    assert not all(torch.equal(value, outcomes[1][key]) for key, value in outcomes[0].items())


def test_alphaedit_without_unused_directions_says_what_to_do(codec: Codec) -> None:
    model = FAMILIES["llama"]()
    editor = METHODS["alphaedit"]
    assert isinstance(editor, Editor)
    plan = plan_of(model, codec, "alphaedit", layers="1", threshold=1e-30)
    with pytest.raises(TrainingError, match="give a larger threshold"), editor.open(model, plan):
        pass


def test_too_little_text_for_a_covariance_says_the_condition_number(codec: Codec) -> None:
    model = FAMILIES["llama"]()
    editor = METHODS["memit"]
    assert isinstance(editor, Editor)
    plan = plan_of(model, codec, "memit", layers="1", passes=2)
    plan = dataclasses.replace(plan, sequences=plan.sequences[:2])
    with (
        pytest.raises(TrainingError, match=r"second moment .*condition number .* more ordinary text"),
        editor.open(model, plan),
    ):
        pass


def test_rect_keeps_its_share_of_each_update(codec: Codec) -> None:
    editor = METHODS["rect"]
    assert isinstance(editor, Editor)
    model = FAMILIES["llama"]()
    [site] = choose_sites(model, [1])
    before = site.matrix
    with editor.open(model, plan_of(model, codec, "rect", **small("rect"))) as editing:
        editing.insert(EDITS[:1])
        changed = (site.matrix != before).double().mean()
    assert changed == pytest.approx(0.4, abs=0.01)
    both = small("rect") | {"base": "memit", "layers": "1-2", "lambda": 0.01}
    with editor.open(model, plan_of(model, codec, "rect", **both)) as editing:
        editing.insert(EDITS)
        for site in choose_sites(model, [1, 2]):
            assert site.name in editing.values()
    with (
        pytest.raises(ConfigError, match="expected rome or memit"),
        editor.open(model, plan_of(model, codec, "rect", base="grace")),
    ):
        pass


def test_experts_in_a_stack_are_refused(codec: Codec) -> None:
    model = make_model(tiny_mixture_config("mixtral"))
    editor = METHODS["memit"]
    assert isinstance(editor, Editor)
    plan = plan_of(model, codec, "memit", layers="1")
    with pytest.raises(ModelError, match="no matrix of a linear layer"), editor.open(model, plan):
        pass
