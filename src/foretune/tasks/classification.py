"""One class for each text: cross-entropy on C logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor

from foretune.arrays import Array
from foretune.errors import ConfigError, DataError, few, shown
from foretune.tasks.metrics import METRICS, Kind, Metric
from foretune.tasks.objective import Objective, Targets
from foretune.tasks.outputs import OutputReduction, output_reduction
from foretune.tasks.readout import best_temperature, standardised


@dataclass(frozen=True)
class Classification(Objective):
    """A text has one of C classes.

    Attributes:
        names: Names of the C classes.
    """

    kind: ClassVar[Kind] = "classification"
    problem_type: ClassVar[str] = "single_label_classification"
    noun: ClassVar[str] = "classes"
    constant_name: ClassVar[str] = "majority"
    loss_unit: ClassVar[str] = "nats"
    metrics: ClassVar[tuple[Metric, ...]] = METRICS[kind]

    def reduction(self, name: str | None) -> OutputReduction:
        """`margin` of two classes, else `trace`; or that of the name."""
        return output_reduction(name, len(self.names))

    def simulated(self) -> OutputReduction:
        """`margin` of two classes, else `full`."""
        return output_reduction("margin" if len(self.names) == 2 else "full", len(self.names))

    def encode(self, targets: Targets) -> Array:
        """One-hot, n × C."""
        return np.asarray(np.eye(len(self.names))[targets])

    def answers(self, reduction: OutputReduction, targets: Targets) -> Targets:
        """Column of the scores that each class counts for."""
        return np.asarray(reduction.columns[targets])

    def tensor(self, targets: Targets, dtype: torch.dtype = torch.float32) -> Tensor:
        """N classes."""
        return torch.as_tensor(targets, dtype=torch.long)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy −log softmax(f)[y], in nats."""
        chosen = targets.unsqueeze(-1).expand(*outputs.shape[:-1], 1)
        return -torch.log_softmax(outputs, dim=-1).gather(-1, chosen).squeeze(-1)

    def residual(self, outputs: Array, targets: Targets) -> Array:
        """One-hot less softmax."""
        return np.asarray(np.eye(outputs.shape[1])[targets] - softmax(outputs, axis=1))

    def main(self, outputs: Array, targets: Targets) -> float:
        """Share of examples whose largest output is that of their class; of equal outputs the first counts."""
        return float(np.mean(np.argmax(outputs, axis=1) == targets))

    def measure(self, outputs: Array, targets: Targets) -> Mapping[str, float]:
        """Accuracy, Matthews correlation (0 where all is one class) and macro F1."""
        from sklearn.metrics import f1_score, matthews_corrcoef

        predicted = np.argmax(outputs, axis=1)
        single = len(np.union1d(targets, predicted)) < 2  # 0 by definition, of which sklearn warns
        return {
            "accuracy": self.main(outputs, targets),
            "matthews": 0.0 if single else float(matthews_corrcoef(targets, predicted)),
            "macro_f1": float(f1_score(targets, predicted, average="macro", zero_division=0.0)),
        }

    def standard_error(self, value: float, n: int) -> float:
        """√(p(1 − p)/n) of an accuracy p."""
        return float(np.sqrt(value * (1.0 - value) / n))

    def constant(self, targets: Targets) -> Array:
        """Logarithms of the shares of the classes, each counted once more than it is there."""
        counts = np.bincount(targets, minlength=len(self.names)) + 1.0
        return np.asarray(np.log(counts / counts.sum()))

    def temperature(self, scores: Array, targets: Targets) -> float:
        """Least cross-entropy against smoothed classes, (n + 1)/(n + C) on the own one (Platt 1999)."""
        # Hard labels would send the factor to its end wherever no sample is mistaken, and a single mistaken evaluation
        # example would then dominate the loss.
        n, n_classes = scores.shape
        smoothed = (np.eye(n_classes)[targets] * n + 1.0) / (n + n_classes)
        return best_temperature(
            lambda factor: float(-np.mean(np.sum(smoothed * log_softmax(factor * scores, axis=1), axis=1)))
        )

    def fit_output(self, inputs: Array, targets: Targets, *, intercept: bool) -> tuple[Array, Array | None]:
        """Multinomial logistic regression, L2-regularised on standardised inputs of unit total variance.

        Args:
            inputs: n × p inputs φ.
            targets: n classes, of which some of 0 … C-1 may be absent.
            intercept: Whether the layer has a bias.

        Returns:
            C × p weights and C biases (None without intercept) for the inputs as they are. An absent class has
            zero weights and a bias as if half an example of it had been seen.

        Raises:
            ConfigError: If the targets hold a single class.
        """
        from sklearn.linear_model import LogisticRegression

        present = np.unique(targets)
        if len(present) < 2:
            raise ConfigError("a probe head needs samples of 2 classes: draw more samples or use --head random")
        centre, scale = standardised(inputs, intercept=intercept)
        fit = LogisticRegression(C=1.0, fit_intercept=intercept, max_iter=1000)
        fit.fit((inputs - centre) / scale, targets)
        coefficients, biases = fit.coef_, np.broadcast_to(np.asarray(fit.intercept_, float), len(fit.coef_))
        if len(present) == 2:  # scikit-learn keeps one row, the difference of the two logits
            coefficients = np.vstack([-coefficients, coefficients]) / 2
            biases = np.concatenate([-biases, biases]) / 2
        weight = np.zeros((len(self.names), inputs.shape[1]))
        weight[present] = coefficients / scale
        if not intercept:
            return weight, None
        bias = np.full(len(self.names), -np.log(2.0 * len(targets) / len(present)))
        bias[present] = biases - weight[present] @ centre
        return weight, bias

    def check_count(self, samples: int) -> None:
        """Refuse fewer than two samples for each class.

        Args:
            samples: Number of samples that are asked for.

        Raises:
            ConfigError: If there are fewer.
        """
        least = 2 * self.n_outputs
        if samples < least:
            raise ConfigError(f"samples = {samples}: {self.n_outputs} classes need 2 samples each, {least} at least")

    def check_rows(self, targets: Targets) -> None:
        """Refuse classes that no sample can show twice.

        Args:
            targets: Classes of all training rows.

        Raises:
            DataError: Naming the classes and how many rows they have.
        """
        rows = np.bincount(targets, minlength=len(self.names))
        rare = [f"{shown(name, 20)} has {count}" for name, count in zip(self.names, rows, strict=True) if count < 2]
        if rare:
            raise DataError(
                f"each class needs 2 training rows, but {few(rare, most=3)} in all: "
                "add rows, merge the class into another, or drop it"
            )

    def check_sample(self, targets: Targets, trains: Targets) -> None:
        """Refuse a sample that does not show every class twice.

        Args:
            targets: Classes of the sample.
            trains: Classes of the rows that it is drawn from.

        Raises:
            DataError: Naming the classes that lack and what shows them.
        """
        counts = np.bincount(targets, minlength=len(self.names))
        rows = np.bincount(trains, minlength=len(self.names))
        table = zip(self.names, counts, rows, strict=True)
        lacking = [f"{shown(name, 15)} has {count} (of {there} rows)" for name, count, there in table if count < 2]
        if lacking:
            remedy = "raise --samples" if bool((rows >= 2).all()) else "give a validation split"
            raise DataError(
                f"each class needs 2 of the {len(targets)} samples, but {few(lacking, most=3)}: {remedy}, "
                "or change --seed"
            )

    def describe(self, targets: Targets) -> dict[str, Any]:
        """Rows of each class."""
        return {"class_counts": np.bincount(targets, minlength=len(self.names)).tolist()}
