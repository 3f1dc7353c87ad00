"""The forecast course of a run: from `forecast` to the picture of `tune --forecast`."""

import csv
import json

import pytest
import yaml

import foretune as ft
from foretune.cli import run
from foretune.errors import ConfigError
from foretune.forecasting.outcomes import OUTCOMES, scale
from foretune.models.placement import lora_config
from foretune.report.curves import read_curve

import cases
import domains

FEW = ["--samples", "20", "--eval-samples", "10", "--target-modules", "query", "value"]
RUN = ["--epochs", "2", "--learning-rate", "2e-2", "--train-batch-size", "8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curve")
    domains.write(folder / "calibration.json", cases.save(folder / "model"))
    return str(folder / "model"), cases.write_reviews(folder / "reviews"), folder


@pytest.fixture(scope="module")
def forecast(place):
    model, dataset, folder = place
    out = folder / "forecast"
    assert run(["forecast", "--model", model, "--dataset", dataset, *FEW, *RUN,
                "--calibration", str(folder / "calibration.json"), "--output", str(out)]) == 0  # fmt: skip
    return out


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_the_course_of_a_run_is_forecast(forecast):
    curve = result_of(forecast)
    points = read_curve(forecast / "curve.csv")
    assert (forecast / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert points[0].step == 0
    assert points[0].train_loss is None
    assert points[-1].step == 16  # 60 rows, 8 in a step, 2 epochs
    assert [point.step for point in points] == sorted({point.step for point in points})
    last = points[-1]
    assert last.eval_loss == pytest.approx(curve["end"]["eval_loss"]["value"], rel=1e-4)
    assert scale("accuracy", last.eval_metric) == pytest.approx(
        scale("accuracy", curve["end"]["accuracy"]["value"]), abs=1e-3
    )
    for name in OUTCOMES:
        assert curve["end"][name]["low"] < curve["end"][name]["value"] < curve["end"][name]["high"]


def test_it_starts_where_the_model_is(forecast, place, tmp_path):
    """Before training nothing is forecast: the same rows, the same head, evaluated."""
    model, dataset, _ = place
    assert run(["tune", "--model", model, "--dataset", dataset, "--target-modules", "query", "value", *RUN,
                "--eval-samples", "10", "--output", str(tmp_path / "tuned")]) == 0  # fmt: skip
    before = result_of(tmp_path / "tuned")["before_training"]
    start = read_curve(forecast / "curve.csv")[0]
    assert start.eval_loss == pytest.approx(before["eval_loss"], rel=1e-4)
    assert start.eval_metric == before["eval_accuracy"]


def test_a_forecast_is_replayed(forecast, tmp_path):
    flags = yaml.safe_load((forecast / "config.yaml").read_text(encoding="utf-8"))
    assert flags["learning_rate"] == 2e-2
    assert run(["forecast", "--config", str(forecast / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "curve.csv").read_text() == (forecast / "curve.csv").read_text()


def test_a_fine_tune_takes_the_run_over_and_draws_the_forecast(forecast, tmp_path):
    out = tmp_path / "tuned"
    assert (
        run(["tune", "--config", str(forecast / "config.yaml"), "--forecast", str(forecast), "--output", str(out)]) == 0
    )
    assert result_of(out)["steps"] == 16
    assert (out / "forecast.csv").read_text() == (forecast / "curve.csv").read_text()
    plain = tmp_path / "plain"
    assert run(["tune", "--config", str(forecast / "config.yaml"), "--output", str(plain)]) == 0
    assert (out / "loss.png").read_bytes() != (plain / "loss.png").read_bytes()
    assert yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))["forecast"] == "forecast.csv"
    replayed = tmp_path / "replayed"
    assert run(["tune", "--config", str(out / "config.yaml"), "--output", str(replayed)]) == 0
    assert (replayed / "forecast.csv").read_text() == (forecast / "curve.csv").read_text()
    # and back: a run's file is read by what takes less
    assert run(["score", "--config", str(out / "config.yaml"), *FEW[:4], "--output", str(tmp_path / "score")]) == 0
    again = tmp_path / "forecast"
    assert run(["forecast", "--config", str(out / "config.yaml"), *FEW[:4], "--output", str(again)]) == 0


def test_a_forecast_computes_no_kernel(place, monkeypatch):
    model, dataset, _ = place
    for name in ("foretune.scoring.passes.measure", "foretune.ntk.jacobian.tangent_features"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("a kernel is computed"))
    assert run(["forecast", "--model", model, "--dataset", dataset, *FEW, *RUN]) == 0


def test_a_forecast_in_python_is_that_of_the_command(forecast, place):
    model, dataset, folder = place
    task = ft.load_task(ft.DataConfig(dataset))
    given = ft.load_classifier(model, label_names=task.label_names, seed=0)
    lora = lora_config(given.model, ft.AdapterConfig(("query", "value")))
    settings = ft.ForecastSettings(samples=20, eval_samples=10, epochs=2, learning_rate=2e-2, train_batch_size=8)
    calibration = ft.read_calibration(folder / "calibration.json")
    found = ft.forecast(given.model, given.tokenizer, lora, task, settings=settings, calibration=calibration)
    content, stored = json.loads(json.dumps(found.to_dict())), result_of(forecast)
    for name in ("points", "end", "steps", "samples", "train_rows", "placement", "settings"):
        assert content[name] == stored[name], name


def test_by_default_a_forecast_knows_what_a_ranking_knows(place, capsys):
    """At most 512 rows of each kind, and all that train where there are fewer."""
    model, dataset, _ = place
    tokens = ["--model", model, "--dataset", dataset, "--target-modules", "query", *RUN, "--json"]
    assert run(["forecast", *tokens]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert run(["rank", *tokens, "--finalists", "1", "--draws", "1"]) == 0
    (ranked,) = json.loads(capsys.readouterr().out)["rankings"]
    for name in ("samples", "train_rows", "steps", "classes"):
        assert alone[name] == ranked[name]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["score", *FEW, "--epochs", "3"], ["--epochs", "foretune forecast"]),
        (["score", *FEW, "--curve"], ["--curve", "foretune forecast"]),
        (["forecast", *FEW[:2], "--eval-samples", "0"], ["eval_samples = 0"]),
        (["tune", "--forecast", "nowhere.csv"], ["nowhere.csv", "--output"]),
    ],
)
def test_wrong_input(tokens, words, place, capsys):
    model, dataset, _ = place
    assert run([*tokens, "--model", model, "--dataset", dataset]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_what_is_no_curve_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"other\.csv.*foretune forecast"):
        read_curve(tmp_path / "other.csv")


def test_the_curve_file_has_a_header(forecast):
    with (forecast / "curve.csv").open(encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["step", "train_loss", "eval_loss", "eval_accuracy"]
