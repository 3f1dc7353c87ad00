"""Cells that earlier versions stored are read, under the names that their numbers have now."""

import csv
import json
from pathlib import Path

import pytest

from foretune.evaluation.predictors import OF_SCORE
from foretune.evaluation.records import SECONDS, read_records
from foretune.study.stored import FORMER_NAMES, read_stored, with_present_names
from stored import KEYS, result_of, write_cell

FORMER = {new: old for old, new in FORMER_NAMES.items()}
STUDIES = Path(__file__).parents[2] / "studies"


def former_result(key, index=0):
    """The cell as an earlier version wrote it."""
    content = result_of(key, index)
    content["quantities"] = {FORMER.get(name, name): value for name, value in content["quantities"].items()}
    content["seconds"] = {
        FORMER.get(f"seconds_{name}", f"seconds_{name}").removeprefix("seconds_"): value
        for name, value in content["seconds"].items()
    }
    return content


def test_a_stored_cell_of_an_earlier_version_is_read(tmp_path):
    folder = write_cell(tmp_path / "store", KEYS[0])
    present = read_stored(folder)
    former = former_result(KEYS[0])
    assert "forecast_eval_loss" in former["quantities"]
    assert "forecast" in former["seconds"]
    (folder / "result.json").write_text(json.dumps(former), encoding="utf-8")
    assert read_stored(folder) == present
    assert set(present.quantities) == {entry.name for entry in OF_SCORE}
    assert present.seconds["kernel_regression"] == 1.0


def test_a_number_that_has_both_names_is_the_present_one():
    both = {"forecast_eval_loss": 1.0, "kernel_regression_eval_loss": 2.0, "trace": 3.0}
    assert with_present_names(both) == {"kernel_regression_eval_loss": 2.0, "trace": 3.0}
    assert with_present_names({"forecast": 1.0, "load": 2.0}, prefix="seconds_") == {
        "kernel_regression": 1.0,
        "load": 2.0,
    }


@pytest.mark.parametrize("name", ["minilm-forecast", "minilm-paper"])
def test_the_committed_cells_are_read_whole(name):
    with (STUDIES / name / "cells.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    records = read_records(STUDIES / name)
    assert {record.key for record in records} == set(rows)
    for record in records:
        row = rows[record.key]
        for entry in OF_SCORE:
            written = row.get(entry.name, row.get(FORMER.get(entry.name)))
            assert record.quantities[entry.name] == (float(written) if written else None), entry.name
        for clock in SECONDS:
            written = row.get(f"seconds_{clock}", row.get(FORMER.get(f"seconds_{clock}")))
            assert record.seconds[clock] == (float(written) if written else None), clock
    assert any(record.quantities["kernel_regression_eval_loss"] for record in records)
