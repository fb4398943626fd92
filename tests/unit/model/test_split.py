from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import make_model, tiny_llama_config
from test_structure_and_location import FAMILIES, family_config
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM, PreTrainedModel

from locft.errors import ModelError
from locft.model.location import resolve_location
from locft.model.split import split_model
from locft.model.structure import find_layers

LENGTHS = (13, 5, 9, 1)


def padded_batch() -> Tensor:
    """Rows of mixed lengths, padded on the right with ids that are as good as any others."""
    return torch.randint(
        3, 384, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1)
    )


def real_positions() -> tuple[Tensor, Tensor]:
    places = [(row, column) for row, length in enumerate(LENGTHS) for column in range(length)]
    rows, columns = torch.tensor(places).unbind(dim=1)
    return rows, columns


def count_runs(modules: Sequence[nn.Module]) -> list[int]:
    """Count, from now on, how often each module runs."""
    runs = [0] * len(modules)

    def counter(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def note(_: nn.Module, __: Any, ___: Any) -> None:
            runs[index] += 1

        return note

    for index, module in enumerate(modules):
        module.register_forward_hook(counter(index))
    return runs


def forwards_and_hooks(model: nn.Module) -> dict[str, tuple[bool, int, int]]:
    return {
        name: ("forward" in vars(module), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tail_equals_the_full_forward_and_so_do_its_gradients(family: str, layer: int) -> None:
    model = make_model(family_config(family))
    tuned = model.get_parameter(resolve_location(model, f"{layer}.mlp.down").parameters[0])
    ids = padded_batch()
    rows, columns = real_positions()
    labels = torch.randint(0, 384, rows.shape, generator=torch.Generator().manual_seed(2))

    split = split_model(model, layer)
    # Each row alone and unpadded, as the cache may hold it.
    alone = [split.prefix(ids[row : row + 1, :length])[0] for row, length in enumerate(LENGTHS)]
    hidden = nn.utils.rnn.pad_sequence(alone, batch_first=True)
    assert not hidden.requires_grad
    tuned.requires_grad_(True)
    with split.tail() as tail:
        logits = tail(ids, hidden, rows, columns)
        (got,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), tuned)
    full = model(input_ids=ids, use_cache=False).logits[rows, columns]
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(full, labels), tuned)

    assert (logits - full).abs().max() <= 1e-5 * full.abs().max()
    assert expected.abs().max() > 0
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    # And the padded rows equal the rows alone, without a mask.
    for row, length in enumerate(LENGTHS):
        single = model(input_ids=ids[row : row + 1, :length], use_cache=False).logits[0]
        assert (logits[rows == row] - single).abs().max() <= 1e-5 * full.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_gradients_of_every_tensor_of_an_entire_layer_equal_the_full_forwards(family: str) -> None:
    model = make_model(family_config(family))
    names = resolve_location(model, "1").parameters
    tuned = [model.get_parameter(name).requires_grad_(True) for name in names]
    ids = padded_batch()
    rows, columns = real_positions()
    split = split_model(model, 1)
    hidden = split.prefix(ids)
    with split.tail() as tail:
        logits = tail(ids, hidden, rows, columns)
        got = torch.autograd.grad(logits.logsumexp(-1).sum(), tuned)
    full = model(input_ids=ids, use_cache=False).logits[rows, columns]
    expected = torch.autograd.grad(full.logsumexp(-1).sum(), tuned)
    scale = max(gradient.abs().max() for gradient in expected)
    for name, ours, theirs in zip(names, got, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * scale, name


def test_a_bf16_model_splits_and_keeps_its_dtype() -> None:
    model = make_model(tiny_llama_config()).bfloat16()
    ids = padded_batch()
    rows, columns = real_positions()
    split = split_model(model, 1)
    hidden = split.prefix(ids)
    with torch.no_grad(), split.tail() as tail:
        logits = tail(ids, hidden, rows, columns)
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits[rows, columns]
    assert hidden.dtype == logits.dtype == torch.bfloat16
    assert (logits - full).abs().max() <= 2e-2 * full.abs().max()


@pytest.mark.parametrize("layer", [0, 2])
def test_the_prefix_holds_the_state_that_enters_the_layer(
    tiny_model: PreTrainedModel, layer: int
) -> None:
    ids = padded_batch()
    with torch.no_grad():
        states = tiny_model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    assert torch.equal(split_model(tiny_model, layer).prefix(ids), states[layer])


def test_the_prefix_runs_no_layer_from_the_split_on(tiny_model: PreTrainedModel) -> None:
    split = split_model(tiny_model, 1)
    runs = count_runs(split.layers.modules)
    split.prefix(padded_batch())
    assert runs == [1, 0, 0]


def test_the_tail_runs_nothing_inside_the_layers_below(tiny_model: PreTrainedModel) -> None:
    split = split_model(tiny_model, 1)
    hidden = split.prefix(padded_batch())
    runs = count_runs([layer.get_submodule("mlp") for layer in split.layers.modules])
    with torch.no_grad(), split.tail() as tail:
        tail(padded_batch(), hidden, *real_positions())
    assert runs == [0, 1, 1]


def test_the_tail_computes_only_the_logits_asked_for(tiny_model: PreTrainedModel) -> None:
    split = split_model(tiny_model, 1)
    ids = padded_batch()
    hidden = split.prefix(ids)
    seen: list[torch.Size] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(output.shape)

    tiny_model.get_output_embeddings().register_forward_hook(note)
    with torch.no_grad(), split.tail() as tail:
        logits = tail(ids, hidden, torch.tensor([2, 0]), torch.tensor([8, 3]))
    assert logits.shape == (2, 384)
    assert seen == [(1, 2, 384)]


def test_the_tail_reads_the_state_it_is_given(tiny_model: PreTrainedModel) -> None:
    # Without this the tests of equality would also pass for a tail that ran the layers itself.
    split = split_model(tiny_model, 1)
    ids = padded_batch()
    hidden = split.prefix(ids)
    positions = real_positions()
    with torch.no_grad(), split.tail() as tail:
        first = tail(ids, hidden, *positions)
        other = tail(ids, hidden.flip(0), *positions)
        again = tail(ids, hidden, *positions)
    assert not torch.allclose(first, other, atol=1e-3)
    assert torch.equal(first, again)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_is_its_old_self_after_the_body(family: str, fails: bool) -> None:
    model = make_model(family_config(family))
    ids = padded_batch()
    with torch.no_grad():
        logits_before = model(input_ids=ids, use_cache=False).logits
    before = forwards_and_hooks(model)
    split = split_model(model, 2)
    assert forwards_and_hooks(model) == before
    hidden = split.prefix(ids)
    assert forwards_and_hooks(model) == before
    try:
        with torch.no_grad(), split.tail() as tail:
            tail(ids, hidden, *real_positions())
            assert forwards_and_hooks(model) != before
            if fails:
                raise RuntimeError("the body fails")
    except RuntimeError:
        assert fails
    assert forwards_and_hooks(model) == before
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits_before)


def test_the_model_is_restored_if_the_prefix_itself_fails(tiny_model: PreTrainedModel) -> None:
    split = split_model(tiny_model, 1)
    before = forwards_and_hooks(tiny_model)
    with pytest.raises(IndexError):
        split.prefix(torch.tensor([[5, 384]]))  # beyond the vocabulary
    assert forwards_and_hooks(tiny_model) == before


def test_a_forward_of_the_layers_own_is_put_back(tiny_model: PreTrainedModel) -> None:
    # Libraries that wrap modules (accelerate's device hooks) set `forward` on the instance.
    layer = find_layers(tiny_model).modules[0]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    wrapped = layer.forward
    split = split_model(tiny_model, 1)
    with split.tail():
        pass
    assert layer.forward is wrapped


def test_models_of_one_batch_after_another_do_not_mix(tiny_model: PreTrainedModel) -> None:
    split = split_model(tiny_model, 1)
    ids = padded_batch()
    rows, columns = torch.tensor([0]), torch.tensor([4])
    with torch.no_grad():
        expected = [tiny_model(input_ids=ids[row : row + 1, :5]).logits[0, 4] for row in (0, 1)]
        hidden = [split.prefix(ids[row : row + 1, :5]) for row in (0, 1)]
        with split.tail() as tail:
            got = [tail(ids[row : row + 1, :5], hidden[row], rows, columns)[0] for row in (0, 1)]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def refused(model: PreTrainedModel, layer: int, reason: str) -> None:
    before = forwards_and_hooks(model)
    with pytest.raises(ModelError, match=rf"{type(model).__name__} is refused: .*{reason}"):
        split_model(model, layer)
    assert forwards_and_hooks(model) == before


def test_shared_layers_that_run_several_times_are_refused() -> None:
    # ALBERT runs one group of layers for all its depth.
    config = AlbertConfig(
        vocab_size=384,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    refused(AlbertForMaskedLM(config).eval(), 0, "do not each run exactly once")


def test_a_layer_that_stands_twice_in_the_list_is_refused(tiny_model: PreTrainedModel) -> None:
    layers = tiny_model.get_decoder().layers
    layers[2] = layers[1]
    refused(tiny_model, 1, "do not each run exactly once")


def test_a_layer_that_does_not_run_is_refused(tiny_model: PreTrainedModel) -> None:
    tiny_model.get_decoder().config.num_hidden_layers = 2  # the third is left out
    refused(tiny_model, 1, "do not each run exactly once")


def patch_layer(
    model: PreTrainedModel, index: int, change: Callable[[Tensor, dict[str, Any]], Tensor]
) -> None:
    """Let a layer's class do something more with its output; its forward stays one of the class."""
    layer = find_layers(model).modules[index]
    kind = type(layer)

    class Changed(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return change(super().forward(hidden_states, *args, **kwargs), kwargs)

    layer.__class__ = Changed


@pytest.mark.parametrize("keeps", [False, True], ids=["forgets after a pass", "keeps"])
def test_layers_that_hand_on_more_than_hidden_states_are_refused(
    tiny_model: PreTrainedModel, keeps: bool
) -> None:
    # Also where the state of an earlier pass is still there, which fits by chance if that pass had
    # the same ids: in training the tail would meet the state of another batch.
    passed: list[Tensor] = []

    def put_aside(hidden: Tensor, _: dict[str, Any]) -> Tensor:
        passed[:] = [hidden * 0.5]
        return hidden

    def take_up(hidden: Tensor, _: dict[str, Any]) -> Tensor:
        fits = bool(passed) and passed[0].shape == hidden.shape
        return hidden + passed[0] if fits else hidden

    patch_layer(tiny_model, 0, put_aside)
    patch_layer(tiny_model, 2, take_up)
    if not keeps:
        tiny_model.register_forward_pre_hook(lambda _, __: passed.clear())
    refused(tiny_model, 1, "its tail does not equal its full forward")


def test_a_layer_that_sees_padding_is_refused(tiny_model: PreTrainedModel) -> None:
    # A model in which later tokens reach earlier ones cannot be padded on the right.
    patch_layer(tiny_model, 1, lambda hidden, _: hidden + hidden.mean(dim=1, keepdim=True))
    refused(tiny_model, 1, "right padding changes its logits")


@pytest.mark.parametrize("layer", [0, 2])
def test_a_model_that_gives_nan_is_refused(tiny_model: PreTrainedModel, layer: int) -> None:
    with torch.no_grad():
        tiny_model.get_parameter("model.norm.weight").fill_(torch.nan)
    refused(tiny_model, layer, "largest relative difference nan")


def test_a_model_without_a_head_over_its_vocabulary_is_refused(
    tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tiny_model), "get_output_embeddings", lambda self: None)
    refused(tiny_model, 1, "no output head")


def test_a_model_without_a_list_of_layers_is_refused(tiny_model: PreTrainedModel) -> None:
    decoder = tiny_model.get_decoder()
    decoder.layers = nn.Sequential(*decoder.layers)
    refused(tiny_model, 1, "holds no list of layers")


def test_the_probe_fits_a_vocabulary_smaller_than_it_is_long() -> None:
    model = make_model(tiny_llama_config(vocab_size=6))
    split = split_model(model, 1)
    assert split.layer == 1
    assert split.tuple_lengths == (0, 0, 0)
