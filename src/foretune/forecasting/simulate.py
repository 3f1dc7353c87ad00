"""The run itself on the linearised model: A, B and the head train over the steps of a schedule, many at a time.

One backward pass of the summed losses gives each run the gradient of its own; one optimizer steps all of them.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foretune.errors import KernelError
from foretune.forecasting.linear_model import Head, LinearRuns, Sample, Start
from foretune.forecasting.optimizer import clip_each, optimizer_of, set_rate
from foretune.forecasting.schedule import Schedule

CHUNK = 64  # examples that are evaluated at once


@dataclass(frozen=True)
class Trajectory:
    """Trajectory of a simulated run, in the units of its objective; the first entry is before training.

    Attributes:
        steps: Steps done at each evaluation.
        train_loss: On the training examples, before training and at the end.
        train_metric: The objective's main metric on them, likewise.
        eval_loss: On the evaluation examples.
        eval_metric: The objective's main metric on them.
        batch_loss: Loss of every step's batch before the step.
        movement: ‖s B A‖ / ‖A_0‖ at the end, root mean square over the modules; 0 without adapter.
        eval_logits: m × C at the end.
    """

    steps: tuple[int, ...]
    train_loss: tuple[float, ...]
    train_metric: tuple[float, ...]
    eval_loss: tuple[float, ...]
    eval_metric: tuple[float, ...]
    batch_loss: tuple[float, ...]
    movement: float
    eval_logits: NDArray[np.float32] = field(repr=False)


def simulate(
    starts: Sequence[Start],
    head: Head,
    train: Sample,
    evaluation: Sample,
    schedule: Schedule,
    *,
    points: int = 1,
    looks: Collection[int] = (),
    train_a: bool = True,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[], None] | None = None,
) -> tuple[Trajectory, ...]:
    """Train every adapter, each with its own head, on the linearised model.

    The loss is the mean of the objective's over the batch. B starts at 0, A and the head as given. Where the schedule
    has more rows than the sample, the sample's rows come again instead of rows that are not known: such a run fits its
    rows better than the real one.

    Args:
        starts: Adapters; one without sites is a head that trains alone.
        head: The head that all start from; initial logits are V φ + b.
        train: Training examples.
        evaluation: Examples to predict.
        schedule: Steps, rates and batches.
        points: Evaluations spread over the steps, beside the one before training; the last is at the end.
        looks: Steps after which it is evaluated as well.
        train_a: Whether A trains; fixed, the adapter is what its tangent kernel says.
        dtype: Type to compute in.
        on_step: Called after each step.

    Returns:
        A trajectory for each start.

    Raises:
        KernelError: If the samples, or the head and the factors, do not belong together.
    """
    alike = len(train.first_order) == len(evaluation.first_order)
    alike = alike and train.factors.sites == evaluation.factors.sites and train.objective == evaluation.objective
    if not starts or not alike:
        raise KernelError("the two samples differ in sites or objective, or there is nothing to simulate")
    runs = _LinearRuns(starts, head, train.factors, dtype, train_a=train_a)
    return train_runs(runs, train, evaluation, schedule, n=train.factors.n, points=points, looks=looks, on_step=on_step)


_Measured = tuple[Tensor, Tensor, Tensor]
_Sample = TypeVar("_Sample", contravariant=True)


class Runs(Protocol[_Sample]):
    """Several runs of a linearised model side by side, as `train_runs` trains them.

    Attributes:
        count: Number of runs.
        stacked: All trained parameters, runs on their first axis, and which runs these are.
    """

    count: int
    stacked: tuple[tuple[nn.Parameter, Tensor], ...]

    def batch_loss(self, sample: _Sample, rows: Tensor) -> Tensor:
        """Loss of each run on a batch, with its graph."""
        ...

    def measure(self, sample: _Sample) -> _Measured:
        """Loss and main metric of each run on a sample, and its outputs."""
        ...

    def movement(self) -> NDArray[np.float64]:
        """How far each run's adapters went from zero, in units of their own A."""
        ...


def train_runs(
    runs: Runs[_Sample],
    train: _Sample,
    evaluation: _Sample,
    schedule: Schedule,
    *,
    n: int,
    points: int = 1,
    looks: Collection[int] = (),
    on_look: Callable[[int], None] | None = None,
    on_step: Callable[[], None] | None = None,
) -> tuple[Trajectory, ...]:
    """Train runs over the steps of a schedule.

    Args:
        runs: They are trained in place; a module of torch.
        train: Training examples.
        evaluation: Examples to predict.
        schedule: Steps, rates and batches.
        n: Training examples in the sample.
        points: Evaluations spread over the steps, beside the one before training; the last is at the end.
        looks: Steps after which it is evaluated as well.
        on_look: Called with the steps done after each evaluation, with the runs as they are then.
        on_step: Called after each step.

    Returns:
        A trajectory for each run.
    """
    assert isinstance(runs, nn.Module)
    optimizer, device = optimizer_of(schedule, runs), runs.stacked[0][0].device
    at = {round(schedule.steps * point / points) for point in range(1, points + 1)}.union(looks)
    with torch.no_grad():
        fitted, measured = [runs.measure(train)], [(0, runs.measure(evaluation))]
    batch_losses = []
    steps = zip(schedule.rates(), schedule.batches(n), strict=True)
    for number, (rate, batch) in enumerate(steps, start=1):
        with torch.enable_grad():
            losses = runs.batch_loss(train, torch.as_tensor(batch, device=device))
            losses.sum().backward()  # each run has the gradient of its own
        batch_losses.append(losses.detach().cpu().numpy())
        clip_each(runs.stacked, runs.count, schedule.max_grad_norm)
        set_rate(optimizer, float(rate))
        optimizer.step()
        optimizer.zero_grad()
        if number in at:
            with torch.no_grad():
                measured.append((number, runs.measure(evaluation)))
            if on_look is not None:
                on_look(number)
        if on_step is not None:
            on_step()
    with torch.no_grad():
        fitted.append(runs.measure(train))
    return _trajectories(runs, fitted, measured, np.array(batch_losses))


class _LinearRuns(LinearRuns):
    """Runs on token factors, with the loss of their objective."""

    def batch_loss(self, sample: Sample, rows: Tensor) -> Tensor:
        """Mean loss over a batch."""
        return sample.objective.loss(self(sample, rows), sample.targets[rows]).mean(1)

    def measure(self, sample: Sample) -> _Measured:
        """Loss and metric of each run, and its outputs, runs × examples × C."""
        everything = torch.arange(sample.factors.n, device=sample.factors.logits.device)
        f = torch.cat([self(sample, rows) for rows in everything.split(CHUNK)], dim=1)
        targets = sample.targets.cpu().numpy()
        metrics = [sample.objective.main(of_run.cpu().numpy(), targets) for of_run in f]
        return sample.objective.loss(f, sample.targets).mean(1), torch.tensor(metrics, dtype=torch.float64), f


def _trajectories(
    runs: Runs[_Sample],
    fitted: Sequence[_Measured],
    measured: Sequence[tuple[int, _Measured]],
    batch_losses: NDArray[np.float32],
) -> tuple[Trajectory, ...]:
    def over_time(entries: Sequence[_Measured], what: int, run: int) -> tuple[float, ...]:
        return tuple(float(entry[what][run]) for entry in entries)

    movement = runs.movement()
    evaluated = [entry for _, entry in measured]
    return tuple(
        Trajectory(
            steps=tuple(number for number, _ in measured),
            train_loss=over_time(fitted, 0, run),
            train_metric=over_time(fitted, 1, run),
            eval_loss=over_time(evaluated, 0, run),
            eval_metric=over_time(evaluated, 1, run),
            batch_loss=tuple(float(loss) for loss in batch_losses[:, run]),
            movement=float(movement[run]),
            eval_logits=evaluated[-1][2][run].float().cpu().numpy(),
        )
        for run in range(runs.count)
    )
