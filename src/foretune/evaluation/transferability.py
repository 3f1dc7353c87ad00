"""Transferability metrics: how well frozen features suit a task, from n × D features and n labels.

A new metric is a function here and an entry in `predictors.BASELINES`. Every metric grows with the fitness of the
features, and none knows of adapters: on the model's last features all placements of a data set share its value.
Conventions of all functions: features are float64, labels are integers in 0 … C-1, a class without examples counts as
not there, renaming the classes changes nothing. Where the features are constant every metric has its value for features
that tell nothing.
"""

import warnings
from functools import partial

import numpy as np
from scipy.linalg import svd
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from foretune.arrays import Array, Labels
from foretune.errors import ConfigError
from foretune.evaluation.statistics import spearman
from foretune.tasks.readout import minimise_over

RATIOS = np.geomspace(1e8, 1e-8, 81)  # of α/β in the mean eigenvalue; of equal evidence the larger noise


def log_me(features: Array, labels: Labels, n_classes: int) -> float:
    """LogME: log evidence of Bayesian linear regression on one-hot labels, at its best α and β.

    Mean over the classes c of the largest (1/n) log N(y_c; 0, K/α + I/β) over α, β > 0, with K = ΦΦᵀ and y_c the
    0/1 indicator of class c; the features are not centred. With λ_i and u_i the eigenpairs of K and t = α/β the best
    scale is closed, τ = (1/n) Σ_i (u_iᵀy)²/(λ_i + t), and

        LogME = max_t −½ log τ − (1/2n) Σ_i log(λ_i + t) − ½ (1 + log 2π)

    over t in [1e-8, 1e8] · tr K/n. Over the k = rank(Φ) non-zero λ_i this is the published

        (k/2) log α + (n/2) log β − ½ Σ_{i≤k} log(α + βλ_i) − (β/2) ‖y − Φm‖² − (α/2) ‖m‖² − (n/2) log 2π

    divided by n. The authors' code has D in place of k, which adds (D − k) log(α)/2n where k < D, so whenever n < D.
    t is searched over a grid and then refined: the published fixed point finds stationary points of the same
    function, yet runs to t = 0 or ∞, slowly, where the labels are fitted exactly or not at all. An exact fit by
    k < n dimensions has no largest evidence, and the value is that at the end of the grid.

    Args:
        features: n × D features Φ.
        labels: n classes.
        n_classes: C.

    Returns:
        Nats per example and class; invariant to rotation and scale of the features.

    Raises:
        ConfigError: If the arguments do not fit each other or hold a single class.

    References:
        You et al. 2021, arXiv 2102.11005; You et al. 2022, arXiv 2110.10545 (fixed point).
    """
    features, member = _checked(features, labels, n_classes)
    n = len(features)
    vectors, singular = _thin(features)
    values = singular**2 / (float(np.sum(singular**2)) / n or 1.0)  # τ takes up the scale
    inside = vectors.T @ member
    outside = np.sum((member - vectors @ inside) ** 2, axis=0) if len(values) < n else np.zeros(member.shape[1])

    def surprise(index: int, ratio: float) -> float:
        tau = float(np.sum(inside[:, index] ** 2 / (values + ratio)) + outside[index] / ratio) / n
        log_det = float(np.sum(np.log(values + ratio)) + (n - len(values)) * np.log(ratio))
        return 0.5 * (float(np.log(tau)) + log_det / n + 1.0 + float(np.log(2.0 * np.pi)))

    least = [surprise(index, minimise_over(partial(surprise, index), RATIOS)) for index in range(member.shape[1])]
    return -float(np.mean(least))


def h_score(features: Array, labels: Labels, n_classes: int) -> float:
    """H-score with a shrunk covariance: between-class variance of the features in units of their variance.

    tr(Σ_α⁻¹ (1 − α) Σ_B) with Σ = ΦcᵀΦc/n, Σ_α = (1 − α) Σ + α (tr Σ/D) I of Ledoit and Wolf, and Σ_B the
    covariance (1/n) of the class means, each example counted. With Φc = U S Vᵀ and P_B the projection on the classes
    it is Σ_j (1 − α) s_j² ‖P_B u_j‖²/n / ((1 − α) s_j²/n + α tr Σ/D), and so between 0 and C − 1. Without shrinkage it
    is C − 1 for almost any features as soon as n ≤ D. (The authors' code divides Σ_B by n − 1.)

    Args:
        features: n × D features Φ.
        labels: n classes.
        n_classes: C.

    Returns:
        A pure number, invariant to rotation, shift and scale of the features.

    Raises:
        ConfigError: If the arguments do not fit each other or hold a single class.

    References:
        Bao et al. 2019, ICIP; Ibrahim et al. 2021, arXiv 2110.06893 (shrinkage); Ledoit and Wolf 2004.
    """
    features, member = _checked(features, labels, n_classes)
    n, width = features.shape
    centred = _centred(features)
    vectors, singular = _thin(centred)
    if len(singular) == 0:
        return 0.0
    shrinkage = float(ledoit_wolf_shrinkage(centred / singular[0], assume_centered=True))
    variances = singular**2 / n
    between = np.sum((vectors.T @ member) ** 2 / member.sum(axis=0), axis=1)
    total = (1.0 - shrinkage) * variances + shrinkage * variances.sum() / width
    return float(np.sum((1.0 - shrinkage) * variances * between / total))


def leep(posteriors: Array, labels: Labels, n_classes: int) -> float:
    """LEEP: mean log likelihood of the labels under the mixture of what each source class says of them.

    (1/n) Σ_i log Σ_z P(y_i | z) θ_iz with P(y | z) = Σ_{i: y_i = y} θ_iz / Σ_i θ_iz.

    Args:
        posteriors: n × Z probabilities θ of the source classes z, rows summing to 1.
        labels: n classes.
        n_classes: C.

    Returns:
        Nats per example, at most 0; no less than minus the entropy of the class shares.

    Raises:
        ConfigError: If the arguments do not fit each other or hold a single class.

    References:
        Nguyen et al. 2020, arXiv 2002.12462.
    """
    posteriors, member = _checked(posteriors, labels, n_classes)
    mass = posteriors.sum(axis=0)
    likely = mass > 0.0
    conditional = (member.T @ posteriors[:, likely]) / mass[likely]
    return float(np.mean(np.log(np.sum((member @ conditional) * posteriors[:, likely], axis=1))))


def nleep(features: Array, labels: Labels, n_classes: int, *, components: int | None = None, seed: int = 0) -> float:
    """NLEEP: LEEP with the posteriors of a Gaussian mixture in place of a source classifier's.

    The mixture is fitted to the principal components that hold 80% of the variance, taken at unit mean variance. Its
    Gaussians are diagonal, since full covariances are singular at a few examples each.

    Args:
        features: n × D features Φ.
        labels: n classes.
        n_classes: C.
        components: Gaussians; None takes five for each class that is there, but no more than n/5, and at least 2.
        seed: Seed of the mixture's start.

    Returns:
        Nats per example, at most 0. Comparable at equal n and number of Gaussians.

    Raises:
        ConfigError: If the arguments do not fit each other or hold a single class.

    References:
        Li et al. 2021, arXiv 2011.11200.
    """
    features, member = _checked(features, labels, n_classes)
    n = len(features)
    scores = _principal(features, share=0.8)
    if scores.shape[1] == 0:
        return leep(np.ones((n, 1)), labels, n_classes)
    if components is None:
        components = max(2, min(5 * member.shape[1], n // 5))
    scores = scores / np.sqrt(np.mean(scores**2))
    mixture = GaussianMixture(min(components, n), covariance_type="diag", random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal texts leave fewer points than Gaussians
        mixture.fit(scores)
    return leep(mixture.predict_proba(scores), labels, n_classes)


def trans_rate(
    features: Array, labels: Labels, n_classes: int, *, epsilon: float = 1e-4, by_share: bool = False
) -> float:
    """TransRate: coding rate of the features less that of the classes.

    R(Z) − Σ_c w_c R(Z_c) with R(Z) = ½ log det(I + ZᵀZ/(n_Z ε)), Z the features centred over all examples, Z_c the
    rows of class c and w_c = 1 over the number of classes, as in the authors' code, which supposes balanced classes;
    with w_c = n_c/n it is never negative.

    Args:
        features: n × D features Φ.
        labels: n classes.
        n_classes: C.
        epsilon: Distortion ε, in squared units of the features: the metric depends on their scale.
        by_share: Whether w_c = n_c/n.

    Returns:
        Nats; invariant to rotation and shift of the features.

    Raises:
        ConfigError: If the arguments do not fit each other or hold a single class, or ε is not positive.

    References:
        Huang et al. 2022, arXiv 2106.09362.
    """
    if not epsilon > 0.0:
        raise ConfigError(f"distortion {epsilon}: it must be positive")
    features, member = _checked(features, labels, n_classes)
    centred = _centred(features)
    shares = member.mean(axis=0)
    weights = shares if by_share else np.full(len(shares), 1.0 / len(shares))
    within = [_coding_rate(centred[column > 0], epsilon) for column in member.T]
    return _coding_rate(centred, epsilon) - float(weights @ np.array(within))


def _coding_rate(rows: Array, epsilon: float) -> float:
    singular = svd(rows, compute_uv=False)
    return 0.5 * float(np.sum(np.log1p(singular**2 / (len(rows) * epsilon))))


def gbc(
    features: Array,
    labels: Labels,
    n_classes: int,
    *,
    dimensions: int = 64,
    spherical: bool = True,
    floor: float = 1e-4,
) -> float:
    """GBC: overlap of the classes as Gaussians, by their Bhattacharyya coefficients.

    −Σ_{i≠j} exp(−D_ij), D_ij = ⅛ Δμᵀ Σ̄⁻¹ Δμ + ½ log(|Σ̄|/√(|Σ_i| |Σ_j|)), Σ̄ = (Σ_i + Σ_j)/2, over ordered pairs of
    classes, in the first principal components. Σ_c is diagonal with the class's variances (1/n_c), none below the
    floor, or spherical with their mean. (The authors' code counts the logarithm of a spherical covariance for one
    dimension; here it counts for all, as the formula has it.)

    Args:
        features: n × D features Φ.
        labels: n classes.
        n_classes: C.
        dimensions: Principal components at most; never more than the centred features' rank.
        spherical: Whether Σ_c is spherical.
        floor: Least variance, in squared units of the features; also that of a class of one example.

    Returns:
        A pure number from −C(C − 1) (classes alike) to 0.

    Raises:
        ConfigError: If the arguments do not fit each other or hold a single class, or the floor is not positive.

    References:
        Pándy et al. 2022, arXiv 2111.12780.
    """
    if not floor > 0.0:
        raise ConfigError(f"floor of the variances {floor}: it must be positive")
    features, member = _checked(features, labels, n_classes)
    scores = _principal(features)[:, :dimensions]
    counts = member.sum(axis=0)[:, None]
    means = (member.T @ scores) / counts
    variances = np.maximum((member.T @ (scores - member @ means) ** 2) / counts, floor)
    if spherical and scores.shape[1]:
        variances = np.broadcast_to(variances.mean(axis=1, keepdims=True), variances.shape)
    average = (variances[:, None] + variances[None]) / 2.0
    logs = np.log(variances)
    distance = np.sum((means[:, None] - means[None]) ** 2 / average, axis=2) / 8.0
    distance += 0.5 * np.sum(np.log(average) - (logs[:, None] + logs[None]) / 2.0, axis=2)
    return float(-np.sum(np.exp(-distance)[~np.eye(len(means), dtype=bool)]))


def parc(features: Array, labels: Labels, n_classes: int) -> float:
    """PARC: rank correlation between how unlike two examples' features are and how unlike their labels.

    Spearman's ρ, over the pairs i < j, of 1 − corr(φ_i, φ_j), on standardised columns, with 1 − corr of the one-hot
    labels, which is 0 for equal labels and one constant for others. An example whose standardised features are all
    equal correlates with none.

    Args:
        features: n × D features Φ.
        labels: n classes.
        n_classes: C.

    Returns:
        ρ (the authors give 100 ρ); 0 where either side is the same for all pairs.

    Raises:
        ConfigError: If the arguments do not fit each other or hold a single class.

    References:
        Bolya et al. 2021, arXiv 2111.06977.
    """
    features, member = _checked(features, labels, n_classes)
    centred = _centred(features)
    spread = centred.std(axis=0)
    rows = centred / np.where(spread > 0.0, spread, np.inf)
    rows = rows - rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(norms > 1e-12 * np.sqrt(rows.shape[1]), norms, np.inf)
    pairs = np.tril_indices(len(rows), -1)
    unlike = np.round(1.0 - (rows @ rows.T)[pairs], 12)  # what differs by rounding alone is a tie
    differ = 1.0 - (member @ member.T)[pairs]
    if np.ptp(unlike) == 0.0 or np.ptp(differ) == 0.0:
        return 0.0
    return float(spearman(unlike[:, None], differ[:, None])[0, 0])


def _checked(features: Array, labels: Labels, n_classes: int) -> tuple[Array, Array]:
    # In float64, and the n × C' 0/1 membership in the C' classes that have examples.
    features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ConfigError(
            f"features of shape {features.shape} with labels of shape {labels.shape}: n × D features need n labels"
        )
    if not np.isfinite(features).all():
        raise ConfigError(f"{np.sum(~np.isfinite(features))} features are not finite: compute them in float32 or above")
    present = np.unique(labels)
    if len(present) and (present[0] < 0 or present[-1] >= n_classes):
        raise ConfigError(f"labels from {present[0]} to {present[-1]}: with {n_classes} classes they are 0 … C-1")
    if len(present) < 2:
        raise ConfigError(f"{len(labels)} samples of {len(present)} class: draw more samples, of 2 classes or more")
    return features, (labels[:, None] == present).astype(np.float64)


def _centred(features: Array) -> Array:
    # Columns that differ by rounding alone become 0.
    centred = features - features.mean(axis=0)
    moves = np.abs(centred).max(axis=0) > 1e-12 * np.abs(features).max(axis=0)
    return np.asarray(np.where(moves, centred, 0.0))


def _thin(matrix: Array) -> tuple[Array, Array]:
    # Left singular vectors and singular values above rounding, descending.
    vectors, singular, _ = svd(matrix, full_matrices=False)
    kept = singular > max(matrix.shape) * np.finfo(np.float64).eps * singular[0]
    return np.asarray(vectors[:, kept]), np.asarray(singular[kept])


def _principal(features: Array, share: float = 1.0) -> Array:
    # Scores of as many principal components as hold a share of the variance; none of constant features.
    vectors, singular = _thin(_centred(features))
    variance = np.cumsum(singular**2)
    count = len(variance) if share >= 1.0 else int(np.sum(variance < share * variance[-1:])) + 1
    return (vectors * singular)[:, :count]
