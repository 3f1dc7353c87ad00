import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import t as student

from foretune.errors import ConfigError
from foretune.forecasting.calibration import Calibration, RunForecast, apply_calibration, tied
from foretune.forecasting.calibration_file import calibration_from
from foretune.forecasting.calibration_fit import PENALTIES, Case, fit_calibration
from foretune.forecasting.line import Line, class_doublings, half_width
from foretune.forecasting.outcomes import OUTCOMES, scale, unscale
from foretune.forecasting.reach import INSIDE, Run
from foretune.forecasting.simulated_runs import Ending, SimulatedRun, case_values
from foretune.forecasting.terms import TERMS, terms
from foretune.tasks.metrics import main_metric

OUTPUT = "margin"


def logit(p):
    return math.log(p / (1 - p))


def logistic(x):
    return 1 / (1 + math.exp(-x))


def values_of(random):
    loss, accuracy = np.exp(random.normal(-1, 0.3, 4)), logistic_of(random.normal(1, 0.4, 3))
    return {
        "simulated_train_loss": loss[0],
        "simulated_eval_loss": loss[1],
        "simulated_accuracy": accuracy[0],
        "best_eval_loss": loss[3],
        "best_accuracy": accuracy[1],
        "probe_loss": loss[2],
        "probe_accuracy": accuracy[2],
        "movement": np.exp(random.normal(0, 0.5)),
        "doublings": float(random.integers(0, 4)),
    }


def logistic_of(x):
    return 1 / (1 + np.exp(-x))


BETA = np.array([0.3, 0.4])


def truth(values, random, *, between=0.0, noise=0.0):
    """Outcomes of the model that is fitted, with an error of the data set and one of the run."""
    found = {}
    for outcome in OUTCOMES:
        s, x = terms(outcome, values)
        found[outcome] = s + float(BETA @ x) + between + noise * random.normal()
    return {name: logistic(y) if name == "accuracy" else math.exp(y) for name, y in found.items()}


def cases_of(random, sizes=(9, 4, 6, 12), **options):
    cases = []
    between = options.pop("between", 0.0)
    for group, size in enumerate(sizes):
        shared = between * random.normal()
        for _ in range(size):
            values = values_of(random)
            cases.append(Case(values, truth(values, random, between=shared, **options), f"data{group}"))
    return cases


@pytest.fixture(scope="module")
def noisy():
    return cases_of(np.random.default_rng(0), between=0.2, noise=0.1)


@pytest.fixture(scope="module")
def fitted(noisy):
    return fit_calibration(noisy, [OUTPUT, "full"], "a study")


def slow_ridge(x, y, weight, penalty):
    """Least squares with a row more for each coefficient's penalty."""
    weight = weight / weight.sum()
    rows = [math.sqrt(w) * row for w, row in zip(weight, x, strict=True)]
    targets = [math.sqrt(w) * value for w, value in zip(weight, y, strict=True)]
    for j in range(x.shape[1]):
        size = sum(w * row[j] ** 2 for w, row in zip(weight, x, strict=True))
        rows.append(math.sqrt(penalty * (size or 1.0)) * np.eye(x.shape[1])[j])
        targets.append(0.0)
    return np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]


def slow_line(outcome, cases):
    on_scale = logit if outcome == "accuracy" else math.log
    x = np.array([terms(outcome, case.simulated)[1] for case in cases])
    y = np.array([on_scale(case.outcomes[outcome]) - terms(outcome, case.simulated)[0] for case in cases])
    names = [case.group for case in cases]
    weight = np.array([1 / names.count(name) for name in names])
    best = None
    for penalty in PENALTIES:
        errors = np.zeros(len(y))
        for i, name in enumerate(names):
            rest = [j for j, other in enumerate(names) if other != name]
            beta = slow_ridge(x[rest], y[rest], weight[rest], penalty)
            last = min(max(x[i, 1], min(x[rest, 1])), max(x[rest, 1]))  # as far as the others have seen it
            errors[i] = y[i] - x[i, 0] * beta[0] - last * beta[1]
        size = math.sqrt(np.sum(weight * errors**2) / weight.sum())
        if best is None or size < best[1]:
            around = errors - [np.mean([e for e, o in zip(errors, names, strict=True) if o == name]) for name in names]
            best = (penalty, size, np.array(around), errors)
    doublings = np.array([case.simulated["doublings"] for case in cases])
    spread, growth = slow_spread(best[3], doublings, weight / weight.sum())
    around = best[2] / np.sqrt(1 + (growth * doublings / spread) ** 2)
    within = math.sqrt(np.sum(weight * around**2) / weight.sum())
    return slow_ridge(x, y, weight, best[0]), best[0], spread, within, growth


def slow_spread(errors, doublings, weight):
    """The best of all normal distributions of variance a² + b² d², searched from several places."""

    def surprise(parameters):
        a, b = np.abs(parameters)
        variance = a**2 + (b * doublings) ** 2
        return np.sum(weight * (np.log(variance) + errors**2 / variance))

    starts = [(0.3, 0.3), (0.3, 0.01), (0.05, 0.3)]
    tried = [minimize(surprise, start, method="Nelder-Mead", options={"xatol": 1e-6}) for start in starts]
    return np.abs(min(tried, key=lambda found: found.fun).x)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_the_fit_is_that_of_a_slow_reference(noisy, fitted, outcome):
    line = fitted.lines[outcome]
    beta, penalty, spread, within, growth = slow_line(outcome, noisy)
    assert line.coefficients == pytest.approx(beta, rel=1e-9, abs=1e-12)
    assert (line.penalty, line.groups, line.runs) == (penalty, 4, 31)
    assert line.within == pytest.approx(within, rel=0.02)  # in units that hang on the spread
    assert line.spread == pytest.approx(spread, rel=0.02)
    assert line.growth == pytest.approx(growth, rel=0.1, abs=0.01 * spread)


VALUES = {
    "simulated_train_loss": 0.1,
    "simulated_eval_loss": 0.5,
    "simulated_accuracy": 0.7,
    "best_eval_loss": 0.4,
    "best_accuracy": 0.8,
    "probe_loss": 0.6,
    "probe_accuracy": 0.75,
    "movement": 0.5,
    "doublings": 2.0,
}


TO_COME = (1 - math.sqrt(1 / 4)) / (math.sqrt(2) - 1)  # two doublings are missing: n/N = 1/4


def test_terms_are_those_of_the_docstring():
    s, x = terms("accuracy", VALUES)
    assert s == pytest.approx(logit(0.8))
    gain = 0.5 * (logit(0.75) - logit(0.8))
    assert dict(zip(TERMS, x, strict=True)) == pytest.approx({"probe": gain, "more_rows": TO_COME * gain})
    s, x = terms("train_loss", VALUES)
    assert s == pytest.approx(math.log(0.1))
    assert x == pytest.approx([0.5 * math.log(6), 0.5 * TO_COME * math.log(6)])
    s, x = terms("eval_loss", VALUES)
    assert s == pytest.approx(math.log(0.4))
    assert x == pytest.approx([0.5 * math.log(1.5), 0.5 * TO_COME * math.log(1.5)])


def test_more_rows_count_by_a_curve_that_falls_with_their_root():
    def lacking(rows):
        return 1.0 / math.sqrt(rows)

    for doublings in (0.0, 1.0, 3.0, 20.0):
        _, x = terms("eval_loss", VALUES | {"doublings": doublings})
        share = (lacking(100) - lacking(100 * 2**doublings)) / (lacking(50) - lacking(100))
        assert x[1] == pytest.approx(share * x[0])


def test_a_run_that_moves_far_is_corrected_whole_and_one_that_stays_not_at_all():
    for movement, share in ((40.0, 1.0), (1.0, 1.0), (0.0, 0.0)):
        s, x = terms("accuracy", VALUES | {"movement": movement, "doublings": 0.0})
        assert s == pytest.approx(logit(0.7))  # with all rows known its end, not its best
        assert x == pytest.approx([share * (logit(0.75) - logit(0.7)), 0.0])


def test_every_data_set_has_the_same_weight(noisy, fitted):
    more = [*noisy, *[case for case in noisy if case.group == "data1"] * 3]
    again = fit_calibration(more, [OUTPUT], "more")
    for outcome in OUTCOMES:
        first, second = fitted.lines[outcome], again.lines[outcome]
        assert second.coefficients == pytest.approx(first.coefficients, rel=1e-9)
        assert (second.spread, second.within) == pytest.approx((first.spread, first.within), rel=1e-9)
        assert (second.groups, second.runs) == (4, 31 + 12)


def test_a_perfect_simulation_is_left_alone():
    random = np.random.default_rng(1)
    cases = []
    for case in cases_of(random):
        outcomes = {name: unscale(name, terms(name, case.simulated)[0]) for name in OUTCOMES}
        cases.append(dataclasses.replace(case, outcomes=outcomes))
    found = fit_calibration(cases, [OUTPUT], "perfect")
    for line in found.lines.values():
        assert line.coefficients == pytest.approx([0.0] * len(TERMS), abs=1e-12)
        assert line.spread == pytest.approx(0.0, abs=1e-12)
    forecast = apply_calibration(found, cases[0].simulated, OUTPUT)
    for name, interval in forecast.levels.items():
        assert vars(interval).values() == pytest.approx([cases[0].outcomes[name]] * 3)


def test_the_truth_is_found_without_noise():
    found = fit_calibration(cases_of(np.random.default_rng(2), sizes=(40, 40, 40)), [OUTPUT], "exact")
    for line in found.lines.values():
        assert line.penalty == PENALTIES[0]
        assert line.spread < 0.05
        assert line.coefficients[0] == pytest.approx(0.3, abs=0.03)


def test_nine_in_ten_intervals_hold_the_truth():
    """Of runs on new data sets, where data sets and runs differ at random from what is fitted."""
    random = np.random.default_rng(3)
    held = dict.fromkeys(OUTCOMES, 0)
    repeats = 150
    for _ in range(repeats):
        found = fit_calibration(cases_of(random, sizes=(3,) * 8, between=0.3, noise=0.2), [OUTPUT], "seeded")
        values = values_of(random)
        outcomes = truth(values, random, between=0.3 * random.normal(), noise=0.2)
        for name, interval in apply_calibration(found, values, OUTPUT).levels.items():
            assert interval.low < interval.value < interval.high
            held[name] += interval.low <= outcomes[name] <= interval.high
    for count in held.values():
        assert 0.83 < count / repeats < 0.96


def test_the_interval_is_that_of_student(fitted, noisy):
    values = noisy[0].simulated
    forecast = apply_calibration(fitted, values, OUTPUT).levels
    for outcome in OUTCOMES:
        line = fitted.lines[outcome]
        s, x = terms(outcome, values)
        middle = s + float(np.dot(line.coefficients, x))
        half = float(student.ppf(0.95, 3)) * math.hypot(line.spread, line.growth * values["doublings"])
        on_scale = logit if outcome == "accuracy" else math.log
        found = [on_scale(value) for value in vars(forecast[outcome]).values()]
        assert found == pytest.approx([middle, middle - half, middle + half])


def test_the_spread_grows_with_the_classes_where_the_errors_do():
    """Of 2 and of 8 classes, errors three times as large: a² + 2² c² is nine times a²."""
    random = np.random.default_rng(5)
    kind = Run("aa", False, 2, 400, 400, 100, 50, 5, 100, 32, 1e-3, 8e-3)
    found = []
    for number in range(400):
        classes, values = (2, 8)[number % 2], values_of(random) | {"doublings": 0.0}
        real = truth(values, random, noise=0.1 if classes == 2 else 0.3)
        found.append(Case(values, real, f"data{number % 8}", dataclasses.replace(kind, classes=classes)))
    line = fit_calibration(found, [OUTPUT], "x").lines["eval_loss"]
    assert line.spread == pytest.approx(0.1, rel=0.15)
    assert 2 * line.variety == pytest.approx(0.1 * math.sqrt(8), rel=0.15)
    assert half_width(line, classes=class_doublings(8)) == pytest.approx(
        math.sqrt(line.spread**2 + 4 * line.variety**2) / line.spread * half_width(line)
    )
    assert [class_doublings(classes) for classes in (1, 2, 4, 6)] == pytest.approx([0, 0, 1, math.log2(3)])
    alike = [dataclasses.replace(case, run=dataclasses.replace(case.run, classes=2)) for case in found]
    assert fit_calibration(alike, [OUTPUT], "x").lines["eval_loss"].variety == 0.0


def test_other_outputs_are_refused(fitted, noisy):
    assert apply_calibration(fitted, noisy[0].simulated, "full") == apply_calibration(
        fitted, noisy[0].simulated, OUTPUT
    )
    with pytest.raises(ConfigError, match="made for output margin and full, not 'trace'"):
        apply_calibration(fitted, noisy[0].simulated, "trace")


def test_too_few_data_sets_are_refused(noisy):
    with pytest.raises(ConfigError, match="3 data sets or more, got 2"):
        fit_calibration([case for case in noisy if case.group in ("data0", "data1")], [OUTPUT], "few")


def test_outcomes_that_are_not_finite_are_left_out(noisy):
    """A data set whose runs all diverged says nothing of their losses, and something of their accuracy."""
    broken = [
        dataclasses.replace(case, outcomes=case.outcomes | {"eval_loss": math.nan, "train_loss": math.inf})
        if case.group == "data1"
        else case
        for case in noisy
    ]
    found = fit_calibration(broken, [OUTPUT], "broken")
    assert [found.lines[name].groups for name in OUTCOMES] == [3, 3, 4]
    assert [found.lines[name].runs for name in OUTCOMES] == [27, 27, 31]
    rest = fit_calibration([case for case in noisy if case.group != "data1"], [OUTPUT], "rest")
    assert found.lines["eval_loss"] == rest.lines["eval_loss"]
    with pytest.raises(ConfigError, match="needs train_loss of 3 data sets or more, got 2"):
        fit_calibration([case for case in broken if case.group != "data0"], [OUTPUT], "few")


def test_it_is_written_and_read(fitted):
    text = json.dumps(fitted.to_dict(), allow_nan=False)
    assert calibration_from(json.loads(text)) == fitted


BAD = {
    "schema": lambda content: content | {"schema": 0},
    "terms": lambda content: content | {"terms": ["constant"]},
    "no lines": lambda content: {name: value for name, value in content.items() if name != "lines"},
    "list": lambda content: [content],
    "lines in a list": lambda content: content | {"lines": [1]},
    "nothing": lambda content: None,
    "two outcomes": lambda content: content | {"lines": {"accuracy": content["lines"]["accuracy"]}},
    "coefficients": lambda content: with_accuracy(content, coefficients=[0.0, 1.0, 2.0]),
    "words": lambda content: with_accuracy(content, spread="wide"),
    "not finite": lambda content: with_accuracy(content, spread=math.nan),
    "one data set": lambda content: with_accuracy(content, groups=1),
}


def with_accuracy(content, **changes):
    return content | {"lines": content["lines"] | {"accuracy": content["lines"]["accuracy"] | changes}}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_bad_content_is_refused(fitted, change):
    with pytest.raises(ConfigError, match="calibration"):
        calibration_from(change(fitted.to_dict()))


@given(st.floats(0.01, 0.99), st.floats(1e-3, 20.0))
def test_unscale_undoes_scale(accuracy, loss):
    assert unscale("accuracy", scale("accuracy", accuracy)) == pytest.approx(accuracy)
    for outcome in ("train_loss", "eval_loss"):
        assert unscale(outcome, scale(outcome, loss)) == pytest.approx(loss)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1e6), st.floats(0, 1e6))
def test_the_scale_is_monotone_and_bounded(first, second, loss, more):
    if first <= second:
        assert scale("accuracy", first) <= scale("accuracy", second)
    assert abs(scale("accuracy", first)) <= logit(0.99) + 1e-12
    if loss <= more:
        assert scale("eval_loss", loss) <= scale("eval_loss", more)
    assert math.log(1e-3) <= scale("eval_loss", loss) <= math.log(20.0)


def test_ties_are_within_the_error_of_a_difference():
    line = Line((0.0,) * len(TERMS), (0.0, 0.0), 1.0, 0.5, 0.1, 5, 50)
    calibration = Calibration(dict.fromkeys(OUTCOMES, line), (OUTPUT,), (), "by hand", None)

    def at(x):
        return RunForecast(None, (logistic(x), 1.0), INSIDE)

    margin = 1.645 * math.sqrt(2) * 0.1
    for other in (1.0 + 0.99 * margin, 1.0 - 0.99 * margin):
        assert tied(calibration, at(1.0), at(other))
    for other in (1.0 + 1.01 * margin, 1.0 - 1.01 * margin):
        assert not tied(calibration, at(1.0), at(other))


def test_values_of_an_outlook():
    simulated = SimulatedRun(
        trajectory=SimpleNamespace(movement=0.5),
        end=Ending(0.1, 0.5, 0.7),
        probe_loss=0.6,
        probe_metric=0.75,
        samples=100,
        train_rows=400,
        metric=main_metric("classification"),
        best=Ending(0.1, 0.4, 0.8),
    )
    assert case_values(simulated) == VALUES
    whole = case_values(dataclasses.replace(simulated, train_rows=100, best=None))
    assert whole["doublings"] == 0.0
    assert (whole["best_accuracy"], whole["best_eval_loss"]) == (0.7, 0.5)
