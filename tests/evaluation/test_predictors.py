"""Predictors: each is one entry, and everything else follows from it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import foretune
from foretune.evaluation.predictors import (
    PREDICTORS,
    QUANTITIES,
    Cost,
    calibrated,
    outcomes_of,
    predictor_named,
    predictors_of,
    quantities_of,
)
from foretune.evaluation.records import SECONDS
from foretune.forecasting import outcomes as forecast
from foretune.forecasting.simulated_runs import Ending, SimulatedRun, case_values
from foretune.tasks.metrics import METRICS

import cases


def test_names_and_labels_are_each_there_once():
    for words in ([entry.name for entry in PREDICTORS], [entry.label for entry in PREDICTORS], QUANTITIES):
        assert len(set(words)) == len(words)
    assert [predictor_named(entry.name) for entry in PREDICTORS] == list(PREDICTORS)


@pytest.mark.parametrize("kind", METRICS)
def test_every_outcome_of_a_calibration_has_its_forecast(kind):
    forecasts = [entry.forecast_of for entry in predictors_of(kind) if entry.forecast_of is not None]
    assert sorted(forecasts) == sorted(forecast.outcomes_of(kind))
    assert set(forecasts) < {outcome.name for outcome in outcomes_of(kind)}


@pytest.mark.parametrize("kind", METRICS)
def test_every_number_that_a_calibration_needs_is_kept(kind):
    course = SimpleNamespace(movement=0.1)
    outlook = SimulatedRun(course, Ending(0.5, 0.6, 0.7), 0.65, 0.6, samples=8, train_rows=16, metric=METRICS[kind][0])
    assert set(case_values(outlook)) == set(calibrated(kind)) <= set(quantities_of(kind)) < set(QUANTITIES)


def test_what_needs_classes_is_of_classification_alone():
    for kind in ("regression", "multi-label"):
        names = {entry.name for entry in predictors_of(kind)}
        assert not names & {"log_me", "h_score", "nleep", "trans_rate", "gbc", "parc", "sign_accuracy"}
        assert not [name for name in names if name.endswith("_accuracy")]
        metric = METRICS[kind][0].name
        assert {
            f"kernel_regression_eval_{metric}",
            f"simulated_{metric}",
            f"head_eval_{metric}",
            f"loo_{metric}",
        } < names


def test_clocks_are_seconds_that_cells_store():
    for entry in PREDICTORS:
        assert {name for name, _ in entry.cost.clock} <= set(SECONDS), entry.name
        assert not entry.cost.clock or entry.cost.of_run is None, entry.name
        assert entry.from_log is None or entry.cost.of_run, entry.name
        for _, share in entry.cost.clock:
            assert 0.0 < share(2.0) <= 1.0
            assert 0.0 < share(6.0) <= share(2.0)


def test_a_cost_is_the_sum_of_its_shares():
    cost = Cost((("survey", lambda classes: 1.0 / classes), ("baselines", lambda _: 1.0)))
    assert cost.seconds({"survey": 12.0, "baselines": 3.0, "simulate": 99.0}, 4.0) == 6.0
    assert cost.seconds({"survey": 12.0, "baselines": None}, 4.0) is None
    assert cost.seconds({"survey": 12.0}, 4.0) is None
    assert Cost().seconds({"survey": 12.0}, 4.0) is None


METRIC = '''

def feature_spread(features: Array, labels: Labels, n_classes: int) -> float:
    """Standard deviation of all features."""
    return float(features.std())
'''
ENTRY = '    Predictor("feature_spread", "spread", +1, FEATURES, compute=of_features(feature_spread)),\n'
STUDY = """
import csv, json, sys
from dataclasses import replace
from pathlib import Path
import foretune
from foretune.cli import run
from foretune.evaluation.correlations import summarise
from foretune.evaluation.quality import rivals_table
from foretune.evaluation.records import read_records

grid, store = sys.argv[1:]
assert Path(foretune.__file__).is_relative_to(Path(grid).parent), foretune.__file__
assert run(["study", "outlook", grid, "--output", store, "--samples", "20", "--eval-samples", "10"]) == 0
assert run(["study", grid, "--output", store]) == 0
assert run(["study", "report", store, "--resamples", "100"]) == 0
files = [json.loads(path.read_text(encoding="utf-8")) for path in Path(store, "outlooks").glob("*.json")]
assert len(files) == 4
values = {file["key"]: file["quantities"]["feature_spread"] for file in files}
assert len(set(values.values())) == 2  # one for each data set
records = read_records(Path(store))
assert {record.key: record.quantities["feature_spread"] for record in records} == values
with Path(store, "report", "cells.csv").open(encoding="utf-8") as file:
    assert {row["key"]: float(row["feature_spread"]) for row in csv.DictReader(file)} == values
again = read_records(Path(store, "report"))
assert {record.key: record.quantities["feature_spread"] for record in again} == values
with Path(store, "report", "spearman-all.csv").open(encoding="utf-8") as file:
    assert "spread" in [row[0] for row in csv.reader(file)]
with Path(store, "report", "regret.csv").open(encoding="utf-8") as file:
    assert "largest spread" in [row[0] for row in csv.reader(file)]
spread_out = [replace(r, outcomes={**r.outcomes, "accuracy": 0.5 + 0.1 * i}) for i, r in enumerate(records)]
(row,) = (row for row in rivals_table(summarise(spread_out, resamples=100)).rows if row[0] == "spread")
assert row[-1].startswith("≤ ")
"""


def insert(path, after, text):
    content = path.read_text(encoding="utf-8")
    assert after in content
    path.write_text(content.replace(after, after + text, 1), encoding="utf-8")


def test_a_new_metric_is_one_function_and_one_entry(tmp_path):
    """A newcomer's first change, made to a copy of the source, is seen in files, records, tables and CSV."""
    source = tmp_path / "src" / "foretune"
    shutil.copytree(Path(foretune.__file__).parent, source, ignore=shutil.ignore_patterns("__pycache__"))
    room = source / "evaluation"
    with (room / "transferability.py").open("a", encoding="utf-8") as file:
        file.write(METRIC)
    insert(room / "predictors.py", "from foretune.evaluation.transferability import ", "feature_spread, ")
    insert(room / "predictors.py", "BASELINES = (\n", ENTRY)
    dataset = cases.write_reviews(tmp_path / "reviews")
    grid = {
        "models": [cases.save(tmp_path / "model")],
        "datasets": [{"dataset": dataset, "name": "few", "max_train": 30}, dataset],
        "placements": [{"target_modules": ["query"]}, {"target_modules": ["value"]}],
        "ranks": [2],
        "score": {"samples": 8, "eval_samples": 8, "draws": 1},
        "train": {"epochs": 1, "learning_rate": 2e-2, "train_batch_size": 8, "train_eval_samples": 0},
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid), encoding="utf-8")
    command = [sys.executable, "-c", STUDY, str(path), str(tmp_path / "study")]
    environment = {**os.environ, "PYTHONPATH": str(source.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
