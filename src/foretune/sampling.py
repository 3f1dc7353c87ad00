"""Random samples of a task: rows for the kernel, rows to predict."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foretune.data import Task
from foretune.errors import DataError


@dataclass(frozen=True)
class Draw:
    """Rows drawn for one score.

    Attributes:
        train_indices: Rows of the training split for the kernel.
        eval_indices: Rows to predict: of the evaluation split, or of the training split where `held_out`.
        held_out: Whether the task has no evaluation split, so that rows are held out of training.
    """

    train_indices: NDArray[np.int64]
    eval_indices: NDArray[np.int64]
    held_out: bool


def draw_indices(n_rows: int, n: int, *, seed: int, repeat: int = 0) -> NDArray[np.int64]:
    """Draw rows without replacement.

    Args:
        n_rows: Rows to draw from.
        n: Rows to draw.
        seed: Seed.
        repeat: Number of the draw; each gives other rows.

    Returns:
        n distinct integers below `n_rows`, in random order.

    Raises:
        DataError: If there are fewer rows than that.
    """
    _check_enough(n_rows, n)
    return np.random.default_rng([seed, repeat]).choice(n_rows, n, replace=False).astype(np.int64)


def _check_enough(n_rows: int, n: int) -> None:
    if n > n_rows:
        raise DataError(f"{n} samples asked for, but there are {n_rows} rows: lower --samples")


def draw(task: Task, *, samples: int, eval_samples: int | None, seed: int, repeat: int = 0) -> Draw:
    """Draw the samples of the kernel and the rows to predict; the latter are the same for every repeat.

    Args:
        task: Data.
        samples: Training rows.
        eval_samples: Rows to predict, at most: fewer where there are fewer; None for all there are.
        seed: Seed.
        repeat: Number of the draw.

    Returns:
        Rows.

    Raises:
        DataError: If there are too few rows, or the samples are all of one class.
    """
    n_rows = len(task.train.labels)
    if task.evaluation is not None:
        n_eval = len(task.evaluation.labels)
        eval_indices = draw_indices(n_eval, n_eval if eval_samples is None else min(eval_samples, n_eval), seed=seed)
        train_indices = draw_indices(n_rows, samples, seed=seed, repeat=repeat)
    else:
        # No evaluation split: hold rows out, but never more than the samples leave.
        _check_enough(n_rows, samples)
        order = draw_indices(n_rows, n_rows, seed=seed)
        spare = n_rows - samples
        held = spare if eval_samples is None else min(eval_samples, spare)
        if held == 0 and eval_samples != 0:
            raise DataError(
                f"{samples} samples leave none of {n_rows} rows to evaluate: lower --samples or set --eval-samples 0"
            )
        eval_indices, rest = order[:held], order[held:]
        train_indices = rest[draw_indices(len(rest), samples, seed=seed, repeat=repeat)]
    present = np.unique(task.train.labels[train_indices])
    if len(present) < 2:
        all_drawn = samples == n_rows - (0 if task.evaluation is not None else len(eval_indices))
        raise DataError(
            f"all {samples} samples drawn are of class {task.label_names[present[0]]!r}: "
            f"{'lower --eval-samples' if all_drawn else 'raise --samples'} or change --seed"
        )
    return Draw(train_indices, eval_indices, task.evaluation is None)
