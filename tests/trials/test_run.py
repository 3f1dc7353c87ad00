"""A trial is the fine-tune of its rows, and says what that gave."""

import dataclasses
import math

import pytest
import torch
from peft import LoraConfig

import foretune as ft
from foretune.models.classifier import load_classifier
from foretune.models.placement import lora_config, place
from foretune.report.curves import Epoch, History, Step
from foretune.settings.groups import AdapterConfig, Batching, DataConfig, Recipe
from foretune.tasks.load import load_task
from foretune.tasks.metrics import main_metric
from foretune.trials.bench import Candidate, bench_of
from foretune.trials.plan import Trial, plan_trials
from foretune.trials.rows import restrict
from foretune.trials.run import run_trial, what_it_showed

import cases

RECIPE = Recipe(epochs=2, learning_rate=2e-2, train_batch_size=8)
BATCHING = Batching(max_length=32, batch_size=16, seed=3)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trials")
    task = load_task(DataConfig(cases.write_reviews(folder / "reviews", 80, 20)))
    classifier = load_classifier(cases.save(folder / "model"), label_names=task.label_names, seed=3)
    return bench_of(classifier, task, BATCHING, eval_samples=12)


@pytest.fixture(scope="module")
def candidate(bench):
    return Candidate(
        "query", lora_config(bench.classifier.model, AdapterConfig(("query", "value"), layers=(0,))), RECIPE
    )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("evaluations", [1, 2])
def test_a_trial_is_the_fine_tune_of_its_rows(bench, candidate, evaluations):
    before, steps = state(bench.classifier.model), []
    trial = Trial(0, 40, 3, 84.0, evaluations)
    tried = run_trial(bench, candidate, trial, on_step=lambda done, total: steps.append((done, total)))
    few = restrict(bench.task, 40, bench.held, seed=3)
    settings = ft.TuneSettings(**vars(RECIPE), max_length=32, batch_size=16, seed=3)
    whole = ft.tune(bench.classifier.model, bench.classifier.tokenizer, candidate.config, few, settings=settings)
    last = whole.last
    assert tried.shown.outcomes["train_loss"] == pytest.approx(last.train_loss, rel=1e-2)  # dropout's draws differ
    assert tried.shown.outcomes["eval_loss"] == pytest.approx(last.eval_loss, rel=5e-2)
    assert abs(tried.shown.outcomes["accuracy"] - last.main) <= 2 / 12
    assert (tried.shown.rows, tried.shown.seed, tried.shown.eval_rows) == (40, 3, 12)
    assert not tried.shown.diverged
    assert tried.shown.best_epoch in ((2,) if evaluations == 1 else (1, 2))
    assert tried.passes == 84.0
    assert steps == [(step, 10) for step in range(1, 11)]
    after = state(bench.classifier.model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    again = run_trial(bench, candidate, trial)
    assert again.shown == tried.shown


def test_an_adapter_that_is_on_the_model_stays_as_it_is(bench):
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    placed = place(bench.classifier.model, config, seed=3)
    own = dataclasses.replace(bench, classifier=dataclasses.replace(bench.classifier, model=placed))
    before = state(placed)
    trial = Trial(0, 32, 3, 68.0, 1)
    there = run_trial(own, Candidate("own", None, RECIPE), trial)
    assert all(torch.equal(value, before[name]) for name, value in placed.state_dict().items())
    given = run_trial(bench, Candidate("given", config, RECIPE), trial)
    assert there.shown == given.shown


def test_a_run_that_bursts_says_so(bench, candidate):
    wild = dataclasses.replace(candidate, recipe=dataclasses.replace(RECIPE, learning_rate=1e30))
    shown = run_trial(bench, wild, Trial(0, 32, 3, 68.0, 1)).shown
    assert shown.diverged
    assert not math.isfinite(shown.outcomes["eval_loss"])


def test_the_best_epoch_is_that_of_the_metric():
    steps = tuple(Step(number, 1.0 / number, 1e-3, None, 0.0) for number in range(1, 7))
    values = [0.5, 0.9, 0.7]
    epochs = tuple(
        Epoch(number, 2 * number, None, None, None, 1.0, {"accuracy": value}, 0.0)
        for number, value in enumerate(values, start=1)
    )
    history = History(steps, epochs, 0.0, 0.0, ("accuracy",))
    metric = main_metric("classification")
    shown = what_it_showed(history, Trial(0, 4, 0, 1.0, 3), 20, 2, [metric])
    assert (shown.best, shown.best_epoch) == (0.9, 2)
    assert shown.outcomes["accuracy"] == 0.7
    assert shown.outcomes["train_loss"] == pytest.approx((1 / 5 + 1 / 6) / 2)
    less = what_it_showed(history, Trial(0, 4, 0, 1.0, 3), 20, 2, [dataclasses.replace(metric, better=-1)])
    assert (less.best, less.best_epoch) == (0.5, 1)


def test_the_extent_is_that_of_the_run(bench):
    extent = bench.extent()
    assert (extent.run_rows, extent.known_rows, extent.eval_rows, extent.outputs) == (80, 80, 12, 2)
    assert plan_trials([RECIPE], extent, 1.0).trials
