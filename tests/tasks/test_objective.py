"""Losses are those of transformers, metrics those of scikit-learn and scipy, fits those of a slow optimiser."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, r2_score

from foretune.errors import ConfigError, DataError
from foretune.tasks.classification import Classification
from foretune.tasks.metrics import METRICS, main_metric, metric_named
from foretune.tasks.multi_label import MultiLabel
from foretune.tasks.regression import Regression

import cases

KINDS = [(Classification, 2), (Classification, 4), (Regression, 1), (Regression, 3), (MultiLabel, 1), (MultiLabel, 3)]
of_kinds = pytest.mark.parametrize(("kind", "count"), KINDS)


def of(kind, count):
    return kind(tuple(f"c{i}" for i in range(count)))


def problem(kind, count, n=20, seed=0):
    rng = np.random.default_rng(seed)
    outputs = 2.0 * rng.standard_normal((n, count))
    if kind is Classification:
        return outputs, rng.permutation(np.arange(n) % count)
    return outputs, rng.standard_normal((n, count)) if kind is Regression else rng.integers(0, 2, (n, count))


@of_kinds
def test_losses_are_those_of_transformers(kind, count):
    objective = of(kind, count)
    model = cases.tiny("bert", count, dtype=torch.float32)
    model.config.problem_type = objective.problem_type
    sequences = cases.ragged(6)
    targets = objective.tensor(problem(kind, count, n=6)[1])
    with torch.no_grad():
        found = model(**cases.batch_of(sequences).inputs, labels=targets)
    assert float(objective.loss(found.logits, targets).mean()) == pytest.approx(float(found.loss), rel=1e-6)
    several = torch.stack([found.logits, 2 * found.logits])  # runs side by side
    losses = objective.loss(several, targets)
    assert losses.shape == (2, 6)
    assert torch.allclose(losses[1], objective.loss(2 * found.logits, targets))


@of_kinds
def test_the_mean_loss_is_in_float64_and_never_minus_nothing(kind, count):
    objective, (outputs, targets) = of(kind, count), problem(kind, count)
    y = torch.as_tensor(targets) if kind is Classification else torch.as_tensor(targets, dtype=torch.float64)
    reference = {Classification: torch.nn.CrossEntropyLoss, Regression: torch.nn.MSELoss}
    loss = reference.get(kind, torch.nn.BCEWithLogitsLoss)()(torch.as_tensor(outputs), y)
    assert objective.mean_loss(outputs, targets) == pytest.approx(float(loss), rel=1e-14)
    certain = 1e4 * (2.0 * np.eye(count)[targets] - 1) if kind is Classification else 1e4 * (2.0 * targets - 1)
    best = objective.mean_loss(targets.astype(float) if kind is Regression else certain, targets)
    assert str(best) == "0.0"
    assert objective.mean_loss(-certain, targets) > 1e3


@of_kinds
def test_the_residual_points_down_the_loss(kind, count):
    objective, (outputs, targets) = of(kind, count), problem(kind, count)
    f = torch.tensor(outputs, requires_grad=True)
    objective.loss(f, objective.tensor(targets, torch.float64)).sum().backward()
    factor = {Classification: 1.0, Regression: 2.0 / count, MultiLabel: 1.0 / count}[kind]
    assert np.allclose(factor * objective.residual(outputs, targets), -f.grad.numpy(), rtol=1e-10, atol=1e-12)


def test_metrics_of_classes():
    outputs, classes = problem(Classification, 4, n=50)
    said = outputs.argmax(1)
    assert of(Classification, 4).measure(outputs, classes) == pytest.approx(
        {
            "accuracy": accuracy_score(classes, said),
            "matthews": matthews_corrcoef(classes, said),
            "macro_f1": f1_score(classes, said, average="macro"),
        }
    )
    assert of(Classification, 3).main(np.zeros((4, 3)), np.array([0, 0, 1, 2])) == 0.5  # ties go to the first class


@pytest.mark.parametrize("count", [1, 3])
def test_metrics_of_numbers(count):
    outputs, numbers = problem(Regression, count, n=50)
    columns = list(zip(outputs.T, numbers.T, strict=True))
    assert of(Regression, count).measure(outputs, numbers) == pytest.approx(
        {
            "spearman": np.mean([spearmanr(f, y).statistic for f, y in columns]),
            "pearson": np.mean([pearsonr(f, y).statistic for f, y in columns]),
            "r2": r2_score(numbers, outputs),
        }
    )
    assert np.isnan(of(Regression, count).main(np.zeros_like(outputs), numbers))
    assert np.isnan(of(Regression, count).main(np.full_like(outputs, np.nan), numbers))


@pytest.mark.parametrize("count", [1, 3])
def test_metrics_of_labels(count):
    outputs, labels = problem(MultiLabel, count, n=50)
    said = (outputs > 0).astype(int)
    each = [f1_score(y, f) for f, y in zip(said.T, labels.T, strict=True)]
    found = of(MultiLabel, count).measure(outputs, labels)
    assert found == pytest.approx(
        {
            "micro_f1": f1_score(labels.ravel(), said.ravel()),
            "macro_f1": np.mean(each),
            "exact_match": np.mean([list(f) == list(y) for f, y in zip(said, labels, strict=True)]),
        }
    )
    assert of(MultiLabel, count).main(-np.ones_like(outputs), np.zeros_like(labels)) == 0.0


@of_kinds
def test_every_metric_has_its_name(kind, count):
    objective, (outputs, targets) = of(kind, count), problem(kind, count)
    assert tuple(objective.measure(outputs, targets)) == tuple(metric.name for metric in objective.metrics)
    assert objective.metric == main_metric(objective.kind) == METRICS[objective.kind][0]
    assert objective.measure(outputs, targets)[objective.metric.name] == objective.main(outputs, targets)
    assert objective.to_dict()["metrics"][0]["name"] == objective.metric.name


@of_kinds
def test_no_other_constant_has_less_loss(kind, count):
    """Up to the examples that are counted once more than they are there."""
    objective, (_, targets) = of(kind, count), problem(kind, count, n=400)
    best = objective.constant(targets)
    loss = objective.mean_loss(np.tile(best, (400, 1)), targets)
    found = minimize(lambda f: objective.mean_loss(np.tile(f, (400, 1)), targets), best, method="BFGS")
    assert loss == pytest.approx(found.fun, rel=1e-4)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_a_layer_of_labels_is_the_least_penalised_loss(count, intercept):
    rng = np.random.default_rng(0)
    inputs = rng.normal(1.0, [1.0, 5.0, 0.2], (40, 3))
    labels = (inputs[:, :count] + 0.5 * rng.standard_normal((40, count)) > 1.0).astype(int)
    weight, bias = of(MultiLabel, count).fit_output(inputs, labels, intercept=intercept)
    assert (bias is None) is not intercept
    shift = inputs.mean(0) if intercept else 0.0
    scaled = (inputs - shift) / (inputs.std(0) * np.sqrt(3))
    for label in range(count):

        def loss(values, label=label):
            f = scaled @ values[:3] + (values[3] if intercept else 0.0)
            return np.sum(np.logaddexp(0.0, -(2 * labels[:, label] - 1) * f)) + values[:3] @ values[:3] / 2

        best = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x
        expected = scaled @ best[:3] + (best[3] if intercept else 0.0)
        found = inputs @ weight[label] + (0.0 if bias is None else bias[label])
        assert np.allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_a_layer_of_numbers_is_a_ridge_regression_that_errs_least_on_what_is_left_out(count, intercept):
    rng = np.random.default_rng(0)
    inputs = rng.normal(1.0, [1.0, 5.0, 0.2, 0.0], (20, 4))
    numbers = inputs[:, :1] * np.arange(1, count + 1) + rng.standard_normal((20, count))
    weight, bias = of(Regression, count).fit_output(inputs, numbers, intercept=intercept)
    assert weight.shape == (count, 4)
    assert np.all(weight[:, 3] == 0) or not intercept
    kept = inputs[:, :3] if intercept else inputs
    spread = np.where(inputs.std(0) > 0, inputs.std(0), np.inf)[: kept.shape[1]] * 2.0
    scaled = (kept - (kept.mean(0) if intercept else 0.0)) / spread

    def solve(rows, penalty):
        x, y = scaled[rows], numbers[rows]
        x_0, y_0 = (x.mean(0), y.mean(0)) if intercept else (0.0, 0.0)
        beta = np.linalg.solve((x - x_0).T @ (x - x_0) + penalty * np.eye(x.shape[1]), (x - x_0).T @ (y - y_0))
        return lambda z: (z - x_0) @ beta + y_0

    def left_out(penalty):
        rows = np.arange(20)
        return sum(np.sum((solve(rows != i, penalty)(scaled[i]) - numbers[i]) ** 2) for i in rows)

    best = min(np.geomspace(1e-3, 1e3, 13), key=left_out)
    found = inputs @ weight.T + (0.0 if bias is None else bias)
    assert np.allclose(found, solve(np.full(20, True), best)(scaled), atol=1e-8)


def test_a_label_that_is_everywhere_gets_its_odds():
    labels = np.array([[1, 0], [1, 1], [1, 0], [1, 1]])
    weight, bias = of(MultiLabel, 2).fit_output(np.arange(4.0)[:, None], labels, intercept=True)
    assert weight[0].tolist() == [0.0]
    assert bias[0] == pytest.approx(np.log(4.5 / 0.5))
    with pytest.raises(ConfigError, match="a label that some samples have"):
        of(MultiLabel, 1).fit_output(np.arange(4.0)[:, None], labels[:, :1], intercept=True)


@of_kinds
def test_targets_are_answered_by_every_reduction(kind, count):
    objective, (_, targets) = of(kind, count), problem(kind, count)
    single = "class:0" if kind is Classification else "output:0"
    for name in (None, "trace", "full", single):
        reduction = objective.reduction(name)
        scores = reduction.scores(reduction.coordinates(objective.encode(targets)))
        answers = objective.answers(reduction, targets)
        assert objective.main(scores, answers) == pytest.approx(1.0)
    assert objective.simulated().n_outputs == (count - 1 if kind is Classification else count)


@settings(deadline=None, max_examples=15)
@given(case=st.sampled_from(KINDS), seed=st.integers(0, 100))
def test_the_temperature_is_best_for_labels_that_are_not_certain(case, seed):
    objective, (outputs, targets) = of(*case), problem(*case, seed=seed)
    found = objective.temperature(outputs, targets)
    if case[0] is Regression:
        assert found == 1.0
        return
    if case[0] is Classification:
        hard = np.eye(case[1])[targets]
        soft = (len(hard) * hard + 1) / (len(hard) + case[1])
    else:
        n = targets.sum(0)
        soft = np.where(targets == 1, (n + 1) / (n + 2), 1 / (len(targets) - n + 2))

    def loss(factor):
        f = torch.as_tensor(factor * outputs)
        if case[0] is Classification:
            return float(torch.nn.functional.cross_entropy(f, torch.as_tensor(soft)))
        return float(torch.nn.functional.binary_cross_entropy_with_logits(f, torch.as_tensor(soft)))

    assert loss(found) <= min(map(loss, np.geomspace(1e-3, 1e3, 601))) + 1e-9


def test_standard_errors():
    assert of(Classification, 3).standard_error(0.8, 100) == pytest.approx(0.04)
    assert of(MultiLabel, 3).standard_error(0.8, 100) is None
    assert of(Regression, 3).standard_error(0.8, 100) is None
    assert of(Regression, 1).standard_error(0.8, 3) is None
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(2000):
        x = rng.standard_normal(60)
        draws.append(spearmanr(x, 0.5 * x + rng.standard_normal(60)).statistic)
    assert of(Regression, 1).standard_error(float(np.mean(draws)), 60) == pytest.approx(np.std(draws), rel=0.1)


@pytest.mark.parametrize(
    ("objective", "targets", "message"),
    [
        (of(Classification, 2), np.array([0, 0, 0, 1]), "'c1' has 1"),
        (of(Regression, 2), np.array([[1.0, 2.0], [1.0, 3.0], [1.0, 4.0]]), "value of 'c0'"),
        (of(MultiLabel, 2), np.array([[1, 0], [0, 1], [1, 1], [0, 1]]), "'c1' is on 3"),
    ],
)
def test_what_no_layer_can_be_fitted_on_is_refused(objective, targets, message):
    with pytest.raises(DataError, match=message):
        objective.check_rows(targets)
    with pytest.raises(DataError, match=message):
        objective.check_sample(targets, targets)
    with pytest.raises(ConfigError, match=r"samples = 3: .* 4"):
        objective.check_count(3)
    objective.check_count(4)
    enough = problem(type(objective), 2)[1]
    objective.check_rows(enough)
    objective.check_sample(enough, enough)


@settings(deadline=None)
@given(value=st.floats(-0.98, 0.98))
def test_scales_are_undone(value):
    for metrics in METRICS.values():
        for metric in metrics:
            kept = abs(value) if metric.scale == "logit" else value
            expected = max(kept, 0.01) if metric.scale == "logit" else kept
            assert metric.from_scale(metric.to_scale(kept)) == pytest.approx(expected, abs=1e-12)
            assert metric_named(metric.name).scale == metric.scale
            assert metric.to_scale(2.0) < 5.0 or metric.scale == "identity"


@pytest.mark.parametrize("name", ["accuracy", "spearman"])
def test_the_variance_of_rows_is_that_of_a_simulation(name):
    metric, rng, found = metric_named(name), np.random.default_rng(0), []
    for _ in range(3000):
        x = rng.standard_normal(100)
        y = 0.5 * x + rng.standard_normal(100)
        found.append(metric.to_scale(float(np.mean(x * y > 0)) if name == "accuracy" else spearmanr(x, y).statistic))
    expected = metric.row_variance(metric.from_scale(float(np.mean(found)))) / 100
    assert np.var(found) == pytest.approx(expected, rel=0.15)


def test_values_in_tables():
    assert metric_named("accuracy").written(0.8123) == "81.2%"
    assert metric_named("spearman").written(0.8123) == "0.812"
    assert metric_named("spearman").written(float("nan")) == metric_named("r2").written(None) == "–"
    with pytest.raises(ConfigError, match="unknown metric 'bleu'"):
        metric_named("bleu")
