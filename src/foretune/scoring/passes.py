"""The passes of a score: kernels and initial outputs of one draw of samples, under the head policy."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from foretune.models.adapted import Batch
from foretune.models.classifier import Encoded, batches
from foretune.models.head import HeadWeights, installed, random_heads
from foretune.models.placement import head_modules
from foretune.ntk.features import TangentFeatures, join_features
from foretune.ntk.jacobian import batch_features
from foretune.ntk.kernel import TangentKernel, concatenate_rows, tangent_kernel
from foretune.ntk.probe import head_inputs, probe_folds, probe_weights
from foretune.problem import Plan
from foretune.tasks.objective import Targets

Array = NDArray[np.float64]
Progress = Callable[[int], None]


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


@dataclass(frozen=True)
class _Pass:
    """Kernels under one head (or, cross-fitted, one head for each fold)."""

    train: TangentKernel
    evaluation: TangentKernel | None
    f_train_0: Array
    f_eval_0: Array | None
    seconds_kernel: float
    seconds_evaluation: float


def measure(plan: Plan, *, repeat: int = 0, on_batch: Progress | None = None) -> Measurement:
    """Run the passes of one draw of samples.

    Args:
        plan: What to do.
        repeat: Which draw of the samples.
        on_batch: Called with the number of examples after each batch.

    Returns:
        Kernels and initial outputs.
    """
    settings, task = plan.settings, plan.task
    rows, train = plan.redraw(repeat)
    y_train = task.train.labels[rows.train_indices]
    passes = list(_passes(plan, train, y_train, on_batch))
    with_head = settings.ntk_params == "adapter+head"
    first = passes[0]
    evaluations = [p.evaluation for p in passes if p.evaluation is not None]
    evaluated = plan.evaluation is not None
    return Measurement(
        k_train_train=np.mean([p.train.matrices(with_head=with_head) for p in passes], axis=0),
        k_eval_train=_mean([e.matrices(with_head=with_head) for e in evaluations]),
        head_train_train=_mean([p.train.head for p in passes]),
        head_eval_train=_mean([e.head for e in evaluations]),
        f_train_0=np.mean([p.f_train_0 for p in passes], axis=0),
        f_eval_0=_mean([p.f_eval_0 for p in passes]),
        y_train=y_train,
        y_eval=plan.evaluation_split.labels[rows.eval_indices] if evaluated else None,
        train_indices=rows.train_indices,
        eval_indices=rows.eval_indices if evaluated else None,
        site_traces=tuple(
            float(np.mean([np.trace(p.train.blocks[m].sum(1), axis1=-2, axis2=-1) for p in passes]))
            for m in range(len(first.train.sites))
        ),
        head_traces=tuple(float(np.trace(p.train.matrices(with_head=with_head)[0])) for p in passes),
        epsilon=first.train.epsilon,
        seconds_kernel=sum(p.seconds_kernel for p in passes),
        seconds_evaluation=sum(p.seconds_evaluation for p in passes),
    )


def _mean(arrays: Sequence[Array | None]) -> Array | None:
    held = [array for array in arrays if array is not None]
    return np.asarray(np.mean(held, axis=0)) if held else None


def _passes(plan: Plan, train: Encoded, y_train: Targets, on_batch: Progress | None) -> Iterator[_Pass]:
    """One pass for each head of the policy."""
    settings = plan.settings
    every_row = np.arange(len(y_train))
    if settings.head == "random":
        as_it_is = HeadWeights({})
        yield _pass(plan, train, [(as_it_is, every_row)], as_it_is, on_batch)
        return
    modules = head_modules(plan.placed)
    if settings.head == "average":
        base = plan.placed.get_base_model()
        for head in random_heads(base, modules, count=settings.heads, seed=settings.seed):
            yield _pass(plan, train, [(head, every_row)], head, on_batch)
        return
    objective = plan.task.objective
    name, layer = list(modules.items())[-1]
    start = time.perf_counter()
    inputs = head_inputs(
        plan.adapted,
        {name: layer},
        _tracked(plan, train, None, on_batch),
        n=len(y_train),
        n_outputs=objective.n_outputs,
    )
    folds = probe_folds(len(y_train), seed=settings.seed)
    nobody = np.array([], dtype=np.int64)
    *heads, last = probe_weights(name, layer, inputs, objective, y_train, left_out=[*folds, nobody])
    fitted = time.perf_counter() - start
    result = _pass(plan, train, list(zip(heads, folds, strict=True)), last, on_batch)
    yield replace(result, seconds_kernel=result.seconds_kernel + fitted)


def _tracked(plan: Plan, encoded: Encoded, rows: Sequence[int] | None, on_batch: Progress | None) -> Iterator[Batch]:
    for batch in batches(encoded, plan.classifier, batch_size=plan.settings.batch_size, rows=rows):
        yield batch
        if on_batch is not None:
            on_batch(len(batch.rows))


def _pass(
    plan: Plan,
    train: Encoded,
    heads: Sequence[tuple[HeadWeights, NDArray[np.int64]]],
    eval_head: HeadWeights,
    on_batch: Progress | None,
) -> _Pass:
    """Features of the training rows under the head that each has, then the evaluation rows against them."""
    adapted, reduction = plan.adapted, plan.reduction
    modules = head_modules(plan.placed) if plan.settings.head != "random" else {}
    start = time.perf_counter()

    def parts() -> Iterator[tuple[Tensor, TangentFeatures]]:
        for head, held in heads:
            with installed(modules, head):
                for batch in _tracked(plan, train, held.tolist(), on_batch):
                    yield batch.rows, batch_features(adapted, batch, reduction)

    features = join_features(parts(), len(train.features))
    kernel = tangent_kernel(features)
    seconds_kernel = time.perf_counter() - start
    start = time.perf_counter()
    evaluation, f_eval_0 = None, None
    if plan.evaluation is not None:
        with installed(modules, eval_head):
            evaluation, f_eval_0 = _cross(plan, features, plan.evaluation, on_batch)
    return _Pass(kernel, evaluation, _logits(features), f_eval_0, seconds_kernel, time.perf_counter() - start)


def _cross(
    plan: Plan, features: TangentFeatures, evaluation: Encoded, on_batch: Progress | None
) -> tuple[TangentKernel, Array]:
    """Kernel of the evaluation rows with the samples; no feature of theirs outlives its batch."""
    kernels, logits, rows = [], [], []
    for batch in _tracked(plan, evaluation, None, on_batch):
        part = batch_features(plan.adapted, batch, plan.reduction)
        kernels.append(tangent_kernel(part, features))
        logits.append(_logits(part))
        rows.append(batch.rows.numpy())
    order = np.argsort(np.concatenate(rows))
    return concatenate_rows(kernels, rows), np.concatenate(logits)[order]


def _logits(features: TangentFeatures) -> Array:
    return np.asarray(features.logits.double().cpu().numpy())
