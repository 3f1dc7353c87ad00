"""Encoder-decoders: losses, gradients and sketches are those of a loop over sequences without padding."""

import dataclasses

import pytest
import torch

import pairs
from foretune.errors import KernelError
from foretune.models.placement import read_adapters
from foretune.models.plugged import plugged_in
from foretune.ntk.sequence_features import sequence_features, sequence_kernel
from foretune.ntk.sequence_pass import positions_of
from foretune.ntk.sketches import find_bases, sketch_sequences

WIDE = 64


@pytest.fixture(scope="module", params=sorted(pairs.FAMILIES))
def model(request):
    return pairs.placed(request.param)


@pytest.fixture(scope="module")
def adapted(model):
    return read_adapters(model, draws=1, seed=0)


def sketch(adapted, made, q=WIDE, parts=None, draws=1):
    model = adapted.model
    batches = [pairs.batch_of(model, made, part) for part in (parts or [None])]
    bases = find_bases(adapted, [pairs.batch_of(model, made)], q)
    return sketch_sequences(adapted, batches, bases, n=len(made), draws=draws, storage=torch.float64)


def whole(sketches, site):
    basis = sketches.bases[site]
    return torch.einsum("oa,nkab,ib->nkoi", basis.g, sketches.sketches[site], basis.h)


def weights_of(adapted):
    return [adapter.module.weight for adapter in adapted.adapters]


def test_losses_and_gradients_are_those_of_a_loop_over_sequences(model, adapted):
    made = pairs.sequences()
    sketches = sketch(adapted, made)
    for row, (read, written) in enumerate(made):
        loss, gradients = pairs.loss_and_gradients(model, read, written, weights_of(adapted))
        assert sketches.losses[row] == pytest.approx(loss, abs=1e-10)
        assert sketches.targets[row] == len(written)
        for site, gradient in enumerate(gradients):
            torch.testing.assert_close(whole(sketches, site)[row, 0], gradient, rtol=1e-10, atol=1e-10)
    assert sketches.kept == pytest.approx([1.0] * len(adapted.sites), abs=1e-10)


@pytest.mark.parametrize("name", sorted(pairs.OTHERS))
def test_gradients_of_other_families(name):
    model = pairs.placed(name)
    adapted, made = read_adapters(model, draws=1, seed=0), pairs.sequences(3)
    sketches = sketch(adapted, made)
    for row, (read, written) in enumerate(made):
        loss, gradients = pairs.loss_and_gradients(model, read, written, weights_of(adapted))
        assert sketches.losses[row] == pytest.approx(loss, rel=1e-6)
        for site, gradient in enumerate(gradients):
            found = whole(sketches, site)[row, 0].double()
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-9)


def test_what_sees_positions_of_its_own_is_named():
    model = pairs.placed("led")
    with pytest.raises(
        KernelError, match=r"module '.*longformer_self_attn.query' sees 8 × 3 × 8 numbers of 3 sequences"
    ):
        sketch(read_adapters(model, draws=1, seed=0), pairs.sequences(3))


def test_batches_and_padding_change_nothing(adapted):
    made = pairs.sequences(seed=4)
    together, apart = sketch(adapted, made), sketch(adapted, made, parts=[[2], [4, 1], [3, 0]])
    torch.testing.assert_close(apart.target_losses, together.target_losses, rtol=1e-10, atol=1e-10)
    for site in range(len(adapted.sites)):
        torch.testing.assert_close(whole(apart, site), whole(together, site), rtol=1e-8, atol=1e-9)


def test_few_directions_are_orthonormal_and_keep_a_part(adapted):
    few = sketch(adapted, pairs.sequences(8), q=3)
    for basis in few.bases:
        for q in (basis.g, basis.h):
            torch.testing.assert_close(q.T @ q, torch.eye(q.shape[1], dtype=q.dtype), rtol=1e-5, atol=1e-5)
    assert all(0.05 < share < 1.0 for share in few.kept)


def test_the_kernel_of_the_losses_is_that_of_whole_gradients(model, adapted):
    made = pairs.sequences(4)
    features = sequence_features(adapted, [pairs.batch_of(model, made)], n=4)
    kernel = sequence_kernel(features, "loss-sum").matrices[0]
    found = [pairs.loss_and_gradients(model, *row, weights_of(adapted))[1] for row in made]
    for i in range(4):
        for j in range(4):
            exact = sum(
                adapter.site.scaling**2 * float(((a @ adapter.rows.T) * (b @ adapter.rows.T)).sum())
                for adapter, a, b in zip(adapted.adapters, found[i], found[j], strict=True)
            )
            assert kernel[i, j] == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_the_slope_of_the_loss_along_random_adapters(model, adapted):
    exact = "T5" not in type(model.get_base_model()).__name__  # its norms compute in float32: small steps drown
    made = pairs.sequences()
    batch = pairs.batch_of(model, made)
    sketches = sketch(adapted, made)
    step, weights, slope = 1e-5 if exact else 1e-3, {}, 0.0
    for site, adapter in enumerate(adapted.adapters):
        gradient = whole(sketches, site)[:, 0].sum(0)
        b = gradient @ adapter.rows.T  # uphill
        b /= b.norm()
        weights[adapter.site.name] = (adapter.rows, step * b)
        slope += float((gradient * (b @ adapter.rows)).sum())

    def loss(sign):
        with plugged_in(model, {name: (a, sign * b) for name, (a, b) in weights.items()}), torch.no_grad():
            logits = model(**batch.inputs).logits.flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="sum"))

    assert (loss(1) - loss(-1)) / (2 * step) == pytest.approx(slope, rel=1e-5 if exact else 2e-3)


def test_positions_that_reach_a_loss(model):
    longer = pairs.batch_of(model, [([5, 6, 7, 0], [8, 0]), ([5, 0], [8, 9, 0])])
    found = positions_of(longer)
    assert {length: mask.sum(1).tolist() for length, mask in found.items()} == {4: [4, 2], 3: [2, 3]}
    alike = pairs.batch_of(model, [([5, 6, 0], [8, 0]), ([5, 0], [8, 9, 0])])
    assert {length: mask.sum(1).tolist() for length, mask in positions_of(alike).items()} == {3: [3, 3]}


def test_a_module_that_sees_other_positions_is_named(model, adapted):
    batch = pairs.batch_of(model, [([5, 6, 7, 0], [8, 0]), ([5, 0], [8, 9, 0])])
    inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
    unsaid = dataclasses.replace(batch, inputs={**inputs, "labels": batch.labels})  # the model makes what is read
    with pytest.raises(KernelError, match=r"module '.*encoder.*' sees 2 × 4 × 8 numbers of 2 sequences of 3 positions"):
        find_bases(adapted, [unsaid], WIDE)
