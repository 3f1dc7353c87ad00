import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from foretune.errors import KernelError
from foretune.evaluation.lazy import asymmetric_scores, lazy_scores
from foretune.ntk.regression import fit_regression
from foretune.ntk.spectrum import decompose


def problem(n=14, m=5, n_classes=3, rank=6, seed=0):
    random = np.random.default_rng(seed)
    features = random.normal(size=(n + m, rank))
    kernel = features @ features.T
    labels = np.arange(n) % n_classes
    return (
        kernel[:n, :n],
        kernel[n:, :n],
        labels,
        random.normal(size=(n, n_classes)),
        random.normal(size=(m, n_classes)),
    )


@pytest.mark.parametrize("n_classes", [2, 3])
def test_logistic_regression_is_the_minimum_over_the_dual(n_classes):
    k_train, k_eval, labels, f_train, f_eval = problem(n_classes=n_classes)
    one_hot = np.eye(n_classes)[labels]
    ridge = fit_regression(decompose(k_train), one_hot, softmax(f_train, axis=1)).ridge

    def objective(flat):
        alpha = flat.reshape(one_hot.shape)
        scores = f_train + k_train @ alpha
        return -np.sum(one_hot * log_softmax(scores, axis=1)) + ridge / 8 * np.sum(alpha * (k_train @ alpha))

    found = minimize(objective, np.zeros(one_hot.size), method="BFGS", options={"gtol": 1e-8, "maxiter": 5000})
    expected = f_eval + k_eval @ found.x.reshape(one_hot.shape)
    scores = lazy_scores(k_train, k_eval, labels, f_train, f_eval).logistic
    assert scores == pytest.approx(expected, abs=2e-4 * np.abs(expected).max())


def test_regression_starts_from_the_probabilities():
    k_train, k_eval, labels, f_train, f_eval = problem()
    residual = np.eye(3)[labels] - softmax(f_train, axis=1)
    ridge = fit_regression(decompose(k_train), np.eye(3)[labels], softmax(f_train, axis=1)).ridge
    expected = softmax(f_eval, axis=1) + k_eval @ np.linalg.solve(k_train + ridge * np.eye(14), residual)
    assert lazy_scores(k_train, k_eval, labels, f_train, f_eval).regression == pytest.approx(expected, rel=1e-8)


def test_the_asymmetric_kernel_is_solved_as_it_is():
    k_train, k_eval, labels, f_train, f_eval = problem()
    lopsided = k_train @ np.diag(np.linspace(0.5, 1.5, 14))
    ridge = 0.1 * np.trace(lopsided) / 14
    residual = np.eye(3)[labels] - softmax(f_train, axis=1)
    expected = softmax(f_eval, axis=1) + k_eval @ np.linalg.inv(lopsided + ridge * np.eye(14)) @ residual
    assert asymmetric_scores(lopsided, k_eval, labels, f_train, f_eval) == pytest.approx(expected, rel=1e-8)


def test_a_kernel_of_zeros_gives_the_start():
    _, _, labels, f_train, f_eval = problem()
    nothing = np.zeros((14, 14)), np.zeros((5, 14)), labels, f_train, f_eval
    lazy = lazy_scores(*nothing)
    assert lazy.logistic == pytest.approx(f_eval)
    assert lazy.regression == pytest.approx(softmax(f_eval, axis=1))
    assert asymmetric_scores(*nothing) == pytest.approx(softmax(f_eval, axis=1))


def test_kernels_that_do_not_fit_are_refused():
    k_train, k_eval, labels, f_train, f_eval = problem()
    with pytest.raises(KernelError, match=r"\(14, 14\).*13 labels"):
        lazy_scores(k_train, k_eval, labels[:13], f_train, f_eval)
