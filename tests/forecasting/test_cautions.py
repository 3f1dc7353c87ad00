"""What may go wrong with a run: collapses by the rate, no effect and worse by the forecast."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from foretune.errors import ConfigError
from foretune.forecasting.calibration import Interval, RunForecast
from foretune.forecasting.cautions import TOLD, Moving, cautions
from foretune.forecasting.reach import INSIDE
from foretune.forecasting.risk import RateCase, Risk, fit_risk

RISK = Risk(
    constant=4.0, slope=2.0, of_steps=1.0, slowest=0.001, fastest=0.2, shortest=48.0, fine=0.02, runs=40, collapsed=6
)


def logit(p):
    return math.log(p / (1 - p))


def logistic(x):
    return 1 / (1 + math.exp(-x))


def forecast(value, half):
    middle = logit(value)
    interval = Interval(value, logistic(middle - half), logistic(middle + half))
    return RunForecast({"accuracy": interval}, (value, 1.0), INSIDE)


def by_trouble(found):
    return {caution.trouble: caution for caution in found}


def test_no_effect_and_worse_are_those_of_students_distribution():
    value, half, degrees, baseline = 0.7, 0.4, 5, 0.66
    found = by_trouble(cautions(forecast(value, half), degrees, baseline=baseline, risk=None, run=Moving(None, 64)))
    unit = half / student.ppf(0.95, degrees)
    worse = student.cdf((logit(baseline - 0.02) - logit(value)) / unit, degrees)
    within = student.cdf((logit(baseline + 0.02) - logit(value)) / unit, degrees) - worse
    assert found["worse"].probability == pytest.approx(worse)
    assert found["no effect"].probability == pytest.approx(within)
    assert set(found) == {"worse", "no effect"}


@given(st.floats(0.1, 0.9), st.floats(0.05, 2.0), st.floats(0.1, 0.9))
def test_probabilities_are_some_and_only_likely_ones_are_told(value, half, baseline):
    found = cautions(forecast(value, half), 5, baseline=baseline, risk=RISK, run=Moving(0.01, 64))
    assert sum(caution.probability for caution in found if caution.trouble != "collapse") <= 1.0 + 1e-9
    for caution in found:
        assert 0.0 <= caution.probability <= 1.0
        if caution.trouble != "collapse":
            assert bool(caution.sentence) == (caution.probability >= TOLD)


def test_a_withheld_forecast_leaves_the_collapse_alone():
    nothing = RunForecast(None, (0.5, 1.0), INSIDE)
    (only,) = cautions(nothing, 5, baseline=0.6, risk=RISK, run=Moving(0.1, 64))
    assert only.trouble == "collapse"
    assert only.probability == pytest.approx(logistic(10.0 + 2.0 * math.log2(0.1)))
    assert "runs of 64 steps at a rate like this collapse" in only.sentence
    assert cautions(nothing, 5, baseline=None, risk=None, run=Moving(0.1, 64)) == ()
    assert cautions(nothing, 5, baseline=None, risk=RISK, run=Moving(None, 64)) == ()


def test_rates_far_from_all_that_went_well_are_named():
    def said(rate, risk=RISK):
        (only,) = cautions(RunForecast(None, (0.5, 1.0), INSIDE), 5, baseline=None, risk=risk, run=Moving(rate, 64))
        return only.sentence

    gentle = Risk(-9.0, 0.1, 0.0, 0.001, 0.02, 48.0, 0.02, 40, 1)
    assert "far above what went well" in said(0.081, gentle)
    assert said(0.079, gentle) == ""
    assert "far below" in said(0.00024, gentle)
    assert said(0.00026, gentle) == ""


def test_the_fit_finds_the_rate_at_which_runs_collapse():
    random = np.random.default_rng(0)
    rates = np.exp2(random.uniform(-9, -1, 600))
    chance = 1 / (1 + np.exp(-(12.0 + 3.0 * np.log2(rates))))
    cases = [
        RateCase(float(rate), 100.0, bool(random.random() < p), f"data{index % 6}")
        for index, (rate, p) in enumerate(zip(rates, chance, strict=True))
    ]
    found = fit_risk(cases)
    middle = -(found.constant + found.of_steps * math.log2(100)) / found.slope
    assert middle == pytest.approx(-4.0, abs=0.4)
    assert found.probability(0.5, 100) > 0.9 > 0.1 > found.probability(0.01, 100)
    assert (found.runs, found.collapsed) == (600, sum(case.collapsed for case in cases))
    assert found.probability(1e-9, 100) == found.probability(found.slowest, 1)
    short = [RateCase(0.5, 39.0, False, "data0")] * 100  # learnt nothing, and could not collapse
    assert fit_risk([*cases, *short]) == found


def test_the_fit_finds_that_longer_runs_collapse_at_smaller_rates():
    random = np.random.default_rng(1)
    rates, steps = np.exp2(random.uniform(-9, -1, 800)), np.exp2(random.uniform(5.5, 10, 800))
    chance = 1 / (1 + np.exp(-(3.0 * np.log2(rates) + 2.0 * np.log2(steps))))
    cases = [
        RateCase(float(rate), float(number), bool(random.random() < p), f"data{index % 6}")
        for index, (rate, number, p) in enumerate(zip(rates, steps, chance, strict=True))
    ]
    found = fit_risk(cases)
    assert found.of_steps / found.slope == pytest.approx(2 / 3, rel=0.15)
    assert found.probability(0.02, 800) > 0.8 > 0.2 > found.probability(0.02, 100)
    assert found.likely(0.02, 800)
    assert not found.likely(0.02, 100)
    assert not found.likely(None, 800)
    shorter = [RateCase(case.update_rate, 1e5 / case.steps, case.collapsed, case.group) for case in cases]
    assert fit_risk(shorter).of_steps == 0.0  # nobody believes that a longer run is safer


def test_no_risk_without_collapses_or_where_faster_runs_fare_better():
    rates = [0.001, 0.01, 0.1] * 4
    groups = [f"data{index % 3}" for index in range(12)]
    steps = [100.0] * 12
    for collapsed in ([False] * 12, [True] * 12, [rate < 0.005 for rate in rates]):
        cases = [RateCase(*case) for case in zip(rates, steps, collapsed, groups, strict=True)]
        assert fit_risk(cases) is None


@pytest.mark.parametrize(
    "change",
    [{"slope": -1.0}, {"of_steps": -1.0}, {"constant": math.nan}, {"fine": 1.0}, {"slowest": 0.0}, {"shortest": 0.0}],
)
def test_broken_risks_are_refused(change):
    RISK.check()
    with pytest.raises(ConfigError, match="fit it again"):
        Risk(**{**vars(RISK), **change}).check()
