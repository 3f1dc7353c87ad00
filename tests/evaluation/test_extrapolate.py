"""Baselines of placements, weights and first steps."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import helpers
from scipy.optimize import least_squares
from torch import nn
from transformers.pytorch_utils import Conv1D

from foretune.errors import ConfigError, KernelError
from foretune.evaluation.extrapolate import extrapolate
from foretune.evaluation.gradients import gradient_norm, page
from foretune.evaluation.weights import kappa_tune_scores, plop_scores


def gradients(n=7, outputs=1, seed=0):
    """Gradients of the outputs, n × outputs × parameters, and slopes of the loss."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, outputs, 11)), rng.standard_normal((n, outputs))


def test_placement_baselines_by_their_gradients():
    jacobian, chi = gradients()
    kernel = jacobian[:, 0] @ jacobian[:, 0].T
    losses = [chi[i, 0] * jacobian[i, 0] for i in range(7)]
    assert gradient_norm(kernel, chi[:, 0]) == pytest.approx(np.linalg.norm(np.mean(losses, axis=0)), rel=1e-12)
    assert page(kernel, chi[:, 0]) == pytest.approx(np.mean([loss @ loss for loss in losses]), rel=1e-12)
    assert gradient_norm(kernel, chi) == gradient_norm(kernel, chi[:, 0])
    assert page(kernel, chi) == page(kernel, chi[:, 0])


def test_placement_baselines_of_a_block_kernel():
    jacobian, chi = gradients(outputs=3)
    rows = jacobian.reshape(21, 11)
    losses = [chi[i] @ jacobian[i] for i in range(7)]
    assert gradient_norm(rows @ rows.T, chi) == pytest.approx(np.linalg.norm(np.mean(losses, axis=0)), rel=1e-12)
    assert page(rows @ rows.T, chi) == pytest.approx(np.mean([loss @ loss for loss in losses]), rel=1e-12)


def test_a_kernel_that_the_outputs_share():
    jacobian, chi = gradients()
    _, chi = gradients(outputs=3, seed=1)
    kernel = jacobian[:, 0] @ jacobian[:, 0].T
    block = np.kron(kernel, np.eye(3))
    assert gradient_norm(kernel, chi) == pytest.approx(gradient_norm(block, chi), rel=1e-12)
    assert page(kernel, chi) == pytest.approx(page(block, chi), rel=1e-12)


@pytest.mark.parametrize("baseline", [gradient_norm, page])
@pytest.mark.parametrize("shape", [(6,), (5, 2), (0,), (2, 2, 2)])
def test_slopes_that_do_not_fit_are_refused(baseline, shape):
    with pytest.raises(KernelError, match="do not fit a kernel of shape"):
        baseline(np.eye(8), np.ones(shape))


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


def slow_extrapolation(steps, values, at):
    """All three numbers by descent, from several starts."""
    ends = [
        least_squares(
            lambda p: p[0] + p[1] * steps ** -p[2] - values,
            [values[-1], values[0] - values[-1], power],
            bounds=([-np.inf, -np.inf, 0.1], [np.inf, np.inf, 2.0]),
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
            max_nfev=3000,
        )
        for power in (0.15, 0.5, 1.0, 1.9)
    ]
    a, b, c = min(ends, key=lambda end: end.cost).x
    return a + b * at**-c


@pytest.mark.parametrize(("a", "b", "c"), [(0.2, 1.0, 0.5), (0.9, -0.4, 1.3), (0.0, 2.0, 0.1), (0.3, 1.0, 2.0)])
def test_a_power_law_is_continued(a, b, c):
    steps = np.arange(1, 11)
    assert extrapolate(steps, a + b * steps**-c, 200) == pytest.approx(a + b * 200.0**-c, abs=1e-4)
    assert extrapolate(7 * steps, a + b * steps**-c, 1400) == pytest.approx(a + b * 200.0**-c, abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_noisy_values_are_fitted_by_least_squares(seed):
    steps = np.arange(5.0, 105.0, 5.0)
    values = 0.3 + steps**-0.6 + 0.03 * np.random.default_rng(seed).standard_normal(20)
    assert extrapolate(steps, values, 500.0) == pytest.approx(slow_extrapolation(steps, values, 500.0), abs=1e-4)


@given(
    points=st.lists(
        st.tuples(st.integers(0, 20), st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf])), max_size=12
    ),
    at=st.integers(1, 1000),
)
@settings(max_examples=60)
def test_nothing_observed_is_too_odd_to_extrapolate(points, at):
    found = extrapolate([step for step, _ in points], [value for _, value in points], at)
    finite = sorted(((s, v) for s, v in points if math.isfinite(v)), key=lambda point: point[0])
    assert isinstance(found, float)
    if not finite:
        assert math.isnan(found)
    elif len({step for step, _ in finite if step > 0}) < 3:
        assert found == finite[-1][1]
    else:
        assert math.isfinite(found)


def test_three_points_are_fitted_and_two_are_not():
    steps = np.array([1.0, 2.0, 4.0])
    assert extrapolate(steps, 0.2 + steps**-1.0, 100) == pytest.approx(0.21, abs=1e-4)
    assert extrapolate(steps[:2], 0.2 + steps[:2] ** -1.0, 100) == 0.7


def test_flat_values_stay():
    assert extrapolate([1, 2, 3, 4], [0.7, 0.7, 0.7, 0.7], 100) == 0.7
