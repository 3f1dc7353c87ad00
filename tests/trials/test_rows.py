"""Rows of trials lie within one another, hold every class, and are evaluated where the full run is."""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from foretune.errors import DataError
from foretune.tasks.load import task_from_datasets
from foretune.tasks.sampling import split
from foretune.trials.rows import restrict, trial_order


def task_of(labels, evaluation=None):
    def rows(values, name):
        return Dataset.from_dict({"text": [f"{name} {i}" for i in range(len(values))], "label": list(values)})

    return task_from_datasets(rows(labels, "t"), None if evaluation is None else rows(evaluation, "e"))


def words(counts):
    return [f"c{number}" for number, count in enumerate(counts) for _ in range(count)]


COUNTS = st.lists(st.integers(1, 60), min_size=2, max_size=8).filter(lambda counts: sum(counts) >= 40)


@given(COUNTS, st.integers(0, 5), st.data())
def test_small_trials_lie_within_large_ones_and_hold_every_class(counts, seed, data):
    task = task_of(words(counts), words([2] * len(counts)))
    held = split(task, samples=0, eval_samples=None, seed=seed)
    small = data.draw(st.integers(32, sum(counts)))
    large = data.draw(st.integers(small, sum(counts)))
    one, other = restrict(task, small, held, seed=seed), restrict(task, large, held, seed=seed)
    assert list(other.train.texts[:small]) == list(one.train.texts)
    assert len(set(other.train.texts)) == large
    of_label = dict(zip(task.train.texts, task.train.labels, strict=True))
    assert [of_label[text] for text in one.train.texts] == one.train.labels.tolist()
    there = np.bincount(one.train.labels, minlength=len(counts))
    assert there.min() >= 1
    expected = small * np.array(counts) / sum(counts)
    # to a row each, but for the place of the others' and of classes that were put in
    assert np.abs(there - expected).max() <= 1 + len(counts) / 2


def test_classes_are_there_as_often_as_in_the_task():
    task = task_of(words([300, 90, 10]), words([2, 2, 2]))
    held = split(task, samples=0, eval_samples=None, seed=3)
    for rows in (40, 100, 200):
        counts = np.bincount(restrict(task, rows, held, seed=3).train.labels)
        assert np.abs(counts - rows * np.array([0.75, 0.225, 0.025])).max() <= 1.5


def test_the_held_out_rows_are_those_of_the_run():
    task = task_of(words([50, 50]))
    held = split(task, samples=0, eval_samples=7, seed=1)
    few = restrict(task, 32, held, seed=1)
    assert list(few.evaluation.texts) == [task.train.texts[row] for row in held.eval_indices]
    assert few.evaluation.labels.tolist() == task.train.labels[held.eval_indices].tolist()
    assert {*few.train.texts} <= {task.train.texts[row] for row in held.training}
    again = split(few, samples=0, eval_samples=None, seed=1)
    assert not again.held_out
    assert len(again.training) == 32
    assert {few.evaluation.texts[row] for row in again.eval_indices} == {*few.evaluation.texts}
    whole = restrict(task, len(held.training), held, seed=1)
    assert {*whole.train.texts} == {task.train.texts[row] for row in held.training}


def test_content_names_it():
    task = task_of(words([50, 50]), words([5, 5]))
    held = split(task, samples=0, eval_samples=None, seed=0)
    prints = {restrict(task, rows, held, seed=seed).fingerprint for rows in (32, 40) for seed in (0, 1)}
    assert len(prints) == 4
    assert restrict(task, 32, held, seed=0).fingerprint in prints
    assert task.fingerprint not in prints


def test_a_class_that_cannot_be_there_is_named():
    task = task_of(words([90, 5, 5]), words([2, 2, 2]))
    held = split(task, samples=0, eval_samples=None, seed=0)
    with pytest.raises(DataError, match=r"a trial of 2 rows has none of class 'c\d'"):
        restrict(task, 2, held, seed=0)
    with pytest.raises(DataError, match="a trial of 101 rows: 100 train"):
        restrict(task, 101, held, seed=0)


def test_a_rare_class_is_put_in():
    task = task_of(words([5000, 5000, 1]), words([2, 2, 2]))
    for seed in range(4):
        order = trial_order(task, np.arange(10_001), seed=seed)
        assert 10_000 in order[:32]
        assert sorted(order) == list(range(10_001))


def test_numbers_are_in_random_order():
    data = Dataset.from_dict({"text": [f"t {i}" for i in range(50)], "label": [i / 3 for i in range(50)]})
    task = task_from_datasets(data, data)
    held = split(task, samples=0, eval_samples=None, seed=0)
    few = restrict(task, 32, held, seed=0)
    assert few.train.labels.tolist() == [[int(text.split()[1]) / 3] for text in few.train.texts]
    assert restrict(task, 50, held, seed=0).train.texts[:32] == few.train.texts
