"""Tangent features of sequences, and the kernels of a language model's adapter.

A sequence i has the loss z⁰_i, a sum over its T_i targets, and the losses z^s_i of labels that the model draws
(`foretune.ntk.sequence_losses`). Of an adapted module y_t = W h_t + s·B A h_t, with g_t = ∂z/∂y_t,

    ∂z/∂B = s Σ_t g_t (A h_t)ᵀ        ∂z/∂A = s Σ_t (Bᵀ g_t) h_tᵀ

are d_out × r and r × d_in numbers, whatever the length of the sequence. Where B = 0, only the first is kept, for all
draws of A from one pass. Gradients without such a formula come from
`foretune.ntk.sequence_groups`. The kernels, with ⟨·, ·⟩ over all that trains:

| name       | rows  | kernel                                                 |
|------------|-------|--------------------------------------------------------|
| `loss`     | n     | ⟨∇z⁰_i / T_i, ∇z⁰_j / T_j⟩                             |
| `loss-sum` | n     | ⟨∇z⁰_i, ∇z⁰_j⟩                                         |
| `fisher`   | n · S | ⟨∇z^s_i / √(T_i S), ∇z^u_j / √(T_j S)⟩, row i·S + s    |
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from foretune.arrays import Array
from foretune.errors import ConfigError, KernelError, shown
from foretune.models.adapted import AdaptedModel
from foretune.models.packed import computing_dtype
from foretune.ntk.features import TangentFeatures, join_features
from foretune.ntk.jacobian import ReduceBlocks
from foretune.ntk.kernel import tangent_kernel
from foretune.ntk.premises import check_eval_mode, check_finite
from foretune.ntk.sequence_groups import Numbers, Pass, group_passes
from foretune.ntk.sequence_losses import SequenceBatch
from foretune.ntk.sequence_pass import pass_sequences
from foretune.tasks.outputs import OutputReduction

SequenceKernelName = Literal["loss", "loss-sum", "fisher"]
NORMALISATION = {
    "loss": "K[i, j] = <grad z_i / T_i, grad z_j / T_j>, z_i the loss of a sequence summed over its T_i targets",
    "loss-sum": "K[i, j] = <grad z_i, grad z_j>, z_i the loss of a sequence summed over its T_i targets",
    "fisher": "K[iS+s, jS+u] = <grad z_is / sqrt(T_i S), grad z_ju / sqrt(T_j S)>, z_is the loss of labels that the "
    "model draws; its eigenvalues over n estimate those of the Fisher matrix a token, mean over the n sequences",
}


@dataclass(frozen=True)
class SequenceFeatures:
    """Gradients of n sequences with respect to the adapter, in the model's dtype.

    Attributes:
        tangent: For each site the gradients of k numbers: the loss, if it is there, then S losses of drawn labels.
            Its `logits` are the n × 1 losses z⁰ in the model's dtype.
        with_loss: Whether the loss is the first of them.
        targets: Targets T_i of each sequence.
        losses: Loss z⁰_i of each sequence before training in nats, summed over its targets, float64.
    """

    tangent: TangentFeatures
    with_loss: bool
    targets: Float64[Tensor, " n"]
    losses: Float64[Tensor, " n"]

    @property
    def n(self) -> int:
        """Number of sequences."""
        return self.tangent.n

    @property
    def label_draws(self) -> int:
        """Draws S of the labels."""
        return self.tangent.reduction.n_outputs - int(self.with_loss)


@dataclass(frozen=True)
class SequenceKernel:
    """A tangent kernel of sequences.

    Attributes:
        name: Which one.
        matrices: D × N × N, one for each draw of A; N = n, or n·S for `fisher`, sequence-major.
        site_traces: M × D traces of the sites' parts, which add up to those of the matrices.
        rows_per_sequence: N / n.
        epsilon: Machine epsilon of the features.
    """

    name: SequenceKernelName
    matrices: Float64[Array, "draws rows rows"]
    site_traces: Float64[Array, "sites draws"]
    rows_per_sequence: int
    epsilon: float


def check_kernel_name(name: str | None) -> SequenceKernelName:
    """Read the name of a kernel.

    Args:
        name: `loss`, `loss-sum` or `fisher`; None takes `loss`.

    Returns:
        The name.

    Raises:
        ConfigError: If it is none of them.

    Example:
        >>> check_kernel_name(None)
        'loss'
    """
    for known in get_args(SequenceKernelName):
        if (name or "loss") == known:
            found: SequenceKernelName = known
            return found
    raise ConfigError(f"reduction = {shown(name)}: a language model has loss, loss-sum or fisher")


def _outputs(name: str, count: int, *, block: bool = False) -> OutputReduction:
    """Numbers that are differentiated as they are."""
    eye = np.eye(count)
    return OutputReduction(name, eye, eye, eye, np.zeros(count), np.arange(count), block=block, scale=1.0)


def sequence_features(
    adapted: AdaptedModel,
    batches: Iterable[SequenceBatch],
    *,
    n: int,
    draws: int = 0,
    seed: int = 0,
    with_loss: bool = True,
) -> SequenceFeatures:
    """Take the gradients of a sample: one forward pass, and one backward pass for the loss and for each draw.

    Batch size, padding and order change nothing beyond rounding.

    Args:
        adapted: Model in eval mode with its adapters.
        batches: Batches that together hold every row 0 … n−1 once, in any order.
        n: Sequences in all.
        draws: Draws S of the labels.
        seed: Of the draws.
        with_loss: Whether the loss z⁰ is differentiated; its value is there in any case.

    Returns:
        Features with the sequences in the order of their rows.

    Raises:
        KernelError: If nothing is differentiated, the model is not in eval mode, a module does not see sequences or is
            not reached by the loss, something is not finite, or the rows are not 0 … n−1.
    """
    return join_sequence_parts(sequence_parts(adapted, batches, draws=draws, seed=seed, with_loss=with_loss), n=n)


@dataclass(frozen=True)
class SequencePart:
    """Features of a batch.

    Attributes:
        rows: Positions of its sequences in the sample.
        features: Their features.
    """

    rows: Tensor
    features: SequenceFeatures


def sequence_parts(
    adapted: AdaptedModel, batches: Iterable[SequenceBatch], *, draws: int = 0, seed: int = 0, with_loss: bool = True
) -> Iterator[SequencePart]:
    """Take the gradients of some of a sample's batches; `join_sequence_parts` joins those of all of them.

    Args:
        adapted: Model in eval mode with its adapters.
        batches: Batches.
        draws: Draws S of the labels.
        seed: Of the draws.
        with_loss: Whether the loss z⁰ is differentiated.

    Yields:
        The features of each batch.

    Raises:
        KernelError: As `sequence_features`, but for the rows.
    """
    count = draws + int(with_loss)
    if count < 1:
        raise KernelError("neither the loss nor a draw of labels is differentiated: ask for one")
    check_eval_mode(adapted.model)
    adapted = replace(adapted, head={})  # nothing but the adapter trains in a language model
    numbers = Numbers(_outputs("sequences", count), draws, seed, with_loss)
    take = group_passes if adapted.groups else _passes
    dtype = computing_dtype(adapted.model)
    for part in chain.from_iterable(take(adapted, batch, numbers) for batch in batches):
        size = len(part.batch.rows)
        losses = part.losses.of_each(size)
        logits = losses[:, None].to(device=part.batch.labels.device, dtype=dtype)
        targets = torch.bincount(part.losses.place.cpu(), minlength=size).double()
        yield SequencePart(part.batch.rows, SequenceFeatures(part.features(logits), with_loss, targets, losses))


def _passes(adapted: AdaptedModel, batch: SequenceBatch, numbers: Numbers) -> Iterator[Pass]:
    """The pass over a batch of a model with closed forms."""
    sink = ReduceBlocks(adapted, len(batch.rows), numbers.reduction)
    losses = pass_sequences(adapted, batch, numbers.draws, sink.use, seed=numbers.seed, with_loss=numbers.with_loss)
    for name, tensor in sink.finish():
        check_finite(f"the gradients of module {name!r}", tensor)
    yield Pass(batch, sink.features, losses)


def join_sequence_parts(parts: Iterable[SequencePart], *, n: int) -> SequenceFeatures:
    """Join the features of all batches of a sample.

    Args:
        parts: From `sequence_parts`, in any order; may be lazy.
        n: Sequences in all.

    Returns:
        Features with the sequences in the order of their rows.

    Raises:
        KernelError: If the rows are not 0 … n−1.
    """
    targets, losses = (torch.zeros(n, dtype=torch.float64) for _ in range(2))
    with_loss = True

    def joined() -> Iterator[tuple[Tensor, TangentFeatures]]:
        nonlocal with_loss
        for part in parts:
            rows, with_loss = part.rows.cpu(), part.features.with_loss
            if bool((rows >= 0).all()) and bool((rows < n).all()):  # else `join_features` refuses them
                targets[rows], losses[rows] = part.features.targets, part.features.losses
            yield part.rows, part.features.tangent

    tangent = join_features(joined(), n)
    return SequenceFeatures(tangent, with_loss, targets, losses)


def _weights(features: SequenceFeatures, name: SequenceKernelName) -> Float64[Array, " rows"]:
    """Factor of each row of a kernel."""
    if name == "loss-sum":
        return np.ones(features.n)
    empty = (features.targets == 0).nonzero()
    if len(empty):
        raise KernelError(f"sequence {int(empty[0])} has no target, and a mean over targets none: leave it out")
    targets = features.targets.numpy()
    if name == "loss":
        return np.asarray(1.0 / targets)
    return np.repeat(1.0 / np.sqrt(targets * features.label_draws), features.label_draws)


def sequence_kernel(features: SequenceFeatures, name: SequenceKernelName = "loss") -> SequenceKernel:
    """Multiply features out to a kernel, site after site, in float64.

    Args:
        features: Of n sequences.
        name: `loss`, `loss-sum` or `fisher`; the table above has the formulas.

    Returns:
        The kernel for each draw of A. The non-zero eigenvalues of `fisher` are those of

            Σ_i 1/(T_i S) Σ_s ∇z^s_i ∇z^s_iᵀ,   in the mean over draws   Σ_i (1/T_i) Σ_t J_tᵀ (diag p_t − p_t p_tᵀ) J_t

        which is n times the Gauss–Newton matrix of the adapter per token, mean over the sequences: divide the
        eigenvalues by n for those of the mean.

    Raises:
        KernelError: If the features lack what it is made of, or a sequence has no target.
    """
    first = int(features.with_loss)
    if name == "fisher":
        outputs, reduction = slice(first, None), _outputs(name, features.label_draws, block=True)
        if not features.label_draws:
            raise KernelError("the kernel 'fisher' is made of drawn labels, and none were drawn: draw some")
    else:
        outputs, reduction = slice(0, 1), _outputs(name, 1)
        if not features.with_loss:
            raise KernelError(f"the kernel {name!r} is made of the loss, which was not differentiated: ask for it")
    weights, tangent = _weights(features, name), features.tangent
    total: Array | None = None
    traces, epsilon = [], 0.0
    for site, b, a, v in zip(tangent.sites, tangent.b, tangent.a, tangent.v, strict=True):
        one = replace(
            tangent,
            sites=(site,),
            reduction=reduction,
            b=(b[outputs],),
            a=(None if a is None else a[outputs],),
            v=(None if v is None else v[outputs],),
        )
        kernel = tangent_kernel(one)
        part = kernel.matrices() * weights[:, None] * weights
        traces.append(np.trace(part, axis1=1, axis2=2))
        total = part if total is None else total + part
        epsilon = kernel.epsilon
    if total is None:
        raise KernelError("the model carries no adapter: place one")
    return SequenceKernel(name, total, np.array(traces), reduction.rows_per_example, epsilon)


def feature_bytes(adapted: AdaptedModel, *, n: int, outputs: int, draws: int, element_size: int) -> dict[str, int]:
    """Count the bytes that features and kernels take.

    Args:
        adapted: The model.
        n: Sequences.
        outputs: Numbers k that are differentiated.
        draws: Draws D of A.
        element_size: Bytes of a number of the features.

    Returns:
        `features`: n·k·Σ_m (D·r·d_out [+ r·d_in where B ≠ 0] + w) numbers, w beside A and B. `kernels`: the largest
        site's in float64, with the (n·k)² kernels of D draws, of the site, weighted and in all.
    """
    widths = [adapter.width(draws) for adapter in adapted.adapters] + [group.site.others for group in adapted.groups]
    return {
        "features": n * outputs * sum(widths) * element_size,
        "kernels": 8 * (n * outputs * max(widths, default=0) + 4 * draws * (n * outputs) ** 2),
    }
