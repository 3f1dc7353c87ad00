"""Calibration: from what the simulation says to what runs gave, fitted on finished runs of other data sets.

Accuracy is taken as its logit, losses as their logarithms. On that scale the run's value is

    y = s + Σ_j β_j x_j + error

with s the simulated value, w = min(1, movement) and three x: w, w times the probe's value less s, and, for N training
rows and fewer samples n, c · log(simulated eval loss / simulated train loss), c = (1 − √(n/N)) / (√2 − 1). The
simulated run sees the n rows again where the real one sees new ones: the more it fits them, the more it loses by that.
What is still to come from n to N rows is c times what came from n/2 to n, where that which lacks falls as one over the
root of the rows. A run that hardly moves its adapter is linear, as the simulation takes it to be, and w leaves it
alone. β is fitted by ridge regression towards 0, that is towards the simulation itself, every data set with the same
weight.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from math import exp, isfinite, log, log2
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from foretune.errors import ConfigError
from foretune.forecasting.outlook import Outlook

Array = NDArray[np.float64]
Outcome = Literal["train_loss", "eval_loss", "accuracy"]
OUTCOMES: tuple[Outcome, ...] = ("train_loss", "eval_loss", "accuracy")
TERMS = ("constant", "probe", "more_rows")
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
LEAST_GROUPS = 3
SCHEMA = 1


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
        penalty: Ridge penalty, chosen by leaving each data set out.
        spread: Root mean square error on data sets left out of the fit.
        within: The same less each data set's mean error: how well runs on one data set are told apart.
        groups: Data sets.
        runs: Runs.
    """

    coefficients: tuple[float, ...]
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
    """

    lines: Mapping[str, Line]
    outputs: tuple[str, ...]
    groups: tuple[str, ...]
    source: str

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
        }


@dataclass(frozen=True)
class Case:
    """A finished run with its outlook.

    Attributes:
        outlook: Simulated values by name, as in `case_values`.
        outcomes: What the run gave, by name of `OUTCOMES`.
        group: Data set.
    """

    outlook: Mapping[str, float]
    outcomes: Mapping[str, float]
    group: str


def case_values(outlook: Outlook) -> dict[str, float]:
    """Take what a calibration needs out of an outlook.

    Args:
        outlook: Outlook.

    Returns:
        Numbers by name.
    """
    return {
        "simulated_train_loss": outlook.end.train_loss,
        "simulated_eval_loss": outlook.end.eval_loss,
        "simulated_accuracy": outlook.end.eval_accuracy,
        "probe_loss": outlook.probe_loss,
        "probe_accuracy": outlook.probe_accuracy,
        "movement": outlook.course.movement,
        "doublings": log2(max(1.0, outlook.train_rows / outlook.samples)),
    }


def scale(outcome: Outcome, value: float) -> float:
    """Bring a value to the scale that it is calibrated on.

    Args:
        outcome: Which outcome.
        value: Accuracy as a fraction, or loss in nats.

    Returns:
        Logit of the accuracy kept within [0.01, 0.99]; logarithm of the loss kept within [0.001, 20].
    """
    if outcome == "accuracy":
        kept = min(max(value, 0.01), 0.99)
        return log(kept / (1.0 - kept))
    return log(min(max(value, 1e-3), 20.0))


def unscale(outcome: Outcome, value: float) -> float:
    """Undo `scale`.

    Args:
        outcome: Which outcome.
        value: On the scale.

    Returns:
        Accuracy or loss.
    """
    return 1.0 / (1.0 + exp(-value)) if outcome == "accuracy" else exp(value)


def terms(outcome: Outcome, values: Mapping[str, float]) -> tuple[float, Array]:
    """Lay out one case for the fit.

    Args:
        outcome: Which outcome.
        values: From `case_values`.

    Returns:
        s, and x in the order of `TERMS`.
    """
    simulated = scale(outcome, values[f"simulated_{outcome}"])
    gap = scale("eval_loss", values["simulated_eval_loss"]) - scale("train_loss", values["simulated_train_loss"])
    probe = scale(outcome, values["probe_accuracy" if outcome == "accuracy" else "probe_loss"])
    moved = min(1.0, values["movement"])
    to_come = (1.0 - 2.0 ** (-values["doublings"] / 2.0)) / (2.0**0.5 - 1.0)
    return simulated, np.array([moved, moved * (probe - simulated), to_come * gap])


def fit_calibration(cases: Sequence[Case], outputs: Sequence[str], source: str) -> Calibration:
    """Fit a calibration.

    Args:
        cases: Finished runs of at least 3 data sets.
        outputs: Output reductions that their outlooks were made with.
        source: Name of the study, for the record.

    Returns:
        The calibration.

    Raises:
        ConfigError: If there are too few data sets.
    """
    groups = sorted({case.group for case in cases})
    if len(groups) < LEAST_GROUPS:
        raise ConfigError(f"a calibration needs runs of {LEAST_GROUPS} data sets or more, got {len(groups)}")
    return Calibration({name: _fit_line(name, cases) for name in OUTCOMES}, tuple(outputs), tuple(groups), source)


def _fit_line(outcome: Outcome, cases: Sequence[Case]) -> Line:
    held = [case for case in cases if isfinite(case.outcomes[outcome])]
    groups = sorted({case.group for case in held})
    if len(groups) < LEAST_GROUPS:
        raise ConfigError(f"a calibration needs {outcome} of {LEAST_GROUPS} data sets or more, got {len(groups)}")
    laid = [terms(outcome, case.outlook) for case in held]
    x = np.array([row for _, row in laid])
    error = np.array([scale(outcome, case.outcomes[outcome]) for case in held]) - np.array([s for s, _ in laid])
    group = np.array([groups.index(case.group) for case in held])
    weight = 1.0 / np.bincount(group, minlength=len(groups))[group]

    def left_out(penalty: float) -> tuple[float, float]:
        errors = np.empty(len(error))
        for one in np.unique(group):
            rest = group != one
            beta = _ridge(x[rest], error[rest], weight[rest], penalty)
            errors[~rest] = error[~rest] - x[~rest] @ beta
        means = np.bincount(group, errors) / np.bincount(group)
        around = errors - means[group]
        return tuple(float(np.sqrt(np.average(held**2, weights=weight))) for held in (errors, around))  # type: ignore[return-value]

    spreads = [left_out(penalty) for penalty in PENALTIES]
    best = int(np.argmin([spread for spread, _ in spreads]))
    beta = _ridge(x, error, weight, PENALTIES[best])
    return Line(tuple(map(float, beta)), PENALTIES[best], *spreads[best], len(groups), len(held))


def _ridge(x: Array, y: Array, weight: Array, penalty: float) -> Array:
    """β = (XᵀWX + penalty · D)⁻¹ XᵀWy, W of sum 1 and D the mean squares of the columns (a unit for an empty one)."""
    w = weight / weight.sum()
    size = np.average(x**2, axis=0, weights=w)
    gram = (x * w[:, None]).T @ x + penalty * np.diag(np.where(size > 0, size, 1.0))
    return np.asarray(np.linalg.solve(gram, x.T @ (w * y)))


def apply_calibration(calibration: Calibration, values: Mapping[str, float], output: str) -> dict[str, Interval]:
    """Forecast a run.

    The interval is value ± t · spread on the scale of the fit, with the 95% quantile t of Student's distribution with
    (data sets − 1) degrees of freedom: the spread is known from few data sets.

    Args:
        calibration: Calibration.
        values: From `case_values`.
        output: Output reduction that they were made with.

    Returns:
        Forecasts by outcome.

    Raises:
        ConfigError: If the calibration was made for other output reductions.
    """
    if output not in calibration.outputs:
        raise ConfigError(
            f"the calibration {calibration.source!r} was made for output {' and '.join(calibration.outputs)}, "
            f"not {output!r}: leave --reduction out"
        )
    found: dict[str, Interval] = {}
    for outcome in OUTCOMES:
        line = calibration.lines[outcome]
        simulated, x = terms(outcome, values)
        middle = simulated + float(x @ np.array(line.coefficients))
        half_width = float(student.ppf(0.95, line.groups - 1)) * line.spread
        found[outcome] = Interval(*(unscale(outcome, middle + shift) for shift in (0.0, -half_width, half_width)))
    return found


def tied(calibration: Calibration, first: Interval, second: Interval) -> bool:
    """Tell whether two adapters on one data set cannot be told apart by their forecast accuracies.

    Their difference on the logit scale is within 1.645 · √2 · `within`, the error of such a difference at 90%.

    Args:
        calibration: Calibration.
        first: Forecast accuracy of one.
        second: Of the other.

    Returns:
        Whether they tie.
    """
    difference = scale("accuracy", first.value) - scale("accuracy", second.value)
    return abs(difference) <= 1.645 * 2**0.5 * calibration.lines["accuracy"].within


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
    try:
        return calibration_from(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"cannot read calibration {str(path)!r}: {reason}; foretune study report writes one"
        ) from error


def calibration_from(content: Mapping[str, Any]) -> Calibration:
    """Read a calibration.

    Args:
        content: As `Calibration.to_dict` gives it.

    Returns:
        The calibration.

    Raises:
        ConfigError: If it is none, or one of another version.
    """
    try:
        if content["schema"] != SCHEMA or tuple(content["terms"]) != TERMS:
            raise ConfigError(f"calibration of schema {content['schema']}, terms {content['terms']}: fit it again")
        lines = {
            name: Line(
                tuple(map(float, line["coefficients"])),
                float(line["penalty"]),
                float(line["spread"]),
                float(line["within"]),
                int(line["groups"]),
                int(line["runs"]),
            )
            for name, line in content["lines"].items()
        }
        for name, line in lines.items():
            numbers = (*line.coefficients, line.penalty, line.spread, line.within)
            if len(line.coefficients) != len(TERMS) or line.groups < LEAST_GROUPS or not all(map(isfinite, numbers)):
                raise ConfigError(f"calibration with {name} {line}: fit it again")
        if set(lines) != set(OUTCOMES):
            raise ConfigError(f"calibration of {sorted(lines)}: needs {', '.join(OUTCOMES)}")
        return Calibration(lines, tuple(content["outputs"]), tuple(content["groups"]), str(content["source"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"this is no calibration: {error!r}") from error
