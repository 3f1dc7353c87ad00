"""The forecast course of a run: from `forecast` to the picture of `tune --forecast`."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml

import foretune as ft
from foretune.cli import run
from foretune.errors import ConfigError
from foretune.evaluation.records import read_records
from foretune.evaluation.simulations import OutlookSettings, make_outlooks
from foretune.forecasting.calibration import OUTCOMES, scale
from foretune.forecasting.linearise import survey
from foretune.forecasting.runs import outlooks
from foretune.models.placement import lora_config
from foretune.report.curves import read_curve
from foretune.study.grid import read_grid
from foretune.study.keys import cell_key

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
    assert scale("accuracy", last.eval_accuracy) == pytest.approx(
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
    assert start.eval_accuracy == before["eval_accuracy"]


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


@pytest.fixture(scope="module")
def grid(place):
    model, dataset, folder = place
    content = {
        "models": [model],
        "datasets": [{"dataset": dataset, "name": "few", "family": "reviews", "max_train": 30}, dataset],
        "placements": [{"target_modules": ["query"]}, {"target_modules": ["query", "value"], "layers": [1]}],
        "ranks": [2, 4],
        "score": {"samples": 8, "eval_samples": 8, "draws": 1},
        "train": {"epochs": 2, "learning_rate": 2e-2, "train_batch_size": 8, "train_eval_samples": 0},
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_outlooks_of_a_study(grid, place, tmp_path):
    store = tmp_path / "study"
    tokens = ["study", "outlook", str(grid), "--output", str(store), "--samples", "20", "--eval-samples", "10"]
    assert run(tokens) == 0
    cells = read_grid(grid)
    held = {cell: json.loads((store / "outlooks" / f"{cell_key(cell)}.json").read_text()) for cell in cells}
    for cell, content in held.items():
        assert content["output"] == "margin"
        assert content["train_rows"] == (30 if cell.data_name == "few" else 60)
        assert content["course"]["steps"][-1] == (8 if cell.data_name == "few" else 16)
        assert 0.0 <= content["quantities"]["simulated_accuracy"] <= 1.0
    assert len({content["quantities"]["simulated_eval_loss"] for content in held.values()}) == 8
    settings = OutlookSettings(20, 10, False)
    assert make_outlooks(cells, store, settings) == 0  # they are there
    assert make_outlooks(cells[:4], store, OutlookSettings(20, 8, False)) == 4
    # a cell finds its own when it is done
    assert run(["study", str(grid), "--output", str(store)]) == 0
    records = read_records(store, cells)
    assert {record.family for record in records} == {"reviews", cells[-1].data_name}
    for record in records:
        assert record.quantities["simulated_accuracy"] is not None
        assert record.seconds["survey"] > 0
        assert record.outcomes["eval_area"] > 0


def test_an_outlook_of_other_rows_than_were_trained_is_refused(grid, tmp_path, capsys):
    cells = read_grid(grid)[:1]
    alone = tmp_path / "grid.yaml"
    content = yaml.safe_load(grid.read_text(encoding="utf-8"))
    one = {"datasets": content["datasets"][:1], "placements": content["placements"][:1], "ranks": [2]}
    alone.write_text(yaml.safe_dump({**content, **one}), encoding="utf-8")
    store = tmp_path / "study"
    assert make_outlooks(cells, store, OutlookSettings(20, 10)) == 1
    assert run(["study", str(alone), "--output", str(store)]) == 0
    path = store / "outlooks" / f"{cell_key(cells[0])}.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    assert read_records(store)[0].quantities["simulated_accuracy"] is not None
    path.write_text(json.dumps({**held, "schema": 1, "train_rows": 24}), encoding="utf-8")
    capsys.readouterr()
    assert run(["study", "report", str(store)]) == 2
    assert "was trained on 30 rows, its outlook simulated on 24" in capsys.readouterr().err
    assert make_outlooks(cells, store, OutlookSettings(20, 10)) == 1  # an earlier version's is made again
    assert read_records(store)[0].quantities["simulated_accuracy"] is not None


def test_comparisons_change_one_thing_each(grid, tmp_path, monkeypatch):
    """The controls are controls: which labels, which backbone and which head every pass and every simulation has."""
    passes, simulations = [], []

    def spied_survey(plan, *, probe=True, autocast=None):
        held = survey(plan, probe=probe, autocast=autocast)
        weights = {name: p.detach().clone() for name, p in plan.placed.named_parameters() if "lora_" not in name}
        passes.append((plan.task, plan.sample, held, probe, weights))
        return held

    def spied_outlooks(held, starts, recipe, **options):
        found = outlooks(held, starts, recipe, **options)
        at = [seen[2] is held for seen in passes].index(True)
        simulations.append((at, options.get("train_a", True), recipe, [outlook.end for outlook in found]))
        return found

    monkeypatch.setattr("foretune.evaluation.simulations.survey", spied_survey)
    monkeypatch.setattr("foretune.evaluation.simulations.outlooks", spied_outlooks)
    store, cells = tmp_path / "study", read_grid(grid)[:2]
    assert make_outlooks(cells, store, OutlookSettings(20, 10, True)) == 2
    own, random_head, permuted, backbone = passes
    assert [at for at, *_ in simulations] == [0, 0, 1, 2, 3]
    assert [train_a for _, train_a, *_ in simulations] == [True, False, True, True, True]
    assert len({recipe for *_, recipe, _ in simulations}) == 1
    assert [seen[3] for seen in passes] == [True, False, True, True]
    for task, sample, held, _, _ in passes:  # the same rows in all
        assert np.array_equal(sample.train_indices, own[1].train_indices)
        assert np.array_equal(held.evaluation.labels, own[2].evaluation.labels)
        assert np.array_equal(held.train.labels, task.train.labels[sample.train_indices])
    for other in (random_head, backbone):
        assert np.array_equal(other[2].train.labels, own[2].train.labels)
    before, after = own[0].train.labels, permuted[0].train.labels
    assert np.array_equal(np.bincount(before), np.bincount(after))
    assert 0.2 < np.mean(permuted[2].train.labels == own[2].train.labels) < 0.8
    for name, weight in own[4].items():
        assert torch.equal(weight, random_head[4][name])
        assert torch.equal(weight, permuted[4][name])
        if weight.ndim == 2:  # every matrix of the backbone and the head
            assert not torch.equal(weight, backbone[4][name]), name
    ends = dict(zip(("simulated", "lazy", "random_head", "permuted", "random_backbone"), simulations, strict=True))
    for place, cell in enumerate(cells):
        path = store / "outlooks" / f"{cell_key(cell)}.json"
        found = json.loads(path.read_text(encoding="utf-8"))["quantities"]
        for name, (*_, held) in ends.items():
            assert (
                found[f"{name}_accuracy"] == held[-len(cells) :][place].eval_accuracy
            )  # the head alone is before them
        assert found["lazy_eval_loss"] == ends["lazy"][3][place].eval_loss != found["simulated_eval_loss"]
    assert len({held[-1].eval_loss for *_, held in simulations}) == 5  # each changes what it says


def test_too_few_samples_for_outlooks(grid, tmp_path, capsys):
    assert run(["study", "outlook", str(grid), "--output", str(tmp_path / "s"), "--samples", "2"]) == 2
    assert "samples = 2" in capsys.readouterr().err


def test_the_curve_file_has_a_header(forecast):
    with (forecast / "curve.csv").open(encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["step", "train_loss", "eval_loss", "eval_accuracy"]
