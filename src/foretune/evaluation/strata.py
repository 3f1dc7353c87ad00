"""How good forecasts were at each distance: by rows of the run over known rows, and by what was spent on trials."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, nan

import numpy as np
from scipy.stats import binomtest

from foretune.arrays import Array
from foretune.evaluation.held_out import HeldOutForecasts, Judged, rank_correlation
from foretune.forecasting.outcomes import Outcome
from foretune.report.tables import Table
from foretune.tasks.metrics import Metric, main_metric

RATIOS = (1.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)  # ends of the strata of N/n
SPENDS = (0.02, 0.05, 0.15, 0.35)  # of a run's rows, for each adapter


@dataclass(frozen=True)
class Stratum:
    """Forecasts at one distance against what the runs gave.

    Attributes:
        name: Which distance.
        forecasts: How many.
        groups: Data sets.
        error: Mean absolute error of the main metric.
        loss_error: Mean of |forecast − real| / real of the evaluation loss.
        bias: Mean of forecast less outcome, of the main metric.
        covered: Share of the main metric's outcomes within the 90% interval, with its 95% interval (Wilson).
        loss_covered: The same of the evaluation loss.
        width: Mean width of the main metric's interval.
        spearman: ρ of forecast and outcome over all.
        as_shown: Mean absolute error of the trial's own value; NaN without trials.
    """

    name: str
    forecasts: int
    groups: int
    error: float
    loss_error: float
    bias: float
    covered: tuple[float, float, float]
    loss_covered: tuple[float, float, float]
    width: float
    spearman: float
    as_shown: float


def by_distance(held_out: HeldOutForecasts, *, withheld: bool = False) -> dict[str, list[Judged]]:
    """Part the forecasts of a study by distance.

    Args:
        held_out: Forecasts, each by a calibration that knows no run of its data set.
        withheld: Whether to take those of runs that were likelier to collapse than not, too.

    Returns:
        By the name of the stratum: those without trials by N/n, then those with trials by their spend; of several sets
        of trials of one cell within a stratum the dearest. Strata without forecasts are left out. Each model has its
        own, named after it where there are several.
    """
    every = [one for one in held_out.judged if withheld or not one.withheld]
    models = sorted({one.record.model for one in every})
    found: dict[str, list[Judged]] = {}
    for model in models:
        parted = _parted([one for one in every if one.record.model == model])
        found |= {name if len(models) == 1 else f"{model}: {name}": judged for name, judged in parted.items()}
    return found


def _parted(every: Sequence[Judged]) -> dict[str, list[Judged]]:
    found = {}
    plain = [one for one in every if not one.trials]
    for low, high in zip((0.0, *RATIOS), RATIOS, strict=False):
        there = [one for one in plain if low < one.rows_ratio / 1.05 <= high]  # rows are round, ratios are not
        if there:
            found[f"N/n ≤ {high:g}"] = there
    for low, high in zip((0.0, *SPENDS), (*SPENDS, 1.0), strict=True):
        dearest: dict[str, Judged] = {}
        for one in every:
            before = dearest.get(one.record.key)
            if one.trials and low < one.spend <= high and (before is None or one.spend > before.spend):
                dearest[one.record.key] = one
        if dearest:
            found[f"spend ≤ {high:.0%}"] = list(dearest.values())
    return found


def strata(held_out: HeldOutForecasts) -> tuple[Stratum, ...]:
    """Judge the forecasts of a study at each distance.

    Args:
        held_out: Forecasts, each by a calibration that knows no run of its data set.

    Returns:
        One for each distance.
    """
    return tuple(_stratum(name, judged) for name, judged in by_distance(held_out).items())


def _stratum(name: str, judged: Sequence[Judged]) -> Stratum:
    kind = judged[0].record.kind
    metric = main_metric(kind).name
    value, real = _column(judged, metric), _real(judged, metric)
    loss, real_loss = _column(judged, "eval_loss"), _real(judged, "eval_loss")
    shown = [one.trials[0].outcomes[metric] for one in judged if one.trials]
    return Stratum(
        name=name,
        forecasts=len(judged),
        groups=len({one.record.family for one in judged}),
        error=float(np.abs(value - real).mean()),
        loss_error=float((np.abs(loss - real_loss) / real_loss).mean()),
        bias=float((value - real).mean()),
        covered=_covered(judged, metric),
        loss_covered=_covered(judged, "eval_loss"),
        width=float(np.mean([one.levels[metric].high - one.levels[metric].low for one in judged])),
        spearman=rank_correlation(value, real),
        as_shown=float(np.abs(np.array(shown) - real).mean()) if len(shown) == len(judged) else nan,
    )


def _column(judged: Sequence[Judged], outcome: Outcome) -> Array:
    return np.array([one.levels[outcome].value for one in judged])


def _real(judged: Sequence[Judged], outcome: Outcome) -> Array:
    return np.array([one.case.outcomes[outcome] for one in judged])


def _covered(judged: Sequence[Judged], outcome: Outcome) -> tuple[float, float, float]:
    held = sum(one.levels[outcome].low <= one.case.outcomes[outcome] <= one.levels[outcome].high for one in judged)
    ends = binomtest(held, len(judged)).proportion_ci(method="wilson")
    return held / len(judged), float(ends.low), float(ends.high)


def unit_of(metric: Metric) -> tuple[float, int]:
    """Say how a difference of a metric is written.

    Args:
        metric: Metric.

    Returns:
        Factor and digits: points of a share, three digits of all else.
    """
    return (100.0, 1) if metric.percent else (1.0, 3)


def points_of(metric: Metric) -> Callable[[float], str]:
    """Say how differences of a metric are written.

    Args:
        metric: Metric.

    Returns:
        Writes one; a dash for NaN.
    """
    unit, digits = unit_of(metric)
    return lambda value: f"{unit * value:.{digits}f}" if isfinite(value) else "–"


def rho_in_words(value: float) -> str:
    """Write a correlation.

    Args:
        value: ρ.

    Returns:
        Two digits with their sign; a dash for NaN.
    """
    return f"{value:+.2f}" if isfinite(value) else "–"


def strata_table(held_out: HeldOutForecasts) -> Table:
    """Lay out how good forecasts were at each distance.

    Args:
        held_out: Forecasts.

    Returns:
        A row for each stratum; empty without forecasts.
    """
    metric = main_metric(held_out.records[0].kind)
    points = points_of(metric)

    def share(three: tuple[float, float, float]) -> str:
        return f"{three[0]:.0%} [{three[1]:.0%}, {three[2]:.0%}]"

    rows = [
        (
            one.name,
            str(one.forecasts),
            str(one.groups),
            points(one.error),
            points(one.as_shown),
            points(one.bias),
            f"{one.loss_error:.0%}",
            share(one.covered),
            share(one.loss_covered),
            points(one.width),
            rho_in_words(one.spearman),
        )
        for one in strata(held_out)
    ]
    caption = (
        f"Forecasts by distance, each data set by a calibration fitted on the others; {metric.label}"
        f"{' in points' if metric.percent else ''}. N/n: training rows for each known one, without training. spend: "
        "rows of the trials over those of the run, for each adapter. as shown: error of the trial's own value. "
        "in interval: of 90%, with its 95% Wilson interval. Runs that were told to collapse with a probability of 50% "
        "or more have no level, and are left out."
    )
    header = (
        "distance",
        "forecasts",
        "data sets",
        "error",
        "as shown",
        "bias",
        "eval loss, relative",
        "in interval",
        "eval loss in interval",
        "width",
        "ρ, all",
    )
    return Table(caption, header, tuple(rows))
