"""Means over seeds, and what makes one result better than another."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locft.errors import InputError
from locft.recipe.preference import PREFERENCES, rule_of, value_of
from locft.study.over_seeds import MOST_SEEDS, mean_over_seeds
from locft.types import Figure


def figure(value: float | None, **changes: Any) -> Figure:
    return Figure(value=value, num=100, **changes)


def scores(reliability: float | None, generalization: float, drift: float) -> dict[str, Figure]:
    return {
        "reliability": figure(reliability),
        "generalization": figure(generalization),
        "drift": figure(drift),
    }


def test_seeds_have_student_s_interval() -> None:
    found = mean_over_seeds([figure(value) for value in (0.9, 0.92, 0.97)], most=2.0)
    assert found.num == 3
    assert found.value == pytest.approx(0.93)
    # A standard deviation of 0.036056, 4.3027 of whose standard errors of 0.020817 are 0.08957.
    assert found.low == pytest.approx(0.93 - 0.08957, abs=1e-4)
    assert found.high == pytest.approx(0.93 + 0.08957, abs=1e-4)


def test_one_seed_keeps_the_interval_of_its_items() -> None:
    own = figure(0.5, low=0.4, high=0.6)
    assert mean_over_seeds([own]) == own


@given(st.lists(st.floats(100, 101), min_size=2, max_size=MOST_SEEDS))
def test_the_interval_of_seeds_is_about_their_mean(values: list[float]) -> None:
    found = mean_over_seeds([figure(value) for value in values], most=math.inf)
    assert found.value is not None
    assert found.low is not None
    assert found.high is not None
    assert found.value == pytest.approx(sum(values) / len(values))
    assert found.value - found.low == pytest.approx(found.high - found.value)
    assert found.low <= found.value <= found.high


def test_a_seed_without_a_score_leaves_none() -> None:
    assert mean_over_seeds([figure(0.5), figure(None)]).value is None


def test_more_seeds_than_quantiles_are_refused() -> None:
    with pytest.raises(InputError, match="11 seeds: expected at most 10"):
        mean_over_seeds([figure(0.5)] * (MOST_SEEDS + 1))


def test_a_preference_prices_drift_and_asks_for_reliability() -> None:
    result = scores(0.97, 0.3, 0.05)
    assert value_of(result, "generalization") == pytest.approx(30)
    assert value_of(result, "balanced") == pytest.approx(30 - 5)
    assert value_of(result, "preservation") == pytest.approx(30 - 20)
    assert value_of(scores(0.90, 0.3, 0.05), "balanced") == pytest.approx(30 - 5 - 5)


@pytest.mark.parametrize("preference", PREFERENCES)
def test_what_was_not_measured_is_worth_less_than_anything(preference: Any) -> None:
    assert value_of(scores(None, 0.3, 0.05), preference) == -math.inf
    assert value_of({}, preference) == -math.inf
    assert rule_of(preference).startswith("points of generalization")


def test_an_interval_over_seeds_ends_where_no_value_can_be() -> None:
    found = mean_over_seeds([figure(value) for value in (0.9, 1.0)])
    assert found.low == pytest.approx(0.3147, abs=1e-3)
    assert found.high == 1.0
    found = mean_over_seeds([figure(value) for value in (0.1, 0.9)])
    assert (found.low, found.high) == (0.0, 1.0)
    drift = mean_over_seeds([figure(value) for value in (0.9, 1.3)], most=math.inf)
    assert drift.high is not None
    assert drift.high > 1.3
