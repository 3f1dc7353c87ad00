"""The held-out forecasts of a study in a ledger, each once."""

import dataclasses
import shutil
from pathlib import Path

import pytest

import foretune as ft
from foretune.cli import run
from foretune.evaluation.held_out import forecast_held_out, forecast_qualities
from foretune.evaluation.held_out_entries import held_out_entries
from foretune.evaluation.records import read_records
from foretune.ledger.entries import Told
from foretune.ledger.files import append

STUDY = Path(__file__).parents[2] / "studies" / "minilm-forecast"
NOW, LATER = "2026-03-01T12:00:00+00:00", "2026-03-02T12:00:00+00:00"


@pytest.fixture(scope="module")
def held_out():
    """Cells with a forecast: the study's simulations with more rows than are known are of an earlier version."""
    found = forecast_held_out(read_records(STUDY))
    forecast = tuple(record for record in found.records if record.key in found.forecasts)
    return dataclasses.replace(found, records=forecast)


def test_a_line_is_the_forecast_and_the_outcome(held_out):
    entries = held_out_entries(held_out, NOW)
    assert [entry.run for entry in entries] == [record.key for record in held_out.records]
    for entry, record in zip(entries, held_out.records, strict=True):
        level = held_out.forecasts[record.key]["accuracy"]
        assert entry.main == Told(level.value, level.low, level.high, record.outcomes["accuracy"])
        assert (entry.state, entry.command, entry.made, entry.metric) == ("held out", "study", NOW, "accuracy")
        assert (entry.model, entry.dataset, entry.rows) == (record.model, record.dataset, record.facts["train_rows"])
        assert entry.known_rows <= entry.rows


def test_the_ledger_says_what_the_report_says(held_out):
    (total,) = ft.summarise_ledger(held_out_entries(held_out, NOW)).totals
    qualities = {quality.outcome: quality for quality in forecast_qualities(held_out)}
    for accuracy, name in ((total.main, "accuracy"), (total.eval_loss, "eval_loss")):
        assert accuracy.covered == pytest.approx(qualities[name].covered)
    assert total.runs == qualities["accuracy"].cells
    assert total.main.error == pytest.approx(qualities["accuracy"].error)
    assert total.main.bias == pytest.approx(qualities["accuracy"].bias)
    assert total.main.width == pytest.approx(qualities["accuracy"].width)


def test_a_line_is_added_once_whenever_it_is_made(held_out, tmp_path):
    path = tmp_path / "ledger.csv"
    entries = held_out_entries(held_out, NOW)
    assert append(entries, path) == len(entries)
    assert append(held_out_entries(held_out, LATER), path) == 0
    fewer = [record for record in held_out.records if record.family != held_out.records[0].family]
    grown = held_out_entries(forecast_held_out(fewer), LATER)  # another calibration: other forecasts
    assert append(grown, path) == len(grown)
    summary = ft.summarise_ledger(ft.read_ledger(path))
    assert summary.left_out == {"made again": len(grown)}
    (total,) = summary.totals
    assert total.runs == len(entries)


def test_a_run_that_diverged_and_a_level_that_is_withheld(held_out):
    first, second, *_ = held_out.records
    diverged = dataclasses.replace(first, facts={**first.facts, "diverged": 1})
    changed = dataclasses.replace(
        held_out, records=(diverged, second), forecasts={**held_out.forecasts, second.key: {}}
    )
    one, two = held_out_entries(changed, NOW)
    assert (one.state, one.eval_loss.real) == ("held out", None)
    assert (two.state, two.main.forecast) == ("withheld", None)


def test_the_command_adds_them(held_out, tmp_path, capsys):
    study, ledger = tmp_path / "study", tmp_path / "ledger.csv"
    study.mkdir()
    for name in ("cells.csv", "curves.csv"):
        shutil.copy(STUDY / name, study / name)
    tokens = ["study", "report", str(study), "--resamples", "100", "--ledger", str(ledger)]
    (tmp_path / "other.csv").write_text("a,b\n", encoding="utf-8")
    assert run([*tokens[:-1], str(tmp_path / "other.csv")]) == 2
    assert "is no ledger" in capsys.readouterr().err
    assert not (study / "report").exists()
    for added in (len(held_out.records), 0):
        assert run(tokens) == 0
        assert f"{added} held-out forecasts added" in capsys.readouterr().err
    assert {entry.run for entry in ft.read_ledger(ledger)} == {record.key for record in held_out.records}
    assert run(["ledger", str(ledger)]) == 0
    assert "Held-out forecasts of studies" in capsys.readouterr().out
