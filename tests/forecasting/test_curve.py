"""The forecast course of a run: from `score --curve` to the picture of `tune --forecast`."""

import csv
import json

import pytest
import yaml

from foretune.cli import run
from foretune.errors import ConfigError
from foretune.forecasting.outcomes import OUTCOMES, scale
from foretune.report.curves import read_curve

import cases
import domains

FEW = ["--samples", "20", "--eval-samples", "10", "--draws", "1", "--target-modules", "query", "value"]
RUN = ["--epochs", "2", "--learning-rate", "2e-2", "--train-batch-size", "8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curve")
    domains.write(folder / "calibration.json", cases.save(folder / "model"))
    return str(folder / "model"), cases.write_reviews(folder / "reviews"), folder


@pytest.fixture(scope="module")
def scored(place):
    model, dataset, folder = place
    out = folder / "scored"
    assert run(["score", "--model", model, "--dataset", dataset, *FEW, "--curve", *RUN,
                "--calibration", str(folder / "calibration.json"), "--output", str(out)]) == 0  # fmt: skip
    return out


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_a_score_forecasts_the_course_of_the_run(scored):
    curve = result_of(scored)["curve"]
    points = read_curve(scored / "curve.csv")
    assert (scored / "curve.png").read_bytes().startswith(b"\x89PNG")
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


def test_it_starts_where_the_model_is(scored, place, tmp_path):
    """Before training nothing is forecast: the same rows, the same head, evaluated."""
    model, dataset, _ = place
    assert run(["tune", "--model", model, "--dataset", dataset, "--target-modules", "query", "value", *RUN,
                "--eval-samples", "10", "--output", str(tmp_path / "tuned")]) == 0  # fmt: skip
    before = result_of(tmp_path / "tuned")["before_training"]
    start = read_curve(scored / "curve.csv")[0]
    assert start.eval_loss == pytest.approx(before["eval_loss"], rel=1e-4)
    assert start.eval_metric == before["eval_accuracy"]


def test_a_score_with_a_curve_is_replayed(scored, tmp_path):
    flags = yaml.safe_load((scored / "config.yaml").read_text(encoding="utf-8"))
    assert flags["curve"] is True
    assert flags["learning_rate"] == 2e-2
    assert run(["score", "--config", str(scored / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "curve.csv").read_text() == (scored / "curve.csv").read_text()


def test_a_fine_tune_takes_the_run_over_and_draws_the_forecast(scored, tmp_path):
    out = tmp_path / "tuned"
    assert run(["tune", "--config", str(scored / "config.yaml"), "--forecast", str(scored), "--output", str(out)]) == 0
    assert result_of(out)["steps"] == 16
    assert (out / "forecast.csv").read_text() == (scored / "curve.csv").read_text()
    plain = tmp_path / "plain"
    assert run(["tune", "--config", str(scored / "config.yaml"), "--output", str(plain)]) == 0
    assert (out / "loss.png").read_bytes() != (plain / "loss.png").read_bytes()
    # and back: the run's file describes a run, which a score need not forecast
    assert run(["score", "--config", str(out / "config.yaml"), *FEW[:6], "--output", str(tmp_path / "score")]) == 0
    assert "curve" not in result_of(tmp_path / "score")


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["score", *FEW, "--epochs", "3"], ["--epochs", "--curve"]),
        (["score", *FEW[:2], "--eval-samples", "0", "--curve"], ["eval_samples = 0"]),
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
    with pytest.raises(ConfigError, match=r"other\.csv.*score --curve"):
        read_curve(tmp_path / "other.csv")


def test_the_curve_file_has_a_header(scored):
    with (scored / "curve.csv").open(encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["step", "train_loss", "eval_loss", "eval_accuracy"]
