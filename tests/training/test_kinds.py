"""Fine-tunes of every kind of task: metrics are those of the trained model, files and tables name them."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, r2_score

import foretune as ft
from foretune.cli import run
from foretune.models.classifier import load_classifier
from foretune.models.placement import lora_config
from foretune.report.terminal import console
from foretune.settings.commands import TuneSettings
from foretune.settings.groups import AdapterConfig, DataConfig
from foretune.tasks.load import load_task
from foretune.training.plan import prepare_tune
from foretune.training.report import print_tune
from foretune.training.tune import run_tune

import cases

KINDS = ["regression", "multi-label"]
WRITE = {"regression": cases.write_scores, "multi-label": cases.write_tags}
LABELS = {"regression": "Spearman correlation", "multi-label": "micro F1"}
ADAPTER = AdapterConfig(("query", "value"), layers=(0,))
SETTINGS = TuneSettings(epochs=2, learning_rate=3e-3, train_batch_size=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def dataset(kind, tmp_path_factory):
    return WRITE[kind](tmp_path_factory.mktemp(kind))


def plan_of(model, dataset, kind, settings=SETTINGS, dtype="float32"):
    task = load_task(DataConfig(dataset, task=kind))
    classifier = load_classifier(model, label_names=task.label_names, seed=0, task=kind, dtype=dtype)
    return prepare_tune(classifier, task, lora_config(classifier.model, ADAPTER), settings, inplace=True)


@pytest.fixture(scope="module")
def tuned(model, dataset, kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    flags = ["--target-modules", "query", "value", "--layers", "0", "--epochs", "2", "--learning-rate", "3e-3"]
    tokens = ["tune", "--model", model, "--dataset", dataset, "--task", kind, *flags, "--train-batch-size", "8"]
    assert run([*tokens, "--output", str(folder)]) == 0
    return folder


def slow(model, rows, kind):
    """Loss and metrics one row at a time, by the formulas."""
    outputs, targets = [], np.array([record["labels"] for record in rows.records()])
    for record in rows.records():
        inputs = {name: torch.tensor([value]) for name, value in record.items() if name != "labels"}
        with torch.no_grad():
            outputs.append(model(**inputs).logits[0].double().numpy())
    f = np.array(outputs)
    if kind == "regression":
        metrics = {
            "spearman": spearmanr(f[:, 0], targets[:, 0]).statistic,
            "pearson": pearsonr(f[:, 0], targets[:, 0]).statistic,
            "r2": r2_score(targets, f),
        }
        return np.mean((f - targets) ** 2), metrics
    said = f > 0
    metrics = {
        "micro_f1": f1_score(targets, said, average="micro"),
        "macro_f1": f1_score(targets, said, average="macro", zero_division=0.0),
        "exact_match": np.mean((said == targets).all(1)),
    }
    return np.mean(np.logaddexp(0, f) - targets * f), metrics


def test_metrics_are_those_of_the_trained_model(tuned, model, dataset, kind):
    result = json.loads((tuned / "result.json").read_text())
    plan = plan_of(model, dataset, kind)
    options = {"num_labels": len(plan.task.label_names), "problem_type": plan.task.objective.problem_type}
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(str(tuned / "adapter"), **options).eval()
    loss, metrics = slow(loaded, plan.evaluation, kind)
    assert result["final"]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    for name, value in metrics.items():
        assert result["final"][f"eval_{name}"] == pytest.approx(value, abs=1e-5)  # single precision
    loss, metrics = slow(loaded, plan.train_eval, kind)
    main = next(iter(metrics))
    assert result["final"]["train_loss_eval_mode"] == pytest.approx(loss, rel=1e-5)
    assert result["final"][f"train_{main}"] == pytest.approx(metrics[main], abs=1e-5)  # single precision
    assert result["final"]["eval_loss"] < result["before_training"]["eval_loss"]


def test_files_and_tables_name_the_metrics_of_the_kind(tuned, kind, capsys):
    result = json.loads((tuned / "result.json").read_text())
    with (tuned / "history.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [list(epoch) for epoch in result["epochs"]]
    main = "spearman" if kind == "regression" else "micro_f1"
    assert list(rows[0])[4:7] == [f"train_{main}", "eval_loss", f"eval_{main}"]
    assert [float(row[f"eval_{main}"]) for row in rows] == [epoch[f"eval_{main}"] for epoch in result["epochs"]]
    best = max(result["epochs"][1:], key=lambda epoch: epoch[f"eval_{main}"])
    assert result["best_epoch"] == best["epoch"]
    data = result["details"]["data"]
    assert data["task"] == kind
    assert ("eval_target_means" if kind == "regression" else "eval_label_counts") in data
    print_tune(console(), result)
    assert LABELS[kind] in capsys.readouterr().out


def test_a_run_is_replayed_from_its_config(tuned, tmp_path):
    assert run(["tune", "--config", str(tuned / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    first, again = (json.loads((folder / "result.json").read_text()) for folder in (tuned, tmp_path / "again"))
    assert first["final"]["eval_loss"] == again["final"]["eval_loss"]


def test_a_run_that_diverges_says_so(model, dataset, kind, tmp_path, capsys):
    plan = plan_of(model, dataset, kind, dataclasses.replace(SETTINGS, epochs=1))
    with torch.no_grad():
        next(p for name, p in plan.placed.named_parameters() if "lora_B" in name).fill_(float("inf"))
    content = run_tune(plan, tmp_path).to_dict()
    assert content["diverged"]
    assert json.loads(json.dumps(content, allow_nan=False))["best_epoch"] == (None if kind == "regression" else 1)
    print_tune(console(), content)
    assert "diverged" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_weights_of_other_precisions_train(model, dataset, kind, tmp_path, dtype):
    result = run_tune(plan_of(model, dataset, kind, dataclasses.replace(SETTINGS, epochs=1), dtype), tmp_path)
    assert np.isfinite(result.last.eval_loss)


def test_the_users_own_model_is_tuned_and_left_as_it_is(model, dataset, kind):
    task = load_task(DataConfig(dataset, task=kind))
    classifier = load_classifier(model, label_names=task.label_names, seed=0, task=kind)
    classifier.model.config.problem_type = None
    before = {name: p.clone() for name, p in classifier.model.named_parameters()}
    lora = lora_config(classifier.model, ADAPTER)
    result = ft.tune(classifier.model, classifier.tokenizer, lora, task, settings=SETTINGS)
    assert all(torch.equal(p, before[name]) for name, p in classifier.model.named_parameters())
    assert classifier.model.config.problem_type is None
    assert result.last.eval_loss < result.history.epochs[0].eval_loss


def test_several_numbers_are_regressed_on_together(model, tmp_path):
    lines = ["text,length,good"]
    lines += [
        f"{text},{len(text.split())},{float(label == 'positive')}" for text, label in map(cases.review, range(40))
    ]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    tokens = ["tune", "--model", model, "--dataset", str(tmp_path), "--label-column", "length", "good", "--epochs", "1"]
    assert run([*tokens, "--learning-rate", "1e-2", "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["details"]["data"]["task"] == "regression"
    assert result["details"]["data"]["label_names"] == ["length", "good"]
    assert -1 <= result["final"]["eval_spearman"] <= 1
