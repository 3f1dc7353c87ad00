"""Tangent features of a sample: per-sample gradients of the outputs with respect to adapters and head."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foretune.errors import KernelError
from foretune.outputs import OutputReduction
from foretune.sites import Site


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


def join_features(parts: Sequence[TangentFeatures], rows: Sequence[Tensor]) -> TangentFeatures:
    """Join the features of batches in the order of their examples' positions.

    Args:
        parts: Features of the batches.
        rows: Positions of each batch's examples.

    Returns:
        Features of all examples.

    Raises:
        KernelError: If the positions are not 0 … n-1, once each.
    """
    if not parts:
        raise KernelError("no examples to take the kernel of")
    positions = torch.cat([row.cpu() for row in rows])
    order = torch.argsort(positions)
    if not torch.equal(positions[order], torch.arange(len(order))):
        raise KernelError("the batches must hold every position 0 … n-1 exactly once")
    return _concatenate(parts, order.to(parts[0].logits.device))


def _concatenate(parts: Sequence[TangentFeatures], order: Tensor) -> TangentFeatures:
    def join(tensors: list[Tensor | None], dim: int) -> Tensor | None:
        held = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(held, dim).index_select(dim, order) if len(held) == len(parts) else None

    first = parts[0]
    b, a = [], []
    for site in range(len(first.sites)):
        b.append(torch.cat([part.b[site] for part in parts], 1).index_select(1, order))
        a.append(join([part.a[site] for part in parts], 1))
    head = []
    for index, factor in enumerate(first.head):
        factors = [part.head[index] for part in parts]
        head.append(
            HeadFactor(
                g=join([f.g for f in factors], 1),
                h=join([f.h for f in factors], 0),
                dense=join([f.dense for f in factors], 1),
                bias=factor.bias,
            )
        )
    logits = torch.cat([part.logits for part in parts]).index_select(0, order)
    return TangentFeatures(first.sites, first.reduction, first.draws, tuple(b), tuple(a), tuple(head), logits)
