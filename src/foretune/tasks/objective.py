"""What is known of a kind of task: its outputs, loss, targets and metrics, and how outputs are read.

Everything else in foretune asks an `Objective`, never the name of a task or of an output reduction. Targets are what
the loss takes: n classes, or n × C numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretune.arrays import Array
from foretune.tasks.metrics import Kind, Metric
from foretune.tasks.outputs import OutputReduction, identity_reduction

Targets = NDArray[Any]  # n integers (classes), n × C numbers (regression) or n × C zeros and ones (several labels)


@dataclass(frozen=True)
class Objective(ABC):
    """A kind of task with C outputs.

    Attributes:
        kind: Its name, as `--task` takes it.
        names: Names of the C outputs: classes, labels, or columns.
        problem_type: The same in transformers' words, for `config.problem_type`.
        noun: What the outputs are: `classes`, `labels` or `columns`.
        constant_name: What the prediction without a model is called: `majority` for classes.
        loss_unit: What the loss is counted in.
        metrics: Measures, the main one first: a run is judged and candidates are ordered by that.
    """

    names: tuple[str, ...]
    kind: ClassVar[Kind]
    problem_type: ClassVar[str]
    noun: ClassVar[str]
    constant_name: ClassVar[str] = "constant"
    loss_unit: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]

    @property
    def metric(self) -> Metric:
        """The main measure."""
        return self.metrics[0]

    @property
    def n_outputs(self) -> int:
        """Number of outputs C."""
        return len(self.names)

    def to_dict(self) -> dict[str, Any]:
        """Lay out as in `result.json`.

        Returns:
            JSON-ready values: the kind, the unit of the loss and the metrics, the main one first.
        """
        metrics = [asdict(metric) for metric in self.metrics]
        return {"kind": self.kind, "noun": self.noun, "loss_unit": self.loss_unit, "metrics": metrics}

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
    def tensor(self, targets: Targets, dtype: torch.dtype = torch.float32) -> Tensor:
        """Targets as the loss, and a transformers model, takes them.

        Args:
            targets: Targets.
            dtype: Type of targets that are numbers; classes are integers whatever it is.
        """

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each example, differentiable, equal in the mean to the loss that transformers trains with.

        Args:
            outputs: … × C outputs.
            targets: … classes, or … × C numbers.

        Returns:
            … losses.
        """

    def mean_loss(self, outputs: Array, targets: Targets) -> float:
        """Mean of `loss` over examples, in float64.

        Args:
            outputs: n × C outputs.
            targets: Their targets.

        Returns:
            The mean.
        """
        f = torch.tensor(outputs, dtype=torch.float64)
        mean = float(self.loss(f, self.tensor(targets, torch.float64)).mean())
        return abs(mean)  # no loss is below 0, but it may be −0

    @abstractmethod
    def residual(self, outputs: Array, targets: Targets) -> Array:
        """What is lacking: targets less what the outputs say, n × C; minus the slope of the loss up to a factor."""

    @abstractmethod
    def measure(self, outputs: Array, targets: Targets) -> Mapping[str, float]:
        """All metrics of n × C outputs by name; NaN where one is not defined."""

    @abstractmethod
    def main(self, outputs: Array, targets: Targets) -> float:
        """The main metric alone; NaN where it is not defined."""

    def standard_error(self, value: float, n: int) -> float | None:
        """Standard error of the main metric that n examples leave.

        Args:
            value: Its value on them.
            n: Examples.

        Returns:
            The error; None where no formula is known, as here.
        """
        return None

    @abstractmethod
    def constant(self, targets: Targets) -> Array:
        """The C outputs that are best for all examples alike: what is reached without a model."""

    def constant_metric(self, targets: Targets) -> float | None:
        """Main metric of the best prediction that is the same for all.

        Args:
            targets: Targets of the examples that are predicted.

        Returns:
            Of classes the share of the most frequent one; None where the metric is not defined.
        """
        constant = np.broadcast_to(self.constant(targets), (len(targets), self.n_outputs))
        reached = self.main(constant, targets)
        return reached if np.isfinite(reached) else None

    @abstractmethod
    def temperature(self, scores: Array, targets: Targets) -> float:
        """Factor on scores that makes outputs of them, fitted on scores of examples that the fit has not seen."""

    @abstractmethod
    def fit_output(self, inputs: Array, targets: Targets, *, intercept: bool) -> tuple[Array, Array | None]:
        """Fit the output layer on its inputs: C × p weights and C biases (None without intercept)."""

    @abstractmethod
    def check_count(self, samples: int) -> None:
        """Refuse a number of samples that an output layer cannot be fitted on, whichever they are.

        Args:
            samples: Number of samples that are asked for.
        """

    @abstractmethod
    def check_rows(self, targets: Targets) -> None:
        """Refuse rows of which no sample can be fitted.

        Args:
            targets: Of all training rows.
        """

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


class SeparateOutputs(Objective):
    """A kind of task whose outputs stand for themselves, each with its own column of targets."""

    def reduction(self, name: str | None) -> OutputReduction:
        """`trace`; or that of the name."""
        return identity_reduction(name, len(self.names))

    def simulated(self) -> OutputReduction:
        """`full`: every output."""
        return identity_reduction("full", len(self.names))

    def answers(self, reduction: OutputReduction, targets: Targets) -> Targets:
        """Columns of the outputs that the scores are of."""
        return np.asarray(targets[:, reduction.columns >= 0])

    def tensor(self, targets: Targets, dtype: torch.dtype = torch.float32) -> Tensor:
        """Targets as they are, n × C."""
        return torch.as_tensor(targets, dtype=dtype)
