"""The run itself on the linearised model: A, B and the head train over the steps of a schedule, many at a time.

One backward pass of the summed losses gives each run the gradient of its own; one optimizer steps all of them.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
    if not starts or train.factors.sites != evaluation.factors.sites or train.objective != evaluation.objective:
        raise KernelError("the two samples differ in sites or objective, or there is nothing to simulate")
    runs = LinearRuns(starts, head, train.factors, dtype, train_a=train_a)
    optimizer = optimizer_of(schedule, runs)
    device = train.factors.logits.device
    at = {round(schedule.steps * point / points) for point in range(1, points + 1)}.union(looks)
    fitted, measured = [_evaluate(runs, train)], [(0, _evaluate(runs, evaluation))]
    batch_losses = []
    steps = zip(schedule.rates(), schedule.batches(train.factors.n), strict=True)
    for number, (rate, batch) in enumerate(steps, start=1):
        rows = torch.as_tensor(batch, device=device)
        batch_losses.append(_backward(runs, train, rows).cpu().numpy())
        clip_each(runs.stacked, runs.count, schedule.max_grad_norm)
        set_rate(optimizer, float(rate))
        optimizer.step()
        optimizer.zero_grad()
        if number in at:
            measured.append((number, _evaluate(runs, evaluation)))
        if on_step is not None:
            on_step()
    fitted.append(_evaluate(runs, train))
    return _trajectories(runs, fitted, measured, np.array(batch_losses))


@torch.enable_grad()
def _backward(runs: LinearRuns, train: Sample, rows: Tensor) -> Tensor:
    """Give every run the gradient of its mean loss over a batch; returns these losses."""
    losses = train.objective.loss(runs(train, rows), train.targets[rows]).mean(1)
    losses.sum().backward()
    return losses.detach()


_Measured = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def _evaluate(runs: LinearRuns, sample: Sample) -> _Measured:
    """Loss and metric of each run, and its outputs, runs × examples × C."""
    everything = torch.arange(sample.factors.n, device=sample.factors.logits.device)
    f = torch.cat([runs(sample, rows) for rows in everything.split(CHUNK)], dim=1)
    targets = sample.targets.cpu().numpy()
    metrics = [sample.objective.main(of_run.cpu().numpy(), targets) for of_run in f]
    return sample.objective.loss(f, sample.targets).mean(1), torch.tensor(metrics, dtype=torch.float64), f


def _trajectories(
    runs: LinearRuns,
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
