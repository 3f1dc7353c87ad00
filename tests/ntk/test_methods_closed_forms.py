"""The closed forms of adapter methods against gradients that autograd takes of each example's outputs."""

import numpy as np
import pytest

import families
import methods
from foretune.models.placement import read_adapters
from foretune.ntk.jacobian import tangent_features
from foretune.ntk.kernel import tangent_kernel
from foretune.tasks.outputs import output_reduction

import cases
import references

TOLERANCE = 1e-10


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def features_of(adapted, sequences, reduction):
    pieces = [cases.batch_of(sequences, rows) for rows in ([4, 1], [0, 5, 3, 2])]
    return tangent_features(adapted, pieces, reduction, n=len(sequences))


def trained_names(model):
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "modules_to_save" not in name
    ]


def assert_equals_autograd(model, output="trace"):
    adapted = read_adapters(model)
    assert not adapted.groups
    sequences = families.ragged()
    reduction = output_reduction(output, 3)
    kernel = tangent_kernel(features_of(adapted, sequences, reduction))
    parameters = dict(model.named_parameters())
    names = trained_names(model)
    assert sum(site.n_parameters for site in adapted.sites) == sum(parameters[name].numel() for name in names)
    gradients = references.parameter_gradients(model, sequences, reduction.directions, [parameters[n] for n in names])
    ends = np.cumsum([parameters[name].numel() for name in names])
    by_name = dict(zip(names, np.split(gradients, ends[:-1], axis=2), strict=True))
    total = 0.0
    for site, block in zip(adapted.sites, kernel.blocks[:, 0].sum(1), strict=True):
        own = [g for name, g in by_name.items() if f".{site.name}." in f".{name}"]
        expected = references.scalar_kernel(np.concatenate(own, axis=2), reduction.scale)
        total = total + expected
        assert np.linalg.norm(block - expected) <= TOLERANCE * max(np.linalg.norm(expected), 1e-3), site.name
    whole = references.scalar_kernel(gradients, reduction.scale)
    assert relative_error(kernel.matrices()[0], whole) < TOLERANCE
    return adapted


@pytest.mark.parametrize(("method", "family"), methods.FAST)
def test_a_new_adapter(method, family):
    assert_equals_autograd(methods.placed(method, family))


@pytest.mark.parametrize(
    ("method", "family"), [(m, f) for m, f in methods.FAST if methods.METHODS[m].trained == "fast"]
)
def test_an_adapter_that_has_trained(method, family):
    assert_equals_autograd(methods.moved(method, methods.placed(method, family)))
