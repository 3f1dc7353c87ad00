"""Kernel regression, kernel logistic regression and the kernels of sign descent: what a fine-tune is if it stays lazy.

All predict f_0 + K α; what differs is the kernel, and the loss that α minimises. Kernels are n × n, with one row for
each example, and there is one α for each class.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from foretune.arrays import Array, Labels
from foretune.errors import KernelError
from foretune.ntk.regression import fit_regression, predict
from foretune.ntk.spectrum import decompose


@dataclass(frozen=True)
class Lazy:
    """Predictions of evaluation examples by a kernel alone, m × C scores each.

    Attributes:
        regression: Squared loss, δ chosen by leave-one-out.
        logistic: Cross-entropy.
    """

    regression: Array
    logistic: Array


def lazy_scores(k_train: Array, k_eval: Array, labels: Labels, f_train: Array, f_eval: Array) -> Lazy:
    """Predict evaluation examples by kernel regression and by kernel logistic regression from f_0.

    Regression: f_0 + K(x, X)(K + δI)⁻¹(Y − p_0) with Y one-hot and p_0 = softmax f_0(X), in the coordinates of
    probabilities. Logistic: f_0 + K(x, X)α with α minimising Σ_i CE(f_0 + Kα, y)_i + (δ/8) Σ_c α_cᵀKα_c: the same δ,
    times the curvature 1/4 that the loss of two classes has at even odds.

    Args:
        k_train: n × n kernel.
        k_eval: m × n kernel.
        labels: n classes.
        f_train: n × C initial outputs, of a head that has not seen the example.
        f_eval: m × C initial outputs.

    Returns:
        Scores.

    Raises:
        KernelError: If the shapes do not fit each other.
    """
    n = len(labels)
    if k_train.shape != (n, n) or k_eval.shape != (len(f_eval), n) or len(f_train) != n:
        raise KernelError(f"kernels {k_train.shape} and {k_eval.shape} do not fit {n} labels, {len(f_eval)} to predict")
    eigen = decompose(k_train)
    one_hot = np.eye(f_train.shape[1])[labels]
    fit = fit_regression(eigen, one_hot, softmax(f_train, axis=1))
    regression = predict(fit, k_eval, softmax(f_eval, axis=1))
    root = np.sqrt(eigen.clipped)
    kept = root > 1e-7 * max(float(root.max(initial=0.0)), 1e-300)
    features = eigen.eigenvectors[:, kept] * root[kept]  # ΦΦᵀ = K
    beta = _logistic(features, one_hot, f_train, fit.ridge / 4.0)
    alpha = eigen.eigenvectors[:, kept] @ (beta / root[kept][:, None])
    return Lazy(regression, f_eval + k_eval @ alpha)


def _logistic(features: Array, one_hot: Array, offset: Array, penalty: float) -> Array:
    """β minimising Σ_i CE(f_0 + Φβ, y)_i + (penalty/2) ‖β‖²; of examples × features Φ."""
    shape = (features.shape[1], one_hot.shape[1])

    def objective(flat: Array) -> tuple[float, Array]:
        beta = flat.reshape(shape)
        scores = offset + features @ beta
        loss = -float(np.sum(one_hot * log_softmax(scores, axis=1))) + penalty / 2.0 * float(flat @ flat)
        return loss, (features.T @ (softmax(scores, axis=1) - one_hot) + penalty * beta).ravel()

    solution = minimize(objective, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return np.asarray(solution.x.reshape(shape))


def asymmetric_scores(k_train: Array, k_eval: Array, labels: Labels, f_train: Array, f_eval: Array) -> Array:
    """Predict by regression with the asymmetric kernel of sign descent, K(x, x') = ⟨∇f(x), sign ∇f(x')⟩.

    f_0 + K(x, X)(K + δI)⁻¹(Y − p_0) in the coordinates of probabilities; K(X, X) is not symmetric, so that there is no
    leave-one-out from eigenvectors, and δ is a tenth of its mean diagonal.

    Args:
        k_train: n × n kernel, rows x, columns x'.
        k_eval: m × n kernel.
        labels: n classes.
        f_train: n × C initial outputs, of a head that has not seen the example.
        f_eval: m × C initial outputs.

    Returns:
        m × C scores.

    References:
        Malladi, Wettig, Yu, Chen and Arora 2023, arXiv 2210.05643 (asymmetric SignGD kernel).
    """
    n = len(labels)
    ridge = 0.1 * abs(float(np.trace(k_train))) / n
    residual = np.eye(f_train.shape[1])[labels] - softmax(f_train, axis=1)
    if ridge == 0.0:
        return np.asarray(softmax(f_eval, axis=1))
    dual = np.linalg.solve(k_train + ridge * np.eye(n), residual)
    return np.asarray(softmax(f_eval, axis=1) + k_eval @ dual)
