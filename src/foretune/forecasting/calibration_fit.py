"""Fit a calibration on finished runs, and see up to how many training rows and classes its intervals hold."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from foretune.arrays import Array
from foretune.errors import ConfigError
from foretune.forecasting.calibration import LEAST_GROUPS, Calibration, Line, half_width, terms, within_limits
from foretune.forecasting.outcomes import Outcome, outcomes_of, scale
from foretune.forecasting.reach import Run, domain_of
from foretune.tasks.metrics import Kind

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
HELD = 0.85  # share of the left-out intervals that must hold for a size to count as seen


@dataclass(frozen=True)
class Case:
    """A finished run, and what its simulation says.

    Attributes:
        simulated: Simulated values by name, as in `case_values`.
        outcomes: What the run gave, by the names of `outcomes_of`.
        group: Data set.
        run: What kind of run it was; None if that is not known.
    """

    simulated: Mapping[str, float]
    outcomes: Mapping[str, float]
    group: str
    run: Run | None = None


def fit_calibration(cases: Sequence[Case], outputs: Sequence[str], source: str) -> Calibration:
    """Fit a calibration.

    Args:
        cases: Finished runs of at least 3 data sets.
        outputs: Output reductions that their outlooks were made with.
        source: Name of the study, for the record.

    Returns:
        The calibration. Its domain ends, in training rows over known rows and in classes, where less than 85% of the
        runs lay within their left-out intervals; it is None if a case does not say what run it was.

    Raises:
        ConfigError: If there are too few data sets.
    """
    groups = sorted({case.group for case in cases})
    if len(groups) < LEAST_GROUPS:
        raise ConfigError(f"a calibration needs runs of {LEAST_GROUPS} data sets or more, got {len(groups)}")
    runs = [case.run for case in cases if case.run is not None]
    kind: Kind = runs[0].kind if len(runs) == len(cases) else "classification"
    fits = {name: _fit_line(name, cases, kind) for name in outcomes_of(kind)}
    domain = None
    if len(runs) == len(cases):
        most_rows = _most(fits.values(), [run.rows_ratio for run in runs])
        most_classes = _most(fits.values(), [float(run.classes) for run in runs])
        domain = domain_of(runs, most_rows=most_rows, most_classes=most_classes)
    return Calibration({name: fit.line for name, fit in fits.items()}, tuple(outputs), tuple(groups), source, domain)


@dataclass(frozen=True)
class _Fit:
    """A line, and by how far it missed each run when its data set was left out; NaN where the outcome is none."""

    line: Line
    errors: Array


def _most(fits: Iterable[_Fit], sizes: Sequence[float]) -> float:
    """Largest size of the runs, taken in steps of a doubling, up to which the left-out intervals held."""
    step = np.ceil(np.log2(np.array(sizes)) - 1e-9)
    holds = np.array([np.abs(fit.errors) <= half_width(fit.line) for fit in fits])
    known = np.array([np.isfinite(fit.errors) for fit in fits])
    most = min(sizes)
    for one in np.unique(step):
        there = step == one
        if any((of_one & there).sum() < HELD * (of & there).sum() for of_one, of in zip(holds, known, strict=True)):
            break
        most = max(size for size, at in zip(sizes, there, strict=True) if at)
    return most


def _fit_line(outcome: Outcome, cases: Sequence[Case], kind: Kind) -> _Fit:
    measured = [case for case in cases if isfinite(case.outcomes[outcome])]
    groups = sorted({case.group for case in measured})
    if len(groups) < LEAST_GROUPS:
        raise ConfigError(f"a calibration needs {outcome} of {LEAST_GROUPS} data sets or more, got {len(groups)}")
    laid = [terms(outcome, case.simulated, kind) for case in measured]
    x = np.array([row for _, row in laid])
    real = np.array([scale(outcome, case.outcomes[outcome], kind) for case in measured])
    error = real - np.array([s for s, _ in laid])
    group = np.array([groups.index(case.group) for case in measured])
    weight = 1.0 / np.bincount(group, minlength=len(groups))[group]

    def left_out(penalty: float) -> Array:
        errors = np.empty(len(error))
        for one in np.unique(group):
            rest = group != one
            beta = _ridge(x[rest], error[rest], weight[rest], penalty)
            errors[~rest] = error[~rest] - within_limits(x[~rest], _limits(x[rest])) @ beta
        return errors

    def size(errors: Array) -> float:
        return float(np.sqrt(np.average(errors**2, weights=weight)))

    missed = [left_out(penalty) for penalty in PENALTIES]
    best = int(np.argmin([size(errors) for errors in missed]))
    beta = _ridge(x, error, weight, PENALTIES[best])
    around = missed[best] - (np.bincount(group, missed[best]) / np.bincount(group))[group]
    line = Line(
        coefficients=tuple(map(float, beta)),
        limits=_limits(x),
        penalty=PENALTIES[best],
        spread=size(missed[best]),
        within=size(around),
        groups=len(groups),
        runs=len(measured),
    )
    errors = np.full(len(cases), np.nan)
    errors[[isfinite(case.outcomes[outcome]) for case in cases]] = missed[best]
    return _Fit(line, errors)


def _limits(x: Array) -> tuple[float, float]:
    return float(x[:, -1].min()), float(x[:, -1].max())


def _ridge(x: Array, y: Array, weight: Array, penalty: float) -> Array:
    """β = (XᵀWX + penalty · D)⁻¹ XᵀWy, W of sum 1 and D the mean squares of the columns (a unit for an empty one)."""
    w = weight / weight.sum()
    size = np.average(x**2, axis=0, weights=w)
    gram = (x * w[:, None]).T @ x + penalty * np.diag(np.where(size > 0, size, 1.0))
    return np.asarray(np.linalg.solve(gram, x.T @ (w * y)))
