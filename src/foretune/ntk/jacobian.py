"""Tangent features: per-sample gradients of the outputs with respect to the adapters, in one pass.

For an adapted module y_t = W h_t + s·B A h_t and a scalar output z of one example, with g_t = ∂z/∂y_t,

    ∂z/∂B = s · Σ_t g_t (A h_t)ᵀ        ∂z/∂A = s · Σ_t (Bᵀ g_t) h_tᵀ

so h (seen by a forward hook) and g (seen by a tensor hook in the backward pass) give the adapter's gradient
of every example at once, and no gradient of a base weight is ever formed. The lowest adapted outputs become
leaves of the graph: nothing is propagated below them. With B = 0 the adapter does not touch the forward
pass, ∂z/∂A vanishes, and the feature of one row of A depends on that row alone: further rows (other draws of
A) cost one thin product each and no pass of their own.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from foretune.errors import KernelError, reason
from foretune.models.adapted import AdaptedModel, Adapter, Batch
from foretune.ntk.features import HeadFactor, TangentFeatures, join_features
from foretune.ntk.premises import check_eval_mode, check_logits, frozen, hooked, leaves_of, named_outputs, not_reached
from foretune.tasks.outputs import OutputReduction


class SharedError(KernelError):
    """A module does not have the examples of a batch on its first axis."""


def check_first_axis(name: str, tensor: Tensor, n: int, *, looked: bool) -> None:
    """Refuse to take the rows of a tensor for examples where they may be something else.

    Args:
        name: Module that sees it.
        tensor: Its input, or a gradient of its output.
        n: Examples in the batch.
        looked: Whether the model's layout is known; if not, a tensor n × n × … might have the examples on either axis.

    Raises:
        SharedError: If the examples are not on the first axis for certain.
    """
    if n > 1 and (tensor.ndim < 2 or tensor.shape[0] != n or (not looked and tensor.shape[:2] == (n, n))):
        raise SharedError(name)


def run_logits(adapted: AdaptedModel, batch: Batch) -> Tensor:
    """Run the model.

    Args:
        adapted: The model.
        batch: Inputs.

    Returns:
        Its logits, whether it gives an object with names or a tuple.

    Raises:
        KernelError: If the model refuses the inputs, as BART does texts with ends in their midst.
    """
    with adapted.forward(), named_outputs(adapted.model):
        try:
            output = adapted.model(**batch.inputs)
        except ValueError as error:
            raise KernelError(f"{type(adapted.model).__name__} refuses the texts: {reason(error)}") from error
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits


class _Blocks:
    """Reduced gradients of one site, one slice for each output, written in place as they come."""

    def __init__(self, n_outputs: int) -> None:
        self.used = False
        self.slices: Tensor | None = None
        self.filled = [False] * n_outputs

    def add(self, output: int, left: Tensor, right: Tensor) -> None:
        """Add a batched product; a module that runs several times (shared weights) has a sum for gradient."""
        with torch.no_grad():
            if self.slices is None:
                shape = (len(self.filled), left.shape[0], left.shape[1], right.shape[2])
                self.slices = torch.empty(shape, dtype=left.dtype, device=left.device)
            if self.filled[output]:
                self.slices[output] += torch.bmm(left, right)
            else:
                torch.bmm(left, right, out=self.slices[output])
                self.filled[output] = True

    def complete(self) -> Tensor | None:
        return self.slices if all(self.filled) else None


class _Recorder:
    """Hooks of one pass: holds the inputs until the output gradient arrives, then the reduced blocks."""

    def __init__(self, adapted: AdaptedModel, n: int, n_outputs: int) -> None:
        self.n = n
        self.looked = adapted.layout is not None
        self.output = 0
        self.n_outputs = n_outputs
        self.b = [_Blocks(n_outputs) for _ in adapted.adapters]
        self.a = [_Blocks(n_outputs) for _ in adapted.adapters]
        self.head: list[list[tuple[Tensor, Tensor]]] = [[] for _ in adapted.head]

    def _positions(self, name: str, tensor: Tensor) -> Tensor:
        """View as examples × positions × width; all that a single example's pass holds is the example's."""
        check_first_axis(name, tensor, self.n, looked=self.looked)
        return tensor.reshape(self.n, -1, tensor.shape[-1])

    def adapter_hook(self, index: int, adapter: Adapter) -> Callable[..., Tensor]:
        name, scaling = adapter.site.name, adapter.site.scaling
        rows = adapter.rows * scaling
        b = None if adapter.b is None else adapter.b * scaling

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self.b[index].used = True
            with torch.no_grad():
                h = self._positions(name, args[0].detach())
                # h itself (width d_in) is kept only where the gradient of A needs it
                rows_h = torch.nn.functional.linear(h.to(rows.dtype), rows).transpose(1, 2)
            h_kept = None if b is None else h

            def reduce(grad: Tensor) -> None:
                g = self._positions(name, grad)
                self.b[index].add(self.output, rows_h, g.to(rows_h.dtype))
                if b is not None and h_kept is not None:
                    self.a[index].add(self.output, (g.to(b.dtype) @ b).transpose(1, 2), h_kept.to(b.dtype))

            output = hooked(output)
            output.register_hook(reduce)
            return output

        return hook

    def head_hook(self, index: int, name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            h = self._positions(name, args[0].detach())
            output = hooked(output)
            output.register_hook(lambda grad: self.head[index].append((h, self._positions(name, grad))))
            return output

        return hook

    def head_factor(self, index: int, module: nn.Module) -> HeadFactor:
        bias = getattr(module, "bias", None) is not None
        seen = self.head[index]
        if not seen:  # a pooler that this classifier does not read
            weight = module.weight
            assert isinstance(weight, Tensor)
            g, h = weight.new_zeros(self.n_outputs, self.n, len(weight)), weight.new_zeros(self.n, weight.shape[1])
            return HeadFactor(g=g, h=h, dense=None, bias=bias)
        if len(seen) != self.n_outputs:
            raise KernelError("a head module runs more than once in a forward pass")
        h = seen[0][0]
        g = torch.stack([gradient for _, gradient in seen])
        if h.shape[1] == 1:
            return HeadFactor(g=g[:, :, 0], h=h[:, 0], dense=None, bias=bias)
        dense = torch.einsum("kntq,ntp->knqp", g, h.to(g.dtype)).flatten(2)
        if bias:
            dense = torch.cat([dense, g.sum(2)], dim=2)
        return HeadFactor(g=None, h=None, dense=dense, bias=bias)


def batch_features(adapted: AdaptedModel, batch: Batch, reduction: OutputReduction) -> TangentFeatures:
    """Compute the tangent features of one batch: one forward pass, one backward pass for each output.

    Args:
        adapted: Model in eval mode with its adapters.
        batch: Inputs of n examples.
        reduction: Scalar outputs to differentiate.

    Returns:
        Features of the batch, examples in its order.

    Raises:
        KernelError: If the model is not in eval mode, a module is not reached by the outputs, examples are not
            on the first axis of a module, or a gradient or output is not finite (the module is named).
    """
    check_eval_mode(adapted.model)
    n = int(batch.rows.shape[0])
    if n > 1 and adapted.layout is not None and adapted.layout.singly:
        features = _join_singles(adapted, batch, reduction)
    else:
        try:
            features = _features(adapted, batch, reduction)
        except SharedError:
            features = _join_singles(adapted, batch, reduction)
    _check_finite(features)
    return features


def _join_singles(adapted: AdaptedModel, batch: Batch, reduction: OutputReduction) -> TangentFeatures:
    """The features of a batch whose examples must go through the model one at a time."""
    n = len(batch.rows)
    parts = ((torch.tensor([row]), _features(adapted, one, reduction)) for row, one in enumerate(batch.singles()))
    return join_features(parts, n)


def _features(adapted: AdaptedModel, batch: Batch, reduction: OutputReduction) -> TangentFeatures:
    n = int(batch.rows.shape[0])
    recorder = _Recorder(adapted, n, reduction.n_outputs)
    handles = [
        adapter.module.register_forward_hook(recorder.adapter_hook(index, adapter))
        for index, adapter in enumerate(adapted.adapters)
    ]
    handles += [
        module.register_forward_hook(recorder.head_hook(index, name))
        for index, (name, module) in enumerate(adapted.head.items())
    ]
    try:
        with frozen(adapted.model), torch.enable_grad():
            logits = run_logits(adapted, batch)
            check_logits(logits, n, reduction.n_logits)
            _backward(recorder, logits, reduction)
    finally:
        for handle in handles:
            handle.remove()
    k = reduction.n_outputs
    b, a = [], []
    for adapter, of_b, of_a in zip(adapted.adapters, recorder.b, recorder.a, strict=True):
        r, d_in = adapter.site.rank, adapter.site.d_in
        b.append(_reached(adapted, adapter, of_b, (k, n, len(adapter.rows), adapter.site.d_out)))
        a.append(None if adapter.b is None else _reached(adapted, adapter, of_a, (k, n, r, d_in)))
    return TangentFeatures(
        sites=adapted.sites,
        reduction=reduction,
        draws=adapted.draws,
        b=tuple(b),
        a=tuple(a),
        head=tuple(recorder.head_factor(i, module) for i, module in enumerate(adapted.head.values())),
        logits=logits.detach(),
    )


def _backward(recorder: _Recorder, logits: Tensor, reduction: OutputReduction) -> None:
    directions = torch.as_tensor(reduction.directions, dtype=logits.dtype, device=logits.device)
    ends = leaves_of(logits)
    totals = (logits @ directions).sum(0)
    for output in range(reduction.n_outputs if ends else 0):
        recorder.output = output
        torch.autograd.grad(
            totals[output],
            ends,
            retain_graph=output + 1 < reduction.n_outputs,
            allow_unused=True,
        )


def _reached(adapted: AdaptedModel, adapter: Adapter, blocks: _Blocks, shape: tuple[int, ...]) -> Tensor:
    """The gradients; zeros for a module that some examples use and these do not, an expert, say."""
    held = blocks.complete()
    if held is not None:
        return held
    name = adapter.site.name
    if adapted.layout is None or name in adapted.layout.idle:
        raise KernelError(not_reached(name, used=blocks.used))
    return adapter.rows.new_zeros(shape)


def _check_finite(features: TangentFeatures) -> None:
    for site, b, a in zip(features.sites, features.b, features.a, strict=True):
        if not (torch.isfinite(b).all() and (a is None or torch.isfinite(a).all())):
            raise KernelError(
                f"the gradients of module {site.name!r} are not finite: check its weights, or use dtype float32"
            )
    if not torch.isfinite(features.logits).all():
        raise KernelError("the model's outputs are not finite: check its weights, or use dtype float32")


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
