"""Kernel regression on the samples, read as what the model would answer: a first prediction of a fine-tune.

It is regression on n samples with squared loss, not a simulation of the training: no learning rate, number of
steps, optimiser or other training row enters. The level of the losses is not calibrated against training.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal

import numpy as np

from foretune.arrays import Array
from foretune.errors import DataError
from foretune.ntk.regression import KernelRegression, fit_regression, predict
from foretune.ntk.spectrum import Eigen
from foretune.tasks.objective import Objective, Targets
from foretune.tasks.outputs import OutputReduction

Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class Examples:
    """Examples with their initial outputs.

    Attributes:
        f0: n × C initial outputs.
        targets: Their targets.
    """

    f0: Array
    targets: Targets


@dataclass(frozen=True)
class Evaluation(Examples):
    """Examples to predict.

    Attributes:
        f0: m × C initial outputs.
        targets: Their targets.
        k_eval_train: M × N kernel with the training samples; M = m·k for a block kernel.
    """

    k_eval_train: Array


@dataclass(frozen=True)
class KernelPrediction:
    """Predictions of kernel regression, in the units of the objective; None without evaluation or where not defined.

    Losses are the means of the objective's loss of temperature · scores. Mean squared errors are (1/n) Σ_i ‖·‖² in
    target coordinates.

    Attributes:
        method: How it was made.
        ridge: δ of the regression.
        ridge_rule: `given`, or `loo` where δ minimises `loo_mse`.
        temperature: Factor on the scores that fits the leave-one-out scores best; 1 where they are the outputs.
        train_loss: Loss on the training samples.
        loo_loss: Loss of the leave-one-out predictions.
        eval_loss: Loss on the evaluation examples.
        train_mse: Mean squared error on the training samples.
        loo_mse: Mean squared error of the leave-one-out predictions.
        eval_mse: Mean squared error on the evaluation examples.
        metrics: The objective's metrics, `train_NAME`, `loo_NAME` and `eval_NAME` of each.
        standard_error: Of the main metric on the evaluation examples, for their number alone: the spread over draws of
            the training samples is not in it.
        n_eval: Evaluation examples m; 0 without.
        baselines: What is reached on the evaluation examples without the kernel: the main metric and the loss of one
            prediction for all (`majority_accuracy`, or `constant_NAME`; `constant_loss`) and of the initial outputs as
            they are (`f0_NAME`, `f0_loss`). The losses are None where scores are no outputs (`class:k`).
        metric: Name of the main metric.
    """

    method: Literal["kernel_regression"]
    ridge: float
    ridge_rule: Literal["given", "loo"]
    temperature: float
    train_loss: float
    loo_loss: float
    eval_loss: float | None
    train_mse: float
    loo_mse: float
    eval_mse: float | None
    metrics: Metrics
    standard_error: float | None
    n_eval: int
    baselines: Metrics
    metric: str

    @property
    def eval_metric(self) -> float | None:
        """The main metric on the evaluation examples."""
        return self.metrics[f"eval_{self.metric}"]

    def to_dict(self) -> dict[str, Any]:
        """Lay out as in `result.json`: the metrics beside the losses.

        Returns:
            JSON-ready values.
        """
        content = asdict(self)
        metric, metrics, error = content.pop("metric"), content.pop("metrics"), content.pop("standard_error")
        baselines = content.pop("baselines")
        return {**content, **metrics, f"eval_{metric}_standard_error": error, "baselines": baselines}


def predict_by_regression(
    eigen: Eigen,
    reduction: OutputReduction,
    objective: Objective,
    train: Examples,
    *,
    evaluation: Evaluation | None = None,
    ridge: float | None = None,
) -> KernelPrediction:
    """Predict metrics and loss of the linearised fine-tune by kernel regression on the samples.

    f(x) = f_0(x) + K(x, X) (K + δI)⁻¹ (y − f_0(X)) with the targets y of the output reduction. Where these are no
    outputs that the loss takes (classes, labels), the scores that it gives are read as logits after one temperature,
    fitted on the leave-one-out scores.

    Args:
        eigen: Decomposition of the N × N kernel of the training samples.
        reduction: Output reduction that the kernel was taken with.
        objective: What the targets are, and how outputs are judged.
        train: The training samples.
        evaluation: Examples to predict.
        ridge: δ > 0; None chooses it by leave-one-out.

    Returns:
        The prediction.

    Raises:
        ConfigError: If δ is not positive and finite.
        KernelError: If kernel, targets and outputs do not fit each other.
        DataError: If `evaluation` has no examples.
    """
    targets = reduction.coordinates(objective.encode(train.targets))
    offset = reduction.coordinates(train.f0)
    fit = fit_regression(eigen, targets, offset, ridge=ridge, rows_per_example=reduction.rows_per_example)
    return predict_from_fit(fit, reduction, objective, train, evaluation=evaluation)


def predict_from_fit(
    fit: KernelRegression,
    reduction: OutputReduction,
    objective: Objective,
    train: Examples,
    *,
    evaluation: Evaluation | None = None,
) -> KernelPrediction:
    """Judge a fit of the samples, as `predict_by_regression`.

    Args:
        fit: Of the targets of the output reduction.
        reduction: Output reduction that the kernel was taken with.
        objective: What the targets are, and how outputs are judged.
        train: The training samples.
        evaluation: Examples to predict.

    Returns:
        The prediction.

    Raises:
        KernelError: If kernel, targets and outputs do not fit each other.
        DataError: If `evaluation` has no examples.
    """
    answers = objective.answers(reduction, train.targets)
    scores = {"train": reduction.scores(fit.fitted), "loo": reduction.scores(fit.loo)}
    wanted = {"train": answers, "loo": answers}
    temperature = objective.temperature(scores["loo"], answers)
    n_eval, eval_mse, baselines = 0, None, _no_baselines(objective)
    if evaluation is not None:
        n_eval = len(evaluation.targets)
        if n_eval == 0:
            raise DataError("no examples to evaluate: leave the evaluation out")
        wanted["eval"] = objective.answers(reduction, evaluation.targets)
        scores["eval"], eval_mse = _evaluate(fit, reduction, objective, evaluation)
        initial = reduction.scores(reduction.coordinates(evaluation.f0))
        baselines = _baselines(objective, reduction, answers, wanted["eval"], initial)
    losses = {rows: objective.mean_loss(temperature * scores[rows], wanted[rows]) for rows in scores}
    metrics = _metrics(objective, scores, wanted)
    main = metrics[f"eval_{objective.metric.name}"]
    return KernelPrediction(
        method="kernel_regression",
        ridge=fit.ridge,
        ridge_rule=fit.ridge_rule,
        temperature=temperature,
        train_loss=losses["train"],
        loo_loss=losses["loo"],
        eval_loss=losses.get("eval"),
        train_mse=fit.train_mse,
        loo_mse=fit.loo_mse,
        eval_mse=eval_mse,
        metrics=metrics,
        standard_error=None if main is None else objective.standard_error(main, n_eval),
        n_eval=n_eval,
        baselines=baselines,
        metric=objective.metric.name,
    )


def _evaluate(
    fit: KernelRegression, reduction: OutputReduction, objective: Objective, evaluation: Evaluation
) -> tuple[Array, float]:
    """Scores of the evaluation rows, and the mean squared error of what is regressed on."""
    predicted = predict(fit, evaluation.k_eval_train, reduction.coordinates(evaluation.f0))
    wrong = reduction.coordinates(objective.encode(evaluation.targets)) - predicted
    return reduction.scores(predicted), float(np.sum(wrong**2)) / len(evaluation.targets)


def _metrics(
    objective: Objective, scores: Mapping[str, Array], wanted: Mapping[str, Targets]
) -> dict[str, float | None]:
    """Metrics of the training rows, of them left out and, where there are any, of the evaluation rows; else None."""
    return dict.fromkeys(f"eval_{metric.name}" for metric in objective.metrics) | {
        f"{rows}_{name}": _defined(value)
        for rows in scores
        for name, value in objective.measure(scores[rows], wanted[rows]).items()
    }


def _defined(value: float) -> float | None:
    return value if isfinite(value) else None


def _no_baselines(objective: Objective) -> dict[str, float | None]:
    metric, constant = objective.metric.name, objective.constant_name
    return dict.fromkeys((f"{constant}_{metric}", f"f0_{metric}", "constant_loss", "f0_loss"))


def _baselines(
    objective: Objective, reduction: OutputReduction, train: Targets, evaluation: Targets, initial: Array
) -> dict[str, float | None]:
    """What one prediction for all, fitted on the training samples, and the initial outputs reach."""
    constant = np.broadcast_to(objective.constant(train), (len(evaluation), objective.constant(train).size))
    values = (objective.main(constant, evaluation), objective.main(initial, evaluation))
    losses: tuple[float | None, float | None] = (None, None)
    if reduction.scores_are_outputs:
        losses = objective.mean_loss(constant, evaluation), objective.mean_loss(initial, evaluation)
    return dict(zip(_no_baselines(objective), (*map(_defined, values), *losses), strict=True))
