"""Tangent features of a sample: per-sample gradients of the outputs with respect to adapters and head."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foretune.errors import KernelError
from foretune.models.sites import Site
from foretune.ntk.premises import sample_order
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

    g: Float[Tensor, "k n q"] | None
    h: Float[Tensor, "n p"] | None
    dense: Float[Tensor, "k n w"] | None
    bias: bool

    def as_dense(self) -> "HeadFactor":
        """Multiply the factors out: g hᵀ, and g for a bias."""
        if self.g is None or self.h is None:
            return self
        dense = torch.einsum("knq,np->knqp", self.g, self.h.to(self.g.dtype)).flatten(2)
        if self.bias:
            dense = torch.cat([dense, self.g], dim=2)
        return HeadFactor(g=None, h=None, dense=dense, bias=self.bias)


@dataclass(frozen=True)
class TangentFeatures:
    """Per-sample adapter gradients of n examples, in the model's dtype.

    Attributes:
        sites: Adapted modules.
        reduction: Which k scalar outputs were differentiated.
        draws: Draws of A, D.
        b: For each site the k × n × (D·r) × d_out gradients with respect to Bᵀ.
        a: For each site the k × n × r × d_in gradients with respect to A, or None where B = 0.
        v: For each site the k × n × w gradients with respect to what it trains beside A and B, or None.
        head: One factor for each head module.
        logits: n × C outputs at initialisation.
    """

    sites: tuple[Site, ...]
    reduction: OutputReduction
    draws: int
    b: tuple[Float[Tensor, "k n _ _"], ...]
    a: tuple[Float[Tensor, "k n _ _"] | None, ...]
    v: tuple[Float[Tensor, "k n _"] | None, ...]
    head: tuple[HeadFactor, ...]
    logits: Float[Tensor, "n classes"]

    @property
    def n(self) -> int:
        """Number of examples."""
        return int(self.logits.shape[0])

    @property
    def gradients(self) -> tuple[Float[Tensor, "k n ..."], ...]:
        """All gradients of the sites."""
        return tuple(tensor for tensor in (*self.b, *self.a, *self.v) if tensor is not None)


def join_features(parts: Iterable[tuple[Int[Tensor, " m"], TangentFeatures]], n: int) -> TangentFeatures:
    """Join the features of batches in the order of their examples' positions.

    Every batch is copied to its place as it comes, so that memory holds the whole and one batch. A batch that is the
    whole in order stays as it is.

    Args:
        parts: Positions and features of each batch; may be lazy.
        n: Number of examples in all.

    Returns:
        Features of all examples.

    Raises:
        KernelError: If the positions are not 0 … n-1, once each.
    """
    joined: TangentFeatures | None = None
    places = [torch.empty(0, dtype=torch.long)]
    for rows, part in parts:
        if bool((rows < 0).any()) or bool((rows >= n).any()):
            raise KernelError(f"positions of a batch lie outside 0 … {n - 1}")
        places.append(rows.cpu())
        if joined is None and torch.equal(places[-1], torch.arange(n)):
            joined = part
            continue
        if joined is None:
            joined = _mapped(part, lambda tensor, axis: tensor.new_empty(_resized(tensor, axis, n)))
        joined, alike = in_one_form(joined, part)
        _copy(alike, joined, rows)
    sample_order(torch.cat(places), n)
    assert joined is not None
    return joined


def batch_in_turn(parts: Iterator[tuple[Int[Tensor, " m"], TangentFeatures]], n: int) -> TangentFeatures:
    """Take the features of a batch that came at once, or join those of one that came example by example.

    Args:
        parts: Places in the batch and features.
        n: Examples of the batch.

    Returns:
        Features of the batch, examples in its order.
    """
    places, first = next(parts)
    return first if len(places) == n else join_features(chain([(places, first)], parts), n)


def in_one_form(left: TangentFeatures, right: TangentFeatures) -> tuple[TangentFeatures, TangentFeatures]:
    """Multiply the head's factors out where only one of two samples has them, such as one of texts of one token.

    Args:
        left: Features of a sample.
        right: Features of another.

    Returns:
        Both, with heads of the same form.
    """
    if all((one.dense is None) == (other.dense is None) for one, other in zip(left.head, right.head, strict=True)):
        return left, right
    one, other = (replace(part, head=tuple(factor.as_dense() for factor in part.head)) for part in (left, right))
    return one, other


def first_rows(features: TangentFeatures, n: int) -> TangentFeatures:
    """Keep the first examples.

    Args:
        features: Features of a sample.
        n: How many, at most all.

    Returns:
        Views of the same tensors.
    """
    return _mapped(features, lambda tensor, axis: tensor.narrow(axis, 0, n))


def _resized(tensor: Tensor, axis: int, n: int) -> list[int]:
    return [n if position == axis else size for position, size in enumerate(tensor.shape)]


def _tensors(features: TangentFeatures) -> Iterator[tuple[Tensor, int]]:
    """All tensors with the axis of their examples."""
    for b in features.b:
        yield b, 1
    for of_site in (*features.a, *features.v):
        if of_site is not None:
            yield of_site, 1
    for factor in features.head:
        for tensor, axis in ((factor.g, 1), (factor.h, 0), (factor.dense, 1)):
            if tensor is not None:
                yield tensor, axis
    yield features.logits, 0


def _copy(part: TangentFeatures, joined: TangentFeatures, rows: Tensor) -> None:
    for (source, axis), (target, _) in zip(_tensors(part), _tensors(joined), strict=True):
        here = rows.to(target.device)  # layers may lie on several devices
        if axis:
            target[:, here] = source  # far faster on a CPU than index_copy_ along the second axis
        else:
            target[here] = source


def _mapped(features: TangentFeatures, change: Callable[[Tensor, int], Tensor]) -> TangentFeatures:
    def optional(tensor: Tensor | None, axis: int) -> Tensor | None:
        return None if tensor is None else change(tensor, axis)

    return replace(
        features,
        b=tuple(change(b, 1) for b in features.b),
        a=tuple(optional(a, 1) for a in features.a),
        v=tuple(optional(v, 1) for v in features.v),
        head=tuple(HeadFactor(optional(f.g, 1), optional(f.h, 0), optional(f.dense, 1), f.bias) for f in features.head),
        logits=change(features.logits, 0),
    )
