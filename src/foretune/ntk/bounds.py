"""Empirical risk of kernel ridge regression on its own samples, and bounds on it from the spectrum."""

from dataclasses import dataclass

import numpy as np

from foretune.arrays import Array
from foretune.errors import ConfigError, KernelError
from foretune.ntk.spectrum import Eigen, check_positive

_TOLERANCE = 1e-9  # relative, so that a bound that is attained holds in floating point


@dataclass(frozen=True)
class Interval:
    """A lower and an upper bound.

    Attributes:
        lower: Lower bound.
        upper: Upper bound.
        holds: Whether the empirical risk lies between them, to a relative 1e-9.
    """

    lower: float
    upper: float
    holds: bool


@dataclass(frozen=True)
class RiskBounds:
    """Theorem 1 in both forms, with the risk itself. ‖ỹ‖² is the sum of squares of the residual ỹ = y − f_0(X).

    Attributes:
        sigma: Ridge σ of the regression.
        target: What is regressed.
        empirical_risk: R = (1/n) Σ_i (σ/(σ + l_i))² ‖u_iᵀ ỹ‖², exact.
        printed: σ‖ỹ‖²/(σ + l_1) ≤ R ≤ σ‖ỹ‖²/(σ + l_N), as the paper prints it.
        tight: (1/n) (σ/(σ + l_1))² ‖ỹ‖² ≤ R ≤ (1/n) (σ/(σ + l_N))² ‖ỹ‖².
        trivial: ‖ỹ‖²/n, the risk of not moving from f_0.
        n: Examples.
    """

    sigma: float
    target: str
    empirical_risk: float
    printed: Interval
    tight: Interval
    trivial: float
    n: int


def risk_bounds(eigen: Eigen, residual: Array, *, sigma: float) -> RiskBounds:
    """Compute the empirical risk of f = f_0 + K (K + σI)⁻¹ ỹ on its own samples, and the two bounds.

    With ridge σ the residual of the fit is σ(K + σI)⁻¹ ỹ, so the mean squared error is the sum given at
    `RiskBounds.empirical_risk`. The tight bounds replace every eigenvalue by the largest or the smallest; they
    are attained where ỹ is the first or the last eigenvector.

    The paper's equations (10) and (12) leave out the square of the shrinkage factor and the 1/n. The upper
    bound survives, loose, as both factors are at most 1. The lower bound is false in general: for K = λI with
    λ > 0 it always exceeds the risk; for a kernel with λ_N = 0 and σ + λ_1 < nσ it exceeds even `trivial`.
    Neither form contains the condition number: (λ_1 + σ)/(λ_N + σ) is the ratio of the printed bounds, their
    looseness, and its square the ratio of the tight ones. The bounds are about the N rows of this very kernel:
    nothing in them speaks of other samples.

    Args:
        eigen: Decomposition of the N × N kernel; negative eigenvalues count as 0.
        residual: n × t array y − f_0(X), in target coordinates. N = n for a scalar kernel, shared by the t
            columns; N = n·t for a block kernel (flattened example-major).
        sigma: Ridge σ > 0, in units of the kernel.

    Returns:
        Risk and bounds, in squared units of the targets.

    Raises:
        ConfigError: If σ is not positive and finite.
        KernelError: If the residual does not fit the kernel.

    References:
        Rahimi Afzal et al. 2024, theorem 1, equations (10) to (12).
    """
    check_positive("sigma", sigma, "the paper takes 1e-4")
    values = eigen.clipped
    energy = _energies(eigen, residual)
    shrink = sigma / (sigma + values)
    risk = float(np.sum(shrink**2 * energy)) / len(residual)
    return bounds_of_risk(risk, residual, (float(values[0]), float(values[-1])), sigma)


def bounds_of_risk(risk: float, residual: Array, ends: tuple[float, float], sigma: float) -> RiskBounds:
    """Set an empirical risk beside its bounds, whose formulas stand at `RiskBounds`.

    Args:
        risk: Empirical risk R.
        residual: n × t array y − f_0(X).
        ends: Largest and smallest eigenvalue l_1 and l_N; a negative one counts as 0.
        sigma: Ridge σ > 0.

    Returns:
        Risk and bounds.
    """
    n, norm = len(residual), float(np.sum(residual**2))
    low, high = (sigma / (sigma + max(end, 0.0)) for end in ends)
    return RiskBounds(
        sigma=float(sigma),
        target="y - f0",
        empirical_risk=risk,
        printed=_interval(low * norm, high * norm, risk),
        tight=_interval(low**2 * norm / n, high**2 * norm / n, risk),
        trivial=norm / n,
        n=n,
    )


def label_energy_bound(eigen: Eigen, residual: Array, *, sigma: float, k: int) -> float:
    """Bound the empirical risk by the label energy outside the k leading eigenvectors.

    R ≤ (1/n) [ (σ/(σ + l_k))² Σ_{i≤k} c_i² + Σ_{i>k} c_i² ] with c_i² = ‖u_iᵀ ỹ‖². At k = 0 this is the trivial
    risk ‖ỹ‖²/n, at k = N the tight upper bound of `risk_bounds`.

    Args:
        eigen: Decomposition of the N × N kernel; negative eigenvalues count as 0.
        residual: n × t array y − f_0(X), as for `risk_bounds`.
        sigma: Ridge σ > 0, in units of the kernel.
        k: Leading eigenvectors, 0 … N.

    Returns:
        Upper bound on R, in squared units of the targets.

    Raises:
        ConfigError: If k is not between 0 and N, or σ not positive and finite.
        KernelError: If the residual does not fit the kernel.
    """
    check_positive("sigma", sigma, "the paper takes 1e-4")
    values = eigen.clipped
    if not 0 <= k <= len(values):
        raise ConfigError(f"k = {k}: must lie between 0 and the number of eigenvalues, {len(values)}")
    energy = _energies(eigen, residual)
    shrink = sigma / (sigma + float(values[k - 1])) if k else 1.0
    return float(shrink**2 * energy[:k].sum() + energy[k:].sum()) / len(residual)


def _energies(eigen: Eigen, residual: Array) -> Array:
    """Energy ‖u_iᵀ ỹ‖² of the residual along each eigenvector."""
    n_rows = len(eigen.eigenvalues)
    if residual.ndim != 2 or n_rows not in (residual.shape[0], residual.size):
        raise KernelError(f"a residual of shape {residual.shape} does not fit a kernel of {n_rows} rows")
    columns = residual if len(residual) == n_rows else residual.reshape(n_rows, 1)
    return np.asarray(np.sum((eigen.eigenvectors.T @ columns) ** 2, axis=1))


def _interval(lower: float, upper: float, risk: float) -> Interval:
    slack = _TOLERANCE * risk
    return Interval(lower, upper, holds=lower <= risk + slack and risk <= upper + slack)
