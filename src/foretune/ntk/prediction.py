"""First forecast of a fine-tune: kernel regression on the samples, read as a classifier."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.special import log_softmax

from foretune.arrays import Array, Labels
from foretune.errors import DataError
from foretune.ntk.regression import KernelRegression, fit_regression, predict
from foretune.ntk.spectrum import Eigen
from foretune.tasks.outputs import OutputReduction
from foretune.tasks.readout import minimise_over

TEMPERATURES = np.geomspace(1e-3, 1e3, 61)


@dataclass(frozen=True)
class Evaluation:
    """Examples to predict.

    Attributes:
        k_eval_train: M × N kernel with the training samples; M = m·k for a block kernel.
        f0: m × C initial logits.
        labels: m labels.
    """

    k_eval_train: Array
    f0: Array
    labels: Labels


@dataclass(frozen=True)
class Baselines:
    """What is reached without the kernel, on the evaluation examples; None without them.

    Attributes:
        majority_accuracy: Share of the class that is most frequent in the training sample.
        f0_accuracy: Accuracy of the initial outputs.
        f0_loss: Cross-entropy of the initial logits as they are, in nats; None for `class:k`.
    """

    majority_accuracy: float | None
    f0_accuracy: float | None
    f0_loss: float | None


@dataclass(frozen=True)
class Forecast:
    """Predictions of the regression; losses in nats, accuracies as fractions, `eval_*` None without evaluation.

    Losses are the mean cross-entropy of softmax(temperature · scores). Mean squared errors are (1/n) Σ_i ‖·‖² in
    target coordinates.

    Attributes:
        method: How it was made.
        ridge: δ of the regression.
        ridge_rule: `given`, or `loo` where δ minimises `loo_mse`.
        train_loss: Loss on the training samples.
        eval_loss: Loss on the evaluation examples.
        temperature: Factor on the scores, between 1e-3 and 1e3, that fits the leave-one-out scores best.
        loo_loss: Loss of the leave-one-out predictions.
        train_accuracy: Accuracy on the training samples.
        loo_accuracy: Accuracy of the leave-one-out predictions.
        eval_accuracy: Accuracy on the evaluation examples.
        train_mse: Mean squared error on the training samples.
        loo_mse: Mean squared error of the leave-one-out predictions.
        eval_mse: Mean squared error on the evaluation examples.
        eval_accuracy_standard_error: √(p(1 − p)/m) of the accuracy p on m evaluation examples. The spread over
            draws of the training samples is not in it.
        n_eval: Evaluation examples m; 0 without.
        baselines: What is reached without the kernel.
    """

    method: Literal["kernel_regression"]
    ridge: float
    ridge_rule: Literal["given", "loo"]
    train_loss: float
    eval_loss: float | None
    temperature: float
    loo_loss: float
    train_accuracy: float
    loo_accuracy: float
    eval_accuracy: float | None
    train_mse: float
    loo_mse: float
    eval_mse: float | None
    eval_accuracy_standard_error: float | None
    n_eval: int
    baselines: Baselines


def forecast(
    eigen: Eigen,
    reduction: OutputReduction,
    train_labels: Labels,
    f0_train: Array,
    *,
    evaluation: Evaluation | None = None,
    ridge: float | None = None,
) -> Forecast:
    """Predict accuracy and loss of the linearised fine-tune by kernel regression on the samples.

    f(x) = f_0(x) + K(x, X) (K + δI)⁻¹ (y − f_0(X)) with the targets y of the output reduction; the scores that it
    gives each class are read as logits after one temperature, fitted on the leave-one-out scores with smoothed
    labels: (n + 1)/(n + C) on the label's own class and 1/(n + C) on each other.

    It is regression on n samples with squared loss, not a simulation of the training: no learning rate, number of
    steps, optimiser or other training row enters. The level of the losses is not calibrated against training.

    Args:
        eigen: Decomposition of the N × N kernel of the training samples.
        reduction: Output reduction that the kernel was taken with.
        train_labels: n labels.
        f0_train: n × C initial logits.
        evaluation: Examples to predict.
        ridge: δ > 0; None chooses it by leave-one-out.

    Returns:
        The forecast.

    Raises:
        ConfigError: If δ is not positive and finite.
        KernelError: If kernel, labels and logits do not fit each other.
        DataError: If `evaluation` has no examples.
    """
    labels = reduction.classes(train_labels)
    targets, offset = reduction.targets(train_labels), reduction.coordinates(f0_train)
    fit = fit_regression(eigen, targets, offset, ridge=ridge, rows_per_example=reduction.rows_per_example)
    fitted, loo = reduction.scores(fit.fitted), reduction.scores(fit.loo)
    temperature = _temperature(loo, labels)
    result = Forecast(
        method="kernel_regression",
        ridge=fit.ridge,
        ridge_rule=fit.ridge_rule,
        train_loss=cross_entropy(temperature * fitted, labels),
        eval_loss=None,
        temperature=temperature,
        loo_loss=cross_entropy(temperature * loo, labels),
        train_accuracy=accuracy(fitted, labels),
        loo_accuracy=accuracy(loo, labels),
        eval_accuracy=None,
        train_mse=fit.train_mse,
        loo_mse=fit.loo_mse,
        eval_mse=None,
        eval_accuracy_standard_error=None,
        n_eval=0,
        baselines=Baselines(None, None, None),
    )
    if evaluation is None:
        return result
    return _with_evaluation(result, fit, reduction, evaluation, majority=int(np.argmax(np.bincount(labels))))


def cross_entropy(scores: Array, labels: Labels) -> float:
    """Mean cross-entropy −(1/n) Σ_i log softmax(scores_i)[label_i].

    Args:
        scores: n × C.
        labels: n integers in 0 … C-1.

    Returns:
        Nats.
    """
    # no logarithm here is above 0; abs, unlike a minus, makes no −0 of 0
    return float(np.mean(np.abs(log_softmax(scores, axis=1)[np.arange(len(labels)), labels])))


def _temperature(scores: Array, labels: Labels) -> float:
    """Fit the factor on the scores by cross-entropy against smoothed labels (Platt 1999)."""
    # Hard labels would send the factor to its end wherever no sample is mistaken, and a single mistaken evaluation
    # example would then dominate the forecast of the loss.
    n, n_classes = scores.shape
    smoothed = (np.eye(n_classes)[labels] * n + 1.0) / (n + n_classes)

    def loss(factor: float) -> float:
        return float(-np.mean(np.sum(smoothed * log_softmax(factor * scores, axis=1), axis=1)))

    return minimise_over(loss, TEMPERATURES)


def accuracy(scores: Array, labels: Labels) -> float:
    """Share of examples whose largest score is that of their label; of equal scores the first counts.

    Args:
        scores: n × C.
        labels: n integers in 0 … C-1.

    Returns:
        Fraction.
    """
    return float(np.mean(np.argmax(scores, axis=1) == labels))


def _with_evaluation(
    result: Forecast, fit: KernelRegression, reduction: OutputReduction, evaluation: Evaluation, majority: int
) -> Forecast:
    m = len(evaluation.labels)
    if m == 0:
        raise DataError("no examples to evaluate: leave the evaluation out")
    labels = reduction.classes(evaluation.labels)
    initial = reduction.coordinates(evaluation.f0)
    predicted = predict(fit, evaluation.k_eval_train, initial)
    scores = reduction.scores(predicted)
    share = accuracy(scores, labels)
    one_against_rest = reduction.name.startswith("class:")
    return replace(
        result,
        eval_loss=cross_entropy(result.temperature * scores, labels),
        eval_accuracy=share,
        eval_mse=float(np.sum((reduction.targets(evaluation.labels) - predicted) ** 2)) / m,
        eval_accuracy_standard_error=float(np.sqrt(share * (1.0 - share) / m)),
        n_eval=m,
        baselines=Baselines(
            majority_accuracy=float(np.mean(labels == majority)),
            f0_accuracy=accuracy(reduction.scores(initial), labels),
            f0_loss=None if one_against_rest else cross_entropy(evaluation.f0, evaluation.labels),
        ),
    )
