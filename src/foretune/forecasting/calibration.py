"""Calibration: from what the simulation says to what runs gave, fitted on finished runs of other data sets.

Accuracy is taken as its logit, another main metric on its own scale, losses as their logarithms. On that scale the
run's value is

    y = s + Σ_j β_j x_j + error

with s the simulated value, w = min(1, movement) and three x: w, w times the probe's value less s, and, for N training
rows and fewer samples n, c · log(simulated eval loss / simulated train loss), c = (1 − √(n/N)) / (√2 − 1). The
simulated run sees the n rows again where the real one sees new ones: the more it fits them, the more it loses by that.
What is still to come from n to N rows is c times what came from n/2 to n, where that which lacks falls as one over the
root of the rows. A run that hardly moves its adapter is linear, as the simulation takes it to be, and w leaves it
alone. β is fitted by ridge regression towards 0, that is towards the simulation itself, every data set with the same
weight. The third x, which grows with rows, epochs and learning rate, counts only as far as the fit has seen it; the
others are bounded by their scale. A run outside what the fit has seen gets a wider interval or none
(`foretune.forecasting.reach`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from math import exp2, inf, isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from foretune.arrays import Array
from foretune.errors import ConfigError, border
from foretune.forecasting.outcomes import LOSSES, Outcome, outcomes_of, scale, unscale
from foretune.forecasting.reach import FARTHEST, INSIDE, Domain, Reach, Run, reach
from foretune.forecasting.shown import Shown
from foretune.tasks.metrics import Kind, Metric, main_metric

TERMS = ("constant", "probe", "more_rows")
LEAST_GROUPS = 3
SCHEMA = 2
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
class Line:
    """Calibration of one outcome, on the logit or logarithmic scale.

    Attributes:
        coefficients: β of `TERMS`, each for its term as it is.
        limits: Least and largest value of the last term, `more_rows`, in the fit; beyond them it counts as these.
        penalty: Ridge penalty, chosen by leaving each data set out.
        spread: Root mean square error on data sets left out of the fit.
        within: The same less each data set's mean error: how well runs on one data set are told apart.
        groups: Data sets.
        runs: Runs.
    """

    coefficients: tuple[float, ...]
    limits: tuple[float, float]
    penalty: float
    spread: float
    within: float
    groups: int
    runs: int


@dataclass(frozen=True)
class Calibration:
    """Calibration of all outcomes.

    Attributes:
        lines: By outcome.
        outputs: Output reductions that it was made for.
        groups: Data sets that it was fitted on.
        source: Study that it comes from.
        domain: What its runs have shown; None where that is not known, so that it makes no forecast of other runs.
    """

    lines: Mapping[str, Line]
    outputs: tuple[str, ...]
    groups: tuple[str, ...]
    source: str
    domain: Domain | None

    @property
    def kind(self) -> Kind:
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
            "outputs": list(self.outputs),
            "groups": list(self.groups),
            "source": self.source,
            "lines": lines,
            "domain": None if self.domain is None else asdict(self.domain),
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
    """

    levels: Mapping[str, Interval] | None
    order: tuple[float, float]
    reach: Reach
    kind: Kind = "classification"
    calibrated: bool = True

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


def terms(outcome: Outcome, values: Mapping[str, float], kind: Kind = "classification") -> tuple[float, Array]:
    """Lay out one case for the fit.

    Args:
        outcome: Which outcome.
        values: From `case_values`.
        kind: Kind of task.

    Returns:
        s, and x in the order of `TERMS`.
    """
    simulated = scale(outcome, values[f"simulated_{outcome}"], kind)
    of_eval, of_train = (scale(name, values[f"simulated_{name}"], kind) for name in ("eval_loss", "train_loss"))
    gap = of_eval - of_train
    probe = scale(outcome, values["probe_loss" if outcome in LOSSES else f"probe_{outcome}"], kind)
    moved = min(1.0, values["movement"])
    to_come = (1.0 - 2.0 ** (-values["doublings"] / 2.0)) / (2.0**0.5 - 1.0)
    return simulated, np.array([moved, moved * (probe - simulated), to_come * gap])


def within_limits(x: Array, limits: tuple[float, float]) -> Array:
    """Keep the last term within what a fit has seen.

    Args:
        x: Terms, one case or a row for each.
        limits: Least and largest value of the last term.

    Returns:
        The same with the last one clipped.
    """
    kept = x.copy()
    kept[..., -1] = np.clip(x[..., -1], *limits)
    return kept


def half_width(line: Line, extra: float = 0.0) -> float:
    """Half the width of an interval inside what the calibration has seen, on its scale.

    Args:
        line: Calibration of the outcome.
        extra: Variance to add.

    Returns:
        t · √(spread² + extra).
    """
    return float(student.ppf(0.95, line.groups - 1)) * sqrt(line.spread**2 + extra)


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

        s + Σ_j β_j x_j ± 2^d · t · √(spread² + v · max(0, 1/m − 1/m₀))

    with the 95% quantile t of Student's distribution with (data sets − 1) degrees of freedom, since the spread is known
    from few data sets. The second term is what fewer evaluation rows m than the m₀ of the fit leave open: v is
    1/(p (1−p)) for an accuracy p (`Metric.row_variance`), and 1 for losses (as if they spread by
    their mean). With d > 1 there is no
    interval, and outside (d > 0) none of the training loss: the runs checked there missed it by up to five times the
    half-width, since the simulation fits its rows too well.

    Args:
        calibration: Calibration.
        values: From `case_values`.
        output: Output reduction that they were made with.
        run: What kind of run it is; None to take it for one of the kind that the calibration was fitted on.
        shown: What trials of the same adapter showed; this calibration has no terms for them.

    Returns:
        The forecast.

    Raises:
        ConfigError: If the calibration was made for other output reductions, or does not say what it has seen.
    """
    kind = calibration.kind
    metric = main_metric(kind)
    if run is not None and calibration.domain is not None and run.kind != kind:
        return _as_simulated(calibration.domain, values, run)
    if output not in calibration.outputs:
        raise ConfigError(
            f"the calibration {calibration.source!r} was made for output {' and '.join(calibration.outputs)}, "
            f"not {output!r}: leave --reduction out"
        )
    reached, fewer = INSIDE, 0.0
    if run is not None:
        if calibration.domain is None:
            raise ConfigError(
                f"the calibration {calibration.source!r} does not say which runs it has seen: make the study's "
                "outlooks and report again"
            )
        reached = reach(calibration.domain, run)
        fewer = max(0.0, 1.0 / run.eval_rows - 1.0 / calibration.domain.eval_rows)
    levels: dict[str, Interval] = {}
    for outcome in outcomes_of(kind):
        line = calibration.lines[outcome]
        simulated, x = terms(outcome, values, kind)
        middle = simulated + float(within_limits(x, line.limits) @ np.array(line.coefficients))
        value = unscale(outcome, middle)
        of_rows = 1.0 if outcome in LOSSES else metric.row_variance(value)
        half = 0.0 if reached.withheld else reached.widening * half_width(line, of_rows * fewer)
        if outcome == "train_loss" and reached.reasons:
            continue
        levels[outcome] = Interval(value, unscale(outcome, middle - half), unscale(outcome, middle + half))
    order = (levels[metric.name].value, levels["eval_loss"].value)
    return RunForecast(None if reached.withheld else levels, order, reached, kind)


def _as_simulated(domain: Domain, values: Mapping[str, float], run: Run) -> RunForecast:
    """What is left of a run of another kind of task: its place among others of its own."""
    metric = main_metric(run.kind)
    order = (values[f"simulated_{metric.name}"], values["simulated_eval_loss"])
    return RunForecast(None, order, reach(domain, run), run.kind, calibrated=False)


def tied(calibration: Calibration, first: RunForecast, second: RunForecast) -> bool:
    """Tell whether two adapters on one data set cannot be told apart by their forecast accuracies.

    Their difference on the metric's scale is within 1.645 · √2 · `within`, the error of such a difference at 90%, times
    the widening of the farther of the two from what the calibration has seen.

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
    return abs(difference) <= 1.645 * 2**0.5 * widening * calibration.lines[first.metric.name].within


def shipped_calibration() -> Calibration:
    """Read the calibration that comes with foretune.

    Returns:
        The calibration.
    """
    text = (files("foretune.forecasting") / "calibration.json").read_text(encoding="utf-8")
    return calibration_from(json.loads(text))


def read_calibration(path: Path | None = None) -> Calibration:
    """Read a calibration.

    Args:
        path: `calibration.json` of a study's report; None for the one that comes with foretune.

    Returns:
        The calibration.

    Raises:
        ConfigError: If it cannot be read.
    """
    if path is None:
        return shipped_calibration()
    path = path.expanduser()
    remedy = "foretune study report writes one"
    with border(ConfigError, f"cannot read calibration {str(path)!r}", remedy=remedy):
        content = json.loads(path.read_text(encoding="utf-8"))
    try:
        return calibration_from(content)
    except ConfigError as error:
        raise ConfigError(f"calibration {str(path)!r}: {error}; {remedy}") from error


def calibration_from(content: Any) -> Calibration:
    """Read a calibration.

    Args:
        content: As `Calibration.to_dict` gives it.

    Returns:
        The calibration.

    Raises:
        ConfigError: If it is none, or one of another version.
    """
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(content, Mapping) or "schema" not in content or "terms" not in content:
        raise ConfigError("this is no calibration")
    if content["schema"] != SCHEMA or content["terms"] != list(TERMS):
        raise ConfigError(f"calibration of schema {content['schema']!r}, not {SCHEMA}: fit it again")
    fields = {name: value for name, value in content.items() if name not in ("schema", "terms")}
    try:
        calibration = TypeAdapter(Calibration).validate_json(json.dumps(fields), strict=True)
    except (ValidationError, ValueError, TypeError) as error:
        what = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, what["loc"]))
        raise ConfigError(f"this is no calibration: {where} {what['msg']}") from error
    needed = outcomes_of(calibration.kind)
    if set(calibration.lines) != set(needed):
        raise ConfigError(f"calibration of {', '.join(sorted(calibration.lines))}: needs {', '.join(needed)}")
    for name, line in calibration.lines.items():
        numbers = (*line.coefficients, *line.limits, line.penalty, line.spread, line.within)
        whole = len(line.coefficients) == len(TERMS) and all(map(isfinite, numbers))
        if not whole or line.groups < LEAST_GROUPS or min(line.spread, line.within) < 0:
            raise ConfigError(f"calibration with {name} {line}: fit it again")
    if calibration.domain is not None:
        calibration.domain.check()
    return calibration
