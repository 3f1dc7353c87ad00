"""What the simulation is compared with: kernels alone, and controls that must know less."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from foretune.arrays import Array
from foretune.evaluation.lazy import asymmetric_scores, lazy_scores
from foretune.forecasting.linear_model import Sample, Start
from foretune.forecasting.linearise import Linearised
from foretune.ntk.factors import adapter_features
from foretune.ntk.features import TangentFeatures
from foretune.ntk.kernel import TangentKernel, tangent_kernel
from foretune.ranking.module_kernels import with_summed_outputs
from foretune.tasks.load import Task
from foretune.tasks.sampling import split


def kernel_accuracies(survey: Linearised, starts: Sequence[Start]) -> list[dict[str, float]]:
    """Predict accuracy by kernels alone, from the cross-fitted probe: descent, logistic, sign and asymmetric descent.

    Outputs of more than two classes share one kernel, the sum over them.

    Args:
        survey: The pass over the samples, with one draw of A.
        starts: Placements.

    Returns:
        Accuracies by name, for each placement.
    """
    ranks = sorted({len(start.a[0]) for start in starts})
    train, evaluation = (_features(sample, survey) for sample in (survey.train, survey.evaluation))
    labels, eval_labels = (np.asarray(sample.labels) for sample in (survey.train, survey.evaluation))
    f_train, f_eval = (sample.factors.logits.double().cpu().numpy() for sample in (survey.train, survey.evaluation))
    signs = _signed(train)
    descent = tangent_kernel(train, ranks=ranks), tangent_kernel(evaluation, train, ranks=ranks)
    asymmetric = tangent_kernel(train, signs, ranks=ranks), tangent_kernel(evaluation, signs, ranks=ranks)
    sign = tangent_kernel(signs, ranks=ranks), tangent_kernel(_signed(evaluation), signs, ranks=ranks)
    accuracies = []
    for start in starts:
        lazy = lazy_scores(*_matrices(descent, start), labels, f_train, f_eval)
        scores = {
            "regression_accuracy": lazy.regression,
            "logistic_accuracy": lazy.logistic,
            "sign_accuracy": lazy_scores(*_matrices(sign, start), labels, f_train, f_eval).regression,
            "asymmetric_accuracy": asymmetric_scores(*_matrices(asymmetric, start), labels, f_train, f_eval),
        }
        accuracies.append(
            {name: survey.evaluation.objective.main(predicted, eval_labels) for name, predicted in scores.items()}
        )
    return accuracies


def _matrices(kernels: tuple[TangentKernel, TangentKernel], start: Start) -> tuple[Array, Array]:
    """A placement's n × n kernel of the training samples and m × n kernel of the rows to predict with them."""
    train, evaluation = (kernel.matrices(start.sites, rank=len(start.a[0]))[0] for kernel in kernels)
    return train, evaluation


def _features(sample: Sample, survey: Linearised) -> TangentFeatures:
    factors = with_summed_outputs(sample.factors)
    return adapter_features(factors, [rows.float() for rows in survey.rows], draws=survey.draws)


def _signed(features: TangentFeatures) -> TangentFeatures:
    change: Callable[[Any], Any] = torch.sign
    return replace(features, b=tuple(change(block) for block in features.b))


def permuted_task(task: Task, seed: int) -> Task:
    """Permute the labels of the rows that train, and of no others: those to predict keep theirs.

    Args:
        task: Data.
        seed: Seed of the run, which chooses the rows too.

    Returns:
        Data.
    """
    rows = split(task, samples=0, eval_samples=None, seed=seed).training
    labels = task.train.labels.copy()
    labels[rows] = np.random.default_rng([seed, 1]).permutation(labels[rows])
    return replace(task, train=replace(task.train, labels=labels))


def redraw_weights(model: Any, seed: int) -> None:
    """Draw all weights of a model anew, as its own initialisation does.

    Args:
        model: Transformers' model, changed in place.
        seed: Seed; the global one is left as it was.
    """
    biases = {name: bias.detach().clone() for name, bias in model.named_parameters() if name.endswith("bias")}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            _initialise(model, module)
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if (
                name in biases and "pooler" in name
            ):  # a pooler whose bias is 0 counts as new, and would train as a whole
                bias.copy_(biases[name])


def _initialise(model: Any, module: nn.Module) -> None:
    # transformers passes over what it thinks was loaded
    for parameter in module.parameters(recurse=False):
        parameter._is_hf_initialized = False  # type: ignore[attr-defined]
    module._is_hf_initialized = False  # type: ignore[assignment]
    model._init_weights(module)
