"""What trials add, against numbers worked by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.forecasting.shown import Shown
from foretune.forecasting.with_trials import Trials, lacking, together, trial_terms

import domains

LEVEL = st.floats(-4.6, 4.6)


def logit(p):
    return math.log(p / (1 - p))


def test_terms_are_those_of_the_docstring():
    """A trial on a quarter of the rows, g = 1/2, and one on a sixteenth of its rows: two of four doublings."""
    trials = Trials(100, {"eval_loss": 1.0}, 25, {"eval_loss": 1.6})
    t, x = trial_terms("eval_loss", trials, 0.4, 400)
    assert t == 1.0
    assert x == pytest.approx([0.5, 0.5 * (0.4 - 1.0), 0.5 * (1.0 - 1.6)])
    farther = Trials(100, {"eval_loss": 1.0}, 12, {"eval_loss": 1.6})
    _, x = trial_terms("eval_loss", farther, 0.4, 10_000)
    assert x == pytest.approx([0.9, 0.9 * -0.6, 0.9 * -0.6 * 2 / math.log2(100 / 12)])


def test_a_forecast_that_is_worth_nothing_and_a_trial_alone_are_no_terms():
    t, x = trial_terms("accuracy", Trials(100, {"accuracy": 0.7}, None, {}), None, 400)
    assert (t, list(x)) == (0.7, [0.5, 0.0, 0.0])


@given(LEVEL, LEVEL, LEVEL, st.integers(4, 10**7), st.integers(1, 10**7), st.integers(4, 1000))
def test_terms_are_bounded_and_vanish_as_the_trial_grows(at, below, plain, rows, more, ratio):
    trials = Trials(rows, {"eval_loss": at}, max(1, rows // ratio), {"eval_loss": below})
    t, x = trial_terms("eval_loss", trials, plain, rows + more)
    assert t == at
    assert 0.0 <= lacking(rows, rows + more) < 1.0
    assert all(abs(x) <= [1.0, abs(plain - at), abs(at - below)])
    assert all(abs(x) <= more / rows * max(1.0, abs(plain - at), abs(at - below)))  # g ≤ (N − n') / n'
    for train_rows in (rows, max(1, rows // 2)):  # the trial has all rows: it is the run
        assert not trial_terms("eval_loss", trials, plain, train_rows)[1].any()


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**6))
def test_less_is_lacking_after_a_larger_trial(small, more, rows):
    assert lacking(small + more, rows) <= lacking(small, rows)


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
