"""How well the learning rate is chosen by the forecast: against the best of those that were run."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan

import numpy as np
from scipy.stats import binomtest

from foretune.evaluation.collapses import baseline_of, rate_of, risks_of, steps_of
from foretune.evaluation.held_out import HeldOutForecasts, Judged
from foretune.evaluation.strata import by_distance, points_of
from foretune.forecasting.risk import Risk, expected
from foretune.report.tables import Table
from foretune.study.stored import RECIPE
from foretune.tasks.metrics import main_metric

LEAST = 3  # rates to choose from
NEAR = 2.0  # times the best rate, or a half of it


@dataclass(frozen=True)
class RateChoice:
    """How well rates were chosen at one distance.

    Attributes:
        name: Which distance.
        sets: Runs that differ in their learning rate alone, three rates or more.
        near: Share of the sets whose chosen rate is within a factor 2 of the best one, with its 95% interval (Wilson).
        elsewhere: The same share for the rate that did best on the other data sets; NaN where there are none.
        at_random: The same share for a rate at random.
        lost: Mean of the best rate's metric less that of the chosen one.
        lost_elsewhere: The same for the rate that did best on the other data sets.
        lost_at_random: The same at random.
    """

    name: str
    sets: int
    near: tuple[float, float, float]
    elsewhere: float
    at_random: float
    lost: float
    lost_elsewhere: float
    lost_at_random: float


def rate_choices(held_out: HeldOutForecasts) -> tuple[RateChoice, ...]:
    """Judge the choice of a learning rate at each distance.

    The rate with the largest expected metric is chosen (`foretune.forecasting.risk.expected`), with the risk of a
    collapse as the other data sets have it; the best is the one with the best metric, of equal ones that with the
    least evaluation loss.

    Args:
        held_out: Forecasts, each by a calibration that knows no run of its data set.

    Returns:
        One for each distance at which runs differ in three learning rates or more, and in nothing else.
    """
    risks = risks_of(held_out.records)
    found = []
    for name, judged in by_distance(held_out, withheld=True).items():
        sets = [alike for alike in _alike(judged) if len(alike) >= LEAST]
        if sets:
            found.append(_choice(name, sets, risks))
    return tuple(found)


def _alike(judged: Sequence[Judged]) -> list[list[Judged]]:
    groups: dict[tuple[object, ...], list[Judged]] = defaultdict(list)
    for one in judged:
        record, facts = one.record, one.record.facts
        if not facts.get("learning_rate"):
            continue
        recipe = tuple(facts.get(name) for name in RECIPE if name != "learning_rate")
        rows = tuple(trial.rows for trial in one.trials)
        unit = (*record.kin, record.placement, record.r, record.seed, facts["train_rows"], facts["eval_rows"])
        groups[(*unit, one.case.simulated["doublings"], rows, recipe)].append(one)
    return [sorted(alike, key=_rate) for alike in groups.values()]


def _rate(one: Judged) -> float:
    return float(one.record.facts["learning_rate"] or nan)


def _real(one: Judged) -> tuple[float, float]:
    """Sorts the better run last."""
    metric = main_metric(one.record.kind)
    return metric.better * one.case.outcomes[metric.name], -one.case.outcomes["eval_loss"]


def _said(one: Judged, risk: Risk | None) -> tuple[float, float]:
    """The same of the forecast."""
    metric = main_metric(one.record.kind)
    update_rate, baseline = rate_of(one.record), baseline_of(one.record)
    value = one.levels[metric.name].value
    if risk is not None and update_rate is not None and baseline is not None:
        value = expected(value, risk.probability(update_rate, steps_of(one.record)), baseline)
    return metric.better * value, -one.levels["eval_loss"].value


def _choice(name: str, sets: Sequence[Sequence[Judged]], risks: dict[str, Risk | None]) -> RateChoice:
    near, lost = [], []
    elsewhere_near, elsewhere_lost = [], []
    random_near, random_lost = [], []
    for alike in sets:
        best = max(alike, key=_real)
        risk = risks[best.record.family]
        chosen = max(alike, key=lambda one: _said(one, risk))
        near.append(_is_near(chosen, best))
        lost.append(_real(best)[0] - _real(chosen)[0])
        random_near += [_is_near(one, best) for one in alike]
        random_lost += [_real(best)[0] - _real(one)[0] for one in alike]
        other = _elsewhere(alike, sets)
        if other is not None:
            elsewhere_near.append(_is_near(other, best))
            elsewhere_lost.append(_real(best)[0] - _real(other)[0])
    ends = binomtest(sum(near), len(near)).proportion_ci(method="wilson")
    return RateChoice(
        name=name,
        sets=len(sets),
        near=(float(np.mean(near)), float(ends.low), float(ends.high)),
        elsewhere=_mean(elsewhere_near),
        at_random=_mean(random_near),
        lost=_mean(lost),
        lost_elsewhere=_mean(elsewhere_lost),
        lost_at_random=_mean(random_lost),
    )


def _is_near(one: Judged, best: Judged) -> bool:
    return max(_rate(one) / _rate(best), _rate(best) / _rate(one)) <= NEAR * 1.001  # rates are rounded


def _elsewhere(alike: Sequence[Judged], sets: Sequence[Sequence[Judged]]) -> Judged | None:
    """The rate that lies least behind the best one, on average over the same model's other data sets."""
    first = alike[0].record
    behind: dict[float, list[float]] = defaultdict(list)
    for other in sets:
        if other[0].record.model == first.model and other[0].record.family != first.family:
            best = max(map(_real, other))[0]
            for one in other:
                behind[_rate(one)].append(best - _real(one)[0])
    known = [one for one in alike if behind[_rate(one)]]
    return min(known, key=lambda one: _mean(behind[_rate(one)])) if known else None


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else nan


def rates_table(held_out: HeldOutForecasts) -> Table:
    """Lay out how well learning rates were chosen.

    Args:
        held_out: Forecasts.

    Returns:
        A row for each distance; empty where no three rates are compared.
    """
    metric = main_metric(held_out.records[0].kind)
    points = points_of(metric)

    def share(value: float) -> str:
        return f"{value:.0%}" if isfinite(value) else "–"

    rows = [
        (
            one.name,
            str(one.sets),
            f"{one.near[0]:.0%} [{one.near[1]:.0%}, {one.near[2]:.0%}]",
            share(one.elsewhere),
            share(one.at_random),
            *map(points, (one.lost, one.lost_elsewhere, one.lost_at_random)),
        )
        for one in rate_choices(held_out)
    ]
    caption = (
        "Choosing the learning rate of one adapter on one data set, each by a calibration fitted on the others: share "
        "of the sets of three rates or more in which the chosen one is within a factor 2 of the best that was run, "
        f"with its 95% Wilson interval, and {metric.label}{' in points' if metric.percent else ''} lost by the choice; "
        "by the forecast, by what was best on the other data sets, at random."
    )
    header = (
        "distance",
        "sets",
        "within a factor 2",
        "by other data",
        "at random",
        "lost",
        "lost by other data",
        "lost at random",
    )
    return Table(caption, header, tuple(rows))
