"""What trials add to a forecast: a real run on n' rows is taken at its word, and the way from n' to N is calibrated.

On the scale of `foretune.forecasting.outcomes`, with t what the trial on the most rows showed, p the forecast without
trials, q what a trial on a quarter of the rows or fewer showed, and g = 1 − √(n'/N), the share of what is still to come
if that which lacks falls as one over the root of the rows,

    y = t + g (γ_0 + γ_1 (p − t) + γ_2 (t − q) 2 / log2(n'/q's rows)) + error,      error² ~ a² + b² log2(N/n')².

All terms vanish as n' goes to N, none grows without bound, and γ is shrunk towards 0, that is towards the trial.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, log2, sqrt

import numpy as np

from foretune.arrays import Array
from foretune.forecasting.outcomes import Outcome, scale
from foretune.forecasting.reach import Domain, Reach, Run, reach
from foretune.forecasting.shown import Shown
from foretune.tasks.metrics import Kind

TRIAL_TERMS = ("constant", "forecast", "slope")
NESTED = 4  # sizes of trials differ by at least this factor, for a slope


@dataclass(frozen=True)
class Trials:
    """What the trials of one adapter and recipe showed, seeds averaged on the scale of the calibration.

    Attributes:
        rows: Rows n' of the largest.
        at: What it showed, by outcome.
        smaller: Rows of the largest trial on at most a quarter of them; None if there is none.
        below: What that one showed.
    """

    rows: int
    at: Mapping[Outcome, float]
    smaller: int | None
    below: Mapping[Outcome, float]


def together(shown: Sequence[Shown], kind: Kind) -> Trials | None:
    """Put the trials of one adapter together.

    Args:
        shown: Trials.
        kind: Kind of task.

    Returns:
        The largest and a smaller one; None where there is none, or the largest diverged, which is no level to go by.
    """
    if not shown:
        return None
    rows = max(one.rows for one in shown)
    at = _mean([one for one in shown if one.rows == rows], kind)
    if at is None:
        return None
    smaller = max((one.rows for one in shown if one.rows * NESTED <= rows), default=None)
    below = None if smaller is None else _mean([one for one in shown if one.rows == smaller], kind)
    return Trials(rows, at, None if below is None else smaller, below or {})


def _mean(shown: Sequence[Shown], kind: Kind) -> Mapping[Outcome, float] | None:
    values = [{name: scale(name, value, kind) for name, value in one.outcomes.items()} for one in shown]
    if any(one.diverged for one in shown) or not all(isfinite(value) for one in values for value in one.values()):
        return None
    return {name: float(np.mean([one[name] for one in values])) for name in values[0]}


def lacking(rows: int, train_rows: int) -> float:
    """Say what is still to come from n' to N rows.

    Args:
        rows: Rows n' of a trial.
        train_rows: Rows N of the run.

    Returns:
        g = 1 − √(n'/N), 0 where the trial has all rows.
    """
    return 1.0 - sqrt(min(1.0, rows / train_rows))


def trial_terms(outcome: Outcome, trials: Trials, plain: float | None, train_rows: int) -> tuple[float, Array]:
    """Lay out one run for the fit.

    Args:
        outcome: Which outcome.
        trials: What its trials showed.
        plain: Forecast without trials, on the scale; None where that is worth nothing.
        train_rows: Rows N of the run.

    Returns:
        t, and x in the order of `TRIAL_TERMS`.
    """
    t, g = trials.at[outcome], lacking(trials.rows, train_rows)
    slope = 0.0
    if trials.smaller is not None:
        slope = (t - trials.below[outcome]) * 2.0 / log2(trials.rows / trials.smaller)
    return t, g * np.array([1.0, 0.0 if plain is None else plain - t, slope])


def reach_of_trials(domain: Domain, run: Run, trials: Trials) -> Reach:
    """Compare a run of which trials are known with what a calibration has seen.

    As in `reach`, with the rows of the trial for known ones; a model or a head that no run of the calibration had
    makes the interval twice as wide.

    Args:
        domain: What the calibration's runs with trials have shown.
        run: What the forecast is for.
        trials: What its trials showed.

    Returns:
        The distance, and a sentence for each number outside.
    """
    return reach(domain, replace(run, known_rows=trials.rows), trial=True)
