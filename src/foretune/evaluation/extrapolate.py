"""Early stop: the end of a run extrapolated from its first steps."""

from collections.abc import Sequence

import numpy as np

from foretune.arrays import Array
from foretune.tasks.readout import minimise_over

POWERS = np.geomspace(2.0, 0.1, 27)  # c; of equal fits the one that levels off soonest
LEAST = 3


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
