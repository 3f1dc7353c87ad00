import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foretune.errors import KernelError
from foretune.language.encode import NO_LOSS
from foretune.models.placement import read_adapters
from foretune.ntk.sequence_losses import SequenceBatch, sequence_losses
from foretune.ntk.sketches import find_bases, sketch_sequences, sketch_width

import sequences as made

WIDE = 64  # wider than every module: nothing is left out


@pytest.fixture(scope="module")
def model():
    return made.adapted(made.tiny_language_model())


@pytest.fixture(scope="module")
def adapted(model):
    return read_adapters(model, draws=1, seed=0)


def sketch(adapted, rows, q=WIDE, draws=2, parts=None, **options):
    batches = [made.batch_of(rows, part) for part in (parts or [None])]
    bases = find_bases(adapted, [made.batch_of(rows)], q)
    return sketch_sequences(adapted, batches, bases, n=len(rows), draws=draws, storage=torch.float64, **options)


def weights_of(adapted):
    return [adapter.module.weight for adapter in adapted.adapters]


def whole(sketches, site):
    """Sketches back in the module's own coordinates: n × k × d_out × d_in."""
    basis = sketches.bases[site]
    return torch.einsum("oa,nkab,ib->nkoi", basis.g, sketches.sketches[site], basis.h)


def test_losses_and_gradients_are_those_of_a_loop_over_sequences(model, adapted):
    rows = made.sequences()
    sketches = sketch(adapted, rows)
    for row, (ids, labels) in enumerate(rows):
        loss, gradients = made.loss_and_gradients(model, ids, labels, weights_of(adapted))
        assert sketches.losses[row] == pytest.approx(loss, abs=1e-10)
        assert sketches.targets[row] == sum(label != NO_LOSS for label in labels[1:])
        for site, gradient in enumerate(gradients):
            torch.testing.assert_close(whole(sketches, site)[row, 0], gradient, rtol=1e-10, atol=1e-10)
    assert sketches.kept == pytest.approx([1.0] * len(adapted.sites), abs=1e-10)


def test_drawn_labels_give_the_gradient_of_their_loss(model, adapted):
    rows = made.sequences()
    sketches = sketch(adapted, rows, draws=3, seed=4)
    with torch.no_grad():
        logits = model(**made.batch_of(rows).inputs).logits
    for row, (ids, labels) in enumerate(rows):
        count = sum(label != NO_LOSS for label in labels[1:])
        uniform = np.random.default_rng([4, row]).random((count, 3))
        for draw in range(3):
            drawn, number = list(labels), 0
            for position in range(1, len(ids)):
                if labels[position] != NO_LOSS:
                    reached = np.cumsum(torch.softmax(logits[row, position - 1], 0).numpy())
                    drawn[position] = int(np.searchsorted(reached, uniform[number, draw]))
                    number += 1
            _, gradients = made.loss_and_gradients(model, ids, drawn, weights_of(adapted))
            for site, gradient in enumerate(gradients):
                torch.testing.assert_close(whole(sketches, site)[row, 1 + draw], gradient, rtol=1e-10, atol=1e-10)


def test_the_sketch_of_the_fisher_matrix_is_unbiased():
    model = made.adapted(made.tiny_language_model(vocabulary=5), targets=("v_proj",))
    adapted = read_adapters(model, draws=1, seed=0)
    (ids, labels), draws = made.sequences(1, longest=4, vocabulary=5)[0], 3000
    sketches = sketch(adapted, [(ids, labels)], draws=draws)
    drawn = whole(sketches, 0)[0, 1:].flatten(1)
    exact = made.exact_fisher(model, ids, labels, weights_of(adapted)[0])
    error = (drawn.T @ drawn / draws - exact).norm() / exact.norm()
    assert error < 0.08  # falls as 1/√draws
    few = drawn[:30].T @ drawn[:30] / 30
    assert error < (few - exact).norm() / exact.norm() / 3
    assert (drawn.mean(0).norm() / exact.trace().sqrt()) < 0.05  # their mean is 0


@given(seed=st.integers(0, 10**6), cut=st.integers(1, 4))
def test_batches_change_nothing(model, adapted, seed, cut):
    rows = made.sequences(seed=seed)
    together = sketch(adapted, rows)
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    apart = sketch(adapted, rows, parts=[order[:cut], order[cut:]])
    torch.testing.assert_close(apart.target_losses, together.target_losses, rtol=1e-9, atol=1e-9)
    for site in range(len(adapted.sites)):
        torch.testing.assert_close(whole(apart, site), whole(together, site), rtol=1e-8, atol=1e-9)


def test_fewer_directions_keep_the_part_that_lies_in_them(adapted):
    rows = made.sequences(8)
    exact, few = sketch(adapted, rows), sketch(adapted, rows, q=3)
    for site, basis in enumerate(few.bases):
        for q in (basis.g, basis.h):
            torch.testing.assert_close(q.T @ q, torch.eye(q.shape[1], dtype=q.dtype), rtol=1e-5, atol=1e-5)
        gradients = whole(exact, site)
        inside = torch.einsum("oa,nkoi,ib->nkab", basis.g.double(), gradients, basis.h.double())
        torch.testing.assert_close(few.sketches[site], inside, rtol=1e-5, atol=1e-6)
        share = inside[:, 0].square().sum() / gradients[:, 0].square().sum()
        assert few.kept[site] == pytest.approx(float(share), rel=1e-5)
        assert 0.2 < few.kept[site] < 1.0


def test_principal_directions_keep_more_than_random_ones(adapted):
    rows = made.sequences(8)
    few = sketch(adapted, rows, q=4)
    generator = torch.Generator().manual_seed(0)

    def turned(q):
        return torch.linalg.qr(torch.randn(q.shape, generator=generator, dtype=torch.float64)).Q.to(q.dtype)

    bases = [dataclasses.replace(basis, h=turned(basis.h), g=turned(basis.g)) for basis in few.bases]
    other = sketch_sequences(adapted, [made.batch_of(rows)], bases, n=8, draws=1)
    assert np.mean(few.kept) > np.mean(other.kept) + 0.1


def test_width_is_what_fits(adapted):
    sites = adapted.sites
    needed = lambda q: 2 * 10 * 3 * sum(min(q, s.d_in) * min(q, s.d_out) for s in sites)  # noqa: E731
    assert sketch_width(sites, 10, 2, 10**12) == max(max(s.d_in, s.d_out) for s in sites)
    q = sketch_width(sites, 10, 2, needed(8))
    assert q >= 8
    assert needed(q) <= needed(8)
    with pytest.raises(KernelError, match="raise the memory"):
        sketch_width(sites, 10, 2, needed(8) - 1)


@pytest.mark.parametrize("fault", ["trained", "training", "rows", "shape", "label"])
def test_faults_are_named(fault):
    model = made.adapted(made.tiny_language_model())
    rows = made.sequences(3)
    adapted = read_adapters(model, draws=1, seed=0)
    if fault == "trained":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(1.0)
        adapted = read_adapters(model, draws=1, seed=0)
        with pytest.raises(KernelError, match="B ≠ 0"):
            sketch(adapted, rows)
    elif fault == "training":
        model.train()
        with pytest.raises(KernelError, match="eval"):
            sketch(adapted, rows)
    elif fault == "rows":
        with pytest.raises(KernelError, match="exactly once"):
            sketch(adapted, rows, parts=[[0, 1], [1, 2]])
    elif fault == "shape":  # a position less
        batch = made.batch_of(rows)
        with pytest.raises(KernelError, match="only causal language models"):
            sequence_losses(torch.zeros(3, batch.labels.shape[1] - 1, 4), batch, 1, seed=0)
    else:
        batch = made.batch_of(rows)
        beyond = SequenceBatch(batch.rows, batch.inputs, torch.where(batch.labels > 0, 99, batch.labels))
        with pytest.raises(KernelError, match="tokenizer of the model"):
            sequence_losses(torch.zeros(*batch.labels.shape, made.VOCABULARY), beyond, 1, seed=0)
