"""The pass over the samples: what it finds out about the head that a run starts from."""

import csv
import dataclasses

import datasets
import numpy as np
import pytest
import torch

import foretune as ft
from foretune.cli import run
from foretune.errors import DataError
from foretune.forecasting.linearise import linearise
from foretune.models.placement import lora_config
from foretune.ntk.probe import probe_folds
from foretune.problem import prepare
from foretune.tasks.classification import Classification

import cases


@pytest.mark.parametrize(
    ("name", "activation"), [("roberta", "tanh"), ("mpnet", "tanh"), ("distilbert", "relu"), ("bert", None)]
)
def test_the_hidden_layer_of_the_head_is_found(name, activation, tmp_path):
    task = ft.load_task(ft.DataConfig(cases.write_reviews(tmp_path / "reviews")))
    given = ft.load_classifier(cases.save(tmp_path / "model", name), label_names=task.label_names, seed=0)
    config = lora_config(given.model, ft.AdapterConfig(("all-linear",), None, 2))
    settings = ft.ScoreSettings(samples=12, eval_samples=6, draws=1, reduction="margin")
    plan = prepare(given, task, config, settings)
    before = {key: value.clone() for key, value in plan.placed.state_dict().items()}
    held = linearise(plan)
    after = plan.placed.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    layer = held.head.layer
    if activation is None:
        assert layer is None
        return
    assert layer.activation == activation
    # what is simulated before a step is what the model says
    function = {"tanh": torch.tanh, "relu": torch.relu}[activation]
    h = held.train.factors.hidden[0].h.float()
    phi = function(h @ layer.weight.T + layer.bias)
    assert torch.allclose(phi, held.train.factors.inputs, atol=0.02)  # h is kept in bfloat16


def test_each_example_is_seen_by_a_probe_fitted_without_it(tmp_path):
    """Change one label: nothing of that example changes, in the other folds something does."""
    task = ft.load_task(ft.DataConfig(cases.write_reviews(tmp_path / "reviews")))
    given = ft.load_classifier(cases.save(tmp_path / "model"), label_names=task.label_names, seed=0)
    config = lora_config(given.model, ft.AdapterConfig(("query",), None, 2))
    settings = ft.ScoreSettings(samples=20, eval_samples=6, draws=1, reduction="margin")
    plan = prepare(given, task, config, settings)
    before = linearise(plan).train
    folds = probe_folds(20, seed=settings.seed)
    for index, fold in enumerate(folds):
        assert set(np.flatnonzero(before.fold.numpy() == index)) == set(fold)
    changed = int(folds[2][0])
    labels = task.train.labels.copy()
    labels[plan.sample.train_indices[changed]] ^= 1
    other = dataclasses.replace(task, train=dataclasses.replace(task.train, labels=labels))
    after = linearise(dataclasses.replace(plan, task=other)).train
    assert after.labels[changed] != before.labels[changed]
    inside = set(folds[2])
    moved = (before.factors.logits != after.factors.logits).any(dim=1).numpy()
    for example in range(20):
        assert moved[example] == (example not in inside)
    assert torch.equal(before.lifts[2], after.lifts[2])
    assert not any(torch.equal(before.lifts[fold], after.lifts[fold]) for fold in (0, 1, 3, 4))


@pytest.mark.parametrize("probe", [True, False])
def test_gradients_are_those_under_the_head_of_the_fold(probe, tmp_path):
    """At the model's own head without a probe: the logits are then the model's."""
    task = ft.load_task(ft.DataConfig(cases.write_reviews(tmp_path / "reviews")))
    given = ft.load_classifier(cases.save(tmp_path / "model"), label_names=task.label_names, seed=0)
    config = lora_config(given.model, ft.AdapterConfig(("query",), None, 2))
    plan = prepare(given, task, config, ft.ScoreSettings(samples=20, eval_samples=6, draws=1, reduction="margin"))
    held = linearise(plan, probe=probe)
    for sample in (held.train, held.evaluation):
        own = sample.factors.inputs.float() @ held.head.weight.T + held.head.bias
        assert torch.allclose(sample.factors.logits.float(), own, atol=1e-5) != probe
    assert len(held.train.lifts) == (5 if probe else 1)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("count", [0, 1])
def test_a_class_that_is_too_rare_is_said_to_be(tmp_path, held_out, count, capsys):
    folder = tmp_path / "reviews"
    cases.write_reviews(folder, n_eval=2 if held_out else 20)
    if held_out:
        (folder / "validation.csv").unlink()
    with (folder / "train.csv").open("a", encoding="utf-8") as file:
        file.write("the film was odd,mixed\n" * count)
    if count == 0:  # a class that has a name and no row
        with (folder / "train.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        names = datasets.ClassLabel(names=["mixed", "negative", "positive"])
        features = datasets.Features({"text": datasets.Value("string"), "label": names})
        columns = {"text": [row["text"] for row in rows], "label": [names.str2int(row["label"]) for row in rows]}
        datasets.Dataset.from_dict(columns, features).to_parquet(str(folder / "train.parquet"))
        (folder / "train.csv").unlink()
    for command in (["rank"], ["forecast", "--target-modules", "query"]):
        tokens = [*command, "--model", cases.save(tmp_path / "model"), "--dataset", str(folder)]
        assert run([*tokens, "--samples", "20", "--eval-samples", "4"]) == 2
        message = capsys.readouterr().err
        assert f"each class needs 2 training rows, but 'mixed' has {count} in all: add rows, merge" in message
        assert "--samples" not in message.split("error:")[1]


def test_samples_that_miss_a_class_say_what_shows_it():
    names = tuple(f"c{i}" for i in range(60))
    with pytest.raises(DataError, match=r"2 of the 5 samples, but 'b' has 1 \(of 3 rows\): raise --samples, or change"):
        Classification(("a", "b")).check_sample(np.array([0, 0, 0, 0, 1]), np.repeat([0, 1], [9, 3]))
    with pytest.raises(DataError, match=r"'b' has 1 \(of 1 rows\): give a validation split") as e:
        Classification(("a", "b")).check_sample(np.array([0, 0, 0, 0, 1]), np.repeat([0, 1], [4, 1]))
    assert "raise" not in str(e.value)
    with pytest.raises(DataError, match="and 57 more") as e:
        Classification(names).check_sample(np.arange(60), np.repeat(np.arange(60), 4))
    assert len(str(e.value)) < 300
