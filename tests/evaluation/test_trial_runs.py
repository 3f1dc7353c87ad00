"""Which runs of a study are the trials of which others."""

import dataclasses
import math

import pytest

from foretune.evaluation.collapses import collapsed_keys
from foretune.evaluation.held_out import calibration_cases, cell_cases, forecast_held_out
from foretune.evaluation.predictors import QUANTITIES
from foretune.evaluation.rates import rate_choices
from foretune.evaluation.records import SECONDS, Record
from foretune.evaluation.strata import by_distance
from foretune.evaluation.trial_runs import trials_of
from foretune.forecasting.reach import Run, run_values
from foretune.study.stored import FACTS, MEASURED

import domains


def record(rows, *, family="reviews", accuracy=0.8, r=8, seed=0, placement="query", loss=0.4, **facts):
    known = dict.fromkeys(FACTS, 2.0) | {"eval_rows": 100.0, "epochs": 5.0, "learning_rate": 1e-3, "diverged": 0.0}
    simulated = domains.best_at_end(
        {"simulated_accuracy": accuracy - 0.05, "simulated_eval_loss": loss, "simulated_train_loss": loss / 2}
    )
    run = Run("00000000000aa", False, 2, min(rows, 400), rows, 100, 50, 5, rows // 8, 32, 1e-3, 8e-3)
    values = {"probe_accuracy": 0.6, "probe_loss": 0.65, "movement": 1.0}
    values |= {"doublings": max(0.0, math.log2(rows / 400)), **run_values(run)}
    return Record(
        f"{family}-{rows}-{placement}-{r}-{seed}", "m", f"{family}-{rows}", placement, r, seed,
        dict.fromkeys(QUANTITIES) | simulated | values,
        dict.fromkeys(MEASURED, 0.5) | {"accuracy": accuracy, "eval_loss": loss, "train_loss": loss / 2},
        known | {"train_rows": float(rows)} | facts, dict.fromkeys(SECONDS, 1.0), (), family,
    )  # fmt: skip


def sizes(found, cell):
    return sorted([one.rows for one in shown] for shown in found[cell.key])


def test_each_smaller_run_is_a_trial_with_the_largest_of_a_quarter():
    small, half, whole = record(100, accuracy=0.6), record(250, accuracy=0.7), record(1000)
    found = trials_of([whole, half, small])
    assert sizes(found, whole) == [[100], [250]]
    assert sizes(found, half) == [[100]]
    assert sizes(found, small) == []
    assert sizes(trials_of([whole, half, record(60)]), whole) == [[60], [250, 60]]
    assert sizes(trials_of([whole, half, record(60), record(50)]), whole) == [[50], [60], [250, 60]]
    (shown,) = found[half.key][0]
    assert (shown.rows, shown.seed, shown.eval_rows, shown.best_epoch, shown.diverged) == (100, 0, 100, 5, False)
    assert shown.outcomes == {"train_loss": 0.2, "eval_loss": 0.4, "accuracy": 0.6}


@pytest.mark.parametrize(
    "other",
    [
        {"family": "others"},
        {"placement": "value"},
        {"r": 4},
        {"seed": 1},
        {"eval_rows": 50.0},
        {"epochs": 3.0},
        {"learning_rate": 2e-3},
        {"train_batch_size": 8},
        {"scheduler": 2},
        {"warmup_ratio": 0.1},
        {"max_length": 64},
    ],
    ids=str,
)
def test_what_differs_in_anything_else_is_no_trial(other):
    whole = record(1000)
    assert sizes(trials_of([whole, record(250)]), whole) == [[250]]
    assert sizes(trials_of([whole, record(250, **other)]), whole) == []


@pytest.mark.parametrize("name", ["epochs", "learning_rate"])
def test_runs_of_an_unknown_recipe_are_paired_with_none(name):
    assert trials_of([record(1000, **{name: None}), record(250, **{name: None})]) == {}


def test_a_diverged_trial_is_kept_as_one_and_one_without_an_end_is_none():
    whole, small = record(1000), record(250, diverged=1.0)
    lost = dataclasses.replace(small, outcomes={**small.outcomes, "eval_loss": None})
    ((shown,),) = trials_of([whole, lost])[whole.key]
    assert shown.diverged
    assert math.isnan(shown.outcomes["eval_loss"])
    ended = dataclasses.replace(lost, facts={**lost.facts, "diverged": 0.0})
    assert trials_of([whole, ended])[whole.key] == ()


def study(families="abcde"):
    """Runs on 100, 400 and 1600 rows, better with more, a little by the data set and the placement."""
    return [
        record(rows, family=family, placement=f"p{place}", accuracy=accuracy + 0.01 * place + 0.007 * number,
               loss=0.4 - 0.03 * step + 0.01 * place)
        for number, family in enumerate(families)
        for place in range(4)
        for step, (rows, accuracy) in enumerate([(100, 0.7), (400, 0.75), (1600, 0.79 + 0.003 * (number % 3))])
    ]  # fmt: skip


def test_every_set_of_trials_is_judged_and_each_simulation_of_a_cell_without_them():
    records = study()
    other = {**records[2].quantities, "doublings": 4.0, "run_known_rows": 100.0, "best_accuracy": 0.7}
    records[2] = dataclasses.replace(records[2], variants=(other,))
    held_out = forecast_held_out(records)
    assert [entry.primary for entry in cell_cases(records)][2:4] == [True, False]
    of_cell = [one for one in held_out.judged if one.record.key == records[2].key]
    assert [[shown.rows for shown in one.trials] for one in of_cell] == [[], [100], [400, 100], []]
    assert [one.spend for one in of_cell] == pytest.approx([0, 1 / 16, 500 / 1600, 0])
    assert [one.rows_ratio for one in of_cell] == pytest.approx([4, 16, 4, 16])
    assert of_cell[0].levels == held_out.forecasts[records[2].key]
    assert len(held_out.judged) == 20 * (1 + 2 + 3) + 1
    assert all(set(one.levels) == {"train_loss", "eval_loss", "accuracy"} for one in held_out.judged)


def test_no_forecast_is_made_with_runs_of_its_own_data_set_but_its_trials():
    """Whatever the largest runs of a data set gave, none of its forecasts changes; those of others do."""
    records = study()
    spoilt = [
        dataclasses.replace(cell, outcomes=cell.outcomes | {"accuracy": 0.97, "eval_loss": 3.0, "train_loss": 2.0})
        if cell.family == "c" and cell.facts["train_rows"] == 1600.0 else cell
        for cell in records
    ]  # fmt: skip
    pairs = list(zip(forecast_held_out(records).judged, forecast_held_out(spoilt).judged, strict=True))
    for before, after in pairs:
        assert (before.record.key, before.trials) == (after.record.key, after.trials)
        if before.record.family == "c":
            assert before.levels == after.levels
    assert all(before.levels != after.levels for before, after in pairs if before.record.family != "c")
    assert any(before.trials for before, _ in pairs if before.record.family == "c")


def rated(families="abcde"):
    """Every fast run ends at half, where the slow ones learn."""
    return [
        dataclasses.replace(
            cell,
            key=f"{cell.key}-{rate}",
            dataset=f"{cell.dataset}-{rate}",
            outcomes=cell.outcomes | ({"accuracy": 0.5, "eval_loss": 0.7} if rate > 0.1 else {}),
            quantities=cell.quantities | {"run_update_rate": rate, "head_alone_accuracy": 0.6},
            facts=cell.facts | {"learning_rate": rate / 8, "update_rate": rate, "majority_accuracy": 0.5, "steps": 99},
        )
        for cell in study(families)
        for rate in (0.01, 0.03, 0.1, 1.0)
    ]  # fmt: skip


def test_no_level_is_learnt_from_a_run_that_collapsed_for_its_rate_and_none_is_given_to_one_like_it():
    records = rated()
    fast = {cell.key for cell in records if cell.quantities["run_update_rate"] == 1.0}
    assert collapsed_keys(records) == fast
    assert len(calibration_cases(records)) == len(records) - len(fast)
    held_out = forecast_held_out(records)
    assert {one.record.key for one in held_out.judged if one.withheld} == fast
    assert held_out.forecasts.keys() == {cell.key for cell in records} - fast
    without = forecast_held_out([cell for cell in records if cell.key not in fast])
    assert held_out.forecasts == without.forecasts
    assert all(not one.withheld for judged in by_distance(held_out).values() for one in judged)
    every = by_distance(held_out, withheld=True)
    assert {one.record.key for judged in every.values() for one in judged if one.withheld} == fast
    assert rate_choices(held_out)[0].near[0] == 1.0


def test_a_run_that_learns_nothing_at_every_rate_is_learnt_from():
    """The rate is not to blame: nothing else would be known of such data."""
    records = [
        dataclasses.replace(cell, outcomes=cell.outcomes | {"accuracy": 0.5}) if cell.family == "a" else cell
        for cell in rated()
    ]
    assert not any(key.startswith("a-") for key in collapsed_keys(records))
    assert any(key.startswith("b-") for key in collapsed_keys(records))
    lost = dataclasses.replace(records[0], facts=records[0].facts | {"diverged": 1.0})
    assert lost.key in collapsed_keys([lost, *records[1:]])
