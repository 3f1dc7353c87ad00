"""The schedule of a run as numbers: learning rate of every step and rows of every batch, as the Trainer makes them."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, cos, pi

import numpy as np
from numpy.typing import NDArray

from foretune.settings.groups import Recipe, Scheduler

PASSES = 4  # over the known rows, after each half of which a run is looked at


@dataclass(frozen=True)
class Schedule:
    """What AdamW does in a run, without the model.

    Attributes:
        train_rows: Training rows N of the run that is forecast, not of the sample that is known.
        epochs: Passes over them.
        batch_size: Rows in a step.
        learning_rate: Peak learning rate.
        warmup_ratio: Share of the steps over which the learning rate rises from 0.
        scheduler: Schedule after that.
        weight_decay: Decoupled weight decay of matrices; biases have none, as in the Trainer.
        max_grad_norm: Norm to which the gradient of adapter and head together is clipped.
        seed: Seed of the order of the rows.
    """

    train_rows: int
    epochs: int
    batch_size: int
    learning_rate: float
    warmup_ratio: float = 0.06
    scheduler: Scheduler = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """⌈N / batch size⌉."""
        return ceil(self.train_rows / self.batch_size)

    @property
    def steps(self) -> int:
        """Optimiser steps T in all."""
        return self.epochs * self.steps_per_epoch

    def looks(self, n: int) -> tuple[int, ...]:
        """Steps after which a simulated run is looked at for its best.

        A run of many more rows than are known sees these so often that it may be past its best before half an epoch.

        Args:
            n: Rows that are known.

        Returns:
            Ends and middles of the epochs and, with n < N, those of the first 4 passes over the known rows, rounded.
        """
        ends = {round(self.steps_per_epoch * half / 2) for half in range(1, 2 * self.epochs + 1)}
        if n < self.train_rows:
            ends |= {round(n * half / (2 * self.batch_size)) for half in range(1, 2 * PASSES + 1)}
        return tuple(step for step in sorted(ends) if 1 <= step <= self.steps)

    def rates(self) -> NDArray[np.float64]:
        """Learning rate of every step; with w = ⌈warmup_ratio · T⌉ and k = 0 … T−1 the steps done before.

        Rising: η k/w for k < w. After that `linear` η (T−k)/(T−w), `cosine` η (1 + cos π(k−w)/(T−w))/2, and η for
        the constant ones; `constant` has no rise.

        Returns:
            T learning rates.
        """
        total, warm = self.steps, ceil(self.warmup_ratio * self.steps)
        warm = 0 if self.scheduler == "constant" else warm

        def share(k: int) -> float:
            if k < warm:
                return k / warm
            done = (k - warm) / max(1, total - warm)
            if self.scheduler == "linear":
                return 1.0 - done
            return (1.0 + cos(pi * done)) / 2.0 if self.scheduler == "cosine" else 1.0

        return self.learning_rate * np.array([share(k) for k in range(total)])

    def batches(self, n: int) -> Iterator[NDArray[np.int64]]:
        """Rows of every batch, out of n known rows.

        Batches have the sizes of the run's. The n rows come in random order, all of them before any comes again.

        Args:
            n: Rows that are known, 1 or more; with n = N every epoch holds each once.

        Yields:
            T arrays of positions below n.
        """
        random = np.random.default_rng([self.seed, n])
        waiting = np.empty(0, dtype=np.int64)
        for _ in range(self.epochs):
            for start in range(0, self.train_rows, self.batch_size):
                size = min(self.batch_size, self.train_rows - start)
                while len(waiting) < size:
                    waiting = np.concatenate([waiting, random.permutation(n)])
                yield waiting[:size]
                waiting = waiting[size:]


def schedule_of(recipe: Recipe, train_rows: int, *, seed: int) -> Schedule:
    """Make the schedule of a run from its settings.

    Args:
        recipe: How the run trains; bfloat16, dropout and the number of devices do not enter.
        train_rows: Training rows N.
        seed: Seed of the order of the rows.

    Returns:
        The schedule, with the Trainer's own gradient clipping at norm 1.
    """
    return Schedule(
        train_rows=train_rows,
        epochs=recipe.epochs,
        batch_size=recipe.train_batch_size,
        learning_rate=recipe.learning_rate,
        warmup_ratio=recipe.warmup_ratio,
        scheduler=recipe.scheduler,
        weight_decay=recipe.weight_decay,
        seed=seed,
    )
