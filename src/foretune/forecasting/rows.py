"""How many rows are enough: the forecast of one recipe over the number of its training rows.

Every listed N has the schedule of that many rows and a simulated run of its own, from one pass over the known rows and
with their order drawn from one seed, so that what differs between two N is N. A run of fewer rows than are known sees
so many of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan
from typing import Any

import numpy as np

from foretune.arrays import Array
from foretune.forecasting.calibration import Calibration, RunForecast, apply_calibration
from foretune.forecasting.linearise import Linearised, first_examples
from foretune.forecasting.reach import Run
from foretune.forecasting.schedule import Schedule, schedule_of
from foretune.forecasting.shown import Shown
from foretune.forecasting.simulated_runs import case_values, kind_of, simulate_runs
from foretune.problem import Plan
from foretune.settings.groups import Recipe
from foretune.tasks.metrics import EVAL_LOSS, PERPLEXITY, Metric

POINT = 0.01  # of the metric: what a doubling must gain to be worth it
ROUNDING = 1e-9


@dataclass(frozen=True)
class RowsPoint:
    """Forecast of the run on one number of rows.

    Attributes:
        rows: Training rows N.
        forecast: Forecast at the end; its levels are None where N is too far from what the calibration has seen.
    """

    rows: int
    forecast: RunForecast

    def to_dict(self) -> dict[str, Any]:
        """Lay out as in `result.json`.

        Returns:
            JSON-ready values: rows, levels and reach.
        """
        return {"rows": self.rows, **self.forecast.to_dict()}


@dataclass(frozen=True)
class RowsCurve:
    """The forecast over training rows.

    Attributes:
        points: One for each listed number of rows, rising.
        enough: The least of them from which on more rows gain less than a point; None if there is none.
        sentence: The same in words.
    """

    points: tuple[RowsPoint, ...]
    enough: int | None
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """Lay out as in `result.json`.

        Returns:
            JSON-ready values.
        """
        return {
            "points": [point.to_dict() for point in self.points],
            "enough": self.enough,
            "sentence": self.sentence,
        }


@dataclass(frozen=True)
class Listed:
    """One listed number of rows, before the work.

    Attributes:
        schedule: Schedule of the run on so many rows.
        run: What kind of run it is.
        withheld: Forecast of a run that is too far from what the calibration has seen to simulate it; else None.
        shown: Trials on no more rows.
    """

    schedule: Schedule
    run: Run
    withheld: RunForecast | None
    shown: tuple[Shown, ...] = ()

    @property
    def steps(self) -> int:
        """Steps that are simulated."""
        return 0 if self.withheld is not None else self.schedule.steps


def list_rows(
    plan: Plan, settings: Recipe, calibration: Calibration, rows: Sequence[int], *, shown: Sequence[Shown] = ()
) -> tuple[Listed, ...]:
    """Say what is to be simulated.

    Args:
        plan: The placed adapter and the known rows.
        settings: How the run trains.
        calibration: Calibration of the forecasts.
        rows: Numbers of rows; that of the plan's own run is not simulated a second time.
        shown: What trials of this adapter showed: those on no more rows than a run has tell of it.

    Returns:
        One for each number that is not the plan's own.
    """
    speeds = [site.scaling * site.rank for site in plan.adapted.sites]
    listed = []
    for n_rows in rows:
        if n_rows == plan.train_rows:
            continue
        schedule = schedule_of(settings, n_rows, seed=plan.settings.seed)
        kind = kind_of(plan, schedule)
        known, rate = min(kind.known_rows, n_rows), kind.learning_rate * max(speeds)
        run = replace(kind, known_rows=known, update_rate=rate)
        withheld = None
        told = tuple(one for one in shown if one.rows <= n_rows)
        if calibration.domain is not None and (far := calibration.reach(run)).withheld:
            withheld = RunForecast(None, (nan, nan), far, run.kind, calibrated=run.kind == calibration.kind)
        listed.append(Listed(schedule, run, withheld, told))
    return tuple(listed)


def forecast_rows(
    listed: Sequence[Listed],
    calibration: Calibration,
    model: Callable[[], Linearised],
    *,
    on_step: Callable[[], None] | None = None,
) -> tuple[RowsPoint, ...]:
    """Forecast the run on every listed number of rows.

    Args:
        listed: From `list_rows`.
        calibration: Calibration of the forecasts.
        model: Gives the linearised model; called only where a run is simulated.
        on_step: Called after each simulated step.

    Returns:
        Forecasts, in the order of the list.
    """
    points = []
    for entry in listed:
        forecast = entry.withheld
        if forecast is None:
            whole = model()
            linearised = replace(whole, train=first_examples(whole.train, entry.run.known_rows))
            start = linearised.start(range(len(linearised.sites)))
            (simulated,) = simulate_runs(linearised, [start], entry.schedule, on_step=on_step)
            output = whole.train.factors.reduction.name
            values = case_values(simulated)
            forecast = apply_calibration(calibration, values, output, run=entry.run, shown=entry.shown)
        points.append(RowsPoint(entry.schedule.train_rows, forecast))
    return tuple(points)


def rows_curve(points: Sequence[RowsPoint]) -> RowsCurve:
    """Say from where on more rows gain less than a point.

    The main metric, or of a language model the evaluation loss, is taken as improving with N (isotonic regression, so
    that noise is no gain and no loss) and as linear in log N in between. `enough` is the least listed N that has a
    doubling within the list, and from which on every doubling within it gains less than 0.01.

    Args:
        points: Forecasts, one or more, by rising rows.

    Returns:
        The curve.
    """
    from sklearn.isotonic import IsotonicRegression

    forecast = points[0].forecast
    metric = EVAL_LOSS if forecast.metric == PERPLEXITY else forecast.metric
    known = [(point, levels[metric.name]) for point in points if (levels := point.forecast.levels) is not None]
    known = [(point, interval) for point, interval in known if isfinite(interval.value)]
    if not known:
        sentence = "No level is forecast for any of these numbers of rows, so how many are enough is not known."
        return RowsCurve(tuple(points), None, sentence)
    rows = [point.rows for point, _ in known]
    at = np.log2(rows)
    values = np.array([interval.value for _, interval in known])
    risen = np.asarray(IsotonicRegression(increasing=metric.better > 0).fit_transform(at, values), dtype=np.float64)
    risen = metric.better * risen
    whole = float(risen[-1] - risen[0])
    enough = next((n for n, x in zip(rows, at, strict=True) if _most_gain(at, risen, x) < POINT), None)
    sentences = [_of_gain(rows, at, risen, enough, metric)]
    _, last = known[-1]
    band = last.high - last.low
    if rows[1:] and band > whole:
        sentences.append(
            f"The 90% band at {rows[-1]:,} rows, {_amount(band, metric)} wide, is wider than the gain from "
            f"{rows[0]:,} rows to there, {_amount(whole, metric)}."
        )
    lacking = [f"{point.rows:,}" for point in points if point.rows not in rows]
    if lacking:
        sentences.append(f"No level is forecast for {_and(lacking)} rows.")
    return RowsCurve(tuple(points), enough, " ".join(sentences))


def _most_gain(at: Array, risen: Array, start: float) -> float:
    """Largest gain of a doubling that lies between `start` and the end; infinite where none does."""
    # between its knots the curve is linear, so that the gain is largest where a doubling begins or ends at a knot
    ends = np.concatenate([at, at - 1.0, [start]])
    begins = ends[(ends >= start - ROUNDING) & (ends <= at[-1] - 1.0 + ROUNDING)]
    gains = np.interp(begins + 1.0, at, risen) - np.interp(begins, at, risen)
    return float(gains.max(initial=-np.inf)) if len(begins) else np.inf


def _of_gain(rows: Sequence[int], at: Array, risen: Array, enough: int | None, metric: Metric) -> str:
    point = "a point" if metric.percent else f"{POINT:g}"
    if enough is not None:
        return f"From {enough:,} rows on, twice as many gain less than {point} of {metric.label}."
    if at[-1] - at[0] < 1.0 - ROUNDING:
        return (
            f"How many rows are enough is not known: levels from {rows[0]:,} to {rows[-1]:,} rows hold no doubling, "
            f"name some from {rows[0]:,} to {2 * rows[0]:,} and beyond."
        )
    last = float(risen[-1] - np.interp(at[-1] - 1.0, at, risen))
    gains = f"the last doubling, to {rows[-1]:,} rows, gains {_amount(last, metric)} of {metric.label}"
    if last < POINT:  # flat at the end, but the listed numbers that have a doubling lie before that
        return f"From each listed number that has a doubling in the list some gains {point} or more, though {gains}."
    return f"No listed number of rows is enough: {gains}."


def _amount(value: float, metric: Metric) -> str:
    return f"{100 * value:.1f} points" if metric.percent else f"{value:.3f}"


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
