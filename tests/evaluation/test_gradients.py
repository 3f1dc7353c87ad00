"""Gradient norm and PAGE against gradients multiplied out."""

import numpy as np
import pytest

from foretune.errors import KernelError
from foretune.evaluation.gradients import gradient_norm, page


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
