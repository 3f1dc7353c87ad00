"""The passes of a score: kernels and initial outputs of one draw of samples, under the head policy."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from foretune.arrays import Array
from foretune.models.classifier import Encoded
from foretune.models.groups import base_of
from foretune.models.head import HeadWeights, installed, random_heads
from foretune.models.placement import head_modules
from foretune.ntk.clock import KernelSeconds
from foretune.ntk.features import TangentFeatures, join_features
from foretune.ntk.jacobian import batch_features
from foretune.ntk.kernel import TangentKernel, concatenate_rows, tangent_kernel
from foretune.problem import OnBatch, Plan
from foretune.processes.group import HandedOver
from foretune.scoring.shared import Parts, join_kernels
from foretune.scoring.tiled_pass import Headed, tiled_pass
from foretune.scoring.tiling import Tiling, let_go
from foretune.stream import fit_probe, stream_batches, stream_groups
from foretune.tasks.objective import Targets


@dataclass(frozen=True)
class Measurement:
    """Kernels and outputs of one draw of samples.

    Attributes:
        k_train_train: D × N × N kernel of the training samples for each draw of A.
        k_eval_train: D × M × N kernel of the evaluation rows with them, or None.
        head_train_train: N × N kernel of the trained head, or None.
        head_eval_train: M × N kernel of the trained head, or None.
        f_train_0: n × C initial outputs.
        f_eval_0: m × C initial outputs, or None.
        y_train: n targets.
        y_eval: m targets, or None.
        train_indices: Rows of the training split.
        eval_indices: Rows of the evaluation split (of the training split where rows are held out).
        site_traces: Trace of each site's block, averaged over draws.
        head_traces: Trace of the first draw's kernel for each random head.
        epsilon: Machine epsilon of the features.
        seconds_kernel: Passes over the training samples and their Gram products.
        seconds_evaluation: Passes over the evaluation rows and the cross kernel.
        parts: Parts of `seconds_kernel`.
        sketch_error: Relative error of a sketched kernel in Frobenius norm, estimated, for each draw of A; that of
            the worst of several heads. None without a sketch.
    """

    k_train_train: Array
    k_eval_train: Array | None
    head_train_train: Array | None
    head_eval_train: Array | None
    f_train_0: Array
    f_eval_0: Array | None
    y_train: Targets
    y_eval: Targets | None
    train_indices: NDArray[np.int64]
    eval_indices: NDArray[np.int64] | None
    site_traces: tuple[float, ...]
    head_traces: tuple[float, ...]
    epsilon: float
    seconds_kernel: float
    seconds_evaluation: float
    parts: KernelSeconds
    sketch_error: tuple[float, ...] | None = None


@dataclass(frozen=True)
class _Pass:
    """Kernels under one head (or, cross-fitted, one head for each fold); of the sites' blocks only their traces.

    Kernels and traces are D × … for each draw of A, traces M × D for each site.
    """

    k_train_train: Array
    k_eval_train: Array | None
    head_train_train: Array | None
    head_eval_train: Array | None
    site_traces: Array
    epsilon: float
    f_train_0: Array
    f_eval_0: Array | None
    seconds_kernel: float
    seconds_evaluation: float
    parts: KernelSeconds
    sketch_error: tuple[float, ...] | None = None


def measure(
    plan: Plan, *, repeat: int = 0, on_batch: OnBatch | None = None, tiling: Tiling | None = None
) -> Measurement:
    """Run the passes of one draw of samples.

    Args:
        plan: What to do.
        repeat: Which draw of the samples.
        on_batch: Called with the number of examples after each batch.
        tiling: How the samples are cut into tiles; None takes them at once.

    Returns:
        Kernels and initial outputs; several processes share the passes, and the first one has them.

    Raises:
        HandedOver: In all processes but the first.
    """
    task = plan.task
    rows, train = plan.redraw(repeat)
    y_train = task.train.labels[rows.train_indices]
    passes = [one for one in _passes(plan, train, y_train, on_batch, tiling) if one is not None]
    if not plan.processes.is_main:
        raise HandedOver
    evaluated = plan.evaluation is not None
    found = [p.sketch_error for p in passes if p.sketch_error is not None]
    errors = np.array(found) if found else None
    head_traces = tuple(
        float(np.trace(p.k_train_train[0])) for p in passes
    )  # before their mean takes the first's place
    return Measurement(
        k_train_train=_mean_of([p.k_train_train for p in passes]),
        k_eval_train=_mean([p.k_eval_train for p in passes]),
        head_train_train=_mean([p.head_train_train for p in passes]),
        head_eval_train=_mean([p.head_eval_train for p in passes]),
        f_train_0=np.mean([p.f_train_0 for p in passes], axis=0),
        f_eval_0=_mean([p.f_eval_0 for p in passes]),
        y_train=y_train,
        y_eval=plan.evaluation_split.labels[rows.eval_indices] if evaluated else None,
        train_indices=rows.train_indices,
        eval_indices=rows.eval_indices if evaluated else None,
        site_traces=tuple(
            float(np.mean([p.site_traces[site] for p in passes])) for site in range(len(plan.adapted.sites))
        ),
        head_traces=head_traces,
        epsilon=passes[0].epsilon,
        seconds_kernel=sum(p.seconds_kernel for p in passes),
        seconds_evaluation=sum(p.seconds_evaluation for p in passes),
        parts=sum((p.parts for p in passes), KernelSeconds()),
        sketch_error=None if errors is None else tuple(errors.max(axis=0).tolist()),
    )


def _mean(arrays: Sequence[Array | None]) -> Array | None:
    computed = [array for array in arrays if array is not None]
    return _mean_of(computed) if computed else None


def _mean_of(arrays: Sequence[Array]) -> Array:
    """The mean; kernels that are mapped from files stay there."""
    first = arrays[0]
    if len(arrays) == 1:
        return first
    if not isinstance(first, np.memmap):
        return np.asarray(np.mean(arrays, axis=0))
    for other in arrays[1:]:
        first += other
        let_go(other)
    first /= len(arrays)
    let_go(first)
    return first


def _passes(
    plan: Plan, train: Encoded, y_train: Targets, on_batch: OnBatch | None, tiling: Tiling | None
) -> Iterator[_Pass | None]:
    """One pass for each head of the policy."""
    settings = plan.settings
    every_row = np.arange(len(y_train))
    if settings.head == "random":
        as_it_is = HeadWeights({})
        yield _pass(plan, train, [(as_it_is, every_row)], as_it_is, on_batch, tiling)
        return
    modules = head_modules(plan.placed)
    if settings.head == "average":
        base = base_of(plan.placed)
        for head in random_heads(base, modules, count=settings.heads, seed=settings.seed):
            yield _pass(plan, train, [(head, every_row)], head, on_batch, tiling)
        return
    name, layer = list(modules.items())[-1]
    start = time.perf_counter()
    probe = fit_probe(plan, name, layer, y_train, train=train, on_batch=on_batch)
    fitted = time.perf_counter() - start
    result = _pass(plan, train, list(zip(probe.heads, probe.folds, strict=True)), probe.whole, on_batch, tiling)
    if result is not None:
        parts = result.parts + KernelSeconds(passes=fitted)
        result = replace(result, seconds_kernel=result.seconds_kernel + fitted, parts=parts)
    yield result


def _pass(
    plan: Plan,
    train: Encoded,
    heads: Sequence[tuple[HeadWeights, NDArray[np.int64]]],
    eval_head: HeadWeights,
    on_batch: OnBatch | None,
    tiling: Tiling | None,
) -> _Pass | None:
    """Features of the training rows under the head that each has, then the evaluation rows against them."""
    if tiling is not None:
        return _by_tiles(plan, Headed(train, heads), eval_head, on_batch, tiling)
    adapted, reduction = plan.adapted, plan.reduction
    modules = head_modules(plan.placed) if plan.settings.head != "random" else {}
    start = time.perf_counter()

    def parts() -> Iterator[tuple[Tensor, TangentFeatures]]:
        for number, batch in stream_groups(plan, train, [rows for _, rows in heads], on_batch=on_batch):
            with installed(modules, heads[number][0]):
                yield batch.rows, batch_features(adapted, batch, reduction)

    if plan.processes.world > 1:
        return _shared_pass(plan, parts(), eval_head, on_batch)
    features = join_features(parts(), len(train.features))
    seconds_passes = time.perf_counter() - start
    kernel = tangent_kernel(features)
    with_head = plan.settings.ntk_params == "adapter+head"
    k_train_train, head_train_train = kernel.matrices(with_head=with_head), kernel.head
    site_traces = np.array([np.trace(block.sum(1), axis1=-2, axis2=-1) for block in kernel.blocks])
    epsilon = kernel.epsilon
    del kernel  # M · D · N² numbers
    seconds_kernel = time.perf_counter() - start
    start = time.perf_counter()
    k_eval_train, head_eval_train, f_eval_0 = None, None, None
    if plan.evaluation is not None:
        with installed(modules, eval_head):
            cross, f_eval_0 = _cross(plan, features, plan.evaluation, on_batch)
        k_eval_train, head_eval_train = cross.matrices(with_head=with_head), cross.head
    return _Pass(
        k_train_train=k_train_train,
        k_eval_train=k_eval_train,
        head_train_train=head_train_train,
        head_eval_train=head_eval_train,
        site_traces=site_traces,
        epsilon=epsilon,
        f_train_0=_logits(features),
        f_eval_0=f_eval_0,
        seconds_kernel=seconds_kernel,
        seconds_evaluation=time.perf_counter() - start,
        parts=KernelSeconds(passes=seconds_passes, products=seconds_kernel - seconds_passes),
    )


def _shared_pass(plan: Plan, train: Parts, eval_head: HeadWeights, on_batch: OnBatch | None) -> _Pass | None:
    """The same in several processes; None in all but the first."""
    start = time.perf_counter()
    modules = head_modules(plan.placed) if plan.settings.head != "random" else {}

    def evaluated(encoded: Encoded) -> Parts:
        with installed(modules, eval_head):
            for batch in stream_batches(plan, encoded, on_batch=on_batch):
                yield batch.rows, batch_features(plan.adapted, batch, plan.reduction)

    evaluation = None if plan.evaluation is None else evaluated(plan.evaluation)
    joined = join_kernels(plan.processes, train, evaluation, plan.classifier.device)
    if joined is None:
        return None
    with_head, cross = plan.settings.ntk_params == "adapter+head", joined.evaluation
    seconds_kernel = time.perf_counter() - start
    return _Pass(
        k_train_train=joined.train.matrices(with_head=with_head),
        k_eval_train=None if cross is None else cross.matrices(with_head=with_head),
        head_train_train=joined.train.head,
        head_eval_train=None if cross is None else cross.head,
        site_traces=np.array([np.trace(block.sum(1), axis1=-2, axis2=-1) for block in joined.train.blocks]),
        epsilon=joined.train.epsilon,
        f_train_0=joined.f_train_0,
        f_eval_0=joined.f_eval_0,
        seconds_kernel=seconds_kernel,
        seconds_evaluation=0.0,
        parts=KernelSeconds(passes=joined.seconds_passes, products=seconds_kernel - joined.seconds_passes),
    )


def _by_tiles(plan: Plan, train: Headed, eval_head: HeadWeights, on_batch: OnBatch | None, tiling: Tiling) -> _Pass:
    evaluation = None
    if plan.evaluation is not None:
        evaluation = Headed(plan.evaluation, [(eval_head, np.arange(len(plan.evaluation.features)))])
    found = tiled_pass(plan, train, evaluation, tiling, on_batch)
    with_head = plan.settings.ntk_params == "adapter+head"
    for kernel in (found.train, found.cross):
        if with_head and kernel is not None and kernel.head is not None:
            for matrix in kernel.matrices:
                matrix += kernel.head
            let_go(kernel.matrices)
    cross = found.cross
    return _Pass(
        k_train_train=found.train.matrices,
        k_eval_train=None if cross is None else cross.matrices,
        head_train_train=found.train.head,
        head_eval_train=None if cross is None else cross.head,
        site_traces=found.train.site_traces,
        epsilon=found.train.epsilon,
        f_train_0=found.train.logits,
        f_eval_0=None if cross is None else cross.logits,
        seconds_kernel=found.seconds_kernel,
        seconds_evaluation=found.seconds_evaluation,
        parts=found.parts,
        sketch_error=found.sketch_error,
    )


def _cross(
    plan: Plan, features: TangentFeatures, evaluation: Encoded, on_batch: OnBatch | None
) -> tuple[TangentKernel, Array]:
    """Kernel of the evaluation rows with the samples; no feature of theirs outlives its batch."""
    kernels, logits, rows = [], [], []
    for batch in stream_batches(plan, evaluation, on_batch=on_batch):
        part = batch_features(plan.adapted, batch, plan.reduction)
        kernels.append(tangent_kernel(part, features))
        logits.append(_logits(part))
        rows.append(batch.rows.numpy())
    order = np.argsort(np.concatenate(rows))
    return concatenate_rows(kernels, rows), np.concatenate(logits)[order]


def _logits(features: TangentFeatures) -> Array:
    return np.asarray(features.logits.double().cpu().numpy())
