"""Kernel regression and its bounds for kernels that are too large to decompose: Cholesky factors of K + δI.

Everything at one ridge is exact: with G = L Lᵀ, solutions come from L, log det G from its diagonal and the blocks of
G⁻¹ from the columns of L⁻¹. Which ridges are worth a factor is told by a low-rank approximation of K.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.linalg import eigh, qr
from scipy.linalg.lapack import dpotrf, dpotrs, dtrtri

from foretune.arrays import Array
from foretune.errors import KernelError
from foretune.ntk.bounds import RiskBounds, bounds_of_risk
from foretune.ntk.large_spectrum import LargeKernel, lanczos
from foretune.ntk.regression import KernelRegression, check_fits, ridge_grid
from foretune.ntk.spectrum import check_positive
from foretune.tasks.readout import minimise_over

_DIRECTIONS = 512  # of the approximation
_STEPS, _STARTS = 64, 8  # of Lanczos for the smallest eigenvalue
_GAIN = 1e-3  # of the leave-one-out error, below which no further ridge is tried
_MOST_FACTORS = 12  # ridges that are tried exactly


@dataclass(frozen=True)
class Factor:
    """Cholesky factor L of G = K + δI.

    Attributes:
        lower: N × N lower triangle L, zeros above it.
        shift: δ.
    """

    lower: Array
    shift: float

    def solve(self, columns: Array) -> Array:
        """Solve G x = columns.

        Args:
            columns: N × p.

        Returns:
            N × p.
        """
        return np.asarray(dpotrs(self.lower, columns, lower=1)[0])


def factorise(matrix: Array, shift: float) -> Factor | None:
    """Factorise K + δI; memory is one copy of K.

    Args:
        matrix: N × N kernel K, symmetric.
        shift: δ > 0.

    Returns:
        The factor; None where rounding leaves K + δI without one.
    """
    copy = np.array(matrix, dtype=np.float64, order="C")
    copy.flat[:: len(copy) + 1] += shift
    lower, info = dpotrf(copy.T, lower=1, clean=1, overwrite_a=1)
    return None if info else Factor(lower, shift)


def smallest_eigenvalue(factor: Factor, seed: int = 0) -> tuple[float, float]:
    """Find the smallest eigenvalue of K by Lanczos on (K + δI)⁻¹.

    Args:
        factor: Of K + δI with a small δ.
        seed: Of the first vector.

    Returns:
        An upper bound that converges to it, and its error: twice the way from what half of the steps give, and not less
        than a ten-thousandth of λ_N + δ.
    """
    start = np.random.default_rng(seed).standard_normal((len(factor.lower), _STARTS))
    whole, half = lanczos(factor.solve, start, min(_STEPS, len(factor.lower)))
    values = [1.0 / float(part.nodes.max()) - factor.shift for part in (whole, half)]
    return values[0], max(2.0 * abs(values[1] - values[0]), 1e-4 * (abs(values[0]) + factor.shift))


def factor_for_bounds(matrix: Array, sigma: float) -> Factor:
    """Factorise K + σI, which has to be possible.

    Args:
        matrix: N × N kernel K.
        sigma: σ.

    Returns:
        The factor.

    Raises:
        KernelError: If it is not.
    """
    factor = factorise(matrix, sigma)
    if factor is None:
        raise KernelError(f"the kernel with σ = {sigma:g} on its diagonal is not positive definite: raise sigma")
    return factor


def large_risk_bounds(factor: Factor, residual: Array, ends: tuple[float, float]) -> RiskBounds:
    """Compute risk and bounds, as `foretune.ntk.bounds.risk_bounds`.

    Args:
        factor: Of K + σI.
        residual: n × t array y − f_0(X).
        ends: Largest and smallest eigenvalue of K.

    Returns:
        Risk and bounds.
    """
    columns = residual if len(residual) == len(factor.lower) else residual.reshape(-1, 1)
    fitted = factor.shift * factor.solve(columns)
    return bounds_of_risk(float(np.sum(fitted**2)) / len(residual), residual, ends, factor.shift)


def fit_large_regression(
    kernel: LargeKernel, targets: Array, offset: Array, *, ridge: float | None = None, seed: int = 0
) -> KernelRegression:
    """Fit as `foretune.ntk.regression.fit_regression` does, from Cholesky factors.

    Without a ridge, leave-one-out errors of K ≈ U diag(θ) Uᵀ + t(I − U Uᵀ), with 512 leading directions U and t the
    mean of the other eigenvalues, choose where to begin; from there the ridge moves by a fifth of a decade for as long
    as the exact leave-one-out error falls by a thousandth. Of several minima one that is shallower may be found.

    Args:
        kernel: The N × N kernel, not centred.
        targets: n × t targets y.
        offset: n × t initial outputs, in the coordinates of the targets.
        ridge: δ > 0; None chooses it.
        seed: Of the directions.

    Returns:
        The fit: exact at its ridge.

    Raises:
        KernelError: If targets, offset and kernel do not fit each other, or K + δI is not positive definite.
        ConfigError: If δ is not positive and finite.
    """
    matrix, k = kernel.matrix, kernel.rows_per_example
    columns = check_fits(targets, offset, len(matrix), k)
    rule: Literal["given", "loo"] = "loo" if ridge is None else "given"
    if ridge is not None:
        check_positive("ridge", ridge, "leave it out to choose it by leave-one-out")
        found = _fit(matrix, targets, columns, ridge, k, rule)
        if found is None:
            raise KernelError(f"the kernel with ridge = {ridge:g} is not positive definite: raise the ridge")
        return found
    if kernel.trace <= 0.0:
        found = _fit(matrix, targets, columns, 1.0, k, rule)  # any δ gives the offset back
        assert found is not None
        return found
    grid = ridge_grid(kernel.trace / len(matrix))
    start = minimise_over(_approximate_loo(kernel, columns, seed), grid)
    return _descend(lambda one: _fit(matrix, targets, columns, one, k, rule), start, (grid[-1], grid[0]))


def _descend(
    fit: Callable[[float], KernelRegression | None], start: float, ends: tuple[float, float]
) -> KernelRegression:
    """Walk along the ridges, downhill and not beyond the ends."""
    best, ridge, step = fit(start), start, 10.0**0.2
    while best is None:  # too small for a factor
        ridge *= step**5
        best = fit(ridge)
    tried = 1
    for factor in (step, 1.0 / step):
        moved = False
        while tried < _MOST_FACTORS and ends[0] <= ridge * factor <= ends[1]:
            tried += 1
            further = fit(ridge * factor)
            if further is None or further.loo_mse >= best.loo_mse * (1.0 - _GAIN):
                break
            best, ridge, moved = further, ridge * factor, True
        if moved:
            break
    return best


def _fit(
    matrix: Array, targets: Array, columns: Array, ridge: float, k: int, rule: Literal["given", "loo"]
) -> KernelRegression | None:
    factor = factorise(matrix, ridge)
    if factor is None:
        return None
    n, n_rows = len(targets), len(matrix)
    dual = factor.solve(columns)
    log_det = 2.0 * float(np.log(np.diagonal(factor.lower)).sum())
    inverse, _ = dtrtri(factor.lower, lower=1, overwrite_c=1)  # the factor is gone
    if k == 1:
        diagonal = np.einsum("ij,ij->j", inverse, inverse)
        loo_error, trace = dual / diagonal[:, None], float(diagonal.sum())
    else:
        by_example = inverse.reshape(n_rows, n, k)
        blocks = np.einsum("ria,rib->iab", by_example, by_example)
        loo_error = np.linalg.solve(blocks, dual.reshape(n, k, 1)).reshape(dual.shape)
        trace = float(np.trace(blocks, axis1=1, axis2=2).sum())
    residual = ridge * dual
    tau = float(np.sum(columns * dual)) / columns.size
    evidence = None
    if tau > 0.0:
        evidence = float(-0.5 * np.log(tau) - 0.5 * log_det / n_rows - 0.5 * (1.0 + np.log(2.0 * np.pi)))
    return KernelRegression(
        ridge=float(ridge),
        ridge_rule=rule,
        dual=dual,
        fitted=targets - residual.reshape(targets.shape),
        loo=targets - loo_error.reshape(targets.shape),
        train_mse=float(np.sum(residual**2)) / n,
        loo_mse=float(np.sum(loo_error**2)) / n,
        gcv=n_rows**2 / n * float(np.sum(dual**2)) / trace**2,
        log_evidence=evidence,
        n=n,
    )


def _approximate_loo(kernel: LargeKernel, columns: Array, seed: int) -> Callable[[float], float]:
    """Leave-one-out error, squared and summed, of the kernel's low-rank approximation as a function of the ridge."""
    n_rows, k = len(kernel.matrix), kernel.rows_per_example
    random = np.random.default_rng(seed)
    basis = random.standard_normal((n_rows, min(_DIRECTIONS, n_rows // 2)))
    for _ in range(2):
        basis = qr(kernel.apply(basis), mode="economic", overwrite_a=True)[0]
    values, turn = eigh(basis.T @ kernel.apply(basis))
    vectors, values = basis @ turn, np.maximum(values, 0.0)
    tail = max(0.0, (kernel.trace - float(values.sum())) / (n_rows - len(values)))
    coefficients = vectors.T @ columns
    by_example = vectors.reshape(-1, k, len(values))

    def error(ridge: float) -> float:
        rest = 1.0 / (tail + ridge)
        weights = 1.0 / (values + ridge) - rest
        dual = vectors @ (weights[:, None] * coefficients) + rest * columns
        if k == 1:
            return float(np.sum((dual / ((vectors**2) @ weights + rest)[:, None]) ** 2))
        blocks = (by_example * weights) @ by_example.transpose(0, 2, 1) + rest * np.eye(k)
        return float(np.sum(np.linalg.solve(blocks, dual.reshape(-1, k, 1)) ** 2))

    return error
