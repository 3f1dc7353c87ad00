"""Spectrum of a tangent kernel: condition number with its numerical floor, effective ranks, target alignment.

Source of the condition number: Rahimi Afzal et al. 2024, "Can the Spectrum of the NTK Anticipate Fine-Tuning
Performance?", section 3. Everything is float64; eigenvalues are in the units of the kernel (squared output
per squared parameter step).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh
from scipy.special import entr

from foretune.arrays import Array
from foretune.errors import ConfigError, KernelError

# Relative to the largest entry and the largest eigenvalue. A float32 Gram product errs by about 1e-7.
SYMMETRY_TOLERANCE = 1e-8
NEGATIVE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Eigen:
    """Eigendecomposition K = U diag(λ) Uᵀ of an N × N kernel.

    Attributes:
        eigenvalues: N eigenvalues, descending, as they came: rounding may leave some below 0.
        eigenvectors: N × N matrix U; column i belongs to eigenvalue i.
        kernel: The N × N kernel that was decomposed, symmetric: U diag(λ) Uᵀ.
    """

    eigenvalues: Array
    eigenvectors: Array
    kernel: Array

    @property
    def clipped(self) -> Array:
        """Eigenvalues with the negative ones set to 0."""
        return np.maximum(self.eigenvalues, 0.0)


@dataclass(frozen=True)
class Spectrum:
    """Scalars of one kernel with N rows. l_i = max(λ_i, 0), descending; ρ is the argument of `spectrum`.

    Attributes:
        n: Rows N of the kernel (examples, or examples × outputs for a block kernel).
        lambda_max: Largest eigenvalue λ_1.
        lambda_min: Smallest eigenvalue λ_N as it came, negative values included.
        floor: N·ε·λ_1, below which an eigenvalue is rounding error of features with machine epsilon ε.
        lambda_min_resolved: Whether λ_N > floor.
        n_negative: Eigenvalues below 0, which count as 0 in everything but `lambda_min` and `trace`.
        sigma: σ.
        condition_number: κ = (l_1 + σ) / (l_N + σ).
        condition_number_interval: κ at λ_N = floor and at λ_N = 0 where λ_N is not resolved, else κ twice.
        saturated: λ_N is not resolved, or below σ/10. Then κ ≈ 1 + λ_1/σ, which measures the size of the
            gradients in units of σ and nothing of conditioning. Always so for a centred kernel.
        trace: Σ λ_i.
        effective_dimension: Σ l_i / (l_i + σ).
        stable_rank: Σ l_i / l_1.
        participation_ratio: (Σ l_i)² / Σ l_i².
        entropy_rank: exp(−Σ p_i log p_i) with p_i = l_i / Σ l_j.
        decay_exponent: −slope of the least-squares line of log l_i on log i over i ≥ 2 with l_i > 10·floor;
            None with fewer than 3 points.
        alignment: Centred kernel-target alignment, None without targets or where it is not defined.
        sigma_relative: ρ·trace/N.
        condition_number_relative: κ with `sigma_relative` for σ: unchanged by K → aK.
        effective_dimension_relative: Effective dimension with `sigma_relative` for σ: unchanged by K → aK.
        estimated: Errors, by name, of the scalars that were estimated because the kernel is too large to decompose
            (`foretune.ntk.large_spectrum`); None where none was. `n_negative` then counts λ_N alone.
    """

    n: int
    lambda_max: float
    lambda_min: float
    floor: float
    lambda_min_resolved: bool
    n_negative: int
    sigma: float
    condition_number: float
    condition_number_interval: tuple[float, float]
    saturated: bool
    trace: float
    effective_dimension: float
    stable_rank: float
    participation_ratio: float
    entropy_rank: float
    decay_exponent: float | None
    alignment: float | None
    sigma_relative: float
    condition_number_relative: float
    effective_dimension_relative: float
    estimated: Mapping[str, float] | None = None


def decompose(kernel: Array) -> Eigen:
    """Decompose a kernel, after checking that it is one.

    Args:
        kernel: N × N, symmetric to 1e-8·max|K| and positive semi-definite to 1e-6·λ_1.

    Returns:
        Eigenvalues, descending and not clipped, with their eigenvectors. Cost O(N³).

    Raises:
        KernelError: If the kernel is not square, finite, symmetric and positive semi-definite.
    """
    matrix = np.asarray(kernel, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise KernelError(f"a kernel must be a square matrix, got shape {matrix.shape}")
    n_bad = int(np.count_nonzero(~np.isfinite(matrix)))
    if n_bad:
        raise KernelError(f"{n_bad} entries of the kernel are nan or infinite: compute the features in float32")
    largest = float(np.abs(matrix).max())
    asymmetry = float(np.abs(matrix - matrix.T).max())
    if asymmetry > SYMMETRY_TOLERANCE * largest:
        raise KernelError(f"kernel is not symmetric: |K - Kᵀ| reaches {asymmetry:.3g}, |K| {largest:.3g}")
    symmetric = (matrix + matrix.T) / 2.0
    values, vectors = eigh(symmetric)
    if values[0] < -NEGATIVE_TOLERANCE * values[-1]:
        raise KernelError(
            f"kernel is not positive semi-definite: eigenvalue {values[0]:.3g} with largest {values[-1]:.3g}; "
            "accumulate Gram products in float64"
        )
    return Eigen(np.ascontiguousarray(values[::-1]), np.ascontiguousarray(vectors[:, ::-1]), symmetric)


def centre(kernel: Array, rows_per_example: int = 1) -> Array:
    """Centre a kernel over its examples: H K H with H = (I − 11ᵀ/n) ⊗ I_k.

    A result that is nothing but rounding error of K (features equal for all examples) is returned as zero.

    Args:
        kernel: n·k × n·k, rows example-major.
        rows_per_example: k.

    Returns:
        n·k × n·k kernel of the features less their mean, each of the k outputs by itself.

    Raises:
        KernelError: If k does not divide the number of rows.
    """
    n_rows, k = len(kernel), rows_per_example
    if k < 1 or n_rows % k:
        raise KernelError(f"a kernel of {n_rows} rows cannot have {k} rows for each example")
    blocks = np.asarray(kernel, dtype=np.float64).reshape(n_rows // k, k, n_rows // k, k)
    blocks = blocks - blocks.mean(axis=0, keepdims=True)
    blocks = blocks - blocks.mean(axis=2, keepdims=True)
    centred = blocks.reshape(n_rows, n_rows)
    # Eigenvalues of HKH err by up to N·eps·max|K|; below this size `decompose` would refuse it for the error alone.
    rounding = n_rows * float(np.finfo(np.float64).eps) * float(np.abs(kernel).max())
    if float(np.abs(centred).max()) <= rounding / NEGATIVE_TOLERANCE:
        return np.zeros((n_rows, n_rows))
    return np.asarray((centred + centred.T) / 2.0)


def alignment(kernel: Array, targets: Array, rows_per_example: int = 1) -> float | None:
    """Centred kernel-target alignment <HKH, Y>_F / (‖HKH‖_F ‖Y‖_F), in [0, 1] up to rounding.

    Y = T Tᵀ for n × t targets T centred in each column; for a block kernel Y = vec(T) vec(T)ᵀ, example-major.

    Args:
        kernel: n·k × n·k, rows example-major.
        targets: n × t; t = k for a block kernel (k > 1).
        rows_per_example: k.

    Returns:
        The alignment, None where the centred kernel or the centred targets are zero.

    Raises:
        KernelError: If targets and kernel do not have the same examples, or k ≠ t for a block kernel.

    References:
        Cortes, Mohri and Rostamizadeh 2012, JMLR 13, 795-828 (kernel matrix alignment).
    """
    n, t = targets.shape
    k = rows_per_example
    if n * k != len(kernel) or (k > 1 and t != k):
        raise KernelError(f"targets of shape {targets.shape} do not fit a kernel of {len(kernel)} rows, {k} an example")
    residual = targets - targets.mean(axis=0)
    if float(np.abs(residual).max()) <= n * float(np.finfo(np.float64).eps) * float(np.abs(targets).max()):
        return None
    columns = residual.reshape(-1, 1) if k > 1 else residual
    centred = centre(kernel, k)
    norm = float(np.linalg.norm(centred)) * float(np.linalg.norm(columns.T @ columns))
    return float(np.sum(columns * (centred @ columns))) / norm if norm > 0.0 else None


def spectrum(
    kernel: Array | Eigen,
    *,
    sigma: float,
    epsilon: float,
    targets: Array | None = None,
    rows_per_example: int = 1,
    rho: float = 1e-3,
) -> Spectrum:
    """Summarise the spectrum of a kernel; the formulas stand at the fields of `Spectrum`.

    A zero kernel has κ = 1, ranks 0 and neither decay nor alignment.

    Args:
        kernel: N × N kernel, or its decomposition.
        sigma: Regularisation σ > 0, in units of the kernel (the paper: 1e-4).
        epsilon: Machine epsilon of the dtype that the features were computed in.
        targets: n × t regression targets for the alignment.
        rows_per_example: N / n, above 1 for block kernels.
        rho: Regularisation of the scale-free forms, relative to the mean eigenvalue.

    Returns:
        The scalars.

    Raises:
        ConfigError: If σ or ρ is not positive and finite.
        KernelError: If the kernel is none, or the targets do not fit it.
    """
    check_positive("sigma", sigma, "the paper takes 1e-4")
    check_positive("rho", rho, "1e-3 is usual")
    eigen = kernel if isinstance(kernel, Eigen) else decompose(kernel)
    raw, values = eigen.eigenvalues, eigen.clipped
    n, largest, total = len(raw), float(values[0]), float(values.sum())
    floor = n * epsilon * largest
    resolved = bool(raw[-1] > floor)
    kappa = _condition_number(values, sigma)
    interval = (kappa, kappa) if resolved else ((largest + sigma) / (floor + sigma), (largest + sigma) / sigma)
    relative = rho * float(raw.sum()) / n
    return Spectrum(
        n=n,
        lambda_max=float(raw[0]),
        lambda_min=float(raw[-1]),
        floor=floor,
        lambda_min_resolved=resolved,
        n_negative=int(np.count_nonzero(raw < 0.0)),
        sigma=float(sigma),
        condition_number=kappa,
        condition_number_interval=interval,
        saturated=not resolved or bool(raw[-1] < 0.1 * sigma),
        trace=float(raw.sum()),
        effective_dimension=float(np.sum(values / (values + sigma))),
        stable_rank=total / largest if largest > 0.0 else 0.0,
        participation_ratio=float(1.0 / np.sum((values / total) ** 2)) if total > 0.0 else 0.0,
        entropy_rank=float(np.exp(np.sum(entr(values / total)))) if total > 0.0 else 0.0,
        decay_exponent=decay_exponent(values, floor),
        alignment=None if targets is None else alignment(eigen.kernel, targets, rows_per_example),
        sigma_relative=relative,
        condition_number_relative=_condition_number(values, relative) if relative > 0.0 else 1.0,
        effective_dimension_relative=float(np.sum(values / (values + relative))) if relative > 0.0 else 0.0,
    )


def check_positive(name: str, value: float, remedy: str) -> None:
    """Refuse a setting that is not positive and finite.

    Args:
        name: Of the setting.
        value: Its value.
        remedy: What to do instead.

    Raises:
        ConfigError: If the value is not positive and finite.
    """
    if not (np.isfinite(value) and value > 0.0):
        raise ConfigError(f"{name} = {value}: must be positive and finite; {remedy}")


def _condition_number(values: Array, sigma: float) -> float:
    return float((values[0] + sigma) / (values[-1] + sigma))


def decay_exponent(values: Array, floor: float) -> float | None:
    """Fit the power law of a spectrum, as told at `Spectrum.decay_exponent`.

    Args:
        values: Eigenvalues, descending and not below 0.
        floor: Ten times this is the least that counts.

    Returns:
        The exponent; None with fewer than 3 points.
    """
    index = np.arange(2, len(values) + 1)
    used = values[1:] > 10.0 * floor
    if np.count_nonzero(used) < 3:
        return None
    x, y = np.log(index[used]), np.log(values[1:][used])
    x = x - x.mean()
    return float(-(x @ y) / (x @ x))
