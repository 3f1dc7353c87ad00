"""Kernel ridge regression from the initial outputs, with exact leave-one-out predictions.

The linearised model started at f_0 and fitted with squared loss and a penalty on the distance of its
parameters is f(x) = f_0(x) + K(x, X) (K + δI)⁻¹ (y − f_0(X)): equation (9) of Rahimi Afzal et al. 2024 with
the offset f_0, which that equation leaves out.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from foretune.arrays import Array
from foretune.errors import KernelError
from foretune.ntk.spectrum import Eigen, check_positive
from foretune.tasks.readout import minimise_over

RIDGE_SPAN = (1e-8, 1e4)  # of the grid, relative to the mean eigenvalue
_POINTS = 61  # five for each decade


@dataclass(frozen=True)
class KernelRegression:
    """A fit on n examples with N kernel rows and t target columns.

    Mean squared errors are (1/n) Σ_i ‖·‖², in squared units of the targets. With l_i = max(λ_i, 0),
    c_i² = ‖u_iᵀ(y − f_0)‖² and v entries of y (n·t):

        gcv           (N²/n) Σ_i (c_i/(l_i + δ))² / (Σ_i 1/(l_i + δ))²
        τ             (1/v) Σ_i c_i²/(l_i + δ)
        log_evidence  −½ log τ − (1/2N) Σ_i log(l_i + δ) − ½ (1 + log 2π)

    The columns share τ. Centred targets (`trace`) have one dimension less than columns, which lowers τ and
    shifts `log_evidence` by a constant that depends on t alone.

    Attributes:
        ridge: δ, added to the diagonal of K.
        ridge_rule: `given`, or `loo` where δ minimises `loo_mse`.
        dual: (K + δI)⁻¹ (y − f_0(X)), N × t; N × 1 for a block kernel.
        fitted: n × t predictions of the examples themselves, offset included.
        loo: n × t predictions of each example by the other n - 1 with the same δ, offset included.
        train_mse: Of `fitted`.
        loo_mse: Of `loo`.
        gcv: Generalised cross-validation, an estimate of the same error as `loo_mse`.
        log_evidence: Log marginal likelihood of y − f_0(X) under N(0, τ(K + δI)) with the best τ, in nats per
            entry of y; None where y = f_0(X).
        n: Examples.
    """

    ridge: float
    ridge_rule: Literal["given", "loo"]
    dual: Array
    fitted: Array
    loo: Array
    train_mse: float
    loo_mse: float
    gcv: float
    log_evidence: float | None
    n: int


def fit_regression(
    eigen: Eigen, targets: Array, offset: Array, *, ridge: float | None = None, rows_per_example: int = 1
) -> KernelRegression:
    """Fit f(x) = f_0(x) + K(x, X) (K + δI)⁻¹ (y − f_0(X)) and predict each example by the others.

    With G = K + δI, a = G⁻¹(y − f_0) and all k kernel rows F of an example left out together, the leave-one-out
    error of that example is [(G⁻¹)_FF]⁻¹ a_F: for a scalar kernel a_i / (G⁻¹)_ii. δ stays as
    it is under deletion. A zero kernel returns the offset.

    Args:
        eigen: Decomposition of the N × N kernel; negative eigenvalues count as 0.
        targets: n × t targets y.
        offset: n × t initial outputs f_0(X), in the coordinates of the targets.
        ridge: δ > 0, in units of the kernel; None takes the δ in [1e-8, 1e4]·trace/N with the least `loo_mse`,
            the larger where two are equal.
        rows_per_example: k = N/n; above 1 for a block kernel, then t = k.

    Returns:
        The fit. Cost O(N²t + N²k) for each δ tried.

    Raises:
        KernelError: If targets, offset and kernel do not fit each other.
        ConfigError: If δ is not positive and finite.

    References:
        Golub, Heath and Wahba 1979, Technometrics 21 (GCV); Rasmussen and Williams 2006, equations (5.8) and
        (5.12); Rifkin and Lippert 2007, MIT-CSAIL-TR-2007-025 (leave-one-out).
    """
    n, k, n_rows = len(targets), rows_per_example, len(eigen.eigenvalues)
    columns = check_fits(targets, offset, n_rows, k)
    coefficients = eigen.eigenvectors.T @ columns
    rule: Literal["given", "loo"] = "loo" if ridge is None else "given"
    if ridge is None:
        ridge = _best_ridge(eigen, coefficients, k)
    check_positive("ridge", ridge, "leave it out to choose it by leave-one-out")
    shrink = ridge / (eigen.clipped + ridge)
    residual = eigen.eigenvectors @ (shrink[:, None] * coefficients)
    loo_error = _loo_error(eigen, coefficients, shrink, k)
    ratio = float(np.sum((shrink[:, None] / shrink.sum() * coefficients) ** 2))
    return KernelRegression(
        ridge=float(ridge),
        ridge_rule=rule,
        dual=residual / ridge,
        fitted=targets - residual.reshape(targets.shape),
        loo=targets - loo_error.reshape(targets.shape),
        train_mse=float(np.sum(residual**2)) / n,
        loo_mse=float(np.sum(loo_error**2)) / n,
        gcv=n_rows**2 / n * ratio,
        log_evidence=_log_evidence(eigen.clipped, coefficients, float(ridge)),
        n=n,
    )


def check_fits(targets: Array, offset: Array, n_rows: int, k: int) -> Array:
    """Refuse targets that do not belong to a kernel, and lay out what is regressed as its rows are.

    Args:
        targets: n × t targets y.
        offset: n × t initial outputs f_0(X), in the coordinates of the targets.
        n_rows: Rows N of the kernel.
        k: Rows of an example.

    Returns:
        y − f_0: N × t, and N × 1 for a block kernel.

    Raises:
        KernelError: If they do not fit each other.
    """
    n = len(targets)
    if targets.ndim != 2 or targets.shape != offset.shape or n * k != n_rows or (k > 1 and targets.shape[1] != k):
        raise KernelError(
            f"targets {targets.shape} and offset {offset.shape} do not fit a kernel of {n_rows} rows, {k} an example"
        )
    columns = np.asarray(targets - offset, dtype=np.float64)
    return columns.reshape(n_rows, 1) if k > 1 else columns


def ridge_grid(mean: float) -> Array:
    """List the ridges that are tried.

    Args:
        mean: Mean eigenvalue of the kernel.

    Returns:
        From the largest to the smallest, five for each decade.
    """
    low, high = RIDGE_SPAN
    return np.asarray(mean * np.geomspace(high, low, _POINTS))


def predict(fit: KernelRegression, k_eval_train: Array, offset_eval: Array) -> Array:
    """Predict further examples: f_0(x) + K(x, X) (K + δI)⁻¹ (y − f_0(X)).

    Args:
        fit: From `fit_regression`.
        k_eval_train: M × N kernel of the m examples with the training samples; M = m·k for a block kernel.
        offset_eval: m × t initial outputs f_0(x), in the coordinates of the targets.

    Returns:
        m × t predictions in the coordinates of the targets.

    Raises:
        KernelError: If kernel, offset and fit do not fit each other.
    """
    expected = (offset_eval.size // fit.dual.shape[1], len(fit.dual))
    if k_eval_train.shape != expected or offset_eval.shape[1] != fit.fitted.shape[1]:
        raise KernelError(
            f"a kernel of shape {k_eval_train.shape} with an offset of shape {offset_eval.shape} does not fit "
            f"{len(fit.dual)} training rows"
        )
    return np.asarray(offset_eval + (k_eval_train @ fit.dual).reshape(offset_eval.shape))


def _best_ridge(eigen: Eigen, coefficients: Array, k: int) -> float:
    values = eigen.clipped
    mean = float(values.mean())
    if mean == 0.0:
        return 1.0  # any δ gives the offset back

    def loo_error(ridge: float) -> float:
        return float(np.sum(_loo_error(eigen, coefficients, ridge / (values + ridge), k) ** 2))

    return minimise_over(loo_error, ridge_grid(mean))


def _loo_error(eigen: Eigen, coefficients: Array, shrink: Array, k: int) -> Array:
    """Leave-one-out errors, N × t. `shrink` is δ/(l + δ): δ cancels between (G⁻¹)_FF and a_F."""
    vectors = eigen.eigenvectors
    a = vectors @ (shrink[:, None] * coefficients)
    if k == 1:
        return np.asarray(a / ((vectors**2) @ shrink)[:, None])
    by_example = vectors.reshape(-1, k, len(vectors))
    inverse = (by_example * shrink) @ by_example.transpose(0, 2, 1)
    return np.asarray(np.linalg.solve(inverse, a.reshape(-1, k, 1)).reshape(a.shape), dtype=np.float64)


def _log_evidence(values: Array, coefficients: Array, ridge: float) -> float | None:
    tau = float(np.mean(coefficients**2 / (values + ridge)[:, None]))
    if tau == 0.0:
        return None
    return float(-0.5 * np.log(tau) - 0.5 * np.mean(np.log(values + ridge)) - 0.5 * (1.0 + np.log(2.0 * np.pi)))
