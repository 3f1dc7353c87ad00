"""What a trial showed: a real fine-tune of one adapter on few rows, with the recipe of the run that is forecast."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shown:
    """Outcome of one trial.

    Attributes:
        rows: Training rows n' of the trial; epochs, batches, rates and scheduler are those of the run.
        seed: Seed that it was trained with.
        eval_rows: Rows that it was evaluated on.
        outcomes: After the last epoch, by the names of `outcomes_of`: `train_loss`, `eval_loss` and the main metric.
        best: Best main metric over the epochs that were evaluated.
        best_epoch: Its epoch.
        diverged: Whether a loss was not finite.
    """

    rows: int
    seed: int
    eval_rows: int
    outcomes: Mapping[str, float]
    best: float
    best_epoch: int
    diverged: bool
