"""Gradient norm and PAGE of a placement, from its tangent kernel on n examples.

χ_i = ∂ℓ_i/∂z_i is the slope of the loss of example i in its outputs z_i: for the cross-entropy, softmax less one-hot.
Functions take χ as n or n × t numbers, with a kernel of n rows, which the t columns share (exact for t = 1; for the
`trace` reduction it leaves the products of different outputs out), or of n·t example-major rows (`full`).
"""

import numpy as np

from foretune.arrays import Array
from foretune.errors import KernelError


def gradient_norm(kernel: Array, chi: Array) -> float:
    """Norm of the gradient of the mean loss with respect to the adapters, √(χᵀKχ)/n.

    For a kernel that the t columns of χ share, √(Σ_c χ_cᵀKχ_c)/n. Larger is preferred.

    Args:
        kernel: N × N kernel K of the placement.
        chi: Slopes χ.

    Returns:
        Nats per unit of the adapters' parameters.

    Raises:
        KernelError: If kernel and χ do not fit each other.
    """
    n, columns = _fitting(kernel, chi)
    return float(np.sqrt(max(0.0, float(np.sum(columns * (kernel @ columns)))))) / n


def page(kernel: Array, chi: Array) -> float:
    """PAGE: mean over the examples of the squared norm of the gradient of their own loss, (1/n) Σ_i χ_i² K(i, i).

    For an n·t kernel (1/n) Σ_i χ_iᵀK_iiχ_i with the t × t blocks K_ii; for one that the t columns share,
    (1/n) Σ_i ‖χ_i‖² K(i, i). It is the trace of the empirical Fisher information of the adapters, of which the paper
    says that PAGE is made; its normalisation could not be checked, and does not change the order of placements.
    Larger is preferred: the paper puts one adapter on the module where it is largest.

    Args:
        kernel: N × N kernel K of the placement.
        chi: Slopes χ.

    Returns:
        Squared nats per squared unit of the adapters' parameters.

    Raises:
        KernelError: If kernel and χ do not fit each other.

    References:
        Zhang et al. 2026, arXiv 2605.06183.
    """
    n, columns = _fitting(kernel, chi)
    if len(columns) == n:
        return float(np.sum(np.sum(columns**2, axis=1) * np.diag(kernel))) / n
    slopes, k = columns.reshape(n, -1), len(columns) // n
    diagonal = kernel.reshape(n, k, n, k)[np.arange(n), :, np.arange(n)]
    return float(np.einsum("ia,iab,ib->", slopes, diagonal, slopes)) / n


def _fitting(kernel: Array, chi: Array) -> tuple[int, Array]:
    # Number of examples, and χ in columns over the rows of the kernel.
    chi = np.asarray(chi, dtype=np.float64)
    rows = len(kernel)
    if chi.ndim in (1, 2) and chi.size and kernel.shape == (rows, rows):
        if len(chi) == rows:
            return rows, chi.reshape(rows, -1)
        if chi.size == rows:
            return len(chi), chi.reshape(rows, 1)
    raise KernelError(
        f"slopes of shape {chi.shape} do not fit a kernel of shape {kernel.shape}: n or n × t slopes need n or n·t rows"
    )
