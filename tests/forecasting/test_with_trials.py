"""What trials add, against numbers worked by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.forecasting.outcomes import OUTCOMES
from foretune.forecasting.shown import Shown
from foretune.forecasting.with_trials import Trials, together, trial_terms
from foretune.tasks.metrics import main_metric

import domains

LEVEL = st.floats(-4.6, 4.6)


def logit(p):
    return math.log(p / (1 - p))


def test_terms_are_those_of_the_docstring():
    """A trial on a quarter of the rows, h = 1/2, and one on a quarter of its rows: two doublings lower."""
    trials = Trials(100, {"eval_loss": 0.4}, 25, {"eval_loss": 1.0})
    p, x = trial_terms("eval_loss", trials, 0.7, 400, "classification")
    assert p == 0.7
    assert x == pytest.approx([0.4 - 0.7, 0.5 * (0.4 - 1.0)])
    farther = Trials(100, {"eval_loss": 0.4}, 12, {"eval_loss": 1.0})
    _, x = trial_terms("eval_loss", farther, 0.7, 10_000, "classification")
    assert x == pytest.approx([0.2 * -0.3, 0.1 * -0.6 * 2 / math.log2(100 / 12)])
    gained = Trials(100, {"accuracy": 1.0}, 25, {"accuracy": 0.2})
    _, x = trial_terms("accuracy", gained, 0.7, 400, "classification")
    assert x == pytest.approx([0.3, 0.5 * 0.8])


@pytest.mark.parametrize(("outcome", "worse"), [("train_loss", 1), ("eval_loss", 1), ("accuracy", -1)])
def test_a_trial_that_is_no_better_than_the_forecast_and_alone_is_no_term(outcome, worse):
    for lost in (0.0, 0.3, 5.0):
        p, x = trial_terms(outcome, Trials(100, {outcome: 0.7 + worse * lost}, None, {}), 0.7, 400, "classification")
        assert (p, list(x)) == (0.7, [0.0, 0.0])
    _, x = trial_terms(outcome, Trials(100, {outcome: 0.7 - worse * 0.3}, None, {}), 0.7, 400, "classification")
    assert x == pytest.approx([-worse * 0.3, 0.0])


@pytest.mark.parametrize("kind", ["regression", "multi-label"])
def test_what_is_better_hangs_on_the_metric_of_the_kind(kind):
    metric = main_metric(kind)
    for gain, expected in ((metric.better * 0.4, metric.better * 0.4), (-metric.better * 0.4, 0.0)):
        _, x = trial_terms(metric.name, Trials(100, {metric.name: 0.1 + gain}, None, {}), 0.1, 400, kind)
        assert x == pytest.approx([expected, 0.0])


@given(
    st.sampled_from(OUTCOMES), LEVEL, LEVEL, LEVEL, st.integers(4, 10**7), st.integers(1, 10**7), st.integers(4, 1000)
)
def test_terms_are_bounded_and_vanish_as_the_run_outgrows_the_trial(outcome, at, below, plain, rows, more, ratio):
    trials = Trials(rows, {outcome: at}, max(1, rows // ratio), {outcome: below})
    p, x = trial_terms(outcome, trials, plain, rows + more, "classification")
    assert p == plain
    h = math.sqrt(rows / (rows + more))
    weights = np.array([min(1.0, 2.0 * h), h])
    assert all(abs(x) <= weights * np.array([abs(at - plain), abs(at - below)]) + 1e-12)
    direction = 1 if outcome == "accuracy" else -1
    assert direction * x[0] >= 0.0  # it only ever says that more is to be had
    assert direction * (plain + x[0]) <= max(direction * plain, direction * at) + 1e-12  # and no more than it showed
    for train_rows in (rows, max(1, rows // 2)):  # a trial on more rows than the run has counts as one on as many
        full = trial_terms(outcome, trials, plain, train_rows, "classification")[1]
        assert weights * full == pytest.approx(x)


@given(LEVEL, LEVEL, LEVEL)
def test_a_better_trial_never_says_less(at, more, plain):
    worse, better = sorted((at, more))
    first, second = (
        trial_terms("accuracy", Trials(100, {"accuracy": one}, None, {}), plain, 400, "classification")[1][0]
        for one in (worse, better)
    )
    assert first <= second


def test_seeds_are_averaged_on_the_scale_of_the_calibration():
    found = together([domains.shown(100, 0.8), domains.shown(100, 0.9, seed=1)], "classification")
    assert (found.rows, found.smaller, found.below) == (100, None, {})
    assert found.at["accuracy"] == pytest.approx((logit(0.8) + logit(0.9)) / 2)
    assert found.at["eval_loss"] == pytest.approx((math.log(0.2) + math.log(0.1)) / 2)


def test_the_largest_counts_and_the_largest_of_a_quarter_at_most():
    sizes = [domains.shown(rows, rows / 1000) for rows in (10, 99, 100, 101, 400, 399, 25)]
    found = together(sizes, "classification")
    assert (found.rows, found.smaller) == (400, 100)
    assert found.at["accuracy"] == pytest.approx(logit(0.4))
    assert found.below["accuracy"] == pytest.approx(logit(0.1))
    assert together(list(reversed(sizes)), "classification") == found
    assert together(sizes[2:4], "classification").smaller is None  # too alike for a slope


def test_no_trial_and_a_diverged_one_are_no_level():
    assert together([], "classification") is None
    bad = domains.shown(400, 0.5, diverged=True)
    assert together([domains.shown(100, 0.8), bad], "classification") is None
    assert together([domains.shown(400, 0.8), bad], "classification") is None  # one of two seeds
    no_number = Shown(400, 0, 300, {"train_loss": math.nan, "eval_loss": 0.1, "accuracy": 0.9}, 0.9, 5, False)
    assert together([no_number], "classification") is None
    smaller = together([domains.shown(400, 0.8), domains.shown(100, 0.5, diverged=True)], "classification")
    assert (smaller.rows, smaller.smaller, smaller.below) == (400, None, {})
