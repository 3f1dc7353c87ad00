"""Forecasts of a study: fitted on the other data sets alone, compared with every other quantity."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from foretune.evaluation.correlations import summarise
from foretune.evaluation.early_stop import early_quantities
from foretune.evaluation.held_out import OUTPUTS, cases_of, foresee, level_error, outlook_of, qualities
from foretune.evaluation.predictors import HELD, OUTLOOK, QUANTITIES
from foretune.evaluation.quality import (
    area_table,
    cost_in_words,
    forecast_figure,
    quality_table,
    rivals_table,
    save_forecasts,
)
from foretune.evaluation.records import SECONDS, Record, read_records
from foretune.forecasting.calibration import apply_calibration, calibration_from
from foretune.forecasting.calibration_fit import fit_calibration
from foretune.report.curves import Step
from foretune.study.stored import FACTS, MEASURED


def record(family, number, placement, seed, random, *, gain=0.05):
    """A run that ends some points above its simulation."""
    simulated = 0.6 + 0.04 * placement + 0.02 * random.normal()
    loss = 1.2 - simulated
    values = dict.fromkeys(HELD, 1.0)
    values |= {"simulated_accuracy": simulated, "simulated_eval_loss": loss, "simulated_train_loss": loss / 2}
    values |= {
        "probe_accuracy": 0.6,
        "probe_loss": 0.65,
        "doublings": float(number),
        "condition_number": 5.0 + placement,
    }
    values |= {"simulated_train_area": 0.5, "simulated_eval_area": 0.6, "kappa_tune": 9.0 - placement}
    values |= {"early_20_accuracy": simulated}
    outcomes = dict.fromkeys(MEASURED, 0.5) | {"steps_to_loss": 3.0, "train_area": 0.4, "eval_area": 0.6}
    outcomes |= {"accuracy": simulated + gain + 0.005 * random.normal(), "eval_loss": loss, "train_loss": loss / 2}
    dataset = f"{family}-{number}"
    return Record(
        f"{dataset}-{placement}-{seed}", "m", dataset, f"p{placement}", 8, seed, values, outcomes,
        dict.fromkeys(FACTS, 0) | {"majority_accuracy": 0.5, "eval_rows": 100}, dict.fromkeys(SECONDS, 1.0),
        (Step(1, 0.5, math.nan, None, math.nan),), family,
    )  # fmt: skip


def study(families="abcde", sizes=(0, 2), placements=5, seeds=2):
    random = np.random.default_rng(1)
    return [
        record(family, number, placement, seed, random)
        for family in families
        for number in sizes
        for placement in range(placements)
        for seed in range(seeds)
    ]


@pytest.fixture(scope="module")
def seen():
    return foresee(study())


def test_a_family_is_forecast_by_the_others_alone(seen):
    records = study()
    rest = [case for case, held in zip(cases_of(records), records, strict=True) if held.family != "c"]
    assert {case.group for case in rest} == set("abde")
    calibration = fit_calibration(rest, OUTPUTS, "rest")
    for held in records:
        if held.family == "c":
            assert seen.forecasts[held.key] == apply_calibration(calibration, outlook_of(held), "margin").levels


def test_outcomes_of_a_data_set_do_not_touch_its_own_forecast(seen):
    """Whatever its runs gave, and those of its other version."""
    spoilt = [
        dataclasses.replace(held, outcomes=held.outcomes | {"accuracy": 0.99, "eval_loss": 9.0})
        if held.family == "c" else held
        for held in study()
    ]  # fmt: skip
    again = foresee(spoilt)
    for held in spoilt:
        same = again.forecasts[held.key] == seen.forecasts[held.key]
        assert same == (held.family == "c")


def test_the_forecast_is_among_the_quantities(seen):
    for held in seen.records:
        assert held.quantities["predicted_accuracy"] == seen.forecasts[held.key]["accuracy"].value
        assert held.quantities["predicted_train_loss"] == seen.forecasts[held.key]["train_loss"].value


def test_too_few_data_sets_give_no_forecast():
    few = foresee(study("abc"))
    assert few.forecasts == {}
    assert few.records == tuple(study("abc"))
    without = [dataclasses.replace(held, quantities=held.quantities | {"probe_accuracy": None}) for held in study()]
    assert foresee(without).forecasts == {}


def test_qualities_are_what_they_say(seen):
    quality = next(held for held in qualities(seen) if held.outcome == "accuracy")
    forecast = np.array([seen.forecasts[held.key]["accuracy"].value for held in seen.records])
    real = np.array([held.outcomes["accuracy"] for held in seen.records])
    inside = [
        i.low <= y <= i.high
        for i, y in zip((seen.forecasts[h.key]["accuracy"] for h in seen.records), real, strict=True)
    ]
    assert quality.cells == 100
    assert quality.error == pytest.approx(np.mean(np.abs(forecast - real)))
    assert quality.bias == pytest.approx(np.mean(forecast - real))
    assert quality.covered == pytest.approx(np.mean(inside))
    assert quality.spearman == pytest.approx(spearmanr(forecast, real).statistic)
    simulated = np.array([held.quantities["simulated_accuracy"] for held in seen.records])
    assert quality.simulated_error == pytest.approx(np.mean(np.abs(simulated - real)))
    assert quality.error < quality.simulated_error
    within = []
    for dataset in sorted({held.dataset for held in seen.records}):
        means = []
        for values in (forecast, real):
            rows = [(h.placement, v) for h, v in zip(seen.records, values, strict=True) if h.dataset == dataset]
            means.append([np.mean([v for p, v in rows if p == name]) for name in sorted({p for p, _ in rows})])
        within.append(spearmanr(*means).statistic)
    assert quality.spearman_within == pytest.approx(np.mean(within))
    pairs = real.reshape(-1, 2)
    assert quality.noise == pytest.approx(np.mean(np.abs(pairs - pairs.mean(axis=1, keepdims=True)) * np.sqrt(2)))


def test_the_level_of_a_rival_comes_from_a_line_on_the_other_families(seen):
    records = list(seen.records)
    x = np.array([held.quantities["simulated_accuracy"] for held in records])
    real = np.array([held.outcomes["accuracy"] for held in records])
    y = np.log(real / (1 - real))
    errors = []
    for held, value, wanted in zip(records, x, real, strict=True):
        rest = [i for i, other in enumerate(records) if other.family != held.family]
        slope, level = np.polyfit(x[rest], y[rest], 1)
        forecast = np.clip(level + slope * value, y[rest].min(), y[rest].max())
        errors.append(abs(1 / (1 + np.exp(-forecast)) - wanted))
    assert level_error(records, "simulated_accuracy", logarithmic=False) == pytest.approx(np.mean(errors))
    assert level_error(records, "trace", logarithmic=True) is not None  # the same for all: the mean of the others
    assert level_error(records[:20], "simulated_accuracy", logarithmic=False) is None  # one family


def test_tables_and_files(seen, tmp_path):
    report = summarise(seen.records, resamples=100)
    rows = {row[0]: row for row in rivals_table(report).rows}
    assert "foretune: accuracy" in rows
    assert "κ" in rows
    assert "random placement" in rows
    own = next(quality for quality in qualities(seen) if quality.outcome == "accuracy")
    assert rows["foretune: accuracy"][3] == f"{100 * own.error:.1f}"  # its own error, not that of a line in it
    assert rows["first 20% of the steps: accuracy"][-1] == "20%"
    assert rows["foretune: accuracy"][-1] == "200.0%"  # a second each for pass and simulation, a second to fine-tune
    assert len(quality_table(seen).rows) == 3
    area = area_table(seen.records).rows[-1]
    assert area == ("all", "100", "25%", "0%")
    paths = save_forecasts(seen, report, tmp_path)
    assert all(path.is_file() for path in paths)
    with (tmp_path / "forecasts.csv").open(encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == 100
    assert float(listed[0]["accuracy_low"]) < float(listed[0]["accuracy_forecast"]) < float(listed[0]["accuracy_high"])
    calibration = calibration_from(json.loads((tmp_path / "calibration.json").read_text(encoding="utf-8")))
    assert calibration.groups == tuple("abcde")
    assert calibration.lines["accuracy"].runs == 100
    assert len(forecast_figure(seen).axes) == 2


CLOCK = {"kernel": 2.0, "spectrum": 1.0, "forecast": 1.0, "survey": 12.0, "simulate": 8.0, "baselines": 3.0}


@pytest.mark.parametrize(
    ("quantities", "two", "six"),
    [
        (["foretune: accuracy", "simulated run: eval loss"], "20.0%", "20.0%"),
        (["gradient norm", "PAGE", "quick score"], "≤ 15.0%", "≤ 15.0%"),
        # a third of the pass, or a seventh of one that goes back five times, and the time of all such metrics
        (["LogME", "H-score", "NLEEP", "TransRate", "GBC", "PARC"], "≤ 7.0%", "≤ 4.7%"),
        (["linear probe: accuracy", "linear probe: loss"], "≤ 6.0%", "≤ 2.0%"),
        (["PLoP", "KappaTune"], "≤ 3.0%", "≤ 3.0%"),
        (["κ", "alignment", "forecast accuracy"], "4.0%", "4.0%"),
        (["adapter parameters"], "0", "0"),
        (["first 5% of the steps: train loss"], "5%", "5%"),
        (["simulated with A fixed: accuracy", "kernel of sign descent: accuracy"], "–", "–"),  # timed by nothing
        (["control, permuted labels: accuracy"], "–", "–"),
    ],
)
def test_each_quantity_costs_what_it_needs(quantities, two, six):
    chosen = {held.label: held for held in QUANTITIES}
    for classes, cost in ((2, two), (6, six)):
        records = [
            dataclasses.replace(
                held, seconds={**held.seconds, **CLOCK, "fine_tune": 100.0}, facts={**held.facts, "classes": classes}
            )
            for held in study()
        ]
        for name in quantities:
            assert cost_in_words(records, chosen[name]) == cost, name
        # cells that were not timed do not make it look cheaper
        untimed = [dataclasses.replace(records[0], seconds={**records[0].seconds, **dict.fromkeys(CLOCK)})]
        for name in quantities:
            assert cost_in_words([*records, *untimed], chosen[name]) == cost, name


def test_the_committed_costs_are_those_of_the_committed_cells():
    folder = Path(__file__).parents[2] / "studies" / "minilm-forecast"
    chosen = {held.label: held for held in QUANTITIES}
    records = read_records(folder)
    with (folder / "report" / "rivals.csv").open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    assert len(rows) > 40
    for row in rows:
        if row[0] in chosen:
            assert row[-1] == cost_in_words(records, chosen[row[0]]), row[0]


def test_nothing_is_written_without_forecasts(tmp_path):
    seen = foresee(study("abc"))
    assert save_forecasts(seen, summarise(seen.records, resamples=100), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_every_number_that_a_calibration_needs_is_kept():
    assert set(OUTLOOK) <= set(HELD)


def test_the_first_steps_foretell():
    steps = [Step(i, 0.3 + 2.0 / i, math.nan, None, math.nan) for i in range(1, 101)]
    epochs = [(0, 0.7, 0.5), (10, 0.6, 0.6), (20, 0.55, 0.65), (30, 0.1, 0.9), (100, 0.2, 0.9)]
    found = early_quantities(steps, epochs, 100)
    assert found["early_20_train_loss"] == pytest.approx(0.32, abs=0.01)
    assert found["early_5_train_loss"] == pytest.approx(0.32, abs=0.05)
    assert (found["early_20_eval_loss"], found["early_20_accuracy"]) == (0.55, 0.65)
    late = early_quantities(steps, [(0, 0.7, 0.5), (50, 0.1, 0.9)], 100)
    assert late["early_20_accuracy"] is None
