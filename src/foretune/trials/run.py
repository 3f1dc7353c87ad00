"""One trial: the fine-tune of a candidate on few rows, and what it showed."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path

from foretune.forecasting.shown import Shown
from foretune.report.curves import History, mean_since
from foretune.tasks.metrics import Metric
from foretune.training.fit import Hooks
from foretune.training.trainable import Course
from foretune.training.tune import run_tune
from foretune.trials.bench import Bench, Candidate, measures
from foretune.trials.plan import Trial


@dataclass(frozen=True)
class Tried:
    """A finished trial.

    Attributes:
        shown: What it showed.
        passes: What it cost, in sample passes.
        seconds: The same in seconds.
    """

    shown: Shown
    passes: float
    seconds: float


def run_trial(
    bench: Bench, candidate: Candidate, trial: Trial, *, on_step: Callable[[int, int], None] | None = None
) -> Tried:
    """Fine-tune a candidate on few rows, with the whole schedule of its recipe; the model given is left as it is.

    Args:
        bench: Model, data and rows.
        candidate: Adapter and recipe.
        trial: How many rows, which seed, when it is evaluated.
        on_step: Called with the steps done and the steps in all.

    Returns:
        What it showed.
    """
    start = time.perf_counter()
    hooks = Hooks(on_step=None if on_step is None else lambda done, total, _: on_step(done, total))
    course: Course = "end" if trial.evaluations == 1 else "epochs"
    plan = bench.prepare(candidate, trial, course)
    with tempfile.TemporaryDirectory() as folder:
        history = run_tune(plan, Path(folder), hooks=hooks).history
    shown = what_it_showed(history, trial, bench.extent().eval_rows, plan.steps_per_epoch(), measures(bench.kind))
    return Tried(shown, trial.passes, time.perf_counter() - start)


def what_it_showed(
    history: History, trial: Trial, eval_rows: int, steps_per_epoch: int, kept: Sequence[Metric]
) -> Shown:
    """Take the outcomes of a trial from its course.

    Args:
        history: Its course.
        trial: Which trial.
        eval_rows: Rows that it was evaluated on.
        steps_per_epoch: Optimiser steps of an epoch.
        kept: Metrics to keep, the main one first.

    Returns:
        The losses and the metrics after the last epoch; the training loss is the mean over its steps.
    """
    last = history.epochs[-1]
    train_loss = mean_since(last.step - steps_per_epoch, last.step, history.steps)
    best = max(
        (epoch for epoch in history.epochs if isfinite(epoch.main)),
        key=lambda epoch: kept[0].better * epoch.main,
        default=last,
    )
    return Shown(
        rows=trial.rows,
        seed=trial.seed,
        eval_rows=eval_rows,
        outcomes={"train_loss": nan if train_loss is None else train_loss, "eval_loss": last.eval_loss,
                  **{metric.name: last.metrics[metric.name] for metric in kept}},
        best=best.main,
        best_epoch=best.epoch,
        diverged=not all(map(isfinite, [*(step.loss for step in history.steps), last.eval_loss])),
    )  # fmt: skip
