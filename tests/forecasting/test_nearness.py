"""A user's finished runs beside those that come with foretune."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from foretune.errors import ConfigError
from foretune.forecasting.calibration import apply_calibration
from foretune.forecasting.calibration_file import calibration_from, shipped_calibration
from foretune.forecasting.calibration_fit import Case, fit_calibration
from foretune.forecasting.finished_runs import FinishedRun, in_lines, runs_from, shipped_runs
from foretune.forecasting.line import Line, half_width
from foretune.forecasting.nearness import LEAST, distance, fit_together, weight
from foretune.forecasting.reach import Run
from foretune.forecasting.risk import RateCase, fit_risk

import domains

OUTPUTS = ("margin", "full")
RUN = Run("00000000000aa", False, 2, 400, 400, 300, 50, 5, 100, 32, 1e-3, 8e-3)
RUNS = st.builds(
    Run,
    model=st.sampled_from(["00000000000aa", "00000000000bb"]),
    hidden_head=st.booleans(),
    classes=st.integers(2, 50),
    known_rows=st.integers(4, 5000),
    train_rows=st.integers(4, 10**6),
    eval_rows=st.integers(1, 5000),
    longest=st.integers(1, 512),
    epochs=st.integers(1, 10),
    steps=st.integers(1, 10**5),
    batch_size=st.integers(1, 64),
    learning_rate=st.floats(1e-6, 1.0),
    update_rate=st.none() | st.floats(1e-6, 10.0),
)


@given(RUNS, RUNS, RUNS)
def test_a_distance_is_one(first, second, third):
    assert distance(first, first) == 0.0
    assert distance(first, second) == pytest.approx(distance(second, first))
    assert distance(first, third) <= distance(first, second) + distance(second, third) + 1e-9
    assert LEAST <= weight(first, [second, third]) <= 1.0
    assert weight(first, [second, first]) == 1.0
    assert weight(first, [second, third]) >= weight(first, [second])


def test_distances_by_hand():
    def far(**changes):
        return distance(RUN, dataclasses.replace(RUN, **changes))

    assert far(train_rows=1600) == far(steps=25) == far(update_rate=32e-3) == far(classes=8) == far(longest=200) == 2.0
    assert far(known_rows=100, train_rows=100) == 2.0
    assert far(known_rows=100) == 4.0  # and four times as many rows for each known one
    assert far(model="00000000000bb") == far(hidden_head=True) == 1.0
    assert far(eval_rows=9, epochs=50, batch_size=1, learning_rate=1.0) == 0.0
    assert far(update_rate=None) == 3.0  # then the head's rate stands for it
    assert weight(RUN, [dataclasses.replace(RUN, steps=25)]) == 0.25
    assert weight(RUN, [dataclasses.replace(RUN, steps=10**6)]) == 1 / 16


def case(group, number, error, *, run=RUN, spread=0.05):
    """A run that misses its simulation by an error on the scale, this way and that around it."""
    wrong = error + spread * (1 if number % 2 else -1)
    p = 0.7 + 0.01 * number
    values = {"simulated_train_loss": 0.1, "simulated_eval_loss": 0.4, "simulated_accuracy": p}
    values = domains.best_at_end(values) | {"probe_loss": 0.6, "probe_accuracy": 0.6, "movement": 0.5, "doublings": 0.0}
    real = {"train_loss": 0.1 * math.exp(wrong), "eval_loss": 0.4 * math.exp(wrong)}
    real["accuracy"] = 1 / (1 + math.exp(-(math.log(p / (1 - p)) + wrong)))
    return Case(values, real, group, run)


def runs(groups, error, *, run=RUN, keys="", spread=0.05):
    return [
        FinishedRun(
            f"{keys}{group}{number}",
            case(group, number, error, run=run, spread=spread),
            RateCase(run.update_rate * 4**number, 100.0, number > 4, group),
        )
        for group in groups
        for number in range(6)
    ]  # fmt: skip


OTHER = dataclasses.replace(RUN, model="00000000000bb")


def test_weights_of_one_change_no_fit():
    cases = [run.case for run in runs("abcd", 0.2)]
    plain = fit_calibration(cases, OUTPUTS, "x")
    assert plain.lines["accuracy"].effective is None
    heavy = [dataclasses.replace(one, weight=0.25) for one in cases]
    again = fit_calibration(heavy, OUTPUTS, "x")
    assert again.lines["accuracy"].coefficients == pytest.approx(plain.lines["accuracy"].coefficients)
    assert again.lines["accuracy"].spread == pytest.approx(plain.lines["accuracy"].spread)
    apart = fit_calibration(cases[:12], OUTPUTS, "x", shipped=cases[12:])
    assert apart.lines == plain.lines
    assert (plain.further, apart.further) == (None, plain.domain)


def test_a_data_set_that_weighs_next_to_nothing_is_as_good_as_left_out():
    near, far = [run.case for run in runs("abcd", 0.2)], [run.case for run in runs("ef", 3.0)]
    light = [dataclasses.replace(one, weight=1e-9) for one in far]
    alone, both = fit_calibration(near, OUTPUTS, "x"), fit_calibration([*near, *light], OUTPUTS, "x")
    for name, line in alone.lines.items():
        assert both.lines[name].coefficients == pytest.approx(line.coefficients, abs=1e-6)
        assert both.lines[name].spread == pytest.approx(line.spread, rel=1e-6)
        assert both.lines[name].effective == pytest.approx(4.0)
        assert both.lines[name].degrees == pytest.approx(line.degrees)


def test_a_user_with_one_data_set_gets_a_calibration_for_the_own_model():
    own, shipped = runs("a", 0.3, run=OTHER, keys="own-"), runs("abcd", 0.2)
    calibration = fit_together(own, shipped, OUTPUTS, "mine")
    assert calibration.groups == ("a", "foretune's a", "foretune's b", "foretune's c", "foretune's d")
    assert calibration.lines["accuracy"].runs == 30
    assert calibration.lines["accuracy"].effective == pytest.approx((1 + 4 / 2) ** 2 / (1 + 4 / 4))
    assert calibration.domain.models == (OTHER.model,)
    assert calibration.further.models == (RUN.model,)
    again = calibration_from(json.loads(json.dumps(calibration.to_dict())))
    assert again == calibration
    values = own[0].case.simulated
    for run in (RUN, OTHER):  # both are inside
        assert apply_calibration(again, values, "margin", run=run).reach.reasons == ()
    between = dataclasses.replace(OTHER, steps=1000)  # ten times as many as either
    assert apply_calibration(again, values, "margin", run=between).levels is None
    assert fit_together(own, [], OUTPUTS, "mine") is None
    assert fit_together([], shipped, OUTPUTS, "mine") is None


def test_what_was_seen_of_one_model_is_no_promise_for_the_other():
    fast = dataclasses.replace(RUN, update_rate=0.1, learning_rate=0.0125)
    calibration = fit_together(runs("a", 0.3, run=OTHER, keys="own-"), runs("abcd", 0.2, run=fast), OUTPUTS, "mine")
    values = case("a", 0, 0.0).simulated
    assert apply_calibration(calibration, values, "margin", run=fast).levels is not None
    unseen = dataclasses.replace(fast, model=OTHER.model)
    assert apply_calibration(calibration, values, "margin", run=unseen).levels is None


def test_runs_that_the_user_has_as_well_count_once_and_as_the_users():
    shipped = runs("abcd", 0.2)
    calibration = fit_together(shipped[:6], shipped, OUTPUTS, "mine")
    assert calibration.lines["accuracy"].runs == 24
    assert calibration.groups == ("a", "foretune's b", "foretune's c", "foretune's d")


def test_the_own_domain_ends_where_the_own_intervals_fail():
    more = dataclasses.replace(OTHER, train_rows=1600)

    def far(error):
        wrong = runs("a", error, run=more, keys="far-")
        return fit_together([*runs("a", 0.2, run=OTHER, keys="own-"), *wrong], runs("abcd", 0.2), OUTPUTS, "x")

    assert far(0.2).domain.rows_ratio == (1.0, 4.0)
    wide = far(5.0)  # all the runs that there are of that size: the spread grows to hold them, or they do not count
    assert wide.domain.rows_ratio == (1.0, 1.0) or half_width(wide.lines["accuracy"], doublings=2.0) > 4.0
    assert wide.further.rows_ratio == (1.0, 1.0)


def test_many_easy_runs_of_ones_own_make_no_interval_of_the_others_too_narrow():
    hard = runs("abcd", 0.0, spread=0.4)
    shipped = fit_calibration([run.case for run in hard], OUTPUTS, "x").lines["accuracy"]
    own = [one for name in "efgh" for one in runs(name, 0.0, run=OTHER, keys="own-", spread=0.01)]
    both = fit_together(own, hard, OUTPUTS, "mine").lines["accuracy"]
    assert both.spread >= 0.95 * shipped.spread  # whatever the easy ones weigh


def test_a_side_whose_intervals_fail_as_a_whole_has_shown_nothing():
    """Own runs off by ±3, by turns, and the others by next to nothing: no interval is a promise for both."""
    own = [one for name in "efgh" for one in runs(name, 0.0, run=OTHER, keys="own-", spread=0.01)]
    strange = [
        dataclasses.replace(run, case=dataclasses.replace(run.case, weight=1.0)) for run in runs("a", 6.0, keys="far-")
    ]
    calibration = fit_together(own, strange, OUTPUTS, "mine")
    assert calibration.domain.models == (OTHER.model,)
    values = own[0].case.simulated
    if calibration.further is None:
        assert apply_calibration(calibration, values, "margin", run=RUN).levels is None
    else:  # then the intervals hold it
        line = calibration.lines["accuracy"]
        assert half_width(line) >= 3.0


def test_a_data_set_counts_what_its_heaviest_run_does():
    cases = [run.case for run in runs("abcd", 0.2)]
    mixed = [dataclasses.replace(one, weight=1.0 if place % 2 else 0.25) for place, one in enumerate(cases)]
    assert fit_calibration(mixed, OUTPUTS, "x").lines["accuracy"].effective is None
    light = [dataclasses.replace(one, weight=0.25) if one.group == "a" else one for one in mixed]
    found = fit_calibration(light, OUTPUTS, "x").lines["accuracy"].effective
    assert found == pytest.approx((3 + 0.25) ** 2 / (3 + 0.25**2))


def tried(found):
    return [
        dataclasses.replace(run, case=dataclasses.replace(run.case, trials=((domains.shown(100, 0.7),),)))
        for run in found
    ]


def test_what_trials_have_shown_is_kept_apart_as_well():
    own, shipped = runs("a", 0.3, run=OTHER, keys="own-"), tried(runs("abcd", 0.2))
    bare = fit_together(own, shipped, OUTPUTS, "mine")
    assert bare.trial_domain.models == (RUN.model,)  # the own runs had none
    assert bare.further_trials is None
    both = fit_together(tried(own), shipped, OUTPUTS, "mine")
    assert both.trial_domain.models == (OTHER.model,)
    assert both.further_trials.models == (RUN.model,)
    values, shown = own[0].case.simulated, (domains.shown(100, 0.95),)
    for run in (RUN, OTHER):
        said = apply_calibration(both, values, "margin", run=run, shown=shown)
        assert (said.note, said.reach.reasons) == ("", ())
        plain = apply_calibration(both, values, "margin", run=run)
        assert said.levels["accuracy"] != plain.levels["accuracy"]  # the interval is that of the lines with trials


def test_another_kind_of_task_is_left_alone():
    numbers = dataclasses.replace(RUN, kind="regression")
    own = [
        dataclasses.replace(run, case=dataclasses.replace(run.case, run=numbers)) for run in runs("a", 0.3, keys="own-")
    ]
    assert fit_together(own, runs("abcd", 0.2), OUTPUTS, "mine") is None


def test_intervals_have_the_degrees_of_the_data_sets_that_count():
    line = Line((0.0, 0.0), (0.0, 0.0), 1.0, 0.1, 0.1, 9, 90)
    assert line.degrees == 8.0
    assert dataclasses.replace(line, effective=3.5).degrees == 2.5
    assert dataclasses.replace(line, effective=1.5).degrees == 2.0  # and no fewer
    assert half_width(dataclasses.replace(line, effective=3.5)) == pytest.approx(0.1 * student.ppf(0.95, 2.5))


def test_finished_runs_are_written_and_read():
    found = [*runs("ab", 0.2), FinishedRun("bare", None, None)]
    shown = ((domains.shown(100, 0.7),),)
    found[0] = dataclasses.replace(found[0], case=dataclasses.replace(found[0].case, trials=shown))
    again = runs_from(json.loads(in_lines(found)))
    assert [run.key for run in again] == [run.key for run in found]
    assert again[0].case.trials[0][0].outcomes == pytest.approx(shown[0][0].outcomes)
    assert again[1].case.outcomes == pytest.approx(found[1].case.outcomes, rel=1e-5)
    assert again[-1] == FinishedRun("bare", None, None)


@pytest.mark.parametrize("content", [None, [], {}, {"schema": 2, "runs": []}, {"schema": 1, "runs": [{"key": 3}]}])
def test_other_content_is_refused(content):
    with pytest.raises(ConfigError, match="finished runs"):
        runs_from(content)


def test_the_shipped_calibration_is_the_fit_of_the_shipped_runs():
    found, shipped = shipped_runs(), shipped_calibration()
    assert len({run.key for run in found}) == len(found)
    again = fit_calibration([run.case for run in found if run.case], shipped.outputs, shipped.source)
    assert again.groups == shipped.groups
    for lines, others in ((again.lines, shipped.lines), (again.trial_lines, shipped.trial_lines)):
        for name, line in lines.items():
            assert line.coefficients == pytest.approx(others[name].coefficients, rel=1e-9)
            assert (line.penalty, line.groups, line.runs) == (
                others[name].penalty,
                others[name].groups,
                others[name].runs,
            )
            assert line.spread == pytest.approx(others[name].spread, rel=1e-9)
    for name, value in vars(shipped.domain).items():
        ours = getattr(again.domain, name)
        assert (
            ours == value if isinstance(value, str | bool) or name == "models" else np.allclose(ours, value, rtol=1e-4)
        )
    risk = fit_risk([run.rate for run in found if run.rate])
    assert risk.slope == pytest.approx(shipped.risk.slope, rel=1e-6)
