"""The loss curve that a run will draw: simulated step by step, bent to the calibrated end."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log, nan
from pathlib import Path
from typing import Any

import numpy as np

from foretune.forecasting.calibration import Calibration, Interval, RunForecast, apply_calibration
from foretune.forecasting.cautions import Caution, Moving, cautions
from foretune.forecasting.linearise import Linearised, linearise
from foretune.forecasting.outcomes import LOSS_LIMITS
from foretune.forecasting.schedule import schedule_of
from foretune.forecasting.shown import Shown
from foretune.forecasting.simulated_runs import SimulatedRun, case_values, kind_of, n_steps, runs_of, simulate_runs
from foretune.forecasting.verdicts import Verdict, go_sentences
from foretune.problem import Plan
from foretune.report.curves import CurvePoint, curve_header
from foretune.settings.groups import Recipe

POINTS = 20


@dataclass(frozen=True)
class Curve:
    """Forecast course of a run.

    Attributes:
        points: From before training to the end; none where the level is withheld.
        forecast: Forecast at the end.
        simulated: The same before calibration, where there is none of this kind of task: no level, but all there is.
        verdicts: How likely the run is to beat what costs less; none where the level is withheld.
        cautions: What may go wrong with it; none where the level is withheld.
    """

    points: tuple[CurvePoint, ...]
    forecast: RunForecast
    simulated: tuple[CurvePoint, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    cautions: tuple[Caution, ...] = ()

    @property
    def end(self) -> Mapping[str, Interval] | None:
        """Forecasts at the end by outcome, each with its 90% interval; None where they are withheld."""
        return self.forecast.levels

    def to_dict(self) -> dict[str, Any]:
        """Lay out as in `result.json`.

        Returns:
            Points and forecasts at the end with their 90% intervals, both None where withheld; `reach` and `note` say
            why, or why the intervals are wider. `simulated`: points before calibration, None where there is one.
            `verdicts`: against what costs less; `cautions`: what may go wrong.
        """
        said, metric = self.forecast.to_dict(), self.forecast.metric.name
        return {
            "points": [point.to_dict(metric) for point in self.points] or None,
            "simulated": [point.to_dict(metric) for point in self.simulated] or None,
            "end": said["levels"],
            "reach": said["reach"],
            "note": self.forecast.reach.verdict or None,
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
            "cautions": [caution.to_dict() for caution in self.cautions],
        }


def forecast_run(
    plan: Plan,
    settings: Recipe,
    calibration: Calibration,
    *,
    model: Callable[[], Linearised] | None = None,
    shown: Sequence[Shown] = (),
    on_step: Callable[[int, int], None] | None = None,
) -> Curve:
    """Forecast the course of the run that trains an adapter.

    The samples go through the model under a probe head, with the gradients of every class.

    Args:
        plan: The placed adapter and the known rows, with rows to predict.
        settings: How the run trains.
        calibration: Calibration of the forecasts.
        model: Gives the linearised model, where others use it as well; None makes one of the plan.
        shown: What trials of this adapter showed.
        on_step: Called with the steps done and the steps in all.

    Returns:
        The curve.
    """
    objective = plan.task.objective
    reduction = objective.simulated()
    schedule = schedule_of(settings, plan.train_rows, seed=plan.settings.seed)
    kind = kind_of(plan, schedule)
    tried = bool(shown) and calibration.trial_domain is not None
    if calibration.domain is not None and calibration.kind == kind.kind and (far := calibration.reach(kind)).withheld:
        # before the work: there is no order to simulate for
        return Curve((), RunForecast(None, (nan, nan), far, objective.kind))
    linearised = linearise_run(plan) if model is None else model()
    starts = [linearised.start(range(len(linearised.sites))), linearised.start([])]
    total, done = n_steps(starts, schedule), 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)

    simulated, head = simulate_runs(linearised, starts, schedule, points=POINTS, on_step=step)
    run, run_of_head = runs_of(kind, starts)
    forecast = apply_calibration(calibration, case_values(simulated), reduction.name, run=run, shown=shown)
    if forecast.levels is None:
        told = cautions(forecast, 1.0, baseline=None, risk=calibration.risk, run=Moving(run.update_rate, run.steps))
        return replace(bend(simulated, forecast), cautions=told)
    metric = forecast.metric.name
    alone = apply_calibration(calibration, case_values(head), reduction.name, run=run_of_head).levels
    counted = tried and not forecast.note  # a trial that changes nothing leaves the lines as they are
    degrees = (calibration.trial_lines if counted else calibration.lines)[metric].degrees
    constant = objective.constant_metric(linearised.evaluation.targets.cpu().numpy())
    head_alone = None if alone is None else alone[metric].value
    verdicts = go_sentences(
        forecast.levels,
        forecast.metric,
        degrees,
        majority=constant,
        head_alone=head_alone,
        probe=simulated.probe_metric,
    )
    free = [value for value in (constant, head_alone) if value is not None]
    told = cautions(
        forecast,
        degrees,
        baseline=max(free, default=None),
        risk=calibration.risk,
        run=Moving(run.update_rate, run.steps),
    )
    return replace(bend(simulated, forecast), verdicts=verdicts, cautions=told)


def linearise_run(plan: Plan) -> Linearised:
    """Make the one pass over the samples that a forecast takes.

    Args:
        plan: The placed adapter and the known rows, with rows to predict.

    Returns:
        The linearised model, of the outputs that a run needs.
    """
    return linearise(replace(plan, reduction=plan.task.objective.simulated()))


def bend(simulated: SimulatedRun, forecast: RunForecast) -> Curve:
    """Bend a simulated trajectory to the forecast at its end.

    The simulated curve is shifted, on the calibration's scale, by the calibrated less the simulated end times the
    share of the steps done: it begins where the model is before training, which is known, and ends at the forecast
    (the training loss, a mean over the steps since the point before, near it). Where the level at the end is withheld,
    there is no curve; of a kind of task that the calibration has not seen, the simulated one is given beside it.

    Args:
        simulated: The simulated run, with points.
        forecast: Its forecast.

    Returns:
        The curve.
    """
    end, metric = forecast.levels, simulated.metric
    points = _points(simulated)
    if end is None:
        return Curve((), forecast, () if forecast.calibrated else points)
    of_training = end.get("train_loss")
    least, _ = LOSS_LIMITS[forecast.kind]
    to_train = 0.0 if of_training is None else log(of_training.value / max(simulated.end.train_loss, least))
    to_eval = log(end["eval_loss"].value / max(simulated.end.eval_loss, least))
    to_metric = metric.to_scale(end[metric.name].value) - metric.to_scale(simulated.end.eval_metric)

    def bent(point: CurvePoint) -> CurvePoint:
        share = point.step / points[-1].step
        known = None if of_training is None else point.train_loss
        return CurvePoint(
            point.step,
            None if known is None else known * exp(share * to_train),
            point.eval_loss * exp(share * to_eval),
            metric.from_scale(metric.to_scale(point.eval_metric) + share * to_metric) if share else point.eval_metric,
        )

    return Curve(tuple(map(bent, points)), forecast)


def _points(simulated: SimulatedRun) -> tuple[CurvePoint, ...]:
    trajectory, points, before = simulated.trajectory, [], 0
    for number, loss, metric in zip(trajectory.steps, trajectory.eval_loss, trajectory.eval_metric, strict=True):
        batches = trajectory.batch_loss[before:number]
        points.append(CurvePoint(number, float(np.mean(batches)) if batches else None, loss, metric))
        before = number
    return tuple(points)


def write_curve(curve: Curve, path: Path) -> None:
    """Write a curve as CSV.

    Args:
        curve: Curve.
        path: File.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(curve_header(curve.forecast.metric.name))
        for point in curve.points:
            train = "" if point.train_loss is None else f"{point.train_loss:.6g}"
            writer.writerow([point.step, train, f"{point.eval_loss:.6g}", f"{point.eval_metric:.6g}"])
