"""Calibration of runs of which trials are known: what is fitted, what is forecast, and what is refused."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy.stats import t as student

from foretune.errors import ConfigError
from foretune.forecasting.calibration import Line, apply_calibration, forecast_inside, half_width
from foretune.forecasting.calibration_file import calibration_from
from foretune.forecasting.calibration_fit import Case, fit_calibration
from foretune.forecasting.outcomes import OUTCOMES, scale, unscale
from foretune.forecasting.reach import Run, domain_of
from foretune.forecasting.shown import Shown
from foretune.forecasting.terms import terms
from foretune.forecasting.with_trials import together, trial_terms

import domains

RUN = Run("00000000000aa", False, 2, 400, 1600, 300, 50, 5, 250, 32, 1e-3, 8e-3)
GAMMA = np.array([-0.3, 0.5, 0.4])
LINE = Line((-0.3, 0.5, 0.4), (-2.0, 2.0), 0.01, 0.05, 0.05, 6, 60, growth=0.1)
VALUES = {
    **domains.best_at_end({"simulated_train_loss": 0.1, "simulated_eval_loss": 0.4, "simulated_accuracy": 0.8}),
    "probe_loss": 0.6,
    "probe_accuracy": 0.75,
    "movement": 0.5,
    "doublings": 2.0,
}


@pytest.fixture(scope="module")
def by_hand():
    plain = domains.by_hand(domains.everywhere(RUN.model), coefficients=(0.0, 0.0))
    domain = domains.everywhere(RUN.model, hidden_head=False)
    return dataclasses.replace(plain, trial_lines=dict.fromkeys(OUTCOMES, LINE), trial_domain=domain)


def drawn_cases(random, *, groups=6, runs=6, spread=0.05, growth=0.0, gamma=GAMMA):
    """Runs whose way on from a trial is drawn from the model that is fitted."""
    cases = []
    for group in range(groups):
        for _ in range(runs):
            doublings = int(random.integers(0, 4))
            run = dataclasses.replace(RUN, train_rows=400 * 2**doublings)
            losses, accuracies = np.exp(random.normal(-1, 0.4, 3)), 1 / (1 + np.exp(-random.normal(1, 0.5, 2)))
            values = {
                **domains.best_at_end(dict(zip(SIMULATED, (*losses[:2], accuracies[0]), strict=True))),
                "probe_loss": losses[2],
                "probe_accuracy": accuracies[1],
                "movement": 0.0,
                "doublings": float(doublings),
            }
            # without movement the forecast without trials is the simulated run, whatever was fitted
            start, below = (
                {name: scale(name, values[f"simulated_{name}"]) + random.normal(0, 0.4) for name in OUTCOMES}
                for _ in range(2)
            )
            rows = run.train_rows // int(2 ** random.integers(1, 4))
            shown = tuple(
                Shown(size, 0, 300, {name: unscale(name, value) for name, value in at.items()}, 0.5, 5, False)
                for size, at in ((rows, start), (rows // 4, below))
            )
            ratio, trials, outcomes = math.log2(run.train_rows / rows), together(shown, "classification"), {}
            for name in OUTCOMES:
                t, x = trial_terms(name, trials, terms(name, values)[0], run.train_rows)
                error = math.hypot(spread, growth * ratio) * random.normal()
                outcomes[name] = unscale(name, t + float(gamma @ x) + error)
            cases.append(Case(values, outcomes, f"data {group}", run, (shown,)))
    return cases


SIMULATED = ("simulated_train_loss", "simulated_eval_loss", "simulated_accuracy")


@pytest.fixture(scope="module")
def fitted():
    return fit_calibration(drawn_cases(np.random.default_rng(0), runs=60, growth=0.1), ["margin"], "drawn")


def test_what_was_drawn_is_found(fitted):
    for line in fitted.trial_lines.values():
        assert line.coefficients == pytest.approx(GAMMA, abs=0.3)  # errors of far runs are large
        assert line.growth == pytest.approx(0.1, rel=0.25)
        assert line.spread < 0.12
        assert (line.groups, line.runs) == (6, 360)
    assert fitted.trial_domain.rows_ratio == (2.0, 8.0)
    assert fitted.trial_domain.known_rows[0] == 50
    assert fitted.domain.known_rows == (400, 400)
    again = calibration_from(json.loads(json.dumps(fitted.to_dict(), allow_nan=False)))
    assert again == fitted


def test_a_trial_that_is_the_run_but_for_its_noise_is_left_alone():
    cases = drawn_cases(np.random.default_rng(1), spread=0.0, gamma=np.zeros(3))
    for line in fit_calibration(cases, ["margin"], "still").trial_lines.values():
        assert line.coefficients == pytest.approx([0.0] * 3, abs=1e-9)
        assert (line.spread, line.growth) == pytest.approx((0.0, 0.0), abs=1e-9)


def test_nine_in_ten_intervals_hold_runs_of_new_data_sets():
    random, held, near = np.random.default_rng(2), [], []
    for _ in range(30):
        calibration = fit_calibration(drawn_cases(random, growth=0.1), ["margin"], "drawn")
        for case in drawn_cases(random, groups=1, runs=4, growth=0.1):
            trials = together(case.trials[0], "classification")
            rows = case.run.train_rows
            found = forecast_inside(calibration, case.simulated, trials=trials, train_rows=rows).levels
            for name, level in found.items():
                assert level.low < level.high
                held.append(level.low <= case.outcomes[name] <= level.high)
                if rows == 2 * trials.rows:
                    near.append(held[-1])
    assert 0.84 < np.mean(held) < 0.97
    assert np.mean(near) > 0.8  # nor is the spread of near ones that of far ones alone


@pytest.mark.parametrize("seed", range(8))
def test_the_spread_where_all_rows_are_known_is_never_lost(seed):
    """However large the errors are far away: some spread is left for the runs that are near."""
    random, cases = np.random.default_rng(seed), []
    for group in range(5):
        for doublings in (0, 0, 1, 2, 3):
            values, error = VALUES | {"doublings": float(doublings)}, math.hypot(0.05, 0.3 * doublings)
            moved = {name: scale(name, VALUES[f"simulated_{name}"]) + error * random.normal() for name in OUTCOMES}
            outcomes = {name: unscale(name, value) for name, value in moved.items()}
            cases.append(Case(values, outcomes, f"data {group}"))
    for name in ("eval_loss", "train_loss"):
        line = fit_calibration(cases, ["margin"], "x").lines[name]
        assert 0.02 < line.spread < 0.25
        assert 0.15 < line.growth < 0.5


def test_runs_with_trials_of_two_data_sets_are_too_few():
    cases = [
        case if case.group in ("data 0", "data 1") else dataclasses.replace(case, trials=())
        for case in drawn_cases(np.random.default_rng(3))
    ]
    found = fit_calibration(cases, ["margin"], "few")
    assert (found.trial_lines, found.trial_domain) == ({}, None)
    assert calibration_from(json.loads(json.dumps(found.to_dict()))) == found


def test_the_spread_grows_with_the_doublings():
    quantile = float(student.ppf(0.95, 5))
    assert half_width(LINE) == pytest.approx(quantile * 0.05)
    assert half_width(LINE, 0.01, doublings=3.0) == pytest.approx(quantile * math.sqrt(0.05**2 + 0.3**2 + 0.01))


def test_a_forecast_with_a_trial_is_that_of_the_formula(by_hand):
    """A trial on a quarter of the rows and one on a quarter of that: g = 1/2, two doublings to go."""
    shown = [domains.shown(400, 0.7), domains.shown(100, 0.6)]
    found = apply_calibration(by_hand, VALUES, "margin", run=RUN, shown=shown)
    half = float(student.ppf(0.95, 5)) * math.sqrt(0.05**2 + 0.2**2)  # the evaluation rows are more than one
    for name in OUTCOMES:
        t, below = (scale(name, one.outcomes[name]) for one in shown)
        p = scale(name, VALUES[f"simulated_{name}"])  # coefficients 0
        middle = t + 0.5 * (-0.3 + 0.5 * (p - t) + 0.4 * (t - below))
        level = found.levels[name]
        expected = [middle, middle - half, middle + half]
        assert [scale(name, value) for value in vars(level).values()] == pytest.approx(expected), name
    assert found.reach.reasons == ()
    assert found.order == (found.levels["accuracy"].value, found.levels["eval_loss"].value)
    same = forecast_inside(by_hand, VALUES, trials=together(shown, "classification"), train_rows=1600)
    assert same == found


def test_without_trials_forecast_inside_is_the_plain_one(by_hand):
    run = dataclasses.replace(RUN, known_rows=400)
    found = apply_calibration(by_hand, VALUES, "margin", run=run)
    assert forecast_inside(by_hand, VALUES) == found == apply_calibration(by_hand, VALUES, "margin")
    assert found != apply_calibration(by_hand, VALUES, "margin", run=run, shown=[domains.shown(400, 0.7)])


def test_a_calibration_that_has_seen_no_trial_takes_none():
    plain = domains.by_hand(domains.everywhere(RUN.model))
    shown = [domains.shown(400, 0.7)]
    assert apply_calibration(plain, VALUES, "margin", run=RUN, shown=shown) == apply_calibration(
        plain, VALUES, "margin", run=RUN
    )


def _known_whole():
    """A domain of runs of which all rows were known."""
    return domain_of([dataclasses.replace(RUN, train_rows=400)], most_rows=1.0, most_classes=2.0)


def test_a_plain_forecast_that_is_withheld_is_no_term(by_hand):
    narrow = dataclasses.replace(by_hand, domain=_known_whole())
    shown = [domains.shown(400, 0.7)]
    assert apply_calibration(narrow, VALUES, "margin", run=RUN).levels is None
    found = apply_calibration(narrow, VALUES, "margin", run=RUN, shown=shown)
    for name, level in found.levels.items():
        assert scale(name, level.value) == pytest.approx(scale(name, shown[0].outcomes[name]) + 0.5 * -0.3)
    other = apply_calibration(narrow, VALUES | {"best_accuracy": 0.3}, "margin", run=RUN, shown=shown)
    assert other.levels == found.levels


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"model": "00000000000bb"}, "no run of this model"), ({"hidden_head": True}, "hidden layer")],
)
def test_a_model_that_was_not_seen_widens_by_two_where_a_trial_is_known(by_hand, changes, words):
    narrow = dataclasses.replace(by_hand, domain=domains.everywhere(RUN.model, hidden_head=False))
    run, shown = dataclasses.replace(RUN, **changes), [domains.shown(400, 0.7)]
    assert apply_calibration(narrow, VALUES, "margin", run=run).levels is None
    found = apply_calibration(narrow, VALUES, "margin", run=run, shown=shown)
    assert found.reach.widening == 2.0
    assert words in found.reach.verdict
    assert "2 times as wide" in found.reach.verdict
    assert set(found.levels) == {"eval_loss", "accuracy"}
    half = 2 * float(student.ppf(0.95, 5)) * math.sqrt(0.05**2 + 0.2**2)
    level = found.levels["eval_loss"]
    assert math.log(level.high / level.value) == pytest.approx(half)
    both = dataclasses.replace(run, model="00000000000bb", hidden_head=True)
    assert apply_calibration(narrow, VALUES, "margin", run=both, shown=shown).reach.widening == 2.0


def test_a_trial_that_diverged_withholds_the_level_and_says_so(by_hand):
    shown = [domains.shown(400, 0.7, diverged=True), domains.shown(100, 0.7)]
    found = apply_calibration(by_hand, VALUES, "margin", run=RUN, shown=shown)
    assert found.levels is None
    assert found.reach.verdict == "No level is forecast, read the order only: the trial on 400 rows diverged."
    assert found.order == apply_calibration(by_hand, VALUES, "margin", run=RUN).order


def changed(content, **changes):
    lines = content["trial_lines"]
    return content | {"trial_lines": lines | {"accuracy": lines["accuracy"] | changes}}


BAD = {
    "schema 2": lambda content: content | {"schema": 2},
    "other terms": lambda content: content | {"terms": ["constant", "probe", "overfit"]},
    "other trial terms": lambda content: content | {"trial_terms": ["constant"]},
    "no trial terms": lambda content: {name: value for name, value in content.items() if name != "trial_terms"},
    "an outcome lacks": lambda content: content | {"trial_lines": {"accuracy": content["trial_lines"]["accuracy"]}},
    "two coefficients": lambda content: changed(content, coefficients=[0.0, 1.0]),
    "a word": lambda content: changed(content, growth="none"),
    "not finite": lambda content: changed(content, growth=math.inf),
    "negative growth": lambda content: changed(content, growth=-0.1),
    "two data sets": lambda content: changed(content, groups=2),
    "no domain of trials": lambda content: content | {"trial_domain": None},
    "no lines of trials": lambda content: content | {"trial_lines": {}},
    "trials of another kind": lambda content: (
        content | {"trial_domain": content["trial_domain"] | {"kind": "regression"}}
    ),
    "a domain of nonsense": lambda content: content | {"trial_domain": content["trial_domain"] | {"steps": [0.0, 1.0]}},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_bad_content_is_refused(by_hand, change):
    content = json.loads(json.dumps(by_hand.to_dict()))
    assert calibration_from(content) == by_hand
    with pytest.raises(ConfigError, match="calibration"):
        calibration_from(change(content))


def test_another_schema_is_said(by_hand):
    with pytest.raises(ConfigError, match="calibration of schema 2, not 3: fit it again"):
        calibration_from(by_hand.to_dict() | {"schema": 2})
