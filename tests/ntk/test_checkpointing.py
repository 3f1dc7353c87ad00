"""Gradient checkpointing runs a part of the model again in the backward pass: that is no other use of its modules."""

import warnings
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from foretune.errors import KernelError
from foretune.models.placement import place, read_adapters
from foretune.ntk.factors import adapter_features, token_factors
from foretune.ntk.jacobian import tangent_features
from foretune.ntk.kernel import tangent_kernel
from foretune.tasks.outputs import output_reduction

import cases

LAYERS = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "llama": "model.layers",
    "gpt2": "transformer.h",
}
FULL = output_reduction("full", 2)


def again(forward, use_reentrant, *args, **options):
    return checkpoint(lambda *inputs: forward(*inputs, **options), *args, use_reentrant=use_reentrant)


def adapted_of(name, use_reentrant=None):
    """Checkpointed whatever transformers says of it: in eval mode, and inside the user's own code."""
    model = cases.tiny(name)
    model.config.use_cache = False
    if use_reentrant is not None:
        for layer in model.get_submodule(LAYERS[name]):
            layer.forward = partial(again, layer.forward, use_reentrant)
    return read_adapters(place(model, cases.lora(name), seed=0, inplace=True), draws=2)


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_kernels_are_those_without(name):
    batch = cases.batch_of(cases.ragged())
    expected, found = (tangent_features(adapted_of(name, forced), [batch], FULL, n=6) for forced in (None, False))
    for own, reference in zip((*found.b, found.logits), (*expected.b, expected.logits), strict=True):
        assert torch.equal(own, reference)
    one, other = (tangent_kernel(each).matrices(with_head=True) for each in (found, expected))
    assert (one == other).all()


def test_token_factors_are_those_without():
    batch, margin = cases.batch_of(cases.ragged()), output_reduction("margin", 2)
    both = []
    for forced in (None, False):
        adapted = adapted_of("bert", forced)
        factors = token_factors(adapted, [batch], margin, n=6, storage=torch.float64)
        both.append(adapter_features(factors, [each.rows for each in adapted.adapters], draws=2).b)
    for own, reference in zip(*both, strict=True):
        assert torch.equal(own, reference)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_is_refused():
    with pytest.raises(KernelError, match=r"runs without gradients.*use_reentrant=False"):
        tangent_features(adapted_of("bert", True), [cases.batch_of(cases.ragged())], FULL, n=6)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_as_transformers_switches_it_on(name, use_reentrant):
    batch = cases.batch_of(cases.ragged())
    adapted = adapted_of(name)
    expected = tangent_features(adapted, [batch], FULL, n=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the name of the method changes with the version
        adapted.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = tangent_features(adapted, [batch], FULL, n=6)
    for own, reference in zip(found.b, expected.b, strict=True):
        assert torch.equal(own, reference)
