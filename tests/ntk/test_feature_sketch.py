from dataclasses import replace

import numpy as np
import pytest
import torch

from foretune.models.placement import place, read_adapters
from foretune.ntk.feature_sketch import feature_width, sketch_error, sketched
from foretune.ntk.jacobian import batch_features
from foretune.ntk.kernel import tangent_kernel
from foretune.tasks.outputs import output_reduction

from cases import batch_of, lora, ragged, tiny

SEEDS = 400


def features_of(reduction, n_classes=2, *, draws=2, b=False):
    config = lora("bert", **({"init_lora_weights": False} if b else {}))
    adapted = read_adapters(place(tiny("bert", n_classes), config, seed=0), draws=1 if b else draws, seed=0)
    found = batch_features(adapted, batch_of(ragged()), output_reduction(reduction, n_classes))
    if not b:
        return found
    shape = (found.reduction.n_outputs, found.n, 3)
    return replace(found, v=tuple(1e-2 * torch.randn(shape).double() * b.abs().max() for b in found.b))


CASES = {
    "margin": lambda: features_of("margin"),
    "trace": lambda: features_of("trace", 3),
    "full": lambda: features_of("full", 3),
    "all": lambda: features_of("full", 3, b=True),
}


@pytest.mark.parametrize("name", CASES)
def test_sketches_are_unbiased(name):
    features = CASES[name]()
    exact = tangent_kernel(features).matrices()
    found = np.array([tangent_kernel(sketched(features, 64, seed=seed)).matrices() for seed in range(SEEDS)])
    error = found.std(0, ddof=1) / np.sqrt(SEEDS)
    assert np.all(np.abs(found.mean(0) - exact) <= 5 * error + 1e-12 * np.abs(exact).max())
    assert 0 < error.max() < np.abs(exact).max()
    diagonal = exact.diagonal(axis1=1, axis2=2)
    bound = (diagonal[:, :, None] * diagonal[:, None, :] + exact**2) / 32
    assert np.all(found.var(0, ddof=1) <= 1.5 * bound)


@pytest.mark.parametrize("name", CASES)
def test_the_halves_tell_the_error(name):
    features = CASES[name]()
    exact = tangent_kernel(features).matrices()
    said, true = [], []
    for seed in range(100):
        sketch = sketched(features, 64, seed=seed)
        found = tangent_kernel(sketch).matrices()
        said.append(np.square(sketch_error([sketch])) * np.sum(found**2, axis=(1, 2)))
        true.append(np.sum((found - exact) ** 2, axis=(1, 2)))
    assert np.mean(said) == pytest.approx(np.mean(true), rel=0.3)
    wide, narrow = (
        np.mean([sketch_error([sketched(features, width, seed=s)]) for s in range(9)]) for width in (512, 8)
    )
    assert wide < narrow / 3


def test_the_error_of_tiles_is_that_of_the_whole():
    features = features_of("margin", draws=3)
    whole = sketched(features, 32, seed=1)
    parts = [
        replace(whole, b=tuple(b[:, rows] for b in whole.b), logits=whole.logits[rows])
        for rows in (slice(0, 2), slice(2, 6))
    ]
    assert sketch_error(parts) == pytest.approx(sketch_error([whole]))
    assert len(sketch_error(parts)) == 3


def test_features_are_counted():
    plain, every = features_of("full", 3, draws=1), features_of("full", 3, b=True)
    count = sum(b[0, 0].numel() for b in plain.b)
    assert feature_width(plain.sites, of_a=False, outputs=1) == count
    assert feature_width(plain.sites, of_a=False, outputs=2) == 2 * count
    assert feature_width(every.sites, of_a=True, outputs=1) == count + sum(a[0, 0].numel() for a in every.a)


def test_one_seed_gives_one_sketch():
    features = features_of("margin")
    one, same, other = (sketched(features, 16, seed=seed).b[0] for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
