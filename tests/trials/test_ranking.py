"""`foretune rank --spend`: small trials for several rows, the largest for the best; kept, marked, replayed."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch

import foretune as ft
from foretune.cli import run
from foretune.errors import ConfigError
from foretune.forecasting.line import Line
from foretune.forecasting.outcomes import OUTCOMES, scale
from foretune.ranking.report import RankRun, ranking_content
from foretune.ranking.table import ranking_table
from foretune.report.home import home
from foretune.report.store import finite, to_json
from foretune.trials import stages as staging
from foretune.trials.ranking import check_spend, largest_within, try_finalists
from foretune.trials.stages import Telling

import cases
import domains

FLAGS = ["--samples", "20", "--eval-samples", "10", "--draws", "1", "--target-modules", "query", "value", "--ranks",
         "2", "--finalists", "4", "--epochs", "4", "--learning-rate", "2e-2", "--train-batch-size", "8",
         "--max-length", "32"]  # fmt: skip
OPTIONS = {"samples": 20, "eval_samples": 10, "draws": 1, "target_modules": ("query", "value"), "ranks": (2,),
           "finalists": 4, "epochs": (4,), "learning_rate": (2e-2,), "train_batch_size": 8,
           "max_length": 32}  # fmt: skip
N = 200


def with_trial_lines(calibration):
    """What a trial shows beyond the forecast counts with its weight √(n'/N) alone."""
    line = Line((1.0, 0.0), (-5.0, 5.0), 1.0, 0.3, 0.2, 6, 60)
    return replace(calibration, trial_lines=dict.fromkeys(OUTCOMES, line), trial_domain=calibration.domain)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tried")
    cases.save(folder / "model")
    domains.write(folder / "calibration.json", str(folder / "model"))
    calibration = with_trial_lines(ft.read_calibration(folder / "calibration.json"))
    (folder / "calibration.json").write_text(json.dumps(calibration.to_dict()), encoding="utf-8")
    cases.write_reviews(folder / "reviews", N, 20)
    return folder


def tokens(place, *more):
    return ["rank", "--model", str(place / "model"), "--dataset", str(place / "reviews"), "--calibration",
            str(place / "calibration.json"), *FLAGS, *more]  # fmt: skip


@pytest.fixture(scope="module")
def screened(place):
    """A ranking without trials, and what it was made of."""
    task = ft.load_task(ft.DataConfig(str(place / "reviews")))
    classifier = ft.load_classifier(str(place / "model"), label_names=task.label_names, seed=0)
    settings = ft.RankSettings(**OPTIONS, spend="100%")
    calibration = ft.read_calibration(place / "calibration.json")
    free = replace(settings, spend="0")
    ranking = ft.rank(classifier.model, classifier.tokenizer, task, settings=free, calibration=calibration)
    return ranking, classifier, task, settings, calibration


def kept():
    return sorted(path.name for path in (home() / "trials").glob("*.json"))


def rows_of(folder):
    with (folder / "ranking.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def content_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_a_spend_buys_trials_that_are_shown_kept_and_replayed(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(tokens(place, "--spend", "100%", "--output", str(out))) == 0
    said = capsys.readouterr()
    assert "to make" in said.err
    assert "of 100% asked for, of the 800 sample passes of one run of 200 rows" in said.err
    assert "of 100% asked for, of the 800 sample passes" in said.out
    assert "trials" in (out / "ranking.md").read_text(encoding="utf-8").splitlines()[2]
    (held,) = content_of(out)["rankings"]
    trials = [[trial["rows"] for trial in row["trials"]] for row in held["rows"]]
    assert sorted(map(len, trials), reverse=True)[0] >= 1
    assert sum(len(of_row) for of_row in trials) == len(kept()) >= 3
    assert max(map(max, filter(None, trials))) > 32
    passes = sum(trial["passes"] for row in held["rows"] for trial in row["trials"])
    assert held["trial_passes"] == pytest.approx(passes)
    assert held["spend"] == pytest.approx(passes / 800)
    assert held["spend"] <= 1.0
    assert held["seconds"]["trials"] > 0
    for row, written in zip(held["rows"], rows_of(out), strict=True):
        assert written["trial_rows"] == (str(row["trials"][-1]["rows"]) if row["trials"] else "")
    assert run(["rank", "--config", str(out / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    said = capsys.readouterr()
    assert "to make" not in said.err
    again = content_of(tmp_path / "again")
    assert again["settings"]["trials"] == {"spend": "100%", "workers": 1, "engine": "local"}
    assert again["rankings"][0]["rows"] == held["rows"]
    assert (tmp_path / "again" / "chosen.yaml").read_text("utf-8") == (out / "chosen.yaml").read_text("utf-8")
    assert "spend: '0'" in (out / "chosen.yaml").read_text("utf-8")


def test_without_a_spend_nothing_is_trained_and_nothing_changes(place, tmp_path, capsys):
    assert run(tokens(place, "--output", str(tmp_path / "out"))) == 0
    assert not (home() / "trials").exists()
    (held,) = content_of(tmp_path / "out")["rankings"]
    assert (held["spend"], held["trial_passes"]) == (0.0, 0.0)
    assert all(row["trials"] == [] and row["collapsed"] is None for row in held["rows"])
    assert "trial_rows" not in rows_of(tmp_path / "out")[0]
    assert "trials" not in (tmp_path / "out" / "ranking.md").read_text(encoding="utf-8")
    assert "trials" not in capsys.readouterr().out


def test_a_larger_spend_finds_what_a_smaller_one_bought(screened):
    ranking, classifier, task, settings, calibration = screened
    few = try_finalists(ranking, classifier, task, replace(settings, spend="70%"), calibration)
    before = set(kept())
    totals, tables = [], []
    telling = Telling(on_plan=tables.append, on_progress=lambda done, total: totals.append((done, total)))
    more = try_finalists(ranking, classifier, task, settings, calibration, telling=telling)
    assert before <= set(kept())
    assert few.spent.share <= 0.7 < more.spent.share <= 1.0
    assert any("kept" in row for row in tables[0].rows)
    assert totals[-1][0] == pytest.approx(totals[-1][1])
    assert [done for done, _ in totals] == sorted(done for done, _ in totals)
    new = more.spent.passes - sum(
        trial["passes"]
        for row in few.rows
        for trial in row.trials
        if any(trial == other for one in more.rows for other in one.trials)
    )
    assert totals[-1][1] == pytest.approx(new)  # what is kept is not made again


def test_the_largest_trial_is_for_the_row_that_is_the_best_then(screened, monkeypatch):
    """The row that was first shows nothing in the small trials, so that another one gets the largest."""
    ranking, classifier, task, settings, calibration = screened
    stages = []

    def made(bench, candidates, plan, store, **_):
        stages.append(plan)
        return tuple(
            tuple(pretended(trial, 0.55 if number == 0 else 0.9) for trial in plan.trials if trial.candidate == number)
            for number in range(len(candidates))
        )

    monkeypatch.setattr(staging, "run_trials", made)
    found = try_finalists(ranking, classifier, task, settings, calibration)
    first, last = stages
    assert {trial.candidate for trial in first.trials} >= {0, 1}
    assert len(last.trials) > len(first.trials)
    largest = max(last.trials, key=lambda trial: trial.rows)
    assert largest.candidate != 0
    assert set(first.trials) <= set(last.trials)
    assert found.rows[0].trials[-1]["rows"] == largest.rows
    first = found.rows[0]
    (before,) = (row for row in ranking.rows if row.quick == first.quick)
    plain, weight = scale("accuracy", before.forecast["accuracy"].value), min(1.0, 2.0 * math.sqrt(largest.rows / N))
    expected = plain + weight * (scale("accuracy", 0.9) - plain)
    assert plain < expected == pytest.approx(scale("accuracy", first.forecast["accuracy"].value))
    (low,) = (row for row in found.rows if row.quick == ranking.rows[0].quick)
    assert low.trials
    assert low.forecast["accuracy"].value == pytest.approx(ranking.rows[0].forecast["accuracy"].value)
    assert sum(trial.passes for trial in last.trials) <= 800


def pretended(trial, accuracy, *, loss=0.2, diverged=False):
    from foretune.forecasting.shown import Shown
    from foretune.trials.run import Tried

    outcomes = {"train_loss": loss, "eval_loss": 0.5, "accuracy": accuracy}
    return Tried(Shown(trial.rows, trial.seed, 10, outcomes, accuracy, 1, diverged), trial.passes, 0.1)


@pytest.mark.parametrize("diverged", [True, False])
def test_what_collapses_stands_last_and_is_not_recommended(screened, monkeypatch, diverged):
    ranking, classifier, task, settings, calibration = screened

    def made(bench, candidates, plan, store, **_):
        bad = {"loss": math.nan if diverged else 0.8, "diverged": diverged}
        return tuple(
            tuple(
                pretended(trial, 0.3, **bad) if number == 0 else pretended(trial, 0.9)
                for trial in plan.trials
                if trial.candidate == number
            )
            for number in range(len(candidates))
        )

    monkeypatch.setattr(staging, "run_trials", made)
    found = try_finalists(ranking, classifier, task, settings, calibration)
    *others, last = found.rows
    assert last.quick == ranking.rows[0].quick
    assert last.collapsed == last.trials[-1]["rows"]
    assert all(row.collapsed is None for row in others)
    assert not last.tie
    assert not last.recommended
    assert any(note.startswith(f"Collapsed in a trial: {last.quick.name}") for note in found.notes)
    table = ranking_table([found])
    assert "collapsed" in table.rows[-1][table.header.index("trials")]
    config = RankRun((ft.ModelConfig("m"),), (ft.DataConfig("d"),), settings)
    content = json.loads(to_json(finite(ranking_content([found], config, calibration))))["rankings"][0]
    assert content["rows"][-1]["collapsed"] == last.collapsed
    if diverged:
        assert last.forecast is None
        assert any("diverged" in note for note in found.notes)


def test_a_killed_ranking_goes_on(screened, monkeypatch):
    ranking, classifier, task, settings, calibration = screened
    from foretune.trials import carry

    real, calls = carry.run_trial, []

    def dies(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(carry, "run_trial", dies)
    with pytest.raises(KeyboardInterrupt, match=r"1 of .* trials are kept"):
        try_finalists(ranking, classifier, task, settings, calibration)
    assert len(kept()) == 1
    found = try_finalists(ranking, classifier, task, settings, calibration)
    assert len(calls) == 1 + len(kept())  # the one that was kept is not made again
    assert found.spent.passes > 0


def test_recipes_are_tried_together(place, screened):
    """One budget, of the dearest recipe, for all adapters and recipes; what it does not buy is not tried."""
    _, classifier, task, settings, calibration = screened
    several = replace(settings, epochs=(1, 4), finalists=2, spend="60%")
    ranking = ft.rank(classifier.model, classifier.tokenizer, task, settings=several, calibration=calibration)
    assert len(ranking.rows) == 4
    assert 0 < ranking.spent.share <= 0.6
    assert "by the dearest recipe, 4 epochs" in ranking.spent.note
    assert any(row.trials for row in ranking.rows)


@pytest.mark.parametrize(("kind", "n_outputs"), [("regression", 1), ("multi-label", 3)])
def test_other_kinds_of_task_are_tried_as_well(kind, n_outputs, screened):
    """No level is forecast, as without trials; what they showed stands there."""
    calibration = screened[4]
    model, task = cases.tiny("bert", n_outputs, dtype=torch.float32), cases.task_of(kind, n_outputs, 80)
    settings = ft.RankSettings(**{**OPTIONS, "finalists": 2}, spend="100%")
    assert calibration.domain.kind == "classification"
    ranking = ft.rank(model, cases.tokenizer(), task, settings=settings, calibration=calibration)
    assert any(row.trials for row in ranking.rows)
    assert all(row.forecast is None for row in ranking.rows)
    assert any("has seen no trials of such runs" in note for note in ranking.notes)


def test_a_rare_class_is_in_every_trial(place, tmp_path):
    data = cases.write_reviews(tmp_path / "rare", 120, 20)
    with (tmp_path / "rare" / "train.csv").open("a", encoding="utf-8") as file:
        file.write("it was quite odd,mixed\nit was very odd,mixed\n")
    argv = tokens(place, "--spend", "100%", "--output", str(tmp_path / "out"))
    for flag, value in (("--dataset", data), ("--samples", "64"), ("--finalists", "2")):
        argv[argv.index(flag) + 1] = value
    assert run(argv) == 0
    assert any(row["trials"] for row in content_of(tmp_path / "out")["rankings"][0]["rows"])


@pytest.mark.parametrize(
    ("spend", "words"),
    [("1%", "spend = 1% buys no trial: the smallest, 32 rows"), ("150%", "more than one full run")],
)
def test_a_spend_that_buys_nothing_is_refused_before_the_work(place, screened, spend, words, monkeypatch, capsys):
    monkeypatch.setattr("foretune.ranking.rank.linearise", lambda *_, **__: pytest.fail("too late"))
    assert run(tokens(place, "--spend", spend)) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    _, classifier, task, settings, _ = screened
    with pytest.raises(ConfigError, match=r"^spend = "):
        check_spend(classifier, task, replace(settings, spend=spend))


def test_the_head_alone_is_compared_on_no_more_rows_than_the_trial_has():
    head = ((32, 0.7), (64, 0.8), (128, 0.9))
    assert [largest_within(head, rows) for rows in (31, 32, 63, 64, 127, 128, 999)] == [
        None, 0.7, 0.7, 0.8, 0.8, 0.9, 0.9,
    ]  # fmt: skip
    assert largest_within((), 64) is None
