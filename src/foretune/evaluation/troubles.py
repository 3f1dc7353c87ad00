"""Runs that collapsed or had no effect, and how well that was told before, each data set by the others."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan

import numpy as np

from foretune.evaluation.held_out import HeldOutForecasts, Judged
from foretune.evaluation.records import Record
from foretune.forecasting.calibration import LEAST_GROUPS, RunForecast
from foretune.forecasting.cautions import cautions
from foretune.forecasting.reach import INSIDE
from foretune.forecasting.risk import MARGIN, RateCase, Risk, fit_risk
from foretune.report.tables import Table
from foretune.tasks.metrics import main_metric

BINS = (0.0, 0.2, 0.5, 0.8, 1.0)  # of the probability that is told


def baseline_of(record: Record) -> float | None:
    """Main metric of what costs nothing: the better of the simulated head alone and one prediction for all.

    Args:
        record: Cell.

    Returns:
        The metric; None where neither is known.
    """
    metric = main_metric(record.kind).name
    known = [record.facts.get("majority_accuracy"), record.quantities.get(f"head_alone_{metric}")]
    return max((float(value) for value in known if value is not None), default=None)


def rate_cases(records: Sequence[Record]) -> list[RateCase]:
    """Take what the risk of a collapse is fitted on.

    Args:
        records: Cells of one kind of task, those that diverged among them.

    Returns:
        Cells with an adapter whose rate and baseline are known. One has collapsed if it diverged, if it ended two
        points or more below what costs nothing, or if it ended less than two points above that where the same adapter
        on the same rows ended two points or more above it at a smaller rate: the rate is then to blame.
    """
    slower: dict[tuple[object, ...], list[tuple[float, float]]] = defaultdict(list)
    told = [(record, _rate(record), baseline_of(record)) for record in records]
    known = [(record, rate, baseline) for record, rate, baseline in told if rate is not None and baseline is not None]
    for record, rate, _ in known:
        slower[_same(record)].append((rate, _value(record)))
    cases = []
    for record, rate, baseline in known:
        value = _value(record)
        best = max((other for at, other in slower[_same(record)] if at < rate), default=-inf)
        stuck = value < baseline + MARGIN and best >= value + MARGIN
        cases.append(RateCase(rate, value <= baseline - MARGIN or stuck, record.family))
    return cases


def _rate(record: Record) -> float | None:
    value = record.facts.get("update_rate") or record.quantities.get("run_update_rate")
    return None if value is None else float(value)


def _value(record: Record) -> float:
    """Main metric; nothing is worse than a run that diverged."""
    value = record.outcomes[main_metric(record.kind).name]
    return -inf if record.facts["diverged"] or value is None else float(value)


def _same(record: Record) -> tuple[object, ...]:
    facts = record.facts
    return (*record.kin, record.placement, record.r, record.seed, facts["train_rows"], facts.get("epochs"))


def risks_of(records: Sequence[Record]) -> dict[str, Risk | None]:
    """Fit the risk of a collapse for each data set on the others.

    Args:
        records: Cells of one kind of task.

    Returns:
        By family; None where the others are of fewer than 3 data sets, or nothing can be fitted.
    """
    cases = rate_cases(records)
    found = {}
    for family in sorted({record.family for record in records}):
        rest = [case for case in cases if case.group != family]
        found[family] = fit_risk(rest) if len({case.group for case in rest}) >= LEAST_GROUPS else None
    return found


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
        for caution in cautions(forecast, degrees, baseline=baseline, risk=risk, update_rate=_rate(record))
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
