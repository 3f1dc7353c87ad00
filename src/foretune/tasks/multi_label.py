"""Several labels for each text, each there or not: binary cross-entropy on C logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy.special import expit, log_expit
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from foretune.arrays import Array
from foretune.errors import ConfigError, DataError, few, shown
from foretune.tasks.metrics import METRICS, Kind, Metric
from foretune.tasks.objective import SeparateOutputs, Targets
from foretune.tasks.readout import best_temperature, standardised

LEAST = 4  # samples


@dataclass(frozen=True)
class MultiLabel(SeparateOutputs):
    """A text has any of C labels.

    Attributes:
        names: Names of the C labels.
    """

    kind: ClassVar[Kind] = "multi-label"
    problem_type: ClassVar[str] = "multi_label_classification"
    noun: ClassVar[str] = "labels"
    loss_unit: ClassVar[str] = "nats a label"
    metrics: ClassVar[tuple[Metric, ...]] = METRICS[kind]

    def encode(self, targets: Targets) -> Array:
        """1 where the label is there, else −1; n × C."""
        return np.asarray(2.0 * np.asarray(targets, dtype=np.float64) - 1.0)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(1/C) Σ_c −log σ(±f_c), in nats a label."""
        wanted = targets.to(outputs.dtype).expand_as(outputs)
        return binary_cross_entropy_with_logits(outputs, wanted, reduction="none").mean(-1)

    def residual(self, outputs: Array, targets: Targets) -> Array:
        """Y − σ(f)."""
        return np.asarray(targets - expit(outputs))

    def main(self, outputs: Array, targets: Targets) -> float:
        """Micro F1 of the labels with f > 0: 2 · right / (said + there); 0 where none is said and none there."""
        said, there = np.asarray(outputs) > 0, np.asarray(targets) > 0
        total = int(said.sum()) + int(there.sum())
        return 2.0 * int((said & there).sum()) / total if total else 0.0

    def measure(self, outputs: Array, targets: Targets) -> Mapping[str, float]:
        """Micro and macro F1, and the share of texts with all labels right."""
        from sklearn.metrics import f1_score

        said, there = np.asarray(outputs) > 0, np.asarray(targets) > 0
        # one label alone would be taken for two classes
        scores = [f1_score(y, f, zero_division=0.0) for f, y in zip(said.T, there.T, strict=True)]
        return {
            "micro_f1": self.main(outputs, targets),
            "macro_f1": float(np.mean(scores)),
            "exact_match": float(np.mean((said == there).all(1))),
        }

    def constant(self, targets: Targets) -> Array:
        """Log odds of each label, half an example more of either kind counted."""
        there = np.sum(targets, axis=0)
        return np.asarray(np.log((there + 0.5) / (len(targets) - there + 0.5)))

    def temperature(self, scores: Array, targets: Targets) -> float:
        """Least loss against smoothed labels, (n₊ + 1)/(n₊ + 2) and 1/(n₋ + 2) (Platt 1999)."""
        there = np.sum(targets, axis=0)
        smoothed = np.where(targets > 0, (there + 1.0) / (there + 2.0), 1.0 / (len(targets) - there + 2.0))

        def loss(factor: float) -> float:
            f = factor * scores
            return float(-np.mean(smoothed * log_expit(f) + (1.0 - smoothed) * log_expit(-f)))

        return best_temperature(loss)

    def fit_output(self, inputs: Array, targets: Targets, *, intercept: bool) -> tuple[Array, Array | None]:
        """A logistic regression for each label, L2-regularised on standardised inputs of unit total variance.

        Args:
            inputs: n × p inputs φ.
            targets: n × C zeros and ones.
            intercept: Whether the layer has a bias.

        Returns:
            C × p weights and C biases (None without intercept) for the inputs as they are. A label that is everywhere
            or nowhere has zero weights and the log odds of half an example of the other kind.

        Raises:
            ConfigError: If no label tells the samples apart.
        """
        from sklearn.linear_model import LogisticRegression

        varies = np.ptp(targets, axis=0) > 0
        if not varies.any():
            raise ConfigError(
                "a probe head needs a label that some samples have and others not: draw more samples or use "
                "--head random"
            )
        centre, scale = standardised(inputs, intercept=intercept)
        weight, bias = np.zeros((len(self.names), inputs.shape[1])), self.constant(targets)
        for label in np.flatnonzero(varies):
            fit = LogisticRegression(C=1.0, fit_intercept=intercept, max_iter=1000)
            fit.fit((inputs - centre) / scale, targets[:, label])
            weight[label] = fit.coef_[0] / scale
            bias[label] = float(np.ravel(fit.intercept_)[0]) - weight[label] @ centre
        return weight, bias if intercept else None

    def check_count(self, samples: int) -> None:
        """Refuse fewer than four samples: each label needs two that have it and two that do not.

        Args:
            samples: Number of samples that are asked for.

        Raises:
            ConfigError: If there are fewer.
        """
        if samples < LEAST:
            raise ConfigError(f"samples = {samples}: labels need {LEAST} samples at least")

    def check_rows(self, targets: Targets) -> None:
        """Refuse labels that no sample can show twice, there and not there.

        Args:
            targets: Labels of all training rows.

        Raises:
            DataError: Naming the labels and how many rows they are on.
        """
        if names := self._rare(targets):
            raise DataError(
                f"each label needs 2 training rows that have it and 2 that do not, but {few(names, most=3)} of "
                f"{len(targets)}: add rows, or drop the label"
            )

    def _rare(self, targets: Targets) -> list[str]:
        there = np.sum(targets, axis=0)
        rare = np.minimum(there, len(targets) - there) < 2
        return [
            f"{shown(name, 20)} is on {count:g}"
            for name, count, lacks in zip(self.names, there, rare, strict=True)
            if lacks
        ]

    def check_sample(self, targets: Targets, trains: Targets) -> None:
        """Refuse a sample that does not show every label twice, there and not there.

        Args:
            targets: Labels of the sample.
            trains: Labels of the rows that it is drawn from.

        Raises:
            DataError: Naming the labels.
        """
        if names := self._rare(targets):
            raise DataError(
                f"each label needs to be there and not there in 2 of the {len(targets)} samples, but "
                f"{few(names, most=3)}: raise --samples, or change --seed"
            )

    def describe(self, targets: Targets) -> dict[str, Any]:
        """Rows of each label."""
        return {"label_counts": np.sum(targets, axis=0).astype(int).tolist()}
