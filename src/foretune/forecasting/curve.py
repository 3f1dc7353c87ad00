"""The loss curve that a run will draw: simulated step by step, bent to the calibrated end."""

import csv
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import exp, log, nan
from pathlib import Path
from typing import Any

import numpy as np

from foretune.forecasting.calibration import Calibration, Interval, RunForecast, apply_calibration, scale, unscale
from foretune.forecasting.linearise import survey
from foretune.forecasting.reach import reach
from foretune.forecasting.recipe import recipe_of
from foretune.forecasting.runs import Outlook, case_values, kind_of, n_steps, outlooks, runs_of
from foretune.problem import Plan
from foretune.report.curves import HEADER, CurvePoint
from foretune.settings.groups import Recipe
from foretune.tasks.outputs import output_reduction

POINTS = 20


@dataclass(frozen=True)
class Curve:
    """Forecast course of a run.

    Attributes:
        points: From before training to the end; none where the level is withheld.
        forecast: Forecast at the end.
    """

    points: tuple[CurvePoint, ...]
    forecast: RunForecast

    @property
    def end(self) -> Mapping[str, Interval] | None:
        """Forecasts at the end by outcome, each with its 90% interval; None where they are withheld."""
        return self.forecast.levels

    def to_dict(self) -> dict[str, Any]:
        """Lay out as in `result.json`.

        Returns:
            Points and forecasts at the end with their 90% intervals, both None where withheld; `reach` and `note` say
            why, or why the intervals are wider.
        """
        said = self.forecast.to_dict()
        return {
            "points": [asdict(point) for point in self.points] or None,
            "end": said["levels"],
            "reach": said["reach"],
            "note": self.forecast.reach.verdict or None,
        }


def forecast_run(
    plan: Plan, settings: Recipe, calibration: Calibration, *, on_step: Callable[[int, int], None] | None = None
) -> Curve:
    """Forecast the course of the run that trains an adapter.

    The samples go through the model under a probe head, with the gradients of every class.

    Args:
        plan: The placed adapter and the known rows, with rows to predict.
        settings: How the run trains.
        calibration: Calibration of the forecasts.
        on_step: Called with the steps done and the steps in all.

    Returns:
        The curve.
    """
    task = plan.task
    reduction = output_reduction("margin" if task.n_classes == 2 else "full", task.n_classes)
    recipe = recipe_of(settings, plan.train_rows, seed=plan.settings.seed)
    kind = kind_of(plan, recipe)
    if calibration.domain is not None and (far := reach(calibration.domain, kind)).withheld:
        return Curve((), RunForecast(None, (nan, nan), far))  # before the work: there is no order to simulate for
    held = survey(replace(plan, reduction=reduction))
    starts = [held.start(range(len(held.sites)))]
    total, done = n_steps(starts, recipe), 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)

    (outlook,) = outlooks(held, starts, recipe, points=POINTS, on_step=step)
    (run,) = runs_of(kind, starts)
    forecast = apply_calibration(calibration, case_values(outlook), reduction.name, run=run)
    return bend(outlook, forecast)


def bend(outlook: Outlook, forecast: RunForecast) -> Curve:
    """Bend a simulated course to the forecast at its end.

    The simulated curve is shifted, on the calibration's scale, by the calibrated less the simulated end times the
    share of the steps done: it begins where the model is before training, which is known, and ends at the forecast
    (the training loss, a mean over the steps since the point before, near it). Where the level at the end is withheld,
    there is no curve.

    Args:
        outlook: The simulated run, with points.
        forecast: Its forecast.

    Returns:
        The curve.
    """
    course, end = outlook.course, forecast.levels
    if end is None:
        return Curve((), forecast)
    of_training = end.get("train_loss")
    shift = {
        "train_loss": 0.0 if of_training is None else log(of_training.value / max(outlook.end.train_loss, 1e-3)),
        "eval_loss": log(end["eval_loss"].value / max(outlook.end.eval_loss, 1e-3)),
        "accuracy": scale("accuracy", end["accuracy"].value) - scale("accuracy", outlook.end.eval_accuracy),
    }
    points = []
    before = 0
    for number, loss, accuracy in zip(course.steps, course.eval_loss, course.eval_accuracy, strict=True):
        share = number / course.steps[-1]
        batches = course.batch_loss[before:number]
        points.append(
            CurvePoint(
                number,
                float(np.mean(batches)) * exp(share * shift["train_loss"]) if batches and of_training else None,
                loss * exp(share * shift["eval_loss"]),
                unscale("accuracy", scale("accuracy", accuracy) + share * shift["accuracy"]) if share else accuracy,
            )
        )
        before = number
    return Curve(tuple(points), forecast)


def write_curve(curve: Curve, path: Path) -> None:
    """Write a curve as CSV.

    Args:
        curve: Curve.
        path: File.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for point in curve.points:
            train = "" if point.train_loss is None else f"{point.train_loss:.6g}"
            writer.writerow([point.step, train, f"{point.eval_loss:.6g}", f"{point.eval_accuracy:.6g}"])
