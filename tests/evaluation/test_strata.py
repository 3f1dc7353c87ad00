"""Forecasts by distance and spend, and warnings: numbers by hand."""

import dataclasses
import math
from types import SimpleNamespace

import pytest

from foretune.evaluation.collapses import baseline_of, collapsed_keys, rate_cases
from foretune.evaluation.distance_figure import distance_figure
from foretune.evaluation.held_out import HeldOutForecasts, Judged
from foretune.evaluation.records import Record
from foretune.evaluation.strata import by_distance, strata, strata_table
from foretune.evaluation.troubles import trouble_qualities, trouble_table
from foretune.forecasting.calibration import Interval
from foretune.forecasting.calibration_fit import Case
from foretune.forecasting.shown import Shown

SIZES = {"small": 100.0, "a": 1000.0, "b": 1050.0, "c": 1149.0, "large": 5000.0}


def record(family, placement, accuracy, *, rows=1000, diverged=False, rate=0.01, steps=100):
    return Record(
        f"{family}-{placement}-{rows}-{rate}", "m", f"{family}-{rows}", placement, 8, 0,
        {"adapter_parameters": SIZES[placement], "head_alone_accuracy": 0.6, "run_update_rate": rate},
        {"accuracy": accuracy, "eval_loss": 0.5, "train_loss": 0.4},
        {"train_rows": rows, "eval_rows": 400, "classes": 2, "majority_accuracy": 0.55, "diverged": diverged,
         "steps": steps},
        {}, (), family=family,
    )  # fmt: skip


def judged(family, placement, accuracy, forecast, *, half=0.05, trials=(), doublings=2.0, rows=1000):
    of = record(family, placement, accuracy, rows=rows)
    levels = {
        "accuracy": Interval(forecast, forecast - half, forecast + half),
        "eval_loss": Interval(0.6, 0.55, 0.65),
        "train_loss": Interval(0.4, 0.3, 0.5),
    }
    shown = tuple(
        Shown(n, 0, 400, {"accuracy": 0.7, "eval_loss": 0.6, "train_loss": 0.5}, 0.7, 3, False) for n in trials
    )
    return Judged(of, Case({"doublings": doublings}, dict(of.outcomes), family), shown, levels)


def held_out(*entries):
    return HeldOutForecasts(tuple(entry.record for entry in entries), {}, tuple(entries))


REAL = {"small": 0.70, "a": 0.75, "b": 0.80, "c": 0.85, "large": 0.82}
SAID = {"small": 0.72, "a": 0.78, "b": 0.77, "c": 0.80, "large": 0.90}


def test_a_stratum_by_hand():
    entries = [judged("d", name, REAL[name], SAID[name]) for name in REAL]
    (stratum,) = strata(held_out(*entries))
    errors = [SAID[name] - REAL[name] for name in REAL]
    assert (stratum.name, stratum.forecasts, stratum.groups) == ("N/n ≤ 4", 5, 1)
    assert stratum.error == pytest.approx(sum(map(abs, errors)) / 5)
    assert stratum.bias == pytest.approx(sum(errors) / 5)
    assert stratum.loss_error == pytest.approx(0.2)
    assert stratum.covered[0] == pytest.approx(4 / 5)  # large is 8 points off, c 5, which is the end itself
    assert stratum.covered[1] < 0.8 < stratum.covered[2]
    assert stratum.loss_covered[0] == 0.0
    assert stratum.width == pytest.approx(0.1)
    assert stratum.spearman == pytest.approx(0.8)
    assert math.isnan(stratum.as_shown)


def test_forecasts_are_parted_by_rows_and_by_spend():
    entries = [
        judged("d", "a", 0.7, 0.7, doublings=0.0),
        judged("d", "a", 0.7, 0.7, doublings=math.log2(1000 / 250)),
        judged("d", "a", 0.7, 0.7, doublings=math.log2(1000 / 64)),
        judged("d", "a", 0.7, 0.7, trials=(20,)),
        judged("d", "a", 0.7, 0.7, trials=(40,)),
        judged("d", "b", 0.7, 0.7, trials=(50,)),
        judged("d", "a", 0.7, 0.7, trials=(250, 50)),
        judged("d", "a", 0.7, 0.7, trials=(500,)),
    ]
    found = by_distance(held_out(*entries))
    without = {"N/n ≤ 1": 1, "N/n ≤ 4": 1, "N/n ≤ 16": 1}
    spent = {"spend ≤ 2%": 1, "spend ≤ 5%": 2, "spend ≤ 35%": 1, "spend ≤ 100%": 1}
    assert {name: len(there) for name, there in found.items()} == without | spent
    of_cell = judged("d", "a", 0.7, 0.7, trials=(41,))
    assert by_distance(held_out(*entries, of_cell))["spend ≤ 5%"][0].spend == pytest.approx(0.041)  # the dearest
    (trial,) = [one for one in strata(held_out(*entries)) if one.name == "spend ≤ 2%"]
    assert trial.as_shown == pytest.approx(0.0)


def test_the_table_and_the_figure_have_every_distance():
    entries = [judged(family, name, REAL[name], SAID[name]) for name in REAL for family in "de"]
    entries.append(judged("d", "a", 0.7, 0.7, trials=(40,)))
    table = strata_table(held_out(*entries))
    assert [row[0] for row in table.rows] == ["N/n ≤ 4", "spend ≤ 5%"]
    assert table.rows[0][table.header.index("in interval")].startswith("80% [")
    figure = distance_figure(held_out(*entries))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:2] == ["without training, N/n ≤ 4 (10)", "with trials, spend ≤ 5% (1)"]
    assert strata_table(HeldOutForecasts(tuple(one.record for one in entries), {})).rows == ()


def test_each_model_has_its_own_strata():
    entries = [judged("d", name, REAL[name], SAID[name]) for name in REAL]
    other = judged("d", "a", 0.7, 0.75, trials=(40,))
    other = dataclasses.replace(other, record=dataclasses.replace(other.record, model="n"))
    assert [one.name for one in strata(held_out(*entries, other))] == ["m: N/n ≤ 4", "n: spend ≤ 5%"]
    titles = [axes.get_title() for axes in distance_figure(held_out(*entries, other)).axes[:2]]
    assert titles == ["without training, m: N/n ≤ 4 (5)", "with trials, n: spend ≤ 5% (1)"]


def test_what_collapsed_is_measured_by_what_costs_nothing():
    alike = record("d", "a", 0.7, rate=0.001)
    records = [
        record("d", "a", 0.619), record("d", "a", 0.621, rate=0.02), record("d", "b", 0.5),
        record("d", "c", 0.9, diverged=True), record("e", "a", 0.5), alike,
    ]  # fmt: skip
    assert baseline_of(records[0]) == 0.6
    assert [case.collapsed for case in rate_cases(records)] == [True, False, False, True, False, False]
    assert collapsed_keys(records) == {records[0].key, records[3].key}
    bare = SimpleNamespace(kind="classification", facts={}, quantities={})
    assert baseline_of(bare) is None


def test_a_run_that_learns_nothing_where_a_gentler_one_did_has_collapsed():
    slow, fast = record("d", "a", 0.7, rate=0.001), record("d", "a", 0.6, rate=0.1)
    other, alone = record("d", "a", 0.6, rate=0.0001), record("d", "b", 0.6, rate=0.1)
    cases = rate_cases([slow, fast, other, alone])
    assert [case.collapsed for case in cases] == [False, True, False, False]
    short, long = record("d", "a", 0.7, steps=50), record("d", "a", 0.6, rows=8000, steps=800)
    assert [case.collapsed for case in rate_cases([short, long])] == [False, True]
    assert [case.steps for case in rate_cases([short, long])] == [50.0, 800.0]
    shorter = record("d", "a", 0.6, rows=100, steps=10)  # a longer run learnt something: steps were missing
    assert [case.collapsed for case in rate_cases([short, shorter])] == [False, False]


def test_warnings_that_are_right_have_an_area_of_one():
    entries = []
    for family in "defg":
        entries += [
            judged(family, "a", 0.61, 0.605, half=0.01),
            judged(family, "b", 0.80, 0.80, half=0.01),
            judged(family, "c", 0.50, 0.53, half=0.04),
        ]
    (quality,) = trouble_qualities(held_out(*entries))
    assert (quality.spent, quality.runs, quality.troubled) == (False, 12, 8)
    assert quality.auc == pytest.approx(1.0)
    assert [n for n, _, _ in quality.bins] == [4, 0, 0, 8]
    assert quality.bins[-1][2] == 1.0
    (row,) = trouble_table(held_out(*entries)).rows
    assert row[:4] == ("without training", "12", "8", "1.00")
