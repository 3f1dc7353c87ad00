"""Calibration of runs of which trials are known: what is fitted, what is forecast, and what is refused."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from scipy.stats import t as student

from foretune.errors import ConfigError
from foretune.forecasting.calibration import apply_calibration, forecast_inside
from foretune.forecasting.calibration_file import calibration_from
from foretune.forecasting.calibration_fit import Case, fit_calibration
from foretune.forecasting.line import Line, half_width
from foretune.forecasting.outcomes import OUTCOMES, scale, unscale
from foretune.forecasting.reach import Run, domain_of
from foretune.forecasting.shown import Shown
from foretune.forecasting.terms import terms
from foretune.forecasting.with_trials import together, trial_terms

import domains

RUN = Run("00000000000aa", False, 2, 400, 1600, 300, 50, 5, 250, 32, 1e-3, 8e-3)
GAMMA = np.array([0.5, 0.4])
LINE = Line((0.5, 0.4), (-2.0, 2.0), 0.01, 0.05, 0.05, 6, 60, growth=0.1)
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
    """Runs that miss their forecast by what the model that is fitted says of their trials."""
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
                p, x = trial_terms(name, trials, terms(name, values)[0], run.train_rows, "classification")
                error = math.hypot(spread, growth * ratio) * random.normal()
                outcomes[name] = unscale(name, p + float(gamma @ x) + error)
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


def test_a_forecast_that_holds_is_left_alone_whatever_its_trials_show():
    cases = drawn_cases(np.random.default_rng(1), spread=0.0, gamma=np.zeros(2))
    for line in fit_calibration(cases, ["margin"], "still").trial_lines.values():
        assert line.coefficients == pytest.approx([0.0] * 2, abs=1e-6)
        assert (line.spread, line.growth) == pytest.approx((0.0, 0.0), abs=1e-6)


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


def with_trials(calibration, *shown, values=VALUES, run=RUN):
    return apply_calibration(calibration, values, "margin", run=run, shown=shown)


def on_scale(found):
    return {name: scale(name, level.value) for name, level in found.levels.items()}


@pytest.mark.parametrize("accuracy", [0.7, 0.95])
def test_a_forecast_with_a_trial_is_that_of_the_formula(by_hand, accuracy):
    """A trial on a quarter of the rows and one on a quarter of that: h = 1/2, two doublings to go."""
    shown = [domains.shown(400, accuracy), domains.shown(100, 0.6)]
    found = with_trials(by_hand, *shown)
    half = float(student.ppf(0.95, 5)) * math.sqrt(0.05**2 + 0.2**2)  # the evaluation rows are more than one
    for name in OUTCOMES:
        t, below = (scale(name, one.outcomes[name]) for one in shown)
        p = scale(name, VALUES[f"simulated_{name}"])  # coefficients 0, best at its end
        better = max(0.0, t - p) if name == "accuracy" else min(0.0, t - p)
        middle = p + 0.5 * better + 0.5 * 0.4 * (t - below)
        level = found.levels[name]
        ends = sorted([middle - half, middle + half])
        assert [scale(name, value) for value in vars(level).values()] == pytest.approx([middle, *ends]), name
    assert found.reach.reasons == ()
    assert found.order == (found.levels["accuracy"].value, found.levels["eval_loss"].value)
    same = forecast_inside(by_hand, VALUES, trials=together(shown, "classification"), train_rows=1600)
    assert same == found


def test_a_bad_trial_changes_nothing_and_a_better_one_raises(by_hand):
    plain = on_scale(apply_calibration(by_hand, VALUES, "margin", run=RUN))
    for accuracy in (0.05, 0.5):  # losses of 0.25 and more, and 0.5 and more: worse than 0.1 and 0.4
        assert on_scale(with_trials(by_hand, domains.shown(400, accuracy))) == pytest.approx(plain)
    levels = [on_scale(with_trials(by_hand, domains.shown(400, accuracy))) for accuracy in (0.9, 0.95, 0.99)]
    for lower, higher in itertools.pairwise([plain, *levels]):
        assert lower["accuracy"] < higher["accuracy"]
        assert lower["eval_loss"] > higher["eval_loss"]
    # a trial that still rises, however low it is, says that more is to come
    rising = on_scale(with_trials(by_hand, domains.shown(400, 0.55), domains.shown(100, 0.5)))
    assert rising["accuracy"] == pytest.approx(plain["accuracy"] + 0.5 * 0.4 * math.log(0.55 / 0.45))


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


def test_a_forecast_that_is_withheld_without_trials_is_withheld_with_them(by_hand):
    narrow = dataclasses.replace(by_hand, domain=_known_whole())
    plain, found = apply_calibration(narrow, VALUES, "margin", run=RUN), with_trials(narrow, domains.shown(400, 0.9))
    assert (plain.levels, found.levels) == (None, None)
    assert found.reach == plain.reach
    assert found.order > plain.order  # what the trial shows still counts for the order


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"model": "00000000000bb"}, "no run of this model"), ({"hidden_head": True}, "hidden layer")],
)
def test_a_model_that_was_not_seen_has_no_level_though_a_trial_is_known(by_hand, changes, words):
    narrow = dataclasses.replace(by_hand, domain=domains.everywhere(RUN.model, hidden_head=False))
    found = with_trials(narrow, domains.shown(400, 0.9), run=dataclasses.replace(RUN, **changes))
    assert found.levels is None
    assert found.reach.withheld
    assert words in found.reach.verdict
    # where runs of it were seen, but none with trials, they change nothing
    wide = dataclasses.replace(
        by_hand,
        domain=domains.everywhere(RUN.model, "00000000000bb"),
        trial_domain=domains.everywhere(RUN.model, hidden_head=False),
    )
    run = dataclasses.replace(RUN, **changes)
    found = with_trials(wide, domains.shown(400, 0.9), run=run)
    assert words in found.note
    assert found.levels == apply_calibration(wide, VALUES, "margin", run=run).levels


def test_a_trial_that_lies_farther_than_the_run_changes_nothing(by_hand):
    run = dataclasses.replace(RUN, epochs=6)
    for plain, of_trials in ((5.0, 4.0), (3.5, 5.0), (5.0, 5.0), (6.0, 2.0)):
        narrow = dataclasses.replace(
            by_hand,
            domain=dataclasses.replace(by_hand.domain, epochs=(1.0, plain)),
            trial_domain=dataclasses.replace(by_hand.trial_domain, epochs=(1.0, of_trials)),
        )
        found = with_trials(narrow, domains.shown(400, 0.9), run=run)
        without = apply_calibration(narrow, VALUES, "margin", run=run)
        assert found.reach == without.reach
        assert found.reach.widening == pytest.approx(6.0 / plain)
        if of_trials < plain:
            assert found.note == (
                "The trial on 400 rows changes no forecast: 6 epochs, checked 1 to " + f"{of_trials:g}."
            )
            assert found.levels == without.levels
        else:
            assert found.note == ""
            assert found.levels["accuracy"].value > without.levels["accuracy"].value


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
    "three coefficients": lambda content: changed(content, coefficients=[0.0, 1.0, 2.0]),
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
