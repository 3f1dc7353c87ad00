"""The calibration that a study gives: from its own runs and, unless these alone are wanted, those with foretune."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from foretune.evaluation.held_out import OUTPUTS, finished_runs
from foretune.evaluation.records import Record
from foretune.forecasting.calibration import LEAST_GROUPS, Calibration
from foretune.forecasting.calibration_fit import fit_calibration
from foretune.forecasting.finished_runs import shipped_runs
from foretune.forecasting.nearness import fit_together
from foretune.forecasting.risk import fit_risk


@dataclass(frozen=True)
class StudyCalibration:
    """A calibration, and what it holds.

    Attributes:
        calibration: The calibration.
        words: What it was fitted on, in one sentence.
    """

    calibration: Calibration
    words: str


def study_calibration(records: Sequence[Record], source: str, *, own_only: bool = False) -> StudyCalibration | None:
    """Fit a calibration on the finished and simulated runs of a study.

    Args:
        records: Cells of one kind of task.
        source: Name of the study, for the record.
        own_only: Whether to leave out the runs that come with foretune; else they count by their nearness.

    Returns:
        The calibration; None where no run was simulated, or the runs are of fewer than 3 data sets and those that come
        with foretune are left out or of another kind of task.
    """
    runs = finished_runs(records)
    cases = [run.case for run in runs if run.case is not None]
    if not cases:
        return None
    mine = f"{_counted(len(cases), 'run')} of {_counted(len({case.group for case in cases}), 'data set')}"
    if not own_only:
        shipped = shipped_runs()
        together = fit_together(runs, shipped, OUTPUTS, f"{source}, with what comes with foretune")
        if together is not None:
            keys = {run.key for run in runs}
            theirs = sum(run.case is not None and run.key not in keys for run in shipped)
            return StudyCalibration(together, f"{mine}, and {theirs} that come with foretune, weighted by nearness")
    if len({case.group for case in cases}) < LEAST_GROUPS:
        return None
    risk = fit_risk([run.rate for run in runs if run.rate is not None])
    return StudyCalibration(replace(fit_calibration(cases, OUTPUTS, source), risk=risk), f"{mine} alone")


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
