"""A ranking of a language model's adapters with trials: which are tried, their order, and what is left as it is."""

import dataclasses
import json

import pytest
import torch

import foretune as ft
from foretune.errors import ConfigError
from foretune.forecasting.shown import Shown
from foretune.ranking.report import RankRun
from foretune.ranking.sequence_report import sequence_adapter, sequence_content
from foretune.ranking.sequence_table import sequence_numbers, sequence_table
from foretune.ranking.sequences import prepare_ranking, rank_sequences
from foretune.settings.commands import ForecastSettings, RankSettings
from foretune.settings.groups import DataConfig, ModelConfig
from foretune.trials import stages as staging
from foretune.trials.run import Tried
from foretune.trials.sequence_ranking import check_sequence_spend, try_sequences
from foretune.trials.stages import Telling

import sequences as made

SETTINGS = RankSettings(samples=12, eval_samples=6, max_length=16, batch_size=3, ranks=(2, 4), finalists=5, epochs=2,
                        learning_rate=5e-3, train_batch_size=8, spend="100%")  # fmt: skip
N = 280


@pytest.fixture(scope="module")
def ready():
    task = ft.language_task_from_datasets(made.texts(N), made.texts(8, offset=1))
    return prepare_ranking(made.reader(), task, SETTINGS)


@pytest.fixture(scope="module")
def ranking(ready):
    return rank_sequences(ready, SETTINGS)


def pretending(losses, plans):
    """Trials that are not made: of each candidate the loss that it is told to show, None for one that diverges."""

    def run_trials(bench, candidates, plan, store, **_):
        plans.append(plan)

        def of(trial):
            loss = losses.get(trial.candidate, 5.0)
            outcomes = {"train_loss": 1.0, "eval_loss": float("nan") if loss is None else loss, "perplexity": 2.0}
            shown = Shown(trial.rows, trial.seed, 6, {**outcomes, "token_accuracy": 0.5}, 2.0, 1, loss is None)
            return Tried(shown, trial.passes, 0.1)

        return tuple(
            tuple(of(trial) for trial in plan.trials if trial.candidate == number) for number in range(len(candidates))
        )

    return run_trials


def test_trials_are_made_and_leave_the_model_as_it_is(ready, ranking):
    before = {name: tensor.clone() for name, tensor in ready.plan.language.model.state_dict().items()}
    tables, progress = [], []
    telling = Telling(on_plan=tables.append, on_progress=lambda *numbers: progress.append(numbers))
    found = try_sequences(ranking, ready, SETTINGS, telling=telling)
    after = ready.plan.language.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    tried = [row for row in found.rows if row.trials]
    assert len(tried) == 2
    assert found.rows[:2] == tuple(tried)
    assert found.compared == 32
    losses = [row.ended_at(32) for row in tried]
    assert losses == sorted(losses)
    assert max(trial["rows"] for trial in found.rows[0].trials) > 32
    assert 0.7 < found.spent.share <= 1.0
    assert found.seconds["trials"] > 0
    assert "to make" in {row[-1] for row in tables[0].rows}
    assert progress[-1][0] == pytest.approx(progress[-1][1])
    assert "The first 2 rows are ordered by their trials on 32 rows" in found.notes[0]
    assert not any("The order is that of the simulated runs" in note for note in found.notes)
    again = try_sequences(ranking, ready, SETTINGS, telling=Telling(on_plan=tables.append))
    assert {row[-1] for row in tables[-1].rows} == {"kept"}
    assert again.rows == found.rows


def test_the_table_and_the_files_show_them(ready, ranking, monkeypatch):
    monkeypatch.setattr(staging, "run_trials", pretending({0: 3.25, 1: None}, []))
    found = try_sequences(ranking, ready, SETTINGS)
    table, numbers = sequence_table(found), sequence_numbers(found)
    column = table.header.index("trial")
    assert table.rows[0][column].startswith("32: 3.250")
    assert table.rows[-1][column] == "32: diverged"
    assert numbers.header[-3:] == ("trial_rows", "trial_eval_loss", "diverged")
    assert numbers.rows[-1][-3:] == ("32", "nan", "yes")
    run = RankRun((ModelConfig("m"),), (DataConfig("d"),), SETTINGS)
    (held,) = json.loads(json.dumps(sequence_content(found, run)))["rankings"]
    assert held["spend"] == found.spent.share
    assert held["rows"][-1]["trials"][0]["outcomes"]["eval_loss"] is None
    assert held["rows"][0]["trials"][0]["outcomes"]["eval_loss"] == 3.25
    without = sequence_table(ranking)
    assert "trial" not in without.header


def test_the_largest_trial_is_for_the_row_that_is_the_best_then(ready, ranking, monkeypatch):
    plans = []
    monkeypatch.setattr(staging, "run_trials", pretending({0: 4.0, 1: 3.0}, plans))
    found = try_sequences(ranking, ready, SETTINGS)
    first, last = plans
    assert {trial.candidate for trial in first.trials} >= {0, 1}
    assert max(last.trials, key=lambda trial: trial.rows).candidate == 1
    assert found.rows[0].quick == ranking.rows[1].quick
    assert found.rows[1].quick == ranking.rows[0].quick
    assert [row.quick for row in found.rows[2:]] == [row.quick for row in ranking.rows[2:]]


def test_a_spend_for_one_trial_compares_nothing_and_says_so(ready, ranking, monkeypatch):
    monkeypatch.setattr(staging, "run_trials", pretending({}, []))
    found = try_sequences(ranking, ready, dataclasses.replace(SETTINGS, spend="50%"))
    assert [len(row.trials) for row in found.rows] == [1, 0, 0, 0, 0]
    assert found.compared is None
    assert [row.quick for row in found.rows] == [row.quick for row in ranking.rows]
    assert "The order is that of the simulated runs" in found.notes[0]
    assert found.notes[1].startswith("No two rows were tried on as many training rows")


def test_a_spend_that_buys_nothing_is_refused_and_none_changes_nothing(ready, ranking):
    with pytest.raises(ConfigError, match=r"spend = 1% buys no trial: the smallest, 32 rows"):
        check_sequence_spend(ready, dataclasses.replace(SETTINGS, spend="1%"))
    nothing = dataclasses.replace(SETTINGS, spend="0")
    check_sequence_spend(ready, nothing)
    assert try_sequences(ranking, ready, nothing) is ranking


def test_from_python_a_language_model_is_ranked_and_forecast_with_its_trials(ranking):
    task = ft.language_task_from_datasets(made.texts(N), made.texts(8, offset=1))
    language = made.reader()
    before = {name: value.clone() for name, value in language.model.state_dict().items()}
    told = []
    settings = dataclasses.replace(SETTINGS, spend="0")
    own = language.model, language.tokenizer
    found = ft.rank(*own, task, settings=settings, on_progress=lambda *said: told.append(said))
    assert [row.quick.name for row in found.rows] == [row.quick.name for row in ranking.rows]
    assert [row.loss for row in found.rows] == pytest.approx([row.loss for row in ranking.rows], abs=1e-5)
    what, done, total = told[-1]
    assert (what, done) == ("sequences through the model", total)
    known = ForecastSettings(samples=12, eval_samples=6, max_length=16, batch_size=3, epochs=1, train_batch_size=8,
                             learning_rate=5e-3, spend="15%")  # fmt: skip
    config = sequence_adapter(found, found.rows[0].quick)
    result = ft.forecast(*own, config, task, settings=known)
    assert [trial["rows"] for trial in result.trials] == [40]
    assert result.to_dict()["spend"] == pytest.approx(42 / 280)
    assert all(torch.equal(value, before[name]) for name, value in language.model.state_dict().items())
    for call in (lambda c: ft.forecast(*own, config, task, calibration=c),
                 lambda c: ft.rank(*own, task, calibration=c)):  # fmt: skip
        with pytest.raises(ConfigError, match="language models take the one that comes with foretune"):
            call(object())
