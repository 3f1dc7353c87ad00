"""Transferability metrics against slow references: direct densities, explicit matrices, loops over examples."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import entr
from scipy.stats import multivariate_normal, rankdata
from sklearn.covariance import LedoitWolf
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from foretune.errors import ConfigError
from foretune.evaluation.transferability import gbc, h_score, leep, log_me, nleep, parc, trans_rate

METRICS = [log_me, h_score, nleep, trans_rate, gbc, parc]
ROTATION_FREE = [log_me, h_score, nleep, trans_rate, gbc]
SHAPES = [(40, 6, 3), (24, 60, 2), (8, 20, 2), (12, 5, 4)]


def problem(n=40, width=6, n_classes=3, seed=0, signal=1.5):
    """Features whose means depend on the class; every class has examples."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % n_classes)
    means = rng.standard_normal((n_classes, width))
    return signal * means[labels] + rng.standard_normal((n, width)), labels, n_classes


def one_hot(labels, n_classes):
    return [(labels == c).astype(float) for c in range(n_classes) if np.any(labels == c)]


def gaussian_evidence(features, target, alpha, beta):
    covariance = features @ features.T / alpha + np.eye(len(features)) / beta
    return multivariate_normal(np.zeros(len(features)), covariance).logpdf(target) / len(features)


def slow_log_me(features, labels, n_classes):
    """The evidence as a density, its largest value by descent from several starts."""
    best = []
    for target in one_hot(labels, n_classes):
        ends = [
            minimize(
                lambda p, y=target: -gaussian_evidence(features, y, *np.exp(np.clip(p, -25, 25))),
                start,
                method="Nelder-Mead",
                options={"maxiter": 400, "xatol": 1e-6, "fatol": 1e-11},
            ).fun
            for start in ([0.0, 0.0], [6.0, 2.0], [-2.0, 5.0])
        ]
        best.append(-min(ends))
    return np.mean(best)


@pytest.mark.parametrize(("n", "width", "n_classes"), [(40, 6, 3), (24, 60, 2), (12, 5, 4)])
def test_log_me_is_the_best_evidence_of_the_gaussian_process(n, width, n_classes):
    features, labels, _ = problem(n, width, n_classes, signal=0.7)
    expected = slow_log_me(features, labels, n_classes)
    assert log_me(features, labels, n_classes) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("width", [5, 100])
def test_log_me_by_the_published_formula_with_the_rank_in_place_of_the_width(width):
    features, labels, _ = problem(32, width, 2, signal=0.8)
    singular = np.linalg.svd(features, full_matrices=False)[1]
    n, k = 32, int(np.sum(singular > 1e-10))
    values, scores = singular**2, []
    for target in one_hot(labels, 2):
        coordinates = np.linalg.svd(features, full_matrices=False)[0].T @ target
        alpha, beta = 1.0, 1.0
        for _ in range(20000):
            ratio = alpha / beta
            gamma = np.sum(values / (values + ratio))
            m2 = np.sum(values * coordinates**2 / (ratio + values) ** 2)
            error = np.sum((ratio * coordinates / (values + ratio)) ** 2) + target @ target - coordinates @ coordinates
            alpha, beta = gamma / m2, (n - gamma) / error
            if abs(alpha / beta / ratio - 1) < 1e-13:
                break
        mean = np.linalg.solve(alpha * np.eye(width) + beta * features.T @ features, beta * features.T @ target)
        assert mean @ mean == pytest.approx(m2, rel=1e-6)
        evidence = k / 2 * np.log(alpha) + n / 2 * np.log(beta) - 0.5 * np.sum(np.log(alpha + beta * values))
        evidence -= beta / 2 * np.sum((target - features @ mean) ** 2) + alpha / 2 * mean @ mean
        scores.append((evidence - n / 2 * np.log(2 * np.pi)) / n)
    assert log_me(features, labels, 2) == pytest.approx(np.mean(scores), abs=1e-6)


@given(seed=st.integers(0, 1000), alpha=st.floats(-5, 5), beta=st.floats(-5, 5))
@settings(max_examples=25)
def test_no_choice_of_scales_has_more_evidence_than_log_me(seed, alpha, beta):
    features, labels, _ = problem(10, 4, 2, seed=seed)
    chosen = np.mean([gaussian_evidence(features, y, np.exp(alpha), np.exp(beta)) for y in one_hot(labels, 2)])
    assert log_me(features, labels, 2) >= chosen - 1e-9


def test_log_me_of_zero_features_is_the_evidence_of_noise():
    labels = np.array([0, 0, 0, 1, 1, 2])
    expected = np.mean([-0.5 * (np.log(2 * np.pi * y.mean()) + 1) for y in one_hot(labels, 3)])
    assert log_me(np.zeros((6, 4)), labels, 3) == pytest.approx(expected, rel=1e-12)


def slow_h_score(features, labels, n_classes):
    n = len(features)
    fit = LedoitWolf().fit(features)
    means = np.zeros_like(features)
    for i in range(n):
        means[i] = np.mean([features[j] for j in range(n) if labels[j] == labels[i]], axis=0)
    between = sum(np.outer(row, row) for row in means - features.mean(axis=0)) / n
    return np.trace(np.linalg.inv(fit.covariance_) @ ((1 - fit.shrinkage_) * between))


@pytest.mark.parametrize(("n", "width", "n_classes"), SHAPES)
def test_h_score_by_its_matrices(n, width, n_classes):
    features, labels, _ = problem(n, width, n_classes)
    found = h_score(features, labels, n_classes)
    assert found == pytest.approx(slow_h_score(features, labels, n_classes), rel=1e-8)
    assert 0 <= found <= n_classes - 1


def test_h_score_does_not_saturate_with_more_columns_than_examples():
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((20, 200)), np.arange(20) % 2
    centred = features - features.mean(axis=0)
    means = np.array([centred[labels == label].mean(axis=0) for label in labels])
    unshrunk = np.trace(np.linalg.pinv(centred.T @ centred) @ means.T @ means)
    assert unshrunk == pytest.approx(1.0, rel=1e-9)
    assert h_score(features, labels, 2) < 0.6
    assert h_score(features + 20 * np.outer(labels, np.eye(200)[0]), labels, 2) > 0.9


def test_h_score_of_features_on_one_line_without_shrinkage():
    # all rows ± one vector: Ledoit and Wolf shrink by nothing, and the covariance cannot be inverted
    labels = np.array([0, 0, 1, 1])
    features = np.outer([1.0, 1.0, -1.0, -1.0], [1.0, 2.0, 3.0])
    assert h_score(features, labels, 2) == pytest.approx(1.0, rel=1e-9)


def slow_leep(posteriors, labels):
    n, sources = posteriors.shape
    total = 0.0
    for i in range(n):
        likelihood = 0.0
        for z in range(sources):
            joint = sum(posteriors[j, z] for j in range(n) if labels[j] == labels[i]) / n
            marginal = sum(posteriors[j, z] for j in range(n)) / n
            if marginal > 0:
                likelihood += joint / marginal * posteriors[i, z]
        total += np.log(likelihood)
    return total / n


def test_leep_by_its_loops():
    rng = np.random.default_rng(0)
    posteriors = rng.dirichlet(np.ones(4), 15)
    posteriors[:, 2] = 0.0  # a source class that nothing belongs to
    posteriors /= posteriors.sum(axis=1, keepdims=True)
    labels = np.arange(15) % 3
    assert leep(posteriors, labels, 3) == pytest.approx(slow_leep(posteriors, labels), rel=1e-12)
    assert leep(np.eye(3)[labels], labels, 3) == 0.0


@given(seed=st.integers(0, 1000), n_classes=st.integers(2, 4))
@settings(max_examples=25)
def test_leep_lies_between_the_class_shares_and_certainty(seed, n_classes):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(n_classes), rng.integers(n_classes, size=8)])
    posteriors = rng.dirichlet(0.3 * np.ones(3), len(labels))
    entropy = np.sum(entr(np.bincount(labels) / len(labels)))
    assert -entropy - 1e-12 <= leep(posteriors, labels, n_classes) <= 0.0


def test_nleep_of_classes_far_apart_is_certain_and_of_constant_features_the_class_shares():
    labels = np.arange(30) % 3
    features = 50.0 * np.eye(3)[labels] + np.random.default_rng(0).standard_normal((30, 3))
    assert nleep(features, labels, 3) == pytest.approx(0.0, abs=1e-6)
    assert nleep(np.ones((30, 3)), labels, 3) == pytest.approx(-np.log(3), rel=1e-12)
    shuffled = np.random.default_rng(1).permutation(labels)
    assert nleep(features, shuffled, 3, components=3) == pytest.approx(slow_leep(np.eye(3)[labels], shuffled), abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_nleep_by_scikit_learn(seed):
    features, labels, _ = problem(60, 20, 3, signal=0.8)
    scores = PCA(n_components=0.8, svd_solver="full").fit_transform(features)
    assert 3 < scores.shape[1] < 20
    scores /= np.sqrt(np.mean(scores**2))
    mixture = GaussianMixture(12, covariance_type="diag", random_state=seed).fit(scores)  # a fifth of 60
    expected = slow_leep(mixture.predict_proba(scores), labels)
    assert nleep(features, labels, 3, seed=seed) == pytest.approx(expected, rel=1e-6)


def test_nleep_of_fewer_different_texts_than_gaussians():
    labels = np.arange(20) % 2
    features = np.eye(3)[np.arange(20) % 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nleep(features, labels, 2, components=6) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("by_share", [False, True])
@pytest.mark.parametrize(("n", "width", "n_classes"), SHAPES)
def test_trans_rate_by_its_determinants(n, width, n_classes, by_share):
    features, labels, _ = problem(n, width, n_classes)
    labels[0] = labels[1]  # not balanced

    def rate(rows):
        return 0.5 * np.linalg.slogdet(np.eye(width) + rows.T @ rows / (len(rows) * 1e-2))[1]

    centred, classes = features - features.mean(axis=0), np.unique(labels)
    weights = [np.mean(labels == c) if by_share else 1 / len(classes) for c in classes]
    expected = rate(centred) - sum(w * rate(centred[labels == c]) for w, c in zip(weights, classes, strict=True))
    found = trans_rate(features, labels, n_classes, epsilon=1e-2, by_share=by_share)
    assert found == pytest.approx(expected, rel=1e-9)
    assert not by_share or found > 0


def slow_gbc(features, labels, n_classes, spherical):
    """Densities of Gaussians with explicit covariance matrices, pair by pair."""
    centred = features - features.mean(axis=0)
    basis = np.linalg.svd(centred, full_matrices=False)
    scores = centred @ basis[2][basis[1] > 1e-10].T[:, :64]
    total = 0.0
    for a in range(n_classes):
        for b in range(n_classes):
            rows_a, rows_b = scores[labels == a], scores[labels == b]
            if a == b or not len(rows_a) or not len(rows_b):
                continue
            covariances = []
            for rows in (rows_a, rows_b):
                variances = np.array([max(1e-4, np.mean((column - column.mean()) ** 2)) for column in rows.T])
                covariances.append(np.diag(np.full(len(variances), variances.mean()) if spherical else variances))
            middle = (covariances[0] + covariances[1]) / 2
            gap = rows_a.mean(axis=0) - rows_b.mean(axis=0)
            logs = [np.linalg.slogdet(matrix)[1] for matrix in (middle, *covariances)]
            total -= np.exp(-(gap @ np.linalg.inv(middle) @ gap / 8 + 0.5 * (logs[0] - (logs[1] + logs[2]) / 2)))
    return total


@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize(("n", "width", "n_classes"), SHAPES)
def test_gbc_by_its_pairs(n, width, n_classes, spherical):
    features, labels, _ = problem(n, width, n_classes, signal=0.2)
    expected = slow_gbc(features, labels, n_classes, spherical)
    assert gbc(features, labels, n_classes, spherical=spherical) == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_gbc_keeps_64_dimensions():
    features, labels, _ = problem(90, 80, 2, signal=0.05)
    assert gbc(features, labels, 2) == pytest.approx(slow_gbc(features, labels, 2, True), rel=1e-7)
    assert gbc(features, labels, 2) != pytest.approx(gbc(features, labels, 2, dimensions=80), rel=1e-3)


def test_gbc_of_classes_alike_and_far_apart():
    labels = np.arange(12) % 3
    assert gbc(np.repeat(np.random.default_rng(0).standard_normal((4, 5)), 3, axis=0), labels, 3) == pytest.approx(-6)
    assert gbc(np.ones((12, 5)), labels, 3) == -6.0
    assert gbc(1e3 * np.eye(3)[labels], labels, 3) == 0.0


def slow_parc(features, labels, n_classes):
    rows = [(row - features.mean(axis=0)) / features.std(axis=0) for row in features]
    one_hots = np.eye(n_classes)[labels]
    unlike, differ = [], []
    for i in range(len(rows)):
        for j in range(i):
            unlike.append(1 - np.corrcoef(rows[i], rows[j])[0, 1])
            differ.append(round(1 - np.corrcoef(one_hots[i], one_hots[j])[0, 1], 9))
    return np.corrcoef(rankdata(unlike), rankdata(differ))[0, 1]


@pytest.mark.parametrize(("n", "width", "n_classes"), SHAPES)
def test_parc_by_its_pairs(n, width, n_classes):
    features, labels, _ = problem(n, width, n_classes)
    assert parc(features, labels, n_classes) == pytest.approx(slow_parc(features, labels, n_classes), rel=1e-9)
    assert parc(features, labels, n_classes + 2) == parc(features, labels, n_classes)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
def test_every_metric_knows_digits_from_shuffled_labels(metric):
    digits = load_digits(n_class=4)
    features, labels = digits.data[:160] / 16, digits.target[:160]
    told = metric(features, labels, 4)
    for seed in range(2):
        assert told > metric(features, np.random.default_rng(seed).permutation(labels), 4)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
@given(seed=st.integers(0, 1000), order=st.permutations(range(4)))
@settings(max_examples=8)
def test_names_of_classes_do_not_matter(metric, seed, order):
    features, labels, _ = problem(16, 6, 3, seed=seed)
    renamed = np.array(order)[labels]  # one of four names stays without examples
    assert metric(features, renamed, 4) == pytest.approx(metric(features, labels, 3), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("metric", ROTATION_FREE, ids=lambda metric: metric.__name__)
@given(seed=st.integers(0, 1000), width=st.sampled_from([3, 30]))
@settings(max_examples=8)
def test_rotated_features_tell_as_much(metric, seed, width):
    features, labels, _ = problem(16, width, 2, seed=seed)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed + 1).standard_normal((width, width)))
    expected = metric(features, labels, 2)
    assert metric(features @ rotation, labels, 2) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("metric", [log_me, h_score, nleep, parc], ids=lambda metric: metric.__name__)
@pytest.mark.parametrize("factor", [1e-6, 1e5])
def test_the_unit_of_the_features_does_not_matter(metric, factor):
    features, labels, _ = problem(20, 30, 2)
    assert metric(factor * features, labels, 2) == pytest.approx(metric(features, labels, 2), rel=1e-6)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
@given(
    n=st.integers(8, 20),
    width=st.integers(1, 30),
    rare=st.integers(1, 2),
    constant=st.booleans(),
    equal=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12)
def test_small_and_degenerate_samples_have_a_finite_value(metric, n, width, rare, constant, equal, seed):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, width))
    if constant:
        features[:, : max(1, width // 2)] = 0.1
    if equal:
        features[: n // 2] = features[0]  # the same text again
    labels = np.zeros(n, dtype=int)
    labels[:rare] = 3  # classes 1 and 2 are absent, class 3 is rare
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = metric(features, labels, 4)
    assert isinstance(found, float)
    assert np.isfinite(found)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (h_score, 0.0),
        (nleep, -np.sum(entr([0.75, 0.25]))),
        (trans_rate, 0.0),
        (gbc, -2.0),
        (parc, 0.0),
    ],
)
def test_constant_features_tell_nothing(metric, expected):
    labels = np.array([0, 0, 0, 1] * 5)
    assert metric(np.full((20, 7), 0.1), labels, 2) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", [h_score, nleep, trans_rate, gbc, parc], ids=lambda metric: metric.__name__)
def test_a_shift_of_the_features_does_not_matter(metric):
    features, labels, _ = problem(20, 6, 2)
    assert metric(features + 3.0, labels, 2) == pytest.approx(metric(features, labels, 2), rel=1e-6)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
def test_a_single_class_is_refused(metric):
    with pytest.raises(ConfigError, match=r"8 samples of .* class: draw more samples"):
        metric(np.random.default_rng(0).standard_normal((8, 3)), np.ones(8, dtype=int), 2)


def test_what_does_not_fit_is_refused():
    features, labels, _ = problem(8, 3, 2)
    for refused, message in (
        (lambda: log_me(features[:7], labels, 2), "shape"),
        (lambda: gbc(features, labels, 1), "with 1 classes"),
        (lambda: parc(np.where(features > 1, np.nan, features), labels, 2), "not finite"),
        (lambda: trans_rate(features, labels, 2, epsilon=0.0), "distortion 0.0"),
        (lambda: gbc(features, labels, 2, floor=-1.0), "floor of the variances -1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            refused()
