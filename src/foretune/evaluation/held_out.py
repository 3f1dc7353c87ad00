"""Held-out calibration: each data set of a study forecast by one fitted on the others, and how good that was."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from foretune.arrays import Array
from foretune.evaluation.collapses import collapsed_keys, rate_of, rates_by_key, risks_of, steps_of
from foretune.evaluation.predictors import calibrated, predictors_of
from foretune.evaluation.records import Record
from foretune.evaluation.statistics import spearman
from foretune.evaluation.trial_runs import trials_of
from foretune.forecasting.calibration import LEAST_GROUPS, Calibration, Interval, forecast_inside
from foretune.forecasting.calibration_fit import Case, fit_calibration
from foretune.forecasting.finished_runs import FinishedRun
from foretune.forecasting.outcomes import Outcome, outcomes_of, scale, unscale
from foretune.forecasting.reach import Run, run_from
from foretune.forecasting.shown import Shown
from foretune.forecasting.with_trials import together
from foretune.study.damage import Value
from foretune.tasks.metrics import main_metric

OUTPUTS = ("margin", "full")  # of two classes and of all else: what is differentiated for a simulation


def simulated_values(record: Record, simulation: Mapping[str, Value] | None = None) -> dict[str, float] | None:
    """Take what was simulated for a cell out of its quantities.

    Args:
        record: Cell.
        simulation: One of its variants; None takes its quantities.

    Returns:
        Values of `case_values`; None if the cell was not simulated. Simulations of earlier versions do not
        say which epoch was best: where all rows are known, that is not asked.
    """
    quantities = record.quantities if simulation is None else simulation
    values = {name: quantities.get(name) for name in calibrated(record.kind)}
    if values["doublings"] == 0.0:
        for name in ("eval_loss", main_metric(record.kind).name):
            if values[f"best_{name}"] is None:
                values[f"best_{name}"] = values[f"simulated_{name}"]
    if any(value is None for value in values.values()):
        return None
    return {name: float(value) for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class CellCase:
    """A case, and the cell and simulation that it is of.

    Attributes:
        record: Cell.
        case: What the fit takes.
        primary: Whether it is of the cell's own simulation, not of a variant.
    """

    record: Record
    case: Case
    primary: bool


def cell_cases(records: Sequence[Record]) -> list[CellCase]:
    """Pair simulations, and runs of the same recipe on fewer rows, with what the runs gave.

    Args:
        records: Cells of one kind of task.

    Returns:
        Cases of those cells that have an end and a simulation, one for each of its simulations.
    """
    cases = []
    found = trials_of(records)
    for record in records:
        outcomes = {name: record.outcomes[name] for name in outcomes_of(record.kind)}
        if record.facts["diverged"] or None in outcomes.values():
            continue
        real: dict[str, float] = {name: float(value or 0.0) for name, value in outcomes.items()}
        for number, simulation in enumerate((record.quantities, *record.variants)):
            values = simulated_values(record, simulation)
            if values is not None:
                case = Case(values, real, record.family, _run(record, simulation), found.get(record.key, ()))
                cases.append(CellCase(record, case, number == 0))
    return cases


def calibration_cases(records: Sequence[Record]) -> list[Case]:
    """Take what a calibration is fitted on.

    Args:
        records: Cells of one kind of task.

    Returns:
        Cases of those cells that have an end and a simulation, each from its own: those from fewer known rows are
        judged, not learnt from, since a run simulated from few rows lacks something else than one from many. So are
        runs that collapsed, which a simulation does not see: that has a probability of its own.
    """
    return [entry.case for entry in _learnt_from(cell_cases(records), records)]


def finished_runs(records: Sequence[Record]) -> tuple[FinishedRun, ...]:
    """Take what a calibration and its risk are fitted on, cell by cell.

    Args:
        records: Cells of one kind of task.

    Returns:
        Those cells that either learns from.
    """
    cases = {entry.record.key: entry.case for entry in _learnt_from(cell_cases(records), records)}
    rates = rates_by_key(records)
    keys = [record.key for record in records if record.key in cases or record.key in rates]
    return tuple(FinishedRun(key, cases.get(key), rates.get(key)) for key in keys)


def _learnt_from(cases: Sequence[CellCase], records: Sequence[Record]) -> list[CellCase]:
    collapsed = collapsed_keys(records)
    return [entry for entry in cases if entry.primary and entry.record.key not in collapsed]


@dataclass(frozen=True)
class Judged:
    """One forecast of a cell by a calibration that knows no run of its data set.

    Attributes:
        record: Cell.
        case: What was known of it.
        trials: Trials that the forecast was made with; none without training.
        levels: Forecasts by outcome, each with its 90% interval.
        withheld: Whether none would be given, since the run was likelier to collapse than not: the order alone.
    """

    record: Record
    case: Case
    trials: tuple[Shown, ...]
    levels: Mapping[str, Interval]
    withheld: bool = False

    @property
    def spend(self) -> float:
        """Rows of the trials over those of the run, as all see them as often."""
        return sum(one.rows for one in self.trials) / float(self.record.facts["train_rows"] or 1.0)

    @property
    def rows_ratio(self) -> float:
        """N over the known rows, or over the rows of the largest trial."""
        rows = max((one.rows for one in self.trials), default=0)
        return float(self.record.facts["train_rows"] or 1.0) / rows if rows else 2.0 ** self.case.simulated["doublings"]


@dataclass(frozen=True)
class HeldOutForecasts:
    """Forecasts of a study, each by a calibration that knows no run of its data set.

    Attributes:
        records: Cells, the forecasts among their quantities.
        forecasts: By cell's key: forecasts by outcome, without trials and from the cell's own simulation. Empty where
            nothing was simulated or for too few data sets; none of a run that was likelier to collapse than not.
        judged: All forecasts: from every number of known rows, and with the study's runs on fewer rows as trials.
    """

    records: tuple[Record, ...]
    forecasts: Mapping[str, Mapping[str, Interval]]
    judged: tuple[Judged, ...] = ()


def forecast_held_out(records: Sequence[Record]) -> HeldOutForecasts:
    """Forecast every cell by a calibration fitted on the other data sets of the study alone.

    No reach is asked for: what a left-out data set has that the others lack is no reason to widen, since the spread
    comes from leaving out.

    Args:
        records: Cells of one kind of task.

    Returns:
        Cells with forecasts; as they were if the simulated cells are of fewer than 4 data sets.
    """
    cases = cell_cases(records)
    groups = sorted({entry.case.group for entry in cases})
    if len(groups) < LEAST_GROUPS + 1:
        return HeldOutForecasts(tuple(records), {})
    learnt_from = _learnt_from(cases, records)
    fitted: dict[str, Calibration] = {}
    for group in sorted({record.family for record in records}):
        rest = [entry.case for entry in learnt_from if entry.case.group != group]
        if len({case.group for case in rest}) >= LEAST_GROUPS:
            fitted[group] = fit_calibration(rest, OUTPUTS, f"all but {group}")
    risks = risks_of(records)
    likely = {
        record.key
        for record in records
        if (risk := risks[record.family]) is not None and risk.likely(rate_of(record), steps_of(record))
    }
    judged = [
        replace(one, withheld=one.record.key in likely)
        for entry in cases
        if entry.case.group in fitted
        for one in _judge(entry, fitted[entry.case.group])
    ]
    columns = {entry.forecast_of: entry.name for entry in predictors_of(records[0].kind) if entry.forecast_of}
    forecasts = {}
    changed = []
    for record in records:
        simulated = simulated_values(record)
        if simulated is None or record.family not in fitted or record.key in likely:
            changed.append(record)
            continue
        levels = forecast_inside(fitted[record.family], simulated, classes=_classes(record)).levels or {}
        forecasts[record.key] = levels
        values = {column: levels[outcome].value for outcome, column in columns.items() if outcome in levels}
        changed.append(replace(record, quantities={**record.quantities, **values}))
    return HeldOutForecasts(tuple(changed), forecasts, tuple(judged))


def _judge(entry: CellCase, calibration: Calibration) -> list[Judged]:
    """Forecasts of a cell: without trials, and from its own simulation with each set of them."""
    case, record = entry.case, entry.record
    classes = _classes(record)
    plain = forecast_inside(calibration, case.simulated, classes=classes)
    made = [Judged(record, case, (), plain.levels or {})]
    if not calibration.trial_lines or not entry.primary:
        return made
    for shown in case.trials:
        trials = together(shown, record.kind)
        if trials is not None:
            rows = int(record.facts["train_rows"] or 0)
            said = forecast_inside(calibration, case.simulated, classes=classes, trials=trials, train_rows=rows)
            made.append(Judged(record, case, shown, said.levels or {}))
    return made


def _classes(record: Record) -> int:
    return int(record.facts["classes"] or 2)


def _run(record: Record, simulation: Mapping[str, Value]) -> Run | None:
    """What kind of run the cell's was; the numbers that are stored of it do not say its kind of task, the cell does."""
    run = run_from(simulation)
    return None if run is None else replace(run, kind=record.kind)


def why_no_forecast(held_out: HeldOutForecasts) -> str | None:
    """Say that simulated runs are of too few data sets.

    Args:
        held_out: Forecasts of a study.

    Returns:
        A sentence; None where there are forecasts, or nothing was simulated.
    """
    groups = {case.group for case in calibration_cases(held_out.records)}
    if held_out.forecasts or not groups:
        return None
    return (
        f"Simulated runs of {len(groups)} data sets of {held_out.records[0].kind}: held-out forecasts need "
        f"{LEAST_GROUPS + 1} or more, so there are none."
    )


@dataclass(frozen=True)
class ForecastQuality:
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


def forecast_qualities(held_out: HeldOutForecasts) -> tuple[ForecastQuality, ...]:
    """Compare forecasts with what the runs gave.

    Args:
        held_out: Forecasts of a study.

    Returns:
        One for each outcome; none without forecasts.
    """
    forecast = [r for r in held_out.records if r.key in held_out.forecasts and _is_known(r)]
    if len(forecast) < 2:
        return ()
    return tuple(_quality(outcome, forecast, held_out) for outcome in outcomes_of(forecast[0].kind))


def _is_known(record: Record) -> bool:
    """Whether all outcomes are there; a correlation with constant outputs is none."""
    return not record.facts["diverged"] and all(record.outcomes[name] is not None for name in outcomes_of(record.kind))


def _quality(outcome: Outcome, records: Sequence[Record], held_out: HeldOutForecasts) -> ForecastQuality:
    intervals = [held_out.forecasts[record.key][outcome] for record in records]
    value = np.array([interval.value for interval in intervals])
    low, high = (np.array([getattr(interval, end) for interval in intervals]) for end in ("low", "high"))
    real = np.array([float(record.outcomes[outcome] or 0.0) for record in records])
    simulated = np.array([float(record.quantities[f"simulated_{outcome}"] or 0.0) for record in records])
    return ForecastQuality(
        outcome=outcome,
        cells=len(records),
        spearman=rank_correlation(value, real),
        spearman_within=_within(records, value, real),
        error=float(np.abs(value - real).mean()),
        bias=float((value - real).mean()),
        covered=float(((low <= real) & (real <= high)).mean()),
        width=float((high - low).mean()),
        simulated_error=float(np.abs(simulated - real).mean()),
        noise=_noise(records, real),
    )


def rank_correlation(x: Array, y: Array) -> float:
    """Spearman's ρ of two columns.

    Args:
        x: Column.
        y: Column.

    Returns:
        ρ; NaN for fewer than three values or a constant.
    """
    if len(x) < 3:  # a constant gives NaN as well
        return float("nan")
    return float(spearman(x[:, None], y[:, None])[0, 0])


def _within(records: Sequence[Record], x: Array, y: Array) -> float:
    values = []
    for group in sorted({record.group for record in records}):
        units = sorted({record.unit for record in records if record.group == group})
        cells = [[record.unit == unit for record in records] for unit in units]
        x_means, y_means = (np.array([column[rows].mean() for rows in cells]) for column in (x, y))
        values.append(rank_correlation(x_means, y_means))
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def _noise(records: Sequence[Record], real: Array) -> float:
    differences = []
    for unit in sorted({record.unit for record in records}):
        values = real[[record.unit == unit for record in records]]
        if len(values) > 1:
            differences += list(np.abs(values - values.mean()) * np.sqrt(len(values) / (len(values) - 1)))
    return float(np.mean(differences)) if differences else float("nan")


def level_error(records: Sequence[Record], predictor: str, *, logarithmic: bool) -> float | None:
    """Mean absolute error of the main metric when one predictor alone is calibrated, each data set by the others.

    The logit of the accuracy, or another metric on its own scale, is a straight line in the predictor (its logarithm
    where it is a scale), by least squares.

    Args:
        records: Cells of one kind of task.
        predictor: Name of the predictor.
        logarithmic: Whether it is a scale.

    Returns:
        The error, of accuracy as a fraction; None where cells lack it, or there are fewer than 4 data sets.
    """
    finished = [record for record in records if _is_known(record)]
    values = [record.quantities.get(predictor) for record in finished]
    groups = np.array([record.family for record in finished])
    if any(value is None or not np.isfinite(value) for value in values) or len(set(groups)) < LEAST_GROUPS + 1:
        return None
    x = np.array([float(value or 0.0) for value in values])
    change: Callable[[Array], Array] = np.log if logarithmic and (x > 0).all() else np.asarray
    x = change(x)
    metric = main_metric(finished[0].kind).name
    real = np.array([float(record.outcomes[metric] or 0.0) for record in finished])
    y = np.array([scale(metric, value) for value in real])
    errors = np.empty(len(x))
    for group in set(groups):
        rest = groups != group
        slope, level = np.polyfit(x[rest], y[rest], 1) if np.ptp(x[rest]) > 0 else (0.0, y[rest].mean())
        low, high = y[rest].min(), y[rest].max()
        forecast = np.clip(level + slope * x[~rest], low, high)  # a line has no business beyond what it was fitted on
        errors[~rest] = [unscale(metric, float(value)) for value in forecast] - real[~rest]
    return float(np.abs(errors).mean())
