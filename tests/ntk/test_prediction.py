import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from foretune.errors import ConfigError, DataError, KernelError
from foretune.ntk.prediction import Evaluation, Examples, predict_by_regression
from foretune.ntk.spectrum import decompose
from foretune.tasks.classification import Classification

NAMES = [("margin", 2), ("trace", 2), ("full", 2), ("class:1", 2), ("trace", 3), ("full", 3), ("class:2", 4)]


def objective_of(n_classes):
    return Classification(tuple(map(str, range(n_classes))))


def targets_of(reduction, labels):
    return reduction.coordinates(np.eye(reduction.n_logits)[labels])


def classes_of(reduction, labels):
    return np.asarray(reduction.columns[labels])


def predicted_of(eigen, reduction, labels, f0, **options):
    objective = objective_of(reduction.n_logits)
    return predict_by_regression(eigen, reduction, objective, Examples(f0, labels), **options)


def sample(name, n_classes, *, n=12, m=9, seed=0, spread=1.0, noise=1.0):
    """Features for each row of the kernel, labels that follow them, initial logits."""
    reduction = objective_of(n_classes).reduction(name)
    rng = np.random.default_rng(seed)
    count, k = n + m, reduction.rows_per_example
    labels = np.concatenate([np.arange(n) % n_classes, rng.integers(0, n_classes, m)])
    means = 2.0 * rng.standard_normal((n_classes, k, 6))
    features = spread * (means[labels] + noise * rng.standard_normal((count, k, 6)))
    logits = 0.3 * rng.standard_normal((count, n_classes))
    train, evaluation = features[:n].reshape(n * k, 6), features[n:].reshape(m * k, 6)
    return (
        reduction,
        train @ train.T,
        labels[:n],
        logits[:n],
        Evaluation(logits[n:], labels[n:], evaluation @ train.T),
    )


def slow_predictions(reduction, kernel, labels, f0, ridge, left_out, k_eval, f0_eval):
    """Fit on all but `left_out` and predict, in target coordinates."""
    k, n = reduction.rows_per_example, len(labels)
    kept = [i for i in range(n) if i not in left_out]
    rows = np.array([i * k + a for i in kept for a in range(k)])
    residual = (targets_of(reduction, labels) - reduction.coordinates(f0))[kept].reshape(len(rows), -1)
    dual = np.linalg.solve(kernel[np.ix_(rows, rows)] + ridge * np.eye(len(rows)), residual)
    offset = reduction.coordinates(f0_eval)
    return offset + (k_eval[:, rows] @ dual).reshape(offset.shape)


def probabilities(scores, temperature):
    powers = np.exp(temperature * (scores - scores.max(axis=1, keepdims=True)))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("name", "n_classes"), NAMES)
def test_every_number_by_refits_and_scikit_learn(name, n_classes):
    reduction, kernel, labels, f0, evaluation = sample(name, n_classes, seed=4, spread=0.3)
    ridge, k = 2.0, reduction.rows_per_example
    found = predicted_of(decompose(kernel), reduction, labels, f0, evaluation=evaluation, ridge=ridge)
    n, m = len(labels), len(evaluation.targets)
    fitted = slow_predictions(reduction, kernel, labels, f0, ridge, [], kernel, f0)
    loo = np.vstack(
        [
            slow_predictions(reduction, kernel, labels, f0, ridge, [i], kernel[i * k : (i + 1) * k], f0[[i]])
            for i in range(n)
        ]
    )
    predicted = slow_predictions(reduction, kernel, labels, f0, ridge, [], evaluation.k_eval_train, evaluation.f0)
    train_classes, eval_classes = classes_of(reduction, labels), classes_of(reduction, evaluation.targets)
    columns = np.arange(reduction.scores(loo).shape[1])

    def loss(coordinates, classes, temperature):
        return log_loss(classes, probabilities(reduction.scores(coordinates), temperature), labels=columns)

    def smoothed(log):
        """Every sample once with each class, n + 1 times as heavy with its own."""
        every = np.repeat(columns, n)
        weights = np.where(every == np.tile(train_classes, len(columns)), n + 1, 1)
        spread = probabilities(np.tile(reduction.scores(loo), (len(columns), 1)), np.exp(log))
        return log_loss(every, spread, labels=columns, sample_weight=weights)

    best = minimize_scalar(smoothed, bounds=(np.log(1e-3), np.log(1e3)), method="bounded")
    assert found.temperature == pytest.approx(np.exp(best.x), rel=1e-3)
    for prefix, coordinates, classes, raw, count in (
        ("train", fitted, train_classes, labels, n),
        ("loo", loo, train_classes, labels, n),
        ("eval", predicted, eval_classes, evaluation.targets, m),
    ):
        share = np.mean(reduction.scores(coordinates).argmax(1) == classes)
        error = np.sum((targets_of(reduction, raw) - coordinates) ** 2) / count
        assert found.metrics[f"{prefix}_accuracy"] == pytest.approx(share)
        assert getattr(found, f"{prefix}_mse") == pytest.approx(error, rel=1e-8)
        expected = loss(coordinates, classes, found.temperature)
        assert getattr(found, f"{prefix}_loss") == pytest.approx(expected, rel=1e-8)
    share = found.metrics["eval_accuracy"]
    assert found.standard_error == pytest.approx(np.sqrt(share * (1 - share) / m))
    assert (found.n_eval, found.ridge, found.ridge_rule, found.method) == (m, ridge, "given", "kernel_regression")


def test_temperature_is_the_coefficient_of_a_logistic_regression():
    reduction, kernel, labels, f0, _ = sample("margin", 2, n=40, seed=3, spread=0.25)
    found = predicted_of(decompose(kernel), reduction, labels, f0, ridge=1.0)
    margins = np.vstack(
        [slow_predictions(reduction, kernel, labels, f0, 1.0, [i], kernel[[i]], f0[[i]]) for i in range(40)]
    )
    twice, weights = np.r_[labels, 1 - labels], np.r_[np.full(40, 41), np.ones(40)]
    model = LogisticRegression(C=1e10, fit_intercept=False, tol=1e-10).fit(np.r_[margins, margins], twice, weights)
    assert found.temperature == pytest.approx(model.coef_[0, 0], rel=1e-3)
    assert found.loo_loss == pytest.approx(log_loss(labels, model.predict_proba(margins)), rel=1e-4)


def test_separated_samples_do_not_send_the_temperature_to_infinity():
    reduction, kernel, labels, f0, _ = sample("margin", 2, n=40, noise=0.05)
    found = predicted_of(decompose(kernel), reduction, labels, f0)
    assert found.metrics["loo_accuracy"] == 1.0
    assert found.temperature < 20
    assert 0.01 < found.loo_loss < 0.1


@pytest.mark.parametrize(("name", "n_classes"), NAMES)
def test_baselines(name, n_classes):
    reduction, kernel, labels, f0, evaluation = sample(name, n_classes, n=11, seed=1)
    labels = labels.copy()
    labels[:8] = n_classes - 1
    found = predicted_of(decompose(kernel), reduction, labels, f0, evaluation=evaluation).baselines
    classes, eval_classes = classes_of(reduction, labels), classes_of(reduction, evaluation.targets)
    most = max(set(classes.tolist()), key=classes.tolist().count)
    assert found["majority_accuracy"] == pytest.approx(np.mean(eval_classes == most))
    if name.startswith("class:"):
        k = int(name[-1])
        assert found["f0_accuracy"] == pytest.approx(np.mean((evaluation.f0[:, k] > 0.5) == (evaluation.targets == k)))
        assert found["f0_loss"] is None
    else:
        assert found["f0_accuracy"] == pytest.approx(np.mean(evaluation.f0.argmax(1) == evaluation.targets))
        expected = log_loss(evaluation.targets, probabilities(evaluation.f0, 1.0), labels=range(n_classes))
        assert found["f0_loss"] == pytest.approx(expected)


@pytest.mark.parametrize(("name", "n_classes"), NAMES)
def test_zero_kernel_forecasts_the_initial_outputs(name, n_classes):
    reduction, kernel, labels, f0, evaluation = sample(name, n_classes)
    evaluation = dataclasses.replace(evaluation, k_eval_train=0 * evaluation.k_eval_train)
    found = predicted_of(decompose(0 * kernel), reduction, labels, f0, evaluation=evaluation)
    assert found.metrics["eval_accuracy"] == found.baselines["f0_accuracy"]
    assert found.metrics["train_accuracy"] == found.metrics["loo_accuracy"]
    json.dumps(found.to_dict(), allow_nan=False)


def test_separable_classes_are_learned():
    for name, n_classes in NAMES:
        reduction, kernel, labels, f0, evaluation = sample(name, n_classes, n=40, m=40, noise=0.05, seed=2)
        found = predicted_of(decompose(kernel), reduction, labels, f0, evaluation=evaluation)
        assert found.ridge_rule == "loo"
        assert min(found.metrics["eval_accuracy"], found.metrics["loo_accuracy"]) >= 0.85
        assert found.metrics["eval_accuracy"] > found.baselines["majority_accuracy"]


def test_shuffled_labels_are_not_learned():
    reduction, kernel, labels, f0, evaluation = sample("margin", 2, n=60, m=60, noise=0.3)
    shuffled = np.random.default_rng(1).permutation(labels)
    true = predicted_of(decompose(kernel), reduction, labels, f0, evaluation=evaluation)
    found = predicted_of(decompose(kernel), reduction, shuffled, f0, evaluation=evaluation)
    assert true.metrics["loo_accuracy"] > 0.9
    assert found.metrics["loo_accuracy"] < 0.7
    assert found.loo_loss > true.loo_loss


def test_without_evaluation():
    reduction, kernel, labels, f0, _ = sample("trace", 3)
    found = predicted_of(decompose(kernel), reduction, labels, f0)
    empty = {name for name, value in found.to_dict().items() if value is None}
    measured = {"eval_accuracy", "eval_matthews", "eval_macro_f1", "eval_accuracy_standard_error"}
    assert empty == {"eval_loss", "eval_mse", *measured}
    assert found.n_eval == 0
    assert set(found.baselines.values()) == {None}


def test_one_class_only_is_no_error():
    reduction, kernel, _, f0, evaluation = sample("margin", 2)
    found = predicted_of(decompose(kernel), reduction, np.zeros(12, dtype=int), f0, evaluation=evaluation)
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.metrics["loo_accuracy"] == 1.0


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), case=st.sampled_from(NAMES), factor=st.sampled_from([1e-4, 3.0, 1e3]))
def test_scale_of_the_kernel_does_not_matter(seed, case, factor):
    reduction, kernel, labels, f0, evaluation = sample(*case, seed=seed)
    scaled = dataclasses.replace(evaluation, k_eval_train=factor * evaluation.k_eval_train)
    one = predicted_of(decompose(kernel), reduction, labels, f0, evaluation=evaluation, ridge=2.0)
    other = predicted_of(decompose(factor * kernel), reduction, labels, f0, evaluation=scaled, ridge=factor * 2.0)
    assert other.ridge == pytest.approx(factor * one.ridge)
    for name in ("train_mse", "loo_mse", "eval_mse", "eval_accuracy", "loo_accuracy"):
        assert other.to_dict()[name] == pytest.approx(one.to_dict()[name], rel=1e-6), name
    assert other.loo_loss == pytest.approx(one.loo_loss, rel=1e-6, abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), case=st.sampled_from(NAMES))
def test_numbers_are_finite_and_in_range(seed, case):
    reduction, kernel, labels, f0, evaluation = sample(*case, n=8, m=3, seed=seed)
    found = predicted_of(decompose(kernel), reduction, labels, f0, evaluation=evaluation)
    json.dumps(found.to_dict(), allow_nan=False)
    assert 1e-3 <= found.temperature <= 1e3
    for name in ("train_accuracy", "loo_accuracy", "eval_accuracy"):
        assert 0.0 <= found.metrics[name] <= 1.0
    scores = reduction.scores(reduction.coordinates(f0))
    assert found.loo_loss <= np.log(scores.shape[1]) * 1.05  # temperature 1e-3 is close to chance


def test_bad_arguments():
    reduction, kernel, labels, f0, evaluation = sample("margin", 2)
    eigen = decompose(kernel)
    with pytest.raises(ConfigError, match="ridge = 0"):
        predicted_of(eigen, reduction, labels, f0, ridge=0.0)
    with pytest.raises(KernelError, match="do not fit a kernel of 12 rows"):
        predicted_of(eigen, reduction, labels[:5], f0[:5])
    nobody = Evaluation(evaluation.f0[:0], evaluation.targets[:0], evaluation.k_eval_train[:0])
    with pytest.raises(DataError, match="no examples to evaluate"):
        predicted_of(eigen, reduction, labels, f0, evaluation=nobody)
