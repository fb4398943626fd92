"""Counts the matrix products of training one matrix, and measures how fast this machine does them.

A product of N rows with a matrix of I x O takes 2 N I O floating-point operations: a multiplication
and an addition each. Products with the matrices of the layers and of the output head are counted.
Attention's own products, norms, activations and the optimizer are not: at the lengths of edits they
are few. So a prediction from this count errs on the low side.

Two counts matter. `plain_step` is what a step does that runs the whole model on padded batches.
`needed_epoch` is the least that an epoch of exact training needs, whoever does it: no padding; a
beginning that several edits of a batch share, once; nothing that never changes (all that comes before
the tuned matrix); and at target positions only the head, and what the last layer does position by
position. A share of the machine's rate is taken of the latter, and so is comparable: work that is not
needed does not count as use.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locft.data.encode import Encoded
from locft.errors import LocationError, ModelError
from locft.model.location import Location
from locft.model.structure import find_layers, find_parameters, find_pointwise
from locft.train.calibrate import median_s

Kind = Literal["forward", "input gradient", "weight gradient"]
# A plain step may take this many times what its matrix products alone should take.
LARGEST_OVERHEAD = 1.3
_MEASURED_S = 0.25
_UNCACHED_BYTES = 128 * 2**20  # more than the caches of a processor hold


@dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix product: every row by the `num_in` x `num_out` of a matrix.

    Attributes:
        kind: In which direction: all three take the same operations, at different rates.
        num_in: The width of what the matrix takes.
        num_out: The width of what it gives.
        at: Which positions it is done for.
    """

    kind: Kind
    num_in: int
    num_out: int
    at: Literal["tokens", "targets"] = "tokens"

    @property
    def name(self) -> str:
        """What it is called in a report: ``forward 576x1536``."""
        return f"{self.kind} {self.num_in}x{self.num_out}"

    def operations(self, num_tokens: float, num_targets: float = 0) -> float:
        """Count floating-point operations."""
        num_rows = num_tokens if self.at == "tokens" else num_targets
        return 2.0 * num_rows * self.num_in * self.num_out


def plain_step(model: PreTrainedModel, location: Location) -> tuple[Product, ...]:
    """List the products of a step that runs the whole model, with a gradient of one matrix.

    They are: the forward of all layers, input gradients of those above the tuned matrix, its weight
    gradient, and the head forward and backward, all at every position.

    Raises:
        LocationError: The location is not one matrix of an MLP.
        ModelError: The model is a mixture of experts, whose products depend on the text.
    """
    below, tuned, above, head = _matrices(model, location)
    return (
        *(_product("forward", matrix) for matrix in (*below, tuned, *above, head)),
        *(_product("input gradient", matrix) for matrix in (*above, head)),
        _product("weight gradient", tuned),
    )


def needed_epoch(model: PreTrainedModel, location: Location) -> tuple[Product, ...]:
    """List the products that an epoch needs, from the tuned matrix on.

    Raises:
        LocationError: The location is not one matrix of an MLP.
        ModelError: The model is a mixture of experts.
    """
    _, tuned, above, head = _matrices(model, location)
    last_layer = find_layers(model).modules[-1]
    parts = find_pointwise(last_layer)
    at_targets = {id(weight) for part in parts for weight in part.parameters()} | {id(head)}

    def needed(kind: Kind, matrix: Tensor) -> Product:
        return _product(kind, matrix, at="targets" if id(matrix) in at_targets else "tokens")

    return (
        *(needed("forward", matrix) for matrix in (tuned, *above, head)),
        *(needed("input gradient", matrix) for matrix in (*above, head)),
        needed("weight gradient", tuned),
    )


def needed_positions(batches: Sequence[Sequence[Encoded]]) -> tuple[int, int]:
    """Count the positions of an epoch that something depends on.

    Returns:
        How many distinct beginnings there are in each batch, all together: nothing is predicted from
        a last token. And how many of them a target is predicted from.
    """
    num_tokens = num_targets = 0
    for batch in batches:
        ends = [(example.ids, end) for example in batch for end in range(1, len(example.ids))]
        num_tokens += len({ids[:end] for ids, end in ends})
        starts = {example.ids: example.target_start for example in batch}
        num_targets += len({ids[:end] for ids, end in ends if end >= starts[ids]})
    return num_tokens, num_targets


def measure_rates(
    products: Sequence[Product], num_tokens: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Time each kind of product, at a number of rows.

    Args:
        products: The products; each kind is measured once.
        num_tokens: How many rows they have.
        dtype: What they are computed in.
        device: Where.

    Returns:
        Floating-point operations per second by the product's name; of each, the median of repeats.
    """
    found: dict[str, float] = {}
    for product in products:
        if product.name not in found:
            run = _example(product, num_tokens, dtype, device)
            seconds = median_s(run, device, seconds=_MEASURED_S, long_s=math.inf)
            found[product.name] = product.operations(num_tokens, num_tokens) / seconds
    return found


def predicted_seconds(
    products: Sequence[Product], rates: Mapping[str, float], num_tokens: float, num_targets: float = 0
) -> float:
    """Say how long products take, one after the other, at the measured rates."""
    return sum(product.operations(num_tokens, num_targets) / rates[product.name] for product in products)


def whole_rate(products: Sequence[Product], rates: Mapping[str, float]) -> float:
    """Put the rates together: operations per second over all products, in their shares."""
    total = sum(product.operations(1, 1) for product in products)
    return total / predicted_seconds(products, rates, 1, 1)


def steps_over_prediction(
    step_seconds: Sequence[float],
    step_tokens: Sequence[int],
    products: Sequence[Product],
    rates: Mapping[str, float],
) -> float:
    """Compare steps with what their matrix products alone should take: the median of the ratios.

    Args:
        step_seconds: What each step took.
        step_tokens: How many tokens it ran on, padding included.
        products: The products of a step.
        rates: Operations per second by the product's name.
    """
    return median(
        seconds / predicted_seconds(products, rates, num_tokens)
        for seconds, num_tokens in zip(step_seconds, step_tokens, strict=True)
    )


def _matrices(
    model: PreTrainedModel, location: Location
) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
    """Sort the matrices: those before the tuned one, it, those after it, and the head."""
    if location.module not in ("mlp.down", "mlp.up"):
        raise LocationError(
            f"location {location.name!r} cannot be timed: one matrix is expected, LAYER.mlp.down or "
            "LAYER.mlp.up"
        )
    layers = find_layers(model)
    below: list[Tensor] = []
    above: list[Tensor] = []
    last = () if location.module == "mlp.down" else find_parameters(layers, location.layer, "mlp.down")
    for index, layer in enumerate(layers.modules):
        for name, parameter in layer.named_parameters():
            full_name = f"{layers.prefix}.{index}.{name}"
            if parameter.dim() > 2:
                raise ModelError(
                    f"{type(model).__name__} cannot be timed: {full_name} holds several matrices, and "
                    "which are used depends on the text"
                )
            if parameter.dim() < 2 or full_name in location.parameters:
                continue
            is_above = index > location.layer or full_name in last
            (above if is_above else below).append(parameter)
    head = model.get_output_embeddings().weight
    assert isinstance(head, Tensor)
    return below, model.get_parameter(location.parameters[0]), above, head


def _product(kind: Kind, matrix: Tensor, *, at: Literal["tokens", "targets"] = "tokens") -> Product:
    num_out, num_in = matrix.shape
    return Product(kind=kind, num_in=num_in, num_out=num_out, at=at)


def _example(
    product: Product, num_rows: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """Make a product on random numbers, laid out as a linear layer does it.

    It takes another matrix each time, as a model does: no cache holds the weights of all layers.
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    num_bytes = product.num_out * product.num_in * dtype.itemsize
    num_matrices = math.ceil(_UNCACHED_BYTES / num_bytes)
    matrix = random(product.num_out, product.num_in)
    matrices = cycle([matrix.clone() for _ in range(num_matrices)])
    inputs, gradients = random(num_rows, product.num_in), random(num_rows, product.num_out)
    return {
        "forward": lambda: inputs @ next(matrices).T,
        "input gradient": lambda: gradients @ next(matrices),
        "weight gradient": lambda: gradients.T @ inputs,
    }[product.kind]
