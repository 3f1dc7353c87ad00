import math
from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments, get_scheduler

from foretune.forecasting.recipe import Recipe, recipe_of
from foretune.settings.commands import TuneSettings
from foretune.settings.groups import Scheduler

RECIPES = st.builds(
    Recipe,
    train_rows=st.integers(1, 60),
    epochs=st.integers(1, 4),
    batch_size=st.integers(1, 20),
    learning_rate=st.sampled_from([1e-3, 0.4]),
    warmup_ratio=st.sampled_from([0.0, 0.06, 0.1, 0.5, 0.99]),
    scheduler=st.sampled_from(get_args(Scheduler)),
    seed=st.integers(0, 3),
)


def trainer_rates(recipe):
    """What transformers' schedulers do, with the Trainer's count of warm-up steps."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    warmup = TrainingArguments.get_warmup_steps(_Warmup(recipe.warmup_ratio), recipe.steps)
    schedule = get_scheduler(recipe.scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=recipe.steps)
    rates = []
    for _ in range(recipe.steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return np.array(rates)


class _Warmup:
    def __init__(self, ratio):
        self.warmup_steps = ratio  # a share where below 1


@settings(max_examples=60)
@given(RECIPES)
def test_rates_are_those_of_transformers(recipe):
    assert np.allclose(recipe.rates(), trainer_rates(recipe), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("ratio", [0.0, 0.06, 0.3])
@pytest.mark.parametrize("scheduler", get_args(Scheduler))
@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_rates_of_every_scheduler(scheduler, ratio, rows):
    recipe = Recipe(rows, 3, 8, 4e-4, warmup_ratio=ratio, scheduler=scheduler)
    assert len(recipe.rates()) == recipe.steps == 3 * math.ceil(rows / 8)
    assert np.allclose(recipe.rates(), trainer_rates(recipe), rtol=1e-12, atol=1e-15)


@given(RECIPES)
def test_batches_have_the_sizes_of_the_run(recipe):
    for n in {1, recipe.train_rows}:
        sizes = [len(batch) for batch in recipe.batches(n)]
        assert len(sizes) == recipe.steps
        for epoch in range(recipe.epochs):
            own = sizes[epoch * recipe.steps_per_epoch : (epoch + 1) * recipe.steps_per_epoch]
            assert sum(own) == recipe.train_rows
            assert all(size == recipe.batch_size for size in own[:-1])


@given(RECIPES)
def test_with_all_rows_known_an_epoch_holds_each_once(recipe):
    batches = list(recipe.batches(recipe.train_rows))
    epochs = [
        np.concatenate(batches[start : start + recipe.steps_per_epoch])
        for start in range(0, recipe.steps, recipe.steps_per_epoch)
    ]
    assert all(sorted(epoch) == list(range(recipe.train_rows)) for epoch in epochs)


@given(RECIPES, st.integers(1, 60))
def test_fewer_rows_come_again_fairly(recipe, n):
    order = np.concatenate(list(recipe.batches(n)))
    assert len(order) == recipe.epochs * recipe.train_rows
    for start in range(0, len(order), n):  # each before any comes again
        part = order[start : start + n]
        assert len(set(part)) == len(part)
        assert set(part) <= set(range(n))
    counts = Counter(order.tolist())
    assert len(order) < n or max(counts.values()) - min(counts.values()) <= 1


def test_the_seed_gives_the_order_and_every_epoch_has_its_own():
    recipe = Recipe(40, 2, 40, 1e-3, seed=1)
    first, second = recipe.batches(40)
    again = list(recipe.batches(40))
    assert np.array_equal(first, again[0])
    assert np.array_equal(second, again[1])
    assert not np.array_equal(first, second)
    (other, _) = Recipe(40, 2, 40, 1e-3, seed=2).batches(40)
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
    recipe = recipe_of(tune, 50, seed=5)
    assert recipe == Recipe(50, 3, 8, 1e-3, 0.2, "cosine", 0.1, TrainingArguments("unused").max_grad_norm, 5)
    assert (recipe.steps_per_epoch, recipe.steps) == (7, 21)
