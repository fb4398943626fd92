import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locft.model.moments import InputMoment
from locft.train.precondition import make_preconditioner, make_preconditioners


def moment_of(seed: int, width: int, num_rows: int, scale: float = 1.0) -> InputMoment:
    rows = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)) * scale
    rows[:, 0] *= 30  # one direction is in far more use than others, as in real models
    return InputMoment(matrix=rows.T @ rows / num_rows, num_tokens=num_rows)


@given(
    seed=st.integers(0, 1000),
    width=st.integers(1, 12),
    num_rows=st.integers(1, 30),
    scale=st.sampled_from((1e-3, 1.0, 1e3)),
    strength=st.floats(0, 1e3),
)
def test_a_preconditioner_is_symmetric_with_eigenvalues_over_0_and_at_most_1(
    seed: int, width: int, num_rows: int, scale: float, strength: float
) -> None:
    matrix = make_preconditioner(moment_of(seed, width, num_rows, scale), strength, axis=1).matrix
    torch.testing.assert_close(matrix, matrix.T)
    values = torch.linalg.eigvalsh(matrix.double())
    assert values.min() > 0
    assert values.max() <= 1 + 1e-5


@given(seed=st.integers(0, 1000), width=st.integers(1, 12))
def test_at_zero_strength_it_is_the_identity(seed: int, width: int) -> None:
    matrix = make_preconditioner(moment_of(seed, width, 20), 0.0, axis=1).matrix
    assert torch.equal(matrix, torch.eye(width))


@given(seed=st.integers(0, 1000), strength=st.floats(0.01, 100))
def test_it_is_the_published_function_of_the_eigenvalues(seed: int, strength: float) -> None:
    moment = moment_of(seed, 7, 40)
    values, vectors = torch.linalg.eigh(moment.matrix.double())
    kept = 1 / (1 + strength * values / values.mean())
    expected = (vectors * kept) @ vectors.T
    found = make_preconditioner(moment, strength, axis=1).matrix.double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_nothing_in_use_is_nothing_to_preserve() -> None:
    moment = InputMoment(matrix=torch.zeros(3, 3), num_tokens=4)
    made = make_preconditioner(moment, 3.0, axis=1)
    assert torch.equal(made.matrix, torch.eye(3))
    assert made.gain == 1


def test_it_multiplies_on_the_side_of_the_input() -> None:
    moment = moment_of(0, 4, 20)
    linear, transposed = (make_preconditioner(moment, 2.0, axis) for axis in (1, 0))
    update = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(linear.apply(update), transposed.apply(update.T).T)
    torch.testing.assert_close(linear.apply(update), update @ linear.matrix)


def test_matrices_that_share_a_moment_share_a_preconditioner() -> None:
    shared, other = moment_of(0, 4, 20), moment_of(1, 4, 20)
    moments = {"q": shared, "k": shared, "o": other}
    made = make_preconditioners(moments, {"q": 1, "k": 1, "o": 1}, 2.0)
    assert made["q"] is made["k"]
    assert made["o"] is not made["q"]


@given(seed=st.integers(0, 1000), strength=st.floats(0, 100))
def test_the_gain_makes_up_for_what_ordinary_inputs_lose(seed: int, strength: float) -> None:
    moment = moment_of(seed, 7, 40)
    made = make_preconditioner(moment, strength, axis=1)
    inputs = torch.linalg.cholesky(moment.matrix.double() + 1e-9 * torch.eye(7)).T  # with that moment
    lost = (inputs @ made.matrix.double() * inputs).sum() / (inputs * inputs).sum()
    assert made.gain * lost.item() == pytest.approx(1, rel=1e-3)
    assert made.gain >= 1 - 1e-9
