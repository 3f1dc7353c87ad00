"""What is known of a kind of task: its outputs, loss, targets and metrics, and how outputs are read.

Everything else in foretune asks an `Objective`, never the name of a task or of an output reduction. Targets are what
the loss takes: n classes, or n × C numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from foretune.tasks.outputs import OutputReduction

Array = NDArray[np.float64]
Targets = NDArray[Any]  # n integers (classes), n × C numbers (regression) or n × C zeros and ones (several labels)
Kind = Literal["classification", "regression", "multi-label"]
Scale = Literal["logit", "fisher", "identity"]


@dataclass(frozen=True)
class Metric:
    """A measure of outputs against targets.

    Attributes:
        name: Its name in files: `accuracy`, `spearman`, …
        label: Its name in tables.
        scale: On which scale errors of it are alike: `logit` for shares, `fisher` (atanh) for correlations.
        percent: Whether tables print it as a percentage.
        better: +1 if more is better, −1 if less is.
    """

    name: str
    label: str
    scale: Scale
    percent: bool
    better: int = 1

    def written(self, value: float | None) -> str:
        """Write a value for a table or a title.

        Args:
            value: Value; None, or not finite, where it is not defined.

        Returns:
            A percentage, or a number of three digits behind the point; a dash where there is none.
        """
        if value is None or not np.isfinite(value):
            return "–"
        return f"{value:.1%}" if self.percent else f"{value:.3f}"


@dataclass(frozen=True)
class Objective(ABC):
    """A kind of task with C outputs.

    Attributes:
        kind: Its name, as `--task` takes it.
        names: Names of the C outputs: classes, labels, or columns.
        problem_type: The same in transformers' words, for `config.problem_type`.
        loss_name: What the loss is called in figures.
        loss_unit: What the loss is counted in.
        metrics: Measures, the main one first: a run is judged and candidates are ordered by that.
    """

    names: tuple[str, ...]
    kind: ClassVar[Kind]
    problem_type: ClassVar[str]
    loss_name: ClassVar[str]
    loss_unit: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]

    @property
    def metric(self) -> Metric:
        """The main measure."""
        return self.metrics[0]

    @abstractmethod
    def reduction(self, name: str | None) -> OutputReduction:
        """Scalar outputs that a kernel is taken of.

        Args:
            name: Name of the reduction; None takes the one with a row of the kernel for each example.
        """

    @abstractmethod
    def simulated(self) -> OutputReduction:
        """Outputs that a simulated run needs the gradients of: all that the loss sees, differentiated one by one."""

    @abstractmethod
    def encode(self, targets: Targets) -> Array:
        """Targets as n × C outputs that a regression with squared loss is fitted to."""

    @abstractmethod
    def answers(self, reduction: OutputReduction, targets: Targets) -> Targets:
        """Targets of the scores of a reduction, which may answer a part of the question only."""

    @abstractmethod
    def tensor(self, targets: Targets) -> Tensor:
        """Targets as the loss, and a transformers model, takes them."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each example, differentiable, equal in the mean to the loss that transformers trains with.

        Args:
            outputs: … × C outputs.
            targets: … classes, or … × C numbers.

        Returns:
            … losses.
        """

    @abstractmethod
    def residual(self, outputs: Array, targets: Targets) -> Array:
        """What is lacking: targets less what the outputs say, n × C; minus the slope of the loss up to a factor."""

    @abstractmethod
    def measure(self, outputs: Array, targets: Targets) -> Mapping[str, float]:
        """All metrics of n × C outputs by name; NaN where one is not defined."""

    @abstractmethod
    def main(self, outputs: Array, targets: Targets) -> float:
        """The main metric alone; NaN where it is not defined."""

    @abstractmethod
    def constant(self, targets: Targets) -> Array:
        """The C outputs that are best for all examples alike: what is reached without a model."""

    @abstractmethod
    def temperature(self, scores: Array, targets: Targets) -> float:
        """Factor on scores that makes outputs of them, fitted on scores of examples that the fit has not seen."""

    @abstractmethod
    def fit_output(self, inputs: Array, targets: Targets, *, intercept: bool) -> tuple[Array, Array | None]:
        """Fit the output layer on its inputs: C × p weights and C biases (None without intercept)."""

    @abstractmethod
    def check_sample(self, targets: Targets, trains: Targets) -> None:
        """Refuse a sample that an output layer cannot be fitted on.

        Args:
            targets: Of the sample.
            trains: Of the rows that it is drawn from.
        """

    @abstractmethod
    def describe(self, targets: Targets) -> dict[str, Any]:
        """What to say of the targets of a split, JSON-ready."""
