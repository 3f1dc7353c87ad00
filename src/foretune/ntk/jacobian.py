"""Tangent features: per-sample gradients of the outputs with respect to the adapters, in one pass.

For an adapted module y_t = W h_t + s·B A h_t and a scalar output z of one example, with g_t = ∂z/∂y_t,

    ∂z/∂B = s · Σ_t g_t (A h_t)ᵀ        ∂z/∂A = s · Σ_t (Bᵀ g_t) h_tᵀ

What else a module trains, such as the magnitudes of DoRA or the scales of (IA)³, multiplies single numbers of every
position (`foretune.models.adapted.Vector`), and

    ∂z/∂θ = Σ_t project(g_t) ⊙ factor(h_t, y_t)

so h, y and g (`foretune.ntk.capture`) give the adapter's gradient of every example at once; they are reduced to it as
they come. With B = 0 the adapter does not touch the forward pass, ∂z/∂A vanishes, and the feature of one row of A
depends on that row alone: further rows (other draws of A) cost one thin product each and no pass of their own.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foretune.models.adapted import AdaptedModel, Adapter, Batch, Vector
from foretune.ntk.capture import Receive, Uses, capture_in_turn
from foretune.ntk.features import HeadFactor, TangentFeatures, batch_in_turn, join_features
from foretune.ntk.general import group_features
from foretune.ntk.head_factors import has_bias, head_factor
from foretune.tasks.outputs import OutputReduction


class _Total:
    """A gradient of one site, a slice for each output, written in place as it comes."""

    def __init__(self, n_outputs: int) -> None:
        self.slices: Tensor | None = None
        self.filled = [False] * n_outputs

    def add(self, output: int, left: Float[Tensor, "n p t"], right: Float[Tensor, "n t q"]) -> None:
        """Add a batched product; a module that runs several times (shared weights) has a sum for gradient."""
        if self.slices is None:
            shape = (len(self.filled), left.shape[0], left.shape[1], right.shape[2])
            self.slices = torch.empty(shape, dtype=left.dtype, device=left.device)
        if self.filled[output]:
            self.slices[output] += torch.bmm(left, right)
        else:
            torch.bmm(left, right, out=self.slices[output])
            self.filled[output] = True

    def complete(self, like: Tensor, n: int, width: tuple[int, int]) -> Float[Tensor, "k n p q"]:
        """The gradients; zeros for outputs that depend on no use, such as an expert that these examples do not meet."""
        if self.slices is None:
            return like.new_zeros(len(self.filled), n, *width)
        for output, filled in enumerate(self.filled):
            if not filled:
                self.slices[output] = 0
        return self.slices


class _Blocks:
    """Gradients with respect to one adapter; h, of width d_in, is kept only where that of A needs it."""

    def __init__(self, adapter: Adapter, n: int, n_outputs: int) -> None:
        scaling = adapter.site.scaling
        self.site, self.n = adapter.site, n
        self.rows = adapter.rows * scaling
        self.b = None if adapter.b is None else adapter.b * scaling
        self.of_b, self.of_a = _Total(n_outputs), _Total(n_outputs)
        self.of_vectors = [(vector, _Total(n_outputs)) for vector in adapter.vectors]

    def use(self, h: Float[Tensor, "n t d_in"], y: Float[Tensor, "n t d_out"]) -> Receive:
        reduce_vectors = [_reduced(vector, total, h, y) for vector, total in self.of_vectors]
        if not len(self.rows):
            return lambda output, g: _each(reduce_vectors, output, g)
        b, kept = self.b, None if self.b is None else h
        rows_h = _by_row(self.rows, h.to(self.rows.dtype))

        def reduce(output: int, g: Tensor) -> None:
            self.of_b.add(output, rows_h, g.to(rows_h.dtype))
            if b is not None and kept is not None:
                self.of_a.add(output, (g.to(b.dtype) @ b).transpose(1, 2), kept.to(b.dtype))
            _each(reduce_vectors, output, g)

        return reduce

    def complete(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        b = self.of_b.complete(self.rows, self.n, (len(self.rows), self.site.d_out))
        a = None if self.b is None else self.of_a.complete(self.b, self.n, (self.site.rank, self.site.d_in))
        vectors = [total.complete(self.rows, self.n, (1, vector.numbers))[:, :, 0] for vector, total in self.of_vectors]
        return b, a, torch.cat(vectors, dim=2) if vectors else None


def _by_row(rows: Float[Tensor, "r d_in"], h: Float[Tensor, "n t d_in"]) -> Float[Tensor, "n r t"]:
    """A h of every position, as a view or not: of long texts a thin product for each takes a third less time."""
    if h.shape[1] >= len(rows):
        return rows @ h.transpose(1, 2)
    return torch.nn.functional.linear(h, rows).transpose(1, 2)


def _each(reduce: Sequence[Receive], output: int, g: Tensor) -> None:
    for one in reduce:
        one(output, g)


def _reduced(vector: Vector, total: _Total, h: Tensor, y: Tensor) -> Receive:
    """Sum project(g) ⊙ factor(h, y) over the positions, as a product of 1 × t and t × w where the factor is 1."""
    factor = None if vector.factor is None else vector.factor(h, y)  # y may be changed in place after this call

    def reduce(output: int, g: Tensor) -> None:
        by_number = g if vector.project is None else vector.project(g)
        by_number = by_number if factor is None else by_number * factor
        total.add(output, by_number.new_ones(len(g), 1, g.shape[1]), by_number)

    return reduce


class ReduceBlocks:
    """Sink of a pass that reduces inputs and gradients to those of LoRA's matrices and of the head.

    Args:
        adapted: The model.
        n: Examples of the batch.
        reduction: Scalar outputs that are differentiated.
    """

    def __init__(self, adapted: AdaptedModel, n: int, reduction: OutputReduction) -> None:
        k = reduction.n_outputs
        self._adapted, self._reduction = adapted, reduction
        self._blocks = {adapter.site.name: _Blocks(adapter, n, k) for adapter in adapted.adapters}
        self._uses = {name: Uses(module, n) for name, module in adapted.head.items()}
        self._b: list[Tensor] = []
        self._a: list[Tensor | None] = []
        self._v: list[Tensor | None] = []
        self._head: list[HeadFactor] = []

    def use(self, module: str, h: Float[Tensor, "n positions d_in"], y: Float[Tensor, "n positions d_out"]) -> Receive:
        """As `foretune.ntk.capture.Sink.use`.

        Args:
            module: Name.
            h: Inputs.
            y: Outputs.

        Returns:
            What takes the gradients.
        """
        blocks = self._blocks.get(module)
        return self._uses[module].use(h) if blocks is None else blocks.use(h, y)

    def finish(self) -> Iterator[tuple[str, Tensor]]:
        """As `foretune.ntk.capture.Sink.finish`.

        Yields:
            Module and gradients.
        """
        for name, blocks in self._blocks.items():
            b, a, v = blocks.complete()
            self._b.append(b)
            self._a.append(a)
            self._v.append(v)
            yield from ((name, tensor) for tensor in (b, a, v) if tensor is not None)
        for name, uses in self._uses.items():
            factor = head_factor(uses, self._reduction.n_outputs, bias=has_bias(self._adapted.head[name]))
            self._head.append(factor)
            yield from ((name, tensor) for tensor in (factor.g, factor.h, factor.dense) if tensor is not None)
        self._uses.clear()

    def features(self, logits: Float[Tensor, "n classes"]) -> TangentFeatures:
        """Give out what has come.

        Args:
            logits: Outputs of the pass.

        Returns:
            Features of the batch, examples in its order.
        """
        return TangentFeatures(
            sites=self._adapted.sites,
            reduction=self._reduction,
            draws=self._adapted.draws,
            b=tuple(self._b),
            a=tuple(self._a),
            v=tuple(self._v),
            head=tuple(self._head),
            logits=logits,
        )


def batch_features(adapted: AdaptedModel, batch: Batch, reduction: OutputReduction) -> TangentFeatures:
    """Compute the tangent features of one batch: one forward pass, one backward pass for each output.

    Args:
        adapted: Model in eval mode with its adapters.
        batch: Inputs of n examples.
        reduction: Scalar outputs to differentiate.

    Returns:
        Features of the batch, examples in its order.

    Raises:
        KernelError: If the model is not in eval mode, a module is not reached by the outputs, or a gradient or output
            is not finite (the module is named).
    """
    if adapted.groups:
        return group_features(adapted, batch, reduction)
    n = len(batch.rows)
    parts = (
        (places, sink.features(logits))
        for places, sink, logits in capture_in_turn(
            adapted, batch, reduction.directions, lambda m: ReduceBlocks(adapted, m, reduction)
        )
    )
    return batch_in_turn(parts, n)


def tangent_features(
    adapted: AdaptedModel, batches: Iterable[Batch], reduction: OutputReduction, *, n: int
) -> TangentFeatures:
    """Compute the tangent features of a sample, batch by batch.

    Batch size, padding and order change nothing beyond rounding.

    Args:
        adapted: Model in eval mode with its adapters.
        batches: Batches that together hold every position 0 … n-1 once, in any order.
        reduction: Scalar outputs to differentiate.
        n: Number of examples in all.

    Returns:
        Features with the examples in the order of their positions.

    Raises:
        KernelError: As `batch_features`, or if the positions are not 0 … n-1.
    """
    return join_features(((batch.rows, batch_features(adapted, batch, reduction)) for batch in batches), n)
