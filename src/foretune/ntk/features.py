"""Tangent features of a sample: per-sample gradients of the outputs with respect to adapters and head."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foretune.errors import KernelError
from foretune.models.sites import Site
from foretune.tasks.outputs import OutputReduction


@dataclass(frozen=True)
class HeadFactor:
    """Gradient of one head module, kept in factors where each example has one position.

    Attributes:
        g: k × n × q output gradients (position axis dropped), or None.
        h: n × p inputs, or None.
        dense: k × n × (q·p [+ q]) gradients where an example has several positions, or None.
        bias: Whether the module has a trained bias.
    """

    g: Tensor | None
    h: Tensor | None
    dense: Tensor | None
    bias: bool


@dataclass(frozen=True)
class TangentFeatures:
    """Per-sample adapter gradients of n examples, in the model's dtype.

    Attributes:
        sites: Adapted modules.
        reduction: Which k scalar outputs were differentiated.
        draws: Draws of A, D.
        b: For each site the k × n × (D·r) × d_out gradients with respect to Bᵀ.
        a: For each site the k × n × r × d_in gradients with respect to A, or None where B = 0.
        head: One factor for each head module.
        logits: n × C outputs at initialisation.
    """

    sites: tuple[Site, ...]
    reduction: OutputReduction
    draws: int
    b: tuple[Tensor, ...]
    a: tuple[Tensor | None, ...]
    head: tuple[HeadFactor, ...]
    logits: Tensor

    @property
    def n(self) -> int:
        """Number of examples."""
        return int(self.logits.shape[0])


def join_features(parts: Iterable[tuple[Tensor, TangentFeatures]], n: int) -> TangentFeatures:
    """Join the features of batches in the order of their examples' positions.

    Every batch is copied to its place as it comes, so that memory holds the whole and one batch.

    Args:
        parts: Positions and features of each batch; may be lazy.
        n: Number of examples in all.

    Returns:
        Features of all examples.

    Raises:
        KernelError: If the positions are not 0 … n-1, once each.
    """
    joined: TangentFeatures | None = None
    seen = torch.zeros(n, dtype=torch.long)
    for rows, part in parts:
        if bool((rows < 0).any()) or bool((rows >= n).any()):
            raise KernelError(f"positions of a batch lie outside 0 … {n - 1}")
        seen.index_add_(0, rows.cpu(), torch.ones(len(rows), dtype=torch.long))
        if joined is None:
            joined = _mapped(part, lambda tensor, axis: tensor.new_empty(_resized(tensor, axis, n)))
        _copy(part, joined, rows.to(part.logits.device))
    if joined is None:
        raise KernelError("no examples to take the kernel of")
    if not bool((seen == 1).all()):
        raise KernelError("the batches must hold every position 0 … n-1 exactly once")
    return joined


def _resized(tensor: Tensor, axis: int, n: int) -> list[int]:
    return [n if position == axis else size for position, size in enumerate(tensor.shape)]


def _tensors(features: TangentFeatures) -> Iterator[tuple[Tensor, int]]:
    """All tensors with the axis of their examples."""
    for b in features.b:
        yield b, 1
    for a in features.a:
        if a is not None:
            yield a, 1
    for factor in features.head:
        for tensor, axis in ((factor.g, 1), (factor.h, 0), (factor.dense, 1)):
            if tensor is not None:
                yield tensor, axis
    yield features.logits, 0


def _copy(part: TangentFeatures, joined: TangentFeatures, rows: Tensor) -> None:
    for (source, axis), (target, _) in zip(_tensors(part), _tensors(joined), strict=True):
        if axis:
            target[:, rows] = source  # far faster on a CPU than index_copy_ along the second axis
        else:
            target[rows] = source


def _mapped(features: TangentFeatures, change: Callable[[Tensor, int], Tensor]) -> TangentFeatures:
    def optional(tensor: Tensor | None, axis: int) -> Tensor | None:
        return None if tensor is None else change(tensor, axis)

    return replace(
        features,
        b=tuple(change(b, 1) for b in features.b),
        a=tuple(optional(a, 1) for a in features.a),
        head=tuple(HeadFactor(optional(f.g, 1), optional(f.h, 0), optional(f.dense, 1), f.bias) for f in features.head),
        logits=change(features.logits, 0),
    )
