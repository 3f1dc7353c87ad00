"""The pass over the samples: what it finds out about the head that a run starts from."""

import csv

import datasets
import numpy as np
import pytest
import torch

import foretune as ft
from foretune.cli import run
from foretune.errors import DataError
from foretune.forecasting.survey import check_classes, survey
from foretune.placement import lora_config
from foretune.plan import prepare

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
    held = survey(plan)
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
    for command in (["rank"], ["score", "--curve", "--target-modules", "query"]):
        tokens = [*command, "--model", cases.save(tmp_path / "model"), "--dataset", str(folder)]
        assert run([*tokens, "--samples", "20", "--eval-samples", "4"]) == 2
        message = capsys.readouterr().err
        assert f"each class needs 2 training rows, but 'mixed' has {count} in all: add rows, merge" in message
        assert "--samples" not in message.split("error:")[1]


def test_samples_that_miss_a_class_say_what_shows_it():
    names = [f"c{i}" for i in range(60)]
    with pytest.raises(DataError, match=r"2 of the 5 samples, but 'b' has 1 \(of 3 rows\): raise --samples, or change"):
        check_classes(np.array([0, 0, 0, 0, 1]), ("a", "b"), np.array([9, 3]))
    with pytest.raises(DataError, match=r"'b' has 1 \(of 1 rows\): lower --eval-samples, give") as e:
        check_classes(np.array([0, 0, 0, 0, 1]), ("a", "b"), np.array([4, 1]))
    assert "raise" not in str(e.value)
    with pytest.raises(DataError, match="and 57 more") as e:
        check_classes(np.arange(60), names, np.full(60, 4))
    assert len(str(e.value)) < 300
