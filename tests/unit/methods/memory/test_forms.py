"""The closed forms give the worked examples, and are optima of what they minimise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from locft.errors import TrainingError
from locft.methods.memory.forms import (
    alphaedit_update,
    keep_largest,
    memit_update,
    ridge_update,
    rome_update,
    unused_directions,
)
from locft.methods.memory.solve import factor


def matrix(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


C = matrix([2, 0.5, 0], [0.5, 1, 0.2], [0, 0.2, 0.5])
KEYS = matrix([1, 0], [0, 1], [2, -1])
MISSING = matrix([2, -1], [0, 3])


def close(found: Tensor, *rows: object) -> None:
    torch.testing.assert_close(found, matrix(*rows), atol=1e-6, rtol=0)


def positive(seed: int, width: int) -> Tensor:
    rows = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(seed)).double()
    return rows.T @ rows / len(rows)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_rome_gives_the_worked_example() -> None:
    key, mean, value = (torch.tensor(x).double() for x in ([1, 0, 2], [0.8, 0.2, 1.6], [3, 1]))
    weight = matrix([1, 2, 0], [0, 1, -1])
    direction = torch.cholesky_solve(mean[:, None], factor(C, "C", ""))[:, 0]
    close(direction / direction.norm(), 0.164164, -0.219802, 0.961633)
    residual = value - weight @ key
    update = rome_update(key, direction, residual)
    close(update, [0.157289, -0.210596, 0.921356], [0.235933, -0.315893, 1.382034])
    torch.testing.assert_close((weight + update) @ key, value)
    close(rome_update(key, mean, residual), [0.4, 0.1, 0.8], [0.6, 0.15, 1.2])


def test_memit_gives_the_worked_examples_of_two_layers() -> None:
    lower = factor(10 * C, "C", "")
    first = memit_update(KEYS, MISSING / 2, lower)
    close(first, [0.044913, -0.088586, 0.249876], [-0.023077, 0.161538, -0.161538])
    left = MISSING - first @ KEYS
    close(left, [1.455335, -0.661538], [0.346154, 2.676923])
    keys = matrix([0, 1], [1, 1], [-1, 0])
    second = memit_update(keys, left, lower)
    close(second, [-0.066100, 0.121095, -0.262738], [0.062081, 0.228869, -0.095837])
    close(left - second @ keys, [1.071502, -0.716533], [0.021448, 2.385973])


@given(seed=st.integers(0, 99), width=st.integers(1, 6), num=st.integers(1, 9))
def test_memit_is_the_optimum_of_its_objective(seed: int, width: int, num: int) -> None:
    keys, residuals = drawn(seed, width, num), drawn(seed + 1, 3, num)
    weighted = 2.5 * (positive(seed, width) + 0.1 * torch.eye(width))
    update = memit_update(keys, residuals, factor(weighted, "S", ""))
    gradient = (update @ keys - residuals) @ keys.T + update @ weighted
    assert gradient.abs().max() < 1e-8 * (1 + residuals.abs().max() * keys.abs().max())
    direct = residuals @ keys.T @ torch.linalg.inv(weighted + keys @ keys.T)
    torch.testing.assert_close(update, direct, atol=1e-7, rtol=1e-5)


def test_rect_keeps_the_entries_that_change_most_relative_to_the_weights() -> None:
    weight = matrix([0.5, -0.1, 0.02, 1, -0.4], [0.25, 0.3, -0.05, 0.8, 0.6])
    update = matrix([0.05, 0.03, -0.005, 0.02, 0.06], [-0.01, 0.051, 0.02, 0.048, -0.042])
    found = weight + keep_largest(update, weight, 0.4)
    close(found, [0.5, -0.07, 0.015, 1, -0.4], [0.25, 0.351, -0.03, 0.8, 0.6])


@given(seed=st.integers(0, 99), share=st.floats(0, 1))
def test_rect_keeps_so_many_entries_unchanged_and_none_beside(seed: int, share: float) -> None:
    update, weight = drawn(seed, 4, 7), drawn(seed + 1, 4, 7)
    kept = keep_largest(update, weight, share)
    assert int((kept != 0).sum()) == round(share * 28)
    assert torch.equal(kept[kept != 0], update[kept != 0])
    left_out = (update / weight).abs()[kept == 0]
    assert (
        not len(left_out)
        or not (kept != 0).any()
        or (left_out.max() <= (update / weight).abs()[kept != 0].min())
    )


def test_rect_takes_a_weight_of_zero_first_unless_it_stays() -> None:
    kept = keep_largest(matrix([0.1, 0.0, 0.5]), matrix([0.0, 0.0, 1.0]), 1 / 3)
    close(kept, [0.1, 0, 0])


def householder() -> Tensor:
    half = torch.full((4,), 0.5).double()
    return torch.eye(4).double() - 2 * torch.outer(half, half)


def test_alphaedit_gives_the_worked_examples() -> None:
    turn = householder()
    moment = turn @ torch.diag(torch.tensor([2, 0.5, 0.01, 0.001]).double()) @ turn
    unused = unused_directions(moment, 0.02)
    close(unused @ unused.T, [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.5, -0.5], [0, 0, -0.5, 0.5])
    keys = matrix([1, 0], [0, 1], [2, -1], [1, 1])
    none = torch.zeros(4, 4).double()
    update = alphaedit_update(keys, MISSING, unused, none, 1.0)
    close(
        update,
        [0.407407, 0.407407, 0.629630, -0.629630],
        [0.555556, 0.555556, -0.777778, 0.777778],
    )
    assert (update @ turn[:, :2]).abs().max() < 1e-12
    earlier = torch.outer(*[torch.tensor([1, 1, 0, 2]).double()] * 2)
    close(
        alphaedit_update(keys, MISSING, unused, earlier, 1.0),
        [0.492063, 0.492063, 0.587302, -0.587302],
        [0.047619, 0.047619, -0.523810, 0.523810],
    )
    close(
        alphaedit_update(keys, MISSING, unused, earlier, 10.0),
        [0.067215, 0.067215, 0.149520, -0.149520],
        [0.078189, 0.078189, -0.193416, 0.193416],
    )


@given(seed=st.integers(0, 99), num=st.integers(1, 7))
def test_alphaedit_is_the_optimum_among_updates_along_unused_directions(seed: int, num: int) -> None:
    width = 5
    moment = positive(seed, width)
    unused = unused_directions(moment, torch.linalg.eigvalsh(moment)[3].item())
    keys, residuals = drawn(seed, width, num), drawn(seed + 1, 3, num)
    earlier = positive(seed + 2, width)
    update = alphaedit_update(keys, residuals, unused, earlier, 0.7)
    project = unused @ unused.T
    gradient = ((update @ keys - residuals) @ keys.T + update @ earlier + 0.7 * update) @ project
    assert gradient.abs().max() < 1e-9 * (1 + residuals.abs().max() * keys.abs().max())
    torch.testing.assert_close(update @ project, update)


@given(seed=st.integers(0, 99), num=st.integers(1, 9), width=st.integers(1, 9))
def test_ultraedit_is_the_optimum_of_ridge_regression_in_either_form(
    seed: int, num: int, width: int
) -> None:
    inputs, steps = drawn(seed, num, width), drawn(seed + 1, num, 4)
    update = ridge_update(inputs, steps)
    gradient = inputs.T @ (inputs @ update.T - steps) + update.T
    assert gradient.abs().max() < 1e-9 * (1 + steps.abs().max() * inputs.abs().max())


def test_a_singular_system_says_its_condition_number_and_what_to_do() -> None:
    with pytest.raises(TrainingError, match=r"C is singular \(condition number .*\).*: take more text"):
        factor(torch.zeros(3, 3), "C", "take more text")
    with pytest.raises(TrainingError, match=r"ill-conditioned \(condition number at least 1\.0e\+14\)"):
        factor(torch.diag(torch.tensor([1.0, 1e-14])), "C", "take more text")
