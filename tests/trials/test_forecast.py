"""`foretune forecast --spend`: trials are shown, made, kept, and stand in the result."""

import json

import pytest

import foretune as ft
from foretune.cli import run
from foretune.errors import ConfigError
from foretune.forecasting.calibration_file import read_calibration
from foretune.models.placement import lora_config
from foretune.report.home import home

import cases
import domains

FLAGS = ["--samples", "20", "--eval-samples", "10", "--target-modules", "query", "value", "--epochs", "4",
         "--learning-rate", "2e-2", "--train-batch-size", "8", "--max-length", "32"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spend")
    domains.write(folder / "calibration.json", cases.save(folder / "model"))
    data = cases.write_reviews(folder / "reviews", 200, 20)
    return ["--model", str(folder / "model"), "--dataset", data, "--calibration", str(folder / "calibration.json")]


def test_a_spend_buys_trials_and_they_are_kept(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["forecast", *place, *FLAGS, "--spend", "70%", "--output", str(out)]) == 0
    said = capsys.readouterr()
    assert "of 70% asked for, of the 800 sample passes" in said.err
    assert "to make" in said.err
    assert "trained on 100 rows: eval accuracy" in said.out
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert [trial["rows"] for trial in result["trials"]] == [32, 100]
    trial = result["trials"][1]
    assert set(trial["outcomes"]) == {"train_loss", "eval_loss", "accuracy"}
    assert trial["passes"] == 4 * 100 + 4 * 10 / 3
    assert 0 < trial["seconds"] < result["seconds"]["trials"]
    assert len([*(home() / "trials").glob("*.json")]) == 2
    assert run(["forecast", "--config", str(out / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    said = capsys.readouterr()
    assert "kept" in said.err
    assert "to make" not in said.err
    again = json.loads((tmp_path / "again" / "result.json").read_text(encoding="utf-8"))
    assert again["trials"] == result["trials"]
    assert again["end"] == result["end"]


def test_python_buys_the_same(place, tmp_path):
    options = dict(zip(place[::2], place[1::2], strict=True))
    task = ft.load_task(ft.DataConfig(options["--dataset"]))
    classifier = ft.load_classifier(options["--model"], label_names=task.label_names, seed=0)
    config = lora_config(classifier.model, ft.AdapterConfig(("query", "value")))
    settings = ft.ForecastSettings(samples=20, eval_samples=10, epochs=4, learning_rate=2e-2, train_batch_size=8,
                                   max_length=32, spend=0.7)  # fmt: skip
    calibration = read_calibration(tmp_path / options["--calibration"])
    result = ft.forecast(
        classifier.model, classifier.tokenizer, config, task, settings=settings, calibration=calibration
    )
    assert [trial["rows"] for trial in result.trials] == [32, 100]
    assert run(["forecast", *place, *FLAGS, "--spend", "70%", "--output", str(tmp_path / "out")]) == 0
    assert len([*(home() / "trials").glob("*.json")]) == 2  # the same trials
    written = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert written["trials"] == result.to_dict()["trials"]


def test_without_a_spend_nothing_is_trained(place, tmp_path, capsys):
    assert run(["forecast", *place, *FLAGS, "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert result["trials"] == []
    assert "trials" not in result["seconds"]
    assert not (home() / "trials").exists()
    assert "Trials" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spend", "words"),
    [("1%", "spend = 1% buys no trial: the smallest, 32 rows"), ("150%", "more than one full run"),
     ("much", "give a share of one full run")],
)  # fmt: skip
def test_a_spend_that_buys_nothing_is_refused(place, spend, words, capsys):
    assert run(["forecast", *place, *FLAGS, "--spend", spend]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_number_stands_for_itself(tmp_path, capsys):
    assert ft.ForecastSettings(spend=0.02).spend == "0.02"
    with pytest.raises(ConfigError, match=r"^spend = 2: give a share from 0 to 1"):
        ft.ForecastSettings(spend=2)
    (tmp_path / "c.yaml").write_text("spend: 0.3.1\nmodel: m\ndataset: d\n", encoding="utf-8")
    assert run(["forecast", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "spend = '0.3.1'" in capsys.readouterr().err
    (tmp_path / "d.yaml").write_text("spend: 1.5\nmodel: m\ndataset: d\n", encoding="utf-8")
    assert run(["forecast", "--config", str(tmp_path / "d.yaml")]) == 2
    assert "spend = '1.5'" in capsys.readouterr().err
