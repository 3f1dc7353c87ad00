"""What the simulation says of each adapter, before calibration: at the end of the schedule, and over its steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log2

import numpy as np

from foretune.forecasting.linear_model import Start
from foretune.forecasting.linearise import Linearised, first_examples, probe_scores
from foretune.forecasting.reach import Run
from foretune.forecasting.schedule import Schedule
from foretune.forecasting.simulate import Trajectory, simulate
from foretune.models.identity import fingerprint
from foretune.models.placement import head_modules
from foretune.problem import Plan
from foretune.tasks.metrics import Metric

ENTRIES = 30_000_000  # trained numbers that are simulated side by side, with AdamW's moments 360 MB


@dataclass(frozen=True)
class Ending:
    """The end of a simulated run, in the units of its objective.

    Attributes:
        train_loss: Mean over the batches of the last epoch, as a run's log gives it.
        eval_loss: On the evaluation examples.
        eval_metric: The main metric on them.
    """

    train_loss: float
    eval_loss: float
    eval_metric: float

    def to_dict(self, metric: Metric) -> dict[str, float]:
        """Lay out as in `result.json`.

        Args:
            metric: What `eval_metric` is.

        Returns:
            Losses, and the metric under its name.
        """
        return {
            "train_loss": self.train_loss,
            "eval_loss": self.eval_loss,
            f"eval_{metric.name}": self.eval_metric,
        }


@dataclass(frozen=True)
class SimulatedRun:
    """What is known of one adapter without training it.

    Attributes:
        trajectory: Over the steps.
        end: Its end.
        probe_loss: Loss of the linear probe on the evaluation examples.
        probe_metric: Its main metric on them.
        samples: Labelled training examples n.
        train_rows: Training rows N of the run.
        metric: The main metric.
        best: The least evaluation loss and the best main metric of those at `Schedule.looks`, and the training loss at
            the end; None takes `end`.
    """

    trajectory: Trajectory
    end: Ending
    probe_loss: float
    probe_metric: float
    samples: int
    train_rows: int
    metric: Metric
    best: Ending | None = None


def simulate_runs(
    linearised: Linearised,
    starts: Sequence[Start],
    schedule: Schedule,
    *,
    points: int = 1,
    train_a: bool = True,
    on_step: Callable[[], None] | None = None,
) -> tuple[SimulatedRun, ...]:
    """Simulate the schedule for each adapter.

    A run of more rows than are known sees the known ones again and again, and at its end fits them better than the real
    one fits its own: `best` is the run before that.

    Args:
        linearised: The model after the pass over the samples.
        starts: Adapters.
        schedule: Schedule of the run; its rows may be more than the samples.
        points: Evaluations over the steps, beside those at `Schedule.looks`.
        train_a: Whether A trains.
        on_step: Called after each step of each group of adapters, `n_steps` times in all.

    Returns:
        One for each adapter.
    """
    n, metric = linearised.train.factors.n, linearised.train.objective.metric
    of_probe, looks = probe_scores(linearised.evaluation), schedule.looks(n)
    runs: list[SimulatedRun] = []
    for group in adapters_side_by_side(starts):
        trajectories = simulate(
            group,
            linearised.head,
            linearised.train,
            linearised.evaluation,
            schedule,
            points=points,
            looks=looks,
            train_a=train_a,
            on_step=on_step,
        )
        for trajectory in trajectories:
            end, best = ending(trajectory, schedule), best_of(trajectory, schedule, metric, looks)
            runs.append(SimulatedRun(trajectory, end, *of_probe, n, schedule.train_rows, metric, best))
    return tuple(runs)


def best_of(trajectory: Trajectory, schedule: Schedule, metric: Metric, looks: Sequence[int]) -> Ending:
    """Find the best of a run over its steps: its loss and its metric each where that is best.

    Args:
        trajectory: Simulated run.
        schedule: Its schedule.
        metric: What its metric is.
        looks: Steps whose evaluations count.

    Returns:
        Losses and metric; the training loss is that of the last epoch.
    """
    at = np.isin(trajectory.steps, list(looks))
    losses, metrics = np.array(trajectory.eval_loss)[at], np.array(trajectory.eval_metric)[at]
    best = metric.better * np.max(metric.better * np.where(np.isfinite(metrics), metrics, -metric.better * np.inf))
    known = bool(np.isfinite(best))
    return Ending(
        ending(trajectory, schedule).train_loss,
        float(losses.min()),
        float(best) if known else trajectory.eval_metric[-1],
    )


def head_alone_on(linearised: Linearised, schedule: Schedule, rows: int) -> Ending:
    """Simulate the head without an adapter on fewer rows, as a trial has them.

    Args:
        linearised: The model after the pass over the samples.
        schedule: Schedule of the run, whose epochs, rates and batches it has.
        rows: Rows of the trial; no more than are known count.

    Returns:
        Its end.
    """
    smaller = replace(schedule, train_rows=max(1, min(rows, linearised.train.factors.n)))
    train = first_examples(linearised.train, smaller.train_rows)
    (run,) = simulate([linearised.start([])], linearised.head, train, linearised.evaluation, smaller)
    return ending(run, smaller)


def kind_of(plan: Plan, schedule: Schedule) -> Run:
    """Say what kind of run a schedule makes of a plan, to be compared with what a calibration has seen.

    Args:
        plan: Plan of the pass.
        schedule: Schedule of the run.

    Returns:
        The kind, without an adapter.
    """
    idle = () if plan.adapted.layout is None else plan.adapted.layout.idle
    return Run(
        model=fingerprint(plan.placed),
        hidden_head=sum(name not in idle for name in head_modules(plan.placed)) > 1,
        classes=plan.task.objective.n_outputs,
        known_rows=len(plan.train.features),
        train_rows=schedule.train_rows,
        eval_rows=0 if plan.evaluation is None else len(plan.evaluation.features),
        longest=int(plan.train.lengths.max()),
        epochs=schedule.epochs,
        steps=schedule.steps,
        batch_size=schedule.batch_size,
        learning_rate=float(schedule.rates().mean()),
        update_rate=None,
        kind=plan.task.objective.kind,
    )


def runs_of(kind: Run, starts: Sequence[Start]) -> tuple[Run, ...]:
    """Say what kind of runs are simulated.

    Args:
        kind: Their kind without an adapter.
        starts: Adapters.

    Returns:
        One for each adapter, with its rate.
    """
    speeds = [[s * len(a) for s, a in zip(start.scaling, start.a, strict=True)] for start in starts]
    return tuple(replace(kind, update_rate=kind.learning_rate * max(speed)) if speed else kind for speed in speeds)


def ending(trajectory: Trajectory, schedule: Schedule) -> Ending:
    """Read the end off a trajectory.

    Args:
        trajectory: Simulated run.
        schedule: Its schedule.

    Returns:
        Losses and metric.
    """
    last = trajectory.batch_loss[-schedule.steps_per_epoch :]
    return Ending(float(np.mean(last)), trajectory.eval_loss[-1], trajectory.eval_metric[-1])


def n_steps(starts: Sequence[Start], schedule: Schedule) -> int:
    """Count the steps that `simulate_runs` simulates, for a progress bar.

    Args:
        starts: Adapters.
        schedule: Schedule.

    Returns:
        Steps, summed over groups of adapters.
    """
    return len(adapters_side_by_side(starts)) * schedule.steps


def adapters_side_by_side(starts: Sequence[Start]) -> list[list[Start]]:
    """Adapters side by side, as many as memory allows: each token is read once for all of them."""
    groups: list[list[Start]] = []
    entries = ENTRIES + 1
    for start in starts:
        size = sum(2 * a.numel() for a in start.a) + sum(part.origin.numel() for part in start.first_order)
        if entries + size > ENTRIES:
            groups.append([])
            entries = 0
        groups[-1].append(start)
        entries += size
    return groups


def case_values(simulated: SimulatedRun) -> dict[str, float]:
    """Take what a calibration needs out of a simulated run.

    Args:
        simulated: Simulated run.

    Returns:
        Numbers by name, those of the metric under its name.
    """
    name = simulated.metric.name
    best = simulated.best or simulated.end
    return {
        "simulated_train_loss": simulated.end.train_loss,
        "simulated_eval_loss": simulated.end.eval_loss,
        f"simulated_{name}": simulated.end.eval_metric,
        "best_eval_loss": best.eval_loss,
        f"best_{name}": best.eval_metric,
        "probe_loss": simulated.probe_loss,
        f"probe_{name}": simulated.probe_metric,
        "movement": simulated.trajectory.movement,
        "doublings": log2(max(1.0, simulated.train_rows / simulated.samples)),
    }
