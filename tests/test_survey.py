"""The pass over the samples: what it finds out about the head that a run starts from."""

import pytest
import torch

import foretune as ft
from foretune.forecasting.survey import survey
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
