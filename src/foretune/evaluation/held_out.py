"""Forecasts of a study's cells, each data set by a calibration that has not seen it, and how good they were."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from foretune.evaluation.predictors import FORECASTS, OUTLOOK
from foretune.evaluation.records import Record
from foretune.forecasting.calibration import LEAST_GROUPS, Calibration, Interval, apply_calibration
from foretune.forecasting.calibration_fit import Case, fit_calibration
from foretune.forecasting.outcomes import OUTCOMES, Outcome, scale, unscale
from foretune.forecasting.reach import run_from

Array = NDArray[np.float64]
OUTPUTS = ("margin", "full")  # of two classes and of more: what an outlook is made with


def outlook_of(record: Record) -> dict[str, float] | None:
    """Take what was simulated for a cell out of its quantities.

    Args:
        record: Cell.

    Returns:
        Values of `case_values`; None if the cell has no outlook.
    """
    held = {name: record.quantities.get(name) for name in OUTLOOK}
    if any(value is None for value in held.values()):
        return None
    return {name: float(value) for name, value in held.items() if value is not None}


def cases_of(records: Sequence[Record]) -> list[Case]:
    """Pair outlooks with what the runs gave.

    Args:
        records: Cells.

    Returns:
        Cases of those cells that have both.
    """
    cases = []
    for record in records:
        held = outlook_of(record)
        outcomes = {name: record.outcomes[name] for name in OUTCOMES}
        if held is not None and not record.facts["diverged"] and None not in outcomes.values():
            gave: dict[str, float] = {name: float(value or 0.0) for name, value in outcomes.items()}
            cases.append(Case(held, gave, record.family, run_from(record.quantities)))
    return cases


@dataclass(frozen=True)
class Foresight:
    """Forecasts of a study.

    Attributes:
        records: Cells, the forecasts among their quantities.
        forecasts: By cell's key: forecasts by outcome. Empty where there are no outlooks or too few data sets.
    """

    records: tuple[Record, ...]
    forecasts: Mapping[str, Mapping[str, Interval]]


def foresee(records: Sequence[Record]) -> Foresight:
    """Forecast every cell by a calibration fitted on the other data sets of the study alone.

    Args:
        records: Cells.

    Returns:
        Cells with forecasts; as they were if the cells with outlooks are of fewer than 4 data sets.
    """
    cases = cases_of(records)
    groups = sorted({case.group for case in cases})
    if len(groups) < LEAST_GROUPS + 1:
        return Foresight(tuple(records), {})
    fitted: dict[str, Calibration] = {}
    for group in sorted({record.family for record in records}):
        rest = [case for case in cases if case.group != group]
        if len({case.group for case in rest}) >= LEAST_GROUPS:
            fitted[group] = fit_calibration(rest, OUTPUTS, f"all but {group}")
    forecasts = {}
    changed = []
    for record in records:
        held = outlook_of(record)
        if held is None or record.family not in fitted:
            changed.append(record)
            continue
        # what a left-out data set has that the others lack is no reason to widen: the spread comes from leaving out
        forecast = apply_calibration(fitted[record.family], held, OUTPUTS[0]).levels or {}
        forecasts[record.key] = forecast
        values = {FORECASTS[name]: interval.value for name, interval in forecast.items()}
        changed.append(replace(record, quantities={**record.quantities, **values}))
    return Foresight(tuple(changed), forecasts)


@dataclass(frozen=True)
class Quality:
    """How good the forecasts of one outcome were, over all cells with a forecast.

    Attributes:
        outcome: Which outcome.
        cells: Cells.
        spearman: Spearman's ρ of forecast and outcome over all cells.
        spearman_within: Mean over data sets of ρ within one, seeds averaged; data sets where all runs agree left out.
        error: Mean absolute error.
        bias: Mean of forecast less outcome.
        covered: Share of the outcomes within the 90% interval.
        width: Mean width of the interval.
        simulated_error: Mean absolute error of the simulation without calibration.
        noise: Mean absolute difference of a run from the mean of its seeds, times √(k/(k−1)): what no forecast of a
            single run can be better than; NaN with one seed.
    """

    outcome: Outcome
    cells: int
    spearman: float
    spearman_within: float
    error: float
    bias: float
    covered: float
    width: float
    simulated_error: float
    noise: float


def qualities(foresight: Foresight) -> tuple[Quality, ...]:
    """Compare forecasts with what the runs gave.

    Args:
        foresight: Forecasts of a study.

    Returns:
        One for each outcome; none without forecasts.
    """
    held = [r for r in foresight.records if r.key in foresight.forecasts and not r.facts["diverged"]]
    if len(held) < 2:
        return ()
    return tuple(_quality(outcome, held, foresight) for outcome in OUTCOMES)


def _quality(outcome: Outcome, records: Sequence[Record], foresight: Foresight) -> Quality:
    intervals = [foresight.forecasts[record.key][outcome] for record in records]
    value = np.array([interval.value for interval in intervals])
    low, high = (np.array([getattr(interval, end) for interval in intervals]) for end in ("low", "high"))
    real = np.array([float(record.outcomes[outcome] or 0.0) for record in records])
    simulated = np.array([float(record.quantities[f"simulated_{outcome}"] or 0.0) for record in records])
    return Quality(
        outcome=outcome,
        cells=len(records),
        spearman=_spearman(value, real),
        spearman_within=_within(records, value, real),
        error=float(np.abs(value - real).mean()),
        bias=float((value - real).mean()),
        covered=float(((low <= real) & (real <= high)).mean()),
        width=float((high - low).mean()),
        simulated_error=float(np.abs(simulated - real).mean()),
        noise=_noise(records, real),
    )


def _spearman(x: Array, y: Array) -> float:
    if len(x) < 3 or np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return float("nan")
    return float(spearmanr(x, y).statistic)


def _within(records: Sequence[Record], x: Array, y: Array) -> float:
    found = []
    for group in sorted({record.group for record in records}):
        units = sorted({record.unit for record in records if record.group == group})
        means = [[float(part[[record.unit == unit for record in records]].mean()) for unit in units] for part in (x, y)]
        found.append(_spearman(np.array(means[0]), np.array(means[1])))
    known = [value for value in found if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def _noise(records: Sequence[Record], real: Array) -> float:
    differences = []
    for unit in sorted({record.unit for record in records}):
        values = real[[record.unit == unit for record in records]]
        if len(values) > 1:
            differences += list(np.abs(values - values.mean()) * np.sqrt(len(values) / (len(values) - 1)))
    return float(np.mean(differences)) if differences else float("nan")


def level_error(records: Sequence[Record], quantity: str, *, logarithmic: bool) -> float | None:
    """Mean absolute error of accuracy when one quantity alone is calibrated, each data set by the others.

    The logit of the accuracy is a straight line in the quantity (its logarithm where it is a scale), by least squares.

    Args:
        records: Cells.
        quantity: Name of the quantity.
        logarithmic: Whether it is a scale.

    Returns:
        The error as a fraction; None where cells lack it, or there are fewer than 4 data sets.
    """
    held = [record for record in records if not record.facts["diverged"]]
    values = [record.quantities.get(quantity) for record in held]
    groups = np.array([record.family for record in held])
    if any(value is None or not np.isfinite(value) for value in values) or len(set(groups)) < LEAST_GROUPS + 1:
        return None
    x = np.array([float(value or 0.0) for value in values])
    change: Callable[[Array], Array] = np.log if logarithmic and (x > 0).all() else np.asarray
    x = change(x)
    real = np.array([float(record.outcomes["accuracy"] or 0.0) for record in held])
    y = np.array([scale("accuracy", value) for value in real])
    errors = np.empty(len(x))
    for group in set(groups):
        rest = groups != group
        slope, level = np.polyfit(x[rest], y[rest], 1) if np.ptp(x[rest]) > 0 else (0.0, y[rest].mean())
        low, high = y[rest].min(), y[rest].max()
        forecast = np.clip(level + slope * x[~rest], low, high)  # a line has no business beyond what was seen
        errors[~rest] = [unscale("accuracy", float(value)) for value in forecast] - real[~rest]
    return float(np.abs(errors).mean())
