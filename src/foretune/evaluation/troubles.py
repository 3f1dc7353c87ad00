"""Runs that collapsed or had no effect, and how well that was told before, each data set by the others."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import numpy as np

from foretune.evaluation.collapses import baseline_of, rate_of, risks_of, steps_of
from foretune.evaluation.held_out import HeldOutForecasts, Judged
from foretune.forecasting.calibration import RunForecast
from foretune.forecasting.cautions import Moving, cautions
from foretune.forecasting.reach import INSIDE
from foretune.forecasting.risk import MARGIN, Risk
from foretune.report.tables import Table
from foretune.tasks.metrics import main_metric

BINS = (0.0, 0.2, 0.5, 0.8, 1.0)  # of the probability that is told


@dataclass(frozen=True)
class TroubleQuality:
    """How well it was told that a run would collapse or have no effect.

    Attributes:
        spent: Whether with trials.
        runs: Runs.
        troubled: Those that ended less than two points above what costs nothing.
        auc: Area under the curve of the probability that was told; NaN where none or all were in trouble.
        bins: For each range of the probability: runs, its mean and the share in trouble.
    """

    spent: bool
    runs: int
    troubled: int
    auc: float
    bins: tuple[tuple[int, float, float], ...]


def trouble_qualities(held_out: HeldOutForecasts) -> tuple[TroubleQuality, ...]:
    """Compare what was told with what came.

    The probability is that of a collapse, or else of ending less than two points above what costs nothing.

    Args:
        held_out: Forecasts of a study, each by a calibration that knows no run of its data set.

    Returns:
        Without trials, and with the dearest trials of each cell; only what there is.
    """
    by_family = risks_of(held_out.records)
    degrees = len({record.family for record in held_out.records}) - 2
    plain: dict[str, Judged] = {}
    tried: dict[str, Judged] = {}
    for one in held_out.judged:
        chosen = tried if one.trials else plain
        before = chosen.get(one.record.key)
        if before is None or one.spend > before.spend:
            chosen[one.record.key] = one
    found = []
    for spent, judged in ((False, plain), (True, tried)):
        pairs = [pair for one in judged.values() if (pair := _pair(one, by_family[one.record.family], degrees))]
        if pairs:
            found.append(_quality(spent, pairs))
    return tuple(found)


def _pair(one: Judged, risk: Risk | None, degrees: float) -> tuple[float, bool] | None:
    """Probability of trouble, and whether it came."""
    record, baseline = one.record, baseline_of(one.record)
    if baseline is None or not one.levels:
        return None
    metric = main_metric(record.kind).name
    forecast = RunForecast(one.levels, (one.levels[metric].value, one.levels["eval_loss"].value), INSIDE, record.kind)
    told = {
        caution.trouble: caution.probability
        for caution in cautions(
            forecast, degrees, baseline=baseline, risk=risk, run=Moving(rate_of(record), steps_of(record))
        )
    }
    fails = told["no effect"] + told["worse"]
    collapse = told.get("collapse", 0.0)
    return collapse + (1.0 - collapse) * fails, one.case.outcomes[metric] < baseline + MARGIN


def _quality(spent: bool, pairs: Sequence[tuple[float, bool]]) -> TroubleQuality:
    from sklearn.metrics import roc_auc_score

    told, came = (np.array(column) for column in zip(*pairs, strict=True))
    auc = float(roc_auc_score(came, told)) if 0 < came.sum() < len(came) else nan
    bins = []
    for low, high in itertools.pairwise(BINS):
        there = (told >= low) & ((told < high) | (high == BINS[-1]))
        share, mean = (float(came[there].mean()), float(told[there].mean())) if there.any() else (nan, nan)
        bins.append((int(there.sum()), mean, share))
    return TroubleQuality(spent, len(came), int(came.sum()), auc, tuple(bins))


def trouble_table(held_out: HeldOutForecasts) -> Table:
    """Lay out how well trouble was told.

    Args:
        held_out: Forecasts of a study.

    Returns:
        A row for the forecasts without trials, and one for those with; empty where nothing is known.
    """
    rows = [
        (
            "with trials" if one.spent else "without training",
            str(one.runs),
            str(one.troubled),
            "–" if np.isnan(one.auc) else f"{one.auc:.2f}",
            *("–" if not n else f"{mean:.0%} → {share:.0%} ({n})" for n, mean, share in one.bins),
        )
        for one in trouble_qualities(held_out)
    ]
    caption = (
        "Warnings that a run collapses or ends less than 2 points above what costs nothing (the head alone, one "
        "prediction for all), each data set by the others. In the columns of the probability that was told: its mean "
        "→ the share of runs that were in trouble (runs)."
    )
    header = (
        "told",
        "runs",
        "in trouble",
        "AUC",
        *(f"{low:.0%} to {high:.0%}" for low, high in itertools.pairwise(BINS)),
    )
    return Table(caption, header, tuple(rows))
