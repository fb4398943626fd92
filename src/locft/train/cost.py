"""The arithmetic of a run's cost: from counts of tokens and parameters to FLOPs, bytes and seconds.

What can be derived is derived: products from the shapes of the matrices, memory from what is held at a
time. What cannot is a constant at the top, measured by bench/plan.py. A multiplication and the addition
that follows are two FLOPs.

Source: the counts of torch.utils.flop_counter, which the tests compare with.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

_FLOAT_BYTES = 4

# Constants of this implementation, not of a model or a machine. bench/plan.py prints predicted against
# measured for them.

# Numbers that a layer reads and writes for a token beside its products, in widths of the residual
# stream (two norms of a dozen passes each, rotary embedding, heads laid out for attention and back,
# residual sums) and of its MLP (activation and gate).
_WIDTH_PASSES = 100
_INNER_PASSES = 6
# Operations of a layer's forward, each of which costs its call whatever its size.
_LAYER_OPS = 60
# A backward pass visits the operations of the forward pass, with about two for each.
_BACKWARD_PER_FORWARD = 2
# Passes over logits (positions x vocabulary): in the loss and its gradient, and in a KL divergence.
_LOSS_PASSES = 8
_DIVERGENCE_PASSES = 14
# Passes over copies of weights in the dtype of the products: rounded, turned, laid out for a processor.
_COPY_PASSES = 16
# Passes over the tuned parameters: gradient checked and converted, Adam's four tensors read and three
# written, the result checked and copied.
_UPDATE_PASSES = 14
# Python's share of a training step and of a decoding step beside the layers.
_STEP_S = 0.003
_DECODE_STEP_S = 0.003
# Imports of a model's class, tokenizer, checks of the split, linting: once in a run.
_START_S = 1.5
# After so many tokens, the share of an unedited model's answers that nothing has ended: between what
# short questions (0.06, 0.01, 0) and sentences to complete (0.87, 0.56, 0.06) gave on the demo model.
_UNENDED_SHARES = ((0, 1.0), (4, 0.44), (12, 0.2), (32, 0.04))
# Python, torch, transformers and a tokenizer in memory, without any model.
_RUNTIME_BYTES = 450_000_000
# Memory that was freed but lies between what is in use, once prompts of all lengths were answered.
_HOLES_BYTES = 200_000_000
# What a layer keeps for its backward pass, in widths of the residual stream and of its MLP.
_KEPT_WIDTHS = 14
_KEPT_INNERS = 4
# What a layer without a backward pass holds at its largest moment, likewise.
_HELD_WIDTHS = 6
_HELD_INNERS = 3
# Tensors as large as the logits that exist at one time: in the loss (logits, their softmax, its
# gradient), in a KL divergence (two models' logits, and pieces of what is made of them).
_LOSS_TENSORS = 3
_DIVERGENCE_TENSORS = 2.5
# Float32 tensors as large as the tuned parameters in training: initial, master, gradient and Adam's two.
_UPDATE_TENSORS = 5
# A patch's manifest and tensor headers, and one prompt's lines in the files of the scores.
_MANIFEST_BYTES = 4096
_BYTES_PER_PROMPT = 400


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """A decoder layer, by how many numbers of its matrices a token is multiplied with in each part.

    Of a mixture's experts those count that answer for one token.

    Attributes:
        queries: Numbers in the projections of queries.
        keys_values: Numbers in those of keys and values, and in those that hold queries as well.
        attention_out: Numbers in attention's output projection.
        mlp_in: Numbers in the MLP but for its output projection; a router's, too.
        mlp_out: Numbers in the MLP's output projection.
        width: Of the residual stream.
        inner: Of the MLP, all experts that answer together.
        attention_width: Of the values of all heads.
        num_parameters: All numbers of the layer, every expert and vector included.
        shapes: The matrices that a token meets, as (inputs, outputs).
    """

    queries: int
    keys_values: int
    attention_out: int
    mlp_in: int
    mlp_out: int
    width: int
    inner: int
    attention_width: int
    num_parameters: int
    shapes: tuple[tuple[int, int], ...]

    @property
    def at_asked(self) -> int:
        """Numbers that are only needed where something is predicted, if this is the last layer."""
        return self.queries + self.attention_out + self.mlp_in + self.mlp_out


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A model: its layers in order, width, vocabulary, all its parameters, and bytes of one number."""

    layers: tuple[LayerSize, ...]
    width: int
    vocabulary: int
    num_parameters: int
    number_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of its weights in memory."""
        return self.num_parameters * self.number_bytes


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What is trained: the layer's index, the module of `locft.model.location`, how many numbers."""

    layer: int
    module: str
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass through layers.

    Attributes:
        tokens: Positions that are computed.
        sequences: Sequences among which they lie.
        longest: Tokens of the longest one; attention is computed for sequences of this length.
        asked: Positions whose logits are asked for.
    """

    tokens: int
    sequences: int
    longest: int
    asked: int

    @property
    def pairs(self) -> int:
        """Pairs of positions whose attention is computed, those under the mask included."""
        return self.sequences * self.longest**2


@dataclass(frozen=True)
class Speed:
    """How fast products are by their number of rows: points (rows, FLOP/s), rows ascending."""

    points: tuple[tuple[int, float], ...]

    def at(self, rows: float) -> float:
        """Interpolate over the logarithm of the rows; beyond the points the nearest counts."""
        if rows <= self.points[0][0]:
            return self.points[0][1]
        for (low, slow), (high, fast) in pairwise(self.points):
            if rows <= high:
                share = math.log(rows / low) / math.log(high / low)
                return slow * math.pow(fast / slow, share)
        return self.points[-1][1]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a machine is with one dtype of products, as `locft.train.calibrate` measures it.

    Attributes:
        dtype: Of the products.
        layer: Speed of the products of a layer.
        head: Speed of those of the output head.
        attention_flops_per_s: Speed of those of attention, which are small and many.
        bytes_per_s: Of operations element by element on the states of a few hundred tokens.
        fresh_bytes_per_s: Of those on tensors so large that each is given fresh memory: logits.
        op_s: Seconds of an operation on next to nothing.
    """

    dtype: str
    layer: Speed
    head: Speed
    attention_flops_per_s: float
    bytes_per_s: float
    fresh_bytes_per_s: float
    op_s: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run does, in counts.

    Attributes:
        cache_tokens: Distinct beginnings of all examples.
        cache_passes: The passes that the frozen layers take over them.
        steps: The steps of one epoch.
        epochs: The most epochs.
        answers: For each batch of prompts, its prefill; one position of each sequence is asked for.
        guesses: For each batch of guessed answers, the pass that confirms them.
        scored_share: Share of the prompts that are not an edit's own.
        drift: The passes over neutral text, through each of two models.
        stages: After how many tokens decoding leaves behind what has ended; the last is the longest.
    """

    cache_tokens: int
    cache_passes: tuple[Pass, ...]
    steps: tuple[Pass, ...]
    epochs: int
    answers: tuple[Pass, ...]
    guesses: tuple[Pass, ...]
    scored_share: float
    drift: tuple[Pass, ...]
    stages: tuple[int, ...]

    @property
    def num_prompts(self) -> int:
        """How many prompts are answered."""
        return sum(batch.sequences for batch in self.answers)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run: its name, how long it takes (for training at most), and the most memory."""

    name: str
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes on the disk: the patch, the cache (until training is done), logs, edits and reports."""

    patch_bytes: int
    cache_bytes: int
    report_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most that is on the disk at one time."""
        return self.patch_bytes + self.cache_bytes + self.report_bytes


def forward_flops(layer: LayerSize, batch: Pass, *, last: bool = False) -> int:
    """Count a layer's forward pass.

    Args:
        layer: The layer.
        batch: What passes through it.
        last: Whether the head follows: then projections other than keys' and values' are computed at
            asked positions only.

    Returns:
        FLOPs of its products, attention's included.
    """
    rows = batch.asked if last else batch.tokens
    linear = 2 * (rows * layer.at_asked + batch.tokens * layer.keys_values)
    return linear + _attention_flops(layer, batch)


def input_gradient_flops(layer: LayerSize, batch: Pass, *, last: bool = False) -> int:
    """Count the backward pass through a frozen layer, as FLOPs.

    It has a product for each of the forward's, and two for each of attention's, both of whose factors
    vary.
    """
    return forward_flops(layer, batch, last=last) + _attention_flops(layer, batch)


def tuned_gradient_flops(layer: LayerSize, module: str, batch: Pass, *, last: bool = False) -> int:
    """Count the backward pass of the tuned layer: gradients of its weights, and what leads to them.

    What enters the layer is constant, so that no gradient goes below the tuned module.

    Args:
        layer: The layer.
        module: The module that is tuned, as `Location.module` has it.
        batch: What passes through it.
        last: Whether the head follows.

    Returns:
        FLOPs.
    """
    rows = batch.asked if last else batch.tokens
    mlp = layer.mlp_in + layer.mlp_out
    attention = 2 * _attention_flops(layer, batch)
    if module.endswith(".down"):  # of all experts that answer, where there are experts
        return 2 * rows * layer.mlp_out
    if module.endswith(".up"):  # gated MLPs have a second matrix of this shape, which is frozen
        return 2 * rows * (_up_numbers(layer) + layer.mlp_out)
    if module == "mlp":
        return 2 * rows * (mlp + layer.mlp_out)
    weights = rows * (layer.queries + layer.attention_out) + batch.tokens * layer.keys_values
    if module == "attn":
        return 2 * (weights + rows * (layer.attention_out + mlp)) + attention
    return 4 * (weights + rows * mlp) + attention


def head_flops(model: ModelSize, positions: int) -> int:
    """Count the output head at some positions, or its input gradient, as FLOPs."""
    return 2 * positions * model.width * model.vocabulary


def step_flops(model: ModelSize, tuned: Tuned, batch: Pass) -> int:
    """Count one training step, as FLOPs."""
    end = len(model.layers) - 1
    above = [(layer, index == end) for index, layer in enumerate(model.layers) if index > tuned.layer]
    at_tuned = model.layers[tuned.layer]
    return (
        forward_flops(at_tuned, batch, last=tuned.layer == end)
        + tuned_gradient_flops(at_tuned, tuned.module, batch, last=tuned.layer == end)
        + sum(forward_flops(layer, batch, last=last) for layer, last in above)
        + sum(input_gradient_flops(layer, batch, last=last) for layer, last in above)
        + 2 * head_flops(model, batch.asked)
    )


def step_s(model: ModelSize, tuned: Tuned, batch: Pass, rates: Rates) -> float:
    """Estimate one training step.

    Args:
        model: The model.
        tuned: What is trained.
        batch: The step's examples.
        rates: The machine's, for the dtype of the products in training.

    Returns:
        Seconds.
    """
    end = len(model.layers) - 1
    seconds = _STEP_S
    for index, layer in enumerate(model.layers[tuned.layer :], tuned.layer):
        last = index == end
        seconds += _layer_s(layer, batch, rates, last=last)
        if index == tuned.layer:
            rows = batch.asked if last else batch.tokens
            flops = tuned_gradient_flops(layer, tuned.module, batch, last=last)
            # Attention's own part of it is small.
            seconds += flops / rates.layer.at(rows)
        else:
            seconds += _backward_s(layer, batch, rates, last=last)
    seconds += 2 * head_flops(model, batch.asked) / rates.head.at(batch.asked)
    seconds += _LOSS_PASSES * _logits_bytes(model, batch.asked) / rates.fresh_bytes_per_s
    return seconds + _UPDATE_PASSES * _FLOAT_BYTES * tuned.num_parameters / rates.fresh_bytes_per_s


def predict_phases(
    model: ModelSize, tuned: Tuned, work: Work, running: Rates, training: Rates, *, on_cpu: bool = True
) -> tuple[Phase, ...]:
    """Predict each phase of a run.

    Args:
        model: The model.
        tuned: What is trained.
        work: What is to be done.
        running: The machine's rates for products in the model's own dtype.
        training: Its rates for the products of the training steps.
        on_cpu: Whether the memory that counts is the process's; a device's holds no runtime.

    Returns:
        The phases in order; loading comes first, and counts both times.
    """
    runtime = _RUNTIME_BYTES if on_cpu else 0
    holes = _HOLES_BYTES if on_cpu else 0
    resident = runtime + model.num_bytes
    cache_bytes = work.cache_tokens * model.width * model.number_bytes
    # The tuned matrix in the checkpoint's dtype, from training on.
    patch = tuned.num_parameters * model.number_bytes
    answers_held = max((_answer_bytes(model, batch, work) for batch in work.answers), default=0)
    drift_held = max((_drift_bytes(model, batch) for batch in work.drift), default=0)
    copies = _copies_bytes(model, tuned, running, training)
    layers = model.layers
    # On a CPU weights lie in mapped files, and what a phase is done with leaves memory.
    head = model.width * model.vocabulary
    below = sum(layer.num_parameters for layer in layers[: tuned.layer]) * model.number_bytes
    tail = (sum(layer.num_parameters for layer in layers[tuned.layer :]) + head) * model.number_bytes
    while_caching = runtime + below if on_cpu else resident
    while_training = runtime + (0 if copies else tail) if on_cpu else resident
    return (
        Phase(
            name="load",
            seconds=_START_S + 2 * model.num_bytes / running.fresh_bytes_per_s,
            peak_memory_bytes=resident,
        ),
        Phase(
            name="answer before",
            seconds=_decode_s(model, work, running, share=1.0),
            peak_memory_bytes=resident + answers_held,
        ),
        Phase(
            name="cache",
            seconds=sum(
                _layer_s(layer, batch, running)
                for batch in work.cache_passes
                for layer in layers[: tuned.layer]
            )
            + cache_bytes / running.fresh_bytes_per_s,
            peak_memory_bytes=while_caching
            + cache_bytes
            + max(_held_bytes(layers[0], batch.tokens) for batch in work.cache_passes),
        ),
        Phase(
            name="train",
            seconds=work.epochs * sum(step_s(model, tuned, batch, training) for batch in work.steps)
            + _COPY_PASSES * copies / training.fresh_bytes_per_s,
            peak_memory_bytes=while_training
            + cache_bytes
            + copies
            + _UPDATE_TENSORS * _FLOAT_BYTES * tuned.num_parameters
            + max(_step_bytes(model, tuned, batch) for batch in work.steps),
        ),
        Phase(
            name="answer after",
            seconds=sum(_full_s(model, batch, running) for batch in work.guesses)
            + _decode_s(model, work, running, share=work.scored_share),
            peak_memory_bytes=resident + holes + patch + answers_held,
        ),
        Phase(
            name="drift",
            seconds=sum(
                2 * _full_s(model, batch, running)
                + _DIVERGENCE_PASSES * _logits_bytes(model, batch.asked) / running.fresh_bytes_per_s
                for batch in work.drift
            ),
            peak_memory_bytes=resident + holes + patch + drift_held,
        ),
    )


def predict_disk(model: ModelSize, tuned: Tuned, work: Work, stored_bytes: int) -> Disk:
    """Predict what a run leaves on the disk, and the cache that it removes.

    Args:
        model: The model.
        tuned: What is trained.
        work: What is to be done.
        stored_bytes: Bytes of one number in the checkpoint, hence in the patch.

    Returns:
        Bytes of each.
    """
    return Disk(
        patch_bytes=tuned.num_parameters * stored_bytes + _MANIFEST_BYTES,
        cache_bytes=work.cache_tokens * model.width * model.number_bytes,
        report_bytes=_MANIFEST_BYTES + work.num_prompts * _BYTES_PER_PROMPT,
    )


def unended_share(num_tokens: int) -> float:
    """Say which share of an unedited model's answers is longer than a number of tokens."""
    for (low, more), (high, fewer) in pairwise(_UNENDED_SHARES):
        if num_tokens <= high:
            return more + (fewer - more) * (num_tokens - low) / (high - low)
    return _UNENDED_SHARES[-1][1]


def _up_numbers(layer: LayerSize) -> int:
    return layer.mlp_out if layer.mlp_in >= layer.mlp_out else layer.mlp_in


def _attention_flops(layer: LayerSize, batch: Pass) -> int:
    # Scores, and sums of values: two products, each of all heads' width with every pair.
    return 4 * layer.attention_width * batch.pairs


def _layer_s(layer: LayerSize, batch: Pass, rates: Rates, *, last: bool = False) -> float:
    """Estimate a layer's forward pass, in seconds."""
    rows = batch.asked if last else batch.tokens
    attention = _attention_flops(layer, batch)
    linear = forward_flops(layer, batch, last=last) - attention
    speed = rates.layer.at(rows)
    return (
        linear / speed
        + attention / rates.attention_flops_per_s
        + _states_bytes(layer, rows) / rates.bytes_per_s
        + _LAYER_OPS * rates.op_s
    )


def _backward_s(layer: LayerSize, batch: Pass, rates: Rates, *, last: bool) -> float:
    """Estimate the backward pass through a frozen layer, in seconds: its products are as many."""
    rows = batch.asked if last else batch.tokens
    linear = (forward_flops(layer, batch, last=last) - _attention_flops(layer, batch)) / (
        rates.layer.at(rows)
    )
    return linear + _BACKWARD_PER_FORWARD * (_layer_s(layer, batch, rates, last=last) - linear)


def _full_s(model: ModelSize, batch: Pass, rates: Rates) -> float:
    """Estimate a forward pass through all layers and the head, in seconds."""
    return (
        sum(_layer_s(layer, batch, rates) for layer in model.layers)
        + head_flops(model, batch.asked) / rates.head.at(batch.asked)
        + _logits_bytes(model, batch.asked) / rates.fresh_bytes_per_s
    )


def _decode_s(model: ModelSize, work: Work, rates: Rates, share: float) -> float:
    """Estimate the greedy answers to a share of all prompts, in seconds."""
    seconds = 0.0
    for before, after in pairwise((0, *work.stages)):
        num_prompts = math.ceil(share * unended_share(before) * work.num_prompts)
        for batch in work.answers:
            taken = min(num_prompts, batch.sequences)
            num_prompts -= taken
            if not taken:
                break
            longest = batch.longest + before
            prefill = Pass(tokens=taken * longest, sequences=taken, longest=longest, asked=taken)
            # Every row is decoded until the last one ends, one position of each at a time.
            step = Pass(tokens=taken, sequences=taken, longest=1, asked=taken)
            kept = taken * (longest + after - before) * _key_value_bytes(model)
            # Keys and values are read, and copied with the new ones behind them.
            step_s = _full_s(model, step, rates) + _DECODE_STEP_S + 3 * kept / rates.bytes_per_s
            # The prefill gives the first token.
            seconds += _full_s(model, prefill, rates) + (after - before - 1) * step_s
    return seconds


def _states_bytes(layer: LayerSize, rows: int) -> int:
    return rows * (_WIDTH_PASSES * layer.width + _INNER_PASSES * layer.inner) * _FLOAT_BYTES


def _logits_bytes(model: ModelSize, positions: int) -> int:
    return positions * model.vocabulary * _FLOAT_BYTES


def _key_value_bytes(model: ModelSize) -> int:
    """Count the keys and values of one position in all layers."""
    return sum(layer.keys_values // layer.width * model.number_bytes for layer in model.layers)


def _held_bytes(layer: LayerSize, tokens: int) -> int:
    return tokens * (_HELD_WIDTHS * layer.width + _HELD_INNERS * layer.inner) * _FLOAT_BYTES


def _answer_bytes(model: ModelSize, batch: Pass, work: Work) -> int:
    """Count what answering a batch holds beside the model: the prefill, then keys and values."""
    kept = batch.sequences * (batch.longest + work.stages[-1]) * _key_value_bytes(model)
    held = _held_bytes(model.layers[0], batch.sequences * batch.longest)
    # The logits, as the model gives them and as they are compared.
    return kept + held + 2 * _logits_bytes(model, batch.sequences)


def _step_bytes(model: ModelSize, tuned: Tuned, batch: Pass) -> int:
    """Count what a training step holds for its backward pass."""
    kept = sum(
        batch.tokens * (_KEPT_WIDTHS * layer.width + _KEPT_INNERS * layer.inner) * _FLOAT_BYTES
        for layer in model.layers[tuned.layer :]
    )
    return kept + _LOSS_TENSORS * _logits_bytes(model, batch.asked)


def _drift_bytes(model: ModelSize, batch: Pass) -> int:
    """Count what a comparison of two models on one pass of text holds."""
    held = _held_bytes(model.layers[0], batch.tokens)
    return held + round(_DIVERGENCE_TENSORS * _logits_bytes(model, batch.asked))


def _copies_bytes(model: ModelSize, tuned: Tuned, running: Rates, training: Rates) -> int:
    """Count the copies of the tail's and the head's weights for products in another dtype.

    There are two of each, laid out for the products of both directions.
    """
    if training.dtype == running.dtype:
        return 0
    tail = sum(layer.num_parameters for layer in model.layers[tuned.layer :])
    return 2 * 2 * (tail - tuned.num_parameters + model.width * model.vocabulary)
