import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretune.data import Task, TextSplit
from foretune.errors import DataError
from foretune.sampling import draw, draw_indices


def memory(n_train, n_eval=0):
    def split(name, n):
        return TextSplit(name, [f"t{i}" for i in range(n)], None, np.arange(n, dtype=np.int64) % 2)

    evaluation = split("validation", n_eval) if n_eval else None
    return Task("memory", split("train", n_train), evaluation, ("text",), "label", ("a", "b"), "")


@settings(deadline=None, max_examples=60)
@given(n_rows=st.integers(8, 60), n=st.integers(6, 8), seed=st.integers(0, 2**31), repeat=st.integers(0, 3))
def test_draws_are_distinct_rows_and_reproducible(n_rows, n, seed, repeat):
    rows = draw_indices(n_rows, n, seed=seed, repeat=repeat)
    assert len(set(rows.tolist())) == n
    assert rows.min() >= 0
    assert rows.max() < n_rows
    assert np.array_equal(rows, draw_indices(n_rows, n, seed=seed, repeat=repeat))


@settings(deadline=None, max_examples=60)
@given(n_eval=st.sampled_from([0, 5, 50]), seed=st.integers(0, 99), wanted=st.integers(0, 30))
def test_evaluation_rows_are_the_same_over_repeats_and_never_training_samples(n_eval, seed, wanted):
    task = memory(60, n_eval)
    draws = [draw(task, samples=20, eval_samples=wanted, seed=seed, repeat=repeat) for repeat in (0, 1)]
    assert np.array_equal(draws[0].eval_indices, draws[1].eval_indices)
    assert not np.array_equal(draws[0].train_indices, draws[1].train_indices)
    assert draws[0].held_out == (n_eval == 0)
    if n_eval:
        assert len(draws[0].eval_indices) == min(wanted, n_eval)
    else:
        assert len(draws[0].eval_indices) == wanted
        assert all(not set(d.eval_indices.tolist()) & set(d.train_indices.tolist()) for d in draws)


def test_draws_that_cannot_be():
    with pytest.raises(DataError, match=r"70 samples asked for, but there are 60 rows: lower --samples"):
        draw(memory(60, 5), samples=70, eval_samples=5, seed=0)
    with pytest.raises(DataError, match="61 samples"):
        draw(memory(60), samples=61, eval_samples=5, seed=0)
    with pytest.raises(DataError, match=r"60 samples leave none of 60 rows to evaluate.*--eval-samples 0"):
        draw(memory(60), samples=60, eval_samples=5, seed=0)
    assert len(draw(memory(60), samples=60, eval_samples=0, seed=0).eval_indices) == 0
    one_sided = TextSplit("train", ["t"] * 1000, None, np.r_[np.zeros(999, dtype=np.int64), 1])
    task = Task("memory", one_sided, None, ("text",), "label", ("a", "b"), "")
    with pytest.raises(DataError, match="all 4 samples drawn are of class 'a': raise --samples or change --seed"):
        draw(task, samples=4, eval_samples=0, seed=0)
    few = TextSplit("train", ["t"] * 10, None, np.r_[np.zeros(9, dtype=np.int64), 1])
    task = Task("memory", few, None, ("text",), "label", ("a", "b"), "")
    rare_held_out = next(seed for seed in range(99) if 9 in draw_indices(10, 10, seed=seed)[:4])
    with pytest.raises(DataError, match="all 6 samples drawn are of class 'a': lower --eval-samples or change --seed"):
        draw(task, samples=6, eval_samples=4, seed=rare_held_out)


@pytest.mark.parametrize("n_eval", [0, 50])
def test_all_rows_to_evaluate(n_eval):
    rows = draw(memory(60, n_eval), samples=20, eval_samples=None, seed=0)
    every = rows.eval_indices if n_eval else np.r_[rows.eval_indices, rows.train_indices]
    assert sorted(every.tolist()) == list(range(n_eval or 60))


def test_fewer_rows_to_evaluate_than_asked_for():
    assert len(draw(memory(60), samples=50, eval_samples=30, seed=0).eval_indices) == 10
