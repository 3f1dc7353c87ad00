"""Simulated runs and rankings of numbers and several labels: no calibration has seen any."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

import foretune as ft
from foretune.forecasting.calibration_file import shipped_calibration
from foretune.forecasting.curve import forecast_run
from foretune.forecasting.forecast import ForecastResult
from foretune.forecasting.linearise import linearise
from foretune.forecasting.report import print_forecast
from foretune.models.classifier import own_classifier
from foretune.models.identity import fingerprint
from foretune.problem import prepare
from foretune.ranking.module_kernels import module_kernels
from foretune.ranking.report import RankRun, numbers_table, ranking_content, ranking_table
from foretune.report.store import finite, to_json
from foretune.scoring.score import run_score

import cases
import domains

RUN = ft.Recipe(epochs=2, learning_rate=2e-2, train_batch_size=8)
OTHERS = cases.KINDS[2:]
SECONDS = {"load": 0.0, "forecast": 1.0, "total": 1.0}


def model_of(n_outputs):
    return cases.tiny("bert", n_outputs, dtype=torch.float32, spread=5.0)


def calibration_of(model):
    return domains.by_hand(domains.everywhere(fingerprint(model)))


def plan_of(kind, n_outputs, model):
    task = cases.task_of(kind, n_outputs)
    classifier = own_classifier(model, cases.tokenizer(), task.objective, bare=True)
    settings = ft.ScoreSettings(samples=24, eval_samples=12, draws=1, max_length=32)
    return prepare(classifier, task, cases.lora("bert"), settings)


@pytest.mark.parametrize(("kind", "n_outputs"), cases.KINDS)
def test_a_simulated_run_starts_at_the_loss_and_metric_of_the_model(kind, n_outputs):
    model = model_of(n_outputs)
    plan = plan_of(kind, n_outputs, model)
    curve = forecast_run(plan, RUN, calibration_of(model))
    points = curve.points if kind == "classification" else curve.simulated
    objective, rows = plan.task.objective, plan.sample.eval_indices
    model.config.problem_type = objective.problem_type
    targets = plan.task.evaluation.labels[rows]
    texts = [plan.task.evaluation.texts[row] for row in rows]
    batch = cases.tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**batch, labels=objective.tensor(targets))
    assert points[0].eval_loss == pytest.approx(float(found.loss), rel=1e-4)
    assert points[0].eval_metric == pytest.approx(objective.main(found.logits.numpy(), targets), rel=1e-4)
    assert points[-1].step == 10
    assert points[-1].train_loss < points[1].train_loss


@pytest.mark.parametrize(("kind", "n_outputs"), OTHERS)
def test_a_forecast_without_a_calibration_says_so_and_shows_the_simulated_run(kind, n_outputs):
    model = model_of(n_outputs)
    plan = plan_of(kind, n_outputs, model)
    curve = forecast_run(plan, RUN, calibration_of(model))
    name = plan.task.objective.metric.name
    assert curve.points == ()
    assert curve.end is None
    assert not curve.forecast.calibrated
    content = curve.to_dict()
    assert content["points"] is content["end"] is None
    assert f"the calibration has seen classification only, and this is {kind}" in content["note"]
    assert list(content["simulated"][0]) == ["step", "train_loss", "eval_loss", f"eval_{name}"]
    screen = Console(record=True, width=160)
    settings = ft.ForecastSettings(samples=24, eval_samples=12, max_length=32, **vars(RUN))
    print_forecast(screen, ForecastResult(plan, settings, curve, calibration_of(model), SECONDS).to_dict())
    text = screen.export_text()
    assert "Simulated run, not calibrated: no forecast" in text
    assert f"eval {plan.task.objective.metric.label}" in text


@pytest.mark.parametrize(("kind", "n_outputs"), cases.KINDS)
def test_candidates_of_any_kind_are_ranked(kind, n_outputs):
    model, task = model_of(n_outputs), cases.task_of(kind, n_outputs)
    settings = ft.RankSettings(
        ranks=(2, 4), finalists=4, samples=24, eval_samples=12, draws=1, max_length=32, **vars(RUN)
    )
    calibration = calibration_of(model)
    ranking = ft.rank(model, cases.tokenizer(), task, settings=settings, calibration=calibration)
    objective = task.objective
    order = [row.simulated.end.eval_metric for row in ranking.rows]
    config = RankRun((ft.ModelConfig("m"),), (ft.DataConfig("d"),), settings)
    content = json.loads(to_json(finite(ranking_content([ranking], config, calibration))))["rankings"][0]
    assert content["objective"]["kind"] == kind
    assert content[objective.noun] == n_outputs
    table, numbers = ranking_table([ranking]), numbers_table([ranking])
    assert objective.metric.label in " ".join(table.header)
    assert {objective.metric.name, "eval_loss", "train_loss"} <= set(numbers.header)
    if kind == "classification":
        assert all(row.forecast is not None for row in ranking.rows)
        return
    assert all(row.forecast is None and not row.tie for row in ranking.rows)
    assert order == sorted(order, reverse=True)  # as simulated
    assert order == [row.said.order[0] for row in ranking.rows]
    assert any(f"this is {kind}" in note for note in ranking.notes)
    assert "Order by the simulated run, not calibrated" in table.caption
    assert (ranking.constant is None) == (kind == "regression")


@pytest.mark.parametrize(("kind", "n_outputs"), cases.KINDS[1:])
def test_the_quick_score_is_of_the_residual_of_the_probe(kind, n_outputs):
    plan = plan_of(kind, n_outputs, model_of(n_outputs))
    held = linearise(replace(plan, reduction=plan.task.objective.simulated()))
    blocks = module_kernels(held, (4,))
    outputs = held.train.factors.logits.numpy().astype(float)
    targets = plan.task.train.labels[plan.sample.train_indices]
    if kind == "classification":
        shares = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
        expected = np.eye(n_outputs)[targets] - shares
    else:
        expected = targets - (outputs if kind == "regression" else 1 / (1 + np.exp(-outputs)))
    assert np.allclose(blocks.residual, expected, atol=1e-6)
    settings = replace(plan.settings, head="probe")
    result = run_score(replace(plan, reduction=plan.task.objective.reduction("trace"), settings=settings))
    summed = blocks.steps[:, 0].sum(0)
    assert np.allclose(summed, result.measurement.k_train_train[0], rtol=2e-2, atol=2e-2 * np.abs(summed).max())


def test_the_shipped_calibration_is_of_classes():
    assert shipped_calibration().kind == "classification"
