"""The numbers of one kernel: spectrum, bounds and kernel regression."""

import time
from dataclasses import dataclass

from foretune.arrays import Array
from foretune.ntk.bounds import RiskBounds, risk_bounds
from foretune.ntk.feature_sketch import feature_width
from foretune.ntk.large_regression import (
    factor_for_bounds,
    fit_large_regression,
    large_risk_bounds,
    smallest_eigenvalue,
)
from foretune.ntk.large_spectrum import DENSE, estimate_spectrum, large_alignment, large_kernel
from foretune.ntk.prediction import Evaluation, Examples, KernelPrediction, predict_by_regression, predict_from_fit
from foretune.ntk.spectrum import Spectrum, centre, decompose, spectrum
from foretune.problem import Plan
from foretune.scoring.passes import Measurement
from foretune.scoring.tiling import let_go


@dataclass(frozen=True)
class Assessment:
    """The numbers of one kernel.

    Attributes:
        kernel: Spectrum of K.
        centred: Spectrum of HKH.
        bounds: Theorem 1 in both forms, with the exact risk.
        kernel_regression: What kernel regression on the samples predicts.
        eigenvalues: Of K, descending, as they came; of a large kernel what `estimate_spectrum` puts in their place.
        eigenvalues_centred: Of HKH.
        seconds_spectrum: Spectra and bounds.
        seconds_regression: Regression.
    """

    kernel: Spectrum
    centred: Spectrum
    bounds: RiskBounds
    kernel_regression: KernelPrediction
    eigenvalues: Array
    eigenvalues_centred: Array
    seconds_spectrum: float
    seconds_regression: float


def assess(
    k_train_train: Array,
    k_eval_train: Array | None,
    measurement: Measurement,
    plan: Plan,
    width: int | None = None,
) -> Assessment:
    """Compute spectrum, bounds and kernel regression of one kernel.

    Args:
        k_train_train: N × N kernel.
        k_eval_train: M × N kernel, or None.
        measurement: Targets and initial outputs that go with it.
        plan: Objective, output reduction, σ and ridge.
        width: Features that it is of; None for those of the plan's adapter at one draw of A.

    Returns:
        The numbers.
    """
    if len(k_train_train) > DENSE:
        rank = features_of(plan) if width is None else width
        return _assess_large(k_train_train, k_eval_train, measurement, plan, rank)
    start = time.perf_counter()
    reduction, objective, settings = plan.reduction, plan.task.objective, plan.settings
    targets = reduction.coordinates(objective.encode(measurement.y_train))
    residual = targets - reduction.coordinates(measurement.f_train_0)
    k = reduction.rows_per_example
    eigen = decompose(k_train_train)
    eigen_centred = decompose(centre(k_train_train, k))
    options = {"sigma": settings.sigma, "epsilon": measurement.epsilon}
    of_k = spectrum(eigen, targets=targets, rows_per_example=k, **options)
    of_centred = spectrum(eigen_centred, targets=targets, rows_per_example=k, **options)
    bounds = risk_bounds(eigen, residual, sigma=settings.sigma)
    middle = time.perf_counter()
    evaluation = _evaluation(k_eval_train, measurement)
    train = Examples(measurement.f_train_0, measurement.y_train)
    predicted = predict_by_regression(eigen, reduction, objective, train, evaluation=evaluation, ridge=settings.ridge)
    return Assessment(
        of_k,
        of_centred,
        bounds,
        predicted,
        eigen.eigenvalues,
        eigen_centred.eigenvalues,
        middle - start,
        time.perf_counter() - middle,
    )


def _evaluation(k_eval_train: Array | None, measurement: Measurement) -> Evaluation | None:
    if k_eval_train is None or measurement.f_eval_0 is None or measurement.y_eval is None:
        return None
    return Evaluation(measurement.f_eval_0, measurement.y_eval, k_eval_train)


def features_of(plan: Plan, *, draws: int = 1) -> int:
    """Count the features that a row of a kernel joins, which bound the rank of the kernel.

    Args:
        plan: Adapter, head, reduction and sketch.
        draws: Draws of A whose kernels are added.

    Returns:
        Their number, of all heads that are averaged.
    """
    settings, adapted = plan.settings, plan.adapted
    outputs = 1 if plan.reduction.block else plan.reduction.n_outputs
    of_a = any(adapter.b is not None for adapter in adapted.adapters)
    one = feature_width(adapted.sites, of_a=of_a, outputs=outputs) if settings.sketch is None else settings.sketch
    with_head = head_features(plan) if settings.ntk_params == "adapter+head" else 0
    return draws * one * (settings.heads if settings.head == "average" else 1) + with_head


def head_features(plan: Plan) -> int:
    """Count the features of the trained head, as `features_of`.

    Args:
        plan: Head and reduction.

    Returns:
        Their number.
    """
    outputs = 1 if plan.reduction.block else plan.reduction.n_outputs
    heads = plan.settings.heads if plan.settings.head == "average" else 1
    return heads * outputs * sum(p.numel() for module in plan.adapted.head.values() for p in module.parameters())


def _assess_large(
    k_train_train: Array, k_eval_train: Array | None, measurement: Measurement, plan: Plan, rank: int
) -> Assessment:
    """The same without a decomposition: one copy of the kernel at a time beside the kernel itself."""
    start = time.perf_counter()
    reduction, objective, settings = plan.reduction, plan.task.objective, plan.settings
    targets = reduction.coordinates(objective.encode(measurement.y_train))
    offset = reduction.coordinates(measurement.f_train_0)
    k, seed = reduction.rows_per_example, settings.seed
    sigma, epsilon = settings.sigma, measurement.epsilon
    kernel, centred = (large_kernel(k_train_train, k, centred=whether) for whether in (False, True))
    aligned = large_alignment(centred, targets)
    of_centred, values_centred = estimate_spectrum(
        centred, sigma=sigma, epsilon=epsilon, lambda_min=(0.0, 0.0), alignment=aligned, seed=seed, rank=rank
    )
    factor = factor_for_bounds(k_train_train, sigma)
    ends = smallest_eigenvalue(factor, seed)
    of_k, values = estimate_spectrum(
        kernel, sigma=sigma, epsilon=epsilon, lambda_min=ends, alignment=aligned, seed=seed, rank=rank
    )
    bounds = large_risk_bounds(factor, targets - offset, (of_k.lambda_max, of_k.lambda_min))
    del factor  # as large as the kernel
    middle = time.perf_counter()
    fit = fit_large_regression(kernel, targets, offset, ridge=settings.ridge, seed=seed)
    train = Examples(measurement.f_train_0, measurement.y_train)
    evaluation = _evaluation(k_eval_train, measurement)
    predicted = predict_from_fit(fit, reduction, objective, train, evaluation=evaluation)
    let_go(k_train_train)
    return Assessment(
        of_k, of_centred, bounds, predicted, values, values_centred, middle - start, time.perf_counter() - middle
    )


def spectrum_alone(kernel: Array, measurement: Measurement, plan: Plan) -> Spectrum:
    """Compute the spectrum of a kernel.

    Args:
        kernel: N × N kernel.
        measurement: Targets that go with it.
        plan: Objective, output reduction and σ.

    Returns:
        Its scalars.
    """
    sigma, seed, k = plan.settings.sigma, plan.settings.seed, plan.reduction.rows_per_example
    targets = plan.reduction.coordinates(plan.task.objective.encode(measurement.y_train))
    if len(kernel) <= DENSE:
        return spectrum(kernel, sigma=sigma, epsilon=measurement.epsilon, targets=targets, rows_per_example=k)
    aligned = large_alignment(large_kernel(kernel, k, centred=True), targets)
    ends = smallest_eigenvalue(factor_for_bounds(kernel, sigma), seed)
    found, _ = estimate_spectrum(
        large_kernel(kernel, k),
        sigma=sigma,
        epsilon=measurement.epsilon,
        lambda_min=ends,
        alignment=aligned,
        seed=seed,
        rank=features_of(plan, draws=plan.adapted.draws),
    )
    let_go(kernel)
    return found
