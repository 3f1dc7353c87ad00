"""A user's finished runs beside those that come with foretune: what is near counts more.

A run that comes with foretune has the weight

    w = max(1/16, 2^−d),

d the least distance to any of the user's runs, in doublings: |log2| of the ratio of the training rows over the known
ones, the steps, the rate of the adapter, the classes, the known rows and the longest text, added up, and 1 more for
another model and for a head of another kind (with a hidden layer or without). The user's own runs have the weight 1.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import exp2, log2

from foretune.forecasting.calibration import Calibration
from foretune.forecasting.calibration_fit import fit_calibration
from foretune.forecasting.finished_runs import FinishedRun
from foretune.forecasting.reach import Run
from foretune.forecasting.risk import fit_risk

LEAST = 1.0 / 16.0
SHIPPED = "foretune's "  # before the name of a data set: the user's may have the same


def distance(first: Run, second: Run) -> float:
    """Say how far two runs are from each other.

    Args:
        first: One.
        second: The other.

    Returns:
        Doublings.
    """
    pairs = [
        (first.rows_ratio, second.rows_ratio),
        (first.steps, second.steps),
        (_rate(first), _rate(second)),
        (first.classes, second.classes),
        (first.known_rows, second.known_rows),
        (first.longest, second.longest),
    ]
    unlike = (first.model != second.model) + (first.hidden_head != second.hidden_head)
    return unlike + sum(abs(log2(one / other)) for one, other in pairs if one > 0.0 and other > 0.0)


def _rate(run: Run) -> float:
    return run.learning_rate if run.update_rate is None else run.update_rate


def weight(run: Run, own: Sequence[Run]) -> float:
    """Say what a run that comes with foretune counts beside a user's.

    Args:
        run: The run.
        own: The user's.

    Returns:
        w.
    """
    return max(LEAST, exp2(-min(distance(run, other) for other in own)))


def fit_together(
    own: Sequence[FinishedRun], shipped: Sequence[FinishedRun], outputs: Sequence[str], source: str
) -> Calibration | None:
    """Fit a calibration on a user's runs and those that come with foretune.

    Args:
        own: The user's runs.
        shipped: Runs that come with foretune; of those that the user has as well, the user's count.
        outputs: Output reductions that both were simulated with.
        source: Name of the study.

    Returns:
        The calibration, with the risk of a collapse; None where no run of the user says what it was, or they are of
        another kind of task than those that come with foretune: these have nothing to say of them then.
    """
    cases = [run.case for run in own if run.case is not None and run.case.run is not None]
    mine = [case.run for case in cases if case.run is not None]
    keys = {run.key for run in own}
    others = [run for run in shipped if run.key not in keys]
    theirs = [run.case for run in others if run.case is not None and run.case.run is not None]
    if not mine or not theirs or {run.kind for run in mine} != {case.run.kind for case in theirs if case.run}:
        return None
    weighted = [
        replace(case, group=SHIPPED + case.group, weight=weight(case.run, mine))
        for case in theirs
        if case.run is not None
    ]
    calibration = fit_calibration(cases, outputs, source, shipped=weighted)
    rates = [run.rate for run in own if run.rate is not None]
    rates += [replace(run.rate, group=SHIPPED + run.rate.group) for run in others if run.rate is not None]
    return replace(calibration, risk=fit_risk(rates))
