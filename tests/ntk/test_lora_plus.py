from dataclasses import replace

import numpy as np
import pytest

from foretune.errors import KernelError
from foretune.models.placement import place, read_adapters
from foretune.ntk.jacobian import tangent_features
from foretune.ntk.kernel import tangent_kernel
from foretune.ntk.lora_plus import lora_plus
from foretune.tasks.outputs import output_reduction

import cases
import references

RATIO = 16.0


def features_of(model, sequences):
    adapted = replace(read_adapters(model), head={})
    return tangent_features(adapted, [cases.batch_of(sequences)], output_reduction("trace", 2), n=len(sequences))


def gradients(model, sequences, part):
    directions = output_reduction("trace", 2).directions
    return references.parameter_gradients(model, sequences, directions, references.named_parameters(model, part))


def test_the_kernel_of_two_rates_is_that_of_scaled_gradients():
    model = cases.with_nonzero_b(place(cases.tiny("bert"), cases.lora("bert"), seed=0))
    sequences = cases.ragged()
    features = features_of(model, sequences)
    scale = features.reduction.scale
    of_a, of_b = (references.scalar_kernel(gradients(model, sequences, part), scale) for part in ("lora_A", "lora_B"))
    found = tangent_kernel(lora_plus(features, RATIO)).matrices()[0]
    expected = of_a + RATIO * of_b
    assert np.linalg.norm(found - expected) < 1e-10 * np.linalg.norm(expected)


def test_with_b_0_the_ratio_is_a_factor():
    model, sequences = place(cases.tiny("bert"), cases.lora("bert"), seed=0), cases.ragged()
    features = features_of(model, sequences)
    found = tangent_kernel(lora_plus(features, RATIO)).matrices()
    np.testing.assert_allclose(found, RATIO * tangent_kernel(features).matrices(), rtol=1e-12)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ratio_that_is_none_is_refused(ratio):
    features = features_of(place(cases.tiny("bert"), cases.lora("bert"), seed=0), cases.ragged())
    with pytest.raises(KernelError, match="ratio"):
        lora_plus(features, ratio)


def test_a_head_is_refused():
    model, sequences = place(cases.tiny("bert"), cases.lora("bert"), seed=0), cases.ragged()
    adapted, reduction = read_adapters(model), output_reduction("trace", 2)
    features = tangent_features(adapted, [cases.batch_of(sequences)], reduction, n=len(sequences))
    with pytest.raises(KernelError, match="two rates"):
        lora_plus(features, RATIO)
