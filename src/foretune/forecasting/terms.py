"""What a forecast without trials is made of: the simulated run, and what finished runs on other data add to it.

On the scale of `foretune.forecasting.outcomes`, with s the end of the simulated run, w = min(1, movement) and, for N
training rows and n known ones, c = (1 − √(n/N)) / (√2 − 1),

    y = s + β_0 w (probe − s) + β_1 c w (probe − s) + error.

A run that hardly moves its adapter is linear, as the simulation takes it to be, and w leaves it alone. With N > n the
simulated run sees the n rows again where the real one sees new ones, and overfits them: s is then the best of its
evaluation losses, and of its metrics, after each half of an epoch (the training loss stays that of the end). What the
new rows add to that is the last term: it goes on from the probe past the simulated run, by c, what is still to come
from n to N rows in units of what came from n/2 to n where that which lacks falls as one over the root of the rows; c
is never more than 2.4. Both terms are bounded by their scale, and the last one counts only as far as the fit has seen
it.
"""

from collections.abc import Mapping

import numpy as np

from foretune.arrays import Array
from foretune.forecasting.outcomes import LOSSES, Outcome, scale
from foretune.settings.groups import TaskKind

TERMS = ("probe", "more_rows")


def terms(outcome: Outcome, values: Mapping[str, float], kind: TaskKind = "classification") -> tuple[float, Array]:
    """Lay out one case for the fit.

    Args:
        outcome: Which outcome.
        values: From `case_values`.
        kind: Kind of task.

    Returns:
        s, and x in the order of `TERMS`.
    """
    of_best = values["doublings"] > 0.0 and outcome != "train_loss"
    s = scale(outcome, values[f"{'best' if of_best else 'simulated'}_{outcome}"], kind)
    probe = scale(outcome, values["probe_loss" if outcome in LOSSES else f"probe_{outcome}"], kind)
    moved = min(1.0, values["movement"])
    to_come = (1.0 - 2.0 ** (-values["doublings"] / 2.0)) / (2.0**0.5 - 1.0)
    return s, moved * (probe - s) * np.array([1.0, to_come])


def within_limits(x: Array, limits: tuple[float, float]) -> Array:
    """Keep the last term within what a fit has seen.

    Args:
        x: Terms, one case or a row for each.
        limits: Least and largest value of the last term.

    Returns:
        The same with the last one clipped.
    """
    kept = x.copy()
    kept[..., -1] = np.clip(x[..., -1], *limits)
    return kept
