"""What a training run logged, as losses over steps and metrics after each epoch."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretune.errors import ConfigError, reason

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """Mean over the optimiser steps since the record before.

    Attributes:
        step: Last of these steps, counted from 1.
        loss: Mean training loss of these steps, in train mode (dropout on), in the unit of the task's loss.
        learning_rate: Learning rate at the last of them.
        grad_norm: Norm of the gradient of adapter and head at the last of them, before clipping; None if unknown.
        seconds: Seconds of training so far, evaluation not counted.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    seconds: float


@dataclass(frozen=True)
class Epoch:
    """State after an epoch; epoch 0 is the model before training. Losses in the unit of the task, shares as fractions.

    Attributes:
        epoch: Epochs done.
        step: Optimiser steps done.
        train_loss: Mean over the epoch's steps, in train mode; None at epoch 0.
        train_loss_eval_mode: Loss on (a sample of) the training rows in eval mode; None if not taken.
        train_metric: The main metric on the same rows in eval mode; None if not taken.
        eval_loss: Loss on the evaluation rows.
        metrics: Metrics on them by name, the main one first; NaN where one is not defined.
        seconds: Seconds of training so far, evaluation not counted.
    """

    epoch: int
    step: int
    train_loss: float | None
    train_loss_eval_mode: float | None
    train_metric: float | None
    eval_loss: float
    metrics: Mapping[str, float]
    seconds: float

    @property
    def main(self) -> float:
        """The main metric on the evaluation rows."""
        return next(iter(self.metrics.values()))

    def to_dict(self) -> dict[str, Any]:
        """Lay it out as in `history.csv` and `result.json`.

        Returns:
            Values by name: of the metrics `train_` and the main one's name, and `eval_` and each one's.
        """
        values = (
            self.epoch,
            self.step,
            self.train_loss,
            self.train_loss_eval_mode,
            self.train_metric,
            self.eval_loss,
            *self.metrics.values(),
            self.seconds,
        )
        return dict(zip(epoch_columns(tuple(self.metrics)), values, strict=True))


def epoch_columns(metrics: Sequence[str]) -> tuple[str, ...]:
    """Name the columns of `history.csv`.

    Args:
        metrics: Names of the task's metrics, the main one first.

    Returns:
        Names as in `Epoch.to_dict`.
    """
    before = ("epoch", "step", "train_loss", "train_loss_eval_mode", f"train_{metrics[0]}", "eval_loss")
    return (*before, *(f"eval_{name}" for name in metrics), "seconds")


@dataclass(frozen=True)
class History:
    """Course of a run.

    Attributes:
        steps: Training loss over steps.
        epochs: Metrics, from epoch 0 on.
        seconds_train: Seconds of training, evaluation not counted.
        seconds_evaluate: Seconds of evaluation.
        metrics: Names of the task's metrics, the main one first.
        better: +1 if more of the main metric is better, −1 if less is.
    """

    steps: tuple[Step, ...]
    epochs: tuple[Epoch, ...]
    seconds_train: float
    seconds_evaluate: float
    metrics: tuple[str, ...]
    better: int = 1

    @property
    def best(self) -> Epoch | None:
        """The first epoch of training after which the main metric was best; None where it is never defined."""
        defined = [epoch for epoch in self.epochs if epoch.step and math.isfinite(epoch.main)]
        return max(defined, key=lambda epoch: self.better * epoch.main) if defined else None


def read_log(log: Sequence[Entry], metrics: Sequence[str], *, better: int = 1) -> History:
    """Read the Trainer's log, to which `seconds` since the start of training were added.

    The mean loss of an epoch is Σ_w n_w L_w / Σ_w n_w over the windows w of n_w steps that the Trainer logged.

    Args:
        log: Entries in order: `loss` of a window of steps, `eval_train_*` and `eval_eval_*` of an evaluation.
        metrics: Names of the task's metrics, the main one first.
        better: +1 if more of the main one is better, −1 if less is.

    Returns:
        Steps and epochs; an evaluation that was cut off is left out.
    """
    steps: list[Step] = []
    epochs: list[Epoch] = []
    evaluating = training = 0.0
    pending: dict[str, Any] = {}
    for entry in log:
        if "loss" in entry:
            training = entry["seconds"] - evaluating
            norm = entry.get("grad_norm")
            steps.append(Step(entry["step"], entry["loss"], entry["learning_rate"], norm, training))
        evaluating += sum(value for name, value in entry.items() if name in _RUNTIMES)
        pending |= {name: value for name, value in entry.items() if name.startswith(("eval_train_", "eval_eval_"))}
        if "eval_eval_loss" in entry:  # the evaluation rows come last
            if not epochs or entry["step"] > epochs[-1].step:
                train_loss = mean_since(epochs[-1].step if epochs else 0, entry["step"], steps)
                epochs.append(
                    Epoch(
                        epoch=round(entry.get("epoch", len(epochs))),  # not every run is evaluated before training
                        step=entry["step"],
                        train_loss=train_loss,
                        train_loss_eval_mode=pending.get("eval_train_loss"),
                        train_metric=pending.get(f"eval_train_{metrics[0]}"),
                        eval_loss=pending["eval_eval_loss"],
                        metrics={name: pending[f"eval_eval_{name}"] for name in metrics},
                        seconds=training,
                    )
                )
            pending = {}
    return History(tuple(steps), tuple(epochs), training, evaluating, tuple(metrics), better)


_RUNTIMES = ("eval_train_runtime", "eval_eval_runtime")


def mean_since(start: int, end: int, steps: Sequence[Step]) -> float | None:
    """Average the training loss over a stretch of a run.

    Args:
        start: Step after which it begins.
        end: Its last step.
        steps: Training loss over steps.

    Returns:
        Mean loss of these steps; None where there are none.
    """
    total, previous = 0.0, start
    for record in steps:
        if record.step > start:
            total += record.loss * (record.step - previous)
            previous = record.step
    return total / (end - start) if end > start else None


def steps_to_reach(steps: Sequence[Step], loss: float, *, window: int) -> int | None:
    """Find when the training loss came down to a value.

    Args:
        steps: Training loss over steps.
        loss: Value to reach.
        window: Optimiser steps that the loss is averaged over, so that one lucky batch does not count.

    Returns:
        First step at which the mean loss of the last `window` steps (of all so far at the start of training only
        if there are as many) is at most `loss`; None if that never happens.
    """
    for record, mean in zip(steps, running_mean(steps, window=window), strict=True):
        if mean is not None and mean <= loss:
            return record.step
    return None


def running_mean(steps: Sequence[Step], *, window: int) -> list[float | None]:
    """Average the training loss over the last steps.

    Args:
        steps: Training loss over steps.
        window: Optimiser steps to average over; records are taken whole, from the last one back.

    Returns:
        For each record the mean; None where fewer than `window` steps were done.
    """
    means: list[float | None] = []
    first, total, count = 0, 0.0, 0
    lengths = [b.step - a for b, a in zip(steps, [0, *(s.step for s in steps)], strict=False)]
    for record, length in zip(steps, lengths, strict=True):
        total += record.loss * length
        count += length
        while count - lengths[first] >= window:
            count -= lengths[first]
            total -= steps[first].loss * lengths[first]
            first += 1
        means.append(total / count if count >= window else None)
    return means


CURVE = "curve.csv"


def curve_header(metric: str) -> tuple[str, str, str, str]:
    """Columns of a curve.

    Args:
        metric: Name of the main metric.

    Returns:
        Their names.
    """
    return "step", "train_loss", "eval_loss", f"eval_{metric}"


@dataclass(frozen=True)
class CurvePoint:
    """A forecast after some steps, in the units of its objective.

    Attributes:
        step: Optimiser steps done.
        train_loss: Mean loss of the batches since the point before; None before training.
        eval_loss: Loss on the evaluation rows.
        eval_metric: The main metric on them.
    """

    step: int
    train_loss: float | None
    eval_loss: float
    eval_metric: float

    def to_dict(self, metric: str) -> dict[str, float | None]:
        """Lay out as in `result.json`.

        Args:
            metric: Name of the main metric.

        Returns:
            The numbers, the metric under its name.
        """
        values = (self.step, self.train_loss, self.eval_loss, self.eval_metric)
        return dict(zip(curve_header(metric), values, strict=True))


def read_curve(path: Path) -> tuple[CurvePoint, ...]:
    """Read the points of a curve.

    Args:
        path: File of `write_curve`.

    Returns:
        Points.

    Raises:
        ConfigError: If it is no such file.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            metric = next(name for name in rows.fieldnames or () if name.startswith("eval_") and name != "eval_loss")
            return tuple(
                CurvePoint(
                    int(row["step"]),
                    float(row["train_loss"]) if row["train_loss"] else None,
                    float(row["eval_loss"]),
                    float(row[metric]),
                )
                for row in rows
            )
    except (OSError, KeyError, ValueError, TypeError, StopIteration) as error:
        raise ConfigError(
            f"cannot read the forecast curve {str(path)!r}: {reason(error)}; make it with foretune forecast "
            "--output (where the level is withheld there is none)"
        ) from error
