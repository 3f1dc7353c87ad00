"""Scores of classes, numbers and several labels: kernels and regression against independent computations."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, r2_score

import foretune as ft
from foretune.ntk.probe import probe_folds
from foretune.problem import describe, prepare
from foretune.report.store import to_json
from foretune.scoring.files import save_score, score_content
from foretune.scoring.report import print_plan, print_result

import cases
import references

SETTINGS = {"samples": 12, "eval_samples": 8, "draws": 1, "max_length": 32, "batch_size": 5, "ridge": 0.5}


def score_of(kind, n_outputs, **options):
    task = cases.task_of(kind, n_outputs)
    settings = ft.ScoreSettings(**{**SETTINGS, **options})
    model = cases.tiny("bert", n_outputs)
    return model, ft.score(model, cases.tokenizer(), cases.lora("bert"), task, settings=settings)


def directions_of(kind, name, n_outputs):
    """The outputs that are differentiated, and the factor on their summed kernels, by the definition."""
    if name.startswith("output:"):
        return np.eye(n_outputs)[:, [int(name[-1])]], 1.0
    if kind != "classification":
        return np.eye(n_outputs), 1.0 / n_outputs if name == "trace" else 1.0
    basis = np.linalg.svd(np.eye(n_outputs) - 1.0 / n_outputs)[0][:, : n_outputs - 1]
    return basis, 1.0 / n_outputs


CASES = [(*case, "trace") for case in cases.KINDS]
CASES += [(*case, name) for case in cases.KINDS[2:] for name in ("full", "output:0")]


@pytest.mark.parametrize(("kind", "n_outputs", "name"), CASES)
def test_kernels_are_those_of_autograd_one_by_one(kind, n_outputs, name):
    model, result = score_of(kind, n_outputs, reduction=name)
    m, task = result.measurement, result.plan.task
    placed = ft.place(model, cases.lora("bert"), seed=0)
    parameters = references.named_parameters(placed, "lora_")
    directions, scale = directions_of(kind, name, n_outputs)
    gradients = []
    for split, rows in ((task.train, m.train_indices), (task.evaluation, m.eval_indices)):
        sequences = [cases.tokenizer()(split.texts[row])["input_ids"] for row in rows]
        gradients.append(references.parameter_gradients(placed, sequences, directions, parameters))
    for found, left in ((m.k_train_train[0], gradients[0]), (m.k_eval_train[0], gradients[1])):
        if name == "full":
            expected = left.reshape(-1, left.shape[-1]) @ gradients[0].reshape(-1, left.shape[-1]).T
        else:
            expected = scale * np.einsum("ikp,jkp->ij", left, gradients[0])
        assert np.allclose(found, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize(("kind", "n_outputs", "name"), [case for case in CASES if case[0] != "classification"])
def test_kernel_regression_is_the_solution_of_its_system(kind, n_outputs, name):
    _, result = score_of(kind, n_outputs, reduction=name)
    m, own = result.measurement, result.draws[0].kernel_regression
    k, k_eval = m.k_train_train[0], m.k_eval_train[0]
    columns = slice(0, 1) if name.startswith("output") else slice(None)
    y, y_eval = m.y_train[:, columns], m.y_eval[:, columns]
    code = (lambda t: 2.0 * t - 1) if kind == "multi-label" else (lambda t: t)
    f, f_eval = m.f_train_0[:, columns], m.f_eval_0[:, columns]
    residual = code(y) - f
    rows = residual.reshape(-1, 1) if name == "full" else residual
    predicted = f_eval + (k_eval @ np.linalg.solve(k + 0.5 * np.eye(len(k)), rows)).reshape(f_eval.shape)
    assert own.eval_mse == pytest.approx(np.mean(np.sum((code(y_eval) - predicted) ** 2, axis=1)))
    factor = own.temperature
    if kind == "regression":
        assert factor == 1.0
        assert own.eval_loss == pytest.approx(np.mean((y_eval - predicted) ** 2))
        pairs = list(zip(predicted.T, y_eval.T, strict=True))
        assert own.metrics["eval_spearman"] == pytest.approx(np.mean([spearmanr(a, b).statistic for a, b in pairs]))
        assert own.metrics["eval_r2"] == pytest.approx(r2_score(y_eval, predicted))
        assert own.baselines["constant_loss"] == pytest.approx(np.mean((y_eval - y.mean(0)) ** 2))
        assert own.baselines["constant_spearman"] is None
        assert own.baselines["f0_loss"] == pytest.approx(np.mean((y_eval - f_eval) ** 2))
    else:
        margins = (2 * y_eval - 1) * factor * predicted
        assert own.eval_loss == pytest.approx(np.mean(np.logaddexp(0, -margins)))
        assert own.metrics["eval_micro_f1"] == pytest.approx(f1_score(y_eval.ravel(), (predicted > 0).ravel()))
        assert own.metrics["eval_exact_match"] == np.mean(((predicted > 0) == y_eval).all(1))


@pytest.mark.parametrize(("kind", "n_outputs"), cases.KINDS)
def test_a_score_says_what_it_measures(kind, n_outputs, tmp_path):
    _, result = score_of(kind, n_outputs, draws=2, repeats=2, head="probe", ntk_params="adapter+head")
    objective, content = result.plan.task.objective, score_content(result)
    name = objective.metric.name
    for part in (content["kernel_regression"], content["head_kernel"]["kernel_regression"]):
        assert part["method"] == "kernel_regression"
        assert {f"{when}_{name}" for when in ("train", "loo", "eval")} <= part.keys()
    assert content["spread"]["draws_of_a"][f"eval_{name}"]["count"] == 2
    assert content["details"]["objective"]["kind"] == kind
    json.loads(to_json(content))
    screen = Console(record=True, width=160)
    print_plan(screen, describe(result.plan), "query")
    print_result(screen, content)
    text = screen.export_text()
    assert f"kernel regression: eval {objective.metric.label}" in text
    assert objective.noun in text
    assert "forecast" not in text.replace("foretune forecast simulates the run.", "")
    save_score(result, tmp_path / "score")
    stored = json.loads((tmp_path / "score" / "result.json").read_text(encoding="utf-8"))
    assert stored["kernel_regression"] == content["kernel_regression"]


@pytest.mark.parametrize(("kind", "n_outputs"), cases.KINDS[2:])
def test_a_probe_is_fitted_without_the_samples_it_is_used_on(kind, n_outputs):
    """Initial outputs are those of the cross-fitted layer, whose inputs are the model's."""
    model, result = score_of(kind, n_outputs, head="probe")
    m, objective = result.measurement, result.plan.task.objective
    inputs = []

    def keep(_module, args, _output):
        inputs.append(args[0][0].detach().numpy())

    handle = model.classifier.register_forward_hook(keep)
    for row in m.train_indices:
        ids = cases.tokenizer()(result.plan.task.train.texts[row])["input_ids"]
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
    handle.remove()
    phi = np.array(inputs)
    for fold in probe_folds(12, seed=0):
        rest = np.setdiff1d(np.arange(12), fold)
        weight, bias = objective.fit_output(phi[rest], m.y_train[rest], intercept=True)
        assert np.allclose(m.f_train_0[fold], phi[fold] @ weight.T + bias, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("kind", "n_outputs", "name"), [("regression", 1, "margin"), ("multi-label", 3, "class:0")])
def test_reductions_of_classes_are_refused(kind, n_outputs, name):
    with pytest.raises(ft.ForetuneError, match="use 'trace', 'full' or 'output:k'"):
        score_of(kind, n_outputs, reduction=name)


def test_the_number_of_outputs_has_to_fit():
    model = cases.tiny("bert", 2)
    classifier = ft.Classifier("m", model, cases.tokenizer(), "checkpoint")
    with pytest.raises(ft.ForetuneError, match="2 outputs, the data set 3 columns: set num_labels=3"):
        prepare(classifier, cases.task_of("regression", 3), cases.lora("bert"), ft.ScoreSettings(**SETTINGS))
