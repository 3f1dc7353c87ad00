"""What is lost by choosing an adapter by the forecast, and by rules that cost less: size, other data, first steps."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, nan

import numpy as np

from foretune.arrays import Array
from foretune.evaluation.held_out import HeldOutForecasts, Judged, rank_correlation
from foretune.evaluation.strata import by_distance, points_of, rho_in_words
from foretune.report.curves import running_mean
from foretune.report.tables import Table
from foretune.tasks.metrics import main_metric

ALIKE = 0.15  # adapters whose parameters differ by no more are of equal size
LEAST = 3  # adapters to put into order


@dataclass(frozen=True)
class Choice:
    """How well forecasts at one distance put the adapters of a data set into order.

    Attributes:
        name: Which distance.
        sets: Sets of three adapters or more that are compared: one data set, seed, recipe and number of trial rows.
        within: Mean over them of Spearman's ρ of forecast and outcome; NaN where none has one.
        by_size: The same of the adapter's parameters.
        equal: As `within`, over adapters of equal size.
        spread: Mean of the best adapter's metric less the mean over all: what a choice at random loses.
        lost: Mean of the best adapter's metric less that of the one with the best forecast.
        largest: The same for the largest adapter.
        elsewhere: The same for the adapter that did best on the other data sets; NaN where there are none.
        early: The same for the one with the least training loss after as many steps of the long run as the trials cost;
            NaN without trials.
    """

    name: str
    sets: int
    within: float
    by_size: float
    equal: float
    spread: float
    lost: float
    largest: float
    elsewhere: float
    early: float


def choices(held_out: HeldOutForecasts) -> tuple[Choice, ...]:
    """Judge the choice of an adapter at each distance.

    Args:
        held_out: Forecasts, each by a calibration that knows no run of its data set.

    Returns:
        One for each distance at which three adapters can be compared.
    """
    found = []
    for name, judged in by_distance(held_out).items():
        sets = [alike for alike in _compared(judged) if len(alike) >= LEAST]
        if sets:
            found.append(_choice(name, sets))
    return tuple(found)


def _compared(judged: Sequence[Judged]) -> list[list[Judged]]:
    """Forecasts of one data set and seed, from as many known rows and trials of as many."""
    groups: dict[tuple[object, ...], list[Judged]] = defaultdict(list)
    for one in judged:
        rows = tuple(trial.rows for trial in one.trials)
        groups[(*one.record.group, one.record.seed, one.case.simulated["doublings"], rows)].append(one)
    return list(groups.values())


def _choice(name: str, sets: Sequence[Sequence[Judged]]) -> Choice:
    metric = main_metric(sets[0][0].record.kind)
    better = metric.better

    def real(alike: Sequence[Judged]) -> Array:
        return better * np.array([one.case.outcomes[metric.name] for one in alike])

    def said(alike: Sequence[Judged]) -> Array:
        return better * np.array([one.levels[metric.name].value for one in alike])

    def lost(score: Callable[[Sequence[Judged]], Array]) -> float:
        """Mean over the sets of what the adapter with the best score lies behind the best one."""
        return _mean([_behind(real(alike), score(alike)) for alike in sets])

    def ordered(score: Callable[[Sequence[Judged]], Array], parts: Sequence[Sequence[Judged]]) -> float:
        return _mean([rank_correlation(score(part), real(part)) for part in parts])

    return Choice(
        name=name,
        sets=len(sets),
        within=ordered(said, sets),
        by_size=ordered(_sizes, sets),
        equal=ordered(said, [_of_equal_size(alike) for alike in sets]),
        spread=_mean([float(real(alike).max() - real(alike).mean()) for alike in sets]),
        lost=lost(said),
        largest=lost(_sizes),
        elsewhere=lost(lambda alike: _elsewhere(alike, sets, real)),
        early=lost(_early),
    )


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if isfinite(value)]
    return float(np.mean(known)) if known else nan


def _behind(real: Array, score: Array) -> float:
    """What the adapter with the best score lies behind; of several with that score the mean, NaN where one has none."""
    if not np.isfinite(score).all():
        return nan
    return float(real.max() - real[score == score.max()].mean())


def _sizes(alike: Sequence[Judged]) -> Array:
    return np.array([float(one.record.quantities.get("adapter_parameters") or 0.0) for one in alike])


def _of_equal_size(alike: Sequence[Judged]) -> list[Judged]:
    """The largest set of adapters whose parameters lie within 15% above those of its smallest."""
    sizes = _sizes(alike)
    sets = [[one for one, of in zip(alike, sizes, strict=True) if size <= of <= (1.0 + ALIKE) * size] for size in sizes]
    return max(sets, key=len)


def _elsewhere(
    alike: Sequence[Judged], sets: Sequence[Sequence[Judged]], real: Callable[[Sequence[Judged]], Array]
) -> Array:
    """Mean over the same model's other data sets of what each placement lies behind the best one, times −1."""
    first = alike[0].record
    behind: dict[str, list[float]] = defaultdict(list)
    for other in sets:
        if other[0].record.model == first.model and other[0].record.family != first.family:
            values = real(other)
            for one, value in zip(other, values, strict=True):
                behind[one.record.placement].append(float(value - values.max()))
    return np.array([_mean(behind[one.record.placement]) for one in alike])


def _early(alike: Sequence[Judged]) -> Array:
    """Training loss of the run itself after as many of its steps as its trials cost, times −1."""
    return np.array([_loss_after(one) for one in alike])


def _loss_after(one: Judged) -> float:
    steps = one.record.steps
    share = int(one.spend * float(one.record.facts["steps"] or 0.0))
    first = [step for step in steps if step.step <= share]
    if not first:
        return nan
    mean = running_mean(first, window=max(1, len(first) // 4))[-1]  # of the last quarter: single steps are noise
    return nan if mean is None else -mean


def choice_table(held_out: HeldOutForecasts) -> Table:
    """Lay out what choosing by the forecast lost.

    Args:
        held_out: Forecasts.

    Returns:
        A row for each distance; empty where three adapters are nowhere compared.
    """
    metric = main_metric(held_out.records[0].kind)
    points = points_of(metric)
    rows = [
        (
            one.name,
            str(one.sets),
            *map(rho_in_words, (one.within, one.by_size, one.equal)),
            *map(points, (one.lost, one.largest, one.elsewhere, one.early, one.spread)),
        )
        for one in choices(held_out)
    ]
    caption = (
        "Choosing an adapter on one data set, each by a calibration fitted on the others. ρ: Spearman's, mean over the "
        "sets of three adapters or more that are compared; equal size: adapters within 15% of one size. Lost: "
        f"{metric.label}{' in points' if metric.percent else ''} behind the best adapter when chosen by the forecast, "
        "by size, by what was best on the other data sets, by the training loss of the run itself after the steps that "
        "the trials cost, at random."
    )
    header = (
        "distance",
        "sets",
        "ρ within a data set",
        "ρ of size",
        "ρ, equal size",
        "lost",
        "by the largest",
        "by other data",
        "by first steps",
        "at random",
    )
    return Table(caption, header, tuple(rows))
