"""A study of every kind of task: each cell has the outcomes of its own kind, in the store and in tables."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from foretune.cli import run
from foretune.errors import ConfigError, StoreError
from foretune.evaluation.correlations import capitalised, long_table, regret_table, summarise
from foretune.evaluation.predictors import outcomes_of, predictors_of
from foretune.evaluation.records import CELLS_CSV, by_kind, read_records, record_writers
from foretune.forecasting.calibration_file import read_calibration, shipped_calibration
from foretune.report.store import write_files
from foretune.study.cell import cell_folder
from foretune.study.grid import expand, read_grid
from foretune.study.keys import cell_key
from foretune.study.stored import measured, read_stored
from foretune.tasks.metrics import METRICS

import cases


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    content = {
        "models": [{"model": cases.save(folder / "model"), "name": "tiny"}],
        "datasets": [
            {"dataset": cases.write_reviews(folder / "reviews"), "name": "classification"},
            {"dataset": cases.write_scores(folder / "scores"), "name": "regression"},
            {"dataset": cases.write_tags(folder / "tags"), "name": "multi-label", "task": "multi-label"},
        ],
        "placements": [
            {"target_modules": ["query", "value"], "layers": [0]},
            {"target_modules": ["query", "value"]},
            {"target_modules": ["intermediate.dense"]},
        ],
        "score": {"samples": 16, "eval_samples": 8, "draws": 2},
        "train": {"epochs": 2, "learning_rate": 3e-3, "train_batch_size": 8},
    }
    grid = folder / "grid.yaml"
    grid.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert run(["study", str(grid), "--output", str(folder / "store")]) == 0
    return grid, folder / "store"


def test_each_cell_stores_the_outcomes_of_its_kind(study):
    grid, store = study
    for cell in read_grid(grid):
        folder = cell_folder(store, cell_key(cell))
        result = json.loads((folder / "result.json").read_text())
        tune = json.loads((folder / "tune" / "result.json").read_text())
        kind = cell.data_name
        assert (result["task"], read_stored(folder).kind) == (kind, kind)
        assert tuple(result["outcomes"]) == measured(kind)
        for metric in METRICS[kind]:
            assert result["outcomes"][metric.name] == tune["final"][f"eval_{metric.name}"]
        assert (result["facts"]["majority_accuracy"] is None) == (kind != "classification")
        # step, loss and main metric, of which epochs are judged
        assert read_stored(folder).epochs[-1][2] == tune["final"][f"eval_{METRICS[kind][0].name}"]


def test_a_report_leaves_blank_what_a_kind_does_not_have(study, tmp_path, capsys):
    _, store = study
    assert run(["study", "report", str(store), "--output", str(tmp_path), "--resamples", "100"]) == 0
    with (tmp_path / CELLS_CSV).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    names = dict.fromkeys(metric.name for metrics in METRICS.values() for metric in metrics)
    for row in rows:
        has = {name for name in names if row[name] != ""}
        assert has == {metric.name for metric in METRICS[row["task"]]}
    again = read_records(tmp_path)
    for record, expected in zip(again, read_records(store), strict=True):
        assert record.kind == expected.kind
        assert record.outcomes == expected.outcomes


def test_each_kind_is_reported_by_itself(study, tmp_path, capsys):
    """A report of a mixed study holds for each kind what a report of its cells alone says, under its own metric."""
    _, store = study
    assert run(["study", "report", str(store), "--output", str(tmp_path / "mixed"), "--resamples", "100"]) == 0
    words = capsys.readouterr().out
    parts = by_kind(read_records(store))
    assert list(parts) == list(METRICS)
    with pytest.raises(StoreError, match="classification and regression and multi-label have no metric in common"):
        summarise(read_records(store))
    for kind, records in parts.items():
        metric = METRICS[kind][0]
        report = summarise(records, resamples=100)
        assert f"{capitalised(metric.label)} lost" in regret_table(report).caption
        assert f"{capitalised(metric.label)} lost" in " ".join(words.split())
        names = {outcome.name for outcome in outcomes_of(kind)}
        assert {finding.outcome.name for finding in report.findings} <= names
        assert {regret.predictor for regret in report.regrets} - {None} <= {p.name for p in predictors_of(kind)}
        with (tmp_path / "mixed" / kind / "correlations.csv").open(encoding="utf-8") as file:
            rows = [tuple(row) for row in csv.reader(file)]
        assert rows == [long_table(report).header, *long_table(report).rows]
        assert all(int(row[9]) <= 3 for row in rows[1:])
        quantity = f"kernel_regression_eval_{metric.name}"
        assert all(record.quantities[quantity] is not None for record in records)
        assert (tmp_path / "mixed" / kind / "scatter.png").is_file()


def test_cells_read_back_from_a_report_say_the_same(study, tmp_path):
    records = by_kind(read_records(study[1]))["regression"]
    write_files(tmp_path, record_writers(records))
    again = read_records(tmp_path)
    assert [record.kind for record in again] == ["regression"] * 3
    for first, second in zip(records, again, strict=True):
        assert first.quantities == second.quantities


def test_a_study_of_classes_alone_has_the_columns_of_earlier_versions(study, tmp_path):
    records = [record for record in read_records(study[1]) if record.kind == "classification"]
    write_files(tmp_path, record_writers(records))
    header = (tmp_path / CELLS_CSV).read_text(encoding="utf-8").splitlines()[0].split(",")
    assert "task" not in header
    assert header[header.index("eval_loss") + 1 :][:3] == ["accuracy", "matthews", "macro_f1"]
    assert not {"spearman", "micro_f1"} & set(header)


def test_a_cell_of_an_earlier_version_has_classes(study, tmp_path):
    grid, store = study
    cell = next(cell for cell in read_grid(grid) if cell.data_name == "classification")
    path = cell_folder(store, cell_key(cell)) / "result.json"
    content = path.read_text()
    held = json.loads(content)
    try:
        path.write_text(json.dumps({name: value for name, value in held.items() if name != "task"}))
        assert read_stored(path.parent).kind == "classification"
        path.write_text(json.dumps({**held, "task": "clustering"}))
        with pytest.raises(StoreError, match="task is 'clustering'"):
            read_stored(path.parent)
    finally:
        path.write_text(content)


def test_the_grid_takes_task_and_label_columns():
    content = {"models": ["m"], "placements": [{"target_modules": "query"}]}
    one = {"dataset": "d", "task": "regression", "label_column": "y"}
    (cell,) = expand({**content, "datasets": [one]})
    assert (cell.data.task, cell.data.label_column) == ("regression", ("y",))
    (cell,) = expand({**content, "datasets": [{**one, "label_column": ["y", "z"]}]})
    assert cell.data.label_column == ("y", "z")
    with pytest.raises(ConfigError, match=r"task = 'ranking'"):
        expand({**content, "datasets": [{**one, "task": "ranking"}]})


def test_content_keys_tell_kinds_apart(tmp_path):
    model, data = cases.save(tmp_path / "model"), Path(cases.write_scores(tmp_path / "scores"))
    text = (data / "train.csv").read_text().splitlines()
    whole = [text[0], *(f"{line.rsplit(',', 1)[0]},{index % 4}" for index, line in enumerate(text[1:]))]
    for name in ("train", "validation"):
        (data / f"{name}.csv").write_text("\n".join(whole) + "\n")
    content = {"models": [model], "placements": [{"target_modules": "query"}]}
    keys = set()
    for kind in ("classification", "regression"):
        (cell,) = expand({**content, "datasets": [{"dataset": str(data), "task": kind}]})
        keys.add(cell_key(cell))
    assert len(keys) == 2


def test_every_kind_is_simulated_and_its_metrics_computed(study, tmp_path, capsys):
    grid, store = study
    tokens = ["study", "outlook", str(grid), "--output", str(store), "--samples", "20", "--eval-samples", "10"]
    assert run([*tokens, "--comparisons"]) == 0
    for record in read_records(store):
        metric = METRICS[record.kind][0].name
        values = record.quantities
        names = ("simulated", "probe", "lazy", "random_head", "permuted", "random_backbone", "head_alone", "f0")
        for name in (*(f"{name}_{metric}" for name in names), "simulated_eval_loss", "quick_score", "gradient_norm"):
            assert values[name] is not None, (record.kind, name)
        for name in ("log_me", "parc", "sign_accuracy", "regression_accuracy"):
            assert (values[name] is not None) == (record.kind == "classification"), (record.kind, name)
        others = {METRICS[kind][0].name for kind in METRICS} - {metric}
        assert all(values[f"simulated_{other}"] is None for other in others)
    assert run(["study", "report", str(store), "--output", str(tmp_path), "--resamples", "100"]) == 0
    with (tmp_path / "regression" / "spearman-within.csv").open(encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["at initialisation", "train loss", "eval loss", "Spearman correlation", "steps to loss"]
    labels = {row[0] for row in rows}
    assert "simulated run: Spearman correlation" in labels
    assert not labels & {"LogME", "simulated run: accuracy"}
    assert not (tmp_path / "regression" / "calibration.json").exists()  # one data set, and none of its kind ships
    assert "run of 1 data set, and" in capsys.readouterr().err.replace("runs of", "run of")
    both = read_calibration(tmp_path / "classification" / "calibration.json")  # with those that come with foretune
    assert both.domain.models != both.further.models == shipped_calibration().domain.models
    own = ["--output", str(tmp_path / "own"), "--own-only"]
    assert run(["study", "report", str(store), "--resamples", "100", *own]) == 0
    assert not (tmp_path / "own" / "classification" / "calibration.json").exists()
