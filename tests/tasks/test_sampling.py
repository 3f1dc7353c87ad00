import json

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import foretune as ft
from foretune.cli import run
from foretune.errors import DataError
from foretune.evaluation.comparisons import permuted_task
from foretune.evaluation.simulations import SimulationSettings, simulate_cells
from foretune.forecasting.curve import forecast_run
from foretune.forecasting.forecast import prepare_forecast
from foretune.models.identity import fingerprint
from foretune.models.placement import lora_config
from foretune.problem import prepare
from foretune.settings.commands import ForecastSettings, RankSettings, TuneSettings
from foretune.settings.groups import Recipe
from foretune.study.grid import read_grid
from foretune.study.keys import cell_key
from foretune.tasks.classification import Classification
from foretune.tasks.load import Task, TextSplit
from foretune.tasks.sampling import draw_indices, n_training, split
from foretune.training.plan import prepare_tune
from foretune.trials.ranking import rank

import cases
import domains


def memory(n_train, n_eval=0, labels=None):
    def part(name, n, labels=None):
        labels = np.arange(n, dtype=np.int64) % 2 if labels is None else np.asarray(labels, dtype=np.int64)
        return TextSplit(name, [f"{cases.review(i)[0]}" for i in range(n)], None, labels)

    evaluation = part("validation", n_eval) if n_eval else None
    return Task(
        "memory", part("train", n_train, labels), evaluation, ("text",), ("label",), Classification(("a", "b")), ""
    )


@settings(deadline=None, max_examples=60)
@given(n_rows=st.integers(8, 60), n=st.integers(6, 8), seed=st.integers(0, 2**31), repeat=st.integers(0, 3))
def test_draws_are_distinct_rows_and_reproducible(n_rows, n, seed, repeat):
    rows = draw_indices(n_rows, n, seed=seed, repeat=repeat)
    assert len(set(rows.tolist())) == n
    assert rows.min() >= 0
    assert rows.max() < n_rows
    assert np.array_equal(rows, draw_indices(n_rows, n, seed=seed, repeat=repeat))


@settings(deadline=None, max_examples=80)
@given(
    n_rows=st.sampled_from([10, 60, 1_000, 10_000]),
    seed=st.integers(0, 2**32 - 1),
    samples=st.integers(40, 512),
    eval_samples=st.one_of(st.none(), st.integers(0, 3_000)),
    repeat=st.integers(0, 2),
)
def test_what_trains_is_the_same_whatever_is_known_and_predicted(n_rows, seed, samples, eval_samples, repeat):
    task = memory(n_rows)
    run = split(task, samples=0, eval_samples=None, seed=seed)
    assert len(run.training) == n_training(task) == n_rows - n_rows // 5
    assert sorted([*run.training, *run.eval_indices]) == list(range(n_rows))  # none lost, none twice
    few = split(task, samples=min(samples, n_training(task)), eval_samples=eval_samples, seed=seed, repeat=repeat)
    assert np.array_equal(few.training, run.training)
    assert set(few.train_indices) <= set(run.training)
    assert len(set(few.train_indices)) == min(samples, n_training(task))
    wanted = len(run.eval_indices) if eval_samples is None else min(eval_samples, len(run.eval_indices))
    assert np.array_equal(few.eval_indices, run.eval_indices[:wanted])
    tuned = split(task, samples=0, eval_samples=eval_samples, seed=seed)
    assert np.array_equal(tuned.eval_indices, few.eval_indices)
    assert few.held_out


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), wanted=st.one_of(st.none(), st.integers(0, 60)), repeat=st.integers(0, 2))
def test_with_an_evaluation_split_every_row_trains_and_the_draws_are_those_of_a_finished_study(seed, wanted, repeat):
    rows = split(memory(60, 50), samples=20, eval_samples=wanted, seed=seed, repeat=repeat)
    assert np.array_equal(rows.training, np.arange(60))
    assert np.array_equal(rows.train_indices, draw_indices(60, 20, seed=seed, repeat=repeat))
    assert np.array_equal(rows.eval_indices, draw_indices(50, 50 if wanted is None else min(wanted, 50), seed=seed))
    assert not rows.held_out


def test_draws_that_must_not_change():
    """Rows of the committed studies, by number."""
    rows = split(memory(60, 50), samples=5, eval_samples=4, seed=0)
    assert rows.train_indices.tolist() == [36, 29, 15, 18, 47]
    assert rows.eval_indices.tolist() == [13, 25, 39, 30]


@settings(deadline=None, max_examples=60)
@given(n_eval=st.sampled_from([0, 5, 50]), seed=st.integers(0, 99), wanted=st.integers(0, 30))
def test_evaluation_rows_are_the_same_over_repeats_and_never_training_samples(n_eval, seed, wanted):
    task = memory(60, n_eval)
    draws = [split(task, samples=20, eval_samples=wanted, seed=seed, repeat=repeat) for repeat in (0, 1)]
    assert np.array_equal(draws[0].eval_indices, draws[1].eval_indices)
    assert not np.array_equal(draws[0].train_indices, draws[1].train_indices)
    assert draws[0].held_out == (n_eval == 0)
    assert len(draws[0].eval_indices) == min(wanted, n_eval or 12)
    if not n_eval:
        assert all(not set(d.eval_indices.tolist()) & set(d.training.tolist()) for d in draws)


@pytest.mark.parametrize(
    ("rows", "samples", "message"),
    [
        ((60, 5), 70, "70 samples asked for, but there are 60 rows: lower --samples"),
        (
            (60,),
            49,
            "49 samples asked for, but there are 60 rows of which 48 train and the others are held out: lower",
        ),
        ((60,), 61, "61 samples asked for"),
        ((1,), 0, "holding rows out of 1 leaves none to train on"),
    ],
)
@pytest.mark.parametrize("eval_samples", [0, 5, None])
def test_draws_that_cannot_be(rows, samples, message, eval_samples):
    with pytest.raises(DataError, match=message):
        split(memory(*rows), samples=samples, eval_samples=eval_samples, seed=0)


def test_rows_of_one_class():
    mostly = np.r_[1, np.zeros(999)]
    with pytest.raises(DataError, match="all 4 samples drawn are of class 'a': raise --samples or change --seed"):
        split(memory(1000, 5, labels=mostly), samples=4, eval_samples=0, seed=0)
    with pytest.raises(DataError, match="all 60 rows that train are of class 'a'"):
        split(memory(60, 5, labels=np.zeros(60)), samples=0, eval_samples=5, seed=0)


def test_the_smallest_data():
    """Three rows: one is held out, two train; where that leaves one class, it is said."""
    seeds = [seed for seed in range(30) if draw_indices(3, 3, seed=seed)[0] == 1]
    assert 0 < len(seeds) < 30
    for seed in range(30):
        if seed in seeds:
            with pytest.raises(DataError, match=r"all 2 rows that train are of class 'a'.*change --seed"):
                split(memory(3), samples=2, eval_samples=None, seed=seed)
        else:
            rows = split(memory(3), samples=2, eval_samples=None, seed=seed)
            assert (len(rows.training), len(rows.eval_indices)) == (2, 1)
    with pytest.raises(DataError, match="1 row that trains is of class"):
        split(memory(2), samples=0, eval_samples=None, seed=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return cases.save(tmp_path_factory.mktemp("rows") / "model")


def table(folder, n_rows):
    """A data set folder without an evaluation split."""
    dataset = cases.write_reviews(folder, n_train=n_rows)
    (folder / "validation.csv").unlink()
    return dataset


TRAINING = Recipe(epochs=1, learning_rate=2e-2, train_batch_size=8)


def run_of(classifier, task, seed, eval_samples=None):
    lora = lora_config(classifier.model, ft.AdapterConfig(("query",), None, 2))
    training = TuneSettings(**vars(TRAINING), max_length=32, seed=seed, eval_samples=eval_samples)
    return prepare_tune(classifier, task, lora, training)


@pytest.mark.parametrize(("n_rows", "seed", "eval_samples"), [(40, 0, 512), (60, 3, 5), (1_000, 1, 20)])
def test_every_command_forecasts_the_run_that_a_fine_tune_does(
    saved, tmp_path, monkeypatch, n_rows, seed, eval_samples
):
    """Without an evaluation split: the same rows train, none that is evaluated on is known, the steps are as many."""
    dataset = table(tmp_path / "reviews", n_rows)
    task = ft.load_task(ft.DataConfig(dataset))
    classifier = ft.load_classifier(saved, label_names=task.label_names, seed=seed)
    tuned, all_of_it = run_of(classifier, task, seed, eval_samples), run_of(classifier, task, seed)
    assert np.array_equal(tuned.train.indices, all_of_it.train.indices)
    steps = tuned.steps_per_epoch() * TRAINING.epochs
    if n_rows < 100:
        wanted = RankSettings(
            **vars(TRAINING),
            samples=512,
            eval_samples=eval_samples,
            draws=1,
            max_length=32,
            seed=seed,
            target_modules=("query",),
            ranks=(2,),
            finalists=1,
        )
        plans = []

        def prepared(*args, **options):
            plans.append(prepare(*args, **options))
            return plans[-1]

        monkeypatch.setattr("foretune.ranking.rank.prepare", prepared)
        found = rank(classifier.model, classifier.tokenizer, task, settings=wanted)
        monkeypatch.undo()
        known = ForecastSettings(**vars(TRAINING), eval_samples=eval_samples, max_length=32, seed=seed)
        plans.append(prepare_forecast(classifier, task, plans[0].placed.active_peft_config, known))
        for plan in plans:  # of the ranking and of the forecast
            assert np.array_equal(plan.sample.training, tuned.train.indices)
            assert np.array_equal(plan.sample.eval_indices, tuned.evaluation.indices)
            assert sorted(plan.sample.train_indices) == sorted(tuned.train.indices)
        assert found.train_rows == len(tuned.train.labels)
        assert found.samples == len(tuned.train.labels)  # at most 512: all that train, and no other
        assert found.steps == steps
        right = np.bincount(tuned.evaluation.labels).max() / len(tuned.evaluation.labels)
        assert found.constant == pytest.approx(right)
    lora = lora_config(classifier.model, ft.AdapterConfig(("query",), None, 2))
    score = ft.ScoreSettings(samples=20, eval_samples=eval_samples, draws=1, max_length=32, seed=seed)
    plan = prepare(classifier, task, lora, score)
    assert plan.train_rows == len(tuned.train.labels)
    assert np.array_equal(plan.sample.training, tuned.train.indices)
    assert np.array_equal(plan.sample.eval_indices, tuned.evaluation.indices)
    for repeat in (0, 1):
        known, _ = plan.redraw(repeat)
        assert set(known.train_indices) <= set(tuned.train.indices)
        assert not set(known.train_indices) & set(all_of_it.evaluation.indices)
    curve = forecast_run(plan, TRAINING, domains.by_hand(domains.everywhere(fingerprint(classifier.model))))
    assert curve.points[-1].step == steps


@pytest.mark.parametrize("comparisons", [False, True])
def test_an_outlook_simulates_the_rows_that_are_trained(saved, tmp_path, comparisons):
    dataset = table(tmp_path / "reviews", 60)
    grid = {
        "models": [saved],
        "datasets": [{"dataset": dataset, "name": "all"}, {"dataset": dataset, "name": "some", "max_train": 40}],
        "placements": [{"target_modules": ["query"]}],
        "ranks": [2],
        "seeds": [0, 1],
        "train": {"epochs": 1, "learning_rate": 2e-2, "train_batch_size": 8, "max_length": 32},
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid), encoding="utf-8")
    cells = read_grid(path)
    assert simulate_cells(cells, tmp_path / "study", SimulationSettings(comparisons=comparisons)) == 4
    for cell in cells:
        held = json.loads((tmp_path / "study" / "outlooks" / f"{cell_key(cell)}.json").read_text(encoding="utf-8"))
        task = ft.load_task(cell.data)
        classifier = ft.load_classifier(saved, label_names=task.label_names, seed=cell.train.seed)
        lora = lora_config(classifier.model, cell.adapter)
        tuned = prepare_tune(classifier, task, lora, cell.train)
        assert (
            held["train_rows"] == held["samples"] == len(tuned.train.labels) == {60: 48, 40: 32}[len(task.train.labels)]
        )
        assert held["course"]["steps"][-1] == tuned.steps_per_epoch()


@pytest.mark.parametrize("n_eval", [0, 50])
def test_permuted_labels_are_those_of_the_rows_that_train(n_eval):
    task = memory(60, n_eval, labels=np.arange(60) % 2)
    permuted = permuted_task(task, 3)
    rows = split(task, samples=0, eval_samples=None, seed=3)
    before, after = task.train.labels, permuted.train.labels
    assert np.array_equal(np.bincount(before[rows.training]), np.bincount(after[rows.training]))
    assert 0.3 < np.mean(before[rows.training] == after[rows.training]) < 0.7  # no better than chance
    others = np.setdiff1d(np.arange(60), rows.training)
    assert np.array_equal(before[others], after[others])
    assert np.array_equal(task.train.labels, np.arange(60) % 2)  # the task itself is left alone
    again = split(permuted, samples=10, eval_samples=None, seed=3)
    assert np.array_equal(again.eval_indices, rows.eval_indices)


def test_a_fifth_of_one_class_is_evaluated_on(saved, tmp_path, capsys):
    """Ten rows, the two held out of one class: a run and a ranking say what there is to say."""
    dataset = table(tmp_path / "reviews", 10)
    task = ft.load_task(ft.DataConfig(dataset))
    seed = next(s for s in range(50) if len(set(task.train.labels[draw_indices(10, 10, seed=s)[:2]])) == 1)
    flags = ["--model", saved, "--dataset", dataset, "--seed", str(seed), "--epochs", "1", "--train-batch-size", "4"]
    assert run(["tune", *flags, "--target-modules", "query", "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert sorted(tuned["details"]["data"]["eval_class_counts"]) == [0, 2]
    assert run(["rank", *flags, "--target-modules", "query", "--finalists", "1", "--draws", "1", "--json"]) == 0
    (ranked,) = json.loads(capsys.readouterr().out)["rankings"]
    assert ranked["majority_accuracy"] == 1.0
    assert (ranked["train_rows"], ranked["steps"]) == (tuned["details"]["data"]["train_rows"], tuned["steps"]) == (8, 2)
