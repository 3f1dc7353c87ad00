"""What trials say of a row beyond its own forecast: that it collapsed, and how much rows without a trial are off.

On the scale of `foretune.forecasting.outcomes`, with p_i the forecast of a tried adapter and recipe without its trials,
y_i that with them, and k of them, a forecast p of one that was not tried becomes

    y = p + k / (k + 1) · (1/k) Σ_i (y_i − p_i),

each outcome by itself: forecasts of one model and data set err together, and few trials say less of it than many.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import fsum, isfinite

from foretune.forecasting.calibration import Interval, RunForecast
from foretune.forecasting.outcomes import Outcome, scale, unscale
from foretune.forecasting.risk import MARGIN
from foretune.forecasting.shown import Shown
from foretune.tasks.metrics import Metric

FITTED = 0.99  # of the loss of one answer for all: below it a run has begun to fit its own rows
_ROUNDING = 1e-9  # 0.70 − 0.68 is a little less than 0.02


def mean_shift(pairs: Sequence[tuple[RunForecast, RunForecast]]) -> dict[Outcome, float]:
    """Say by how much forecasts without trials are off, on the scale, shrunk towards 0.

    Args:
        pairs: Of each tried adapter and recipe the forecast without its trials, and that with them.

    Returns:
        k/(k + 1) times the mean difference, by outcome; k counts the pairs that both know it. Where a level is
        withheld, what the pair is ordered by stands for it.
    """
    differences: dict[Outcome, list[float]] = {}
    for without, with_trials in pairs:
        before, after, kind = _values(without), _values(with_trials), without.kind
        for outcome in before.keys() & after.keys():
            difference = scale(outcome, after[outcome], kind) - scale(outcome, before[outcome], kind)
            if isfinite(difference):
                differences.setdefault(outcome, []).append(difference)
    return {outcome: fsum(known) / (len(known) + 1) for outcome, known in differences.items()}


def _values(forecast: RunForecast) -> dict[Outcome, float]:
    if forecast.levels is not None:
        return {name: level.value for name, level in forecast.levels.items()}
    return {forecast.metric.name: forecast.order[0], "eval_loss": forecast.order[1]}


def shifted(forecast: RunForecast, by: Mapping[Outcome, float]) -> RunForecast:
    """Shift a forecast with its intervals.

    Args:
        forecast: Forecast without trials.
        by: From `mean_shift`; an outcome that is not there stays.

    Returns:
        The forecast; the order as well, where levels are withheld too. One that was not calibrated stays as it is.
    """
    if not forecast.calibrated or not any(by.values()):
        return forecast
    kind = forecast.kind

    def move(outcome: Outcome, value: float) -> float:
        step = by.get(outcome, 0.0)
        return value if not step or not isfinite(value) else unscale(outcome, scale(outcome, value, kind) + step)

    levels = None
    if forecast.levels is not None:
        levels = {
            name: Interval(move(name, level.value), move(name, level.low), move(name, level.high))
            for name, level in forecast.levels.items()
        }
    order = (move(forecast.metric.name, forecast.order[0]), move("eval_loss", forecast.order[1]))
    return replace(forecast, levels=levels, order=order)


def collapsed_at(
    shown: Sequence[Shown], metric: Metric, floors: Sequence[float | None], unlearned: float
) -> int | None:
    """Tell whether a trial collapsed.

    A loss that is not finite is a collapse on any number of rows. Else the largest trial counts: it collapsed if it
    ended at least two points of the metric below something that costs nothing, its training loss 1% below that of one
    answer for all or higher. A trial that begins to fit its rows, and does not carry over to others yet, has not
    collapsed: that is what more rows are for.

    Args:
        shown: Trials of one adapter and recipe.
        metric: Main metric.
        floors: What costs nothing: one answer for all, the head alone on no more rows; None where that is not known.
        unlearned: Training loss of one answer for all.

    Returns:
        Rows of that trial; None where none collapsed.
    """
    for one in shown:
        if one.diverged:
            return one.rows
    if not shown:
        return None
    last = max(shown, key=lambda one: one.rows)
    if last.outcomes["train_loss"] < FITTED * unlearned:
        return None
    value = last.outcomes[metric.name]
    known = [floor for floor in floors if floor is not None and isfinite(floor)]
    if not isfinite(value):  # of numbers: all the same, so that there is no correlation
        return last.rows
    below = any(metric.better * (floor - value) >= MARGIN - _ROUNDING for floor in known)
    return last.rows if below else None
