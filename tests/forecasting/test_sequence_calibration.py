import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from foretune.errors import ConfigError
from foretune.forecasting.reach import Run
from foretune.forecasting.sequence_calibration import (
    SequenceCase,
    SequenceLine,
    apply_sequence_calibration,
    grown,
    language_calibration_from,
    largest_trial,
    shipped_language_calibration,
    slope,
    trial_value,
)
from foretune.forecasting.sequence_fit import FinishedSequence, fit_sequences
from foretune.forecasting.shown import Shown

RUN = Run(
    model="4be92a9aa8e36",
    hidden_head=False,
    classes=1,
    known_rows=64,
    train_rows=64,
    eval_rows=32,
    longest=32,
    epochs=3,
    steps=24,
    batch_size=8,
    learning_rate=1.5e-4,
    update_rate=2.4e-3,
    kind="causal-lm",
)
LINE = SequenceLine(hold=1.5, growth=0.3, trust=0.8, spread=0.01, apart=0.3, beyond=0.1, groups=6, runs=90)
nats = st.floats(0.01, 12.0)
rows = st.sampled_from([8, 16, 64, 100, 256, 4096])


@st.composite
def cases(draw, trial=False):
    told = (draw(rows), draw(nats)) if trial else None
    return SequenceCase(draw(nats), draw(nats), draw(nats), draw(st.floats(-20.0, 12.0)), draw(rows), draw(rows), told)


def made(seed, groups=6, each=40, *, line=LINE, trial=False):
    """Runs that are as the line says, drawn."""
    random, finished = np.random.default_rng(seed), []
    for group in range(groups):
        for _ in range(each):
            base = float(random.uniform(3.0, 9.0))
            third, end = base - random.uniform(0.1, 1.0, 2)
            apart = float(random.choice([0.001, 0.5]))
            case = SequenceCase(base, third, end, end + apart, 64, int(random.choice([64, 256, 1024])))
            run = dataclasses.replace(RUN, train_rows=case.train_rows)
            value, doublings = line.value(case), case.doublings
            seen = value
            if trial:
                m = int(random.choice([64, 128]))
                case = dataclasses.replace(case, trial=(m, value + float(random.normal(0.0, 0.3))))
                value, doublings, seen = trial_value(line, case, value)
            loss = value + float(random.normal(0.0, line.deviation(case, doublings, seen)))
            finished.append(FinishedSequence(case, run, loss, f"set {group}"))
    return finished


def logit(share):
    return math.log(share / (1.0 - share))


@given(cases())
def test_without_trials_it_is_the_end_or_what_the_first_third_holds_out_whichever_is_lower(case):
    gain = max(case.base - case.end, 1.5 * max(0.0, case.base - case.third))
    assert LINE.gain(case) == gain
    alike = dataclasses.replace(case, train_rows=case.known_rows)
    if gain <= 0.99 * case.base:
        assert LINE.value(alike) == pytest.approx(case.base - gain)
    value, steps = LINE.value(case), max(0.0, math.log2(case.train_rows / case.known_rows))
    assert value <= LINE.value(alike) + 1e-12
    if 0.0 < gain < 0.9 * case.base:
        assert value > 0.0
        assert logit((case.base - value) / case.base) == pytest.approx(logit(gain / case.base) + 0.3 * steps)
    if gain <= 0.0:
        assert value == case.base - gain


@given(cases(trial=True))
def test_a_trial_draws_the_forecast_towards_what_it_showed(case):
    plain = LINE.value(case)
    value, doublings, level = trial_value(LINE, case, plain)
    m, ended = case.trial
    assert doublings == max(0.0, math.log2(case.train_rows / m))
    assert level == pytest.approx(case.base - grown(case.base, case.base - ended, 0.3 * doublings))
    assert min(plain, level) - 1e-9 <= value <= max(plain, level) + 1e-9
    share = min(1.0, 2.0 * math.sqrt(min(1.0, m / case.train_rows)))
    assert value == pytest.approx(plain + 0.8 * share * (level - plain))


@given(nats, st.floats(0.0, 1.0), st.floats(0.0, 5.0))
def test_a_gain_rises_with_its_odds_as_the_slope_says(base, share, odds):
    gain = share * base
    assert gain - 1e-9 * base <= grown(base, gain, odds) <= base or share > 0.99
    step = 1e-5
    if 0.01 < share < 0.98:
        rise = (grown(base, gain, odds + step) - grown(base, gain, odds - step)) / (2 * step)
        assert slope(base, grown(base, gain, odds)) == pytest.approx(rise, rel=1e-4, abs=1e-8)


@given(cases(), st.floats(0.0, 6.0), st.floats(0.0, 6.0))
def test_the_error_grows_with_the_distance_and_with_what_was_left(case, one, other):
    near, far = sorted((one, other))
    loss = 0.7 * case.base
    assert LINE.spread <= LINE.deviation(case, near, loss) <= LINE.deviation(case, far, loss) + 1e-12
    expected = 0.01**2 + (0.3 * case.apart) ** 2 + (0.1 * far * 0.3 * case.base * 0.7) ** 2
    assert LINE.deviation(case, far, loss) == pytest.approx(math.sqrt(expected))


def test_a_fit_finds_the_coefficients_again():
    believed = dataclasses.replace(LINE, trust=1.0)
    calibration = fit_sequences(made(0) + made(1, line=believed, trial=True), "made")
    plain, tried = calibration.plain, calibration.tried
    assert plain.hold == pytest.approx(1.5, abs=0.1)
    assert plain.growth == pytest.approx(0.3, abs=0.05)
    assert plain.spread == pytest.approx(0.01, rel=0.5)
    assert plain.apart == pytest.approx(0.3, rel=0.3)
    assert plain.beyond == pytest.approx(0.1, rel=0.4)
    assert (tried.hold, tried.growth, tried.trust) == (plain.hold, plain.growth, 1.0)
    assert tried.spread >= plain.spread
    assert tried.beyond == pytest.approx(0.1, rel=0.5)
    assert (plain.groups, plain.runs, tried.runs) == (6, 240, 240)
    assert calibration.domain.rows_ratio == (1.0, 16.0)
    assert calibration.trial_domain.known_rows == (64.0, 128.0)


def test_intervals_hold_what_they_promise_on_other_data_sets():
    calibration = fit_sequences(made(0), "made")
    held = []
    for one in made(7):
        level = apply_sequence_calibration(calibration, one.case, one.run).levels["eval_loss"]
        held.append(level.low <= one.loss <= level.high)
    assert 0.88 <= np.mean(held) <= 0.98  # Student's with 5 degrees of freedom is wider than needed here


def test_an_interval_is_that_of_the_formula_and_perplexity_its_exponential():
    calibration = fit_sequences(made(0), "made")
    case = SequenceCase(5.0, 4.5, 4.2, 4.3, 64, 256)
    forecast = apply_sequence_calibration(calibration, case, dataclasses.replace(RUN, train_rows=256))
    level, line = forecast.levels["eval_loss"], calibration.plain
    half = student.ppf(0.95, 5) * line.deviation(case, 2.0, line.value(case))
    assert level.value == pytest.approx(line.value(case))
    assert (level.low, level.high) == (pytest.approx(level.value - half), pytest.approx(level.value + half))
    said = forecast.levels["perplexity"]
    assert (said.value, said.low, said.high) == pytest.approx(tuple(map(math.exp, dataclasses.astuple(level))))
    assert forecast.order == (said.value, level.value)
    assert forecast.kind == "causal-lm"
    assert forecast.calibrated


def test_outside_of_what_was_seen_intervals_widen_and_then_there_are_none():
    calibration = fit_sequences(made(0), "made")
    case = SequenceCase(5.0, 4.6, 4.2, 4.2, 64, 64)

    def width(**changes):
        levels = apply_sequence_calibration(calibration, case, dataclasses.replace(RUN, **changes)).levels
        return None if levels is None else levels["eval_loss"].high - levels["eval_loss"].low

    assert width(longest=48) == pytest.approx(width() * 48 / 32)
    assert width(longest=65) is None
    assert width(learning_rate=1e-3, update_rate=1.6e-2) is None
    few = dataclasses.replace(RUN, batch_size=10, train_rows=80)  # 21 steps on the known rows, where 24 were seen
    said = apply_sequence_calibration(calibration, case, few)
    assert any("21 steps on the 64 known rows, checked from 24" in reason for reason in said.reach.reasons)
    assert said.reach.doublings == pytest.approx(math.log2(10 / 8) + math.log2(24 / 21))
    assert apply_sequence_calibration(calibration, case, dataclasses.replace(few, batch_size=16)).levels is None
    other = apply_sequence_calibration(calibration, case, dataclasses.replace(RUN, model="0" * 13))
    assert other.levels is None
    assert not other.calibrated
    value = calibration.plain.value(case)
    assert other.order == (pytest.approx(math.exp(value)), value)
    assert "no run of this model" in other.reach.verdict


def test_a_trial_that_lies_farther_away_changes_nothing():
    calibration = fit_sequences(made(0) + made(1, trial=True), "made")
    case = SequenceCase(5.0, 4.6, 4.2, 4.2, 64, 64, trial=(4, 2.0))
    without = dataclasses.replace(case, trial=None)
    said = apply_sequence_calibration(calibration, case, RUN)
    assert said.levels == apply_sequence_calibration(calibration, without, RUN).levels
    assert "The trial on 4 rows changes no forecast" in said.note


def shown(rows, loss, *, diverged=False):
    return Shown(rows, 0, 32, {"eval_loss": loss, "perplexity": math.exp(loss)}, math.exp(loss), 3, diverged)


def test_the_largest_trial_counts_and_none_that_diverged():
    assert largest_trial([]) is None
    assert largest_trial([shown(8, 4.0), shown(32, 3.0), shown(32, 3.5)]) == (32, 3.25)
    assert largest_trial([shown(8, 4.0), shown(32, math.nan)]) is None
    assert largest_trial([shown(8, 4.0), shown(32, 3.0, diverged=True)]) is None


def test_a_simulated_run_that_diverges_has_no_level():
    calibration = fit_sequences(made(0), "made")
    case = SequenceCase(5.0, 4.2, math.nan, 4.2, 64, 64)
    said = apply_sequence_calibration(calibration, case, RUN)
    assert said.levels is None
    assert said.order == (math.inf, math.inf)


def test_too_few_data_sets_make_no_calibration():
    with pytest.raises(ConfigError, match="3 data sets"):
        fit_sequences(made(0, groups=2), "made")


def test_it_is_written_and_read_again():
    calibration = fit_sequences(made(0, each=10) + made(1, each=10, trial=True), "made")
    assert language_calibration_from(json.loads(json.dumps(calibration.to_dict()))) == calibration


@pytest.mark.parametrize("broken", [None, {}, {"schema": 9}, {"schema": 1}, {"schema": 1, "plain": 3}])
def test_what_is_none_is_refused(broken):
    with pytest.raises(ConfigError, match="no calibration of language models"):
        language_calibration_from(broken)


def test_the_one_that_ships_knows_smollm2():
    calibration = shipped_language_calibration()
    assert calibration.domain.kind == "causal-lm"
    assert calibration.domain.models == (RUN.model,)
    assert calibration.plain.groups >= 3
