"""The kernels of a pass that several processes share: features stay where they were made, and each makes its blocks.

The features of one process after the other go to all of them. Each multiplies them with its own: of two processes one
makes the block of the training samples that both have a part in, and each the rows of its own evaluation examples. The
first process puts the blocks together.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int
from numpy.typing import NDArray
from torch import Tensor

from foretune.arrays import Array
from foretune.ntk.features import TangentFeatures, join_features
from foretune.ntk.kernel import TangentKernel, tangent_kernel
from foretune.ntk.premises import sample_order
from foretune.processes.group import Processes

Parts = Iterable[tuple[Int[Tensor, " m"], TangentFeatures]]  # positions in the sample, and features, of each batch


@dataclass(frozen=True)
class JoinedKernels:
    """Kernels of a pass.

    Attributes:
        train: Block kernel of the n training samples.
        evaluation: Block kernel of the m evaluation rows with them, or None.
        f_train_0: n × C initial outputs.
        f_eval_0: m × C initial outputs, or None.
        seconds_passes: This process's own passes; all else is products, and waiting for others.
    """

    train: TangentKernel
    evaluation: TangentKernel | None
    f_train_0: Float64[Array, "n classes"]
    f_eval_0: Float64[Array, "m classes"] | None
    seconds_passes: float


@dataclass(frozen=True)
class _Own:
    """Features of a process's examples, and their positions in the sample."""

    rows: Tensor
    features: TangentFeatures | None  # None of no example

    @property
    def logits(self) -> Tensor | None:
        return None if self.features is None else self.features.logits.double().cpu()


@dataclass(frozen=True)
class _Block:
    """Kernel of the examples of one process, or of its evaluation rows, with those of another."""

    left: int
    right: int
    blocks: Tensor
    head: Tensor | None

    def mirrored(self) -> "_Block":
        return _Block(self.right, self.left, self.blocks.mT, None if self.head is None else self.head.mT)


@dataclass(frozen=True)
class _Made:
    """What a process brings to the first one."""

    rows: Tensor
    logits: Tensor | None
    blocks: list[_Block]
    eval_rows: Tensor
    eval_logits: Tensor | None
    cross: list[_Block]


def join_kernels(
    processes: Processes, train: Parts, evaluation: Parts | None, device: torch.device
) -> JoinedKernels | None:
    """Make the kernels of a pass together.

    Args:
        processes: Who shares the pass.
        train: This process's training samples.
        evaluation: Its evaluation rows; None without any. Taken after the training samples.
        device: Where features are multiplied.

    Returns:
        In the first process K_m[i, j] = scale · Σ_c <∇_{θ_m} f_c(x_i), ∇_{θ_m} f_c(x'_j)>, within rounding as
        `foretune.ntk.kernel.tangent_kernel` gives it; None in the others.

    Raises:
        KernelError: If the positions of all processes are not 0 … n-1.
    """
    start = time.perf_counter()
    own = _joined(train)
    to_predict = _joined(() if evaluation is None else evaluation)
    seconds_passes = time.perf_counter() - start
    blocks: list[_Block] = []
    cross: list[_Block] = []
    like: TangentKernel | None = None
    for other in range(processes.world):
        theirs = processes.spread(own, device, source=other).features
        for left, made in ((own.features, blocks), (to_predict.features, cross)):
            if left is None or theirs is None or (made is blocks and not _mine(processes, other)):
                continue
            like = tangent_kernel(left, None if left is own.features and other == processes.rank else theirs)
            head = None if like.head is None else torch.from_numpy(like.head)
            made.append(_Block(processes.rank, other, torch.from_numpy(like.blocks), head))
    mine = _Made(own.rows, own.logits, blocks, to_predict.rows, to_predict.logits, cross)
    of_all = processes.collect(mine)
    if not processes.is_main:
        return None
    rows = [one.rows.numpy() for one in of_all]
    eval_rows = [one.eval_rows.numpy() for one in of_all]
    assert like is not None  # the first process has the first batch
    k = like.reduction.rows_per_example
    made_by_all = [block for one in of_all for block in one.blocks]
    mirrored = [block.mirrored() for block in made_by_all if block.left != block.right]
    of_train = _assembled(like, [*made_by_all, *mirrored], rows, rows, k)
    of_evaluation = None
    if evaluation is not None:
        of_evaluation = _assembled(like, [block for one in of_all for block in one.cross], eval_rows, rows, k)
    return JoinedKernels(
        of_train,
        of_evaluation,
        _in_order([one.logits for one in of_all], rows),
        None if evaluation is None else _in_order([one.eval_logits for one in of_all], eval_rows),
        seconds_passes,
    )


def _joined(parts: Parts) -> _Own:
    held = list(parts)
    if not held:
        return _Own(torch.empty(0, dtype=torch.long), None)
    rows = torch.cat([rows.cpu() for rows, _ in held])
    places = torch.arange(len(rows)).split([len(of_batch) for of_batch, _ in held])
    features = join_features(zip(places, (held.pop(0)[1] for _ in places), strict=True), len(rows))
    return _Own(rows, features)


def _mine(processes: Processes, other: int) -> bool:
    """Whether the block with another process is this one's to make: of two in a ring the one before makes it."""
    ahead = (other - processes.rank) % processes.world
    return 2 * ahead < processes.world or (2 * ahead == processes.world and processes.rank < other)


def _assembled(
    like: TangentKernel,
    blocks: Sequence[_Block],
    rows: Sequence[NDArray[np.int64]],
    columns: Sequence[NDArray[np.int64]],
    k: int,
) -> TangentKernel:
    """Put blocks where their examples stand."""
    shape = (sum(map(len, rows)) * k, sum(map(len, columns)) * k)
    joined = np.empty((*like.blocks.shape[:3], *shape))
    head = None if like.head is None else np.empty(shape)
    for block in blocks:
        place = np.ix_(_expanded(rows[block.left], k), _expanded(columns[block.right], k))
        joined[:, :, :, place[0], place[1]] = block.blocks.numpy()
        if head is not None and block.head is not None:
            head[place] = block.head.numpy()
    return TangentKernel(like.sites, like.ranks, joined, head, like.reduction, like.epsilon)


def _expanded(rows: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    expanded: NDArray[np.int64] = (rows[:, None] * k + np.arange(k)).ravel()
    return expanded


def _in_order(parts: Sequence[Tensor | None], rows: Sequence[NDArray[np.int64]]) -> Array:
    places = torch.from_numpy(np.concatenate(rows))
    order = sample_order(places, len(places)).numpy()
    return np.asarray(torch.cat([part for part in parts if part is not None]).numpy()[order])
