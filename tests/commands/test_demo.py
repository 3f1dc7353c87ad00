"""The demo forecasts a fine-tune, runs it, and prints both."""

import json
import os
import shlex
from pathlib import Path

import pytest
import torch

import foretune.commands.demo as demo
import foretune.commands.forecast as forecast_command
import foretune.commands.score as score_command
import foretune.commands.tune as tune_command
from foretune.cli import run
from foretune.forecasting.calibration_file import shipped_calibration
from foretune.forecasting.reach import INSIDE, Run, reach
from foretune.forecasting.schedule import schedule_of
from foretune.models.classifier import load_classifier
from foretune.models.identity import fingerprint
from foretune.models.placement import lora_config, place
from foretune.settings.commands import ForecastSettings
from foretune.settings.groups import AdapterConfig
from foretune.tasks.demo import TOPICS, TRAIN_ROWS, model_folder

import cases
import domains

CONTENT = {
    "score": {},
    "forecast": {"points": [{"step": 0}], "end": None, "notes": []},
    "tune": {},
}


def test_the_demo_runs_the_commands_that_it_prints(tmp_path, monkeypatch, capsys):
    calls = []
    for module, name in ((score_command, "score"), (forecast_command, "forecast"), (tune_command, "tune")):

        def record(*args, name=name, brief=False, **options):
            given = (*args, *(value for value in options.values() if value is not None))
            calls.append((name, tuple(value for value in given if value is not None)))
            return CONTENT[name]

        monkeypatch.setattr(module, f"make_{name}", record)
        monkeypatch.setattr(demo, f"make_{name}", record)
    out = tmp_path / "run"
    assert run(["demo", "--samples", "8", "--output", str(out), "--json"]) == 0
    printed = [line.removeprefix("$ foretune ") for line in capsys.readouterr().err.splitlines() if line[:1] == "$"]
    done = list(calls)
    calls.clear()
    for line in printed:
        assert run([*shlex.split(line), "--json"]) == 0
    assert calls == done
    assert [name for name, _ in done] == ["score", "forecast", "tune"]
    config, folder = done[0][1]
    assert (config.settings.samples, folder) == (8, out / "score")
    assert (tmp_path / "run-data" / "train.csv").exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    return cases.save(folder / "model")


@pytest.fixture
def small(tiny, monkeypatch):
    """The demo on a model of a few weights and on few rows."""
    monkeypatch.setattr("foretune.tasks.demo.model_folder", lambda: Path(tiny))
    monkeypatch.setattr("foretune.tasks.demo.TRAIN_ROWS", 32)
    monkeypatch.setattr(demo, "LAYERS", (0, 1))
    monkeypatch.setattr(demo, "EVAL_SAMPLES", 16)


def test_both_stand_side_by_side(small, tiny, tmp_path, monkeypatch, capsys):
    classifier = load_classifier(tiny, label_names=("business", "politics"), seed=0)
    placed = place(classifier.model, lora_config(classifier.model, AdapterConfig(("query",))), seed=0)
    calibration = domains.by_hand(domains.everywhere(fingerprint(placed)))
    monkeypatch.setattr("foretune.forecasting.calibration_file.read_calibration", lambda path: calibration)
    out = tmp_path / "run"
    assert run(["demo", "--samples", "8", "--output", str(out)]) == 0
    text = capsys.readouterr().out
    forecast, tuned = (json.loads((out / name / "result.json").read_text()) for name in ("forecast", "tuned"))
    score = json.loads((out / "score" / "result.json").read_text())
    assert f"{score['kernel']['condition_number']:.4g}" in text
    assert text.index("λ_max") < text.index("forecast")
    value = forecast["end"]["accuracy"]
    (row,) = [line for line in text.splitlines() if line.strip().startswith("accuracy")]
    inside = value["low"] <= tuned["final"]["eval_accuracy"] <= value["high"]
    for words in (f"{value['value']:.1%}", f"{value['low']:.1%} to {value['high']:.1%}", "yes" if inside else "no"):
        assert words in row
    assert f"{tuned['final']['eval_accuracy']:.1%}" in row
    assert f"{tuned['final']['train_loss']:.3f}" in text
    assert tuned["details"]["data"]["train_rows"] == forecast["train_rows"] == 32
    assert tuned["details"]["data"]["eval_rows"] == forecast["eval_rows"] == 16
    assert (out / "tuned" / "loss.png").stat().st_size > 0


@pytest.mark.real
def test_the_demo_lies_within_what_the_shipped_calibration_has_seen():
    """So that it shows a level, whatever the calibration is next."""
    domain = shipped_calibration().domain
    schedule = schedule_of(demo.RECIPE, TRAIN_ROWS, seed=0)
    assert fingerprint(load_classifier(str(model_folder()), label_names=TOPICS, seed=0).model) in domain.models
    run_of_demo = Run(
        model=domain.models[0],
        hidden_head=False,
        classes=len(TOPICS),
        known_rows=min(TRAIN_ROWS, ForecastSettings.samples),
        train_rows=TRAIN_ROWS,
        eval_rows=demo.EVAL_SAMPLES,
        longest=demo.MAX_LENGTH,
        epochs=schedule.epochs,
        steps=schedule.steps,
        batch_size=schedule.batch_size,
        learning_rate=float(schedule.rates().mean()),
        update_rate=float(schedule.rates().mean()) * AdapterConfig().alpha,
    )
    assert reach(domain, run_of_demo) == INSIDE


def test_a_model_that_the_calibration_has_not_seen_gets_no_level(small, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(["demo", "--samples", "8", "--output", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.count("withheld") >= 3
    assert "• " in text
    assert (out / "tuned" / "result.json").exists()


def test_a_demo_that_fails_leaves_nothing(small, tmp_path, monkeypatch, capsys):
    def fails(*_args, **_options):
        raise KeyboardInterrupt("stopped")

    monkeypatch.setattr(demo, "make_tune", fails)
    assert run(["demo", "--samples", "8", "--output", str(tmp_path / "run")]) == 130
    assert os.listdir(tmp_path) == []
    capsys.readouterr()
