"""Recipes are candidates: which runs are simulated, what is read off them, and what can be trained of it."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import foretune as ft
from foretune.cli import run
from foretune.errors import ConfigError
from foretune.forecasting.reach import Reach
from foretune.forecasting.risk import Risk
from foretune.forecasting.schedule import schedule_of
from foretune.ranking.recipes import best_epoch, check_runs, rate_note, verdicts
from foretune.settings.groups import MOST_RUNS, Recipe, Recipes
from foretune.tasks.metrics import main_metric

import cases
import domains

RATES, LENGTHS = ("3e-2", "1e-3", "3e-2"), ("3", "1")


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    model = cases.save(folder / "model")
    calibration = domains.write(folder / "calibration.json", model)
    dataset = cases.write_reviews(folder / "reviews")
    return ["--model", model, "--dataset", dataset, "--calibration", calibration, "--samples", "16", "--eval-samples",
            "10", "--draws", "1", "--train-batch-size", "8", "--target-modules", "query", "--layers", "1", "0",
            "--ranks", "2", "--max-length", "24", "--seed", "3"]  # fmt: skip


@pytest.fixture(scope="module")
def ranked(common, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranked") / "out"
    assert run(["rank", *common, "--learning-rate", *RATES, "--epochs", *LENGTHS, "--output", str(folder)]) == 0
    return folder


def rows_of(folder):
    with (folder / "ranking.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def content_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_every_finalist_is_ranked_under_every_recipe_once(ranked):
    rows = rows_of(ranked)
    found = [(row["adapter"], row["learning_rate"], row["epochs"]) for row in rows]
    assert len(found) == len(set(found)) == 3 * 2 * 2
    accuracies = [float(row["accuracy"]) for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    held = content_of(ranked)["rankings"][0]
    assert [(row["adapter"], f"{row['recipe']['learning_rate']:g}") for row in held["rows"]] == [
        (row["adapter"], row["learning_rate"]) for row in rows
    ]
    assert held["steps"] == max(row["steps"] for row in held["rows"])
    assert all(row["recipe"]["train_batch_size"] == 8 for row in held["rows"])
    header = (ranked / "ranking.md").read_text(encoding="utf-8").splitlines()[2]
    assert "| learning rate | epochs |" in header


def test_a_row_says_what_a_ranking_of_its_recipe_alone_says(ranked, common, tmp_path):
    for rate, epochs in (("3e-2", "1"), ("1e-3", "3")):
        alone = tmp_path / f"{rate}-{epochs}"
        assert run(["rank", *common, "--learning-rate", rate, "--epochs", epochs, "--output", str(alone)]) == 0
        apart = {row["adapter"]: row for row in rows_of(alone)}
        assert "epochs" not in rows_of(alone)[0]
        assert "learning rate" not in (alone / "ranking.tex").read_text(encoding="utf-8")
        assert "recipe" not in content_of(alone)["rankings"][0]["rows"][0]
        together = [
            row for row in rows_of(ranked) if (row["learning_rate"], row["epochs"]) == (f"{float(rate):g}", epochs)
        ]
        assert len(together) == len(apart) == 3
        for row in together:
            for name in ("accuracy", "eval_loss_high", "train_loss", "condition_number", "best_epoch"):
                assert float(row[name]) == pytest.approx(float(apart[row["adapter"]][name]), rel=1e-4), name


def test_the_head_alone_has_the_recipe_that_is_best_for_it(ranked, common, tmp_path, capsys):
    found = content_of(ranked)["rankings"][0]
    reached = {}
    for rate in ("3e-2", "1e-3"):
        for epochs in LENGTHS:
            assert (
                run(["rank", *common, "--learning-rate", rate, "--epochs", epochs, "--finalists", "1", "--json"]) == 0
            )
            alone = json.loads(capsys.readouterr().out)["rankings"][0]["head_alone"]
            reached[float(rate), int(epochs)] = (alone["accuracy"]["value"], -alone["eval_loss"]["value"])
    best = max(reached, key=reached.get)
    assert (found["head_recipe"]["learning_rate"], found["head_recipe"]["epochs"]) == best
    assert found["head_alone"]["accuracy"]["value"] == pytest.approx(reached[best][0], rel=1e-4)


def test_the_chosen_row_is_tuned_and_forecast_as_it_stands(common, ranked, tmp_path):
    """With the recipe, the data and the tokens of the ranking, wherever the folder lies."""
    out = tmp_path / "out"
    assert run(["rank", "--config", str(ranked / "config.yaml"), "--choose", "5", "--output", str(out)]) == 0
    moved = out.rename(tmp_path / "moved")
    row = rows_of(moved)[4]
    told = yaml.safe_load((moved / "chosen.yaml").read_text(encoding="utf-8"))
    assert (f"{told['learning_rate']:g}", str(told["epochs"])) == (row["learning_rate"], row["epochs"])
    assert (told["max_length"], told["seed"], told["train_batch_size"]) == (24, 3, 8)
    named = content_of(moved)["chosen"]
    assert (named["place"], named["adapter"], named["recipe"]["epochs"]) == (5, row["adapter"], told["epochs"])
    tuned, forecast = tmp_path / "tuned", tmp_path / "forecast"
    assert run(["tune", "--config", str(moved / "chosen.yaml"), "--output", str(tuned)]) == 0
    done = content_of(tuned)
    assert done["placement"]["trainable_parameters"] == int(row["parameters"])
    (held,) = [one for one in content_of(moved)["rankings"][0]["rows"] if one["adapter"] == row["adapter"]
               and one["recipe"] == named["recipe"]]  # fmt: skip
    assert done["steps"] == held["steps"]
    calibration = common[common.index("--calibration") + 1]
    tokens = ["--config", str(moved / "chosen.yaml"), "--calibration", calibration, "--output", str(forecast)]
    assert run(["forecast", *tokens]) == 0
    said = content_of(forecast)["end"]
    assert said["accuracy"]["value"] == pytest.approx(float(row["accuracy"]), abs=0.02)  # a draw of A of its own
    assert said["eval_loss"]["value"] == pytest.approx(float(row["eval_loss"]), rel=0.05)


def test_the_best_epoch_is_shown_where_it_is_not_the_last(ranked):
    held = content_of(ranked)["rankings"][0]
    late = [row["best_epoch"] < row["recipe"]["epochs"] for row in held["rows"]]
    header, _, *lines = (ranked / "ranking.md").read_text(encoding="utf-8").splitlines()[2:]
    assert ("best epoch" in header) == any(late)
    if any(late):
        column = [name.strip() for name in header.split("|")].index("best epoch")
        shown = [line.split("|")[column].strip() for line in lines if line]
        assert shown == [str(row["best_epoch"]) if one else "" for row, one in zip(held["rows"], late, strict=True)]
    assert [str(row["best_epoch"]) for row in held["rows"]] == [row["best_epoch"] for row in rows_of(ranked)]


def test_a_run_is_looked_at_and_judged_at_the_end_of_each_epoch(common):
    """What a row says of its run, read off the simulated one and the schedule."""
    flags = dict(zip(common[::2], common[1::2], strict=False))
    task = ft.load_task(ft.DataConfig(flags["--dataset"]))
    model = ft.load_classifier(flags["--model"], label_names=task.label_names, seed=3)
    settings = ft.RankSettings(
        target_modules=("query",),
        samples=16,
        eval_samples=10,
        draws=1,
        finalists=2,
        train_batch_size=8,
        epochs=(4, 2),
        learning_rate=(1e-2, 1e-1),
        alpha=6,
    )
    calibration = ft.read_calibration(Path(flags["--calibration"]))
    ranking = ft.rank(model.model, model.tokenizer, task, settings=settings, calibration=calibration)
    assert len(ranking.rows) == 8
    assert ranking.recipes == settings.each()
    for row in ranking.rows:
        course, schedule = row.simulated.trajectory, schedule_of(row.recipe, ranking.train_rows, seed=0)
        epoch = schedule.steps_per_epoch
        assert course.steps == (0, *schedule.looks(16))
        ends = [course.steps.index(epoch * number) for number in range(1, row.recipe.epochs + 1)]
        assert row.steps == schedule.steps
        of_epochs = [(course.eval_metric[at], -course.eval_loss[at]) for at in ends]
        assert row.best_epoch == 1 + of_epochs.index(max(of_epochs))
        assert row.ends_late == (row.best_epoch < row.recipe.epochs)
        assert row.update_rate == pytest.approx(6 * schedule.rates().mean())
    assert ranking.steps == max(row.steps for row in ranking.rows)


METRIC = main_metric("classification")
VALUES = st.one_of(st.just(math.nan), st.sampled_from([0.25, 0.5, 0.75]))


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=6))
def test_the_best_epoch_is_the_first_that_none_beats(course):
    metrics, losses = zip(*course, strict=True)
    best = best_epoch(metrics, losses, METRIC) - 1

    def worth(at):
        known = [-math.inf if math.isnan(metrics[at]) else metrics[at]]
        return (*known, -math.inf if math.isnan(losses[at]) else -losses[at])

    assert all(worth(at) < worth(best) for at in range(best))
    assert all(worth(at) <= worth(best) for at in range(best, len(course)))


def test_a_metric_of_which_less_is_better():
    assert best_epoch([0.3, 0.1, 0.2], [1.0, 1.0, 1.0], replace(METRIC, better=-1)) == 2


NUMBERS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@given(NUMBERS, NUMBERS)
def test_recipes_are_the_product_whatever_order_they_come_in(lengths, rates):
    rates = [rate / 1000 for rate in rates]
    made = Recipes(epochs=lengths, learning_rate=rates, weight_decay=0.1).each()
    assert len(made) == len(set(made)) == len(set(lengths)) * len(set(rates))
    assert {(one.epochs, one.learning_rate) for one in made} == {(e, r) for e in lengths for r in rates}
    assert made == Recipes(epochs=lengths[::-1], learning_rate=[*rates[::-1], rates[0]], weight_decay=0.1).each()
    assert all(type(one) is Recipe and one.weight_decay == 0.1 for one in made)


def test_one_number_stands_for_itself():
    assert ft.RankSettings(epochs=3, learning_rate=1e-3).each() == (Recipe(epochs=3, learning_rate=1e-3),)
    assert ft.RankSettings().each() == (Recipe(),)


@given(st.integers(1, 600), st.integers(1, 16), st.integers(1, 16), st.integers(1, 600))
def test_runs_beyond_the_limit_are_refused_with_what_fits(finalists, rates, lengths, listed):
    def settings(count):
        return ft.RankSettings(
            finalists=count, epochs=range(1, lengths + 1), learning_rate=[1e-3 * i for i in range(1, rates + 1)]
        )

    simulated = min(finalists, listed)
    if simulated * rates * lengths <= MOST_RUNS:
        check_runs(settings(finalists), listed)
        return
    with pytest.raises(ConfigError) as refused:
        check_runs(settings(finalists), listed)
    message = str(refused.value)
    for number in (simulated, rates, lengths, simulated * rates * lengths):
        assert f"{number:,}" in message
    fits = int(message.split("--finalists ")[1].split(",")[0])
    check_runs(settings(fits), listed)
    with pytest.raises(ConfigError):
        check_runs(settings(fits + 1), 10_000)


def test_what_a_search_may_find_counts_under_a_budget():
    settings = ft.RankSettings(finalists=200, epochs=(1, 2), budget="300k")
    with pytest.raises(ConfigError, match=r"200 finalists times 1 learning rates times 2 .*--finalists 128"):
        check_runs(settings, 3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning-rate", "1e-3", "0"], ["learning_rate = 0", "positive"]),
        (["--learning-rate", "1e-3", "-1"], ["learning_rate = -1"]),
        (["--epochs", "0", "3"], ["epochs = 0", "at least 1"]),
        (["--learning-rate", *(f"{i}e-4" for i in range(1, 258))], ["257 rates", "256"]),
        (["--epochs", *map(str, range(1, 100))], ["3 finalists times 1 learning rates times 99", "--finalists 2"]),
        (["--epochs"], ["epochs"]),
    ],
)
def test_odd_recipes_are_refused_and_nothing_is_written(common, flags, words, tmp_path, capsys):
    out = tmp_path / "refused"
    assert run(["rank", *common, *flags, "--output", str(out)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    for word in words:
        assert word in message
    assert not out.exists()


def test_several_rates_of_a_ranking_are_none_of_one_run(ranked, tmp_path, capsys):
    """A run takes one: from chosen.yaml, or from the command line."""
    config = ["--config", str(ranked / "config.yaml")]
    assert run(["forecast", *config, "--epochs", "1"]) == 2
    message = capsys.readouterr().err
    assert "several of learning-rate" in message
    assert "chosen.yaml" in message
    assert run(["forecast", *config, "--epochs", "1", "--learning-rate=1e-3"]) == 0
    assert run(["score", *config]) == 0  # has no recipe


def test_a_rate_that_may_collapse_or_is_far_from_finished_runs_is_spoken_of():
    risk = Risk(-10.0, 2.0, of_steps=1.0, slowest=0.01, fastest=1.0, shortest=48, fine=0.1, runs=40, collapsed=5)
    several = Recipes(learning_rate=(1e-3, 1e-2)).each()

    def note(rate, risk=risk, recipes=several):
        row = SimpleNamespace(
            update_rate=rate,
            steps=1024,
            risk=0.1,
            quick=SimpleNamespace(name="query"),
            recipe=Recipe(epochs=1, learning_rate=1e-3),
        )
        return rate_note(row, recipes, risk)

    assert note(0.1) == note(0.01 / 3.9) == ()
    (likely,) = note(0.9)
    assert likely.startswith("query, 1 epoch at 0.001: 42 of 100 runs of 1,024 steps at a rate like this collapse")
    (slow,) = note(0.01 / 4.1)
    assert "far below that of all finished runs" in slow
    (alone,) = note(0.9, recipes=several[:1])
    assert alone.startswith("query: 42 of 100")
    assert note(0.9, risk=None) == ()


def outside(why, config=None):
    return SimpleNamespace(said=SimpleNamespace(reach=Reach(2.0, (why,))), quick=SimpleNamespace(config=config))


def test_many_reasons_are_told_in_few_lines():
    rows = [outside(f"reason {i}") for i in range(3)]
    assert len(verdicts([*rows, *rows])) == 3
    assert len(verdicts([*rows, outside("another")])) == 4
    more = [outside(f"other {i}") for i in range(4)]
    *told, last = verdicts([*rows, *more])
    assert len(told) == 3
    assert "for 4 other reasons" in last


def test_methods_beside_lora_have_notes_of_their_own():
    rows = [outside("far"), outside("far; two finished runs of ia3 were checked", config=object())]
    assert verdicts(rows) == verdicts(rows[:1])
    assert len(verdicts(rows[1:])) == 1
