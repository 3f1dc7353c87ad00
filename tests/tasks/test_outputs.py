import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretune.errors import ConfigError
from foretune.tasks.outputs import identity_reduction, output_reduction

NAMES = ["margin", "trace", "full", "class:0", "class:1"]


def gradients(n, n_classes, seed=0):
    """n × C × P gradients of every logit."""
    return np.random.default_rng(seed).standard_normal((n, n_classes, 7))


def kernel_of(reduction, logit_gradients):
    """The kernel as the table of the module defines it, from gradients of the logits."""
    outputs = np.einsum("ncp,ck->nkp", logit_gradients, reduction.directions)
    if reduction.block:
        flat = outputs.reshape(-1, outputs.shape[-1])
        return reduction.scale * flat @ flat.T
    return reduction.scale * np.einsum("ikp,jkp->ij", outputs, outputs)


def targets_of(reduction, labels):
    return reduction.coordinates(np.eye(reduction.n_logits)[labels])


def test_defaults():
    assert output_reduction(None, 2).name == "margin"
    assert output_reduction(None, 4).name == "trace"


@pytest.mark.parametrize(
    ("name", "n_classes", "outputs", "rows"),
    [("margin", 2, 1, 1), ("trace", 2, 1, 1), ("trace", 5, 4, 1), ("full", 5, 4, 4), ("class:4", 5, 1, 1)],
)
def test_sizes(name, n_classes, outputs, rows):
    reduction = output_reduction(name, n_classes)
    assert (reduction.n_outputs, reduction.rows_per_example) == (outputs, rows)
    width = {"margin": 1, "trace": n_classes, "full": n_classes - 1}.get(name, 1)
    labels, logits = np.arange(n_classes), np.eye(n_classes)
    assert targets_of(reduction, labels).shape == reduction.coordinates(logits).shape == (n_classes, width)


@pytest.mark.parametrize("n_classes", [2, 3, 6])
def test_basis_is_orthonormal_and_blind_to_the_sum_of_the_logits(n_classes):
    directions = output_reduction("full", n_classes).directions
    assert np.allclose(directions.T @ directions, np.eye(n_classes - 1), atol=1e-14)
    assert np.allclose(directions.sum(axis=0), 0.0, atol=1e-14)
    assert np.allclose(directions @ directions.T, np.eye(n_classes) - 1 / n_classes, atol=1e-14)


def test_margin_kernel_by_logits():
    held = gradients(5, 2)
    k00, k11, k01 = (held[:, a] @ held[:, b].T for a, b in ((0, 0), (1, 1), (0, 1)))
    assert np.allclose(kernel_of(output_reduction("margin", 2), held), k00 + k11 - k01 - k01.T)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_trace_kernel_is_the_mean_over_centred_logits(n_classes):
    held = gradients(5, n_classes)
    centred = held - held.mean(axis=1, keepdims=True)
    expected = sum(centred[:, c] @ centred[:, c].T for c in range(n_classes)) / n_classes
    assert np.allclose(kernel_of(output_reduction("trace", n_classes), held), expected)


def test_two_classes_by_any_reduction_are_multiples_of_the_margin():
    held = gradients(5, 2)
    margin = kernel_of(output_reduction("margin", 2), held)
    assert np.allclose(kernel_of(output_reduction("full", 2), held), margin / 2)
    assert np.allclose(kernel_of(output_reduction("trace", 2), held), margin / 4)


def test_trace_is_the_mean_of_the_diagonal_blocks_of_full():
    held = gradients(4, 3)
    blocks = kernel_of(output_reduction("full", 3), held).reshape(4, 2, 4, 2)
    assert np.allclose(kernel_of(output_reduction("trace", 3), held), np.einsum("iaja->ij", blocks) / 3)


def test_targets():
    labels = np.array([0, 2, 1])
    assert targets_of(output_reduction("margin", 2), np.array([0, 1])).tolist() == [[-1.0], [1.0]]
    assert np.allclose(targets_of(output_reduction("trace", 3), labels), np.eye(3)[labels] - 1 / 3)
    assert targets_of(output_reduction("class:1", 3), labels).tolist() == [[0.0], [0.0], [1.0]]
    full = output_reduction("full", 3)
    assert np.allclose(targets_of(full, labels) @ full.directions.T, np.eye(3)[labels] - 1 / 3)


@settings(deadline=None, max_examples=30)
@given(name=st.sampled_from(NAMES), n_classes=st.integers(2, 6), seed=st.integers(0, 100))
def test_targets_decode_to_their_labels(name, n_classes, seed):
    reduction = output_reduction(name, 2 if name == "margin" else n_classes)
    labels = np.random.default_rng(seed).integers(0, reduction.n_logits, 9)
    scores = reduction.scores(targets_of(reduction, labels))
    assert np.array_equal(scores.argmax(axis=1), reduction.columns[labels])


@settings(deadline=None, max_examples=30)
@given(name=st.sampled_from(["margin", "trace", "full"]), n_classes=st.integers(2, 6), seed=st.integers(0, 100))
def test_scores_of_the_logits_are_the_logits_without_their_mean(name, n_classes, seed):
    reduction = output_reduction(name, 2 if name == "margin" else n_classes)
    logits = np.random.default_rng(seed).standard_normal((6, reduction.n_logits))
    scores = reduction.scores(reduction.coordinates(logits))
    assert np.allclose(scores, logits - logits.mean(axis=1, keepdims=True), atol=1e-13)


def test_one_class_is_decided_at_one_half():
    reduction = output_reduction("class:2", 4)
    assert reduction.columns[np.array([0, 2, 3])].tolist() == [0, 1, 0]
    assert reduction.coordinates(np.array([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[3.0]]
    assert reduction.scores(np.array([[0.4], [0.6]])).argmax(axis=1).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "n_classes", "message"),
    [
        ("margin", 3, "'margin' needs 2 classes, got 3"),
        ("class:3", 3, "unknown output 'class:3'.*k from 0 to 2"),
        ("class:-1", 3, "unknown output"),
        ("class:x", 3, "unknown output"),
        ("sum", 3, "unknown output 'sum'"),
        (None, 1, "at least 2 classes, got 1"),
    ],
)
def test_unknown_reductions(name, n_classes, message):
    with pytest.raises(ConfigError, match=message):
        output_reduction(name, n_classes)


@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("name", ["trace", "full", "output:0"])
def test_outputs_that_stand_for_themselves(name, n_outputs):
    """Nothing is centred: a squared loss, and a sigmoid each, see the sum of the outputs too."""
    reduction, held = identity_reduction(name, n_outputs), gradients(5, n_outputs)
    each = [held[:, c] @ held[:, c].T for c in range(n_outputs)]
    flat = held.reshape(-1, held.shape[-1])
    expected = {"trace": sum(each) / n_outputs, "full": flat @ flat.T, "output:0": each[0]}[name]
    assert np.allclose(kernel_of(reduction, held), expected)
    outputs = np.random.default_rng(1).standard_normal((6, n_outputs))
    kept = outputs[:, :1] if name == "output:0" else outputs
    assert np.array_equal(reduction.scores(reduction.coordinates(outputs)), kept)
    assert outputs[:, reduction.columns >= 0].shape == kept.shape
    assert reduction.scores_are_outputs


@pytest.mark.parametrize("name", ["margin", "output:1", "class:0", "output:2x"])
def test_reductions_of_classes_are_none_of_numbers(name):
    with pytest.raises(ConfigError, match=r"use 'trace', 'full' or 'output:k' with k from 0 to 0"):
        identity_reduction(name, 1)


@pytest.mark.parametrize("reduction", [output_reduction("full", 4), identity_reduction("full", 3)])
def test_blocks_are_added_up_to_the_trace(reduction):
    held, summed = gradients(4, reduction.n_logits), reduction.summed()
    build = output_reduction if reduction.n_logits == 4 else identity_reduction
    trace = build("trace", reduction.n_logits)
    assert (summed.name, summed.block, summed.scale) == (trace.name, trace.block, trace.scale)
    assert np.allclose(kernel_of(summed, held), kernel_of(trace, held))
    outputs = np.random.default_rng(1).standard_normal((6, reduction.n_logits))
    assert np.allclose(summed.coordinates(outputs), trace.coordinates(outputs))
    assert np.array_equal(summed.readout, trace.readout)
    assert summed.summed() is summed


def test_scores_of_one_class_against_the_rest_are_no_outputs():
    assert not output_reduction("class:0", 3).scores_are_outputs
    assert all(output_reduction(name, 2).scores_are_outputs for name in ("margin", "trace", "full"))
