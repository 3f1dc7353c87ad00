"""The rows of a trial: the first of one order of the rows that train, evaluated where the full run is."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from foretune.errors import DataError, shown
from foretune.tasks.classification import Classification
from foretune.tasks.load import Task, fingerprint, take
from foretune.tasks.sampling import Split
from foretune.trials.plan import fewest_rows

STREAM = 2  # of random numbers: the draws of known and of held-out rows have others


def trial_order(task: Task, training: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
    """Put the rows that train into the order in which trials take them, so that small trials lie within large ones.

    The j-th row of a class with m rows, both in random order, gets the place (j + u)/m, u random in [0, 1) for each
    class: the first n' rows hold every class as often as all rows do, to about one row. A class that is still
    missing from the first max(32, 2 C) is put in there for a row of another that has several. Where there are no
    classes the order is random.

    Args:
        task: Data.
        training: Rows that the full run trains on.
        seed: Seed of the order.

    Returns:
        The same rows in that order.
    """
    random = np.random.default_rng([seed, STREAM])
    order = training[random.permutation(len(training))]
    if not isinstance(task.objective, Classification):
        return order
    labels, n_classes = task.train.labels[order], task.n_classes
    start = random.random(n_classes)
    place = np.empty(len(order))
    for number in range(n_classes):
        members = np.flatnonzero(labels == number)
        place[members] = (np.arange(len(members)) + start[number]) / max(1, len(members))
    order = order[np.argsort(place, kind="stable")]
    return _with_every_class(order, task.train.labels, fewest_rows(n_classes))


def _with_every_class(order: NDArray[np.int64], labels: NDArray[np.int64], front: int) -> NDArray[np.int64]:
    order = order.copy()
    for number in np.setdiff1d(labels[order], labels[order[:front]]):
        ahead = labels[order[:front]]
        spare = np.flatnonzero(np.bincount(ahead)[ahead] > 1)  # there is one: the front has twice as many as classes
        here, there = spare[-1], np.flatnonzero(labels[order] == number)[0]
        order[[here, there]] = order[[there, here]]
    return order


def restrict(task: Task, rows: int, held: Split, *, seed: int) -> Task:
    """Make the task of a trial: few rows to train on, and the very rows to evaluate on that the full run has.

    Args:
        task: Data.
        rows: Training rows n'.
        held: The rows of the full run.
        seed: Seed of the order that they are the first of.

    Returns:
        A task whose evaluation split holds the rows to evaluate on, all of them and nothing else.

    Raises:
        DataError: If there are fewer rows, or a class that trains is in none of them.
    """
    if not 0 < rows <= len(held.training):
        raise DataError(f"a trial of {rows:,} rows: {len(held.training):,} train; lower --spend")
    order = trial_order(task, held.training, seed=seed)[:rows]
    if isinstance(task.objective, Classification):
        absent = np.setdiff1d(task.train.labels[held.training], task.train.labels[order])
        if len(absent):
            raise DataError(
                f"a trial of {rows:,} rows has none of class {shown(task.label_names[absent[0]])}: raise --spend, or "
                "leave it out"
            )
    train = take(task.train, order)
    evaluation = take(task.evaluation or task.train, held.eval_indices)
    return dataclasses.replace(
        task, train=train, evaluation=evaluation, fingerprint=fingerprint(task.objective, train, evaluation)
    )
