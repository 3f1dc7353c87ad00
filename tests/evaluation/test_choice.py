"""Choosing an adapter: by the forecast and by cheaper rules, numbers by hand."""

import dataclasses
import math

import pytest

from foretune.evaluation.choice import choice_table, choices
from foretune.evaluation.held_out import HeldOutForecasts, Judged
from foretune.evaluation.records import Record
from foretune.forecasting.calibration import Interval
from foretune.forecasting.calibration_fit import Case
from foretune.forecasting.shown import Shown
from foretune.report.curves import Step

SIZES = {"small": 100.0, "a": 1000.0, "b": 1050.0, "c": 1149.0, "large": 5000.0}
REAL = {"small": 0.70, "a": 0.75, "b": 0.80, "c": 0.85, "large": 0.82}
SAID = {"small": 0.72, "a": 0.78, "b": 0.77, "c": 0.80, "large": 0.90}


def judged(family, placement, accuracy, forecast, *, trials=(), losses=(), model="m", seed=0):
    steps = tuple(Step(at, loss, 0.1, None, 0.0) for at, loss in enumerate(losses, start=1))
    outcomes = {"accuracy": accuracy, "eval_loss": 0.5, "train_loss": 0.4}
    facts = {"train_rows": 1000, "eval_rows": 400, "steps": 100, "diverged": False}
    key = f"{model}-{family}-{placement}-{seed}"
    record = Record(
        key, model, family, placement, 8, seed, {"adapter_parameters": SIZES[placement]}, outcomes, facts, {}, steps
    )
    levels = {name: Interval(forecast, forecast - 0.05, forecast + 0.05) for name in outcomes}
    shown = tuple(Shown(rows, 0, 400, outcomes, accuracy, 3, False) for rows in trials)
    return Judged(record, Case({"doublings": 2.0}, outcomes, family), shown, levels)


def held_out(*entries):
    return HeldOutForecasts(tuple(entry.record for entry in entries), {}, tuple(entries))


def test_a_choice_by_hand():
    (choice,) = choices(held_out(*(judged("d", name, REAL[name], SAID[name]) for name in REAL)))
    assert (choice.name, choice.sets) == ("N/n ≤ 4", 1)
    assert choice.within == pytest.approx(0.8)
    assert choice.by_size == pytest.approx(0.9)  # c and the largest change places
    assert choice.equal == pytest.approx(0.5)  # a, b, c lie within 15%: b and a change places
    assert choice.lost == pytest.approx(0.85 - 0.82)
    assert choice.largest == pytest.approx(0.85 - 0.82)
    assert choice.spread == pytest.approx(0.85 - sum(REAL.values()) / 5)
    assert math.isnan(choice.elsewhere)
    assert math.isnan(choice.early)


def test_equal_forecasts_choose_at_random_among_their_adapters():
    entries = [judged("d", name, REAL[name], 0.9 if name in "ac" else 0.5) for name in REAL]
    (choice,) = choices(held_out(*entries))
    assert choice.lost == pytest.approx((0.10 + 0.0) / 2)


def test_what_did_best_on_other_data_is_chosen_on_the_same_model_and_not_by_itself():
    first = [judged("d", name, REAL[name], SAID[name]) for name in REAL]
    second = [judged("e", name, 0.9 if name == "a" else 0.6, SAID[name]) for name in REAL]
    foreign = [judged("f", name, 0.9 if name == "small" else 0.6, SAID[name], model="n") for name in REAL]
    by_name = {choice.name: choice for choice in choices(held_out(*first, *second, *foreign))}
    # on d: a, the best of e, lies 10 points behind; on e: c, the best of d, 30
    assert by_name["m: N/n ≤ 4"].elsewhere == pytest.approx((0.10 + 0.30) / 2)
    assert math.isnan(by_name["n: N/n ≤ 4"].elsewhere)


def test_the_first_steps_are_as_many_as_the_trials_cost():
    early = {"small": (0.7, 0.6, 0.6, 0.5), "a": (0.7, 0.6, 0.6, 0.4), "c": (0.7, 0.6, 0.6, 0.6)}
    late = {"small": 0.9, "a": 0.8, "c": 0.1}  # beyond what was paid for
    entries = [
        judged("d", name, REAL[name], SAID[name], trials=(40,), losses=(*early[name], late[name])) for name in early
    ]
    (choice,) = choices(held_out(*entries))
    assert choice.name == "spend ≤ 5%"
    assert choice.early == pytest.approx(0.85 - 0.75)
    cheaper = [dataclasses.replace(one, trials=(dataclasses.replace(one.trials[0], rows=9),)) for one in entries]
    assert math.isnan(choices(held_out(*cheaper))[0].early)  # not one step


def test_seeds_and_too_few_adapters_are_not_compared():
    entries = [judged("d", name, REAL[name], SAID[name], seed=index) for index, name in enumerate(REAL)]
    assert choices(held_out(*entries)) == ()
    assert choice_table(held_out(*entries)).rows == ()


def test_the_table_has_a_row_for_each_distance():
    entries = [judged("d", name, REAL[name], SAID[name]) for name in REAL]
    table = choice_table(held_out(*entries))
    (row,) = table.rows
    assert dict(zip(table.header, row, strict=True)) == {
        "distance": "N/n ≤ 4",
        "sets": "1",
        "ρ within a data set": "+0.80",
        "ρ of size": "+0.90",
        "ρ, equal size": "+0.50",
        "lost": "3.0",
        "by the largest": "3.0",
        "by other data": "–",
        "by first steps": "–",
        "at random": "6.6",
    }
