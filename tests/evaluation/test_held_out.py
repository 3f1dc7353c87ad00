"""Forecasts of a study: fitted on the other data sets alone, compared with every other quantity."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

import drawn
from foretune.evaluation.correlations import summarise
from foretune.evaluation.held_out import (
    OUTPUTS,
    calibration_cases,
    forecast_held_out,
    forecast_qualities,
    level_error,
    simulated_values,
    why_no_forecast,
)
from foretune.evaluation.predictors import PREDICTORS, QUANTITIES, quantities_of
from foretune.evaluation.quality import (
    area_table,
    cost_in_words,
    forecast_figure,
    quality_table,
    rivals_table,
    save_reports,
)
from foretune.evaluation.records import SECONDS, Record, by_kind, read_records
from foretune.evaluation.study_calibration import study_calibration
from foretune.forecasting.calibration import apply_calibration
from foretune.forecasting.calibration_file import calibration_from
from foretune.forecasting.calibration_fit import fit_calibration
from foretune.report.curves import Step
from foretune.study.stored import FACTS, MEASURED, measured
from foretune.tasks.metrics import METRICS

import domains


def record(family, number, placement, seed, random):
    """A run that ends half way between its simulation and the probe."""
    simulated = 0.6 + 0.04 * placement + 0.02 * random.normal()
    loss = 1.2 - simulated
    values = dict.fromkeys(QUANTITIES, 1.0)
    values |= {"simulated_accuracy": simulated, "simulated_eval_loss": loss, "simulated_train_loss": loss / 2}
    values |= {
        "probe_accuracy": 0.6,
        "probe_loss": 0.65,
        "doublings": float(number),
        "condition_number": 5.0 + placement,
    }
    values |= {"simulated_train_area": 0.5, "simulated_eval_area": 0.6, "kappa_tune": 9.0 - placement}
    values |= {"early_20_accuracy": simulated}
    values = domains.best_at_end(values)
    outcomes = dict.fromkeys(MEASURED, 0.5) | {"steps_to_loss": 3.0, "train_area": 0.4, "eval_area": 0.6}
    outcomes |= {"accuracy": (simulated + 0.6) / 2 + 0.005 * random.normal(), "eval_loss": loss, "train_loss": loss / 2}
    dataset = f"{family}-{number}"
    return Record(
        f"{dataset}-{placement}-{seed}", "m", dataset, f"p{placement}", 8, seed, values, outcomes,
        dict.fromkeys(FACTS, 0) | {"majority_accuracy": 0.5, "eval_rows": 100, "steps": 1}, dict.fromkeys(SECONDS, 1.0),
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
def held_out():
    return forecast_held_out(study())


def test_a_family_is_forecast_by_the_others_alone(held_out):
    records = study()
    rest = [case for case, record in zip(calibration_cases(records), records, strict=True) if record.family != "c"]
    assert {case.group for case in rest} == set("abde")
    calibration = fit_calibration(rest, OUTPUTS, "rest")
    for cell in records:
        if cell.family == "c":
            assert (
                held_out.forecasts[cell.key] == apply_calibration(calibration, simulated_values(cell), "margin").levels
            )


def test_outcomes_of_a_data_set_do_not_touch_its_own_forecast(held_out):
    """Whatever its runs gave, and those of its other version."""
    spoilt = [
        dataclasses.replace(cell, outcomes=cell.outcomes | {"accuracy": 0.99, "eval_loss": 9.0})
        if cell.family == "c" else cell
        for cell in study()
    ]  # fmt: skip
    again = forecast_held_out(spoilt)
    for cell in spoilt:
        same = again.forecasts[cell.key] == held_out.forecasts[cell.key]
        assert same == (cell.family == "c")


def test_the_forecast_is_among_the_quantities(held_out):
    for cell in held_out.records:
        assert cell.quantities["predicted_accuracy"] == held_out.forecasts[cell.key]["accuracy"].value
        assert cell.quantities["predicted_train_loss"] == held_out.forecasts[cell.key]["train_loss"].value


def test_too_few_data_sets_give_no_forecast():
    few = forecast_held_out(study("abc"))
    assert few.forecasts == {}
    assert few.records == tuple(study("abc"))
    without = [dataclasses.replace(cell, quantities=cell.quantities | {"probe_accuracy": None}) for cell in study()]
    assert forecast_held_out(without).forecasts == {}


def test_qualities_are_what_they_say(held_out):
    quality = next(cell for cell in forecast_qualities(held_out) if cell.outcome == "accuracy")
    forecast = np.array([held_out.forecasts[cell.key]["accuracy"].value for cell in held_out.records])
    real = np.array([cell.outcomes["accuracy"] for cell in held_out.records])
    inside = [
        i.low <= y <= i.high
        for i, y in zip((held_out.forecasts[h.key]["accuracy"] for h in held_out.records), real, strict=True)
    ]
    assert quality.cells == 100
    assert quality.error == pytest.approx(np.mean(np.abs(forecast - real)))
    assert quality.bias == pytest.approx(np.mean(forecast - real))
    assert quality.covered == pytest.approx(np.mean(inside))
    assert quality.spearman == pytest.approx(spearmanr(forecast, real).statistic)
    simulated = np.array([cell.quantities["simulated_accuracy"] for cell in held_out.records])
    assert quality.simulated_error == pytest.approx(np.mean(np.abs(simulated - real)))
    assert quality.error < quality.simulated_error
    within = []
    for dataset in sorted({cell.dataset for cell in held_out.records}):
        means = []
        for values in (forecast, real):
            rows = [(h.placement, v) for h, v in zip(held_out.records, values, strict=True) if h.dataset == dataset]
            means.append([np.mean([v for p, v in rows if p == name]) for name in sorted({p for p, _ in rows})])
        within.append(spearmanr(*means).statistic)
    assert quality.spearman_within == pytest.approx(np.mean(within))
    pairs = real.reshape(-1, 2)
    assert quality.noise == pytest.approx(np.mean(np.abs(pairs - pairs.mean(axis=1, keepdims=True)) * np.sqrt(2)))


def test_the_level_of_a_rival_comes_from_a_line_on_the_other_families(held_out):
    records = list(held_out.records)
    x = np.array([cell.quantities["simulated_accuracy"] for cell in records])
    real = np.array([cell.outcomes["accuracy"] for cell in records])
    y = np.log(real / (1 - real))
    errors = []
    for cell, value, wanted in zip(records, x, real, strict=True):
        rest = [i for i, other in enumerate(records) if other.family != cell.family]
        slope, level = np.polyfit(x[rest], y[rest], 1)
        forecast = np.clip(level + slope * value, y[rest].min(), y[rest].max())
        errors.append(abs(1 / (1 + np.exp(-forecast)) - wanted))
    assert level_error(records, "simulated_accuracy", logarithmic=False) == pytest.approx(np.mean(errors))
    assert level_error(records, "trace", logarithmic=True) is not None  # the same for all: the mean of the others
    assert level_error(records[:20], "simulated_accuracy", logarithmic=False) is None  # one family


def test_tables_and_files(held_out, tmp_path):
    report = summarise(held_out.records, resamples=100)
    rows = {row[0]: row for row in rivals_table(report).rows}
    assert "foretune: accuracy" in rows
    assert "κ" in rows
    assert "random placement" in rows
    own = next(quality for quality in forecast_qualities(held_out) if quality.outcome == "accuracy")
    assert rows["foretune: accuracy"][3] == f"{100 * own.error:.1f}"  # its own error, not that of a line in it
    assert rows["first 20% of the steps: accuracy"][-1] == "20%"
    assert rows["foretune: accuracy"][-1] == "200.0%"  # a second each for pass and simulation, a second to fine-tune
    assert len(quality_table(held_out).rows) == 3
    area = area_table(held_out.records).rows[-1]
    assert area == ("all", "100", "25%", "0%")
    fitted = study_calibration(held_out.records, "a study", own_only=True)
    assert fitted.words == "100 runs of 5 data sets alone"
    paths = save_reports([(report, held_out)], tmp_path, calibrations={"classification": fitted.calibration})
    assert all(path.is_file() for path in paths)
    with (tmp_path / "forecasts.csv").open(encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == 100
    assert float(listed[0]["accuracy_low"]) < float(listed[0]["accuracy_forecast"]) < float(listed[0]["accuracy_high"])
    calibration = calibration_from(json.loads((tmp_path / "calibration.json").read_text(encoding="utf-8")))
    assert calibration.groups == tuple("abcde")
    assert calibration.lines["accuracy"].runs == 100


def test_the_figure_shows_each_forecast_with_its_interval_against_the_run(held_out):
    figure = forecast_figure(held_out)
    for axes, outcome, unit in zip(figure.axes, ("accuracy", "eval_loss"), (100.0, 1.0), strict=True):
        shown, intervals = drawn.points(axes), drawn.bars(axes)
        datasets = sorted({cell.dataset for cell in held_out.records})
        assert sorted(shown) == datasets
        for dataset, bars in zip(datasets, intervals, strict=True):
            cells = [cell for cell in held_out.records if cell.dataset == dataset]
            levels = [held_out.forecasts[cell.key][outcome] for cell in cells]
            real = [cell.outcomes[outcome] for cell in cells]
            wanted = [(unit * level.value, unit * value) for level, value in zip(levels, real, strict=True)]
            assert shown[dataset] == pytest.approx(np.array(wanted))
            assert bars == pytest.approx(np.array([(unit * level.low, unit * level.high) for level in levels]))


CLOCK = {"kernel": 2.0, "spectrum": 1.0, "kernel_regression": 1.0, "survey": 12.0, "simulate": 8.0, "baselines": 3.0}


@pytest.mark.parametrize(
    ("quantities", "two", "six"),
    [
        (["foretune: accuracy", "simulated run: eval loss"], "20.0%", "20.0%"),
        (["gradient norm", "PAGE", "quick score"], "≤ 15.0%", "≤ 15.0%"),
        # a third of the pass, or a seventh of one that goes back five times, and the time of all such metrics
        (["LogME", "H-score", "NLEEP", "TransRate", "GBC", "PARC"], "≤ 7.0%", "≤ 4.7%"),
        (["linear probe: accuracy", "linear probe: loss"], "≤ 6.0%", "≤ 2.0%"),
        (["PLoP", "KappaTune"], "≤ 3.0%", "≤ 3.0%"),
        (["κ", "alignment", "kernel regression: accuracy"], "4.0%", "4.0%"),
        (["adapter parameters"], "0", "0"),
        (["first 5% of the steps: train loss"], "5%", "5%"),
        (["simulated with A fixed: accuracy", "kernel of sign descent: accuracy"], "–", "–"),  # timed by nothing
        (["control, permuted labels: accuracy"], "–", "–"),
    ],
)
def test_each_quantity_costs_what_it_needs(quantities, two, six):
    chosen = {predictor.label: predictor for predictor in PREDICTORS}
    for classes, cost in ((2, two), (6, six)):
        records = [
            dataclasses.replace(
                cell, seconds={**cell.seconds, **CLOCK, "fine_tune": 100.0}, facts={**cell.facts, "classes": classes}
            )
            for cell in study()
        ]
        for name in quantities:
            assert cost_in_words(records, chosen[name]) == cost, name
        # cells that were not timed do not make it look cheaper
        untimed = [dataclasses.replace(records[0], seconds={**records[0].seconds, **dict.fromkeys(CLOCK)})]
        for name in quantities:
            assert cost_in_words([*records, *untimed], chosen[name]) == cost, name


def test_the_committed_costs_are_those_of_the_committed_cells():
    folder = Path(__file__).parents[2] / "studies" / "minilm-forecast"
    chosen = {predictor.label: predictor for predictor in PREDICTORS}
    records = read_records(folder)
    with (folder / "report" / "rivals.csv").open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    assert len(rows) > 40
    for row in rows:
        if row[0] in chosen:
            assert row[-1] == cost_in_words(records, chosen[row[0]]), row[0]


def test_no_forecast_is_written_where_there_is_none(tmp_path):
    held_out = forecast_held_out(study("abc"))
    paths = save_reports([(summarise(held_out.records, resamples=100), held_out)], tmp_path)
    assert {path.name for path in paths} == {path.name for path in tmp_path.iterdir()}
    assert not {"forecasts.csv", "calibration.json", "rivals.csv", "forecast.png"} & {path.name for path in paths}


def as_kind(record, kind):
    """The same cell as one of another kind of task: the number that was its accuracy is its main metric."""
    metric = METRICS[kind][0].name
    values = {name: record.quantities[name] for name in quantities_of(kind)}
    values |= {f"{name}_{metric}": record.quantities[f"{name}_accuracy"] for name in ("simulated", "best", "probe")}
    outcomes = {name: record.outcomes[name] for name in (*measured(kind), "train_area", "eval_area", "steps_to_loss")}
    return dataclasses.replace(
        record,
        key=f"{kind}-{record.key}",
        dataset=f"{kind}-{record.dataset}",
        family=f"{kind}-{record.family}",
        quantities=dict.fromkeys(QUANTITIES) | values,
        outcomes=dict.fromkeys(MEASURED) | outcomes | {metric: record.outcomes["accuracy"]},
        kind=kind,
    )


@pytest.mark.parametrize("kind", ["regression", "multi-label"])
def test_each_kind_is_calibrated_by_its_own_cells(kind, tmp_path):
    classes = study(sizes=(0,), placements=3, seeds=1)
    records = [*classes, *(as_kind(cell, kind) for cell in classes)]
    parts = by_kind(records)
    assert list(parts) == ["classification", kind]
    pairs = [(summarise(part.records, resamples=100), part) for part in map(forecast_held_out, parts.values())]
    assert pairs[0][1].forecasts == forecast_held_out(classes).forecasts  # whatever cells of another kind are there
    fitted = {name: study_calibration(part, "a study").calibration for name, part in parts.items()}
    save_reports(pairs, tmp_path, calibrations=fitted)
    metric = METRICS[kind][0]
    calibration = calibration_from(json.loads((tmp_path / kind / "calibration.json").read_text(encoding="utf-8")))
    assert calibration.kind == kind
    assert set(calibration.lines) == {"train_loss", "eval_loss", metric.name}
    assert calibration.groups == tuple(f"{kind}-{family}" for family in "abcde")
    again = by_kind(read_records(tmp_path))[kind]  # and from the tables of the report
    assert forecast_held_out(again).forecasts == pairs[1][1].forecasts
    quality = next(entry for entry in forecast_qualities(pairs[1][1]) if entry.outcome == metric.name)
    row = next(row for row in quality_table(pairs[1][1]).rows if row[0] == metric.label)
    assert row[4] == (f"{100 * quality.error:.1f}" if metric.percent else f"{quality.error:.3f}")
    rivals = {row[0]: row for row in rivals_table(pairs[1][0]).rows}
    assert rivals[f"foretune: {metric.label}"][3] == row[4]
    assert not {"LogME", "foretune: accuracy"} & set(rivals)
    assert forecast_figure(pairs[1][1]).axes[0].get_xlabel().startswith(f"forecast {metric.label}")
    alone = save_reports([pairs[1]], tmp_path / "alone", calibrations=fitted)
    assert tmp_path / "alone" / "calibration.json" in alone


def test_too_few_data_sets_of_a_kind_are_said():
    few = forecast_held_out([as_kind(cell, "regression") for cell in study("abc")])
    assert few.forecasts == {}
    assert "3 data sets of regression" in why_no_forecast(few)
    assert "need 4 or more" in why_no_forecast(few)
    assert why_no_forecast(forecast_held_out(study())) is None


def test_a_correlation_that_a_run_does_not_have_is_no_zero():
    """Constant outputs have no rank correlation: such a cell neither counts as a miss nor as an outcome of 0."""
    records = [as_kind(cell, "regression") for cell in study()]
    records[0] = dataclasses.replace(records[0], outcomes={**records[0].outcomes, "spearman": None})
    quality = next(entry for entry in forecast_qualities(forecast_held_out(records)) if entry.outcome == "spearman")
    assert quality.cells == 99
    assert level_error(records, "simulated_spearman", logarithmic=False) == pytest.approx(
        level_error(records[1:], "simulated_spearman", logarithmic=False)
    )
