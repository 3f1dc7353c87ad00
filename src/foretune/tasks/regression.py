"""Numbers for each text, one or several: squared loss on C outputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from foretune.arrays import Array
from foretune.errors import ConfigError, DataError, few, shown
from foretune.tasks.metrics import METRICS, Kind, Metric
from foretune.tasks.objective import SeparateOutputs, Targets
from foretune.tasks.readout import standardised

LEAST = 4  # samples: each fifth left out must leave some that differ
PENALTIES = np.geomspace(1e-3, 1e3, 13)


@dataclass(frozen=True)
class Regression(SeparateOutputs):
    """A text has C numbers.

    Attributes:
        names: Names of the C columns.
    """

    kind: ClassVar[Kind] = "regression"
    problem_type: ClassVar[str] = "regression"
    noun: ClassVar[str] = "columns"
    loss_unit: ClassVar[str] = "squared error"
    metrics: ClassVar[tuple[Metric, ...]] = METRICS[kind]

    def encode(self, targets: Targets) -> Array:
        """The numbers themselves, n × C."""
        return np.asarray(targets, dtype=np.float64)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Squared error (1/C) Σ_c (f_c − y_c)²."""
        return (outputs - targets.to(outputs.dtype)).square().mean(-1)

    def residual(self, outputs: Array, targets: Targets) -> Array:
        """Y − f."""
        return np.asarray(targets - outputs)

    def main(self, outputs: Array, targets: Targets) -> float:
        """Spearman's correlation, the mean over the outputs; NaN where one is constant."""
        from scipy.stats import spearmanr

        return _over_outputs(spearmanr, outputs, targets)

    def measure(self, outputs: Array, targets: Targets) -> Mapping[str, float]:
        """Correlations, the mean over the outputs, and R² likewise."""
        from scipy.stats import pearsonr
        from sklearn.metrics import r2_score

        varies = bool((np.ptp(targets, axis=0) > 0).all()) and len(targets) > 1 and bool(np.isfinite(outputs).all())
        return {
            "spearman": self.main(outputs, targets),
            "pearson": _over_outputs(pearsonr, outputs, targets),
            "r2": float(r2_score(targets, outputs)) if varies else float("nan"),
        }

    def standard_error(self, value: float, n: int) -> float | None:
        """(1 − ρ²) √(1.06/(n − 3)) of a correlation ρ (Fieller, Hartley and Pearson 1957); None of several outputs."""
        if n <= 3 or self.n_outputs > 1:
            return None
        return float((1.0 - value**2) * np.sqrt(1.06 / (n - 3)))

    def constant(self, targets: Targets) -> Array:
        """The mean."""
        return np.asarray(np.mean(targets, axis=0))

    def temperature(self, scores: Array, targets: Targets) -> float:
        """1: the scores are the outputs."""
        return 1.0

    def fit_output(self, inputs: Array, targets: Targets, *, intercept: bool) -> tuple[Array, Array | None]:
        """Ridge regression on standardised inputs of unit total variance, its penalty by leave-one-out.

        Args:
            inputs: n × p inputs φ.
            targets: n × C numbers.
            intercept: Whether the layer has a bias.

        Returns:
            C × p weights and C biases (None without intercept) for the inputs as they are.

        Raises:
            ConfigError: If there are fewer than two samples.
        """
        from sklearn.linear_model import RidgeCV

        if len(targets) < 2:
            raise ConfigError("a probe head needs 2 samples: draw more samples or use --head random")
        centre, scale = standardised(inputs, intercept=intercept)
        fit = RidgeCV(alphas=PENALTIES, fit_intercept=intercept).fit((inputs - centre) / scale, targets)
        weight = np.atleast_2d(fit.coef_) / scale
        if not intercept:
            return np.asarray(weight), None
        return np.asarray(weight), np.asarray(np.atleast_1d(fit.intercept_) - weight @ centre)

    def check_count(self, samples: int) -> None:
        """Refuse fewer than four samples.

        Args:
            samples: Number of samples that are asked for.

        Raises:
            ConfigError: If there are fewer.
        """
        if samples < LEAST:
            raise ConfigError(f"samples = {samples}: a regression needs {LEAST} samples at least")

    def check_rows(self, targets: Targets) -> None:
        """Refuse a column that is the same everywhere.

        Args:
            targets: Numbers of all training rows.

        Raises:
            DataError: Naming the columns.
        """
        if names := self._constant_columns(targets):
            raise DataError(f"all training rows have one and the same value of {few(names, most=3)}: leave it out")

    def _constant_columns(self, targets: Targets) -> list[str]:
        same = np.ptp(targets, axis=0) == 0
        return [shown(name, 20) for name, constant in zip(self.names, same, strict=True) if constant]

    def check_sample(self, targets: Targets, trains: Targets) -> None:
        """Refuse a sample in which a column is the same everywhere.

        Args:
            targets: Numbers of the sample.
            trains: Numbers of the rows that it is drawn from.

        Raises:
            DataError: Naming the columns.
        """
        if names := self._constant_columns(targets):
            raise DataError(
                f"the {len(targets)} samples have one and the same value of {few(names, most=3)}: raise --samples, "
                "or change --seed"
            )

    def describe(self, targets: Targets) -> dict[str, Any]:
        """Mean and standard deviation of each column."""
        return {"target_means": targets.mean(0).tolist(), "target_deviations": targets.std(0).tolist()}


def _over_outputs(correlation: Any, outputs: Array, targets: Targets) -> float:
    """Mean over the outputs; NaN where a column is constant, or no number."""
    pairs = list(zip(np.asarray(outputs, dtype=np.float64).T, targets.T, strict=True))
    if len(targets) < 2 or any(np.ptp(f) == 0 or np.ptp(y) == 0 or not np.isfinite(f).all() for f, y in pairs):
        return float("nan")
    return float(np.mean([correlation(f, y).statistic for f, y in pairs]))
