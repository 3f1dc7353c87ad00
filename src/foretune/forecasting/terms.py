"""What a forecast without trials is made of: the simulated run, and what finished runs on other data add to it.

On the scale of `foretune.forecasting.outcomes`, with s the end of the run simulated on the n known rows (all of the
run's, where it has no more), h that of the run on half of them, w = min(1, movement) and, for N training rows and n
known ones, c = (1 − √(n/N)) / (√2 − 1),

    y = s + β_0 w + β_1 w (probe − s) + β_2 c (s − h) + error.

What is still to come from n to N rows is c times what came from n/2 to n, where that which lacks falls as one over the
root of the rows: c is never more than 2.4, however many rows there are. A run that hardly moves its adapter is linear,
as the simulation takes it to be, and w leaves it alone. The last term counts only as far as the fit has seen it; the
others are bounded by their scale.
"""

from collections.abc import Mapping

import numpy as np

from foretune.arrays import Array
from foretune.forecasting.outcomes import LOSSES, Outcome, scale
from foretune.tasks.metrics import Kind

TERMS = ("constant", "probe", "more_rows")


def terms(outcome: Outcome, values: Mapping[str, float], kind: Kind = "classification") -> tuple[float, Array]:
    """Lay out one case for the fit.

    Args:
        outcome: Which outcome.
        values: From `case_values`.
        kind: Kind of task.

    Returns:
        s, and x in the order of `TERMS`.
    """
    s, half = (scale(outcome, values[f"{which}_{outcome}"], kind) for which in ("known", "half"))
    probe = scale(outcome, values["probe_loss" if outcome in LOSSES else f"probe_{outcome}"], kind)
    moved = min(1.0, values["movement"])
    to_come = (1.0 - 2.0 ** (-values["doublings"] / 2.0)) / (2.0**0.5 - 1.0)
    return s, np.array([moved, moved * (probe - s), to_come * (s - half)])


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
