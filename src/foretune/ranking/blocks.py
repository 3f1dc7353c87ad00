"""Blocks of all modules from one pass over the samples."""

from collections.abc import Sequence
from dataclasses import replace

from foretune.forecasting.linearise import Survey, first_examples
from foretune.ntk.factors import TokenFactors, adapter_features
from foretune.ntk.kernel import tangent_kernel
from foretune.ranking.quick_score import Blocks

SAMPLES = 256  # at most, for the quick score: its cost grows with their cube


def blocks_of(survey: Survey, ranks: Sequence[int]) -> Blocks:
    """Multiply the token factors out to a kernel for each module and step of rank.

    Outputs are added up (`margin`, or `trace` for more than two classes), draws of A are averaged.

    Args:
        survey: The pass over the samples.
        ranks: Ranks to price; the largest is the survey's own.

    Returns:
        Blocks of the first 256 samples at most.
    """
    sample = first_examples(survey.train, min(SAMPLES, survey.train.factors.n))
    factors = summed(sample.factors)
    features = adapter_features(factors, [rows.float() for rows in survey.rows], draws=survey.draws)
    kernel = tangent_kernel(features, ranks=ranks)
    outputs, targets = factors.logits.double().cpu().numpy(), sample.targets.cpu().numpy()
    residual = sample.objective.residual(outputs, targets)
    return Blocks(kernel.sites, kernel.ranks, kernel.blocks.mean(axis=1), residual)


def summed(f: TokenFactors) -> TokenFactors:
    """Let the kernels of the differentiated outputs be added up: `margin` is its own sum, that of `full` is `trace`.

    Args:
        f: Token factors.

    Returns:
        The same factors under the reduction with one kernel row for each example.
    """
    return replace(f, reduction=f.reduction.summed())
