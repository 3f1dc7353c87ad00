"""Token factors: the full-weight gradients of every example, kept as the vectors that they are made of.

For an adapted module y_t = W h_t and a scalar output z_a of example i, with g_at = ∂z_a/∂y_t,

    ∂z_a/∂W = Σ_t g_at h_tᵀ        so that, for any change ΔW,  z_a changes by Σ_t g_at · ΔW h_t + O(ΔW²)

summed over the example's tokens. Every A, B, rank and placement can be read off these vectors: no further pass.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foretune.errors import KernelError
from foretune.models.adapted import AdaptedModel, Batch
from foretune.models.sites import Site
from foretune.ntk.capture import Receive, Uses, capture_in_turn
from foretune.ntk.features import TangentFeatures
from foretune.ntk.mapped import Mapped
from foretune.ntk.premises import check_new_adapters, sample_order
from foretune.tasks.outputs import OutputReduction


@dataclass(frozen=True)
class ModuleTokens:
    """Inputs and output gradients of one linear module, the positions of all n examples in a row.

    A module that runs several times in a pass (shared weights) has the positions of all its uses: the gradient of its
    weight is the sum over them.

    Attributes:
        starts: n + 1 positions: example i has positions starts[i] … starts[i+1] - 1.
        h: positions × d_in inputs; modules that read the same tensor share it.
        g: k × positions × d_out gradients of the k outputs.
    """

    starts: Int[Tensor, " bounds"]
    h: Float[Tensor, "positions d_in"]
    g: Float[Tensor, "k positions d_out"]

    def positions(self, rows: Int[Tensor, " m"]) -> tuple[Int[Tensor, " t"], Int[Tensor, " t"]]:
        """Find the positions of some examples.

        Args:
            rows: m examples.

        Returns:
            For each position its place 0 … m-1 among `rows`; where it stands in h and g.
        """
        first, counts = self.starts[rows], self.starts[rows + 1] - self.starts[rows]
        place = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
        begin = torch.cumsum(counts, 0) - counts
        return place, torch.arange(len(place), device=rows.device) - begin[place] + first[place]

    def of(
        self, rows: Int[Tensor, " m"], dtype: torch.dtype
    ) -> tuple[Int[Tensor, " t"], Float[Tensor, "t d_in"], Float[Tensor, "k t d_out"]]:
        """Gather the positions of some examples.

        Args:
            rows: m examples.
            dtype: Type to compute in.

        Returns:
            For each position its place 0 … m-1 among `rows`; inputs h; gradients g.
        """
        place, positions = self.positions(rows)
        return place, self.h.index_select(0, positions).to(dtype), self.g.index_select(1, positions).to(dtype)


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
        mapped: Where h and g lie, if not in memory.
    """

    sites: tuple[Site, ...]
    reduction: OutputReduction
    modules: tuple[ModuleTokens, ...]
    hidden: tuple[ModuleTokens, ...]
    inputs: Float[Tensor, "n p"]
    logits: Float[Tensor, "n classes"]
    mapped: Mapped | None = None

    def let_go(self) -> None:
        """Give the memory of factors in files back; what is needed again is read again."""
        if self.mapped is not None:
            self.mapped.let_go()

    @property
    def n(self) -> int:
        """Number of examples."""
        return int(self.logits.shape[0])


def adapter_features(factors: TokenFactors, rows: Sequence[Float[Tensor, "_ _"]], *, draws: int = 1) -> TangentFeatures:
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
        by_chunk = []
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
            by_chunk.append(left @ right)
            factors.let_go()
        blocks.append(torch.cat(by_chunk, dim=1))
    return TangentFeatures(
        factors.sites,
        factors.reduction,
        draws,
        tuple(blocks),
        (None,) * len(blocks),
        (None,) * len(blocks),
        (),
        factors.logits.to(rows[0].dtype),
    )


class KeepTokens:
    """Sink of a pass that keeps inputs and gradients of the positions that count, in a type of its own.

    Args:
        adapted: The model, with a head, whose last module is the output layer.
        n: Examples of the batch.
        reduction: Scalar outputs that are differentiated.
        storage: Type that the factors are kept in.
    """

    def __init__(self, adapted: AdaptedModel, n: int, reduction: OutputReduction, storage: torch.dtype) -> None:
        self._uses = {name: Uses(module, n) for name, module in adapted.modules.items()}
        self._output = list(adapted.head)[-1]
        self._reduction, self._storage = reduction, storage
        self._counts: list[Tensor] = []
        self._h: list[Tensor] = []
        self._reads: list[int] = []
        self._g: list[Tensor] = []
        self._inputs = torch.empty(0, 0)

    def use(self, module: str, h: Float[Tensor, "n positions d_in"], _: Float[Tensor, "n positions d_out"]) -> Receive:
        """As `foretune.ntk.capture.Sink.use`.

        Args:
            module: Name.
            h: Inputs.
            _: Outputs, which factors do without.

        Returns:
            What takes the gradients.
        """
        return self._uses[module].use(h)

    def finish(self) -> Iterator[tuple[str, Tensor]]:
        """As `foretune.ntk.capture.Sink.finish`.

        Yields:
            Module, and what is kept of it.
        """
        k = self._reduction.n_outputs
        self._inputs = self._uses.pop(self._output).read_inputs(self._reduction.directions[:, 0])
        kept: dict[tuple[object, ...], Tensor] = {}  # positions that count, for all modules that read the same tensors
        for uses in self._uses.values():
            counted = _positions(uses, k)
            kept[uses.key] = counted | kept[uses.key] if uses.key in kept else counted
        stored: dict[tuple[object, ...], int] = {}
        for name, uses in self._uses.items():
            keep = kept[uses.key]
            self._counts.append(keep.sum(1))
            if uses.key not in stored:  # modules that read the same tensors keep them once
                stored[uses.key] = len(self._h)
                self._h.append(uses.h[keep].to(self._storage))
                yield name, self._h[-1]
            self._reads.append(stored[uses.key])
            # kept positions in the small type first: the padded gradients of all outputs are never side by side
            self._g.append(torch.stack([uses.g(output)[keep].to(self._storage) for output in range(k)]))
            yield name, self._g[-1]
        self._uses.clear()  # inputs and gradients of all positions, padding included

    def part(self, rows: Int[Tensor, " n"], logits: Float[Tensor, "n classes"]) -> "TokenParts":
        """Give out what has come.

        Args:
            rows: Positions of the examples in the sample.
            logits: Outputs of the pass.

        Returns:
            Factors of the batch.
        """
        device = logits.device  # layers may lie on several
        for kept in (self._counts, self._h, self._g):
            kept[:] = [tensor.to(device) for tensor in kept]
        self._inputs = self._inputs.to(device)
        return TokenParts(rows.to(logits.device), self._counts, self._h, self._reads, self._g, self._inputs, logits)


def _positions(uses: Uses, n_outputs: int) -> Tensor:
    """Examples × positions that the outputs depend on: no padding in a model that masks it."""
    # a mask of the inputs would not tell: the sequence may be another, a decoder's or relative positions
    reached = (uses.g(0) != 0).any(-1)
    for output in range(1, n_outputs):
        reached |= (uses.g(output) != 0).any(-1)
    return torch.ones_like(reached) if reached.shape[1] == 1 else reached


@dataclass(frozen=True)
class TokenParts:
    """Factors of one batch, position by position: of each module the counts of its examples, inputs and gradients.

    `reads` says which of the inputs a module reads: several may read the same.
    """

    rows: Int[Tensor, " n"]
    counts: list[Tensor]
    h: list[Tensor]
    reads: list[int]
    g: list[Tensor]
    inputs: Float[Tensor, "n p"]
    logits: Float[Tensor, "n classes"]


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
    return join_tokens(adapted, reduction, token_parts(adapted, batches, reduction, storage=storage), n=n)


def token_parts(
    adapted: AdaptedModel,
    batches: Iterable[Batch],
    reduction: OutputReduction,
    *,
    storage: torch.dtype = torch.bfloat16,
    mapped: Mapped | None = None,
) -> list[TokenParts]:
    """Record the token factors of some of a sample's batches; `join_tokens` makes those of the sample of all of them.

    Args:
        adapted: As in `token_factors`.
        batches: Batches.
        reduction: Scalar outputs to differentiate.
        storage: Type that the factors are kept in.
        mapped: Where they are put batch by batch; None keeps them where they are.

    Returns:
        The factors batch by batch.

    Raises:
        KernelError: As `token_factors`, but for the positions.
    """
    check_new_adapters(adapted)
    if not adapted.head:
        raise KernelError("no linear head trains, and a forecast needs one: use task_type='SEQ_CLS'")
    return [
        sink.part(batch.rows[places], logits) if mapped is None else _put(sink.part(batch.rows[places], logits), mapped)
        for batch in batches
        for places, sink, logits in capture_in_turn(
            adapted, batch, reduction.directions, lambda m: KeepTokens(adapted, m, reduction, storage)
        )
    ]


def _put(part: TokenParts, mapped: Mapped) -> TokenParts:
    part = replace(part, h=[mapped.kept(h) for h in part.h], g=[mapped.kept(g) for g in part.g])
    mapped.let_go()
    return part


def join_tokens(
    adapted: AdaptedModel,
    reduction: OutputReduction,
    parts: Sequence[TokenParts],
    *,
    n: int,
    mapped: Mapped | None = None,
) -> TokenFactors:
    """Join the token factors of all batches of a sample; the parts are used up.

    Args:
        adapted: The model that they are of.
        reduction: Scalar outputs that were differentiated.
        parts: From `token_parts`, those of all batches in any order.
        n: Number of examples in all.
        mapped: Where they are put; None keeps them in memory.

    Returns:
        The factors, examples in the order of their positions.

    Raises:
        KernelError: If the positions are not 0 … n-1.
        StoreError: If the disk refuses.
    """
    order = sample_order(torch.cat([torch.empty(0, dtype=torch.long), *(part.rows.cpu() for part in parts)]), n)
    order = order.to(parts[0].rows.device)
    joined = _join(parts, order, mapped)
    n_sites = len(adapted.sites)
    return TokenFactors(
        sites=adapted.sites,
        reduction=reduction,
        modules=joined[:n_sites],
        hidden=joined[n_sites:],
        inputs=torch.cat([part.inputs for part in parts])[order],
        logits=torch.cat([part.logits for part in parts])[order],
        mapped=mapped,
    )


def _join(parts: Sequence[TokenParts], order: Tensor, mapped: Mapped | None) -> tuple[ModuleTokens, ...]:
    """Concatenate batches and bring the examples into order, module by module, freeing the parts as it goes."""
    joined: list[ModuleTokens] = []
    shared: dict[tuple[int, ...], Tensor] = {}  # by the inputs that a module reads in each part
    known: dict[tuple[int, ...], Tensor] = {}  # bounds, which most modules have in common
    readers = [tuple(part.reads[index] for part in parts) for index in range(len(parts[0].counts))]
    last_reader = {(number, read): index for index, reads in enumerate(readers) for number, read in enumerate(reads)}
    for index, reads in enumerate(readers):
        counts = torch.cat([part.counts[index] for part in parts])
        before = torch.cumsum(counts, 0) - counts
        sorted_counts, first = counts[order], before[order]
        starts = torch.cat([counts.new_zeros(1), torch.cumsum(sorted_counts, 0)])
        starts = known.setdefault(tuple(starts.tolist()), starts)
        place = torch.repeat_interleave(torch.arange(len(order), device=order.device), sorted_counts)
        positions = torch.arange(len(place), device=order.device) - starts[place] + first[place]
        into = torch.empty_like(positions)
        into[positions] = torch.arange(len(place), device=order.device)
        if reads not in shared:
            of_h = [part.h[read] for part, read in zip(parts, reads, strict=True)]
            shared[reads] = _placed(of_h, into, 0, mapped)
        g = _placed([part.g[index] for part in parts], into, 1, mapped)
        for number, (part, read) in enumerate(zip(parts, reads, strict=True)):
            part.g[index] = part.g[index].new_empty(0)
            if last_reader[number, read] == index:
                part.h[read] = part.h[read].new_empty(0)
        joined.append(ModuleTokens(starts, shared[reads], g))
    return tuple(joined)


def _placed(parts: Sequence[Tensor], into: Tensor, axis: int, mapped: Mapped | None) -> Tensor:
    """Put parts where their positions belong, one after the other."""
    shape = [*parts[0].shape[:axis], len(into), *parts[0].shape[axis + 1 :]]
    placed = parts[0].new_empty(shape) if mapped is None else mapped.empty(shape, parts[0].dtype)
    begin = 0
    for part in parts:
        end = begin + part.shape[axis]
        placed.index_copy_(axis, into[begin:end], part)
        begin = end
        if mapped is not None:
            mapped.let_go()
    return placed
