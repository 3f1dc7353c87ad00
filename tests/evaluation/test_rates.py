"""Choosing a learning rate by the forecast, numbers by hand."""

import math

import pytest

from foretune.evaluation.held_out import HeldOutForecasts, Judged
from foretune.evaluation.rates import rate_choices, rates_table
from foretune.evaluation.records import Record
from foretune.forecasting.calibration import Interval
from foretune.forecasting.calibration_fit import Case
from foretune.study.stored import RECIPE

RATES = (0.001, 0.002, 0.005, 0.02)


def judged(family, rate, accuracy, forecast, *, loss=0.5, epochs=3.0, diverged=False):
    outcomes = {"accuracy": accuracy, "eval_loss": loss, "train_loss": 0.4}
    facts = dict.fromkeys(RECIPE, 1.0) | {"learning_rate": rate, "epochs": epochs, "train_rows": 512, "eval_rows": 400}
    facts |= {"majority_accuracy": 0.5, "diverged": diverged, "update_rate": 8 * rate, "steps": 100}
    record = Record(
        f"{family}-{rate}-{epochs}", "m", f"{family}-{rate}", "query", 8, 0,
        {"adapter_parameters": 9.0, "head_alone_accuracy": 0.5, "run_update_rate": 8 * rate},
        outcomes, facts, {}, (), family,
    )  # fmt: skip
    levels = {name: Interval(forecast, forecast - 0.05, forecast + 0.05) for name in outcomes}
    return Judged(record, Case({"doublings": 0.0}, outcomes, family), (), levels)


def held_out(*entries):
    return HeldOutForecasts(tuple(entry.record for entry in entries), {}, tuple(entries))


def test_a_choice_of_the_rate_by_hand():
    entries = [
        judged("d", rate, accuracy, forecast)
        for rate, accuracy, forecast in zip(RATES, (0.7, 0.8, 0.75, 0.6), (0.6, 0.7, 0.8, 0.7), strict=True)
    ]
    (choice,) = rate_choices(held_out(*entries))
    assert (choice.name, choice.sets) == ("N/n ≤ 1", 1)
    assert choice.near[0] == 0.0  # 0.005 is chosen, 0.002 is best
    assert choice.lost == pytest.approx(0.05)
    assert choice.at_random == pytest.approx(2 / 4)  # 0.001 and 0.002 itself
    assert choice.lost_at_random == pytest.approx(0.8 - 0.7125)
    assert math.isnan(choice.elsewhere)


def test_half_and_double_the_rate_are_near_and_of_equal_runs_the_smaller_loss_is_best():
    said = (0.6, 0.7, 0.6, 0.6)
    (choice,) = rate_choices(
        held_out(*(judged("d", rate, 0.8, f, loss=rate) for rate, f in zip(RATES, said, strict=True)))
    )
    assert choice.near[0] == 1.0  # 0.001 has the least loss, 0.002 is chosen
    assert choice.lost == pytest.approx(0.0)


def test_a_rate_at_which_runs_on_other_data_collapse_is_not_chosen():
    """The forecast is best at 0.02, where every run ended at half: the other data sets say so."""
    entries = [
        judged(family, rate, 0.5 if rate == 0.02 else 0.7 + 10 * rate, min(0.76, 0.7 + 10 * rate))
        for family in "abcd"
        for rate in (0.001, 0.0025, 0.005, 0.02)
    ]
    (choice,) = rate_choices(held_out(*entries))
    assert choice.sets == 4
    assert choice.near[0] == 1.0
    assert choice.elsewhere == 1.0
    three = [one for one in entries if one.record.family != "d"]  # too few others for a risk
    assert rate_choices(held_out(*three))[0].near[0] == 0.0


def test_runs_that_differ_in_more_than_the_rate_are_not_compared():
    entries = [judged("d", rate, 0.7, 0.7, epochs=float(index)) for index, rate in enumerate(RATES)]
    assert rate_choices(held_out(*entries)) == ()
    assert rates_table(held_out(*entries)).rows == ()


def test_the_table_has_a_row_for_each_distance():
    entries = [judged("d", rate, 0.7 + rate, 0.7 + rate) for rate in RATES]
    (row,) = rates_table(held_out(*entries)).rows
    assert row == ("N/n ≤ 1", "1", "100% [21%, 100%]", "–", "25%", "0.0", "–", "1.3")
