"""Kernels of all modules from one pass over the samples, for the quick score."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from foretune.forecasting.linearise import Linearised, first_examples
from foretune.ntk.factors import TokenFactors, adapter_features
from foretune.ntk.kernel import tangent_kernel
from foretune.ranking.quick_score import Blocks

SAMPLES = 256  # at most, for the quick score: its cost grows with their cube


def module_kernels(linearised: Linearised, ranks: Sequence[int]) -> Blocks:
    """Multiply the token factors out to a kernel for each module and step of rank.

    Outputs are added up (`margin`, or `trace` for more than two classes), draws of A are averaged.

    Args:
        linearised: The model after the pass over the samples.
        ranks: Ranks to score; the largest is the pass's own.

    Returns:
        Blocks of the first 256 samples at most.
    """
    sample = first_examples(linearised.train, min(SAMPLES, linearised.train.factors.n))
    factors = with_summed_outputs(sample.factors)
    steps = []
    for site, module, rows in zip(factors.sites, factors.modules, linearised.rows, strict=True):
        one = replace(factors, sites=(site,), modules=(module,))  # the features of a high rank are large
        features = adapter_features(one, [rows.float()], draws=linearised.draws)
        steps.append(tangent_kernel(features, ranks=ranks, average=True).blocks[:, 0])
    largest = max(site.rank for site in factors.sites)
    kept = (*sorted({rank for rank in ranks if rank != largest}), largest)
    outputs, targets = factors.logits.double().cpu().numpy(), sample.targets.cpu().numpy()
    residual = sample.objective.residual(outputs, targets)
    return Blocks(factors.sites, kept, np.concatenate(steps), residual)


def with_summed_outputs(factors: TokenFactors) -> TokenFactors:
    """Let the kernels of the differentiated outputs be added up: `margin` is its own sum, that of `full` is `trace`.

    Args:
        factors: Token factors.

    Returns:
        The same factors under the reduction with one kernel row for each example.
    """
    return replace(factors, reduction=factors.reduction.summed())
