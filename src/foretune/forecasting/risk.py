"""Whether a run will collapse: what linearisation cannot see, read off rate and length of finished runs.

A run has collapsed if a loss is not finite, or if it ends less than two points of its metric above what costs nothing
(the head alone, or one prediction for all) where a gentler one of the same adapter, no faster and no longer, ended two
points or more above that. With v the mean learning rate times s·r (α times the rate, whatever the rank: the speed at
which s·BA moves under AdamW) and T the steps,

    P(collapse) = 1 / (1 + exp(−(a + b log2 v + c log2 T)))

fitted by logistic regression on finished runs of 40 steps or more, and none of it where no run or every run of the fit
collapsed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, isfinite, log2

import numpy as np

from foretune.arrays import Array
from foretune.errors import ConfigError

MARGIN = 0.02  # of the metric: 2 points of a percentage
FEWEST_STEPS = 40  # a shorter run learns nothing, whatever its rate
LIKELY = 0.5  # a run that collapses with this probability has no level


@dataclass(frozen=True)
class Risk:
    """How likely a run is to collapse.

    Attributes:
        constant: a.
        slope: b, of log2 v; not negative.
        of_steps: c, of log2 T; not negative.
        slowest: Least v of the fit.
        fastest: Largest v of the fit; beyond it P counts as there, or more.
        shortest: Least T of the fit.
        fine: Largest v at which nine of ten runs or more did not collapse.
        runs: Runs.
        collapsed: Runs that collapsed.
    """

    constant: float
    slope: float
    of_steps: float
    slowest: float
    fastest: float
    shortest: float
    fine: float
    runs: int
    collapsed: int

    def check(self) -> None:
        """Refuse numbers that are none.

        Raises:
            ConfigError: Naming them.
        """
        numbers = (self.constant, self.slope, self.of_steps, self.slowest, self.fastest, self.shortest, self.fine)
        ordered = 0.0 < self.slowest <= self.fine <= self.fastest and self.shortest > 0.0
        if not all(map(isfinite, numbers)) or not ordered or min(self.slope, self.of_steps) < 0.0:
            raise ConfigError(f"calibration with {self}: fit it again")

    def likely(self, update_rate: float | None, steps: float) -> bool:
        """Whether a run collapses rather than not.

        Args:
            update_rate: v of the run; None without an adapter.
            steps: T of the run.

        Returns:
            P(collapse) ≥ 0.5.
        """
        return update_rate is not None and self.probability(update_rate, steps) >= LIKELY

    def probability(self, update_rate: float, steps: float) -> float:
        """P(collapse) of a run.

        Args:
            update_rate: v of the run; below the slowest of the fit it counts as that.
            steps: T of the run; below the shortest of the fit it counts as that.

        Returns:
            The probability.
        """
        of_rate = self.slope * log2(max(update_rate, self.slowest))
        of_steps = self.of_steps * log2(max(steps, self.shortest))
        return 1.0 / (1.0 + exp(-(self.constant + of_rate + of_steps)))


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
        steps: T.
        collapsed: Whether it collapsed.
        group: Data set.
    """

    update_rate: float
    steps: float
    collapsed: bool
    group: str


def fit_risk(cases: Sequence[RateCase]) -> Risk | None:
    """Fit the risk of a collapse.

    Every data set has the same weight, and the slopes are shrunk a little towards 0 (scikit-learn's C = 10).

    Args:
        cases: Finished runs; those of fewer than 40 steps do not count.

    Returns:
        The risk, of the rate alone where longer runs collapsed no more often; None where no run collapsed or all did,
        or where faster runs collapsed no more often.
    """
    cases = [case for case in cases if case.steps >= FEWEST_STEPS]
    collapsed = np.array([case.collapsed for case in cases])
    if not 0 < collapsed.sum() < len(cases):
        return None
    rates, steps = np.array([case.update_rate for case in cases]), np.array([case.steps for case in cases])
    groups = [case.group for case in cases]
    weight = np.array([len(groups) / (len(set(groups)) * groups.count(group)) for group in groups])
    constant, slope, of_steps = _logistic(np.log2([rates, steps]).T, collapsed, weight)
    if of_steps < 0.0 or slope <= 0.0:
        constant, slope, _ = _logistic(np.log2([rates, np.ones(len(rates))]).T, collapsed, weight)
        of_steps = 0.0
    if slope <= 0.0:
        return None
    held = [rate for rate in np.unique(rates) if collapsed[rates == rate].mean() <= 0.1]
    return Risk(
        constant=constant,
        slope=slope,
        of_steps=of_steps,
        slowest=float(rates.min()),
        fastest=float(rates.max()),
        shortest=float(steps.min()),
        fine=float(max(held, default=rates.min())),
        runs=len(cases),
        collapsed=int(collapsed.sum()),
    )


def _logistic(x: Array, y: Array, weight: Array) -> tuple[float, float, float]:
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=10.0, max_iter=1000).fit(x, y, sample_weight=weight)
    return float(fitted.intercept_[0]), float(fitted.coef_[0, 0]), float(fitted.coef_[0, 1])
