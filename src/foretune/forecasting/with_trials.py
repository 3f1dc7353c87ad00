"""What trials add to a forecast: a real run on few rows can show that more is to be had than was forecast.

On the scale of `foretune.forecasting.outcomes`, with p the forecast without trials, t what the trial on the most rows
n' showed, q what one on a quarter of these rows or fewer showed, and h = √(n'/N),

    y = p + γ_0 min(1, 2 h) [t better than p] + γ_1 h (t − q) 2 / log2(n'/q's rows) + error,

    0 ≤ γ_0 ≤ 1,    0 ≤ γ_1 ≤ 2,    error² ~ a² + b² log2(N/n')²,

[t better than p] being t − p where that is an improvement (a larger metric, a smaller loss) and else 0: a trial on few
rows takes few steps and mostly ends below what many rows reach, so that a bad one says little, and a good one much. γ
is shrunk towards 0, that is towards the forecast without trials; the first term never goes beyond the trial.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, log2, sqrt

import numpy as np

from foretune.arrays import Array
from foretune.forecasting.outcomes import LOSSES, Outcome, scale
from foretune.forecasting.reach import Domain, Reach, Run, reach
from foretune.forecasting.shown import Shown
from foretune.settings.groups import TaskKind
from foretune.tasks.metrics import main_metric

TRIAL_TERMS = ("better", "slope")
BOUNDS = ((0.0, 0.0), (1.0, 2.0))  # of γ, the least and the most
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


def together(shown: Sequence[Shown], kind: TaskKind) -> Trials | None:
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


def _mean(shown: Sequence[Shown], kind: TaskKind) -> Mapping[Outcome, float] | None:
    values = [{name: scale(name, value, kind) for name, value in one.outcomes.items()} for one in shown]
    if any(one.diverged for one in shown) or not all(isfinite(value) for one in values for value in one.values()):
        return None
    return {name: float(np.mean([one[name] for one in values])) for name in values[0]}


def trial_terms(outcome: Outcome, trials: Trials, plain: float, train_rows: int, kind: TaskKind) -> tuple[float, Array]:
    """Lay out one run for the fit.

    Args:
        outcome: Which outcome.
        trials: What its trials showed.
        plain: Forecast without trials p, on the scale.
        train_rows: Rows N of the run.
        kind: Kind of task.

    Returns:
        p, and x in the order of `TRIAL_TERMS`.
    """
    t, h = trials.at[outcome], sqrt(min(1.0, trials.rows / train_rows))
    direction = -1 if outcome in LOSSES else main_metric(kind).better
    better = direction * max(0.0, direction * (t - plain))
    slope = 0.0
    if trials.smaller is not None:
        slope = (t - trials.below[outcome]) * 2.0 / log2(trials.rows / trials.smaller)
    return plain, np.array([min(1.0, 2.0 * h) * better, h * slope])


def reach_of_trials(domain: Domain, run: Run, trials: Trials) -> Reach:
    """Compare a run of which trials are known with what a calibration has seen.

    Args:
        domain: What the calibration's runs with trials have shown.
        run: What the forecast is for.
        trials: What its trials showed.

    Returns:
        As `reach`, with the rows of the trial for known ones.
    """
    return reach(domain, replace(run, known_rows=trials.rows), trial=True)
