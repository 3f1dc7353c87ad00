"""Spectra of kernels that are too large to decompose: the ends by Lanczos, sums over all eigenvalues by quadrature.

With l_1 … l_m and U from Lanczos, P = I − U Uᵀ and random signs z, a sum over the other eigenvalues is

    Σ_{i>m} f(l_i) = E zᵀ P f(P K P) P z

and every such product is Gaussian quadrature with the nodes and weights of a Lanczos run from P z (stochastic Lanczos
quadrature). Its error is told from the spread over the z and from what half of the steps give.

A kernel K = φ φᵀ of P < N features has the nonzero eigenvalues of a P × P matrix, and N − P zeros: of Qᵀ K Q, with Q an
orthonormal basis of K Ω for random Ω, which spans all of K. It takes no features to make, and it is decomposed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import eigh_tridiagonal, eigvalsh, qr
from scipy.sparse.linalg import LinearOperator, eigsh
from scipy.special import xlogy

from foretune.arrays import Array
from foretune.errors import KernelError
from foretune.ntk.spectrum import NEGATIVE_TOLERANCE, Eigen, Spectrum, decay_exponent, spectrum

DENSE = 4096  # rows up to which a kernel is decomposed
_LEADING = 32  # eigenvalues that are taken exactly
_PROBES = 16
_STEPS = 96
_CHUNK = 256  # rows that are looked at together, and columns that are multiplied
_SPARE = 16  # columns beside the rank, for a basis that surely spans all
_LOST = 1e-9  # of the trace, that a basis may miss: rounding

Apply = Callable[[Array], Array]  # of N × p columns


@dataclass(frozen=True)
class LargeKernel:
    """A symmetric N × N kernel, or that kernel centred over its examples, known by its products.

    Attributes:
        matrix: N × N kernel K, rows example-major; may be mapped from a file.
        rows_per_example: k.
        centred: Whether H K H is meant, H = (I − 11ᵀ/n) ⊗ I_k.
        trace: Of the kernel that is meant.
        norm: Its Frobenius norm.
        largest: Its largest entry, by absolute value; 0 where H K H is nothing but rounding error of K.
    """

    matrix: Array
    rows_per_example: int
    centred: bool
    trace: float
    norm: float
    largest: float

    def apply(self, columns: Array) -> Array:
        """Multiply.

        Args:
            columns: N × p.

        Returns:
            N × p.
        """
        if not self.centred:
            return np.asarray(self.matrix @ columns)
        return self._centre(self.matrix @ self._centre(columns))

    def _centre(self, columns: Array) -> Array:
        blocks = columns.reshape(-1, self.rows_per_example, columns.shape[1])
        return np.asarray((blocks - blocks.mean(axis=0)).reshape(columns.shape))


def large_kernel(matrix: Array, rows_per_example: int = 1, *, centred: bool = False) -> LargeKernel:
    """Look at a kernel once, a few rows at a time.

    Args:
        matrix: N × N kernel, exactly symmetric.
        rows_per_example: k.
        centred: Whether H K H is meant.

    Returns:
        The kernel with its trace and norms.

    Raises:
        KernelError: If entries are not finite.
    """
    n_rows, k = len(matrix), rows_per_example
    mean = np.zeros((k, n_rows))
    plain = 0.0
    for start in range(0, n_rows, _CHUNK * k):
        rows = np.asarray(matrix[start : start + _CHUNK * k])
        if not np.isfinite(rows).all():
            raise KernelError("entries of the kernel are nan or infinite: compute the features in float32")
        plain = max(plain, float(np.abs(rows).max()))
        mean += rows.reshape(-1, k, n_rows).sum(axis=0) * (k / n_rows)
    both = mean.reshape(k, -1, k).mean(axis=1)  # over the examples of rows and of columns
    trace, square, largest = 0.0, 0.0, 0.0
    for start in range(0, n_rows, _CHUNK * k):
        rows = np.array(matrix[start : start + _CHUNK * k])
        if centred:
            blocks = rows.reshape(len(rows) // k, k, n_rows // k, k)
            blocks -= mean.reshape(1, k, n_rows // k, k)
            of_rows = mean[:, start : start + len(rows)].T.reshape(len(rows) // k, k, k)
            blocks -= of_rows[:, :, None, :]
            blocks += both[None, :, None, :]
        trace += float(np.trace(rows[:, start : start + len(rows)]))
        square += float(np.vdot(rows, rows))
        largest = max(largest, float(np.abs(rows).max()))
    if centred and largest <= n_rows * float(np.finfo(np.float64).eps) * plain / NEGATIVE_TOLERANCE:
        trace, square, largest = 0.0, 0.0, 0.0
    return LargeKernel(matrix, k, centred, trace, float(np.sqrt(square)), largest)


def large_alignment(centred: LargeKernel, targets: Array) -> float | None:
    """Centred kernel-target alignment, as `foretune.ntk.spectrum.alignment`.

    Args:
        centred: The centred kernel.
        targets: n × t; t = k for a block kernel (k > 1).

    Returns:
        The alignment, None where it is not defined.
    """
    residual = targets - targets.mean(axis=0)
    if float(np.abs(residual).max()) <= len(targets) * float(np.finfo(np.float64).eps) * float(np.abs(targets).max()):
        return None
    columns = residual.reshape(-1, 1) if centred.rows_per_example > 1 else residual
    norm = centred.norm * float(np.linalg.norm(columns.T @ columns))
    return float(np.sum(columns * centred.apply(columns))) / norm if norm > 0.0 else None


@dataclass(frozen=True)
class Quadrature:
    """Nodes and weights that stand for the eigenvalues of a matrix, from p random vectors and s steps of Lanczos.

    Attributes:
        nodes: p × s.
        weights: p × s; those of one vector sum up to its squared length.
    """

    nodes: Array
    weights: Array

    def sums(self, function: Callable[[Array], Array]) -> Array:
        """Estimate Σ f(l_i) by each vector.

        Args:
            function: f, of nodes that are not below 0.

        Returns:
            p estimates.
        """
        return np.asarray(np.sum(self.weights * function(np.maximum(self.nodes, 0.0)), axis=1))


def lanczos(apply: Apply, starts: Array, steps: int) -> tuple[Quadrature, Quadrature]:
    """Run Lanczos from several vectors side by side, with full reorthogonalisation.

    Args:
        apply: Multiplies N × p columns by a symmetric matrix.
        starts: N × p.
        steps: Products s for each vector.

    Returns:
        The quadrature of all steps, and that of the first half of them.
    """
    n_rows, p = starts.shape
    lengths = np.linalg.norm(starts, axis=0)
    held = np.zeros((p, steps, n_rows))
    alpha, beta = np.zeros((p, steps)), np.zeros((p, steps))
    vector = starts.T / np.where(lengths > 0.0, lengths, 1.0)[:, None]
    for step in range(steps):
        held[:, step] = vector
        image = np.ascontiguousarray(apply(np.ascontiguousarray(vector.T)).T)
        alpha[:, step] = np.sum(vector * image, axis=1)
        basis = held[:, : step + 1]
        for _ in range(2):
            image -= np.squeeze((basis @ image[:, :, None]).swapaxes(1, 2) @ basis, axis=1)
        beta[:, step] = np.linalg.norm(image, axis=1)
        scale = np.abs(alpha[:, : step + 1]).max(axis=1) + beta[:, : step + 1].max(axis=1)
        beta[:, step] *= beta[:, step] > 1e-12 * scale  # an invariant space: what comes after has no weight
        vector = np.where(beta[:, step : step + 1] > 0.0, image / np.maximum(beta[:, step : step + 1], 1e-300), 0.0)
    return _quadrature(alpha, beta, lengths), _quadrature(alpha[:, : (steps + 1) // 2], beta, lengths)


def _quadrature(alpha: Array, beta: Array, lengths: Array) -> Quadrature:
    steps = alpha.shape[1]
    found = [eigh_tridiagonal(a, b[: steps - 1]) for a, b in zip(alpha, beta, strict=True)]
    weights = np.array([vectors[0] ** 2 for _, vectors in found]) * (lengths**2)[:, None]
    return Quadrature(np.array([values for values, _ in found]), weights)


def estimate_spectrum(
    kernel: LargeKernel,
    *,
    sigma: float,
    epsilon: float,
    lambda_min: tuple[float, float],
    alignment: float | None = None,
    rho: float = 1e-3,
    seed: int = 0,
    rank: int | None = None,
) -> tuple[Spectrum, Array]:
    """Summarise a spectrum without decomposing the kernel; the formulas stand at the fields of `Spectrum`.

    Exact to rounding: trace, stable rank, participation ratio, λ_max and the 31 that follow it, and κ as far as
    `lambda_min` is. Estimated, with an error in `estimated`: effective dimensions, entropy rank, decay exponent.

    Args:
        kernel: The kernel.
        sigma: σ > 0.
        epsilon: Machine epsilon of the features.
        lambda_min: Smallest eigenvalue and its error.
        alignment: Its alignment, if known.
        rho: As `spectrum` takes it.
        seed: Of the random vectors.
        rank: Features that the kernel is of, where that is known. Where they are fewer than its rows, all is exact to
            rounding, and λ_N is 0.

    Returns:
        The scalars, and N numbers that stand for the eigenvalues, descending: the leading ones, and quantiles of the
        estimated density of the others.

    Raises:
        KernelError: If the kernel is not positive semi-definite.
    """
    n_rows, random = len(kernel.matrix), np.random.default_rng(seed)
    if kernel.largest == 0.0:
        return _spectrum(kernel, np.zeros(n_rows), sigma, epsilon, (0.0, 0.0), alignment, rho, {}), np.zeros(n_rows)
    known = None if rank is None else low_rank_eigenvalues(kernel, rank, seed)
    if known is not None:
        whole_spectrum = spectrum(Eigen(known, known[:, None], known[:, None]), sigma=sigma, epsilon=epsilon, rho=rho)
        kappa = (whole_spectrum.condition_number,) * 2
        return replace(
            whole_spectrum, lambda_min_resolved=True, condition_number_interval=kappa, alignment=alignment
        ), known
    operator = LinearOperator((n_rows, n_rows), matvec=_vector(kernel.apply), matmat=kernel.apply, dtype=np.float64)
    leading, vectors = eigsh(operator, k=_LEADING, which="LA", v0=random.standard_normal(n_rows), tol=1e-10)
    leading, vectors = np.maximum(leading[::-1], 0.0), vectors[:, ::-1]

    def rest(columns: Array) -> Array:
        return np.asarray(columns - vectors @ (vectors.T @ columns))

    starts = rest(random.choice([-1.0, 1.0], size=(n_rows, _PROBES)))
    steps = min(_STEPS, n_rows - _LEADING)
    whole, half = lanczos(lambda columns: rest(kernel.apply(rest(columns))), starts, steps)
    if float(whole.nodes.min()) < -NEGATIVE_TOLERANCE * leading[0]:
        raise KernelError(
            f"kernel is not positive semi-definite: eigenvalue {whole.nodes.min():.3g} with largest {leading[0]:.3g}; "
            "accumulate Gram products in float64"
        )
    relative = rho * kernel.trace / n_rows

    def total(function: Callable[[Array], Array]) -> tuple[float, float]:
        """The sum, and its error."""
        each = whole.sums(function)
        spread = float(each.std(ddof=1)) / np.sqrt(len(each))
        shorter = abs(float(each.mean() - half.sums(function).mean()))
        return float(function(leading).sum() + each.mean()), float(np.hypot(spread, shorter))

    dimension, of_dimension = total(lambda x: x / (x + sigma))
    scale_free, of_scale_free = total(lambda x: x / (x + relative))
    entropy, of_entropy = total(lambda x: xlogy(x, x))
    entropy_rank = float(np.exp(np.log(kernel.trace) - entropy / kernel.trace))
    values = _quantiles(leading, whole, n_rows)
    floor = n_rows * epsilon * float(leading[0])
    others = (_some(whole, slice(0, None, 2)), _some(whole, slice(1, None, 2)), half)
    exponent, *of_others = (
        decay_exponent(part, floor) for part in (values, *(_quantiles(leading, one, n_rows) for one in others))
    )
    errors = {
        "lambda_min": lambda_min[1],
        "effective_dimension": of_dimension,
        "effective_dimension_relative": of_scale_free,
        "entropy_rank": entropy_rank * of_entropy / kernel.trace,
    }
    if exponent is not None:
        off = [abs(other - exponent) for other in of_others if other is not None]
        errors["decay_exponent"] = max(*off, 0.01 * abs(exponent))  # quantiles of a quadrature are no eigenvalues
    found = _spectrum(kernel, values, sigma, epsilon, lambda_min, alignment, rho, errors)
    estimates = {
        "effective_dimension": dimension,
        "effective_dimension_relative": scale_free,
        "entropy_rank": entropy_rank,
        "decay_exponent": exponent,
    }
    return Spectrum(**{**vars(found), **estimates}), values


def low_rank_eigenvalues(kernel: LargeKernel, rank: int, seed: int = 0) -> Array | None:
    """Find all eigenvalues of a kernel of few features; memory is N × (P + 16) numbers.

    Args:
        kernel: The kernel.
        rank: Features P.
        seed: Of the random vectors.

    Returns:
        N eigenvalues, descending: those of Qᵀ K Q, not below 0, and zeros. None where P + 16 is not below the rows, or
        above what is decomposed, or where Q misses a part of the trace, because there are more features than that.

    Raises:
        KernelError: If the kernel is not positive semi-definite.
    """
    n_rows, width = len(kernel.matrix), rank + _SPARE
    if width >= n_rows or width > DENSE:
        return None
    random, basis = np.random.default_rng(seed), np.empty((n_rows, width), order="F")
    chunks = [slice(start, min(width, start + _CHUNK)) for start in range(0, width, _CHUNK)]
    for chunk in chunks:
        basis[:, chunk] = kernel.apply(random.standard_normal((n_rows, chunk.stop - chunk.start)))
    basis = qr(basis, mode="economic", overwrite_a=True)[0]
    small = np.concatenate([basis.T @ kernel.apply(basis[:, chunk]) for chunk in chunks], axis=1)
    values = eigvalsh((small + small.T) / 2.0)[::-1]
    if values[-1] < -NEGATIVE_TOLERANCE * values[0]:
        raise KernelError(
            f"kernel is not positive semi-definite: eigenvalue {values[-1]:.3g} with largest {values[0]:.3g}; "
            "accumulate Gram products in float64"
        )
    if abs(float(values.sum()) - kernel.trace) > _LOST * kernel.trace:
        return None
    return np.concatenate([np.maximum(values[:rank], 0.0), np.zeros(n_rows - rank)])


def _vector(apply: Apply) -> Apply:
    return lambda vector: apply(vector.reshape(-1, 1))[:, 0]


def _some(quadrature: Quadrature, which: slice) -> Quadrature:
    return Quadrature(quadrature.nodes[which], quadrature.weights[which])


def _quantiles(leading: Array, rest: Quadrature, n_rows: int) -> Array:
    """Numbers in the place of N eigenvalues: i − m is the number of those of the rest that are not smaller."""
    order = np.argsort(-rest.nodes, axis=None)
    nodes = np.maximum(rest.nodes.ravel()[order], 0.0)
    weights = rest.weights.ravel()[order]
    count = n_rows - len(leading)
    middles = (np.cumsum(weights) - weights / 2.0) * (count / weights.sum())
    logs = np.log(np.maximum(nodes, np.finfo(np.float64).tiny))  # eigenvalues fall by orders of magnitude
    tail = np.exp(np.interp(np.arange(count) + 0.5, middles, logs))
    return np.concatenate([leading, np.minimum(tail, leading[-1])])


def _spectrum(
    kernel: LargeKernel,
    values: Array,
    sigma: float,
    epsilon: float,
    lambda_min: tuple[float, float],
    alignment: float | None,
    rho: float,
    errors: dict[str, float],
) -> Spectrum:
    """The scalars that need no sum over all eigenvalues; the others as of a zero kernel."""
    n_rows, largest, smallest = len(values), float(values[0]), lambda_min[0]
    floor = n_rows * epsilon * largest
    low, high = smallest - lambda_min[1], smallest + lambda_min[1]
    resolved = low > floor
    ends = (high, low) if resolved else (max(floor, high), 0.0)
    interval = ((largest + sigma) / (ends[0] + sigma), (largest + sigma) / (ends[1] + sigma))
    clipped = max(smallest, 0.0)
    kappa = (largest + sigma) / (clipped + sigma)
    relative = rho * kernel.trace / n_rows
    return Spectrum(
        n=n_rows,
        lambda_max=largest,
        lambda_min=smallest,
        floor=floor,
        lambda_min_resolved=resolved,
        n_negative=int(smallest < 0.0),
        sigma=float(sigma),
        condition_number=kappa,
        condition_number_interval=interval,
        saturated=not resolved or smallest < 0.1 * sigma,
        trace=kernel.trace,
        effective_dimension=0.0,
        stable_rank=kernel.trace / largest if largest > 0.0 else 0.0,
        participation_ratio=(kernel.trace / kernel.norm) ** 2 if kernel.norm > 0.0 else 0.0,
        entropy_rank=0.0,
        decay_exponent=None,
        alignment=alignment,
        sigma_relative=relative,
        condition_number_relative=(largest + relative) / (clipped + relative) if relative > 0.0 else 1.0,
        effective_dimension_relative=0.0,
        estimated=errors,
    )
