"""Token factors: the full-weight gradients of every example, kept as the vectors that they are made of.

For an adapted module y_t = W h_t and a scalar output z_a of example i, with g_at = ∂z_a/∂y_t,

    ∂z_a/∂W = Σ_t g_at h_tᵀ        so that, for any change ΔW,  z_a changes by Σ_t g_at · ΔW h_t + O(ΔW²)

summed over the example's tokens. Every A, B, rank and placement can be read off these vectors: no further pass.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foretune.errors import KernelError
from foretune.models.adapted import AdaptedModel, Batch
from foretune.models.sites import Site
from foretune.ntk.features import TangentFeatures
from foretune.ntk.jacobian import SharedError, check_first_axis, run_logits
from foretune.ntk.premises import check_eval_mode, check_logits, frozen, hooked, leaves_of, not_reached
from foretune.tasks.outputs import OutputReduction


@dataclass(frozen=True)
class ModuleTokens:
    """Inputs and output gradients of one linear module, the positions of all n examples in a row.

    Attributes:
        starts: n + 1 positions: example i has positions starts[i] … starts[i+1] - 1.
        h: positions × d_in inputs; modules that read the same tensor share it.
        g: k × positions × d_out gradients of the k outputs.
    """

    starts: Tensor
    h: Tensor
    g: Tensor

    def of(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Gather the positions of some examples.

        Args:
            rows: m examples.
            dtype: Type to compute in.

        Returns:
            For each position its place 0 … m-1 among `rows`; inputs h; gradients g.
        """
        first, counts = self.starts[rows], self.starts[rows + 1] - self.starts[rows]
        place = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
        begin = torch.cumsum(counts, 0) - counts
        positions = torch.arange(len(place), device=rows.device) - begin[place] + first[place]
        return place, self.h[positions].to(dtype), self.g[:, positions].to(dtype)


@dataclass(frozen=True)
class TokenFactors:
    """Token factors of n examples.

    Attributes:
        sites: Adapted modules.
        reduction: Which k scalar outputs were differentiated.
        modules: One for each site.
        hidden: Trained linear modules of the head below its last one, which train whole.
        inputs: n × p inputs φ of the head's last module.
        logits: n × C outputs at initialisation.
    """

    sites: tuple[Site, ...]
    reduction: OutputReduction
    modules: tuple[ModuleTokens, ...]
    hidden: tuple[ModuleTokens, ...]
    inputs: Tensor
    logits: Tensor

    @property
    def n(self) -> int:
        """Number of examples."""
        return int(self.logits.shape[0])

    @property
    def n_bytes(self) -> int:
        """Memory of the factors; shared inputs count once."""
        tensors = {id(t): t for part in (*self.modules, *self.hidden) for t in (part.h, part.g)}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def adapter_features(factors: TokenFactors, rows: Sequence[Tensor], *, draws: int = 1) -> TangentFeatures:
    """Tangent features of adapters with B = 0: ∂z_a/∂B = s Σ_t g_at (A h_t)ᵀ, from the token factors alone.

    Args:
        factors: Token factors of n examples.
        rows: For each site the (draws · r) × d_in rows of A, draw-major.
        draws: Draws of A.

    Returns:
        Features without a head, as `foretune.ntk.jacobian.tangent_features` gives them.
    """
    blocks = []
    for site, tokens, a in zip(factors.sites, factors.modules, rows, strict=True):
        width = int((tokens.starts[1:] - tokens.starts[:-1]).max())
        found = []
        for chunk in torch.arange(factors.n, device=tokens.starts.device).split(64):
            place, h, g = tokens.of(chunk, a.dtype)
            column = (
                torch.arange(len(place), device=place.device) - (tokens.starts[chunk] - tokens.starts[chunk[0]])[place]
            )
            # examples × r × positions and k × examples × positions × d_out, padded with zeros
            left = a.new_zeros(len(chunk), len(a), width)
            left[place, :, column] = h @ a.T * site.scaling
            right = a.new_zeros(len(g), len(chunk), width, g.shape[2])
            right[:, place, column] = g
            found.append(left @ right)
        blocks.append(torch.cat(found, dim=1))
    return TangentFeatures(
        factors.sites,
        factors.reduction,
        draws,
        tuple(blocks),
        (None,) * len(blocks),
        (),
        factors.logits.to(rows[0].dtype),
    )


class _Recorder:
    """Hooks of one pass: for each use of each module its inputs, and for each of the k outputs its gradient."""

    def __init__(self, n: int, n_outputs: int, *, looked: bool) -> None:
        self.n = n
        self.looked = looked
        self.output = 0
        self.n_outputs = n_outputs
        self.seen: dict[str, list[Tensor]] = {}
        self.gradients: dict[str, list[list[Tensor | None]]] = {}

    def hook(self, name: str) -> Callable[..., Tensor]:
        def record(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            check_first_axis(name, output, self.n, looked=self.looked)
            output = hooked(output)
            self.seen.setdefault(name, []).append(args[0].detach())
            gradients: list[Tensor | None] = [None] * self.n_outputs
            self.gradients.setdefault(name, []).append(gradients)

            def keep(gradient: Tensor) -> None:
                gradients[self.output] = gradient

            output.register_hook(keep)  # that of the tensor as it is now, whatever the model does to it in place
            return output

        return record

    def reached(self) -> set[str]:
        """Modules that the outputs depend on."""
        return {name for name, uses in self.gradients.items() if any(g is not None for use in uses for g in use)}

    def uses(self, name: str, module: nn.Module) -> "_Uses":
        return _Uses(self.n, module, self.seen.get(name, []), self.gradients.get(name, []))


@dataclass(frozen=True)
class _Part:
    """Factors of one batch, position by position: of each module its inputs, gradients and examples' counts."""

    rows: Tensor
    counts: list[Tensor]
    h: list[Tensor]
    g: list[Tensor]
    inputs: Tensor
    logits: Tensor


def token_factors(
    adapted: AdaptedModel,
    batches: Iterable[Batch],
    reduction: OutputReduction,
    *,
    n: int,
    storage: torch.dtype = torch.bfloat16,
) -> TokenFactors:
    """Record the token factors of a sample: one forward pass, and one backward pass for each output.

    Positions whose gradients are all zero are left out, such as padding in a model that masks it. Memory is that of
    positions · (d_in + k·d_out) numbers for each module, inputs that several modules read counted once.

    Args:
        adapted: Model in eval mode with its adapters, which must have B = 0.
        batches: Batches that together hold every position 0 … n-1 once, in any order.
        reduction: Scalar outputs to differentiate.
        n: Number of examples in all.
        storage: Type that the factors are kept in; bfloat16 is within 0.4% of each number.

    Returns:
        The factors, examples in the order of their positions.

    Raises:
        KernelError: If the model is not in eval mode, an adapter has B ≠ 0, a module is not reached by the outputs,
            a gradient is not finite, the head has no linear output layer, or the positions are not
            0 … n-1.
    """
    check_eval_mode(adapted.model)
    trained = next((adapter.site.name for adapter in adapted.adapters if adapter.b is not None), None)
    if trained is not None:
        raise KernelError(f"the adapter of module {trained!r} has B ≠ 0: forecasts start from a new adapter")
    if not adapted.head:
        raise KernelError("no linear head trains, and a forecast needs one: use task_type='SEQ_CLS'")
    parts = [part for batch in batches for part in _parts(adapted, batch, reduction, storage)]
    if not parts:
        raise KernelError("no examples to take the gradients of")
    rows = torch.cat([part.rows for part in parts])
    if len(rows) != n or not torch.equal(torch.sort(rows).values, torch.arange(n, device=rows.device)):
        raise KernelError(f"the batches must hold every position 0 … {n - 1} exactly once")
    order = torch.argsort(rows)
    joined = _join(parts, order)
    n_sites = len(adapted.sites)
    return TokenFactors(
        sites=adapted.sites,
        reduction=reduction,
        modules=joined[:n_sites],
        hidden=joined[n_sites:],
        inputs=torch.cat([part.inputs for part in parts])[order],
        logits=torch.cat([part.logits for part in parts])[order],
    )


def _parts(adapted: AdaptedModel, batch: Batch, reduction: OutputReduction, storage: torch.dtype) -> list[_Part]:
    """A batch's factors; example by example where a module does not have the examples on its first axis."""
    singly = adapted.layout is not None and bool(adapted.layout.singly)
    if not singly or len(batch.rows) == 1:
        try:
            return [_batch(adapted, batch, reduction, storage)]
        except SharedError:
            pass
    return [_batch(adapted, one, reduction, storage) for one in batch.singles()]


def _batch(adapted: AdaptedModel, batch: Batch, reduction: OutputReduction, storage: torch.dtype) -> _Part:
    n = len(batch.rows)
    recorder = _Recorder(n, reduction.n_outputs, looked=adapted.layout is not None)
    head = list(adapted.head.items())
    modules = {adapter.site.name: adapter.module for adapter in adapted.adapters} | dict(head)
    handles = [module.register_forward_hook(recorder.hook(name)) for name, module in modules.items()]
    try:
        with frozen(adapted.model), torch.enable_grad():
            logits = run_logits(adapted, batch)
            check_logits(logits, n, reduction.n_logits)
            _backward(recorder, logits, reduction)
    finally:
        for handle in handles:
            handle.remove()
    reached = recorder.reached()
    for name in modules:
        if name not in reached and (adapted.layout is None or name in adapted.layout.idle):
            raise KernelError(not_reached(name, used=name in recorder.seen))
    last = head[-1][0]
    found = {name: recorder.uses(name, module) for name, module in modules.items() if name != last}
    kept: dict[tuple[Any, ...], Tensor] = {}  # positions that count, for all modules that read the same tensors
    for use in found.values():
        own = use.positions(reduction.n_outputs)
        kept[use.key] = own | kept[use.key] if use.key in kept else own
    held: dict[tuple[Any, ...], Tensor] = {}
    counts, inputs, grads = [], [], []
    for name, use in found.items():
        keep = kept[use.key]
        counts.append(keep.sum(1))
        if use.key not in held:  # modules that read the same tensors keep them once
            held[use.key] = use.h()[keep].to(storage)
        inputs.append(held[use.key])
        # kept positions in the small type first: the padded gradients of all outputs are never side by side
        g = torch.stack([use.g(output)[keep].to(storage) for output in range(reduction.n_outputs)])
        if not bool(torch.isfinite(g.sum(dtype=torch.float32))):  # one pass: what is not finite stays so in a sum
            raise KernelError(f"the gradients of module {name!r} are not finite: use dtype float32")
        grads.append(g)
    phi = _output_inputs(recorder, last)
    return _Part(batch.rows.to(logits.device), counts, inputs, grads, phi, logits.detach())


class _Uses:
    """All uses of a module in a pass, side by side: its gradient is a sum over uses and positions."""

    def __init__(
        self, n: int, module: nn.Module, inputs: Sequence[Tensor], gradients: Sequence[Sequence[Tensor | None]]
    ) -> None:
        self._n, self._module, self._inputs, self._gradients = n, module, inputs, gradients
        self.key: tuple[Any, ...] = tuple((h.data_ptr(), h.shape, h.stride()) for h in inputs) or (id(self),)

    def _flat(self, tensors: Sequence[Tensor], width: str) -> Tensor:
        """Examples × positions × width."""
        flat = [tensor.reshape(self._n, -1, tensor.shape[-1]) for tensor in tensors]
        if not flat:  # an expert that none of these examples meets
            parameter = next(self._module.parameters())
            return parameter.new_zeros(self._n, 0, int(getattr(self._module, width)))
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)

    def h(self) -> Tensor:
        return self._flat(self._inputs, "in_features")

    def g(self, output: int) -> Tensor:
        found = []
        for h, gradients in zip(self._inputs, self._gradients, strict=True):
            gradient = gradients[output]
            zeros = h.new_zeros(*h.shape[:-1], int(self._module.out_features))  # type: ignore[arg-type]
            found.append(zeros if gradient is None else gradient)
        return self._flat(found, "out_features")

    def positions(self, n_outputs: int) -> Tensor:
        # examples × positions that the outputs depend on; padding is not among them in a model that masks it. A mask of
        # the inputs would not tell: the sequence may be another than the input's, a decoder's or relative positions
        found = (self.g(0) != 0).any(-1)
        for output in range(1, n_outputs):
            found |= (self.g(output) != 0).any(-1)
        return torch.ones_like(found) if found.shape[1] == 1 else found


def _backward(recorder: _Recorder, logits: Tensor, reduction: OutputReduction) -> None:
    directions = torch.as_tensor(reduction.directions, dtype=logits.dtype, device=logits.device)
    totals = (logits @ directions).sum(0)
    ends = leaves_of(logits)
    for output in range(reduction.n_outputs if ends else 0):
        recorder.output = output
        more = output + 1 < reduction.n_outputs
        torch.autograd.grad(totals[output], ends, retain_graph=more, allow_unused=True)


def _output_inputs(recorder: _Recorder, name: str) -> Tensor:
    """Inputs φ of the output layer: where it runs over all positions, at the one that the model reads."""
    (h,), ((gradient, *_),) = recorder.seen[name], recorder.gradients[name]
    if h.ndim == 2 or gradient is None:
        return h
    read = gradient.flatten(2).abs().sum(2) if gradient.ndim > 2 else gradient.abs()
    return h[torch.arange(len(h), device=h.device), read.argmax(1)]


def _join(parts: Sequence[_Part], order: Tensor) -> tuple[ModuleTokens, ...]:
    """Concatenate batches and bring the examples into order, module by module, freeing the parts as it goes."""
    joined: list[ModuleTokens] = []
    shared: dict[int, Tensor] = {}
    for index in range(len(parts[0].counts)):
        counts = torch.cat([part.counts[index] for part in parts])
        before = torch.cumsum(counts, 0) - counts
        sorted_counts, first = counts[order], before[order]
        starts = torch.cat([counts.new_zeros(1), torch.cumsum(sorted_counts, 0)])
        place = torch.repeat_interleave(torch.arange(len(order), device=order.device), sorted_counts)
        positions = torch.arange(len(place), device=order.device) - starts[place] + first[place]
        key = id(parts[0].h[index])
        if key not in shared:
            shared[key] = torch.cat([part.h[index] for part in parts])[positions]
        g = torch.cat([part.g[index] for part in parts], dim=1)[:, positions]
        for part in parts:
            part.g[index] = part.g[index].new_empty(0)
        joined.append(ModuleTokens(starts, shared[key], g))
    return tuple(joined)
