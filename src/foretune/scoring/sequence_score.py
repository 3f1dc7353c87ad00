"""The score of a language model's adapter: a tangent kernel of its sequences and the spectrum of it.

Of what is scored of a classifier, the spectrum and κ keep their meaning: they say how differently the sequences pull
at the adapter (`loss`), or how the loss curves in its parameters (`fisher`). Bounds, kernel-target alignment and kernel
regression speak of squared loss on outputs, of which a language model has none here.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretune.arrays import Array
from foretune.models.adapted import describe_placement
from foretune.ntk.sequence_features import (
    NORMALISATION,
    SequenceKernel,
    join_sequence_parts,
    sequence_kernel,
    sequence_parts,
)
from foretune.ntk.spectrum import Spectrum, centre, decompose, spectrum
from foretune.processes.group import HandedOver
from foretune.report.provenance import versions
from foretune.report.store import finite
from foretune.scoring.sequence_plan import SequenceScorePlan, describe_sequence_score
from foretune.scoring.spread import summarise_values
from foretune.sequence_plan import LOSS_UNIT, OnBatch, sequence_batches

SCHEMA = 1
SPREAD = ("lambda_max", "lambda_min", "condition_number", "trace", "effective_dimension")


@dataclass(frozen=True)
class SequenceMeasurement:
    """The kernel of one draw of samples.

    Attributes:
        kernel: For each draw of A.
        indices: Rows of the training split.
        targets: Targets T_i of each sequence.
        losses: Loss of each before training, in nats, summed over its targets.
        seconds: Of the passes and products.
    """

    kernel: SequenceKernel
    indices: NDArray[np.int64]
    targets: Array
    losses: Array
    seconds: float


@dataclass(frozen=True)
class SequenceAssessment:
    """The numbers of one kernel.

    Attributes:
        kernel: Spectrum of K.
        centred: Spectrum of HKH, of the gradients less their mean; None for `fisher`, whose gradients have mean 0.
        eigenvalues: Of K, descending, as they came.
        eigenvalues_centred: Of HKH, or None.
        seconds: Of the spectra.
    """

    kernel: Spectrum
    centred: Spectrum | None
    eigenvalues: Array
    eigenvalues_centred: Array | None
    seconds: float


@dataclass(frozen=True)
class SequenceScore:
    """All that the score of a language model's adapter found.

    Attributes:
        plan: What was done.
        measurement: Kernels of the first draw of samples.
        draws: Assessments of the first draw of samples, one for each draw of A; the first is the adapter's own.
        mean: Spectrum of the mean kernel over the draws of A.
        repeats: Assessments of the adapter's own A, one for each draw of samples.
        seconds: Of `load`, `kernel`, `spectrum` and `total`, summed over repeats.
    """

    plan: SequenceScorePlan
    measurement: SequenceMeasurement
    draws: tuple[SequenceAssessment, ...]
    mean: Spectrum
    repeats: tuple[SequenceAssessment, ...]
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Lay the result out as in `result.json`: the keys of a classifier's score (docs/result.md).

        Returns:
            JSON-ready values; what means nothing of a language model is None.
        """
        return _to_dict(self)


def measure_sequences(
    plan: SequenceScorePlan, *, repeat: int = 0, on_batch: OnBatch | None = None
) -> SequenceMeasurement:
    """Run the pass of one draw of samples.

    Args:
        plan: What to do.
        repeat: Which draw of the samples.
        on_batch: Called with the number of sequences after each batch.

    Returns:
        Its kernel; several processes share the pass, and the first one has it.

    Raises:
        HandedOver: In all processes but the first.
    """
    start, tokens = time.perf_counter(), plan.samples[repeat]
    placed, processes = plan.placed, plan.placed.processes
    parts = sequence_parts(
        placed.adapted,
        sequence_batches(placed, tokens, shared=processes, on_batch=on_batch),
        draws=plan.label_draws,
        seed=plan.settings.seed,
        with_loss=plan.kernel != "fisher",
    )
    if processes.world > 1:
        parts = chain.from_iterable(processes.hand_over(list(parts), placed.language.device))
    features = join_sequence_parts(parts, n=len(tokens.features))
    kernel = sequence_kernel(features, plan.kernel)
    targets, losses = features.targets.numpy(), features.losses.numpy()
    return SequenceMeasurement(kernel, tokens.indices, targets, losses, time.perf_counter() - start)


def assess_sequences(matrix: Array, plan: SequenceScorePlan, epsilon: float) -> SequenceAssessment:
    """Take the spectra of one kernel.

    Args:
        matrix: N × N kernel.
        plan: Which kernel it is, and σ.
        epsilon: Machine epsilon of the features.

    Returns:
        The numbers.
    """
    start = time.perf_counter()
    eigen = decompose(matrix)
    of_k = spectrum(eigen, sigma=plan.settings.sigma, epsilon=epsilon)
    of_centred, values = None, None
    if plan.kernel != "fisher":
        eigen_centred = decompose(centre(matrix))
        of_centred = spectrum(eigen_centred, sigma=plan.settings.sigma, epsilon=epsilon)
        values = eigen_centred.eigenvalues
    return SequenceAssessment(of_k, of_centred, eigen.eigenvalues, values, time.perf_counter() - start)


def run_sequence_score(
    plan: SequenceScorePlan, *, seconds_load: float = 0.0, on_batch: OnBatch | None = None
) -> SequenceScore:
    """Carry out a plan.

    Args:
        plan: From `prepare_sequence_score`.
        seconds_load: Time that loading took, for the record.
        on_batch: Called with the number of sequences after each batch.

    Returns:
        The result.

    Raises:
        HandedOver: In all processes but the first.
    """
    start = time.perf_counter()
    processes = plan.placed.processes
    if not processes.is_main:
        for repeat in range(plan.settings.repeats):
            with processes.until_handed_over():
                measure_sequences(plan, repeat=repeat)
        raise HandedOver
    first = measure_sequences(plan, on_batch=on_batch)
    epsilon, seconds_kernel = first.kernel.epsilon, first.seconds
    draws = tuple(assess_sequences(matrix, plan, epsilon) for matrix in first.kernel.matrices)
    repeats = [draws[0]]
    for repeat in range(1, plan.settings.repeats):
        again = measure_sequences(plan, repeat=repeat, on_batch=on_batch)
        repeats.append(assess_sequences(again.kernel.matrices[0], plan, epsilon))
        seconds_kernel += again.seconds
    mean = spectrum(first.kernel.matrices.mean(axis=0), sigma=plan.settings.sigma, epsilon=epsilon)
    seconds = {
        "load": seconds_load,
        "kernel": seconds_kernel,
        "spectrum": sum(assessed.seconds for assessed in [*draws, *repeats[1:]]),
        "total": seconds_load + time.perf_counter() - start,
    }
    return SequenceScore(plan, first, draws, mean, tuple(repeats), seconds)


def _spread(assessments: Sequence[SequenceAssessment]) -> dict[str, Any] | None:
    if len(assessments) < 2:
        return None
    return {name: summarise_values(getattr(found.kernel, name) for found in assessments) for name in SPREAD}


def _to_dict(result: SequenceScore) -> dict[str, Any]:
    plan, own, measured = result.plan, result.draws[0], result.measurement
    sites = plan.placed.adapted.sites
    traces = measured.kernel.site_traces.mean(axis=1)
    content = {
        "schema": SCHEMA,
        "model": plan.placed.language.source,
        "dataset": plan.placed.task.source,
        "placement": {
            **describe_placement(getattr(plan.placed.placed, "active_peft_config", None), sites),
            "trainable_parameters": sum(site.n_parameters for site in sites),
            "head_parameters": 0,
            "sites": [
                {"name": site.name, "rank": site.rank, "scaling": site.scaling, "trace": float(trace)}
                for site, trace in zip(sites, traces, strict=True)
            ],
        },
        "n": plan.n,
        "output": plan.kernel,
        "normalisation": NORMALISATION[plan.kernel],
        "label_draws": plan.label_draws or None,
        "base": {"train_loss": float(measured.losses.sum() / measured.targets.sum()), "unit": LOSS_UNIT},
        "seed": plan.settings.seed,
        "details": describe_sequence_score(plan),
        "kernel": dataclasses.asdict(own.kernel),
        "kernel_centred": None if own.centred is None else dataclasses.asdict(own.centred),
        "kernel_mean_over_a": dataclasses.asdict(result.mean),
        "spread": {"draws_of_a": _spread(result.draws), "repeats": _spread(result.repeats), "heads": {"trace": None}},
        "head_kernel": None,
        "bounds": None,
        "kernel_regression": None,
        "seconds": dict(result.seconds),
        "versions": versions(),
        "settings": dataclasses.asdict(plan.settings),
    }
    laid_out: dict[str, Any] = finite(content)
    return laid_out
