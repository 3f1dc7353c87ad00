"""The line of one outcome: coefficients, and how wide its intervals are."""

from dataclasses import dataclass
from math import log2, sqrt

from scipy.special import stdtrit


@dataclass(frozen=True)
class Line:
    """Calibration of one outcome, on the logit or logarithmic scale.

    Attributes:
        coefficients: β of `TERMS` or γ of `TRIAL_TERMS`, each for its term as it is.
        limits: Least and largest value of the last term in the fit; beyond them it counts as these.
        penalty: Ridge penalty, chosen by leaving each data set out.
        spread: a: root mean square error on data sets left out of the fit, of runs no larger than what was seen.
        within: The error on data sets left out less each data set's mean, in units of `breadth`: how well runs on one
            are told apart.
        groups: Data sets.
        runs: Runs.
        growth: b: by how much the spread grows with a doubling of the rows beyond what was seen, in quadrature.
        variety: c: by how much it grows with a doubling of the classes beyond two, likewise: with more of them there is
            more to be learnt, and to be wrong about.
        effective: Data sets that it rests on where they count differently, (Σ w)² / Σ w² of their weights w; None where
            all count the same.
    """

    coefficients: tuple[float, ...]
    limits: tuple[float, float]
    penalty: float
    spread: float
    within: float
    groups: int
    runs: int
    growth: float = 0.0
    variety: float = 0.0
    effective: float | None = None

    @property
    def degrees(self) -> float:
        """Degrees of freedom ν of its intervals: data sets less one, 2 or more."""
        return max(2.0, (self.groups if self.effective is None else self.effective) - 1.0)


def class_doublings(classes: int) -> float:
    """Say how many doublings of two the classes of a task are.

    Args:
        classes: Classes C, or outputs of another kind of task.

    Returns:
        log2(C / 2), and 0 for fewer than two.
    """
    return max(0.0, log2(classes / 2.0))


def breadth(line: Line, doublings: float, classes: float) -> float:
    """Say how much larger the spread of a run is than that of one on two classes with all rows known.

    Args:
        line: Calibration of the outcome.
        doublings: Distance from the rows that were seen to those of the run.
        classes: From `class_doublings`.

    Returns:
        √(spread² + growth² doublings² + variety² classes²) / spread; 1 for a spread of 0.
    """
    beyond = (line.growth * doublings) ** 2 + (line.variety * classes) ** 2
    return sqrt(1.0 + beyond / line.spread**2) if line.spread else 1.0


def half_width(line: Line, extra: float = 0.0, *, doublings: float = 0.0, classes: float = 0.0) -> float:
    """Half the width of an interval inside what the calibration has seen, on its scale.

    Args:
        line: Calibration of the outcome.
        extra: Variance to add.
        doublings: Distance from the rows that were seen to those of the run.
        classes: From `class_doublings`.

    Returns:
        t · √(spread² + growth² doublings² + variety² classes² + extra).
    """
    variance = line.spread**2 + (line.growth * doublings) ** 2 + (line.variety * classes) ** 2 + extra
    return float(stdtrit(line.degrees, 0.95)) * sqrt(variance)
