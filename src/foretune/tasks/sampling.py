"""The rows of a task: those that a run trains on, those of them that are known before it, those to predict."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foretune.errors import DataError
from foretune.tasks.classification import Classification
from foretune.tasks.load import Task

HELD_OUT = 5  # one row in so many, where there is no evaluation split


@dataclass(frozen=True)
class Split:
    """The rows of a score, a forecast and the run that both are of, the same for every command with the same seed.

    Attributes:
        training: Rows of the training split that a run trains on, in order.
        train_indices: Those of them that are known before the run, in random order.
        eval_indices: Rows to predict: of the evaluation split, or of the training split where `held_out`; none of
            them is among `training`.
        held_out: Whether the task has no evaluation split, so that rows are held out of training.
    """

    training: NDArray[np.int64]
    train_indices: NDArray[np.int64]
    eval_indices: NDArray[np.int64]
    held_out: bool


def draw_indices(n_rows: int, n: int, *, seed: int, repeat: int = 0) -> NDArray[np.int64]:
    """Draw rows without replacement.

    Args:
        n_rows: Rows to draw from.
        n: Rows to draw, at most all of them.
        seed: Seed.
        repeat: Number of the draw; each gives other rows.

    Returns:
        n distinct integers below `n_rows`, in random order.
    """
    return np.random.default_rng([seed, repeat]).choice(n_rows, n, replace=False).astype(np.int64)


def n_training(task: Task) -> int:
    """Count the rows that a run trains on.

    Args:
        task: Data.

    Returns:
        All rows of the training split; without an evaluation split, those that are not held out.

    Raises:
        DataError: If holding rows out leaves none.
    """
    return _n_training(len(task.train.labels), None if task.evaluation is None else len(task.evaluation.labels))


def _n_training(n_rows: int, n_eval: int | None) -> int:
    if n_eval is not None:
        return n_rows
    if n_rows < 2:
        raise DataError(f"holding rows out of {n_rows} leaves none to train on: add rows, or an evaluation split")
    return n_rows - max(1, round(n_rows / HELD_OUT))


def split(task: Task, *, samples: int, eval_samples: int | None, seed: int, repeat: int = 0) -> Split:
    """Choose the rows: what trains does not depend on how many rows are known or predicted.

    With an evaluation split all rows of the training split train, and the rows to predict are drawn from the
    evaluation split. Without one a fifth of the training split, drawn by the seed, is held out, and the rows to predict
    are the first of that fifth. The known rows are always drawn from those that train.

    Args:
        task: Data.
        samples: Known rows; 0 for a run, which asks for none.
        eval_samples: Rows to predict, at most: fewer where there are fewer; None for all there are.
        seed: Seed.
        repeat: Number of the draw of the known rows; the others are the same for all.

    Returns:
        The rows.

    Raises:
        DataError: If there are too few rows, or those that train, or the samples, all have the same label.
    """
    n_rows, n_train = len(task.train.labels), n_training(task)
    if samples > n_train:
        which = f" of which {n_train} train and the others are held out" if n_train < n_rows else ""
        raise DataError(f"{samples} samples asked for, but there are {n_rows} rows{which}: lower --samples")
    n_eval = None if task.evaluation is None else len(task.evaluation.labels)
    training, eval_indices = split_rows(n_rows, n_eval, eval_samples=eval_samples, seed=seed)
    trains = f"all {n_train} rows that train are" if n_train > 1 else "the 1 row that trains is"
    _check_labels(task, training, trains, "add rows with another label, or change --seed")
    train_indices = training[draw_indices(n_train, samples, seed=seed, repeat=repeat)]
    if samples:
        _check_labels(task, train_indices, f"all {samples} samples drawn are", "raise --samples or change --seed")
    return Split(training, train_indices, eval_indices, task.evaluation is None)


def split_rows(
    n_rows: int, n_eval: int | None, *, eval_samples: int | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose the rows of a run by their numbers, as `split` does.

    Args:
        n_rows: Rows of the training split.
        n_eval: Rows of the evaluation split; None if there is none, so that a fifth of the others is held out.
        eval_samples: Rows to predict, at most; None for all there are.
        seed: Seed.

    Returns:
        Rows of the training split that train, in order; and those to predict.

    Raises:
        DataError: If holding rows out leaves none.
    """
    if n_eval is None:
        order = draw_indices(n_rows, n_rows, seed=seed)
        n_held_out = n_rows - _n_training(n_rows, None)
        training = np.sort(order[n_held_out:])
        return training, order[: n_held_out if eval_samples is None else min(eval_samples, n_held_out)]
    chosen = draw_indices(n_eval, n_eval if eval_samples is None else min(eval_samples, n_eval), seed=seed)
    return np.arange(n_rows, dtype=np.int64), chosen


def _check_labels(task: Task, rows: NDArray[np.int64], which: str, remedy: str) -> None:
    labels = task.train.labels[rows]
    if len(labels) and bool((labels != labels[0]).any()):
        return
    if isinstance(task.objective, Classification):
        raise DataError(f"{which} of class {task.label_names[labels[0]]!r}: {remedy}")
    raise DataError(f"{which} labelled alike: {remedy}")
