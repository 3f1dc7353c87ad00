"""Fit a calibration on finished runs, and see up to how many training rows its intervals hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite

import numpy as np
from numpy.typing import NDArray

from foretune.errors import ConfigError
from foretune.forecasting.calibration import (
    LEAST_GROUPS,
    OUTCOMES,
    Calibration,
    Line,
    Outcome,
    half_width,
    scale,
    terms,
    within_limits,
)
from foretune.forecasting.reach import Run, domain_of

Array = NDArray[np.float64]
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
HELD = 0.85  # share of the left-out intervals that must hold for rows to count as seen


@dataclass(frozen=True)
class Case:
    """A finished run with its outlook.

    Attributes:
        outlook: Simulated values by name, as in `case_values`.
        outcomes: What the run gave, by name of `OUTCOMES`.
        group: Data set.
        run: What kind of run it was; None if that is not known.
    """

    outlook: Mapping[str, float]
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
        The calibration. Its domain ends, in training rows over known rows, where less than 85% of the runs lay within
        their left-out intervals; it is None if a case does not say what run it was.

    Raises:
        ConfigError: If there are too few data sets.
    """
    groups = sorted({case.group for case in cases})
    if len(groups) < LEAST_GROUPS:
        raise ConfigError(f"a calibration needs runs of {LEAST_GROUPS} data sets or more, got {len(groups)}")
    fits = {name: _fit_line(name, cases) for name in OUTCOMES}
    runs = [case.run for case in cases if case.run is not None]
    domain = None
    if len(runs) == len(cases):
        domain = domain_of(runs, ratio_held=_ratio_held(list(fits.values())))
    return Calibration({name: fit.line for name, fit in fits.items()}, tuple(outputs), tuple(groups), source, domain)


@dataclass(frozen=True)
class _Fit:
    """A line, and by how far it missed the runs of data sets that were left out."""

    line: Line
    errors: Array
    doublings: Array

    def held(self, low: float, high: float) -> float:
        """Share of the left-out intervals that held, of runs with low < doublings ≤ high; 1 without such runs."""
        there = (self.doublings > low) & (self.doublings <= high)
        return float((np.abs(self.errors[there]) <= half_width(self.line)).mean()) if there.any() else 1.0


def _ratio_held(fits: Sequence[_Fit]) -> float:
    """Largest N/n of the runs, taken in steps of a doubling, up to which the left-out intervals held."""
    most = 0.0
    steps = sorted({ceil(value) for fit in fits for value in fit.doublings.tolist()})
    for step in steps:
        low = -1.0 if step == 0 else step - 1.0
        if any(fit.held(low, step) < HELD for fit in fits):
            break
        most = max(value for fit in fits for value in fit.doublings.tolist() if value <= step)
    return float(2.0**most)


def _fit_line(outcome: Outcome, cases: Sequence[Case]) -> _Fit:
    held = [case for case in cases if isfinite(case.outcomes[outcome])]
    groups = sorted({case.group for case in held})
    if len(groups) < LEAST_GROUPS:
        raise ConfigError(f"a calibration needs {outcome} of {LEAST_GROUPS} data sets or more, got {len(groups)}")
    laid = [terms(outcome, case.outlook) for case in held]
    x = np.array([row for _, row in laid])
    error = np.array([scale(outcome, case.outcomes[outcome]) for case in held]) - np.array([s for s, _ in laid])
    group = np.array([groups.index(case.group) for case in held])
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
        runs=len(held),
    )
    return _Fit(line, missed[best], np.array([case.outlook["doublings"] for case in held]))


def _limits(x: Array) -> tuple[float, float]:
    return float(x[:, -1].min()), float(x[:, -1].max())


def _ridge(x: Array, y: Array, weight: Array, penalty: float) -> Array:
    """β = (XᵀWX + penalty · D)⁻¹ XᵀWy, W of sum 1 and D the mean squares of the columns (a unit for an empty one)."""
    w = weight / weight.sum()
    size = np.average(x**2, axis=0, weights=w)
    gram = (x * w[:, None]).T @ x + penalty * np.diag(np.where(size > 0, size, 1.0))
    return np.asarray(np.linalg.solve(gram, x.T @ (w * y)))
