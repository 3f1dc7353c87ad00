"""Token factors: the full-weight gradients of every example, kept as the vectors that they are made of.

For an adapted module y_t = W h_t and a scalar output z_a of example i, with g_at = ∂z_a/∂y_t,

    ∂z_a/∂W = Σ_t g_at h_tᵀ        so that, for any change ΔW,  z_a changes by Σ_t g_at · ΔW h_t + O(ΔW²)

summed over the example's tokens. Every A, B, rank and placement can be read off these vectors: no further pass.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foretune.errors import KernelError
from foretune.features import TangentFeatures
from foretune.outputs import OutputReduction
from foretune.sites import Site
from foretune.tangent import AdaptedModel, Batch, check_eval_mode, frozen


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
        Features without a head, as `foretune.tangent.tangent_features` gives them.
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
    """Hooks of one pass: inputs and outputs of each module, whose gradients are taken later."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(self, name: str) -> Callable[..., Tensor]:
        def record(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if name in self.seen:
                raise KernelError(f"module {name!r} runs more than once in a forward pass: leave it out")
            if output.ndim < 2 or output.shape[0] != self.n:
                raise KernelError(
                    f"module {name!r} gives a tensor of shape {tuple(output.shape)} for {self.n} examples: "
                    "its examples are not on the first axis, leave it out of the target modules"
                )
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            self.seen[name] = (args[0].detach(), output)
            return output

        return record


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

    Padding is left out: its gradients are zero in a model that masks it. Memory is that of
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
        KernelError: If the model is not in eval mode, an adapter has B ≠ 0, a module is not reached by the outputs
            or runs twice, a gradient is not finite, the head has no linear output layer, or the positions are not
            0 … n-1.
    """
    check_eval_mode(adapted.model)
    trained = next((adapter.site.name for adapter in adapted.adapters if adapter.b is not None), None)
    if trained is not None:
        raise KernelError(f"the adapter of module {trained!r} has B ≠ 0: forecasts start from a new adapter")
    if not adapted.head:
        raise KernelError("no linear head trains, and a forecast needs one: use task_type='SEQ_CLS'")
    parts = [_batch(adapted, batch, reduction, storage) for batch in batches]
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


def _batch(adapted: AdaptedModel, batch: Batch, reduction: OutputReduction, storage: torch.dtype) -> _Part:
    n = len(batch.rows)
    recorder = _Recorder(n)
    head = list(adapted.head.items())
    modules = {adapter.site.name: adapter.module for adapter in adapted.adapters} | dict(head)
    handles = [module.register_forward_hook(recorder.hook(name)) for name, module in modules.items()]
    try:
        with frozen(adapted.model), torch.enable_grad():
            with adapted.forward():
                logits = adapted.model(**batch.inputs).logits
            gradients = _gradients(recorder, list(modules), logits, reduction)
    finally:
        for handle in handles:
            handle.remove()
    last = head[-1][0]
    mask = batch.inputs.get("attention_mask")
    kept: dict[tuple[int, torch.Size], Tensor] = {}  # modules that read the same tensor keep it once
    counts, inputs, grads = [], [], []
    for index, name in enumerate(modules):
        if name == last:
            continue
        h, _ = recorder.seen[name]
        keep = _positions(h, mask)
        counts.append(keep.sum(1))
        key = (h.data_ptr(), h.shape)
        if key not in kept:
            kept[key] = h.reshape(n, keep.shape[1], -1)[keep].to(storage)
        inputs.append(kept[key])
        # kept positions in the small type first: the padded gradients of all outputs are never side by side
        held = torch.stack([of_one[index].reshape(n, keep.shape[1], -1)[keep].to(storage) for of_one in gradients])
        if not bool(torch.isfinite(held.sum(dtype=torch.float32))):  # one pass: what is not finite stays so in a sum
            raise KernelError(f"the gradients of module {name!r} are not finite: use dtype float32")
        grads.append(held)
    return _Part(
        batch.rows.to(logits.device),
        counts,
        inputs,
        grads,
        _output_inputs(recorder.seen[last][0], gradients[0][-1]),
        logits.detach(),
    )


def _positions(h: Tensor, mask: Tensor | None) -> Tensor:
    """Which positions of a module's input are tokens: examples × positions."""
    n, width = h.shape[0], h.shape[1:-1].numel()
    if mask is not None and tuple(mask.shape) == (n, width):
        return mask.bool()
    return torch.ones(n, width, dtype=torch.bool, device=h.device)


def _gradients(
    recorder: _Recorder, names: Sequence[str], logits: Tensor, reduction: OutputReduction
) -> list[tuple[Tensor, ...]]:
    """For each of the k outputs its gradients with respect to the modules' outputs."""
    missing = next((name for name in names if name not in recorder.seen), None)
    if missing is not None:
        raise KernelError(f"module {missing!r} is not used in the forward pass: leave it out")
    directions = torch.as_tensor(reduction.directions, dtype=logits.dtype, device=logits.device)
    totals = (logits @ directions).sum(0)
    outputs = [recorder.seen[name][1] for name in names]
    found = [
        torch.autograd.grad(totals[k], outputs, retain_graph=k + 1 < reduction.n_outputs, allow_unused=True)
        for k in range(reduction.n_outputs)
    ]
    for name, *gradients in zip(names, *found, strict=True):
        if any(gradient is None for gradient in gradients):
            raise KernelError(f"the outputs do not depend on module {name!r}: leave it out")
    return found


def _output_inputs(h: Tensor, gradient: Tensor) -> Tensor:
    """Inputs φ of the output layer: where it runs over all positions, at the one that the model reads."""
    if h.ndim == 2:
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
