"""Files of a study that a disk, an editor or a person has changed."""

import csv
import json
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import foretune.evaluation.correlations as summary
from foretune.cli import run
from foretune.errors import StoreError
from foretune.evaluation.records import read_cell, read_records
from stored import CONTENTS, FILES, KEYS, STEPS, result_of, write_cell, write_simulation


@pytest.fixture(autouse=True)
def _no_panels(monkeypatch):
    """A report's figure of twenty panels takes seconds, and is not the matter here."""
    monkeypatch.setattr(summary, "scatter_figure", lambda *_: Figure())


@pytest.fixture
def store(tmp_path):
    for index, key in enumerate(KEYS):
        write_cell(tmp_path / "store", key, index)
        write_simulation(tmp_path / "store", key)
    return tmp_path / "store"


def report(store, *more):
    return run(["study", "report", str(store), "--resamples", "100", *more])


def test_an_undamaged_study_is_reported(store, tmp_path, capsys):
    assert report(store) == 0
    assert report(store / "report", "--output", str(tmp_path / "again")) == 0  # from its cells.csv
    assert (tmp_path / "again" / "cells.csv").read_bytes() == (store / "report" / "cells.csv").read_bytes()
    capsys.readouterr()


def refuse(store, capsys, *said):
    assert report(store) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error) < 1100
    assert error.count("\n") == 1
    for words in (*said, "damaged"):
        assert words in error


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in CONTENTS.items()])
def test_a_damaged_file_is_named_with_its_cell_and_a_remedy(store, file, content, capsys):
    (store / "cells" / KEYS[1] / file).write_bytes(content)
    refuse(store, capsys, KEYS[1], "the same foretune study command computes it again")


@pytest.mark.parametrize("file", FILES)
def test_a_file_cut_at_any_place_is_seen(store, file, capsys):
    path = store / "cells" / KEYS[1] / file
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=KEYS[1]):
            read_cell(path.parents[len(Path(file).parts) - 1])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["missing", "a folder"])
def test_a_file_that_is_not_there(store, file, kind, capsys):
    path = store / "cells" / KEYS[1] / file
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    refuse(store, capsys, KEYS[1])


PLACES = [(group, name) for group, values in result_of(KEYS[0]).items() if isinstance(values, dict) for name in values]


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group, name in PLACES if group in ("names", "facts", "outcomes")]
)
def test_a_key_that_is_missing(store, group, name, capsys):
    content = result_of(KEYS[1], 1)
    del content[group][name]
    (store / "cells" / KEYS[1] / "result.json").write_text(json.dumps(content), encoding="utf-8")
    refuse(store, capsys, KEYS[1], f"lacks '{name}'")


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.5", [0.5], {"value": 0.5}])
@pytest.mark.parametrize("group", ["names", "facts", "quantities", "outcomes", "seconds"])
def test_a_value_that_is_none(store, group, value, capsys):
    content = result_of(KEYS[1], 1)
    name = {"names": "r"}.get(group, next(iter(content[group])))
    content[group][name] = value
    (store / "cells" / KEYS[1] / "result.json").write_text(json.dumps(content), encoding="utf-8")
    refuse(store, capsys, KEYS[1], name)


@pytest.mark.parametrize("group", ["names", "facts", "quantities", "outcomes", "seconds", "key", "family"])
@pytest.mark.parametrize("value", [None, [], 3, "x", True])
def test_a_group_that_is_something_else(store, group, value, capsys):
    if (group, value) == ("family", "x"):
        return  # a family may have any name
    content = {**result_of(KEYS[1], 1), group: value}
    (store / "cells" / KEYS[1] / "result.json").write_text(json.dumps(content), encoding="utf-8")
    refuse(store, capsys, KEYS[1])


@pytest.mark.parametrize("file", ["steps.csv", "history.csv"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2,0.", "2,nan,0."),
        ("2,0.", "x,0."),
        ("step", "stap"),
        ("0.6", "a"),
        ("0.7", ""),
        ("0.5", '0"5'),
        ("2,", "9,"),
    ],
)
def test_a_table_that_was_edited(store, file, old, new, capsys):
    path = store / "cells" / KEYS[1] / "tune" / file
    text = path.read_bytes().decode()
    if old not in text:
        return
    path.write_bytes(text.replace(old, new).encode())
    refuse(store, capsys, KEYS[1])


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_losses_that_are_no_numbers_are_those_of_runs_that_diverged(store, loss, capsys):
    folder = store / "cells" / KEYS[1]
    (folder / "tune" / "steps.csv").write_text(STEPS.replace("0.5", loss), encoding="utf-8")
    refuse(store, capsys, KEYS[1])
    content = result_of(KEYS[1], 1)
    content["facts"]["diverged"] = True
    (folder / "result.json").write_text(json.dumps(content), encoding="utf-8")
    assert report(store) == 0
    assert "1 cells are left out: their training diverged" in capsys.readouterr().out


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in CONTENTS.items()])
def test_a_damaged_simulation_is_named(store, content, capsys):
    (store / "outlooks" / f"{KEYS[2]}.json").write_bytes(content)
    refuse(store, capsys, f"{KEYS[2]}.json", "foretune study outlook makes it again")


def test_all_damaged_cells_are_counted(store, capsys):
    for key in KEYS[:2]:
        (store / "cells" / key / "result.json").write_bytes(b"")
    refuse(store, capsys, KEYS[0], "(2 cells are damaged)")


@pytest.mark.parametrize("file", ["cells.csv", "curves.csv"])
@pytest.mark.parametrize(
    "fault", [*(name for name in CONTENTS if name != "empty"), "cut", "twice", "nan", "wide", "NUL"]
)
def test_damaged_tables_of_a_report(store, file, fault, tmp_path, capsys):
    assert report(store) == 0
    folder = store / "report"
    path = folder / file
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    changed = {
        "cut": whole[: len(whole) // 2],
        "twice": b"".join([*lines, lines[-1]]) if file == "cells.csv" else b"".join([*lines, b"x,1,\r\n"]),
        "nan": whole.replace(b"0.7", b"nan"),
        "wide": b"".join([*lines[:-1], lines[-1].rstrip() + b",1,2,3\r\n"]),
        "NUL": whole.replace(b"0.7", b"0\x007"),
    }
    path.write_bytes(CONTENTS.get(fault, changed.get(fault)))
    capsys.readouterr()
    refuse(folder, capsys, file)


def test_an_empty_table_of_cells(tmp_path, capsys):
    (tmp_path / "cells.csv").write_bytes(b"")
    assert report(tmp_path) == 2
    assert "is damaged: cells.csv has no column 'key'" in capsys.readouterr().err


@pytest.mark.parametrize("n", [0, 1])
def test_a_study_of_too_few_cells(tmp_path, n, capsys):
    (tmp_path / "store" / "cells").mkdir(parents=True)
    for key in KEYS[:n]:
        write_cell(tmp_path / "store", key)
    assert report(tmp_path / "store") == 2
    error = capsys.readouterr().err
    assert "holds no finished cell yet" in error if n == 0 else "a report needs at least 2" in error


def test_strange_entries_beside_the_cells_are_passed_over(store):
    (store / "cells" / "README").write_text("mine", encoding="utf-8")
    (store / "cells" / ".DS_Store").write_bytes(b"\0")
    (store / "cells" / f"{KEYS[0]}.part").mkdir()
    (store / "cells" / f"{KEYS[0]}.damaged").mkdir()
    assert len(read_records(store)) == 3


@pytest.mark.parametrize(
    "name", ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "'=1", "it's", "-0.5", "$x_1$ | <b>"]
)
def test_names_come_back_from_a_report_as_they_were(tmp_path, name, capsys):
    for index, key in enumerate(KEYS):
        write_cell(tmp_path / "store", key, index, dataset=name, model=name, placement=f"{name}{index}")
    assert report(tmp_path / "store") == 0
    first, again = read_records(tmp_path / "store"), read_records(tmp_path / "store" / "report")
    assert [record.unit for record in first] == [record.unit for record in again]
    assert {record.dataset for record in again} == {name}
    with (tmp_path / "store" / "report" / "cells.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            assert row["dataset"] == "-0.5" or not row["dataset"].startswith(("=", "+", "-", "@"))
