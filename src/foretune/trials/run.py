"""One trial: the fine-tune of a candidate on few rows, and what it showed."""

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path

from peft import LoraConfig

from foretune.forecasting.shown import Shown
from foretune.models.classifier import Classifier
from foretune.report.curves import History, mean_since
from foretune.settings.commands import TuneSettings, fields_of
from foretune.settings.groups import Batching, Recipe
from foretune.tasks.load import Task
from foretune.tasks.metrics import Metric
from foretune.tasks.sampling import Split, split
from foretune.training.fit import Hooks
from foretune.training.plan import prepare_tune
from foretune.training.trainable import Course
from foretune.training.tune import run_tune
from foretune.trials.plan import Extent, Trial
from foretune.trials.rows import restrict


@dataclass(frozen=True)
class Candidate:
    """What may be tried.

    Attributes:
        name: In words, for tables.
        config: peft's configuration; None if the model is a peft model already.
        recipe: How its run trains.
    """

    name: str
    config: LoraConfig | None
    recipe: Recipe


@dataclass(frozen=True)
class Bench:
    """What all trials have in common.

    Attributes:
        classifier: Model and tokenizer, without what a trial puts on it: trials work on copies.
        task: Data of the full run.
        held: Rows of the full run: those that train, those to evaluate on.
        batching: Length, batches of evaluation, and the seed that the full run has.
    """

    classifier: Classifier
    task: Task
    held: Split
    batching: Batching

    def extent(self) -> Extent:
        """Say how large the run and its data are.

        Returns:
            Rows and outputs.
        """
        n_train = len(self.held.training)
        return Extent(n_train, n_train, len(self.held.eval_indices), self.task.objective.n_outputs)


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


def bench_of(classifier: Classifier, task: Task, batching: Batching, *, eval_samples: int | None) -> Bench:
    """Choose the rows that trials are made on and evaluated on.

    Args:
        classifier: Model and tokenizer; left as it is.
        task: Data of the full run.
        batching: Length, batches of evaluation and seed of the full run.
        eval_samples: Rows to evaluate on, at most; None for all.

    Returns:
        The bench.
    """
    held = split(task, samples=0, eval_samples=eval_samples, seed=batching.seed)
    return Bench(classifier, task, held, batching)


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
    classifier = bench.classifier
    if candidate.config is None:  # the adapter is on the model: it would be trained itself
        classifier = dataclasses.replace(classifier, model=copy.deepcopy(classifier.model))
    task = restrict(bench.task, trial.rows, bench.held, seed=trial.seed)
    settings = TuneSettings(
        **fields_of(candidate.recipe, Recipe),
        **{**fields_of(bench.batching, Batching), "seed": trial.seed},
        train_eval_samples=0,
    )
    hooks = Hooks(on_step=None if on_step is None else lambda done, total, _: on_step(done, total))
    course: Course = "end" if trial.evaluations == 1 else "epochs"
    plan = dataclasses.replace(prepare_tune(classifier, task, candidate.config, settings), course=course)
    with tempfile.TemporaryDirectory() as folder:
        history = run_tune(plan, Path(folder), hooks=hooks).history
    shown = what_it_showed(history, trial, len(plan.evaluation.labels), plan.steps_per_epoch(), task.objective.metric)
    return Tried(shown, trial.passes, time.perf_counter() - start)


def what_it_showed(history: History, trial: Trial, eval_rows: int, steps_per_epoch: int, metric: Metric) -> Shown:
    """Take the outcomes of a trial from its course.

    Args:
        history: Its course.
        trial: Which trial.
        eval_rows: Rows that it was evaluated on.
        steps_per_epoch: Optimiser steps of an epoch.
        metric: Main metric.

    Returns:
        The losses and the main metric after the last epoch; the training loss is the mean over its steps.
    """
    last = history.epochs[-1]
    train_loss = mean_since(last.step - steps_per_epoch, last.step, history.steps)
    best = max(
        (epoch for epoch in history.epochs if isfinite(epoch.main)),
        key=lambda epoch: metric.better * epoch.main,
        default=last,
    )
    return Shown(
        rows=trial.rows,
        seed=trial.seed,
        eval_rows=eval_rows,
        outcomes={"train_loss": nan if train_loss is None else train_loss, "eval_loss": last.eval_loss,
                  metric.name: last.main},
        best=best.main,
        best_epoch=best.epoch,
        diverged=not all(map(isfinite, [*(step.loss for step in history.steps), last.eval_loss])),
    )  # fmt: skip
