"""What trials say beyond a row's own forecast, by hand."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.forecasting.calibration import Interval, RunForecast
from foretune.forecasting.reach import INSIDE, Reach
from foretune.forecasting.shown import Shown
from foretune.tasks.metrics import main_metric
from foretune.trials.conclusions import collapsed_at, mean_shift, shifted

METRIC = main_metric("classification")
FAR = Reach(9.0, ("far",))


def logistic(x):
    return 1 / (1 + math.exp(-x))


def said(logit, log_loss=-1.0, *, train=None, withheld=False):
    order = (logistic(logit), math.exp(log_loss))
    if withheld:
        return RunForecast(None, order, FAR)
    levels = {
        "accuracy": Interval(*(logistic(logit + half) for half in (0.0, -0.5, 0.5))),
        "eval_loss": Interval(*(math.exp(log_loss + half) for half in (0.0, -0.25, 0.25))),
    }
    if train is not None:
        levels["train_loss"] = Interval(*(math.exp(train + half) for half in (0.0, -0.1, 0.1)))
    return RunForecast(levels, order, INSIDE)


def test_rows_without_a_trial_are_shifted_by_the_mean_shrunk_towards_nothing():
    """Two tried: 1.0 and −0.4 of a logit, 0.3 and 0.1 of a logarithm; two thirds of the means 0.3 and 0.2."""
    by = mean_shift([(said(0.0, -1.0), said(1.0, -0.7)), (said(2.0, -2.0), said(1.6, -1.9))])
    assert by == pytest.approx({"accuracy": 0.2, "eval_loss": 0.4 / 3})
    found = shifted(said(1.0, -1.0), by)
    assert found.levels["accuracy"].value == pytest.approx(logistic(1.2))
    assert found.levels["accuracy"].low == pytest.approx(logistic(0.7))
    assert found.levels["accuracy"].high == pytest.approx(logistic(1.7))
    assert found.levels["eval_loss"].value == pytest.approx(math.exp(-1.0 + 0.4 / 3))
    assert found.order == pytest.approx((logistic(1.2), math.exp(-1.0 + 0.4 / 3)))


def test_each_outcome_counts_the_pairs_that_know_it():
    by = mean_shift([(said(0.0, train=-1.0), said(0.5, train=-2.0)), (said(0.0), said(0.5, train=-9.0))])
    assert by["train_loss"] == pytest.approx(-0.5)  # one pair: a half
    assert by["accuracy"] == pytest.approx(2 / 3 * 0.5)
    assert shifted(said(0.0, train=-1.0), by).levels["train_loss"].value == pytest.approx(math.exp(-1.5))
    assert "train_loss" not in shifted(said(0.0), by).levels


def test_the_order_stands_in_where_levels_are_withheld():
    by = mean_shift([(said(0.0, withheld=True), said(1.0))])
    assert by == pytest.approx({"accuracy": 0.5, "eval_loss": 0.0})
    found = shifted(said(-1.0, withheld=True), by)
    assert found.levels is None
    assert found.order == pytest.approx((logistic(-0.5), math.exp(-1.0)))
    assert found.reach is FAR


def test_nothing_is_known_without_pairs():
    one = said(0.3)
    assert mean_shift([]) == {}
    assert shifted(one, {}) is one
    simulated = RunForecast(None, (0.3, 1.0), FAR, "regression", calibrated=False)
    assert shifted(simulated, {"spearman": 1.0}) is simulated


@given(
    st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=6),
    st.lists(st.floats(-2, 2), min_size=2, max_size=6),
)
def test_the_order_of_what_was_not_tried_stays(pairs, others):
    by = mean_shift([(said(before), said(after)) for before, after in pairs])
    largest = max(abs(after - before) for before, after in pairs)
    assert abs(by["accuracy"]) <= len(pairs) / (len(pairs) + 1) * largest + 1e-9
    rows = [said(logit) for logit in sorted(others)]
    moved = [shifted(row, by).order[0] for row in rows]
    assert all(a <= b + 1e-12 for a, b in pairwise(moved))


def trial(rows, accuracy, train_loss=0.7, *, diverged=False):
    return Shown(rows, 0, 10, {"train_loss": train_loss, "eval_loss": 1.0, "accuracy": accuracy}, accuracy, 1, diverged)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ([], None),
        ([trial(64, 0.68)], 64),  # two points below
        ([trial(64, 0.681)], None),
        ([trial(64, 0.5, 0.69)], None),  # it fits its own rows
        ([trial(64, 0.5, 0.6931)], 64),  # hardly
        ([trial(32, 0.5), trial(128, 0.8, 0.1)], None),  # the largest counts
        ([trial(32, 0.8, 0.1), trial(128, 0.5)], 128),
        ([trial(32, math.nan, math.nan, diverged=True), trial(128, 0.8, 0.1)], 32),
        ([trial(64, math.nan)], 64),
    ],
)
def test_what_has_collapsed(shown, expected):
    for floors in ([0.7, None], [0.6, 0.7], [math.nan, 0.7]):
        assert collapsed_at(shown, METRIC, floors, 0.7) == expected


def test_a_metric_without_anything_to_compare_with():
    assert collapsed_at([trial(64, 0.1)], METRIC, [None, math.nan], 0.7) is None
