import math
from itertools import product
from random import Random
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locft.evaluation import metrics
from locft.evaluation.metrics import is_match, mean, mean_per_token, paired_difference, share
from locft.types import Figure


def bounds(figure: Figure) -> tuple[float, float, float]:
    assert figure.value is not None
    assert figure.low is not None
    assert figure.high is not None
    return figure.low, figure.value, figure.high


def wilson_by_bisection(successes: int, num: int) -> tuple[float, float]:
    """Find the shares that a score test at 5% just does not reject: Wilson's interval, by definition."""
    z = NormalDist().inv_cdf(0.975)
    p = successes / num

    def is_rejected(share: float) -> bool:
        return abs(p - share) > z * math.sqrt(share * (1 - share) / num)

    def search(outside: float) -> float:
        inside = p
        for _ in range(200):
            middle = (outside + inside) / 2
            if is_rejected(middle):
                outside = middle
            else:
                inside = middle
        return inside

    return search(0.0), search(1.0)


@pytest.mark.parametrize(
    ("successes", "num", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # z^2 / (n + z^2)
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),  # Newcombe 1998
        (1, 29, 0.0061, 0.1718),  # Newcombe 1998
    ],
)
def test_a_share_has_its_published_wilson_interval(
    successes: int, num: int, low: float, high: float
) -> None:
    figure = share(successes, num)
    assert figure == Figure(value=successes / num, num=num, low=figure.low, high=figure.high)
    assert bounds(figure) == pytest.approx((low, successes / num, high), abs=6e-5)


@given(st.integers(1, 5000).flatmap(lambda num: st.tuples(st.integers(0, num), st.just(num))))
def test_a_wilson_interval_is_what_a_score_test_does_not_reject(counts: tuple[int, int]) -> None:
    low, value, high = bounds(share(*counts))
    assert 0 <= low <= value <= high <= 1
    assert (low, high) == pytest.approx(wilson_by_bisection(*counts), abs=1e-9)


def test_the_ends_of_an_interval_are_exact_where_all_or_none_count() -> None:
    for num in range(1, 300):
        assert share(0, num).low == 0.0
        assert share(num, num).high == 1.0


def test_a_share_of_nothing_has_no_value_and_a_reason() -> None:
    assert share(0, 0) == Figure(value=None, num=0, reason="the edits hold none")


def test_a_mean_per_token_weighs_passages_by_their_tokens() -> None:
    figure = mean_per_token([1.0, 90.0], [1, 9])
    assert figure.value == pytest.approx(9.1)  # not the mean of the passages' means, 5.5
    assert figure.num == 2
    low, _, high = bounds(figure)
    assert (low, high) == pytest.approx((1.0, 10.0))  # each passage alone is drawn often enough


def test_a_bootstrap_interval_is_that_of_a_plain_loop_within_its_noise() -> None:
    sums, counts = [3.0, 1.0, 8.0, 2.0, 6.0, 4.0], [3, 2, 4, 4, 2, 5]
    low, value, high = bounds(mean_per_token(sums, counts))
    # By enumeration: all 6^6 ways to draw six passages of six.
    means = []
    for code in range(6**6):
        drawn = [code // 6**place % 6 for place in range(6)]
        means.append(sum(sums[i] for i in drawn) / sum(counts[i] for i in drawn))
    means.sort()
    assert value == pytest.approx(24 / 20)
    assert low == pytest.approx(means[int(0.025 * len(means))], abs=0.06)
    assert high == pytest.approx(means[int(0.975 * len(means))], abs=0.06)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 1024)), min_size=2, max_size=30))
def test_a_bootstrap_interval_is_deterministic_and_within_the_passages_means(
    passages: list[tuple[float, int]],
) -> None:
    sums, counts = [total for total, _ in passages], [num for _, num in passages]
    figure = mean_per_token(sums, counts)
    assert mean_per_token(sums, counts) == figure
    low, value, high = bounds(figure)
    means = [total / num for total, num in passages]
    slack = 1e-9 * max(means)
    assert min(means) - slack <= low <= high <= max(means) + slack
    assert min(means) - slack <= value <= max(means) + slack


@given(st.floats(0, 100), st.lists(st.integers(1, 500), min_size=2, max_size=20))
def test_constant_passages_have_an_interval_of_no_width(rate: float, counts: list[int]) -> None:
    figure = mean_per_token([rate * num for num in counts], counts)
    assert bounds(figure) == pytest.approx((rate, rate, rate))


def test_a_mean_over_no_passage_has_no_value_and_a_reason() -> None:
    figure = mean_per_token([], [])
    assert (figure.value, figure.num) == (None, 0)
    assert figure.reason


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Paris", "paris"),
        (" The  Eiffel\tTower!", "eiffel tower"),
        ("New York. It is large", "New York"),
        ("New York\nQ: next", "the New York"),
        ("an apple", "Apple"),
        ("O'Neill", "oneill"),
        ("Zürich", "zürich"),
    ],
)
def test_answers_match_up_to_case_punctuation_articles_and_what_follows_the_sentence(
    answer: str, expected: str
) -> None:
    assert is_match(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Paris, France", "Paris"),
        ("Pari", "Paris"),
        ("", "Paris"),
        (". Paris", "Paris"),
        ("\nParis", "Paris"),
        ("York New", "New York"),
        ("Zurich", "Zürich"),
        ("St", "St. Petersburg"),  # the expected text is not cut
    ],
)
def test_other_answers_do_not_match(answer: str, expected: str) -> None:
    assert not is_match(answer, expected)


def resampled_means(values: list[float]) -> list[float]:
    """Enumerate the means of all ways to draw as many values, with replacement."""
    return sorted(sum(drawn) / len(values) for drawn in product(values, repeat=len(values)))


@pytest.mark.parametrize(
    "values", [[0.0, 1.0, 1.0, 0.0, 1.0, 1.0], [0.5, 0.25, 1.0, 0.0, 0.75, 0.125], [-1.0, 0, 0, 1, 1, 1]]
)
def test_a_mean_has_the_interval_of_all_resamples_within_its_noise(values: list[float]) -> None:
    low, value, high = bounds(mean(values))
    means = resampled_means(values)
    assert value == pytest.approx(sum(values) / 6)
    assert low == pytest.approx(means[int(0.025 * len(means))], abs=0.09)
    assert high == pytest.approx(means[int(0.975 * len(means))], abs=0.09)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=50), st.randoms())
def test_an_interval_does_not_depend_on_the_order_of_the_items(
    values: list[float], random: Random
) -> None:
    shuffled = random.sample(values, len(values))
    assert bounds(mean(shuffled, least=-1)) == pytest.approx(bounds(mean(values, least=-1)))
    low, value, high = bounds(mean(values, least=-1))
    assert -1 - 1e-9 <= low <= high <= 1 + 1e-9
    assert min(values) - 1e-9 <= value <= max(values) + 1e-9


def test_a_mean_of_nothing_has_no_value_and_a_reason() -> None:
    assert mean([]) == Figure(value=None, num=0, reason="the edits hold none")


def test_many_items_are_resampled_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [index / 1000 for index in range(1000)]
    whole = mean(values)
    monkeypatch.setattr(metrics, "_MAX_DRAWN", 5000)
    assert bounds(mean(values)) == pytest.approx(bounds(whole), abs=2e-3)


def test_a_paired_difference_is_surer_than_two_intervals() -> None:
    before = [float(index % 2) for index in range(200)]
    after = [1.0 if index % 10 == 0 else value for index, value in enumerate(before)]
    change = paired_difference(before, after)
    assert change.value == pytest.approx(0.1)
    low, _, high = bounds(change)
    assert 0.05 < low < 0.1 < high < 0.15
    widths = [figure.high - figure.low for figure in (mean(before), mean(after))]  # type: ignore[operator]
    assert high - low < min(widths)


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=30))
def test_equal_scores_do_not_prove_that_models_are_equal(values: list[float]) -> None:
    low, value, high = bounds(paired_difference(values, values))
    assert value == 0
    assert low == pytest.approx(-high)
    assert (1 - high) ** len(values) == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("value", "num", "low", "high"),
    [
        (1.0, 20, 1 - 0.16843, 1.0),  # Clopper and Pearson's interval of 20 in 20
        (0.0, 20, 0.0, 0.16843),
        (0.5, 20, 0.5 - 0.16843 / 2, 0.5 + 0.16843 / 2),
        (1.0, 1000, 1 - 0.0036821, 1.0),
        (0.25, 1, 0.25 * 0.025, 0.25 + 0.75 * 0.975),
    ],
)
def test_items_that_agree_leave_room_for_what_was_not_seen(
    value: float, num: int, low: float, high: float
) -> None:
    assert bounds(mean([value] * num)) == pytest.approx((low, value, high), abs=1e-5)


def difference_of(both: int, gained: int, lost: int, neither: int) -> Figure:
    """Compare two models by how many items both, only the second, only the first and neither got."""
    before = [1.0] * both + [0.0] * gained + [1.0] * lost + [0.0] * neither
    after = [1.0] * (both + gained) + [0.0] * (lost + neither)
    return paired_difference(before, after)


def test_a_difference_of_shares_has_its_published_newcombe_interval() -> None:
    # Newcombe 1998 (paired data), method 10.
    figure = difference_of(both=36, gained=12, lost=2, neither=0)
    assert figure.num == 50
    assert bounds(figure) == pytest.approx((0.0569, 0.2, 0.3404), abs=6e-5)


COUNTS = st.tuples(*[st.integers(0, 60)] * 4).filter(any)


@given(COUNTS)
def test_a_difference_of_shares_is_turned_when_the_models_are_swapped(
    counts: tuple[int, int, int, int],
) -> None:
    both, gained, lost, neither = counts
    low, value, high = bounds(difference_of(both, gained, lost, neither))
    assert -1 <= low <= value <= high <= 1
    assert bounds(difference_of(both, lost, gained, neither)) == pytest.approx((-high, -value, -low))


def test_four_of_four_that_are_gained_are_no_accident() -> None:
    low, value, high = bounds(difference_of(both=0, gained=4, lost=0, neither=0))
    assert value == high == 1
    assert 0 < low < 1


@pytest.mark.parametrize("both", [0, 1, 2])
def test_equal_shares_are_equal_the_surer_the_more_items_there_are(both: int) -> None:
    widths = []
    for times in (1, 2, 5, 20, 100):
        low, value, high = bounds(difference_of(both * times, 0, 0, (2 - both) * times))
        assert value == 0
        assert low == pytest.approx(-high)
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 4 * widths[-1] > 0


def test_differences_are_of_the_same_items_only() -> None:
    with pytest.raises(ValueError):
        paired_difference([0.0], [0.0, 1.0])
