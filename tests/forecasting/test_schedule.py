import math
from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments, get_scheduler

from foretune.forecasting.schedule import Schedule, schedule_of
from foretune.settings.commands import TuneSettings
from foretune.settings.groups import Scheduler

RECIPES = st.builds(
    Schedule,
    train_rows=st.integers(1, 60),
    epochs=st.integers(1, 4),
    batch_size=st.integers(1, 20),
    learning_rate=st.sampled_from([1e-3, 0.4]),
    warmup_ratio=st.sampled_from([0.0, 0.06, 0.1, 0.5, 0.99]),
    scheduler=st.sampled_from(get_args(Scheduler)),
    seed=st.integers(0, 3),
)


def trainer_rates(schedule):
    """What transformers' schedulers do, with the Trainer's count of warm-up steps."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=schedule.learning_rate)
    warmup = TrainingArguments.get_warmup_steps(_Warmup(schedule.warmup_ratio), schedule.steps)
    of_transformers = get_scheduler(
        schedule.scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=schedule.steps
    )
    rates = []
    for _ in range(schedule.steps):
        rates.append(of_transformers.get_last_lr()[0])
        optimizer.step()
        of_transformers.step()
    return np.array(rates)


class _Warmup:
    def __init__(self, ratio):
        self.warmup_steps = ratio  # a share where below 1


@settings(max_examples=60)
@given(RECIPES)
def test_rates_are_those_of_transformers(schedule):
    assert np.allclose(schedule.rates(), trainer_rates(schedule), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("ratio", [0.0, 0.06, 0.3])
@pytest.mark.parametrize("scheduler", get_args(Scheduler))
@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_rates_of_every_scheduler(scheduler, ratio, rows):
    schedule = Schedule(rows, 3, 8, 4e-4, warmup_ratio=ratio, scheduler=scheduler)
    assert len(schedule.rates()) == schedule.steps == 3 * math.ceil(rows / 8)
    assert np.allclose(schedule.rates(), trainer_rates(schedule), rtol=1e-12, atol=1e-15)


@given(RECIPES)
def test_batches_have_the_sizes_of_the_run(schedule):
    for n in {1, schedule.train_rows}:
        sizes = [len(batch) for batch in schedule.batches(n)]
        assert len(sizes) == schedule.steps
        for epoch in range(schedule.epochs):
            own = sizes[epoch * schedule.steps_per_epoch : (epoch + 1) * schedule.steps_per_epoch]
            assert sum(own) == schedule.train_rows
            assert all(size == schedule.batch_size for size in own[:-1])


@given(RECIPES)
def test_with_all_rows_known_an_epoch_holds_each_once(schedule):
    batches = list(schedule.batches(schedule.train_rows))
    epochs = [
        np.concatenate(batches[start : start + schedule.steps_per_epoch])
        for start in range(0, schedule.steps, schedule.steps_per_epoch)
    ]
    assert all(sorted(epoch) == list(range(schedule.train_rows)) for epoch in epochs)


@given(RECIPES, st.integers(1, 60))
def test_fewer_rows_come_again_fairly(schedule, n):
    order = np.concatenate(list(schedule.batches(n)))
    assert len(order) == schedule.epochs * schedule.train_rows
    for start in range(0, len(order), n):  # each before any comes again
        part = order[start : start + n]
        assert len(set(part)) == len(part)
        assert set(part) <= set(range(n))
    counts = Counter(order.tolist())
    assert len(order) < n or max(counts.values()) - min(counts.values()) <= 1


def test_the_seed_gives_the_order_and_every_epoch_has_its_own():
    schedule = Schedule(40, 2, 40, 1e-3, seed=1)
    first, second = schedule.batches(40)
    again = list(schedule.batches(40))
    assert np.array_equal(first, again[0])
    assert np.array_equal(second, again[1])
    assert not np.array_equal(first, second)
    (other, _) = Schedule(40, 2, 40, 1e-3, seed=2).batches(40)
    assert not np.array_equal(first, other)


def test_the_recipe_of_a_fine_tune():
    tune = TuneSettings(
        epochs=3,
        learning_rate=1e-3,
        train_batch_size=8,
        weight_decay=0.1,
        warmup_ratio=0.2,
        scheduler="cosine",
    )
    schedule = schedule_of(tune, 50, seed=5)
    assert schedule == Schedule(50, 3, 8, 1e-3, 0.2, "cosine", 0.1, TrainingArguments("unused").max_grad_norm, 5)
    assert (schedule.steps_per_epoch, schedule.steps) == (7, 21)


@given(
    train_rows=st.integers(1, 3000), batch_size=st.integers(1, 64), epochs=st.integers(1, 5), known=st.integers(1, 3000)
)
def test_a_run_is_looked_at_by_halves_of_its_epochs_and_of_the_first_passes(train_rows, batch_size, epochs, known):
    schedule = Schedule(train_rows, epochs, batch_size, 1e-3)
    looks = schedule.looks(known)
    assert list(looks) == sorted(set(looks))
    assert looks[0] >= 1
    assert looks[-1] == schedule.steps
    assert {schedule.steps_per_epoch * epoch for epoch in range(1, epochs + 1)} <= set(looks)
    assert len(looks) <= 2 * epochs + (8 if known < train_rows else 0)
    if known >= train_rows:
        assert looks == schedule.looks(train_rows)


def test_looks_by_hand():
    assert Schedule(64, 1, 4, 1e-3).looks(64) == (8, 16)
    assert Schedule(64, 1, 4, 1e-3).looks(8) == (1, 2, 3, 4, 5, 6, 7, 8, 16)
