import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge

from foretune.errors import ConfigError, KernelError
from foretune.ntk.regression import fit_regression, predict
from foretune.ntk.spectrum import decompose
from foretune.tasks.readout import minimise_over


def problem(seed=0, n=7, t=1, width=5, block=False):
    """Features of n examples (t outputs each in a block problem), targets and initial outputs."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n * t if block else n, width))
    return features, rng.standard_normal((n, t)), rng.standard_normal((n, t))


def slow_loo(kernel, targets, offset, ridge):
    """Refit n times with one example, all its rows, left out."""
    n, t = targets.shape
    k = len(kernel) // n
    predictions = np.zeros((n, t))
    for i in range(n):
        rest = np.array([row for row in range(n * k) if row // k != i])
        left = np.arange(i * k, (i + 1) * k)
        residual = (targets - offset)[np.arange(n) != i].reshape(len(rest), -1)
        dual = np.linalg.solve(kernel[np.ix_(rest, rest)] + ridge * np.eye(len(rest)), residual)
        predictions[i] = offset[i] + (kernel[np.ix_(left, rest)] @ dual).reshape(t)
    return predictions


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("width", [4, 12])
def test_dual_fit_is_the_ridge_solution_in_parameters(t, width):
    features, targets, offset = problem(t=t, width=width)
    ridge = 0.3
    parameters = Ridge(alpha=ridge, fit_intercept=False, solver="cholesky").fit(features, targets - offset)
    fit = fit_regression(decompose(features @ features.T), targets, offset, ridge=ridge)
    assert np.allclose(features.T @ fit.dual, parameters.coef_.reshape(t, -1).T, rtol=1e-9)
    assert np.allclose(fit.fitted, offset + parameters.predict(features).reshape(-1, t), rtol=1e-9)
    rng = np.random.default_rng(9)
    others, offset_eval = rng.standard_normal((4, width)), rng.standard_normal((4, t))
    predicted = predict(fit, others @ features.T, offset_eval)
    assert np.allclose(predicted, offset_eval + parameters.predict(others).reshape(-1, t), rtol=1e-9)


def test_fit_without_offset_is_that_of_scikit_learn():
    features, targets, offset = problem(n=12)
    kernel = features @ features.T
    model = KernelRidge(alpha=0.7, kernel="precomputed").fit(kernel, targets)
    fit = fit_regression(decompose(kernel), targets, 0.0 * offset, ridge=0.7)
    assert np.allclose(fit.fitted, model.predict(kernel), rtol=1e-10)


def test_block_fit_is_the_joint_ridge_solution():
    n, k = 5, 3
    features, targets, offset = problem(n=n, t=k, width=8, block=True)
    parameters = np.linalg.solve(features.T @ features + 0.4 * np.eye(8), features.T @ (targets - offset).reshape(-1))
    fit = fit_regression(decompose(features @ features.T), targets, offset, ridge=0.4, rows_per_example=k)
    assert fit.dual.shape == (n * k, 1)
    assert np.allclose(fit.fitted, offset + (features @ parameters).reshape(n, k), rtol=1e-9)
    rng = np.random.default_rng(1)
    others, offset_eval = rng.standard_normal((2 * k, 8)), rng.standard_normal((2, k))
    expected = offset_eval + (others @ parameters).reshape(2, k)
    assert np.allclose(predict(fit, others @ features.T, offset_eval), expected, rtol=1e-9)


@pytest.mark.parametrize(("t", "block"), [(1, False), (3, False), (3, True), (2, True)])
@pytest.mark.parametrize("width", [3, 30])
def test_leave_one_out_is_a_refit_without_the_example(t, block, width):
    features, targets, offset = problem(n=6, t=t, width=width, block=block)
    kernel = features @ features.T
    for ridge in (1e-3, 0.5, 50.0):
        fit = fit_regression(decompose(kernel), targets, offset, ridge=ridge, rows_per_example=t if block else 1)
        expected = slow_loo(kernel, targets, offset, ridge)
        assert np.allclose(fit.loo, expected, rtol=1e-7, atol=1e-8)
        assert fit.loo_mse == pytest.approx(np.sum((targets - expected) ** 2) / 6, rel=1e-7)
        assert fit.train_mse == pytest.approx(np.sum((targets - fit.fitted) ** 2) / 6, rel=1e-9)
        assert (fit.ridge, fit.ridge_rule, fit.n) == (ridge, "given", 6)


@pytest.mark.parametrize(("t", "block"), [(1, False), (3, False), (3, True)])
def test_gcv_by_its_definition(t, block):
    features, targets, offset = problem(n=6, t=t, block=block)
    kernel = features @ features.T
    fit = fit_regression(decompose(kernel), targets, offset, ridge=0.6, rows_per_example=t if block else 1)
    rows = len(kernel)
    smoother = kernel @ np.linalg.inv(kernel + 0.6 * np.eye(rows))
    error = (np.eye(rows) - smoother) @ (targets - offset).reshape(rows, -1)
    assert fit.gcv == pytest.approx(np.sum(error**2) / 6 / (np.trace(np.eye(rows) - smoother) / rows) ** 2, rel=1e-9)


@pytest.mark.parametrize(("t", "block"), [(1, False), (3, False), (3, True)])
def test_evidence_is_that_of_the_gaussian_with_the_best_scale(t, block):
    features, targets, offset = problem(n=6, t=t, block=block)
    kernel = features @ features.T
    fit = fit_regression(decompose(kernel), targets, offset, ridge=0.6, rows_per_example=t if block else 1)
    rows = len(kernel)
    columns = (targets - offset).reshape(rows, -1).T

    def evidence(tau):
        covariance = tau * (kernel + 0.6 * np.eye(rows))
        return sum(multivariate_normal(np.zeros(rows), covariance).logpdf(column) for column in columns) / targets.size

    best = np.mean([column @ np.linalg.solve(kernel + 0.6 * np.eye(rows), column) / rows for column in columns])
    assert fit.log_evidence == pytest.approx(evidence(best), rel=1e-9)
    assert evidence(best) > max(evidence(0.9 * best), evidence(1.1 * best))


@pytest.mark.parametrize(("t", "block"), [(1, False), (2, False), (2, True)])
def test_ridge_minimises_the_leave_one_out_error(t, block):
    rng = np.random.default_rng(5)
    n = 14
    features = rng.standard_normal((n * t if block else n, 4))
    weights = rng.standard_normal((4, 1 if block else t))
    noise = rng.standard_normal((n, t))
    targets, offset = (features @ weights).reshape(n, t) + noise, np.zeros((n, t))
    kernel, k = features @ features.T, t if block else 1
    fit = fit_regression(decompose(kernel), targets, offset, rows_per_example=k)
    assert fit.ridge_rule == "loo"
    least = min(
        np.sum((targets - slow_loo(kernel, targets, offset, ridge)) ** 2) / n
        for ridge in np.trace(kernel) / len(kernel) * np.geomspace(1e-3, 1e2, 120)
    )
    assert fit.loo_mse <= least * (1 + 1e-9)
    around = [
        fit_regression(decompose(kernel), targets, offset, ridge=f * fit.ridge, rows_per_example=k) for f in (0.9, 1.1)
    ]
    assert all(fit.loo_mse < other.loo_mse for other in around)


def test_a_kernel_that_does_not_help_gets_the_largest_ridge():
    # features orthogonal to everything that is to be learned: the best fit is none
    rng = np.random.default_rng(0)
    features = rng.standard_normal((10, 3))
    basis, _ = np.linalg.qr(features)
    targets = rng.standard_normal((10, 1))
    targets -= basis @ (basis.T @ targets)
    kernel = features @ features.T
    fit = fit_regression(decompose(kernel), targets, np.zeros((10, 1)))
    assert fit.ridge == pytest.approx(1e4 * np.trace(kernel) / 10, rel=1e-6)
    assert fit.loo_mse == pytest.approx(np.mean(targets**2), rel=1e-3)


@pytest.mark.parametrize("ridge", [None, 1e-3])
@pytest.mark.parametrize("block", [False, True])
def test_zero_kernel_gives_the_offset_back(ridge, block):
    _, targets, offset = problem(n=4, t=2)
    rows = 8 if block else 4
    fit = fit_regression(
        decompose(np.zeros((rows, rows))), targets, offset, ridge=ridge, rows_per_example=2 if block else 1
    )
    assert np.allclose(fit.fitted, offset, atol=1e-14)
    assert np.allclose(fit.loo, offset, atol=1e-14)
    assert fit.train_mse == pytest.approx(fit.loo_mse) == pytest.approx(np.sum((targets - offset) ** 2) / 4)
    assert np.isfinite(fit.ridge)
    assert np.allclose(predict(fit, np.zeros((rows, rows)), offset), offset)


def test_nothing_to_fit():
    features, targets, _ = problem()
    fit = fit_regression(decompose(features @ features.T), targets, targets)
    assert not fit.dual.any()
    assert fit.loo_mse == fit.gcv == 0.0
    assert fit.log_evidence is None


@settings(deadline=None, max_examples=30)
@given(
    factor=st.sampled_from([1e-6, 0.3, 7.0, 1e5]), seed=st.integers(0, 1000), n=st.integers(2, 8), block=st.booleans()
)
def test_scale_of_the_kernel_does_not_matter_with_the_ridge_in_its_units(factor, seed, n, block):
    features, targets, offset = problem(seed, n=n, t=2, width=4, block=block)
    kernel, k = features @ features.T, 2 if block else 1
    one = fit_regression(decompose(kernel), targets, offset, ridge=0.5, rows_per_example=k)
    other = fit_regression(decompose(factor * kernel), targets, offset, ridge=factor * 0.5, rows_per_example=k)
    for name in ("gcv", "loo_mse", "train_mse", "log_evidence"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-8), name
    chosen = [fit_regression(decompose(f * kernel), targets, offset, rows_per_example=k) for f in (1.0, factor)]
    assert chosen[1].loo_mse == pytest.approx(chosen[0].loo_mse, rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), n=st.integers(2, 8), width=st.integers(1, 10), block=st.booleans())
def test_order_of_the_samples_does_not_matter(seed, n, width, block):
    features, targets, offset = problem(seed, n=n, t=2, width=width, block=block)
    order, k = np.random.default_rng(seed).permutation(n), 2 if block else 1
    rows = (order[:, None] * k + np.arange(k)).ravel()
    kernel = features @ features.T
    one = fit_regression(decompose(kernel), targets, offset, ridge=0.1, rows_per_example=k)
    other = fit_regression(
        decompose(kernel[np.ix_(rows, rows)]), targets[order], offset[order], ridge=0.1, rows_per_example=k
    )
    assert np.allclose(other.loo, one.loo[order], rtol=1e-7, atol=1e-9)
    assert np.allclose(other.fitted, one.fitted[order], rtol=1e-7, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), n=st.integers(2, 8), width=st.integers(1, 10))
def test_training_error_rises_with_the_ridge_and_stays_below_leave_one_out(seed, n, width):
    features, targets, offset = problem(seed, n=n, t=2, width=width)
    eigen = decompose(features @ features.T)
    fits = [fit_regression(eigen, targets, offset, ridge=ridge) for ridge in (1e-2, 1.0, 1e2)]
    trivial = np.sum((targets - offset) ** 2) / n
    errors = [fit.train_mse for fit in fits]
    assert errors == sorted(errors)
    assert errors[-1] <= trivial * (1 + 1e-9)
    assert all(fit.train_mse <= fit.loo_mse * (1 + 1e-9) for fit in fits)


def test_a_block_kernel_without_coupling_is_a_scalar_kernel_for_each_output():
    features, targets, offset = problem(n=6, t=3)
    kernel = features @ features.T
    scalar = fit_regression(decompose(kernel), targets, offset, ridge=0.4)
    block = fit_regression(decompose(np.kron(kernel, np.eye(3))), targets, offset, ridge=0.4, rows_per_example=3)
    assert np.allclose(block.fitted, scalar.fitted, rtol=1e-9)
    assert np.allclose(block.loo, scalar.loo, rtol=1e-9)
    for name in ("train_mse", "loo_mse", "gcv", "log_evidence"):
        assert getattr(block, name) == pytest.approx(getattr(scalar, name), rel=1e-9), name


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan"), float("inf")])
def test_ridge_must_be_positive(ridge):
    with pytest.raises(ConfigError, match=r"ridge = .*must be positive"):
        fit_regression(decompose(np.eye(2)), np.ones((2, 1)), np.zeros((2, 1)), ridge=ridge)


def test_shapes_must_fit():
    eigen = decompose(np.eye(4))
    with pytest.raises(KernelError, match="do not fit a kernel of 4 rows"):
        fit_regression(eigen, np.ones((3, 1)), np.zeros((3, 1)))
    with pytest.raises(KernelError, match="do not fit"):
        fit_regression(eigen, np.ones((4, 1)), np.zeros((4, 2)))
    with pytest.raises(KernelError, match="2 an example"):
        fit_regression(eigen, np.ones((2, 3)), np.zeros((2, 3)), rows_per_example=2)
    fit = fit_regression(eigen, np.ones((4, 1)), np.zeros((4, 1)), ridge=1.0)
    for kernel, offset in ((np.ones((2, 3)), np.ones((2, 1))), (np.ones((2, 4)), np.ones((3, 1)))):
        with pytest.raises(KernelError, match="does not fit 4 training rows"):
            predict(fit, kernel, offset)
    with pytest.raises(KernelError, match="does not fit 4 training rows"):
        predict(fit, np.ones((4, 4)), np.ones((2, 2)))


def test_minimise_over_refines_the_grid_and_takes_the_first_of_equals():
    grid = np.geomspace(1e-3, 1e3, 7)
    assert minimise_over(lambda x: (np.log(x) - 0.8) ** 2, grid) == pytest.approx(np.exp(0.8), rel=1e-4)
    assert minimise_over(lambda x: (np.log(x) - 0.8) ** 2, grid[::-1]) == pytest.approx(np.exp(0.8), rel=1e-4)
    assert minimise_over(lambda x: 0.0, grid) == 1e-3
    assert minimise_over(lambda x: 0.0, grid[::-1]) == pytest.approx(1e3)
    assert minimise_over(lambda x: -x, grid) == pytest.approx(1e3)
