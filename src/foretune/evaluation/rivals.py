"""Metrics of others for the cells of a study, from the same samples: of the data set, and of each placement."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foretune.evaluation.gradients import gradient_norm, page
from foretune.evaluation.lazy import asymmetric_scores, lazy_scores
from foretune.evaluation.transferability import gbc, h_score, log_me, nleep, parc, trans_rate
from foretune.evaluation.weights import kappa_tune_scores, plop_scores
from foretune.forecasting.linear_model import Sample, Start
from foretune.forecasting.linearise import Survey
from foretune.models.classifier import batches
from foretune.ntk.factors import adapter_features
from foretune.ntk.features import TangentFeatures
from foretune.ntk.kernel import TangentKernel, tangent_kernel
from foretune.problem import Plan
from foretune.ranking.blocks import blocks_of, summed
from foretune.ranking.candidates import Candidate
from foretune.ranking.quick_score import quick_scores

TEXTS = 64  # that PLoP looks at


def data_quantities(survey: Survey, *, seed: int) -> dict[str, float]:
    """Compute the metrics of a data set's features, the same for all its placements.

    Args:
        survey: The pass over the samples; features are the inputs φ of the head's output layer.
        seed: Seed of the mixture model.

    Returns:
        Numbers by name.
    """
    features = survey.train.factors.inputs.double().cpu().numpy()
    labels, n_classes = np.asarray(survey.train.labels), survey.train.factors.reduction.n_logits
    return {
        "log_me": log_me(features, labels, n_classes),
        "h_score": h_score(features, labels, n_classes),
        "nleep": nleep(features, labels, n_classes, seed=seed),
        "trans_rate": trans_rate(features, labels, n_classes),
        "gbc": gbc(features, labels, n_classes),
        "parc": parc(features, labels, n_classes),
        "f0_accuracy": _initial_accuracy(survey),
    }


def _initial_accuracy(survey: Survey) -> float:
    factors, labels = survey.evaluation.factors, np.asarray(survey.evaluation.labels)
    logits = factors.inputs.float() @ survey.head.weight.float().T
    if survey.head.bias is not None:
        logits = logits + survey.head.bias.float()
    return float((logits.argmax(1).cpu().numpy() == labels).mean())


def placement_quantities(plan: Plan, survey: Survey, starts: Sequence[Start]) -> list[dict[str, Any]]:
    """Compute the metrics of placements from the blocks of their modules.

    Slopes of the cross-entropy are those at the probe head. PLoP and KappaTune are means over the placement's modules.

    Args:
        plan: What was surveyed.
        survey: The pass over the samples.
        starts: Placements.

    Returns:
        Numbers by name, for each placement.
    """
    ranks = sorted({len(start.a[0]) for start in starts})
    blocks = blocks_of(survey, ranks)
    candidates = [Candidate(start.sites, len(start.a[0])) for start in starts]
    kernels = blocks.kernels(candidates)
    quick = quick_scores(blocks, candidates)
    modules = {a.site.name: _linear(a.module) for a in plan.adapted.adapters}
    plop, kappa = _plop(plan, modules), kappa_tune_scores(modules)
    names = [site.name for site in survey.sites]
    slopes = -blocks.residual[:, 1:] if blocks.residual.shape[1] == 2 else -blocks.residual
    return [
        {
            "quick_score": float(score),
            "gradient_norm": gradient_norm(kernel, slopes),
            "page": page(kernel, slopes),
            "plop": float(np.mean([plop[names[site]] for site in start.sites])),
            "kappa_tune": float(np.mean([kappa[names[site]] for site in start.sites])),
        }
        for start, kernel, score in zip(starts, kernels, quick, strict=True)
    ]


def lazy_quantities(survey: Survey, starts: Sequence[Start]) -> list[dict[str, float]]:
    """Forecast accuracy by kernels alone, from the cross-fitted probe: descent, logistic, sign and asymmetric descent.

    Outputs of more than two classes share one kernel, the sum over them.

    Args:
        survey: The pass over the samples, with one draw of A.
        starts: Placements.

    Returns:
        Numbers by name, for each placement.
    """
    ranks = sorted({len(start.a[0]) for start in starts})
    train, evaluation = (_features(sample, survey) for sample in (survey.train, survey.evaluation))
    labels, wanted = (np.asarray(sample.labels) for sample in (survey.train, survey.evaluation))
    f_train, f_eval = (sample.factors.logits.double().cpu().numpy() for sample in (survey.train, survey.evaluation))
    kernels: dict[str, tuple[TangentKernel, TangentKernel]] = {
        "descent": (tangent_kernel(train, ranks=ranks), tangent_kernel(evaluation, train, ranks=ranks))
    }
    signs = _signed(train)
    kernels["asymmetric"] = (tangent_kernel(train, signs, ranks=ranks), tangent_kernel(evaluation, signs, ranks=ranks))
    kernels["sign"] = (tangent_kernel(signs, ranks=ranks), tangent_kernel(_signed(evaluation), signs, ranks=ranks))
    found = []
    for start in starts:

        def of(name: str, start: Start = start) -> tuple[Any, Any]:
            left, right = (held.matrices(start.sites, rank=len(start.a[0]))[0] for held in kernels[name])
            return left, right

        lazy = lazy_scores(*of("descent"), labels, f_train, f_eval)
        scores = {
            "regression_accuracy": lazy.regression,
            "logistic_accuracy": lazy.logistic,
            "sign_accuracy": lazy_scores(*of("sign"), labels, f_train, f_eval).regression,
            "asymmetric_accuracy": asymmetric_scores(*of("asymmetric"), labels, f_train, f_eval),
        }
        found.append({name: survey.evaluation.objective.main(held, wanted) for name, held in scores.items()})
    return found


def _features(sample: Sample, survey: Survey) -> TangentFeatures:
    return adapter_features(summed(sample.factors), [rows.float() for rows in survey.rows], draws=survey.draws)


def _signed(features: TangentFeatures) -> TangentFeatures:
    change: Callable[[Any], Any] = torch.sign
    return replace(features, b=tuple(change(block) for block in features.b))


def _linear(module: Any) -> nn.Linear:
    """The base layer that peft wraps."""
    base: nn.Linear = module.base_layer
    return base


def _plop(plan: Plan, modules: Mapping[str, nn.Module]) -> dict[str, float]:
    """PLoP on the first texts, without the positions that pad the shorter ones of a batch."""
    rows = list(range(min(TEXTS, len(plan.train.features))))
    inputs: dict[str, Tensor] = {}

    def run() -> None:
        with plan.adapted.forward():
            for batch in batches(plan.train, plan.classifier, batch_size=plan.settings.batch_size, rows=rows):
                inputs.update(batch.inputs)
                plan.adapted.model(**batch.inputs)

    return plop_scores(modules, run, kept=lambda: inputs.get("attention_mask"))
