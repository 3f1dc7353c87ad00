"""The end of a run from its first steps, against scipy's fit of the same curve."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares

from foretune.evaluation.early_stop import RunLog, extrapolate
from foretune.evaluation.predictors import PREDICTORS
from foretune.report.curves import Step


def slow_extrapolation(steps, values, at):
    """All three numbers by descent, from several starts."""
    ends = [
        least_squares(
            lambda p: p[0] + p[1] * steps ** -p[2] - values,
            [values[-1], values[0] - values[-1], power],
            bounds=([-np.inf, -np.inf, 0.1], [np.inf, np.inf, 2.0]),
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
            max_nfev=3000,
        )
        for power in (0.15, 0.5, 1.0, 1.9)
    ]
    a, b, c = min(ends, key=lambda end: end.cost).x
    return a + b * at**-c


@pytest.mark.parametrize(("a", "b", "c"), [(0.2, 1.0, 0.5), (0.9, -0.4, 1.3), (0.0, 2.0, 0.1), (0.3, 1.0, 2.0)])
def test_a_power_law_is_continued(a, b, c):
    steps = np.arange(1, 11)
    assert extrapolate(steps, a + b * steps**-c, 200) == pytest.approx(a + b * 200.0**-c, abs=1e-4)
    assert extrapolate(7 * steps, a + b * steps**-c, 1400) == pytest.approx(a + b * 200.0**-c, abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_noisy_values_are_fitted_by_least_squares(seed):
    steps = np.arange(5.0, 105.0, 5.0)
    values = 0.3 + steps**-0.6 + 0.03 * np.random.default_rng(seed).standard_normal(20)
    assert extrapolate(steps, values, 500.0) == pytest.approx(slow_extrapolation(steps, values, 500.0), abs=1e-4)


@given(
    points=st.lists(
        st.tuples(st.integers(0, 20), st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf])), max_size=12
    ),
    at=st.integers(1, 1000),
)
@settings(max_examples=60)
def test_nothing_observed_is_too_odd_to_extrapolate(points, at):
    found = extrapolate([step for step, _ in points], [value for _, value in points], at)
    finite = sorted(((s, v) for s, v in points if math.isfinite(v)), key=lambda point: point[0])
    assert isinstance(found, float)
    if not finite:
        assert math.isnan(found)
    elif len({step for step, _ in finite if step > 0}) < 3:
        assert found == finite[-1][1]
    else:
        assert math.isfinite(found)


def test_three_points_are_fitted_and_two_are_not():
    steps = np.array([1.0, 2.0, 4.0])
    assert extrapolate(steps, 0.2 + steps**-1.0, 100) == pytest.approx(0.21, abs=1e-4)
    assert extrapolate(steps[:2], 0.2 + steps[:2] ** -1.0, 100) == 0.7


def test_flat_values_stay():
    assert extrapolate([1, 2, 3, 4], [0.7, 0.7, 0.7, 0.7], 100) == 0.7


def from_log(log):
    return {predictor.name: predictor.from_log(log) for predictor in PREDICTORS if predictor.from_log}


def test_the_first_steps_foretell():
    steps = [Step(i, 0.3 + 2.0 / i, math.nan, None, math.nan) for i in range(1, 101)]
    epochs = [(0, 0.7, 0.5), (10, 0.6, 0.6), (20, 0.55, 0.65), (30, 0.1, 0.9), (100, 0.2, 0.9)]
    forecasts = from_log(RunLog(steps, epochs, 100))
    assert forecasts["early_20_train_loss"] == pytest.approx(0.32, abs=0.01)
    assert forecasts["early_5_train_loss"] == pytest.approx(0.32, abs=0.05)
    assert (forecasts["early_20_eval_loss"], forecasts["early_20_accuracy"]) == (0.55, 0.65)
    late = from_log(RunLog(steps, [(0, 0.7, 0.5), (50, 0.1, 0.9)], 100))
    assert late["early_20_eval_loss"] is late["early_20_accuracy"] is None
    nothing = from_log(RunLog([], [], 100))
    assert set(nothing.values()) == {None}
