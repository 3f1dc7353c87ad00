"""Go or not: how likely a run is to beat what costs less, read off its forecast.

A forecast is a Student t on the metric's scale (`foretune.forecasting.calibration`), with middle m, 90% half-width h
and ν degrees of freedom, so that a run reaches a threshold τ with probability

    P = 1 − F_ν((τ − m) · t_ν(0.95) / h)

with F_ν the distribution function, t_ν(0.95) its 95% quantile, and τ on the same scale.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf, isfinite

import numpy as np
from scipy.special import logit, stdtr, stdtrit

from foretune.forecasting.calibration import Interval
from foretune.forecasting.risk import MARGIN
from foretune.tasks.metrics import ACCURACY, Metric


@dataclass(frozen=True)
class Verdict:
    """How likely a run is to beat one thing that costs less.

    Attributes:
        against: What it is.
        threshold: Main metric that the run must reach: that of the other and the margin.
        probability: That it does.
        sentence: The same in words.
    """

    against: str
    threshold: float
    probability: float
    sentence: str

    def to_dict(self) -> dict[str, object]:
        """Lay out as in `result.json`.

        Returns:
            JSON-ready values.
        """
        return asdict(self)


def probability_above(interval: Interval, metric: Metric, threshold: float, degrees: float) -> float:
    """How likely a run is to reach a value of its metric.

    Args:
        interval: Forecast with its 90% interval, symmetric on the metric's scale.
        metric: The metric.
        threshold: The value.
        degrees: Degrees of freedom ν.

    Returns:
        P as above; 0 or 1 beyond the ends of the metric, and for an interval without width.
    """
    middle, low, high, wanted = (
        _on_scale(metric, value) for value in (interval.value, interval.low, interval.high, threshold)
    )
    # an end that is rounded to the end of the metric says nothing of the width: the other one does
    half = max((side for side in (high - middle, middle - low) if isfinite(side)), default=0.0)
    if half == 0.0:
        return float(wanted <= middle and wanted < inf)
    return float(stdtr(degrees, (middle - wanted) * stdtrit(degrees, 0.95) / half))


def _on_scale(metric: Metric, value: float) -> float:
    """As `Metric.to_scale`, up to the ends: what is forecast is not a count of rows, and is kept within no limits."""
    if metric.scale == "logit":
        return float(logit(np.clip(value, 0.0, 1.0)))
    if metric.scale == "fisher":
        return float(0.5 * logit((1.0 + np.clip(value, -1.0, 1.0)) / 2.0))
    return value


def go_sentences(
    levels: Mapping[str, Interval] | None,
    metric: Metric,
    degrees: float,
    *,
    majority: float | None,
    head_alone: float | None,
    probe: float | None,
    margin: float = MARGIN,
) -> tuple[Verdict, ...]:
    """Judge a run against what costs less.

    What it is judged against counts as known. The forecast of the head alone errs as well, mostly in the same
    direction as that of the run, so that the probability against it is rather too near to a half.

    Args:
        levels: Forecast of the run by outcome; None where withheld.
        metric: Its main metric, of which more is better.
        degrees: Degrees of freedom of the interval.
        majority: Main metric of one prediction for all on the rows to predict.
        head_alone: Main metric that is forecast for the head without an adapter.
        probe: Main metric of a linear probe fitted on the known rows.
        margin: By how much the run must be better.

    Returns:
        A verdict against each of the three that is known; none where the level is withheld.
    """
    if levels is None:
        return ()
    interval = levels[metric.name]
    constant = "the majority class" if metric == ACCURACY else "one prediction for all"
    others = ((constant, majority), ("the head alone", head_alone), ("the linear probe", probe))
    if not all(map(isfinite, (interval.value, interval.low, interval.high))):
        return ()
    verdicts = []
    for against, value in others:
        if value is None or not isfinite(value):
            continue
        chance = probability_above(interval, metric, value + margin, degrees)
        by = f"{margin * 100:g} points" if metric.percent else f"{margin:g}"
        sentence = f"{_of_hundred(chance)} beat {against} ({metric.written(value)}) by {by} or more."
        verdicts.append(Verdict(against, value + margin, chance, sentence))
    return tuple(verdicts)


def _of_hundred(chance: float) -> str:
    """A probability as a count; certain is nothing that is forecast."""
    if chance < 0.01:
        return "Fewer than 1 of 100 runs like this"
    return "More than 99 of 100 runs like this" if chance > 0.99 else f"{chance * 100:.0f} of 100 runs like this"
