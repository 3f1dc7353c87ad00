"""PLoP and KappaTune by their definitions, and as peft has the latter."""

import math

import numpy as np
import pytest
import torch
from peft import helpers
from torch import nn
from transformers.pytorch_utils import Conv1D

from foretune.errors import ConfigError
from foretune.evaluation.weights import kappa_tune_scores, plop_scores


def model():
    layers = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4, bias=False), nn.Tanh(), Conv1D(5, 4))
    nn.init.normal_(layers[0].bias)
    nn.init.normal_(layers[4].bias)
    return layers, {"first": layers[0], "second": layers[2], "last": layers[4]}


def test_plop_by_its_definition():
    layers, modules = model()
    batches = [torch.randn(3, 5, 12), torch.randn(2, 7, 12)]
    found = plop_scores(modules, lambda: [layers(batch) for batch in batches])
    tokens = torch.cat([batch.flatten(0, 1) for batch in batches]).double()
    for name, module in modules.items():
        weight = module.weight.detach().double()
        weight = weight.T if isinstance(module, Conv1D) else weight
        ratios = []
        for x in tokens:
            random = math.sqrt(sum(float(weight[:, j] @ weight[:, j]) for j in range(len(x))) / len(x))
            ratios.append(float(torch.linalg.norm(weight @ x) / (torch.linalg.norm(x) * random)))
        assert found[name] == pytest.approx(np.mean(ratios), rel=1e-5)
        bias = 0 if module.bias is None else module.bias.detach().double()
        tokens = torch.tanh(tokens @ weight.T + bias)
    assert list(found) == list(modules)


def test_plop_of_random_inputs_is_one_and_of_aligned_ones_above():
    layer = nn.Linear(64, 64, bias=False)
    random = plop_scores({"m": layer}, lambda: layer(torch.randn(4000, 64)))["m"]
    assert random == pytest.approx(1.0, abs=0.02)  # the drawn denominator has this mean
    top = torch.linalg.svd(layer.weight.detach())[2][0]
    assert plop_scores({"m": layer}, lambda: layer(3.0 * top[None]))["m"] > 1.5


def test_plop_leaves_padding_out_where_it_is_told():
    layers, modules = model()
    x, mask = torch.randn(2, 6, 12), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    whole = plop_scores(modules, lambda: (layers(x[0]), layers(x[1, :2])))
    assert plop_scores(modules, lambda: layers(x), kept=lambda: mask) == pytest.approx(whole, rel=1e-6)
    assert plop_scores(modules, lambda: layers(x)) != pytest.approx(whole, rel=1e-3)
    for other in (x.transpose(0, 1), x.flatten(0, 1)):  # positions first; in one row
        assert plop_scores(modules, lambda other=other: layers(other), kept=lambda: mask) == pytest.approx(
            whole, rel=1e-6
        )
    pooled = plop_scores(modules, lambda: layers(x[:, 0]), kept=lambda: mask)  # one vector for each text
    assert pooled == pytest.approx(plop_scores(modules, lambda: layers(x[:, 0])), rel=1e-12)


def test_plop_of_zeros_and_of_a_module_that_is_not_called():
    layers, modules = model()
    assert math.isnan(plop_scores({"m": layers[0]}, lambda: layers(torch.zeros(3, 12)))["m"])
    with torch.no_grad():
        layers[2].weight.zero_()
    assert math.isnan(plop_scores(modules, lambda: layers(torch.ones(3, 12)))["second"])
    with pytest.raises(ConfigError, match="'second' was not called"):
        plop_scores(modules, lambda: layers[0](torch.ones(3, 12)))
    assert not any(module._forward_hooks for module in modules.values())


def test_kappa_tune_by_eigenvalues():
    _, modules = model()
    found = kappa_tune_scores(modules)
    for name, module in modules.items():
        weight = module.weight.detach().double().numpy()
        small = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        values = np.sqrt(np.linalg.eigvalsh(small))
        assert found[name] == pytest.approx(values[-1] / values[0], rel=1e-6)
    zeros = nn.Linear(3, 3)
    nn.init.zeros_(zeros.weight)
    assert kappa_tune_scores({"m": zeros}) == {"m": 0.0}


@pytest.mark.skipif(not hasattr(helpers, "KappaTuneSelector"), reason="peft without KappaTune")
def test_kappa_tune_orders_as_peft_does():
    modules = nn.ModuleDict({f"layer{i}": nn.Linear(10 + 3 * i, 10) for i in range(5)})
    scores = kappa_tune_scores(dict(modules))
    selector = helpers.KappaTuneSelector(modules, show_progress=False)
    assert selector.get_best_targets() == sorted(scores, key=scores.get)
