"""Tangent kernels from tangent features: one block for each site, draw of A and step of rank.

Gram products are accumulated in float64 whatever the dtype of the features. Blocks add: the kernel of a
placement is the sum of the blocks of its sites.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor

from foretune.arrays import Array
from foretune.errors import KernelError
from foretune.models.sites import Site
from foretune.ntk.features import HeadFactor, TangentFeatures, in_one_form
from foretune.tasks.outputs import OutputReduction

ENTRIES = 2_000_000  # numbers that are laid out at once in float64, 16 MB, unless one site alone has more


@dataclass(frozen=True)
class TangentKernel:
    """Block kernel of every site between two samples of m and n examples.

    Rows and columns are examples, or example-major (example, output) pairs for the `full` reduction.

    Attributes:
        sites: Adapted modules, M.
        ranks: Increasing ranks P that can be read off; the last is the adapter's own.
        blocks: M × D × P × m × n float64: site, draw of A, and the part of the kernel that the rows of A
            between one rank and the next add. D = 1 where draws were averaged.
        head: m × n kernel of the trained head modules, or None.
        reduction: Scalar outputs that were differentiated.
        epsilon: Machine epsilon of the features' dtype.
    """

    sites: tuple[Site, ...]
    ranks: tuple[int, ...]
    blocks: Float64[Array, "sites draws ranks m n"]
    head: Float64[Array, "m n"] | None
    reduction: OutputReduction
    epsilon: float

    @property
    def draws(self) -> int:
        """Draws of A that are kept apart."""
        return int(self.blocks.shape[1])

    def matrices(
        self, sites: Sequence[int] | None = None, *, rank: int | None = None, with_head: bool = False
    ) -> Float64[Array, "draws m n"]:
        """Sum the blocks of a placement: K_S = Σ_{m∈S} K_m, for every draw of A.

        Args:
            sites: Positions of the sites in the placement; None takes all.
            rank: One of `ranks`; None takes the adapter's own. A smaller rank r' keeps the first r' rows
                of each A and rescales by (r/r')^rank_exponent.
            with_head: Whether to add the kernel of the trained head.

        Returns:
            D × m × n kernels, float64. The mean over draws estimates the expected kernel over A.

        Raises:
            KernelError: If the rank was not kept, or the head is asked for and was not computed.
        """
        rank = self.ranks[-1] if rank is None else rank
        if rank not in self.ranks:
            raise KernelError(f"rank {rank} was not kept, only {list(self.ranks)}: compute the kernel with it")
        steps = self.ranks.index(rank) + 1
        total = np.zeros((self.draws, *self.blocks.shape[3:]))
        for index in range(len(self.sites)) if sites is None else sites:
            site = self.sites[index]
            factor = (site.rank / rank) ** site.rank_exponent if steps < len(self.ranks) else 1.0
            total += factor * self.blocks[index, :, :steps].sum(axis=1)
        if with_head:
            if self.head is None:
                raise KernelError("the head's kernel was not computed: train the head (modules_to_save)")
            total += self.head
        return total


def _rows(feature: Float[Tensor, "k n ..."], reduction: OutputReduction) -> Float64[Tensor, "rows width"]:
    """Lay k × n × … × width features out as float64 rows of the kernel, in one copy."""
    by_example = feature.transpose(0, 1)  # n × k × …
    rows = torch.empty(by_example.shape, dtype=torch.float64, device=feature.device).copy_(by_example)
    return rows.flatten(0, 1).flatten(1) if reduction.block else rows.flatten(1)


def _gram(
    left: Float[Tensor, "k m ..."], right: Float[Tensor, "k n ..."], reduction: OutputReduction
) -> Float64[Tensor, "rows columns"]:
    return _rows(left, reduction) @ _rows(right, reduction).T


def _check_same(left: TangentFeatures, right: TangentFeatures, ranks: tuple[int, ...]) -> None:
    same = left.sites == right.sites and left.draws == right.draws and left.reduction.name == right.reduction.name
    if not same or len(left.head) != len(right.head):
        raise KernelError("the two samples' features differ in sites, draws of A, head or output reduction")
    smallest = min((site.rank for site in left.sites), default=0)
    if len(ranks) > 1 and not 1 <= min(ranks) <= ranks[-2] <= smallest:
        raise KernelError(f"ranks {list(ranks)} must lie between 1 and the smallest rank of a site, {smallest}")
    if len(ranks) > 1 and any(a is not None for a in left.a):
        raise KernelError("smaller ranks can be read off only where B = 0: here every rank needs its own pass")
    if len(ranks) > 1 and any(v is not None for v in left.v):
        raise KernelError("smaller ranks can be read off plain LoRA alone: here every rank needs its own pass")


def tangent_kernel(
    left: TangentFeatures,
    right: TangentFeatures | None = None,
    *,
    ranks: Sequence[int] = (),
    average: bool = False,
) -> TangentKernel:
    """Multiply features out to the block kernel K_m[i, j] = scale · Σ_c <∇_{θ_m} f_c(x_i), ∇_{θ_m} f_c(x'_j)>.

    Cost: O(m · n · D · r · d_out) float64 operations for each site and output (squared for `full`).

    Args:
        left: Features of the m examples of the rows.
        right: Features of the n examples of the columns; None takes `left` (exactly symmetric result).
        ranks: Smaller ranks to keep beside the adapter's own.
        average: Whether to keep the mean over draws of A only; memory is then that of one draw.

    Returns:
        Block kernel in float64 on the CPU.

    Raises:
        KernelError: If the features do not belong together, or a rank cannot be read off.
    """
    reduction = left.reduction
    own = max((site.rank for site in left.sites), default=0)
    kept = (*sorted({int(rank) for rank in ranks if rank != own}), own)
    other = left if right is None else right
    _check_same(left, other, kept)
    draws = [range(left.draws)] if average else [range(draw, draw + 1) for draw in range(left.draws)]
    k = reduction.rows_per_example
    blocks = np.empty((len(left.sites), len(draws), len(kept), left.n * k, other.n * k))
    groups = list(_alike(left, other))
    spaces = (_space(left, groups), _space(other, groups) if right is not None else None)
    for alike in groups:
        start = 0
        for step, rank in enumerate((*kept[:-1], left.sites[alike[0]].rank)):
            grams = _blocks(left, other, alike, draws, range(start, rank), spaces)
            if right is None:
                grams = (grams + grams.mT) / 2
            blocks[alike, :, step] = grams.cpu().numpy()
            start = rank
    head = _head_kernel(left, other)
    if right is None and head is not None:
        head = (head + head.T) / 2
    epsilon = float(torch.finfo(left.logits.dtype).eps)
    return TangentKernel(left.sites, kept, blocks, head, reduction, epsilon)


def summed_kernel(
    left: TangentFeatures, right: TangentFeatures | None = None
) -> tuple[Float64[Array, "draws m n"], Float64[Array, "m n"] | None]:
    """Multiply features out to the kernel of all sites, without keeping the block of any.

    Equal to `tangent_kernel(left, right).matrices()` and its `head` up to the order of the sums.

    Args:
        left: Features of the m examples of the rows.
        right: Features of the n examples of the columns; None takes `left` (exactly symmetric result).

    Returns:
        D × m × n kernels, one for each draw of A, and the m × n kernel of the trained head or None. Float64.

    Raises:
        KernelError: If the features do not belong together.
    """
    other = left if right is None else right
    _check_same(left, other, ())
    k, draws = left.reduction.rows_per_example, [range(draw, draw + 1) for draw in range(left.draws)]
    shape = (left.draws, left.n * k, other.n * k)
    total = torch.zeros(shape, dtype=torch.float64, device=left.logits.device)
    at_once = max(1, ENTRIES // total.numel())
    groups = list(_alike(left, other))
    spaces = (_space(left, groups), _space(other, groups) if right is not None else None)
    for alike in groups:
        for start in range(0, len(alike), at_once):
            few = alike[start : start + at_once]
            total += _blocks(left, other, few, draws, range(left.sites[few[0]].rank), spaces).sum(0)
    head = _head_kernel(left, other)
    if right is None:
        total = (total + total.mT) / 2
        head = None if head is None else (head + head.T) / 2
    return total.cpu().numpy(), head


def _alike(left: TangentFeatures, right: TangentFeatures) -> Iterator[list[int]]:
    """Sites of one shape, as many as are multiplied at once: hundreds of small products would each wait for threads."""
    shapes: dict[tuple[object, ...], list[int]] = {}
    for index, site in enumerate(left.sites):
        shapes.setdefault((site.rank, left.b[index].shape, right.b[index].shape), []).append(index)
    for sites in shapes.values():
        entries = left.b[sites[0]].numel() + (0 if right is left else right.b[sites[0]].numel())
        count = max(1, ENTRIES // max(1, entries))
        yield from (sites[start : start + count] for start in range(0, len(sites), count))


def _space(features: TangentFeatures, groups: Sequence[list[int]]) -> Float64[Tensor, " entries"]:
    """Memory for the largest group's numbers, used for all: new memory costs more to get than the numbers to copy."""
    entries = max((len(group) * features.b[group[0]].numel() for group in groups), default=0)
    return torch.empty(entries, dtype=torch.float64, device=features.logits.device)


def _blocks(
    left: TangentFeatures,
    right: TangentFeatures,
    sites: list[int],
    draws: Sequence[range],
    rows: range,
    spaces: tuple[Tensor, Tensor | None],
) -> Float64[Tensor, "sites draws m n"]:
    """Kernels of some rows of A of sites of one shape, the mean over each of some draws."""
    reduction = left.reduction
    one = _stacked(left, sites, draws, rows, spaces[0])
    other = one if spaces[1] is None else _stacked(right, sites, draws, rows, spaces[1])
    grams: Tensor = (one @ other.mT).unflatten(0, (len(sites), len(draws))) / len(draws[0])
    for gram, index in zip(grams, sites, strict=True):
        for of_left, of_right in ((left.a[index], right.a[index]), (left.v[index], right.v[index])):
            if of_left is not None and of_right is not None:
                gram += _gram(of_left, of_right, reduction).to(gram.device)  # layers may lie on several devices
    return reduction.scale * grams


def _stacked(
    features: TangentFeatures, sites: list[int], draws: Sequence[range], rows: range, space: Tensor
) -> Float64[Tensor, "matrices rows width"]:
    """Rows of the kernel of every site and set of draws, as `_rows` lays them out, in one copy into a space."""
    first = features.b[sites[0]]
    k, n, _, width = first.shape
    shape = (len(sites), len(draws), n, k, len(draws[0]), len(rows), width)
    stacked = space[: math.prod(shape)].view(shape)
    for place, index in enumerate(sites):
        of_draws = features.b[index].unflatten(2, (features.draws, features.sites[index].rank))
        kept = of_draws[:, :, :, rows.start : rows.stop]
        stacked[place] = kept.unflatten(2, (len(draws), len(draws[0]))).permute(2, 1, 0, 3, 4, 5)
    by_matrix: Tensor = stacked.flatten(0, 1)
    return by_matrix.flatten(1, 2).flatten(2) if features.reduction.block else by_matrix.flatten(2)


def _head_kernel(left: TangentFeatures, right: TangentFeatures) -> Array | None:
    if not left.head:
        return None
    one, other = in_one_form(left, right)
    grams = [_head_gram(*factors, left.reduction) for factors in zip(one.head, other.head, strict=True)]
    return np.asarray(left.reduction.scale * torch.stack([gram.cpu() for gram in grams]).sum(0).numpy())


def _head_gram(left: HeadFactor, right: HeadFactor, reduction: OutputReduction) -> Float64[Tensor, "m n"]:
    """Gram of (weight, bias) gradients g hᵀ and g: Σ_a <g_a, g'_a> (<h, h'> + 1), without forming g hᵀ."""
    if left.g is None or left.h is None or right.g is None or right.h is None:
        assert left.dense is not None
        assert right.dense is not None
        return _gram(left.dense, right.dense, reduction)
    inputs = left.h.double() @ right.h.double().T + (1.0 if left.bias else 0.0)
    if reduction.block:
        k = reduction.rows_per_example
        inputs = inputs.repeat_interleave(k, 0).repeat_interleave(k, 1)
    return _gram(left.g, right.g, reduction) * inputs


def concatenate_rows(parts: Sequence[TangentKernel], rows: Sequence[NDArray[np.int64]]) -> TangentKernel:
    """Join kernels against the same columns, computed batch by batch, in the order of the examples.

    Args:
        parts: Kernels of the batches, at least one.
        rows: Positions of the examples of each batch; together 0 … m-1.

    Returns:
        The kernel of all m examples.
    """
    first = parts[0]
    k = first.reduction.rows_per_example
    order = np.argsort(np.concatenate(rows))
    expanded = (order[:, None] * k + np.arange(k)).ravel()
    blocks = np.concatenate([part.blocks for part in parts], axis=3)[:, :, :, expanded]
    heads = [part.head for part in parts if part.head is not None]
    head = np.concatenate(heads)[expanded] if heads else None
    return TangentKernel(first.sites, first.ranks, blocks, head, first.reduction, first.epsilon)
