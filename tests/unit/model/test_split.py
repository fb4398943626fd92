import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_model, tiny_llama_config
from test_structure_and_location import FAMILIES, family_config
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM, MistralConfig, PreTrainedModel

from locft.errors import ModelError
from locft.model.attention import Past, behind, kept_states
from locft.model.location import resolve_location
from locft.model.packing import Packed, lay_out_ends, merge_prefixes, round_up
from locft.model.split import Split, split_model
from locft.model.structure import find_layers

LENGTHS = (13, 5, 9, 1, 11)


def make_sequences() -> list[list[int]]:
    """Sequences of mixed lengths; the last begins like the first, and ends otherwise."""
    ids = torch.randint(3, 384, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    sequences = [row[:length].tolist() for row, length in zip(ids, LENGTHS, strict=True)]
    sequences[-1][:4] = sequences[0][:4]
    return sequences


def packed_batch(sequences: Sequence[Sequence[int]] | None = None) -> Packed:
    sequences = make_sequences() if sequences is None else sequences
    return merge_prefixes(sequences).pack(range(len(sequences)))[0]


def padded_ids() -> Tensor:
    """The same sequences, padded on the right with an id that is as good as any other."""
    rows = [torch.tensor(sequence) for sequence in make_sequences()]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7)


def real_positions() -> tuple[Tensor, Tensor]:
    places = [(row, column) for row, length in enumerate(LENGTHS) for column in range(length)]
    rows, columns = torch.tensor(places).unbind(dim=1)
    return rows, columns


def asked_nodes() -> Tensor:
    """The nodes of all real positions; those of a common beginning more than once."""
    return packed_batch().grid[real_positions()]


def unpackable(split: Split) -> Split:
    return replace(split, longest_packed=0)


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
    rows, columns = real_positions()
    labels = torch.randint(0, 384, rows.shape, generator=torch.Generator().manual_seed(2))
    packed, asked = packed_batch(), asked_nodes()
    model.requires_grad_(False)
    tuned.requires_grad_(True)
    full = model(input_ids=padded_ids(), use_cache=False).logits[rows, columns]
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(full, labels), tuned)
    assert expected.abs().max() > 0

    chosen = split_model(model, layer)
    for split in (chosen, unpackable(chosen), replace(chosen, pointwise=())):
        hidden = split.prefix(packed)
        assert not hidden.requires_grad
        with split.tail() as tail:
            logits = tail(packed, hidden, asked)
            (got,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), tuned)
        assert (logits - full).abs().max() <= 1e-5 * full.abs().max()
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    # And the sequences together equal each alone.
    for row, sequence in enumerate(make_sequences()):
        single = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]
        assert (logits[rows == row] - single).abs().max() <= 1e-5 * full.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_gradients_of_every_tensor_of_an_entire_layer_equal_the_full_forwards(family: str) -> None:
    for layer in (1, 2):
        model = make_model(family_config(family))
        names = resolve_location(model, str(layer)).parameters
        tuned = [model.get_parameter(name).requires_grad_(True) for name in names]
        split = split_model(model, layer)
        hidden = split.prefix(packed_batch())
        with split.tail() as tail:
            logits = tail(packed_batch(), hidden, asked_nodes())
            got = torch.autograd.grad(logits.logsumexp(-1).sum(), tuned)
        full = model(input_ids=padded_ids(), use_cache=False).logits[real_positions()]
        expected = torch.autograd.grad(full.logsumexp(-1).sum(), tuned)
        scale = max(gradient.abs().max() for gradient in expected)
        for name, ours, theirs in zip(names, got, expected, strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * scale, name


def test_a_bf16_model_splits_and_keeps_its_dtype() -> None:
    model = make_model(tiny_llama_config()).bfloat16()
    split = split_model(model, 1)
    hidden = split.prefix(packed_batch())
    with torch.no_grad(), split.tail() as tail:
        logits = tail(packed_batch(), hidden, asked_nodes())
    with torch.no_grad():
        full = model(input_ids=padded_ids(), use_cache=False).logits[real_positions()]
    assert hidden.dtype == logits.dtype == torch.bfloat16
    assert (logits - full).abs().max() <= 2e-2 * full.abs().max()


@pytest.mark.parametrize("layer", [0, 2])
def test_the_prefix_holds_the_state_that_enters_the_layer(
    tiny_model: PreTrainedModel, layer: int
) -> None:
    with torch.no_grad():
        output = tiny_model(input_ids=padded_ids(), use_cache=False, output_hidden_states=True)
    expected = output.hidden_states[layer].flatten(0, 1)[packed_batch().home]
    split = split_model(tiny_model, layer)
    assert torch.equal(unpackable(split).prefix(packed_batch()), expected)
    torch.testing.assert_close(split.prefix(packed_batch()), expected, rtol=1e-5, atol=1e-6)


def test_the_prefix_runs_no_layer_from_the_split_on(tiny_model: PreTrainedModel) -> None:
    split = split_model(tiny_model, 1)
    runs = count_runs(split.layers.modules)
    split.prefix(packed_batch())
    assert runs == [1, 0, 0]


def test_the_tail_runs_nothing_inside_the_layers_below(tiny_model: PreTrainedModel) -> None:
    split = split_model(tiny_model, 1)
    hidden = split.prefix(packed_batch())
    runs = count_runs([layer.get_submodule("mlp") for layer in split.layers.modules])
    with torch.no_grad(), split.tail() as tail:
        tail(packed_batch(), hidden, asked_nodes())
    assert runs == [0, 1, 1]


def shapes_seen(module: nn.Module) -> list[torch.Size]:
    """Note, from now on, what a module gives."""
    seen: list[torch.Size] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        seen.append(output.shape)

    module.register_forward_hook(note)
    return seen


@pytest.mark.parametrize("is_packed", [True, False])
def test_the_tail_computes_only_what_the_logits_asked_for_depend_on(
    tiny_model: PreTrainedModel, is_packed: bool
) -> None:
    chosen = split_model(tiny_model, 1)
    split = chosen if is_packed else unpackable(chosen)
    packed = packed_batch()
    hidden = split.prefix(packed)
    layers = [layer.get_submodule("mlp.down_proj") for layer in split.layers.modules]
    head, middle, last = map(shapes_seen, (tiny_model.get_output_embeddings(), *layers[1:]))
    with torch.no_grad(), split.tail() as tail:
        logits = tail(packed, hidden, packed.grid[[2, 0, 2], [8, 3, 8]])
    assert logits.shape == (3, 384)
    assert head == [(1, 3, 384)]
    assert torch.equal(logits[0], logits[2])
    assert last == [(1, 2, 32)]  # one of the nodes was asked twice
    num_distinct = sum(LENGTHS) - 4
    assert middle == ([(1, num_distinct, 32)] if is_packed else [(*packed.grid.shape, 32)])


def test_the_tail_reads_the_state_it_is_given(tiny_model: PreTrainedModel) -> None:
    # Without this the tests of equality would also pass for a tail that ran the layers itself.
    split = split_model(tiny_model, 1)
    packed, asked = packed_batch(), asked_nodes()
    hidden = split.prefix(packed)
    with torch.no_grad(), split.tail() as tail:
        first = tail(packed, hidden, asked)
        other = tail(packed, hidden.flip(0), asked)
        again = tail(packed, hidden, asked)
    assert not torch.allclose(first, other, atol=1e-3)
    assert torch.equal(first, again)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_is_its_old_self_after_the_body(family: str, fails: bool) -> None:
    model = make_model(family_config(family))
    ids, packed = padded_ids(), packed_batch()
    with torch.no_grad():
        logits_before = model(input_ids=ids, use_cache=False).logits
    kind = model.config._attn_implementation
    before = forwards_and_hooks(model)
    split = split_model(model, 2)
    assert forwards_and_hooks(model) == before
    hidden = split.prefix(packed)
    assert forwards_and_hooks(model) == before
    try:
        with torch.no_grad(), split.tail(in_bfloat16=family == "llama") as tail:
            tail(packed, hidden, asked_nodes())
            assert forwards_and_hooks(model) != before
            if fails:
                raise RuntimeError("the body fails")
    except RuntimeError:
        assert fails
    assert forwards_and_hooks(model) == before
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits_before)
    assert model.config._attn_implementation == kind


def test_the_model_is_restored_if_the_prefix_itself_fails(tiny_model: PreTrainedModel) -> None:
    split = split_model(tiny_model, 1)
    before = forwards_and_hooks(tiny_model)
    with pytest.raises(IndexError):
        split.prefix(packed_batch([[5, 384]]))  # beyond the vocabulary
    assert forwards_and_hooks(tiny_model) == before
    assert tiny_model.config._attn_implementation == "sdpa"


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


def test_one_batch_after_another_do_not_mix(tiny_model: PreTrainedModel) -> None:
    split = split_model(tiny_model, 1)
    rows = [sequence[:5] for sequence in make_sequences()[:2]]
    with torch.no_grad():
        expected = [tiny_model(input_ids=torch.tensor([row])).logits[0, 4] for row in rows]
        hidden = [split.prefix(packed_batch([row])) for row in rows]
        with split.tail() as tail:
            got = [
                tail(packed_batch([row]), states, torch.tensor([4]))[0]
                for row, states in zip(rows, hidden, strict=True)
            ]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def is_packable(model: PreTrainedModel) -> bool:
    return split_model(model, 1).longest_packed > 0


def test_families_that_attend_through_the_common_interface_are_packed() -> None:
    packable = {family for family in FAMILIES if is_packable(make_model(family_config(family)))}
    assert {"llama", "gpt2", "qwen2", "qwen3"} <= packable


def test_a_layer_that_mixes_neighbours_is_run_padded(tiny_model: PreTrainedModel) -> None:
    # As convolutions and recurrent layers do: packed, the neighbour may be of another sequence.
    def mix(hidden: Tensor, _: dict[str, Any]) -> Tensor:
        return hidden + nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]

    patch_layer(tiny_model, 1, mix)
    split = split_model(tiny_model, 1)
    assert split.longest_packed == 0
    assert split.pointwise


def test_a_window_shorter_than_the_probe_is_never_packed() -> None:
    config = MistralConfig(**{**tiny_llama_config().to_dict(), "sliding_window": 8, "head_dim": 8})
    assert split_model(make_model(config), 1).longest_packed == 0


def test_an_mlp_that_mixes_neighbours_is_run_whole(tiny_model: PreTrainedModel) -> None:
    mlp = find_layers(tiny_model).modules[2].get_submodule("mlp")
    own = mlp.forward
    mlp.forward = lambda states: own(states + nn.functional.pad(states, (0, 0, 1, 0))[:, :-1])
    split = split_model(tiny_model, 1)
    assert (split.longest_packed, split.pointwise) == (0, ())


@pytest.mark.parametrize("heads", [4, 2, 1], ids=["own keys", "shared keys", "one key"])
@pytest.mark.parametrize("longest", [20, 100], ids=["short", "long"])
def test_packed_attention_equals_padded_attention(longest: int, heads: int) -> None:
    model = make_model(tiny_llama_config(num_key_value_heads=heads))
    sequences = [[5 + i % 300 for i in range(longest)], [5, 6, 7, 50], [9] * (longest // 2)]
    packed = packed_batch(sequences)
    split = split_model(model, 2)
    torch.testing.assert_close(
        split.prefix(packed), unpackable(split).prefix(packed), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("starts", [(4, 0, 8, 0, 7), (12, 4, 8, 0, 10)], ids=["some", "all but one"])
@pytest.mark.parametrize("longer", [0, 80], ids=["short", "long"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ends_run_behind_what_sequences_begin_with_give_the_logits_of_whole_ones(
    family: str, longer: int, starts: tuple[int, ...]
) -> None:
    model = make_model(family_config(family))
    sequences = [[11 + i % 90 for i in range(longer)] + sequence for sequence in make_sequences()]
    starts = tuple(start + longer for start in starts)
    whole, ends = packed_batch(sequences), lay_out_ends(sequences, starts)
    split = split_model(model, 1)
    if not split.packs(whole):
        pytest.skip(f"{family} is run padded")
    hidden = split.prefix(whole)
    last = whole.grid[range(len(sequences)), [len(sequence) - 1 for sequence in sequences]]
    with split.tail() as tail, torch.no_grad():
        with kept_states() as states:
            expected = tail(whole, hidden, last)
        grid = whole.grid.clone()
        old = torch.zeros(len(ends.ids), dtype=torch.int64)
        node = 0
        for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            for place in range(start, len(sequence)):
                old[node], grid[row, place] = grid[row, place], len(whole.ids) + node
                node += 1
        closing = grid[range(len(sequences)), [len(one) - 1 for one in sequences]] - len(whole.ids)
        with behind(Past(states, grid)):
            found = tail(ends, hidden[old], closing)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_sequences_longer_than_a_layers_window_are_run_padded() -> None:
    config = MistralConfig(**{**tiny_llama_config().to_dict(), "sliding_window": 12, "head_dim": 8})
    model = make_model(config)
    split = split_model(model, 1)
    assert split.longest_packed == 12
    rows, columns = real_positions()
    hidden = split.prefix(packed_batch())
    with torch.no_grad(), split.tail() as tail:
        logits = tail(packed_batch(), hidden, asked_nodes())
    full = model(input_ids=padded_ids(), use_cache=False).logits[rows, columns]
    assert (logits - full).abs().max() <= 1e-5 * full.abs().max()


@pytest.mark.parametrize("num", [1, 15, 16, 17])
def test_repeated_rows_change_nothing(tiny_model: PreTrainedModel, num: int) -> None:
    split = split_model(tiny_model, 1)
    packed = packed_batch([list(range(5, 5 + num))])
    rounded = packed.round_up(16)
    assert len(rounded.ids) == len(rounded.positions) == len(rounded.home) == 16 * math.ceil(num / 16)
    for one in (split, unpackable(split)):
        with torch.no_grad():
            hidden = one.prefix(packed)
            assert torch.equal(one.prefix(packed.round_up(1)), hidden)
            torch.testing.assert_close(one.prefix(rounded), round_up(hidden, 16))


def test_batches_for_products_in_bfloat16_come_in_few_sizes(tiny_model: PreTrainedModel) -> None:
    split = split_model(tiny_model, 1)
    packed = packed_batch()
    hidden = split.prefix(packed)
    middle = shapes_seen(split.layers.modules[1].get_submodule("mlp.down_proj"))
    head = shapes_seen(tiny_model.get_output_embeddings())
    with torch.no_grad(), split.tail(in_bfloat16=True) as tail:
        logits = tail(packed, hidden, packed.grid[0, :3])
        full = tail(packed, hidden, asked_nodes())
    assert logits.shape == (3, 384)
    assert torch.equal(logits, full[:3])
    assert [shape[1] for shape in middle] == [48, 48]  # of 35 nodes
    assert [shape[1] for shape in head] == [8, 40]  # of 3 and 39 that are asked


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_products_in_bfloat16_stay_close_to_those_in_float32(family: str, layer: int) -> None:
    model = make_model(family_config(family))
    names = resolve_location(model, f"{layer}.mlp").parameters
    model.requires_grad_(False)
    tuned = [model.get_parameter(name).requires_grad_(True) for name in names]
    split = split_model(model, layer)
    hidden = split.prefix(packed_batch())
    found = []
    for in_bfloat16 in (False, True):
        with split.tail(in_bfloat16=in_bfloat16) as tail:
            logits = tail(packed_batch(), hidden, asked_nodes())
            gradients = torch.autograd.grad(logits.logsumexp(-1).sum(), tuned)
        assert gradients[0].dtype == torch.float32
        found.append((logits, *gradients))
    scale = max(gradient.abs().max() for gradient in found[0][1:])
    assert not torch.equal(found[0][0], found[1][0])
    assert (found[0][0] - found[1][0]).abs().max() <= 0.02 * found[0][0].abs().max()
    for exact, rounded in zip(found[0][1:], found[1][1:], strict=True):
        assert (exact - rounded).abs().max() <= 0.03 * scale


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
def test_a_compiled_tail_equals_the_plain_one(tiny_model: PreTrainedModel) -> None:
    split = split_model(tiny_model, 1)
    hidden = split.prefix(packed_batch())
    tiny_model.requires_grad_(False)
    tuned = tiny_model.get_parameter("model.layers.1.mlp.down_proj.weight").requires_grad_(True)
    found = []
    for compiled in (None, "eager"):  # traced as for every backend, without code made of it
        with split.tail(compiled=compiled) as tail:
            logits = tail(packed_batch(), hidden, asked_nodes())
            found.append((logits, *torch.autograd.grad(logits.logsumexp(-1).sum(), tuned)))
    for plain, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, plain, rtol=1e-4, atol=1e-5)


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
