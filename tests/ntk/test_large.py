"""Large kernels without a decomposition, against the decomposition where both are there."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretune.errors import KernelError
from foretune.ntk.bounds import risk_bounds
from foretune.ntk.large_regression import (
    factor_for_bounds,
    factorise,
    fit_large_regression,
    large_risk_bounds,
    smallest_eigenvalue,
)
from foretune.ntk.large_spectrum import (
    estimate_spectrum,
    lanczos,
    large_alignment,
    large_kernel,
    low_rank_eigenvalues,
)
from foretune.ntk.regression import fit_regression
from foretune.ntk.spectrum import centre, decompose, spectrum

N = 240
EPSILON = 1e-12


def kernel_of(decay=1.5, n=N, seed=0, rank=None):
    random = np.random.default_rng(seed)
    vectors = np.linalg.qr(random.standard_normal((n, n)))[0]
    values = 30.0 * np.arange(1, n + 1.0) ** -decay
    values[n if rank is None else rank :] = 0.0
    matrix = (vectors * values) @ vectors.T + 0.1
    return (matrix + matrix.T) / 2.0


def targets_of(n=N, t=1, seed=1):
    return np.random.default_rng(seed).standard_normal((n, t))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("centred", [False, True])
def test_one_look_finds_trace_and_norms(k, centred):
    matrix = kernel_of()
    expected = centre(matrix, k) if centred else matrix
    found = large_kernel(matrix, k, centred=centred)
    assert found.trace == pytest.approx(np.trace(expected), rel=1e-12)
    assert found.norm == pytest.approx(np.linalg.norm(expected), rel=1e-12)
    assert found.largest == pytest.approx(np.abs(expected).max(), rel=1e-12)
    columns = targets_of(t=4)
    assert np.allclose(found.apply(columns), expected @ columns, rtol=1e-11, atol=1e-12)


def test_a_kernel_of_equal_features_is_zero_when_centred():
    kernel = large_kernel(np.full((N, N), 3.0), centred=True)
    assert kernel.largest == kernel.trace == 0.0
    found, values = estimate_spectrum(kernel, sigma=1e-4, epsilon=EPSILON, lambda_min=(0.0, 0.0))
    expected = spectrum(np.zeros((N, N)), sigma=1e-4, epsilon=EPSILON)
    assert {**vars(found), "estimated": None} == vars(expected)
    assert not values.any()


def test_lanczos_of_all_steps_is_exact():
    matrix, start = kernel_of(n=12), targets_of(12, 2)
    whole, half = lanczos(lambda columns: matrix @ columns, start, 12)
    values, vectors = np.linalg.eigh(matrix)
    expected = ((vectors.T @ start) ** 2 * np.sqrt(values)[:, None]).sum(0)
    assert np.allclose(whole.sums(np.sqrt), expected, rtol=1e-9)
    assert half.nodes.shape == (2, 6)
    assert np.allclose(whole.weights.sum(1), (start**2).sum(0))


def test_lanczos_stops_where_nothing_is_left():
    matrix = np.diag([2.0, 2.0, 2.0, 0.0])
    whole, _ = lanczos(lambda columns: matrix @ columns, np.ones((4, 1)), 4)
    assert whole.sums(lambda x: x) == pytest.approx(6.0)
    assert whole.sums(np.ones_like) == pytest.approx(4.0)


@settings(max_examples=12)
@given(st.sampled_from([0.7, 1.0, 1.5, 3.0]), st.sampled_from([1e-3, 0.1, 10.0]), st.integers(0, 10_000))
def test_estimates_lie_within_their_errors(decay, sigma, seed):
    matrix = kernel_of(decay)
    factor = factor_for_bounds(matrix, sigma)
    expected = spectrum(matrix, sigma=sigma, epsilon=EPSILON)
    found, values = estimate_spectrum(
        large_kernel(matrix), sigma=sigma, epsilon=EPSILON, lambda_min=smallest_eigenvalue(factor, seed), seed=seed
    )
    for name in ("lambda_max", "trace", "stable_rank", "participation_ratio", "floor", "sigma_relative"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-8), name
    assert found.condition_number == pytest.approx(expected.condition_number, rel=1e-3)
    low, high = found.condition_number_interval
    assert low * (1 - 1e-6) <= expected.condition_number <= high * (1 + 1e-6)
    for name, error in found.estimated.items():
        off = abs(getattr(found, name) - getattr(expected, name))
        assert off <= 5 * error + 1e-3 * abs(getattr(expected, name)) + 1e-9, (name, off, error)
        if name in ("effective_dimension", "entropy_rank", "effective_dimension_relative"):
            assert error <= 0.2 * getattr(expected, name), name  # an error that says something
    assert np.allclose(values[:32], decompose(matrix).eigenvalues[:32], rtol=1e-7)
    assert np.all(np.diff(values) <= 0)


def test_an_estimate_is_unbiased():
    matrix = kernel_of(1.0)
    expected = spectrum(matrix, sigma=0.3, epsilon=EPSILON).effective_dimension
    kernel = large_kernel(matrix)
    found = [
        estimate_spectrum(kernel, sigma=0.3, epsilon=EPSILON, lambda_min=(0.0, 0.0), seed=seed)[0] for seed in range(30)
    ]
    values = np.array([one.effective_dimension for one in found])
    error = values.std(ddof=1)
    assert abs(values.mean() - expected) <= 4 * error / np.sqrt(len(values))
    said = np.median([one.estimated["effective_dimension"] for one in found])
    assert 0.5 * error <= said <= 2.0 * error


def test_a_centred_kernel_has_the_spectrum_of_hkh():
    matrix = kernel_of(1.0)
    expected = spectrum(centre(matrix), sigma=0.01, epsilon=1e-7, targets=targets_of())
    kernel = large_kernel(matrix, centred=True)
    found, _ = estimate_spectrum(
        kernel,
        sigma=0.01,
        epsilon=1e-7,
        lambda_min=(0.0, 0.0),
        alignment=large_alignment(kernel, targets_of()),
    )
    assert found.alignment == pytest.approx(expected.alignment, rel=1e-9)
    assert found.condition_number == pytest.approx(expected.condition_number, rel=1e-6)
    assert found.saturated
    assert abs(found.effective_dimension - expected.effective_dimension) <= 5 * found.estimated["effective_dimension"]


def test_alignment_that_is_not_defined():
    kernel = large_kernel(kernel_of(), centred=True)
    assert large_alignment(kernel, np.ones((N, 2))) is None
    assert large_alignment(large_kernel(np.ones((N, N)), centred=True), targets_of()) is None


def test_what_is_no_kernel_is_refused():
    matrix = kernel_of()
    matrix[3, 4] = matrix[4, 3] = np.nan
    with pytest.raises(KernelError, match="nan or infinite"):
        large_kernel(matrix)
    with pytest.raises(KernelError, match="not positive semi-definite"):
        estimate_spectrum(large_kernel(kernel_of() - 1.0 * np.eye(N)), sigma=1.0, epsilon=0.0, lambda_min=(0.0, 0.0))
    assert factorise(-np.eye(3), 0.5) is None
    with pytest.raises(KernelError, match="raise sigma"):
        factor_for_bounds(-np.eye(3), 0.5)
    with pytest.raises(KernelError, match="raise the ridge"):
        fit_large_regression(large_kernel(-np.eye(3)), np.ones((3, 1)), np.zeros((3, 1)), ridge=0.5)


@pytest.mark.parametrize("sigma", [1e-4, 1.0])
def test_the_smallest_eigenvalue(sigma):
    for rank in (None, 100):
        matrix = kernel_of(1.0, rank=rank)
        value, error = smallest_eigenvalue(factor_for_bounds(matrix, sigma))
        expected = decompose(matrix).eigenvalues[-1]
        assert abs(value - expected) <= 10 * error + 1e-9


@pytest.mark.parametrize("shape", [(N, 1, 1), (N, 2, 1), (N // 3, 3, 3)])
def test_regression_equals_the_dense_one(shape):
    n, t, k = shape
    matrix, targets, offset = kernel_of(1.0), targets_of(n, t), targets_of(n, t, 5)
    eigen = decompose(matrix)
    for ridge in (1e-3, 0.5):
        expected = fit_regression(eigen, targets, offset, ridge=ridge, rows_per_example=k)
        found = fit_large_regression(large_kernel(matrix, k), targets, offset, ridge=ridge)
        for name in ("dual", "fitted", "loo", "train_mse", "loo_mse", "gcv", "log_evidence", "ridge", "n"):
            assert np.allclose(getattr(found, name), getattr(expected, name), rtol=1e-7, atol=1e-9), name
        bounds = risk_bounds(eigen, targets - offset, sigma=ridge)
        ends = (float(eigen.eigenvalues[0]), float(eigen.eigenvalues[-1]))
        large = large_risk_bounds(factor_for_bounds(matrix, ridge), targets - offset, ends)
        assert large.empirical_risk == pytest.approx(bounds.empirical_risk, rel=1e-8)
        assert large.tight.upper == pytest.approx(bounds.tight.upper, rel=1e-8)
        assert (large.printed.holds, large.tight.holds) == (bounds.printed.holds, bounds.tight.holds)


@settings(max_examples=15)
@given(st.sampled_from([0.7, 1.0, 2.0]), st.integers(0, 1000), st.sampled_from([0.05, 1.0, 20.0]))
def test_the_ridge_is_a_minimum_of_the_leave_one_out_error(decay, seed, noise):
    random = np.random.default_rng(seed)
    matrix = kernel_of(decay, seed=seed)
    targets = np.linalg.cholesky(matrix + 1e-9 * np.eye(N)) @ random.standard_normal((N, 1))
    targets += noise * random.standard_normal((N, 1))
    offset = np.zeros_like(targets)
    expected = fit_regression(decompose(matrix), targets, offset)
    found = fit_large_regression(large_kernel(matrix), targets, offset)
    assert found.ridge_rule == "loo"
    assert found.loo_mse <= 1.02 * expected.loo_mse
    mean = np.trace(matrix) / N
    for factor in (10**0.2, 10**-0.2):
        if not 1e-8 * mean <= found.ridge * factor <= 1e4 * mean:
            continue
        beside = fit_regression(decompose(matrix), targets, offset, ridge=found.ridge * factor)
        assert found.loo_mse <= beside.loo_mse * (1 + 1.01e-3)


def test_a_zero_kernel_gives_the_offset_back():
    kernel = large_kernel(np.zeros((N, N)))
    found = fit_large_regression(kernel, targets_of(), targets_of(seed=4))
    assert np.array_equal(found.fitted, targets_of() - (targets_of() - targets_of(seed=4)))


def few_features(rank, decay=1.0, seed=0):
    random = np.random.default_rng(seed)
    features = random.standard_normal((N, rank)) * np.arange(1, rank + 1.0) ** (-decay / 2) + 0.2
    return features @ features.T, features


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("rank", "k"), [(1, 1), (30, 1), (60, 3), (N - 17, 1)])
def test_few_features_have_the_spectrum_of_their_own_gram_matrix(rank, k, centred):
    matrix, features = few_features(rank)
    kernel = large_kernel(matrix, k, centred=centred)
    options = {"sigma": 0.01, "epsilon": 1e-7}
    expected = spectrum(centre(matrix, k) if centred else matrix, **options)
    found, values = estimate_spectrum(kernel, **options, lambda_min=(np.nan, np.nan), rank=rank, alignment=0.5)
    means = features.reshape(N // k, k, rank).mean(0)
    left = features - np.tile(means, (N // k, 1)) if centred else features
    own = np.linalg.eigvalsh(left.T @ left)[::-1]
    assert np.allclose(values[:rank], own, rtol=1e-9, atol=1e-12 * own[0])
    assert values.shape == (N,)
    assert not values[rank:].any()
    for name in set(vars(expected)) - {"lambda_min", "n_negative", "lambda_min_resolved", "condition_number_interval"}:
        if name not in ("alignment", "estimated") and (name, rank) != ("decay_exponent", 1):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-8), name
    assert (found.lambda_min, found.lambda_min_resolved, found.n_negative) == (0.0, True, 0)
    assert found.condition_number_interval == (found.condition_number,) * 2
    assert found.saturated
    assert found.estimated is None
    assert found.alignment == 0.5


def test_more_features_than_were_said_are_noticed():
    matrix, _ = few_features(120)
    kernel = large_kernel(matrix)
    assert low_rank_eigenvalues(kernel, 60) is None
    assert low_rank_eigenvalues(kernel, N - 16) is None  # not below the rows
    found, _ = estimate_spectrum(kernel, sigma=0.01, epsilon=1e-7, lambda_min=(0.0, 0.0), rank=60)
    assert found.estimated is not None
    with pytest.raises(KernelError, match="not positive semi-definite"):
        low_rank_eigenvalues(large_kernel(matrix - 2 * np.outer(matrix[0], matrix[0])), 130)
