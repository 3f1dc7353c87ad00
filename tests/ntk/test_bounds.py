import dataclasses
import doctest
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretune.errors import ConfigError, KernelError
from foretune.ntk.bounds import label_energy_bound, risk_bounds
from foretune.ntk.spectrum import decompose

MATHEMATICS = Path(__file__).parents[2] / "docs" / "mathematics.md"


def explicit_risk(kernel, residual, sigma):
    """Mean squared error of f_0 + K (K + σI)⁻¹ ỹ, one example at a time."""
    n, t = residual.shape
    vector = residual.reshape(len(kernel), -1)
    fitted = (kernel @ np.linalg.solve(kernel + sigma * np.eye(len(kernel)), vector)).reshape(n, t)
    return sum(float(np.sum((residual[i] - fitted[i]) ** 2)) for i in range(n)) / n


@st.composite
def problems(draw):
    """Kernel, residual and σ: scalar or block, any rank and scale."""
    n, t, block = draw(st.integers(2, 7)), draw(st.integers(1, 3)), draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    rows = n * t if block else n
    features = rng.standard_normal((rows, draw(st.integers(1, rows + 1))))
    kernel = draw(st.sampled_from([1e-4, 1.0, 1e3])) * features @ features.T
    return kernel, rng.standard_normal((n, t)), draw(st.sampled_from([1e-2, 1.0, 30.0]))


@settings(deadline=None, max_examples=40)
@given(problem=problems())
def test_risk_is_that_of_the_fit_and_lies_between_the_tight_bounds(problem):
    kernel, residual, sigma = problem
    found = risk_bounds(decompose(kernel), residual, sigma=sigma)
    assert found.empirical_risk == pytest.approx(explicit_risk(kernel, residual, sigma), rel=1e-7)
    assert found.tight.holds
    assert found.tight.lower <= found.empirical_risk * (1 + 1e-9)
    assert found.empirical_risk <= found.tight.upper * (1 + 1e-9)
    assert found.tight.upper <= found.trivial * (1 + 1e-9)
    assert found.empirical_risk <= found.printed.upper * (1 + 1e-9)


def test_bounds_by_their_formulas():
    kernel, residual, sigma = np.diag([3.0, 1.0, 0.5]), np.array([[1.0], [2.0], [-1.0]]), 0.5
    found = risk_bounds(decompose(kernel), residual, sigma=sigma)
    assert found.empirical_risk == pytest.approx(((0.5 / 3.5) ** 2 + (0.5 / 1.5) ** 2 * 4 + 0.5**2) / 3)
    assert found.printed.lower == pytest.approx(0.5 * 6 / 3.5)
    assert found.printed.upper == pytest.approx(0.5 * 6 / 1.0)
    assert found.tight.lower == pytest.approx((0.5 / 3.5) ** 2 * 6 / 3)
    assert found.tight.upper == pytest.approx((0.5 / 1.0) ** 2 * 6 / 3)
    assert found.trivial == pytest.approx(2.0)
    assert (found.n, found.sigma, found.target) == (3, 0.5, "y - f0")
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_n_counts_examples_not_rows():
    kernel, residual = np.diag([3.0, 1.0, 0.5, 0.2]), np.array([[1.0, 2.0], [-1.0, 0.5]])
    found = risk_bounds(decompose(kernel), residual, sigma=1.0)
    assert found.n == 2
    assert found.trivial == pytest.approx(6.25 / 2)
    assert found.empirical_risk == pytest.approx(((1 / 4) ** 2 + 4 / 4 + (1 / 1.5) ** 2 + 0.25 / 1.44) / 2)


@pytest.mark.parametrize(("index", "side"), [(0, "lower"), (-1, "upper")])
def test_tight_bounds_are_attained_at_the_extreme_eigenvectors(index, side):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((6, 8))
    eigen = decompose(features @ features.T)
    found = risk_bounds(eigen, 3.0 * eigen.eigenvectors[:, [index]], sigma=0.7)
    assert found.empirical_risk == pytest.approx(getattr(found.tight, side), rel=1e-12)
    assert found.tight.holds


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 10), scale=st.sampled_from([1e-4, 1.0, 1e4]), seed=st.integers(0, 100))
def test_printed_lower_bound_is_false_for_a_multiple_of_the_identity(n, scale, seed):
    residual = np.random.default_rng(seed).standard_normal((n, 1))
    found = risk_bounds(decompose(scale * np.eye(n)), residual, sigma=1e-4)
    assert found.printed.lower > found.empirical_risk
    assert not found.printed.holds
    assert found.tight.holds
    assert found.tight.lower == pytest.approx(found.tight.upper)


def test_printed_lower_bound_can_exceed_the_risk_of_not_moving():
    # The paper's IMDb row with W_k: κ = 9.605 at n = 32, λ_min ≈ 0, targets ±1
    n, sigma = 32, 1e-4
    kernel = np.diag(np.r_[sigma * (9.605 - 1.0), np.zeros(n - 1)])
    residual = np.where(np.arange(n) % 2, 1.0, -1.0)[:, None]
    found = risk_bounds(decompose(kernel), residual, sigma=sigma)
    assert found.printed.lower == pytest.approx(3.33, rel=1e-3)
    assert found.trivial == pytest.approx(1.0)
    assert not found.printed.holds


def test_printed_lower_bound_is_false_even_for_one_sample():
    found = risk_bounds(decompose(np.array([[2.0]])), np.array([[1.0]]), sigma=1.0)
    assert found.printed.lower == pytest.approx(1 / 3)
    assert found.empirical_risk == pytest.approx(1 / 9)
    assert not found.printed.holds


def test_printed_bounds_can_hold():
    # all energy along the last eigenvector of a kernel with a large first eigenvalue
    found = risk_bounds(decompose(np.diag([1e3, 0.0])), np.array([[0.0], [1.0]]), sigma=1.0)
    assert found.printed.holds


def test_nothing_to_fit():
    found = risk_bounds(decompose(np.eye(3)), np.zeros((3, 1)), sigma=1.0)
    assert found.empirical_risk == 0.0
    assert found.printed.holds
    assert found.tight.holds


def test_zero_kernel_has_the_trivial_risk():
    residual = np.array([[1.0], [-2.0]])
    found = risk_bounds(decompose(np.zeros((2, 2))), residual, sigma=1e-4)
    assert found.empirical_risk == found.trivial == found.tight.lower == found.tight.upper == 2.5


def test_negative_eigenvalues_count_as_zero():
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))
    eigen = decompose((basis * [1.0, 0.5, -1e-7]) @ basis.T)
    found = risk_bounds(eigen, eigen.eigenvectors[:, [2]], sigma=1e-7)
    assert found.empirical_risk == pytest.approx(1 / 3)


@settings(deadline=None, max_examples=30)
@given(problem=problems(), share=st.floats(0, 1))
def test_label_energy_bound_holds_between_its_ends(problem, share):
    kernel, residual, sigma = problem
    eigen, found = decompose(kernel), risk_bounds(decompose(kernel), residual, sigma=sigma)
    rows = len(kernel)
    assert label_energy_bound(eigen, residual, sigma=sigma, k=0) == pytest.approx(found.trivial)
    assert label_energy_bound(eigen, residual, sigma=sigma, k=rows) == pytest.approx(found.tight.upper)
    bound = label_energy_bound(eigen, residual, sigma=sigma, k=round(share * rows))
    assert found.empirical_risk <= bound * (1 + 1e-9)


def test_label_energy_bound_by_its_formula():
    eigen = decompose(np.diag([3.0, 1.0, 0.5]))
    residual = np.array([[1.0, 1.0], [2.0, 0.0], [-1.0, 3.0]])
    expected = ((0.5 / 1.5) ** 2 * (2 + 4) + 10) / 3
    assert label_energy_bound(eigen, residual, sigma=0.5, k=2) == pytest.approx(expected)


def test_bad_arguments():
    eigen = decompose(np.eye(4))
    for sigma in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"sigma = .*must be positive"):
            risk_bounds(eigen, np.ones((4, 1)), sigma=sigma)
        with pytest.raises(ConfigError, match=r"sigma = .*must be positive"):
            label_energy_bound(eigen, np.ones((4, 1)), sigma=sigma, k=1)
    with pytest.raises(KernelError, match=r"shape \(3, 1\) does not fit a kernel of 4 rows"):
        risk_bounds(eigen, np.ones((3, 1)), sigma=1.0)
    for k in (-1, 5):
        with pytest.raises(ConfigError, match=f"k = {k}: must lie between 0 and .* 4"):
            label_energy_bound(eigen, np.ones((4, 1)), sigma=1.0, k=k)


def test_examples_of_the_mathematics_page():
    found = doctest.testfile(str(MATHEMATICS), module_relative=False)
    assert found.attempted > 5
    assert found.failed == 0
