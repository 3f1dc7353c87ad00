"""Features and kernels of sequences against loops over sequences by autograd, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foretune.errors import ConfigError, KernelError
from foretune.language.encode import NO_LOSS
from foretune.models.placement import place, read_adapters
from foretune.ntk.sequence_features import (
    check_kernel_name,
    feature_bytes,
    sequence_features,
    sequence_kernel,
)

import sequences as made


@pytest.fixture(scope="module")
def model():
    return made.adapted(made.tiny_language_model())


@pytest.fixture(scope="module")
def adapted(model):
    return read_adapters(model, draws=1, seed=0)


@pytest.fixture(scope="module")
def trained():
    """The same with B ≠ 0."""
    model = made.adapted(made.tiny_language_model())
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def features_of(adapted, rows, parts=None, draws=0, **options):
    batches = [made.batch_of(rows, part) for part in (parts or [None])]
    return sequence_features(adapted, batches, n=len(rows), draws=draws, **options)


def of_adapter(model, part):
    return [p for name, p in model.named_parameters() if part in name and p.numel()]


def counts(rows):
    return np.array([sum(label != NO_LOSS for label in labels[1:]) for _, labels in rows])


def drawn_labels(model, rows, draws, seed):
    """The labels that are drawn, by the inverse of the distribution function, sequence by sequence."""
    found = []
    for row, (ids, labels) in enumerate(rows):
        with torch.no_grad():
            p = torch.softmax(model(input_ids=torch.tensor([ids])).logits[0], dim=1).numpy()
        uniform = np.random.default_rng([seed, row]).random((int(counts(rows)[row]), draws))
        of_row = []
        for draw in range(draws):
            drawn, number = list(labels), 0
            for position in range(1, len(ids)):
                if labels[position] != NO_LOSS:
                    drawn[position] = int(np.searchsorted(np.cumsum(p[position - 1]), uniform[number, draw]))
                    number += 1
            of_row.append(drawn)
        found.append(of_row)
    return found


def jacobian(model, rows, part="lora_"):
    """n × P gradients of the losses with respect to the adapter."""
    weights = of_adapter(model, part)
    found = [made.loss_and_gradients(model, ids, labels, weights) for ids, labels in rows]
    return np.stack([torch.cat([g.flatten() for g in gradients]).numpy() for _, gradients in found])


def test_gradients_are_those_of_peft_by_autograd(model, adapted):
    rows = made.sequences()
    features = features_of(adapted, rows)
    weights = of_adapter(model, "lora_B")
    for row, (ids, labels) in enumerate(rows):
        loss, gradients = made.loss_and_gradients(model, ids, labels, weights)
        assert float(features.losses[row]) == pytest.approx(loss, abs=1e-10)
        for site, gradient in enumerate(gradients):
            torch.testing.assert_close(features.tangent.b[site][0, row].T, gradient, rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(features.targets.numpy(), counts(rows))
    assert all(a is None for a in features.tangent.a)
    assert np.abs(jacobian(model, rows, "lora_A")).max() == 0.0


def test_gradients_of_a_trained_adapter_are_those_of_a_and_b(trained):
    rows, adapted = made.sequences(), read_adapters(trained, draws=4, seed=0)
    assert adapted.draws == 1
    features = features_of(adapted, rows)
    for part, of_part in (("lora_B", features.tangent.b), ("lora_A", features.tangent.a)):
        weights = of_adapter(trained, part)
        for row, (ids, labels) in enumerate(rows):
            _, gradients = made.loss_and_gradients(trained, ids, labels, weights)
            for found, gradient in zip(of_part, gradients, strict=True):
                own = found[0, row].T if part == "lora_B" else found[0, row]
                torch.testing.assert_close(own, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["new", "trained"])
def test_loss_kernels_are_products_of_gradients(model, trained, kind):
    rows, chosen = made.sequences(), model if kind == "new" else trained
    features = features_of(read_adapters(chosen, draws=1, seed=0), rows)
    j = jacobian(chosen, rows)
    per_token = j / counts(rows)[:, None]
    for name, wanted in (("loss", per_token @ per_token.T), ("loss-sum", j @ j.T)):
        kernel = sequence_kernel(features, name)
        np.testing.assert_allclose(kernel.matrices[0], wanted, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(kernel.site_traces.sum(0), np.trace(wanted), rtol=1e-10)
        assert kernel.rows_per_sequence == 1


@pytest.mark.parametrize("with_loss", [False, True])
def test_the_fisher_kernel_is_that_of_drawn_labels(model, adapted, with_loss):
    rows, draws = made.sequences(), 3
    labels = drawn_labels(model, rows, draws, seed=4)
    pairs = [(ids, drawn) for (ids, _), of_row in zip(rows, labels, strict=True) for drawn in of_row]
    j = jacobian(model, pairs) / np.sqrt(np.repeat(counts(rows), draws) * draws)[:, None]
    features = features_of(adapted, rows, draws=draws, seed=4, with_loss=with_loss)
    kernel = sequence_kernel(features, "fisher")
    np.testing.assert_allclose(kernel.matrices[0], j @ j.T, rtol=1e-10, atol=1e-10)
    assert (kernel.rows_per_sequence, features.label_draws) == (draws, draws)


def test_eigenvalues_of_the_fisher_kernel_approach_those_of_the_fisher_matrix():
    model = made.adapted(made.tiny_language_model(vocabulary=5), targets=("v_proj",), r=2)
    adapted, rows = read_adapters(model, draws=1, seed=0), made.sequences(2, longest=5, vocabulary=5)
    weights = of_adapter(model, "lora_B")
    exact = 0.0
    for (ids, labels), count in zip(rows, counts(rows), strict=True):
        blocks = [made.exact_fisher(model, ids, labels, weight) for weight in weights]
        assert len(blocks) == 2  # of two layers; a site by itself is looked at
        exact = exact + blocks[0].detach().numpy() / count / len(rows)
    one = type(adapted)(model, adapted.adapters[:1], 1, {}, adapted.forward)
    errors = []
    for draws in (12, 1200):
        kernel = sequence_kernel(features_of(one, rows, draws=draws, with_loss=False), "fisher")
        found = np.linalg.eigvalsh(kernel.matrices[0])[::-1] / len(rows)
        wanted = np.linalg.eigvalsh(exact)[::-1]
        size = min(len(found), len(wanted))
        errors.append(np.abs(found[:size] - wanted[:size]).max() / wanted[0])
        assert np.abs(found[size:]).max(initial=0.0) < 1e-12 * wanted[0]  # no more than there are parameters
    assert errors[1] < 0.08
    assert errors[1] < errors[0] / 3  # falls as 1/√draws


@given(seed=st.integers(0, 10**6), cut=st.integers(1, 4))
def test_batches_change_nothing(adapted, seed, cut):
    rows = made.sequences(seed=seed)
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    together, apart = (features_of(adapted, rows, parts=parts, draws=2) for parts in (None, [order[:cut], order[cut:]]))
    torch.testing.assert_close(apart.losses, together.losses, rtol=1e-9, atol=1e-9)
    for name in ("loss", "loss-sum", "fisher"):
        one, other = (sequence_kernel(features, name).matrices for features in (together, apart))
        np.testing.assert_allclose(other, one, rtol=1e-8, atol=1e-9 * np.abs(one).max())


def test_draws_of_a_from_one_pass_are_adapters_of_their_own():
    base, rows = made.tiny_language_model(), made.sequences()
    config = made.adapted(made.tiny_language_model()).active_peft_config
    placed = place(base, config, seed=1)
    adapted = read_adapters(placed, draws=3, seed=1)
    kernel = sequence_kernel(features_of(adapted, rows))
    assert kernel.matrices.shape == (3, 5, 5)
    a = of_adapter(placed, "lora_A")
    for draw in range(3):
        with torch.no_grad():
            for weight, adapter in zip(a, adapted.adapters, strict=True):
                weight.copy_(adapter.rows.unflatten(0, (3, -1))[draw])
        j = jacobian(placed, rows) / counts(rows)[:, None]
        np.testing.assert_allclose(kernel.matrices[draw], j @ j.T, rtol=1e-10, atol=1e-10)
    assert np.ptp([np.trace(k) for k in kernel.matrices]) > 0


def test_bytes_are_those_of_the_tensors(adapted, trained):
    for one in (adapted, read_adapters(trained, seed=0)):
        features = features_of(one, made.sequences(), draws=2)
        held = sum(t.nbytes for part in (features.tangent.b, features.tangent.a) for t in part if t is not None)
        said = feature_bytes(one, n=5, outputs=3, draws=1, element_size=8)
        assert said["features"] == held
        assert said["kernels"] > 8 * 15 * 15


@pytest.mark.parametrize("fault", ["nothing", "no draws", "no loss", "no target", "training", "rows", "name"])
def test_faults_are_named(model, adapted, fault):
    rows = made.sequences(3)
    if fault == "nothing":
        with pytest.raises(KernelError, match="ask for one"):
            features_of(adapted, rows, with_loss=False)
    elif fault == "no draws":
        with pytest.raises(KernelError, match="draw some"):
            sequence_kernel(features_of(adapted, rows), "fisher")
    elif fault == "no loss":
        with pytest.raises(KernelError, match="'loss' is made of the loss"):
            sequence_kernel(features_of(adapted, rows, draws=1, with_loss=False))
    elif fault == "no target":
        rows[1] = (rows[1][0], [NO_LOSS] * len(rows[1][1]))
        features = features_of(adapted, rows)
        assert np.isfinite(sequence_kernel(features, "loss-sum").matrices).all()
        with pytest.raises(KernelError, match="sequence 1 has no target"):
            sequence_kernel(features)
    elif fault == "training":
        model.train()
        try:
            with pytest.raises(KernelError, match="eval"):
                features_of(adapted, rows)
        finally:
            model.eval()
    elif fault == "rows":
        for parts in ([[0, 1], [1, 2]], [[0, 1]]):
            with pytest.raises(KernelError, match="exactly once"):
                features_of(adapted, rows, parts=parts)
    else:
        assert check_kernel_name(None) == "loss"
        with pytest.raises(ConfigError, match="reduction = 'margin': a language model has loss, loss-sum or"):
            check_kernel_name("margin")
