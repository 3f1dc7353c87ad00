import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from foretune.evaluation.statistics import COEFFICIENTS, SCOPES, Layers, correlate, kendall, pearson, spearman

REFERENCE = {
    "pearson": stats.pearsonr,
    "spearman": stats.spearmanr,
    "kendall": stats.kendalltau,
}
values = st.lists(st.integers(-3, 3), min_size=6, max_size=6)


@given(x=st.lists(values, min_size=3, max_size=9), y=st.lists(values, min_size=9, max_size=9))
def test_coefficients_agree_with_scipy_ties_and_all(x, y):
    x = np.array(x, dtype=np.float64)
    y = np.array(y[: len(x)], dtype=np.float64)[:, :2]
    for name, coefficient in COEFFICIENTS.items():
        ours = coefficient(x, y)
        assert ours.shape == (6, 2)
        for i in range(6):
            for j in range(2):
                if np.ptp(x[:, i]) == 0 or np.ptp(y[:, j]) == 0:
                    assert math.isnan(ours[i, j])
                else:
                    assert ours[i, j] == pytest.approx(REFERENCE[name](x[:, i], y[:, j])[0], abs=1e-12)


def nested(groups=3, units=4, seeds=2):
    """Labels of cells, shuffled: nothing may depend on their order."""
    group = np.repeat(np.arange(groups), units * seeds)
    unit = np.repeat(np.arange(groups * units), seeds)
    order = np.random.default_rng(5).permutation(len(group))
    return Layers(group[order], unit[order])


def uneven():
    """Groups of 3, 5 and 4 units with 1 to 3 cells each, as an unfinished study has them."""
    units = np.repeat(np.arange(12), [1, 3, 2, 2, 1, 1, 3, 2, 1, 2, 3, 1])
    group = np.repeat([0, 1, 2], [3, 5, 4])[units]
    order = np.random.default_rng(6).permutation(len(units))
    return Layers(group[order], units[order])


def slow_estimate(x, y, layers, scope, coefficient):
    cells = range(len(x))
    if scope == "all":
        return coefficient(x, y)[0]

    def mean(values, chosen):
        return sum(values[c] for c in chosen) / len(chosen)

    units = {u: [c for c in cells if layers.unit[c] == u] for u in sorted(set(layers.unit.tolist()))}
    of_group = {}
    for chosen in units.values():
        of_group.setdefault(layers.group[chosen[0]], []).append((mean(x, chosen), mean(y, chosen)))
    if scope == "across":
        points = [np.mean(cells, axis=0) for cells in of_group.values()]
        return coefficient([p[0] for p in points], [p[1] for p in points])[0]
    return np.mean([coefficient([p[0] for p in cells], [p[1] for p in cells])[0] for cells in of_group.values()])


@pytest.mark.parametrize("name", list(COEFFICIENTS))
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("layers", [nested(), uneven()], ids=["even", "uneven"])
def test_scopes_against_a_slow_reference(name, scope, layers):
    rng = np.random.default_rng(0)
    n = len(layers.group)
    x, y = rng.normal(size=(n, 2)), rng.normal(size=(n, 3))
    correlation = correlate(x, y, layers, resamples=9, permutations=9)[name, scope]
    for i in range(2):
        for j in range(3):
            slow = slow_estimate(x[:, i], y[:, j], layers, scope, REFERENCE[name])
            assert correlation.estimate[i, j] == pytest.approx(slow, abs=1e-12)


def test_points_count_what_an_estimate_rests_on():
    layers = nested()
    x, y = np.random.default_rng(0).normal(size=(24, 1)), np.random.default_rng(1).normal(size=(24, 2))
    y[layers.group == 0, 1] = 4.0  # constant in one group
    correlations = correlate(x, y, layers, resamples=10, permutations=9)
    assert correlations["spearman", "all"].points.tolist() == [[24, 24]]
    assert correlations["spearman", "across"].points.tolist() == [[3, 3]]
    assert correlations["spearman", "within"].points.tolist() == [[12, 8]]


def test_a_constant_outcome_has_no_coefficient():
    layers = nested()
    x = np.random.default_rng(0).normal(size=(24, 1))
    correlations = correlate(x, np.ones((24, 1)), layers, resamples=10, permutations=9)
    for correlation in correlations.values():
        assert np.isnan(correlation.estimate).all()
        assert np.isnan(correlation.low).all()
        assert np.isnan(correlation.p).all()
        assert not correlation.established.any()


def test_a_group_of_two_units_says_nothing_within():
    layers = Layers(np.array([0, 0, 1, 1, 1]), np.arange(5))
    x = np.arange(5.0)[:, None]
    correlation = correlate(x, x, layers, resamples=10, permutations=9)["spearman", "within"]
    assert correlation.points.tolist() == [[3]]
    assert correlation.estimate[0, 0] == pytest.approx(1.0)
    few = Layers(np.array([0, 0, 1, 1]), np.arange(4))
    assert np.isnan(correlate(x[:4], x[:4], few, resamples=10, permutations=9)["spearman", "within"].estimate).all()


def test_a_perfect_order_of_four_is_not_established_and_of_eight_is():
    x = np.arange(8.0)[:, None]
    for n, established in ((4, False), (8, True)):
        layers = Layers(np.arange(n), np.arange(n))
        correlation = correlate(x[:n], x[:n], layers, resamples=50, permutations=199)["spearman", "across"]
        assert correlation.estimate[0, 0] == pytest.approx(1.0)
        assert (correlation.low[0, 0], correlation.high[0, 0]) == pytest.approx((1.0, 1.0))
        assert bool(correlation.established[0, 0]) == established


def test_permutation_p_is_that_of_scipy():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(9, 1))
    y = x + 1.2 * rng.normal(size=(9, 1))
    layers = Layers(np.arange(9), np.arange(9))
    ours = correlate(x, y, layers, resamples=1)["spearman", "all"].p[0, 0]

    def statistic(a):
        return stats.spearmanr(a, y[:, 0]).statistic

    theirs = stats.permutation_test((x[:, 0],), statistic, permutation_type="pairings", n_resamples=999, rng=1).pvalue
    assert ours == pytest.approx(theirs, abs=0.04)


def test_the_interval_covers_and_shrinks():
    """Independent points: the hierarchical bootstrap is the plain one, which covers about 95% of the time."""
    rng = np.random.default_rng(3)
    truth, hits, widths = 0.6, 0, {}
    for n in (15, 60):
        layers = Layers(np.arange(n), np.arange(n))
        for _ in range(30):
            x = rng.normal(size=(n, 1))
            y = truth * x + math.sqrt(1 - truth**2) * rng.normal(size=(n, 1))
            correlation = correlate(x, y, layers, resamples=100, permutations=1)["pearson", "all"]
            hits += correlation.low[0, 0] <= truth <= correlation.high[0, 0]
            widths.setdefault(n, []).append(correlation.high[0, 0] - correlation.low[0, 0])
    assert hits >= 48  # of 60; 57 expected, a percentile interval of few points is a little narrow
    assert np.mean(widths[60]) < 0.7 * np.mean(widths[15])


def test_cells_that_hang_together_do_not_count_as_many():
    """Ten cells for each of four data sets, all the same within one: the interval is that of four points."""
    rng = np.random.default_rng(4)
    level = rng.normal(size=4)
    outcome = level + rng.normal(size=4)
    group = np.repeat(np.arange(4), 10)
    x = (level[group] + 1e-3 * rng.normal(size=40))[:, None]
    y = (outcome[group] + 1e-3 * rng.normal(size=40))[:, None]
    nested_ = correlate(x, y, Layers(group, np.arange(40)), resamples=200, permutations=1)["pearson", "all"]
    flat = correlate(x, y, Layers(np.arange(40), np.arange(40)), resamples=200, permutations=1)["pearson", "all"]
    assert nested_.high - nested_.low > 2 * (flat.high - flat.low)


def test_the_same_seed_gives_the_same_interval():
    x, y = np.random.default_rng(0).normal(size=(2, 24, 1))
    first, again = (correlate(x, y, nested(), resamples=20, permutations=20)["kendall", "within"] for _ in range(2))
    assert (first.low, first.high, first.p) == (again.low, again.high, again.p)


@settings(max_examples=25)
@given(x=st.lists(st.integers(-50, 50), min_size=5, max_size=12, unique=True))
def test_rank_coefficients_do_not_see_the_scale(x):
    x = np.array(x, dtype=np.float64)[:, None]
    y = np.random.default_rng(len(x)).normal(size=(len(x), 1))
    for coefficient in (spearman, kendall):
        assert coefficient(np.exp(x / 10), y)[0, 0] == pytest.approx(coefficient(x, y)[0, 0])
        assert coefficient(-x, y)[0, 0] == pytest.approx(-coefficient(x, y)[0, 0])
    assert pearson(3 * x + 1, y)[0, 0] == pytest.approx(pearson(x, y)[0, 0])
