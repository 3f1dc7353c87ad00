"""A calibration is of one kind of task: it forecasts runs of that kind, and leaves others in their simulated order."""

import dataclasses
import json
import math

import numpy as np
import pytest

from foretune.errors import ConfigError
from foretune.forecasting.calibration import RunForecast, apply_calibration, tied
from foretune.forecasting.calibration_file import calibration_from, shipped_calibration
from foretune.forecasting.calibration_fit import Case, fit_calibration
from foretune.forecasting.curve import Curve, bend, write_curve
from foretune.forecasting.outcomes import outcomes_of, scale, unscale
from foretune.forecasting.reach import INSIDE, Run, reach, run_from, run_values
from foretune.forecasting.simulate import Trajectory
from foretune.forecasting.simulated_runs import Ending, SimulatedRun
from foretune.report.curves import read_curve
from foretune.tasks.metrics import main_metric

import domains

RUN = Run("00000000000aa", False, 2, 400, 400, 300, 50, 5, 100, 32, 1e-3, 8e-3)
OTHERS = ["regression", "multi-label"]


def of(kind, **changes):
    return dataclasses.replace(RUN, kind=kind, **changes)


def values_of(kind, random, size=1.0):
    """What was simulated: losses of any size, and the kind's own metric."""
    name = main_metric(kind).name
    losses = size * np.exp(random.normal(-1, 0.3, 3))
    metrics = 0.3 + 0.5 * random.random(2)
    values = {
        "simulated_train_loss": losses[0],
        "simulated_eval_loss": losses[1],
        f"simulated_{name}": metrics[0],
        "probe_loss": losses[2],
        f"probe_{name}": metrics[1],
        "movement": 1.0,
        "doublings": 0.0,
    }
    return domains.best_at_end(values)


SHARE = 0.3


def outcomes_from(kind, values):
    """Outcomes that lie a share of the way from the simulated run to the probe, on their scale."""
    gave = {}
    for name in outcomes_of(kind):
        start = scale(name, values[f"simulated_{name}"], kind)
        probe = scale(name, values["probe_loss" if name.endswith("loss") else f"probe_{name}"], kind)
        gave[name] = unscale(name, start + SHARE * (probe - start))
    return gave


def cases_of(kind, size=1.0):
    random, cases = np.random.default_rng(0), []
    for group in range(5):
        for _ in range(12):
            values = values_of(kind, random, size)
            cases.append(Case(values, outcomes_from(kind, values), f"data{group}", of(kind)))
    return cases


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("size", [1.0, 400.0])
def test_runs_of_any_kind_can_be_calibrated(kind, size):
    """Squared errors have the unit of their targets: far above any loss in nats they still count."""
    if kind == "multi-label":
        size = 1.0
    calibration = fit_calibration(cases_of(kind, size), ["full"], "a study")
    assert calibration.kind == kind
    assert set(calibration.lines) == set(outcomes_of(kind))
    again = calibration_from(json.loads(json.dumps(calibration.to_dict())))
    assert again == calibration
    values = values_of(kind, np.random.default_rng(9), size)
    forecast = apply_calibration(again, values, "full", run=of(kind))
    metric = main_metric(kind).name
    for name, expected in outcomes_from(kind, values).items():
        assert scale(name, forecast.levels[name].value, kind) == pytest.approx(scale(name, expected, kind), abs=0.005)
    assert list(forecast.to_dict()["levels"]) == ["train_loss", "eval_loss", metric]
    assert forecast.order == (forecast.levels[metric].value, forecast.levels["eval_loss"].value)
    assert forecast.calibrated


@pytest.mark.parametrize("kind", OTHERS)
def test_runs_of_another_kind_keep_their_simulated_order(kind):
    calibration = domains.by_hand(domains.everywhere(RUN.model))
    random, name = np.random.default_rng(1), main_metric(kind).name
    found = []
    for _ in range(6):
        values = values_of(kind, random)
        forecast = apply_calibration(calibration, values, "full", run=of(kind))
        assert forecast.levels is None
        assert forecast.order == (values[f"simulated_{name}"], values["simulated_eval_loss"])
        assert forecast.reach.reasons == (f"the calibration has seen classification only, and this is {kind}",)
        assert "read the order only" in forecast.reach.verdict
        found.append(forecast)
    best = min(found, key=lambda forecast: forecast.key)
    assert best.order[0] == max(forecast.order[0] for forecast in found)
    assert not tied(calibration, best, best)


def test_a_metric_that_is_not_defined_comes_last():
    runs = [RunForecast(None, (value, 1.0), INSIDE, "regression") for value in (math.nan, -0.9, 0.1)]
    assert [run.order[0] for run in sorted(runs, key=lambda run: run.key)][:2] == [0.1, -0.9]


def test_the_calibration_that_comes_with_foretune_has_seen_classes():
    shipped = shipped_calibration()
    assert shipped.kind == "classification"
    content = shipped.to_dict()
    del content["domain"]["kind"]  # as files were written before
    assert calibration_from(content) == shipped
    content["domain"]["kind"] = "regression"
    with pytest.raises(ConfigError, match=r"calibration of accuracy.*needs train_loss, eval_loss, spearman"):
        calibration_from(content)


def test_runs_of_two_kinds_have_no_calibration_in_common():
    with pytest.raises(ConfigError, match="one kind of task, not for classification and regression"):
        fit_calibration([*cases_of("regression"), *_with_all(cases_of("classification"))], ["full"], "a study")


def _with_all(cases):
    """Values of both kinds, so that only the kind is amiss."""
    more = domains.best_at_end({"simulated_spearman": 0.5}) | {"probe_spearman": 0.5}
    return [
        dataclasses.replace(c, simulated={**c.simulated, **more}, outcomes={**c.outcomes, "spearman": 0.5})
        for c in cases
    ]


@pytest.mark.parametrize("kind", ["classification", *OTHERS])
def test_the_kind_of_a_run_is_kept_among_its_numbers(kind):
    values = run_values(of(kind))
    assert all(isinstance(value, int | float) for value in values.values())
    assert run_from(values) == of(kind)
    assert ("run_kind" in values) == (kind != "classification")  # cells that were stored without it are of classes


def test_the_outputs_of_a_kind_are_counted_in_its_words():
    domain = dataclasses.replace(domains.everywhere(RUN.model), kind="regression", classes=(1.0, 2.0))
    (reason,) = reach(domain, of("regression", classes=8)).reasons
    assert reason == "8 outputs, checked 1 to 2"


def test_a_course_of_numbers_is_bent_on_its_own_scale_and_read_again(tmp_path):
    trajectory = Trajectory(
        (0, 1, 2), (9.0, 2.0), (0.0, 0.8), (9.0, 5.0, 3.0), (math.nan, 0.5, 0.7), (8.0, 4.0), 0.1, np.zeros(1)
    )
    metric = main_metric("regression")
    simulated = SimulatedRun(trajectory, Ending(4.0, 3.0, 0.7), 5.0, 0.5, 10, 10, metric)
    calibration = fit_calibration(cases_of("regression", 30.0), ["full"], "a study")
    values = values_of("regression", np.random.default_rng(2), 30.0)
    values |= domains.best_at_end({"simulated_train_loss": 4.0, "simulated_eval_loss": 3.0, "simulated_spearman": 0.7})
    forecast = apply_calibration(calibration, values, "full", run=of("regression"))
    curve = bend(simulated, forecast)
    end = forecast.levels
    assert curve.simulated == ()
    assert curve.points[-1].eval_metric == pytest.approx(end["spearman"].value)
    assert curve.points[-1].eval_loss == pytest.approx(end["eval_loss"].value)
    half = math.atanh(0.5) + (math.atanh(end["spearman"].value) - math.atanh(0.7)) / 2
    assert curve.points[1].eval_metric == pytest.approx(math.tanh(half))
    kept = dataclasses.replace(curve, points=curve.points[1:])
    write_curve(kept, tmp_path / "curve.csv")
    assert (tmp_path / "curve.csv").read_text().splitlines()[0] == "step,train_loss,eval_loss,eval_spearman"
    read = read_curve(tmp_path / "curve.csv")
    assert read[-1].eval_metric == pytest.approx(end["spearman"].value, rel=1e-5)
    assert isinstance(curve, Curve)
    (tmp_path / "none.csv").write_text("step,train_loss,eval_loss\n0,,0.5\n")
    with pytest.raises(ConfigError, match="cannot read the forecast curve"):
        read_curve(tmp_path / "none.csv")
