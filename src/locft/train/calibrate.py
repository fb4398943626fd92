"""Measures how fast a machine is at a model's own shapes: a few seconds, without the model's weights."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import cycle

import torch
from torch import nn

from locft.model.products import bfloat16_products
from locft.train.cost import LayerSize, ModelSize, Rates, Speed

# From decoding one answer to a pass over neutral text.
_ROWS = (1, 4, 16, 64, 256, 1024)
# Weights are taken from this much memory in turn, as a model's are: more than caches hold. Matrices
# that are larger by themselves are cut, and cost in proportion.
_WEIGHT_BYTES = 64_000_000
_MOST_COPIES = 16
# For how long, and how often at least, each point is measured; the median counts.
_SECONDS = 0.1
_LEAST_TIMES = 3
# Where one pass takes this long, more rows would be no faster per row.
_LONG_S = 0.5
# States of a few hundred tokens, of which there are many. Tensors over 32 MB get fresh memory each time
# (on Linux; glibc's limit), which the system clears first.
_STATES_BYTES = 1_000_000
_NUM_STATES = 16
_FRESH_BYTES = 64_000_000
# One sequence's attention: heads, tokens, width of a head.
_ATTENTION = (16, 64, 64)
_NUM_OPS = 200
_FLOAT_BYTES = 4


def measure_rates(
    model: ModelSize, layer: LayerSize, dtypes: tuple[str, str], device: torch.device
) -> Rates:
    """Measure how fast products, memory and small operations are.

    Args:
        model: The model.
        layer: The layer whose shapes stand for all.
        dtypes: Of the weights, and of the products: ``float32`` or ``bfloat16``.
        device: Where.

    Returns:
        The rates. They take what the machine has free now.
    """
    with torch.no_grad():
        return Rates(
            dtype=dtypes[1],
            layer=_product_speed(layer.shapes, dtypes, device),
            head=_product_speed(((model.width, model.vocabulary),), dtypes, device),
            attention_flops_per_s=_attention_flops_per_s(getattr(torch, dtypes[0]), device),
            bytes_per_s=_bytes_per_s(_STATES_BYTES, _NUM_STATES, device),
            fresh_bytes_per_s=_bytes_per_s(_FRESH_BYTES, 1, device),
            op_s=_op_s(device),
        )


def _product_speed(
    shapes: tuple[tuple[int, int], ...], dtypes: tuple[str, str], device: torch.device
) -> Speed:
    """Time the products with matrices (inputs, outputs), one after the other."""
    weights, products = (getattr(torch, name) for name in dtypes)
    most = _WEIGHT_BYTES // len(shapes) // weights.itemsize
    shapes = tuple((inputs, max(1, min(outputs, most // inputs))) for inputs, outputs in shapes)
    numbers = sum(inputs * outputs for inputs, outputs in shapes)
    copies = min(_MOST_COPIES, math.ceil(_WEIGHT_BYTES / (numbers * weights.itemsize)))
    stacks = [[_linear(shape, weights, device) for shape in shapes] for _ in range(copies)]
    linears = [linear for stack in stacks for linear in stack]
    turns = cycle(stacks)
    points: list[tuple[int, float]] = []
    with bfloat16_products(linears) if products != weights else nullcontext():
        for rows in _ROWS:
            states = {
                inputs: torch.full((1, rows, inputs), 0.01, dtype=weights, device=device)
                for inputs, _ in shapes
            }
            seconds = median_s(partial(_multiply, turns, states), device)
            points.append((rows, 2 * rows * numbers / seconds))
            if seconds > _LONG_S:
                break
    return Speed(tuple(points))


def _multiply(turns: Iterator[list[nn.Linear]], states: Mapping[int, torch.Tensor]) -> None:
    for linear in next(turns):
        linear(states[linear.in_features])


def _linear(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> nn.Linear:
    linear = nn.Linear(*shape, bias=False, dtype=dtype, device="meta").to_empty(device=device)
    nn.init.constant_(linear.weight, 0.01)  # zeros, and what memory held before, may take other times
    return linear.requires_grad_(False)


def _bytes_per_s(num_bytes: int, num_tensors: int, device: torch.device) -> float:
    """Time products element by element, twice read, once written; the last results are kept a while."""
    numbers = [torch.full((num_bytes // _FLOAT_BYTES,), 0.01, device=device) for _ in range(num_tensors)]
    turns = cycle(numbers)
    kept = deque[torch.Tensor](maxlen=num_tensors)

    def multiply() -> None:
        kept.append(next(turns) * next(turns))

    return 3 * num_bytes / median_s(multiply, device)


def _attention_flops_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """Time the products of attention: scores, and sums of values."""
    heads, tokens, width = _ATTENTION
    states = torch.full(_ATTENTION, 0.01, dtype=dtype, device=device)
    seconds = median_s(lambda: torch.bmm(torch.bmm(states, states.mT), states), device)
    return 2 * 2 * heads * tokens**2 * width / seconds


def _op_s(device: torch.device) -> float:
    few = torch.zeros(8, device=device)

    def operate() -> None:
        for _ in range(_NUM_OPS):
            few + few

    return median_s(operate, device) / _NUM_OPS


def median_s(
    run: Callable[[], object],
    device: torch.device,
    *,
    seconds: float = _SECONDS,
    long_s: float = _LONG_S,
) -> float:
    """Time something: repeat it for a while, and take the median in seconds.

    Args:
        run: What to time; it runs once before.
        device: Where it works.
        seconds: For how long to repeat it.
        long_s: Where the first time takes longer than this many seconds, it is not repeated.
    """
    run()  # what happens once only: threads, kernels, memory
    synchronise(device)
    times: list[float] = []
    while sum(times) < seconds or len(times) < _LEAST_TIMES:
        began = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - began)
        if times[0] > long_s:
            break
    return statistics.median(times)


def synchronise(device: torch.device) -> None:
    """Wait for what a device has been given to do: others than a CPU only queue it until then."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
