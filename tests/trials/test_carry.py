"""Trials are kept under what they hang on, made once, and gone on with after a kill."""

import dataclasses
import json
import math

import pytest
from peft import LoraConfig

from foretune.errors import StoreError
from foretune.forecasting.shown import Shown
from foretune.models.classifier import load_classifier
from foretune.settings.groups import Batching, DataConfig, Recipe
from foretune.tasks.load import load_task
from foretune.trials import carry
from foretune.trials.bench import Candidate, bench_of
from foretune.trials.carry import describe_plan, run_trials, seconds_per_pass
from foretune.trials.plan import Trial, TrialPlan
from foretune.trials.run import Tried
from foretune.trials.store import find, keep, open_store, place_of_trial, trial_key, turn

import cases

RECIPE = Recipe(epochs=2, learning_rate=2e-2, train_batch_size=8)
QUERY = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
KEY = LoraConfig(r=2, target_modules=["key"], task_type="SEQ_CLS")
CANDIDATES = (Candidate("query", QUERY, RECIPE), Candidate("key", KEY, RECIPE))
TRIALS = (Trial(0, 32, 0, 68.0, 1), Trial(1, 32, 0, 68.0, 1), Trial(0, 40, 0, 84.0, 1))
PLAN = TrialPlan(TRIALS, 300.0, 220.0, "220 of 300")


def bench_at(folder, *, name="reviews", batching=None, n_train=80, model="model", seed=0):
    task = load_task(DataConfig(cases.write_reviews(folder / name, n_train, 20)))
    path = folder / model if (folder / model).exists() else cases.save(folder / model)
    classifier = load_classifier(str(path), label_names=task.label_names, seed=seed)
    return bench_of(classifier, task, batching or Batching(max_length=32), eval_samples=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("carry")


@pytest.fixture(scope="module")
def bench(folder):
    return bench_at(folder)


@pytest.fixture
def made(monkeypatch):
    """The trials that are made, without training."""
    calls = []

    def run_trial(bench, candidate, trial, *, on_step=None):
        for step in (1, 2):
            on_step(step, 2)
        calls.append((candidate.name, trial.rows))
        outcomes = {"train_loss": 0.5, "eval_loss": 0.25 + trial.candidate, "accuracy": 1.0 / trial.rows}
        return Tried(Shown(trial.rows, trial.seed, 12, outcomes, 0.75, 2, diverged=False), trial.passes, 1.5)

    monkeypatch.setattr(carry, "run_trial", run_trial)
    return calls


def test_trials_are_made_once_and_given_by_candidate(bench, made, tmp_path):
    store, progress = open_store(bench, tmp_path / "trials"), []
    first = run_trials(bench, CANDIDATES, PLAN, store, on_progress=lambda *numbers: progress.append(numbers))
    assert made == [("query", 32), ("key", 32), ("query", 40)]
    assert [[tried.shown.rows for tried in each] for each in first] == [[32, 40], [32]]
    assert progress[0] == (0, 220)
    assert progress[-1] == (220, 220)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    again = run_trials(bench, CANDIDATES, PLAN, store)
    assert again == first
    assert len(made) == 3
    more = dataclasses.replace(PLAN, trials=(*TRIALS, Trial(1, 40, 0, 84.0, 1)))
    run_trials(bench, CANDIDATES, more, store)
    assert made[3:] == [("key", 40)]


def test_a_killed_search_goes_on(bench, made, monkeypatch, tmp_path):
    store, real = open_store(bench, tmp_path / "trials"), carry.run_trial

    def killed(bench, candidate, trial, *, on_step=None):
        if trial.rows == 40:
            raise KeyboardInterrupt
        return real(bench, candidate, trial, on_step=on_step)

    monkeypatch.setattr(carry, "run_trial", killed)
    with pytest.raises(KeyboardInterrupt, match="2 of 3 trials are kept, the same command goes on"):
        run_trials(bench, CANDIDATES, PLAN, store)
    monkeypatch.setattr(carry, "run_trial", real)
    run_trials(bench, CANDIDATES, PLAN, store)
    assert made == [("query", 32), ("key", 32), ("query", 40)]
    assert len([*(tmp_path / "trials").glob("*.json")]) == 3
    assert not [*(tmp_path / "trials").glob(".*")]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "schema": 99}),
        lambda text: json.dumps({**json.loads(text), "key": "another"}),
        lambda text: text.replace('"rows": 32', '"rows": "32"'),
        lambda text: text.replace('"eval_loss": 0.25', '"eval_loss": null'),
        lambda text: text.replace('"accuracy"', '"accurately"'),
        lambda text: text.replace('"diverged": false', '"diverged": 0'),
    ],
)
def test_a_damaged_trial_is_made_again_with_a_word(bench, made, tmp_path, damage):
    store, notes = open_store(bench, tmp_path), []
    plan = dataclasses.replace(PLAN, trials=TRIALS[:1])
    first = run_trials(bench, CANDIDATES, plan, store)
    (path,) = tmp_path.glob("*.json")
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert run_trials(bench, CANDIDATES, plan, store, on_note=notes.append) == first
    assert len(made) == 2
    assert "is damaged" in notes[0]
    assert "made again" in notes[0]
    run_trials(bench, CANDIDATES, plan, store, on_note=notes.append)
    assert (len(made), len(notes)) == (2, 1)


def test_what_is_not_finite_is_kept(bench, tmp_path):
    store = open_store(bench, tmp_path)
    outcomes = {"train_loss": math.nan, "eval_loss": math.inf, "accuracy": 0.5}
    tried = Tried(Shown(32, 0, 12, outcomes, math.nan, 2, diverged=True), 68.0, 1.0)
    keep(store, "k", tried, {})
    held = find(store, "k", "classification")
    assert held.shown.diverged
    assert math.isnan(held.shown.outcomes["eval_loss"])
    assert held.shown.outcomes["accuracy"] == 0.5


def key_of(bench, candidate=CANDIDATES[0], trial=TRIALS[0]):
    return trial_key(open_store(bench), bench, candidate, trial)


def test_a_key_is_of_content(bench, folder, tmp_path):
    """Another folder, name or batch of evaluation is the same trial; another recipe, row, weight or length is not."""
    key = key_of(bench)
    elsewhere = bench_at(tmp_path, name="others", batching=Batching(max_length=32, batch_size=3))
    assert elsewhere.task.source != bench.task.source
    assert key_of(elsewhere) == key
    assert key_of(bench, dataclasses.replace(CANDIDATES[0], name="x")) == key
    same = LoraConfig(r=2, lora_alpha=8.0, target_modules={"value", "query"}, task_type="SEQ_CLS",
                      base_model_name_or_path="m")  # fmt: skip
    assert key_of(bench, Candidate("q", same, RECIPE)) == key
    fewer = dataclasses.replace(bench.held, eval_indices=bench.held.eval_indices[1:])
    others = [
        key_of(bench, CANDIDATES[1]),
        key_of(bench, Candidate("q", LoraConfig(r=3, target_modules=["query", "value"], task_type="SEQ_CLS"), RECIPE)),
        *(
            key_of(bench, dataclasses.replace(CANDIDATES[0], recipe=dataclasses.replace(RECIPE, **{name: value})))
            for name, value in {"epochs": 3, "learning_rate": 1e-2, "train_batch_size": 4, "weight_decay": 0.1,
                                "warmup_ratio": 0.5, "scheduler": "cosine"}.items()
        ),
        *(key_of(bench, trial=dataclasses.replace(TRIALS[0], **{name: 33})) for name in ("rows", "seed")),
        key_of(bench_at(folder, batching=Batching(max_length=16))),
        key_of(bench_at(folder, name="more", n_train=90)),
        key_of(bench_at(folder, seed=5)),  # another new head
        key_of(dataclasses.replace(bench, held=fewer)),
    ]  # fmt: skip
    assert len({key, *others}) == 1 + len(others)


def test_a_key_is_of_the_tokenizer(bench):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bench.classifier.source)
    with_it = dataclasses.replace(bench, classifier=dataclasses.replace(bench.classifier, tokenizer=tokenizer))
    tokenizer(["a text"], truncation=True, max_length=3)
    assert open_store(with_it).model == open_store(bench).model
    tokenizer.add_tokens(["another"])
    assert open_store(with_it).model != open_store(bench).model


def test_trials_lie_in_the_home_that_is_named(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("FORETUNE_HOME", str(tmp_path / "mine"))
    assert place_of_trial(open_store(bench), "k") == tmp_path / "mine" / "trials" / "k.json"


def test_a_file_in_the_way_is_named(bench, made, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StoreError, match="file"):
        run_trials(bench, CANDIDATES, PLAN, open_store(bench, tmp_path / "file"))


def test_turns_are_taken_and_leave_nothing(bench, tmp_path):
    store = open_store(bench, tmp_path / "trials")
    for _ in range(2):
        with turn(store, "k"):
            assert [*store.folder.glob(".k.lock")]
    assert not [*store.folder.iterdir()]


def test_a_plan_is_described(bench, made, tmp_path):
    store = open_store(bench, tmp_path)
    run_trials(bench, CANDIDATES, dataclasses.replace(PLAN, trials=TRIALS[:1]), store)
    table = describe_plan(bench, CANDIDATES, PLAN, store, seconds_per_pass=0.5)
    assert table.rows[0] == ("query", "32", "1", "68", "42%", "0", "kept")
    assert table.rows[2] == ("query", "40", "1", "84", "52%", "42", "to make")
    assert "About 76 s" in table.caption
    assert describe_plan(bench, CANDIDATES, PLAN, store).rows[1][-2:] == ("–", "to make")


def test_a_pass_is_timed(bench):
    assert 0 < seconds_per_pass(bench) < 60
