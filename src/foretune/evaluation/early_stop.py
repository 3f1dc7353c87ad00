"""Early stop: the end of a run extrapolated from its first steps, the baseline that costs a share of the fine-tune."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from foretune.arrays import Array
from foretune.report.curves import Step
from foretune.tasks.readout import minimise_over

POWERS = np.geomspace(2.0, 0.1, 27)  # c; of equal fits the one that levels off soonest
LEAST_STEPS = 3  # different ones, for a fit


@dataclass(frozen=True)
class RunLog:
    """What a finished run logged.

    Attributes:
        steps: Training loss over steps.
        epochs: Step, loss and main metric of each evaluation.
        total: Steps of the run.
    """

    steps: Sequence[Step]
    epochs: Sequence[tuple[int, float, float]]
    total: int


Forecast = Callable[[RunLog, float], float | None]  # of the end, from a share of the steps


def early_train_loss(log: RunLog, share: float) -> float | None:
    """Extrapolate the training loss from the first steps.

    Args:
        log: Log of the run.
        share: Share of its steps that may be looked at.

    Returns:
        Forecast in nats; None where there is nothing to extrapolate.
    """
    first = [step for step in log.steps if step.step <= share * log.total]
    value = extrapolate([step.step for step in first], [step.loss for step in first], log.total)
    return value if isfinite(value) else None


def early_eval_loss(log: RunLog, share: float) -> float | None:
    """Take the loss of the last evaluation within the first steps.

    Args:
        log: Log of the run.
        share: Share of its steps that may be looked at.

    Returns:
        Nats; None before the first epoch ends, when there is no evaluation after training began.
    """
    evaluation = _last_evaluation(log, share)
    return None if evaluation is None else evaluation[1]


def early_metric(log: RunLog, share: float) -> float | None:
    """Take the main metric of the last evaluation within the first steps.

    Args:
        log: Log of the run.
        share: Share of its steps that may be looked at.

    Returns:
        Its value; None before the first epoch ends, when there is no evaluation after training began.
    """
    evaluation = _last_evaluation(log, share)
    return None if evaluation is None else evaluation[2]


def _last_evaluation(log: RunLog, share: float) -> tuple[int, float, float] | None:
    within = [epoch for epoch in log.epochs if 0 < epoch[0] <= share * log.total]
    return within[-1] if within else None


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
    if len(np.unique(t)) < LEAST_STEPS or np.ptp(y) == 0.0:
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
