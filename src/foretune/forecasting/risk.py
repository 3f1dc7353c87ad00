"""Whether a run will collapse: what linearisation cannot see, read off the rate of the adapter in finished runs.

A run has collapsed if a loss is not finite, if it ends at least two points of its metric below what costs nothing (the
head alone, or one prediction for all), or no better than that where a slower one did. With v the mean learning rate
times s·r (α times the rate, whatever the rank: the speed at which s·BA moves under AdamW),

    P(collapse) = 1 / (1 + exp(−(a + b log2 v)))

fitted by logistic regression on finished runs, and none of it where no run or every run of the fit collapsed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, isfinite, log2

import numpy as np

from foretune.errors import ConfigError

MARGIN = 0.02  # of the metric: 2 points of a percentage
LIKELY = 0.5  # a run that collapses with this probability has no level


@dataclass(frozen=True)
class Risk:
    """How likely a run is to collapse.

    Attributes:
        constant: a.
        slope: b, of log2 v; not negative.
        slowest: Least v of the fit.
        fastest: Largest v of the fit; beyond it P counts as there, or more.
        fine: Largest v at which nine of ten runs or more did not collapse.
        runs: Runs.
        collapsed: Runs that collapsed.
    """

    constant: float
    slope: float
    slowest: float
    fastest: float
    fine: float
    runs: int
    collapsed: int

    def check(self) -> None:
        """Refuse numbers that are none.

        Raises:
            ConfigError: Naming them.
        """
        numbers = (self.constant, self.slope, self.slowest, self.fastest, self.fine)
        if not all(map(isfinite, numbers)) or not 0.0 < self.slowest <= self.fine <= self.fastest or self.slope < 0.0:
            raise ConfigError(f"calibration with {self}: fit it again")

    def likely(self, update_rate: float | None) -> bool:
        """Whether a run collapses rather than not.

        Args:
            update_rate: v of the run; None without an adapter.

        Returns:
            P(collapse) ≥ 0.5.
        """
        return update_rate is not None and self.probability(update_rate) >= LIKELY

    def probability(self, update_rate: float) -> float:
        """P(collapse) of a run.

        Args:
            update_rate: v of the run; below the slowest of the fit it counts as that.

        Returns:
            The probability.
        """
        return 1.0 / (1.0 + exp(-(self.constant + self.slope * log2(max(update_rate, self.slowest)))))


def expected(value: float, probability: float, baseline: float) -> float:
    """Main metric that is to be expected of a run that may collapse.

    Args:
        value: Forecast of the run that does not collapse.
        probability: P that it does.
        baseline: What a collapsed run gives: that of the head alone, or of one prediction for all.

    Returns:
        (1 − P) · value + P · baseline.
    """
    return (1.0 - probability) * value + probability * baseline


@dataclass(frozen=True)
class RateCase:
    """A finished run.

    Attributes:
        update_rate: v.
        collapsed: Whether it collapsed.
        group: Data set.
    """

    update_rate: float
    collapsed: bool
    group: str


def fit_risk(cases: Sequence[RateCase]) -> Risk | None:
    """Fit the risk of a collapse.

    Every data set has the same weight, and the slope is shrunk a little towards 0 (scikit-learn's C = 1).

    Args:
        cases: Finished runs.

    Returns:
        The risk; None where no run collapsed or all did, or where faster runs collapsed no more often.
    """
    from sklearn.linear_model import LogisticRegression

    collapsed = np.array([case.collapsed for case in cases])
    if not 0 < collapsed.sum() < len(cases):
        return None
    rates = np.array([case.update_rate for case in cases])
    groups = [case.group for case in cases]
    weight = np.array([len(groups) / (len(set(groups)) * groups.count(group)) for group in groups])
    fitted = LogisticRegression().fit(np.log2(rates)[:, None], collapsed, sample_weight=weight)
    constant, slope = float(fitted.intercept_[0]), float(fitted.coef_[0, 0])
    if slope <= 0.0:
        return None
    held = [rate for rate in np.unique(rates) if collapsed[rates == rate].mean() <= 0.1]
    fine = float(max(held, default=rates.min()))
    return Risk(constant, slope, float(rates.min()), float(rates.max()), fine, len(cases), int(collapsed.sum()))
