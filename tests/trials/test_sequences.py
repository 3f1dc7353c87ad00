"""Trials of causal language models: their rows, their keys, and that one is the fine-tune of its rows."""

import dataclasses
import math

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig

import foretune as ft
from foretune.errors import DataError
from foretune.models.language_model import own_language_model
from foretune.models.placement import place
from foretune.sequence_plan import choose_rows
from foretune.settings.groups import Batching, Recipe
from foretune.trials import carry
from foretune.trials.bench import Candidate, LanguageBench
from foretune.trials.carry import describe_plan, run_trials, seconds_per_pass
from foretune.trials.plan import Trial, TrialPlan, plan_trials
from foretune.trials.run import run_trial
from foretune.trials.sequences import restrict_sequences, sequence_order
from foretune.trials.store import find, open_store, trial_key

import sequences as made

RECIPE = Recipe(epochs=2, learning_rate=5e-3, train_batch_size=8)
BATCHING = Batching(max_length=24, batch_size=4, seed=3)
CONFIG = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
CANDIDATE = Candidate("query", CONFIG, RECIPE)
TRIAL = Trial(0, 32, 3, 66.0, 1)


def completions(n):
    return datasets.Dataset.from_dict(
        {"prompt": [f"a user said {i} " for i in range(n)], "completion": [f"it is {i % 7}" for i in range(n)]}
    )


@pytest.fixture(scope="module")
def language():
    return made.reader()


def language_bench_of(language, task, batching, *, eval_samples):
    rows = choose_rows(language, task, batching.max_length, eval_samples=eval_samples, seed=batching.seed)
    return LanguageBench(language, task, rows, batching)


def bench_at(language, *, n_train=80, batching=BATCHING, eval_samples=6, loss_on=None):
    task = ft.language_task_from_datasets(completions(n_train), completions(10), loss_on=loss_on)
    return language_bench_of(language, task, batching, eval_samples=eval_samples)


@pytest.fixture(scope="module")
def bench(language):
    return bench_at(language)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_small_trials_lie_within_large_ones_and_are_evaluated_where_the_run_is(bench):
    few, more = (restrict_sequences(bench.task, rows, bench.rows, seed=3) for rows in (32, 64))
    assert more.train.rows[:32] == few.train.rows
    assert len(set(more.train.rows)) == 64
    held = tuple(bench.task.evaluation.rows[row] for row in bench.rows.evaluation.indices)
    assert few.evaluation.rows == more.evaluation.rows == held
    assert len({few.fingerprint, more.fingerprint, bench.task.fingerprint}) == 3
    other = restrict_sequences(bench.task, 32, bench.rows, seed=4)
    assert other.train.rows != few.train.rows
    assert sorted(sequence_order(np.arange(50), seed=1)) == list(range(50))
    for rows in (0, 81):
        with pytest.raises(DataError, match=f"a trial of {rows} rows: 80 train"):
            restrict_sequences(bench.task, rows, bench.rows, seed=3)


def test_held_out_rows_and_rows_without_loss_are_in_no_trial(language):
    rows = [{"prompt": f"{i} ", "completion": f"is {i}"} for i in range(60)]
    for row in rows[::6]:
        row["prompt"] *= 20  # no token of the completion is left after the cut
    task = ft.language_task_from_datasets(datasets.Dataset.from_list(rows))
    bench = language_bench_of(language, task, Batching(max_length=12, seed=1), eval_samples=None)
    extent = bench.extent()
    assert (extent.run_rows + extent.eval_rows, extent.outputs) == (50, 1)
    whole = restrict_sequences(task, extent.run_rows, bench.rows, seed=0)
    train, held = set(whole.train.rows), set(whole.evaluation.rows)
    assert not train & held
    assert all(len(row.prompt) < 12 for row in train | held)
    assert (len(train), len(held)) == (extent.run_rows, extent.eval_rows)


@pytest.mark.parametrize("evaluations", [1, 2])
def test_a_trial_is_the_fine_tune_of_its_rows(bench, evaluations):
    before, steps = state(bench.model), []
    trial = dataclasses.replace(TRIAL, evaluations=evaluations)
    tried = run_trial(bench, CANDIDATE, trial, on_step=lambda done, total: steps.append((done, total)))
    few = restrict_sequences(bench.task, 32, bench.rows, seed=3)
    settings = ft.TuneSettings(**vars(RECIPE), max_length=24, batch_size=4, seed=3)
    whole = ft.tune(bench.model, bench.tokenizer, CONFIG, few, settings=settings)
    shown, last = tried.shown, whole.last
    assert shown.outcomes["train_loss"] == pytest.approx(last.train_loss, rel=1e-5)
    assert shown.outcomes["eval_loss"] == pytest.approx(last.eval_loss, rel=1e-5)
    assert shown.outcomes["perplexity"] == pytest.approx(math.exp(last.eval_loss), rel=1e-5)
    assert shown.outcomes["token_accuracy"] == pytest.approx(last.metrics["token_accuracy"])
    assert (shown.rows, shown.seed, shown.eval_rows, shown.diverged) == (32, 3, 6, False)
    assert shown.best == pytest.approx(min(epoch.main for epoch in whole.history.epochs[-evaluations:]), rel=1e-5)
    assert steps == [(step, 8) for step in range(1, 9)]
    after = state(bench.model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_that_is_on_the_model_stays_as_it_is(bench):
    placed = place(bench.model, CONFIG, seed=3)
    language = own_language_model(placed, bench.tokenizer, bare=False)
    own = dataclasses.replace(bench, language=language)
    before = state(placed)
    there = run_trial(own, Candidate("own", None, RECIPE), TRIAL)
    assert all(torch.equal(value, before[name]) for name, value in placed.state_dict().items())
    assert there.shown == run_trial(bench, CANDIDATE, TRIAL).shown


def test_a_run_that_bursts_says_so_and_is_kept(bench, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=1e12, target_modules=["down_proj"])
    wild = Candidate("wild", config, dataclasses.replace(RECIPE, learning_rate=1e30))
    plan = TrialPlan((TRIAL,), 100.0, 66.0, "66 of 100")
    store = open_store(bench, tmp_path)
    ((tried,),) = run_trials(bench, [wild], plan, store)
    assert tried.shown.diverged
    assert find(store, trial_key(store, bench, wild, TRIAL), "causal-lm").shown.diverged


def test_the_same_plan_twice_makes_nothing_anew(bench, tmp_path):
    plan = plan_trials([RECIPE], bench.extent(), 0.6, seed=3)
    store, progress = open_store(bench, tmp_path / "trials"), []
    first = run_trials(bench, [CANDIDATE], plan, store, on_progress=lambda *numbers: progress.append(numbers))
    assert [tried.shown.rows for tried in first[0]] == [trial.rows for trial in plan.trials]
    assert progress[-1] == pytest.approx((plan.passes, plan.passes))
    files = {path: path.read_bytes() for path in (tmp_path / "trials").glob("*.json")}
    assert len(files) == len(plan.trials)
    assert run_trials(bench, [CANDIDATE], plan, store) == first
    assert {path: path.read_bytes() for path in (tmp_path / "trials").glob("*.json")} == files
    table = describe_plan(bench, [CANDIDATE], plan, store, seconds_per_pass=seconds_per_pass(bench))
    assert {row[-1] for row in table.rows} == {"kept"}


def test_a_stopped_plan_goes_on(bench, tmp_path, monkeypatch):
    plan = TrialPlan((TRIAL, dataclasses.replace(TRIAL, rows=40)), 200.0, 148.0, "148 of 200")
    store, real, calls = open_store(bench, tmp_path), carry.run_trial, []

    def stopped(bench, candidate, trial, *, on_step=None):
        calls.append(trial.rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(bench, candidate, trial, on_step=on_step)

    monkeypatch.setattr(carry, "run_trial", stopped)
    with pytest.raises(KeyboardInterrupt, match="1 of 2 trials are kept, the same command goes on"):
        run_trials(bench, [CANDIDATE], plan, store)
    (tried,) = run_trials(bench, [CANDIDATE], plan, store)
    assert calls == [32, 40, 40]
    assert [one.shown.rows for one in tried] == [32, 40]


def key_of(bench, candidate=CANDIDATE, trial=TRIAL):
    return trial_key(open_store(bench), bench, candidate, trial)


def test_a_key_is_of_content(language, bench):
    key = key_of(bench)
    assert key_of(bench_at(language, batching=dataclasses.replace(BATCHING, batch_size=2))) == key
    assert key_of(bench, dataclasses.replace(CANDIDATE, name="another")) == key
    with_template = dataclasses.replace(bench, language=dataclasses.replace(language, tokenizer=made.make_tokenizer()))
    with_template.tokenizer.chat_template = "{{ messages }}"
    wider = LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    others = [
        key_of(bench, Candidate("q", wider, RECIPE)),
        *(
            key_of(bench, dataclasses.replace(CANDIDATE, recipe=dataclasses.replace(RECIPE, **{name: value})))
            for name, value in {"epochs": 3, "learning_rate": 1e-2, "train_batch_size": 4}.items()
        ),
        *(key_of(bench, trial=dataclasses.replace(TRIAL, **{name: 33})) for name in ("rows", "seed")),
        key_of(bench_at(language, loss_on="all")),
        key_of(bench_at(language, n_train=90)),
        key_of(bench_at(language, eval_samples=5)),
        key_of(bench_at(language, batching=dataclasses.replace(BATCHING, max_length=20))),
        key_of(dataclasses.replace(bench, task=dataclasses.replace(bench.task, format="instruction"))),
        key_of(with_template),
    ]
    assert len({key, *others}) == 1 + len(others)
    heavier = made.reader()
    with torch.no_grad():
        next(iter(heavier.model.parameters())).add_(1e-3)
    assert key_of(bench_at(heavier)) != key


def test_a_pass_is_timed(bench):
    inputs, n_rows = bench.few(8)
    assert n_rows == 8
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert 0 < seconds_per_pass(bench) < 60
