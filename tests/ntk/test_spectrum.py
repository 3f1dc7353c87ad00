import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import linear_kernel
from sklearn.preprocessing import KernelCenterer

from foretune.errors import ConfigError, KernelError
from foretune.ntk.spectrum import Eigen, alignment, centre, decompose, spectrum
from foretune.tasks.outputs import output_reduction

EPSILON = float(np.finfo(np.float64).eps)
EPSILON_32 = float(np.finfo(np.float32).eps)


def kernel_of(values, seed=0):
    """A kernel with given eigenvalues."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))
    return (basis * np.asarray(values, dtype=float)) @ basis.T


def summary(kernel, *, sigma=1e-4, epsilon=EPSILON, **options):
    return spectrum(kernel, sigma=sigma, epsilon=epsilon, **options)


@st.composite
def kernels(draw):
    """Random kernels of any rank and scale."""
    n, seed = draw(st.integers(2, 10)), draw(st.integers(0, 10_000))
    rank, scale = draw(st.integers(1, n + 2)), draw(st.sampled_from([1e-6, 1e-2, 1.0, 1e3]))
    features = np.random.default_rng(seed).standard_normal((n, rank))
    return scale * features @ features.T


def test_decomposition_multiplies_out_to_the_kernel():
    kernel = kernel_of([5.0, 2.0, 1.0, 0.1])
    eigen = decompose(kernel)
    assert np.allclose(eigen.eigenvalues, [5.0, 2.0, 1.0, 0.1], rtol=1e-12)
    assert np.allclose(kernel @ eigen.eigenvectors, eigen.eigenvectors * eigen.eigenvalues, atol=1e-13)
    multiplied_out = (eigen.eigenvectors * eigen.eigenvalues) @ eigen.eigenvectors.T
    assert np.allclose(multiplied_out, kernel, atol=1e-13)
    assert np.array_equal(eigen.kernel, (kernel + kernel.T) / 2.0)


def test_eigenvalues_are_not_clipped():
    kernel = kernel_of([1.0, 0.5, -1e-8])
    assert decompose(kernel).eigenvalues[-1] == pytest.approx(-1e-8, rel=1e-6)
    found = summary(kernel)
    assert found.n_negative == 1
    assert found.lambda_min == pytest.approx(-1e-8, rel=1e-6)
    assert found.condition_number == pytest.approx((1.0 + 1e-4) / 1e-4)
    assert found.trace == pytest.approx(1.5 - 1e-8, rel=1e-12)
    assert np.isfinite(found.entropy_rank)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (np.ones((2, 3)), r"square matrix, got shape \(2, 3\)"),
        (np.ones(4), "square matrix"),
        (np.zeros((0, 0)), "square matrix"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "2 entries of the kernel are nan"),
        (np.array([[1.0, 0.5], [0.5 + 1e-6, 1.0]]), "not symmetric: .* reaches 1e-06"),
        (kernel_of([1.0, -1e-3]), "not positive semi-definite: eigenvalue -0.001 with largest 1"),
        (-np.eye(2), "not positive semi-definite"),
    ],
)
def test_what_is_no_kernel_is_refused(kernel, message):
    with pytest.raises(KernelError, match=message):
        decompose(kernel)


def test_every_scalar_by_its_definition():
    values, sigma, rho = [4.0, 2.0, 1.0, 0.5], 0.1, 1e-2
    found = summary(kernel_of(values), sigma=sigma, rho=rho)
    p = [value / 7.5 for value in values]
    x, y = np.log([2, 3, 4]), np.log(values[1:])
    expected = {
        "n": 4,
        "lambda_max": 4.0,
        "lambda_min": 0.5,
        "floor": 4 * EPSILON * 4.0,
        "sigma": sigma,
        "condition_number": 4.1 / 0.6,
        "trace": 7.5,
        "effective_dimension": sum(value / (value + sigma) for value in values),
        "stable_rank": 7.5 / 4.0,
        "participation_ratio": 7.5**2 / (16 + 4 + 1 + 0.25),
        "entropy_rank": np.exp(-sum(share * np.log(share) for share in p)),
        "decay_exponent": -np.polyfit(x, y, 1)[0],
        "sigma_relative": rho * 7.5 / 4,
        "condition_number_relative": (4.0 + rho * 7.5 / 4) / (0.5 + rho * 7.5 / 4),
        "effective_dimension_relative": sum(value / (value + rho * 7.5 / 4) for value in values),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-10), name
    assert found.lambda_min_resolved
    assert not found.saturated
    assert found.condition_number_interval == (found.condition_number, found.condition_number)
    assert found.alignment is None


def test_decay_exponent_of_a_power_law():
    values = np.arange(1, 21, dtype=float) ** -1.7
    assert summary(kernel_of(values)).decay_exponent == pytest.approx(1.7, rel=1e-8)


def test_decay_exponent_leaves_out_the_first_eigenvalue_and_the_floor():
    values = np.concatenate([[1e3], np.arange(2, 9, dtype=float) ** -2.0, np.zeros(4)])
    assert summary(kernel_of(values)).decay_exponent == pytest.approx(2.0, rel=1e-6)
    assert summary(kernel_of([1.0, 0.5, 0.2, 0.0, 0.0])).decay_exponent is None


def test_condition_number_below_the_floor_is_an_interval():
    kernel = kernel_of([100.0, 1.0, 0.0, 0.0])
    found = summary(kernel, epsilon=EPSILON_32)
    assert not found.lambda_min_resolved
    assert found.saturated
    assert found.floor == pytest.approx(4 * EPSILON_32 * 100.0)
    low, high = found.condition_number_interval
    assert low == pytest.approx(100.0001 / (found.floor + 1e-4))
    assert high == pytest.approx(100.0001 / 1e-4)
    assert low <= found.condition_number <= high


def test_saturation_where_sigma_hides_a_resolved_eigenvalue():
    assert summary(kernel_of([1.0, 0.011]), sigma=0.1).saturated is False
    found = summary(kernel_of([1.0, 0.009]), sigma=0.1)
    assert found.lambda_min_resolved
    assert found.saturated
    assert found.condition_number == pytest.approx(1 + 1.0 / 0.1, rel=0.1)


def test_gram_products_in_float32_turn_the_condition_number_negative():
    # 32 samples, 16 parameters, λ_max = 1e4: the true κ is 1e8, the float32 Gram product makes it negative
    rng = np.random.default_rng(0)
    features = (rng.standard_normal((32, 16)) * np.geomspace(1.0, 1e-2, 16)).astype(np.float32)
    exact = features.astype(np.float64)
    scale = 1e4 / np.linalg.eigvalsh(exact @ exact.T)[-1]
    exact_kernel = scale * exact @ exact.T
    rounded = (np.float32(np.sqrt(scale)) * features).astype(np.float32)
    gram = np.zeros((32, 32), dtype=np.float32)
    for column in rounded.T:
        gram += np.outer(column, column)
    values = np.linalg.eigvalsh(gram.astype(np.float64))
    assert (values[-1] + 1e-4) / (values[0] + 1e-4) < 0
    found = summary(gram, epsilon=EPSILON_32)
    assert found.n_negative > 0
    assert not found.lambda_min_resolved
    low, high = found.condition_number_interval
    assert 0 < low <= summary(exact_kernel).condition_number * 1.001
    assert summary(exact_kernel).condition_number == pytest.approx(1e8, rel=1e-3)
    assert high == pytest.approx(1e8, rel=1e-3)


@pytest.mark.parametrize("k", [1, 2])
def test_zero_kernel(k):
    targets = np.array([[1.0, -1.0], [-1.0, 1.0], [1.0, 0.0]])
    found = summary(np.zeros((3 * k, 3 * k)), targets=targets, rows_per_example=k)
    assert found.condition_number == found.condition_number_relative == 1.0
    assert found.condition_number_interval == (1.0, 1.0)
    assert found.effective_dimension == found.effective_dimension_relative == 0.0
    assert found.stable_rank == found.participation_ratio == found.entropy_rank == 0.0
    assert found.decay_exponent is None
    assert found.alignment is None
    assert found.saturated
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_summary_is_json_ready():
    kernel = kernel_of([4.0, 2.0, 1.0, 0.5])
    found = dataclasses.asdict(summary(kernel, targets=np.array([[1.0], [-1.0], [1.0], [1.0]])))
    assert json.loads(json.dumps(found, allow_nan=False)) == found | {
        "condition_number_interval": list(found["condition_number_interval"])
    }
    assert found.pop("estimated") is None
    assert all(type(value) in (bool, int, float, tuple) for value in found.values())


@pytest.mark.parametrize("name", ["sigma", "rho"])
@pytest.mark.parametrize("value", [0.0, -1e-4, float("nan"), float("inf")])
def test_regularisation_must_be_positive(name, value):
    with pytest.raises(ConfigError, match=f"{name} = .*must be positive"):
        spectrum(np.eye(2), **{"sigma": 1e-4, "epsilon": EPSILON, name: value})


def test_centre_by_its_definition():
    rng = np.random.default_rng(1)
    features = rng.standard_normal((6, 9))
    kernel = features @ features.T
    assert np.allclose(centre(kernel), KernelCenterer().fit_transform(kernel), atol=1e-13)
    assert np.allclose(centre(kernel), linear_kernel(features - features.mean(0)), atol=1e-13)


def test_centre_of_a_block_kernel_centres_every_output_by_itself():
    rng = np.random.default_rng(2)
    features = rng.standard_normal((5, 3, 8))  # examples, outputs, parameters
    flat = features.reshape(15, 8)
    projection = np.kron(np.eye(5) - 1.0 / 5, np.eye(3))
    assert np.allclose(centre(flat @ flat.T, 3), projection @ flat @ flat.T @ projection, atol=1e-13)
    held = (features - features.mean(0)).reshape(15, 8)
    assert np.allclose(centre(flat @ flat.T, rows_per_example=3), held @ held.T, atol=1e-13)


def test_centre_of_equal_features_is_zero_not_rounding_error():
    kernel = np.full((7, 7), 1 / 3) + 1e-16 * np.random.default_rng(0).standard_normal((7, 7))
    assert not centre((kernel + kernel.T) / 2).any()
    nearly = np.full((7, 7), 1.0) + 1e-6 * np.eye(7)
    assert np.linalg.eigvalsh(centre(nearly))[-1] == pytest.approx(1e-6, rel=1e-6)


def test_centre_refuses_rows_that_do_not_divide():
    with pytest.raises(KernelError, match="5 rows cannot have 2 rows"):
        centre(np.eye(5), 2)


def slow_alignment(kernel, target_kernel, projection):
    one, other = projection @ kernel @ projection, projection @ target_kernel @ projection
    return np.trace(one @ other) / np.sqrt(np.trace(one @ one) * np.trace(other @ other))


@pytest.mark.parametrize("name", ["margin", "trace", "class:1"])
def test_alignment_by_its_definition(name):
    rng = np.random.default_rng(3)
    n_classes = 2 if name == "margin" else 3
    labels = rng.integers(0, n_classes, 8)
    targets = output_reduction(name, n_classes).coordinates(np.eye(n_classes)[labels])
    features = rng.standard_normal((8, 5))
    kernel = features @ features.T
    expected = slow_alignment(kernel, targets @ targets.T, np.eye(8) - 1.0 / 8)
    assert alignment(kernel, targets) == pytest.approx(expected, rel=1e-12)
    assert summary(kernel, targets=targets).alignment == pytest.approx(expected, rel=1e-12)
    assert summary(decompose(kernel), targets=targets).alignment == alignment(kernel, targets)


def test_alignment_of_a_block_kernel_by_its_definition():
    rng = np.random.default_rng(4)
    targets = output_reduction("full", 3).coordinates(np.eye(3)[[0, 1, 2, 1, 0]])
    features = rng.standard_normal((10, 6))
    kernel = features @ features.T
    vector = targets.reshape(-1)
    expected = slow_alignment(kernel, np.outer(vector, vector), np.kron(np.eye(5) - 1.0 / 5, np.eye(2)))
    assert alignment(kernel, targets, 2) == pytest.approx(expected, rel=1e-12)
    assert summary(kernel, targets=targets, rows_per_example=2).alignment == pytest.approx(expected, rel=1e-12)


def test_alignment_of_the_target_kernel_is_one():
    targets = np.array([[1.0], [-1.0], [1.0], [1.0], [-1.0]])
    assert alignment(targets @ targets.T, targets) == pytest.approx(1.0, rel=1e-12)
    assert alignment(targets @ targets.T + 5.0, targets) == pytest.approx(1.0, rel=1e-12)


def test_alignment_with_one_class_is_not_defined():
    targets = output_reduction("trace", 3).coordinates(np.eye(3)[[2, 2, 2]])
    assert alignment(np.eye(3), targets) is None


def test_alignment_refuses_targets_of_other_examples():
    with pytest.raises(KernelError, match=r"shape \(3, 1\) do not fit a kernel of 4 rows"):
        alignment(np.eye(4), np.zeros((3, 1)))
    with pytest.raises(KernelError, match="2 an example"):
        alignment(np.eye(4), np.zeros((2, 3)), 2)


@settings(deadline=None, max_examples=30)
@given(kernel=kernels(), sigma=st.sampled_from([1e-6, 1e-4, 1.0]), seed=st.integers(0, 100))
def test_ranges(kernel, sigma, seed):
    targets = np.random.default_rng(seed).standard_normal((len(kernel), 2))
    for held in (kernel, centre(kernel)):
        found = summary(held, sigma=sigma, targets=targets)
        n, slack = len(kernel), 1 + 1e-9
        assert found.condition_number >= 1.0
        assert found.condition_number_relative >= 1.0
        low, high = found.condition_number_interval
        assert low <= found.condition_number * slack
        assert found.condition_number <= high * slack
        assert 0.0 <= found.effective_dimension <= n
        assert found.alignment is None or -1e-12 <= found.alignment <= slack
        if found.trace > 0.0:
            assert 1.0 <= found.stable_rank * slack <= found.participation_ratio * slack**2
            assert found.participation_ratio <= found.entropy_rank * slack <= n * slack**2


@settings(deadline=None, max_examples=30)
@given(kernel=kernels(), extra=st.integers(1, 3), seed=st.integers(0, 100))
def test_adding_a_kernel_lowers_no_eigenvalue(kernel, extra, seed):
    features = np.random.default_rng(seed).standard_normal((len(kernel), extra))
    added = kernel + features @ features.T
    slack = 1e-12 * np.trace(added)
    assert np.all(decompose(added).eigenvalues >= decompose(kernel).eigenvalues - slack)
    for name in ("lambda_max", "lambda_min", "trace", "effective_dimension"):
        assert getattr(summary(added), name) >= getattr(summary(kernel), name) - max(slack, 1e-8)


@settings(deadline=None, max_examples=30)
@given(factor=st.sampled_from([1e-8, 0.3, 7.0, 1e6]), seed=st.integers(0, 1000))
def test_relative_forms_do_not_depend_on_the_scale(factor, seed):
    rng = np.random.default_rng(seed)
    kernel = kernel_of(np.exp(rng.uniform(-4, 4, 6)), seed)
    targets = rng.standard_normal((6, 1))
    one, other = summary(kernel, targets=targets), summary(factor * kernel, targets=targets)
    scale_free = (
        "condition_number_relative effective_dimension_relative stable_rank participation_ratio entropy_rank "
        "decay_exponent alignment"
    )
    for name in scale_free.split():
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-8), name
    assert other.lambda_max == pytest.approx(factor * one.lambda_max, rel=1e-10)


def test_condition_number_depends_on_the_scale():
    kernel = kernel_of([1.0, 0.5, 1e-4])
    assert summary(kernel).condition_number == pytest.approx(1.0001 / 2e-4)
    assert summary(100 * kernel).condition_number == pytest.approx(100.0001 / 1.01e-2)


@settings(deadline=None, max_examples=30)
@given(kernel=kernels(), seed=st.integers(0, 100))
def test_order_of_the_samples_does_not_matter(kernel, seed):
    rng = np.random.default_rng(seed)
    targets, order = rng.standard_normal((len(kernel), 1)), rng.permutation(len(kernel))
    one = summary(kernel, sigma=1.0, targets=targets)
    other = summary(kernel[np.ix_(order, order)], sigma=1.0, targets=targets[order])
    for name in ("lambda_max", "condition_number", "trace", "effective_dimension", "entropy_rank", "alignment"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-7), name


def test_labels_do_not_enter_the_condition_number():
    kernel = kernel_of([4.0, 2.0, 1.0, 0.5])
    found = [
        summary(kernel, targets=t) for t in (np.array([[1.0], [1], [-1], [-1]]), np.array([[1.0], [-1], [1], [-1]]))
    ]
    assert found[0].condition_number == found[1].condition_number
    assert found[0].alignment != pytest.approx(found[1].alignment, rel=1e-3)


def test_a_decomposition_serves_as_the_kernel():
    kernel = kernel_of([4.0, 2.0, 1.0, 0.5])
    assert summary(decompose(kernel)) == summary(kernel)
    assert isinstance(decompose(kernel), Eigen)
