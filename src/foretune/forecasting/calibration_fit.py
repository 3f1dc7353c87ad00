"""Fit a calibration on finished runs, and see up to how many training rows and classes its intervals hold."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, log2, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

from foretune.arrays import Array
from foretune.errors import ConfigError
from foretune.forecasting.calibration import LEAST_GROUPS, Calibration
from foretune.forecasting.line import Line, breadth, class_doublings, half_width
from foretune.forecasting.outcomes import Outcome, outcomes_of, scale
from foretune.forecasting.reach import Domain, Run, domain_of
from foretune.forecasting.shown import Shown
from foretune.forecasting.terms import terms, within_limits
from foretune.forecasting.with_trials import BOUNDS, together, trial_terms
from foretune.settings.groups import TaskKind

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
GROWTHS = np.array([0.0, *np.geomspace(0.01, 10.0, 61)])  # b / a, and c / a
Flags = NDArray[np.bool_]
Bounds = tuple[float | tuple[float, ...], float | tuple[float, ...]]
FREE: Bounds = (-inf, inf)
PROMISED = 0.9  # share of the left-out intervals that hold; a size where fewer surely do does not count as seen
LEAST_RUNS = 3  # of a size, for it to count


@dataclass(frozen=True)
class Case:
    """A finished run, and what its simulation and its trials say.

    Attributes:
        simulated: Simulated values by name, as in `case_values`.
        outcomes: What the run gave, by the names of `outcomes_of`.
        group: Data set.
        run: What kind of run it was; None if that is not known.
        trials: Sets of trials of the same adapter and recipe on fewer rows, each as one spend buys it.
        weight: What it counts beside the others; its data set counts what the heaviest of its runs does.
    """

    simulated: Mapping[str, float]
    outcomes: Mapping[str, float]
    group: str
    run: Run | None = None
    trials: tuple[tuple[Shown, ...], ...] = ()
    weight: float = 1.0


def fit_calibration(
    cases: Sequence[Case], outputs: Sequence[str], source: str, *, shipped: Sequence[Case] = ()
) -> Calibration:
    """Fit a calibration.

    Args:
        cases: Finished runs of at least 3 data sets, those of `shipped` among them.
        outputs: Output reductions that their outlooks were made with.
        source: Name of the study, for the record.
        shipped: Finished runs beside these, which have a domain of their own: what was seen of either is no promise for
            what lies between them.

    Returns:
        The calibration. Its domain ends, in training rows over known rows and in classes, where the runs are fewer
        than 3, or where so few of them lay within their left-out intervals that 90% is above the 95% interval of that
        share (Wilson); it is None if a case does not say what run it was. Runs with trials
        are fitted where there are some of at least 3 data sets, from the forecast without them, of each data set as a
        fit on the others gives it.

    Raises:
        ConfigError: If there are too few data sets.
    """
    own, cases = len(cases), [*cases, *shipped]
    groups = sorted({case.group for case in cases})
    if len(groups) < LEAST_GROUPS:
        raise ConfigError(f"a calibration needs runs of {LEAST_GROUPS} data sets or more, got {len(groups)}")
    runs = [case.run for case in cases if case.run is not None]
    known = len(runs) == len(cases)
    kind: TaskKind = runs[0].kind if known else "classification"
    mine = [position < own for position in range(len(cases))]
    fits = {name: _fit(_laid_out(name, cases, kind, mine), name) for name in outcomes_of(kind)}
    calibration = Calibration(
        {name: fit.line for name, fit in fits.items()}, tuple(outputs), tuple(groups), source, None
    )
    if not known:
        return calibration
    trial_lines, trial_domains = _with_trials(cases, fits, kind, own)
    domains = _domains(fits.values(), runs, mine)
    return replace(
        calibration,
        domain=domains[0],
        trial_lines=trial_lines,
        trial_domain=trial_domains[0],
        further=domains[1],
        further_trials=trial_domains[1],
    )


@dataclass(frozen=True)
class _Rows:
    """What is fitted: a row for each run, or each set of trials of one.

    Attributes:
        base: What is known of it, on the scale.
        x: Terms.
        real: What it gave, on the scale; NaN where that is none.
        doublings: From the rows that were seen to those of the run.
        classes: Doublings of two that the classes are.
        group: Number of the data set.
        weight: What the row counts beside the others of its data set.
        own: Whether it is of the runs that are fitted, not of those beside them.
    """

    base: Array
    x: Array
    real: Array
    doublings: Array
    classes: Array
    group: Array
    weight: Array
    own: Flags


@dataclass(frozen=True)
class _Fit:
    """A line, and by how far it missed each row when its data set was left out; NaN where the outcome is none."""

    line: Line
    rows: _Rows
    errors: Array

    @property
    def forecasts(self) -> Array:
        """Of each row, by the fit without its data set, on the scale."""
        return self.rows.real - self.errors

    @property
    def half_widths(self) -> Array:
        """Half the width of each row's interval, on the scale."""
        pairs = zip(self.rows.doublings, self.rows.classes, strict=True)
        return np.array([half_width(self.line, doublings=doublings, classes=classes) for doublings, classes in pairs])

    @property
    def holds(self) -> Flags:
        """Whether each row's interval held it when its data set was left out; not where the outcome is none."""
        return np.asarray(np.abs(self.errors) <= self.half_widths)


def _laid_out(outcome: Outcome, cases: Sequence[Case], kind: TaskKind, own: Sequence[bool]) -> _Rows:
    laid = [terms(outcome, case.simulated, kind) for case in cases]
    rows = _rows(laid, [case.simulated["doublings"] for case in cases], outcome, cases, kind)
    return replace(rows, own=np.array(own))


def _rows(
    laid: Sequence[tuple[float, Array]],
    doublings: Sequence[float],
    outcome: Outcome,
    cases: Sequence[Case],
    kind: TaskKind,
) -> _Rows:
    groups = sorted({case.group for case in cases})
    values = [case.outcomes[outcome] for case in cases]
    return _Rows(
        base=np.array([base for base, _ in laid]),
        x=np.array([x for _, x in laid]),
        real=np.array([scale(outcome, value, kind) if isfinite(value) else np.nan for value in values]),
        doublings=np.array(doublings),
        classes=np.array([0.0 if case.run is None else class_doublings(case.run.classes) for case in cases]),
        group=np.array([groups.index(case.group) for case in cases]),
        weight=np.array([case.weight for case in cases]),
        own=np.ones(len(cases), bool),
    )


def _domains(fits: Iterable[_Fit], runs: Sequence[Run], own: Sequence[bool]) -> tuple[Domain | None, Domain | None]:
    """Of the own runs, and of the others; none of either side that there is not, or whose intervals fail as a whole."""
    lines, mine = list(fits), np.array(own, bool)
    first, second = _domain(lines, runs, mine), _domain(lines, runs, ~mine)
    return (first, second) if first is not None else (second, None)


def _domain(fits: Sequence[_Fit], runs: Sequence[Run], which: Flags) -> Domain | None:
    some = [run for run, taken in zip(runs, which, strict=True) if taken]
    if not some or (not which.all() and _none_holds(fits, runs, which)):
        return None
    most_rows = _most(fits, [run.rows_ratio for run in runs], which)
    most_classes = _most(fits, [float(run.classes) for run in runs], which)
    return domain_of(some, most_rows=most_rows, most_classes=most_classes)


def _with_trials(
    cases: Sequence[Case], fits: Mapping[Outcome, _Fit], kind: TaskKind, own: int
) -> tuple[dict[Outcome, Line], tuple[Domain | None, Domain | None]]:
    """Lines and domains of the runs with trials; nothing where these are of too few data sets."""
    each = [
        (number, case, trials)
        for number, case in enumerate(cases)
        for shown in case.trials
        if (trials := together(shown, kind)) is not None
    ]
    if len({case.group for _, case, _ in each}) < LEAST_GROUPS:
        return {}, (None, None)
    runs = [replace(case.run, known_rows=trials.rows) for _, case, trials in each if case.run is not None]
    ratios = [log2(run.rows_ratio) for run in runs]
    found = {}
    for outcome, plain in fits.items():
        forecasts = plain.forecasts
        laid = [
            trial_terms(outcome, trials, float(forecasts[number]), run.train_rows, kind)
            for (number, _, trials), run in zip(each, runs, strict=True)
        ]
        rows = _rows(laid, ratios, outcome, [case for _, case, _ in each], kind)
        rows = replace(rows, own=np.array([number < own for number, _, _ in each]))
        found[outcome] = _fit(rows, outcome, BOUNDS)
    lines = {name: fit.line for name, fit in found.items()}
    return lines, _domains(found.values(), runs, [number < own for number, _, _ in each])


def _most(fits: Sequence[_Fit], sizes: Sequence[float], which: Flags) -> float:
    """Largest size of the runs, taken in steps of a doubling, up to which nothing says that the intervals fail."""
    step = np.ceil(np.log2(np.array(sizes)) - 1e-9)
    holds = np.array([fit.holds for fit in fits])
    known = np.array([np.isfinite(fit.errors) for fit in fits])
    most = float(np.array(sizes)[which].min())
    for one in np.unique(step[which]):
        there = which & (step == one)
        counts = [
            (int((of_one & there).sum()), int((of & there).sum())) for of_one, of in zip(holds, known, strict=True)
        ]
        if any(runs < LEAST_RUNS or _fails(held, runs) for held, runs in counts):
            break
        most = max(size for size, at in zip(sizes, there, strict=True) if at)
    return most


def _none_holds(fits: Sequence[_Fit], runs: Sequence[Run], which: Flags) -> bool:
    """Whether the intervals of some outcome fail on the runs with the fewest rows for each known one."""
    ratios = np.array([run.rows_ratio for run in runs])
    least = which & (ratios <= ratios[which].min() * 1.05)
    counts = [(int((least & fit.holds).sum()), int((least & np.isfinite(fit.errors)).sum())) for fit in fits]
    return any(runs_there and _fails(held, runs_there) for held, runs_there in counts)


def _fails(held: int, runs: int) -> bool:
    from scipy.stats import binomtest

    return float(binomtest(held, runs).proportion_ci(method="wilson").high) < PROMISED


def _fit(rows: _Rows, outcome: Outcome, bounds: Bounds = FREE) -> _Fit:
    measured = np.isfinite(rows.real)
    _, group = np.unique(rows.group[measured], return_inverse=True)
    groups = len(np.unique(group))
    if groups < LEAST_GROUPS:
        raise ConfigError(f"a calibration needs {outcome} of {LEAST_GROUPS} data sets or more, got {groups}")
    x, error = rows.x[measured], (rows.real - rows.base)[measured]
    each = rows.weight[measured]
    heaviest = np.array([each[group == one].max() for one in range(groups)])
    weight = each / np.bincount(group, each)[group] * heaviest[group]

    def left_out(penalty: float) -> Array:
        errors = np.empty(len(error))
        for one in range(groups):
            rest = group != one
            beta = _ridge(x[rest], error[rest], weight[rest], penalty, bounds)
            errors[~rest] = error[~rest] - within_limits(x[~rest], _limits(x[rest])) @ beta
        return errors

    missed = [left_out(penalty) for penalty in PENALTIES]
    best = int(np.argmin([_size(errors, weight) for errors in missed]))
    beta = _ridge(x, error, weight, PENALTIES[best], bounds)
    around = missed[best] - (np.bincount(group, each * missed[best]) / np.bincount(group, each))[group]
    doublings, classes = rows.doublings[measured], rows.classes[measured]
    spread, growth, variety = _widest(missed[best], doublings, classes, weight, rows.own[measured])
    line = Line(
        coefficients=tuple(map(float, beta)),
        limits=_limits(x),
        penalty=PENALTIES[best],
        spread=spread,
        within=0.0,
        groups=groups,
        runs=len(error),
        growth=growth,
        variety=variety,
        effective=None if np.ptp(heaviest) == 0.0 else float(heaviest.sum() ** 2 / (heaviest**2).sum()),
    )
    broad = np.array([breadth(line, *pair) for pair in zip(doublings, classes, strict=True)])
    errors = np.full(len(rows.real), np.nan)
    errors[measured] = missed[best]
    return _Fit(replace(line, within=_size(around / broad, weight)), rows, errors)


def _size(errors: Array, weight: Array) -> float:
    return float(np.sqrt(np.average(errors**2, weights=weight)))


def _widest(errors: Array, doublings: Array, classes: Array, weight: Array, own: Flags) -> tuple[float, float, float]:
    """The spread of all runs, and no less than that of the own runs, and of those beside them, by themselves."""
    # Where the own runs are many and easy, their small errors say nothing of the others, and the other way round.
    sides = [side for side in (np.ones(len(own), bool), own, ~own) if side.any()]
    found = [_spread(errors[side], doublings[side], classes[side], weight[side]) for side in sides]
    spread, growth, variety = (max(numbers) for numbers in zip(*found, strict=True))
    return spread, growth, variety


def _spread(errors: Array, doublings: Array, classes: Array, weight: Array) -> tuple[float, float, float]:
    """Mean square of the errors as a² + b² d² + c² k², by the likelihood of normal errors, b/a and c/a of `GROWTHS`."""
    # Least squares of the squared errors is ruled by the largest of them, far from the known rows, and often leaves
    # nothing for a: intervals of no width where all rows are known.
    w = weight / weight.sum()
    best = (inf, 0.0, 0.0, 0.0)
    for of_classes in GROWTHS if classes.any() else GROWTHS[:1]:
        growth = 1.0 + (of_classes * classes) ** 2 + (GROWTHS[:, None] * doublings) ** 2
        square = (errors**2 / growth) @ w  # a² at its best
        with np.errstate(divide="ignore"):
            likelihood = np.log(square) + np.log(growth) @ w  # twice the negative logarithm
        at = int(np.argmin(likelihood))
        best = min(best, (float(likelihood[at]), float(square[at]), float(GROWTHS[at]), float(of_classes)))
    _, square_at_best, of_rows, of_classes = best
    spread = sqrt(square_at_best)
    return spread, of_rows * spread, of_classes * spread


def _limits(x: Array) -> tuple[float, float]:
    return float(x[:, -1].min()), float(x[:, -1].max())


def _ridge(x: Array, y: Array, weight: Array, penalty: float, bounds: Bounds) -> Array:
    # β = (XᵀWX + penalty · D)⁻¹ XᵀWy, W of sum 1 and D the mean squares of the columns (a unit for an empty one);
    # within bounds the β that makes the same sum of squares the least.
    w = weight / weight.sum()
    size = np.average(x**2, axis=0, weights=w)
    shrunk = penalty * np.where(size > 0, size, 1.0)
    if bounds == FREE:
        gram = (x * w[:, None]).T @ x + np.diag(shrunk)
        return np.asarray(np.linalg.solve(gram, x.T @ (w * y)))
    root = np.sqrt(w)
    rows = np.concatenate([x * root[:, None], np.diag(np.sqrt(shrunk))])
    targets = np.concatenate([y * root, np.zeros(len(size))])
    return np.asarray(lsq_linear(rows, targets, bounds=bounds, method="bvls").x)
