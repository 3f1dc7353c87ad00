"""Early stop: the end of a run extrapolated from its first steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foretune.errors import ConfigError
from foretune.regression import minimise_over
from foretune.tuning.curves import Epoch, History

Array = NDArray[np.float64]

POWERS = np.geomspace(2.0, 0.1, 27)  # c; of equal fits the one that levels off soonest
LEAST = 3


@dataclass(frozen=True)
class EarlyForecast:
    """What a part of a run says of its end; losses in nats, accuracies as fractions, None where nothing was seen.

    Attributes:
        train_loss: Mean training loss of the last epoch, in train mode.
        eval_loss: Loss on the evaluation rows after the last epoch.
        eval_accuracy: Accuracy on them.
        steps: Optimiser steps of the part.
        records: Records of the training loss in it.
        evaluations: Evaluations in it, with the one before training.
    """

    train_loss: float | None
    eval_loss: float | None
    eval_accuracy: float | None
    steps: int
    records: int
    evaluations: int


def extrapolate(steps: Sequence[float] | Array, values: Sequence[float] | Array, at_step: float) -> float:
    """Fit value(t) = a + b·t^(−c) to what was observed and read it off at a later step.

    Least squares over a, b and c in [0.1, 2]: for each c the best a and b are those of a straight line in t^(−c), and
    c minimises what remains. Points at t ≤ 0 have no place on the curve and are left out of the fit, as are values that
    are not finite.

    Args:
        steps: Steps t of the points, in any order and unit.
        values: Their values.
        at_step: Step to forecast, above 0.

    Returns:
        Forecast in the unit of the values; the last finite value observed where fewer than 3 different steps can be
        fitted, NaN where there is none.
    """
    t, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    order = np.argsort(t, kind="stable")
    t, y = t[order], y[order]
    t, y = t[np.isfinite(y)], y[np.isfinite(y)]
    if len(y) == 0:
        return float("nan")
    last = float(y[-1])
    t, y = t[t > 0.0], y[t > 0.0]
    if len(np.unique(t)) < LEAST or np.ptp(y) == 0.0:
        return last
    offset, spread = float(y[-1]), float(np.ptp(y))
    t, at, y = t / t[-1], float(at_step) / float(t[-1]), (y - offset) / spread

    def line(power: float) -> tuple[float, float]:
        x = t**-power - np.mean(t**-power)
        slope = float(x @ y / (x @ x))
        return float(np.mean(y) - slope * np.mean(t**-power)), slope

    def error(power: float) -> float:
        level, slope = line(power)
        return float(np.sum((level + slope * t**-power - y) ** 2))

    power = minimise_over(error, POWERS)
    level, slope = line(power)
    return offset + spread * float(level + slope * at**-power)


def early_stop(history: History, share: float) -> EarlyForecast:
    """Forecast the end of a run from the part of it that the first steps are.

    The training loss is extrapolated from its records, each placed at the middle of the steps that it is the mean of,
    to the middle of the last epoch; its value is kept at 0 or above. Where none lies within the part, the training
    rows' loss in eval mode at the last evaluation is taken, if it is there. Evaluation loss and accuracy are
    extrapolated from the evaluations within the part to the last step, and kept at 0 or above and in 0 … 1. The
    evaluation before training counts as seen, but not for the fit: with it alone the forecast is its value.

    Args:
        history: A run to its end; what comes after the part is used for its number of steps and epochs alone.
        share: Part of the steps to look at, above 0 and at most 1.

    Returns:
        Forecasts.

    Raises:
        ConfigError: If the share is out of range, or nothing was recorded.
    """
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"share {share} of the steps: it must lie above 0 and at most at 1")
    if not history.steps and not history.epochs:
        raise ConfigError("a history without records: give one of a run that was trained")
    total = max([*(record.step for record in history.steps), *(epoch.step for epoch in history.epochs)])
    limit = share * total * (1.0 + 1e-9)
    starts = [0, *(record.step for record in history.steps)]
    records = [record for record in history.steps if record.step <= limit]
    middles = [(start + 1 + record.step) / 2.0 for start, record in zip(starts, records, strict=False)]
    seen = [epoch for epoch in history.epochs if epoch.step <= limit]
    ends = [0, *(epoch.step for epoch in history.epochs if epoch.step < total)]
    train = extrapolate(middles, [record.loss for record in records], (max(ends) + 1 + total) / 2.0)
    if not np.isfinite(train):
        train = next((e.train_loss_eval_mode for e in reversed(seen) if e.train_loss_eval_mode is not None), np.nan)
    return EarlyForecast(
        train_loss=_within(train, np.inf),
        eval_loss=_within(_at_end(seen, [epoch.eval_loss for epoch in seen], total), np.inf),
        eval_accuracy=_within(_at_end(seen, [epoch.eval_accuracy for epoch in seen], total), 1.0),
        steps=int(limit),
        records=len(records),
        evaluations=len(seen),
    )


def _at_end(epochs: Sequence[Epoch], values: Sequence[float], total: int) -> float:
    return extrapolate([epoch.step for epoch in epochs], values, total)


def _within(value: float, high: float) -> float | None:
    return float(np.clip(value, 0.0, high)) if np.isfinite(value) else None
