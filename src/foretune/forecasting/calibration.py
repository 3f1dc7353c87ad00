"""Calibration: from what simulation and trials say to what runs gave, fitted on finished runs of other data sets.

Accuracy is taken as its logit, another main metric on its own scale, losses as their logarithms. Without trials a run's
value on that scale is that of `foretune.forecasting.terms`; with trials that of `foretune.forecasting.with_trials`. β
is fitted by ridge regression towards 0, that is towards the simulation, and γ towards the forecast without trials;
every data set has the same weight. The spread of the error grows with the distance d, in doublings, from the rows that
were seen (simulated or trained on) to those of the run, and with the classes C: variance a² + b² d² + c² log2(C/2)². A
run outside what the fit has seen gets a wider interval or none (`foretune.forecasting.reach`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import exp2, inf, isfinite, log2
from typing import Any

import numpy as np

from foretune.errors import ConfigError
from foretune.forecasting.line import Line, breadth, class_doublings, half_width
from foretune.forecasting.outcomes import LOSSES, Outcome, outcomes_of, unscale
from foretune.forecasting.reach import FARTHEST, INSIDE, Domain, Reach, Run, reach
from foretune.forecasting.risk import Risk
from foretune.forecasting.shown import Shown
from foretune.forecasting.terms import TERMS, terms, within_limits
from foretune.forecasting.with_trials import TRIAL_TERMS, Trials, reach_of_trials, together, trial_terms
from foretune.settings.groups import TaskKind
from foretune.tasks.metrics import Metric, main_metric

LEAST_GROUPS = 3
SCHEMA = 3
CALIBRATION = "calibration.json"  # in the report of a study, and in the folder of a run that was given one


@dataclass(frozen=True)
class Interval:
    """A forecast value with its 90% interval.

    Attributes:
        value: Forecast.
        low: 5% quantile.
        high: 95% quantile.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Calibration:
    """Calibration of all outcomes.

    Attributes:
        lines: By outcome.
        outputs: Output reductions that it was made for.
        groups: Data sets that it was fitted on.
        source: Study that it comes from.
        domain: What its runs have shown; None where that is not known, so that it makes no forecast of other runs.
        trial_lines: By outcome, of runs of which a trial is known; empty where the fit had none.
        trial_domain: What these have shown, `known_rows` the rows of the trials; None where there are none.
        risk: That a run collapses; None where the fit had no such run.
        further: Of one that was fitted on a user's runs and those that come with foretune, what the latter have shown;
            `domain` is then of the user's alone, since nothing is known of what lies between.
        further_trials: The same of runs with trials.
    """

    lines: Mapping[str, Line]
    outputs: tuple[str, ...]
    groups: tuple[str, ...]
    source: str
    domain: Domain | None
    trial_lines: Mapping[str, Line] = field(default_factory=dict)
    trial_domain: Domain | None = None
    risk: Risk | None = None
    further: Domain | None = None
    further_trials: Domain | None = None

    def reach(self, run: Run) -> Reach:
        """Compare a run with what the calibration has seen.

        Args:
            run: What the forecast is for.

        Returns:
            The distance to the nearer of what a user's runs and those that come with foretune have shown.

        Raises:
            ConfigError: If it does not say what it has seen.
        """
        if self.domain is None:
            raise ConfigError(
                f"the calibration {self.source!r} does not say which runs it has seen: make the study's outlooks and "
                "report again"
            )
        return _nearer([reach(domain, run) for domain in (self.domain, self.further) if domain is not None])

    @property
    def kind(self) -> TaskKind:
        """Kind of task that it was fitted on."""
        return "classification" if self.domain is None else self.domain.kind

    def to_dict(self) -> dict[str, Any]:
        """Lay out as JSON.

        Returns:
            JSON-ready values.
        """
        lines = {name: asdict(line) for name, line in self.lines.items()}
        return {
            "schema": SCHEMA,
            "terms": list(TERMS),
            "trial_terms": list(TRIAL_TERMS),
            "outputs": list(self.outputs),
            "groups": list(self.groups),
            "source": self.source,
            "lines": lines,
            "domain": None if self.domain is None else asdict(self.domain),
            "trial_lines": {name: asdict(line) for name, line in self.trial_lines.items()},
            "trial_domain": None if self.trial_domain is None else asdict(self.trial_domain),
            "risk": None if self.risk is None else asdict(self.risk),
            **{
                name: asdict(domain)
                for name, domain in (("further", self.further), ("further_trials", self.further_trials))
                if domain is not None
            },
        }


@dataclass(frozen=True)
class RunForecast:
    """What is said of a run before it is made.

    Attributes:
        levels: Forecasts by outcome, each with its 90% interval; without `train_loss` outside of what the calibration
            has seen; None where all are withheld (`reach` says why).
        order: Main metric and evaluation loss, to put adapters of one model and data set into order by; no levels,
            where those are withheld. Calibrated; of a kind of task that the calibration has not seen as simulated.
        reach: Whether the run lies within what the calibration has seen.
        kind: Kind of task.
        calibrated: Whether a calibration of this kind of task was applied.
        note: Why trials of the run change nothing; empty where they do, or there are none.
        breadth: How much larger its spread is than that of a run on two classes with all rows known.
    """

    levels: Mapping[str, Interval] | None
    order: tuple[float, float]
    reach: Reach
    kind: TaskKind = "classification"
    calibrated: bool = True
    note: str = ""
    breadth: float = 1.0

    @property
    def metric(self) -> Metric:
        """The main metric."""
        return main_metric(self.kind)

    @property
    def key(self) -> tuple[float, float]:
        """Sorts the better run first: by the metric, one that is not defined last, then by loss."""
        value = self.metric.better * self.order[0]
        return (-value if isfinite(value) else inf), self.order[1]

    def to_dict(self) -> dict[str, Any]:
        """Lay out as in `result.json`.

        Returns:
            JSON-ready values: `levels`, None where withheld, and `reach`.
        """
        known = self.levels
        levels = None
        if known is not None:
            levels = {name: asdict(known[name]) if name in known else None for name in (*LOSSES, self.metric.name)}
        return {"levels": levels, "reach": self.reach.to_dict()}


def apply_calibration(
    calibration: Calibration,
    values: Mapping[str, float],
    output: str,
    *,
    run: Run | None = None,
    shown: Sequence[Shown] = (),
) -> RunForecast:
    """Forecast a run.

    Of a kind of task that the calibration has not seen no level is forecast, and the order is as simulated. On the
    scale of the fit, the last x kept within its limits and d from `reach`, the interval is

        s + Σ_j β_j x_j ± 2^d · t · √(spread² + growth² δ² + variety² log2(C/2)² + v · max(0, 1/m − 1/m₀))

    with the 95% quantile t of Student's distribution with `Line.degrees` degrees of freedom, since the spread is known
    from few data sets, and δ the doublings from the known rows to those of the run. The last term is what fewer
    evaluation rows m than the m₀ of the fit leave open: v is 1/(p (1−p)) for an accuracy p (`Metric.row_variance`), and
    1 for losses (as if they spread by their mean). With d > 1 there is no interval, and outside (d > 0) none of the
    training loss: the runs checked there missed it by up to five times the half-width, since the simulation fits its
    rows too well.

    Nor has a run that collapses with a probability of a half or more (`foretune.forecasting.risk`) any: the lines are
    those of runs that do not.

    With trials, and a calibration that has seen some, the forecast without them is s, x, spread and δ are those of
    `with_trials`. A trial that lies farther from what was checked than the run itself changes nothing, which `note`
    says; one on the most rows that diverged leaves no level.

    Args:
        calibration: Calibration.
        values: From `case_values`.
        output: Output reduction that they were made with.
        run: What kind of run it is; None to take it for one of the kind that the calibration was fitted on.
        shown: What trials of the same adapter and recipe showed; they count where `run` is given.

    Returns:
        The forecast.

    Raises:
        ConfigError: If the calibration was made for other output reductions, or does not say what it has seen.
    """
    kind = calibration.kind
    if run is not None and calibration.domain is not None and run.kind != kind:
        return _as_simulated(calibration.domain, values, run)
    if output not in calibration.outputs:
        raise ConfigError(
            f"the calibration {calibration.source!r} was made for output {' and '.join(calibration.outputs)}, "
            f"not {output!r}: leave --reduction out"
        )
    if run is None:
        return forecast_inside(calibration, values)
    reached = _or_collapses(calibration.reach(run), calibration.risk, run)
    seen = [domain.eval_rows for domain in (calibration.domain, calibration.further) if domain is not None]
    fewer = max(0.0, 1.0 / run.eval_rows - 1.0 / max(seen))
    plain, many = _without_trials(calibration, values), class_doublings(run.classes)
    if not shown or calibration.trial_domain is None:
        return _leveled(calibration.lines, plain, _Spread(values["doublings"], many, fewer, reached), kind)
    trials = together(shown, kind)
    if trials is None:
        diverged = Reach(inf, (f"the trial on {max(one.rows for one in shown):,} rows diverged",))
        return _leveled(calibration.lines, plain, _Spread(0.0, reached=diverged), kind)
    middle = _with_trials(calibration, plain, trials, run.train_rows)
    known = (calibration.trial_domain, calibration.further_trials)
    of_trials = _nearer([reach_of_trials(domain, run, trials) for domain in known if domain is not None])
    if of_trials.doublings > reached.doublings:  # what it adds was not checked, and it shall take nothing away
        said = _leveled(calibration.lines, plain, _Spread(values["doublings"], many, fewer, reached), kind)
        return replace(
            said, note=f"The trial on {trials.rows:,} rows changes no forecast: {'; '.join(of_trials.reasons)}."
        )
    spread = _Spread(max(0.0, log2(run.train_rows / trials.rows)), many, fewer, reached)
    return _leveled(calibration.trial_lines, middle, spread, kind)


def forecast_inside(
    calibration: Calibration,
    values: Mapping[str, float],
    *,
    classes: int = 2,
    trials: Trials | None = None,
    train_rows: int = 0,
) -> RunForecast:
    """Forecast a run of the kind that a calibration was fitted on, whatever else it is.

    Args:
        calibration: Calibration.
        values: From `case_values`.
        classes: Classes of its task.
        trials: What trials of it showed; None for none.
        train_rows: Rows N of the run, asked for with trials alone.

    Returns:
        The forecast as `apply_calibration` makes it, with d = 0 and as many evaluation rows as in the fit.
    """
    plain, many = _without_trials(calibration, values), class_doublings(classes)
    if trials is None:
        return _leveled(calibration.lines, plain, _Spread(values["doublings"], many), calibration.kind)
    middle = _with_trials(calibration, plain, trials, train_rows)
    spread = _Spread(max(0.0, log2(train_rows / trials.rows)), many)
    return _leveled(calibration.trial_lines, middle, spread, calibration.kind)


def _without_trials(calibration: Calibration, values: Mapping[str, float]) -> dict[Outcome, float]:
    """Forecasts by outcome, on the scale."""
    plain = {}
    for outcome, line in calibration.lines.items():
        s, x = terms(outcome, values, calibration.kind)
        plain[outcome] = s + float(within_limits(x, line.limits) @ np.array(line.coefficients))
    return plain


def _with_trials(
    calibration: Calibration, plain: Mapping[Outcome, float], trials: Trials, train_rows: int
) -> dict[Outcome, float]:
    """Forecasts by outcome, on the scale."""
    middle = {}
    for outcome, line in calibration.trial_lines.items():
        p, x = trial_terms(outcome, trials, plain[outcome], train_rows, calibration.kind)
        middle[outcome] = p + float(within_limits(x, line.limits) @ np.array(line.coefficients))
    return middle


def _nearer(reaches: Sequence[Reach]) -> Reach:
    return min(reaches, key=lambda reached: reached.doublings)


def _or_collapses(reached: Reach, risk: Risk | None, run: Run) -> Reach:
    """The lines are those of runs that do not collapse: one that is likely to has no level."""
    if risk is None or run.update_rate is None or not risk.likely(run.update_rate, run.steps):
        return reached
    chance = f"{100 * risk.probability(run.update_rate, run.steps):.0f} of 100 runs"
    why = f"{chance} of {run.steps:,} steps at a mean learning rate times α of {run.update_rate:.2g} collapse"
    return Reach(inf, (*reached.reasons, why))


@dataclass(frozen=True)
class _Spread:
    """What widens an interval: doublings beyond the rows that were seen, those of the classes, fewer rows, reach."""

    doublings: float
    classes: float = 0.0
    fewer: float = 0.0
    reached: Reach = INSIDE


def _leveled(
    lines: Mapping[Outcome, Line], middle: Mapping[Outcome, float], spread: _Spread, kind: TaskKind
) -> RunForecast:
    """Put intervals around forecasts on the scale."""
    metric, reached = main_metric(kind), spread.reached
    levels: dict[str, Interval] = {}
    for outcome in outcomes_of(kind):
        value = unscale(outcome, middle[outcome])
        if outcome == "train_loss" and reached.reasons:
            continue
        half = 0.0
        if not reached.withheld:
            of_rows = 1.0 if outcome in LOSSES else metric.row_variance(value)
            half = reached.widening * half_width(
                lines[outcome], of_rows * spread.fewer, doublings=spread.doublings, classes=spread.classes
            )
        low, high = unscale(outcome, middle[outcome] - half), unscale(outcome, middle[outcome] + half)
        levels[outcome] = Interval(value, low, high)
    order = (levels[metric.name].value, levels["eval_loss"].value)
    broad = breadth(lines[metric.name], spread.doublings, spread.classes)
    return RunForecast(None if reached.withheld else levels, order, reached, kind, breadth=broad)


def _as_simulated(domain: Domain, values: Mapping[str, float], run: Run) -> RunForecast:
    """What is left of a run of another kind of task: its place among others of its own."""
    metric = main_metric(run.kind)
    order = (values[f"simulated_{metric.name}"], values["simulated_eval_loss"])
    return RunForecast(None, order, reach(domain, run), run.kind, calibrated=False)


def tied(calibration: Calibration, first: RunForecast, second: RunForecast) -> bool:
    """Tell whether two adapters on one data set cannot be told apart by their forecast accuracies.

    Their difference on the metric's scale is within 1.645 · √2 · `within` · `breadth`, the error of such a difference
    at 90%, times the widening of the farther of the two from what the calibration has seen.

    Args:
        calibration: Calibration.
        first: Forecast of one.
        second: Of the other.

    Returns:
        Whether they tie; no of runs that were not calibrated, whose error is not known.
    """
    if not (first.calibrated and second.calibrated):
        return False
    difference = first.metric.to_scale(first.order[0]) - second.metric.to_scale(second.order[0])
    widening = max(exp2(min(forecast.reach.doublings, FARTHEST)) for forecast in (first, second))
    error = calibration.lines[first.metric.name].within * max(first.breadth, second.breadth)
    return abs(difference) <= 1.645 * 2**0.5 * widening * error
