"""The rows of a language model's trial: the first of one order of those that train, evaluated where the full run is."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from foretune.errors import DataError
from foretune.language.rows import LanguageSplit, LanguageTask, fingerprint
from foretune.sequence_plan import ChosenRows
from foretune.trials.rows import STREAM


def sequence_order(training: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
    """Put the rows that train into the random order in which trials take them: small trials lie within large ones.

    Args:
        training: Rows that the full run trains on.
        seed: Seed of the order.

    Returns:
        The same rows in that order.
    """
    return training[np.random.default_rng([seed, STREAM]).permutation(len(training))]


def restrict_sequences(task: LanguageTask, rows: int, chosen: ChosenRows, *, seed: int) -> LanguageTask:
    """Make the task of a trial: few rows to train on, and the very rows to evaluate on that the full run has.

    Args:
        task: Data.
        rows: Training rows n'.
        chosen: The rows of the full run, none of which is without a token that carries loss.
        seed: Seed of the order that the training rows are the first of.

    Returns:
        A task whose evaluation split holds the rows to evaluate on, all of them and nothing else.

    Raises:
        DataError: If there are fewer rows.
    """
    training = chosen.train.indices
    if not 0 < rows <= len(training):
        raise DataError(f"a trial of {rows:,} rows: {len(training):,} train; lower --spend")
    train = _take(task.train, sequence_order(training, seed=seed)[:rows])
    evaluation = _take(task.evaluation or task.train, chosen.evaluation.indices)
    return dataclasses.replace(
        task, train=train, evaluation=evaluation, fingerprint=fingerprint(train.rows, evaluation.rows)
    )


def _take(part: LanguageSplit, rows: NDArray[np.int64]) -> LanguageSplit:
    return LanguageSplit(part.name, tuple(part.rows[row] for row in rows))
