"""Gradient sketches of sequences: what one pass keeps of a language model, whatever the length of its sequences.

The factors of all positions of a language model do not fit into memory. For an adapted module y_t = W h_t and a number
z_a of sequence i, with g_at = ∂z_a/∂y_t, what is kept is

    C_ia = Q_gᵀ (Σ_t g_at h_tᵀ) Q_h          q_g × q_h

with the orthonormal columns of Q_h and Q_g the principal directions of h and g on the first sequences, those of h
weighted by ‖g_t‖ and the other way round. A change s B A of W changes z_a by s ⟨C_ia, (Q_gᵀ B)(A Q_h)⟩ + O(B²): exactly
to first order where q is not less than the width, else what leaves the directions is lost; `kept` says how much.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foretune.errors import KernelError
from foretune.models.adapted import AdaptedModel
from foretune.models.sites import Site
from foretune.ntk.capture import Receive
from foretune.ntk.premises import check_eval_mode, check_finite, check_new_adapters, sample_order
from foretune.ntk.sequence_losses import SequenceBatch
from foretune.ntk.sequence_pass import pass_sequences, positions_of

TOKENS = 512  # positions of the first sequences that the directions are found on
SMALLEST = 4  # directions of a module


@dataclass(frozen=True)
class Basis:
    """Directions that a module's inputs and gradients are kept in.

    Attributes:
        h: d_in × q_h orthonormal columns.
        g: d_out × q_g orthonormal columns.
    """

    h: Float[Tensor, "d_in q_h"]
    g: Float[Tensor, "d_out q_g"]


@dataclass(frozen=True)
class SequenceSketches:
    """Sketches of n sequences.

    Attributes:
        sites: Adapted modules.
        bases: Directions of each.
        sketches: n × k × q_g × q_h of each; output 0 is the loss, the others those of drawn labels.
        place: For each target of all sequences its sequence, in order.
        target_losses: −log p of each target before training, in nats.
        right: Whether each target is the likeliest token before training.
        kept: For each site the share Σ_i ‖C_i0‖² / Σ_i ‖∂z⁰_i/∂W‖² of the gradients' energy that is kept.
    """

    sites: tuple[Site, ...]
    bases: tuple[Basis, ...]
    sketches: tuple[Float[Tensor, "n k _ _"], ...]
    place: Int[Tensor, " targets"]
    target_losses: Float[Tensor, " targets"]
    right: Tensor
    kept: tuple[float, ...]

    @property
    def n(self) -> int:
        """Number of sequences."""
        return int(self.sketches[0].shape[0])

    @property
    def draws(self) -> int:
        """Draws S of the labels."""
        return int(self.sketches[0].shape[1]) - 1

    @property
    def shares(self) -> tuple[float, float]:
        """`kept`: its mean over the sites, and the least."""
        return sum(self.kept) / len(self.kept), min(self.kept)

    @property
    def targets(self) -> Float[Tensor, " n"]:
        """Targets of each sequence."""
        return torch.bincount(self.place, minlength=self.n).to(self.target_losses.dtype)

    @property
    def losses(self) -> Float[Tensor, " n"]:
        """Loss ℓ_i of each sequence before training, summed over its targets."""
        return self.target_losses.new_zeros(self.n).index_add(0, self.place, self.target_losses)


def sketch_width(sites: Sequence[Site], n: int, draws: int, memory: int) -> int:
    """Find how many directions fit into memory.

    Args:
        sites: Adapted modules.
        n: Sequences in all.
        draws: Draws S.
        memory: Bytes.

    Returns:
        The largest multiple of 8 with 2 · n · (1 + S) · Σ_m min(q, d_in) · min(q, d_out) bytes at most.

    Raises:
        KernelError: If not even the least fit.
    """

    def needed(q: int) -> int:
        return 2 * n * (1 + draws) * sum(min(q, site.d_in) * min(q, site.d_out) for site in sites)

    widest = max(max(site.d_in, site.d_out) for site in sites)
    q = min(widest, max(8, isqrt(memory // max(1, 2 * n * (1 + draws) * len(sites)))) // 8 * 8)
    while q < widest and needed(q + 8) <= memory:  # narrow modules leave room
        q += 8
    if needed(min(q, widest)) > memory:
        raise KernelError(
            f"{n} sequences and {len(sites)} modules need {needed(min(q, widest)) / 2**30:.2g} GiB at least, and "
            f"{memory / 2**30:.2g} are given: raise the memory, or lower the samples"
        )
    return min(q, widest)


def find_bases(adapted: AdaptedModel, batches: Iterable[SequenceBatch], q: int, *, seed: int = 0) -> tuple[Basis, ...]:
    """Find the principal directions of inputs and gradients of the loss, from one pass over some sequences.

    Of h_t ‖g_t‖ and of g_t ‖h_t‖ the q directions with the largest singular values, without centring, by subspace
    iteration; a module that is no wider than q keeps all.

    Args:
        adapted: Model in eval mode with its adapters, which must have B = 0.
        batches: Sequences; of their positions 512 at most are used, spread evenly, of an encoder-decoder as many of its
            encoder's.
        q: Directions at most.
        seed: Of the positions that are used.

    Returns:
        One for each site.
    """
    check_eval_mode(adapted.model)
    check_new_adapters(adapted)
    kept_h: dict[str, list[Tensor]] = {site.name: [] for site in adapted.sites}
    kept_g: dict[str, list[Tensor]] = {site.name: [] for site in adapted.sites}
    batches = list(batches)
    for batch, chosen in zip(batches, _choose(batches, seed), strict=True):

        def on_use(name: str, h: Tensor, _: Tensor, chosen: dict[int, Tensor] = chosen) -> Receive:
            mask = chosen[h.shape[1]]
            of_h = h[mask]

            def receive(__: int, g: Tensor) -> None:
                kept_h[name].append(of_h)
                kept_g[name].append(g[mask])

            return receive

        pass_sequences(adapted, batch, 0, on_use, seed=seed)
    bases = []
    for site in adapted.sites:
        h, g = torch.cat(kept_h.pop(site.name)), torch.cat(kept_g.pop(site.name))
        h, g = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (h, g))
        of_h, of_g = h.norm(dim=1, keepdim=True), g.norm(dim=1, keepdim=True)
        bases.append(Basis(_principal(h * of_g, q), _principal(g * of_h, q)))
    return tuple(bases)


def _choose(batches: Sequence[SequenceBatch], seed: int) -> list[dict[int, Tensor]]:
    """Of the positions that reach a loss about `TOKENS`, at random; of the decoder's and of the encoder's each."""
    reaching = [positions_of(batch) for batch in batches]
    sides = max(map(len, reaching), default=1)
    reached = sum(int(mask.sum()) for each in reaching for mask in each.values())
    share = min(1.0, sides * TOKENS / max(1, reached))
    found = []
    for number, each in enumerate(reaching):
        generator = torch.Generator().manual_seed(seed + number)
        drawn = {length: torch.rand(mask.shape, generator=generator) <= share for length, mask in each.items()}
        found.append({length: mask & drawn[length].to(mask.device) for length, mask in each.items()})
    return found


def _principal(x: Tensor, q: int) -> Tensor:
    """Basis of the q leading right singular vectors of positions × width; of all the space where it is no wider.

    By three steps of subspace iteration from random directions, 8 more than are kept: an exact decomposition of every
    module would take longer than the pass.

    Returns:
        Orthonormal columns.
    """
    width = x.shape[1]
    if width <= q:
        return torch.eye(width, dtype=x.dtype, device=x.device)
    x = x / x.abs().max().clamp(min=torch.finfo(x.dtype).tiny)
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(width, min(width, q + 8), generator=generator).to(x)
    for _ in range(3):
        found = torch.linalg.qr(x.T @ (x @ torch.linalg.qr(found).Q) + 1e-6 * found).Q  # never of less rank
    turn = torch.linalg.eigh((x @ found).T @ (x @ found)).eigenvectors[:, -q:]
    basis: Tensor = found @ turn
    return basis


def sketch_sequences(
    adapted: AdaptedModel,
    batches: Iterable[SequenceBatch],
    bases: Sequence[Basis],
    *,
    n: int,
    draws: int,
    seed: int = 0,
    storage: torch.dtype = torch.bfloat16,
) -> SequenceSketches:
    """Take the sketches of a sample: one forward pass, and one backward pass for the loss and for each draw.

    Args:
        adapted: Model in eval mode with its adapters, which must have B = 0.
        batches: Batches that together hold every row 0 … n−1 once, in any order.
        bases: From `find_bases`.
        n: Sequences in all.
        draws: Draws S of the labels.
        seed: Of the draws.
        storage: Type that the sketches are kept in; bfloat16 is within 0.4% of each number.

    Returns:
        The sketches, sequences in the order of their rows.

    Raises:
        KernelError: If the model is not in eval mode, an adapter has B ≠ 0, a module does not see sequences or is not
            reached by the loss, something is not finite, or the rows are not 0 … n−1.
    """
    parts = sketch_parts(adapted, batches, bases, draws=draws, seed=seed, storage=storage)
    return join_sketches(adapted.sites, bases, [parts], n=n)


@dataclass(frozen=True)
class SketchParts:
    """Sketches of some of a sample's sequences, batch by batch.

    Attributes:
        rows: Positions of the sequences.
        sketches: For each site those of each batch.
        place: For each target its sequence.
        target_losses: −log p of each target.
        right: Whether each target is the likeliest token.
        held: For each site Σ_i ‖C_i0‖² over these sequences.
        whole: For each site Σ_i ‖∂z⁰_i/∂W‖².
    """

    rows: list[Tensor]
    sketches: list[list[Tensor]]
    place: list[Tensor]
    target_losses: list[Tensor]
    right: list[Tensor]
    held: Tensor
    whole: Tensor


def sketch_parts(
    adapted: AdaptedModel,
    batches: Iterable[SequenceBatch],
    bases: Sequence[Basis],
    *,
    draws: int,
    seed: int = 0,
    storage: torch.dtype = torch.bfloat16,
) -> SketchParts:
    """Take the sketches of some of a sample's batches; `join_sketches` makes those of the sample of all of them.

    Args:
        adapted: As in `sketch_sequences`.
        batches: Batches.
        bases: From `find_bases`.
        draws: Draws S of the labels.
        seed: Of the draws.
        storage: Type that the sketches are kept in.

    Returns:
        The sketches.

    Raises:
        KernelError: As `sketch_sequences`, but for the rows.
    """
    check_eval_mode(adapted.model)
    check_new_adapters(adapted)
    by_name = dict(zip((site.name for site in adapted.sites), bases, strict=True))
    number = {name: index for index, name in enumerate(by_name)}
    held, whole = (torch.zeros(len(by_name), dtype=torch.float64) for _ in range(2))
    parts = SketchParts([], [[] for _ in by_name], [], [], [], held, whole)
    for batch in batches:
        size = len(batch.rows)
        sums = {
            name: torch.zeros(size, 1 + draws, b.g.shape[1], b.h.shape[1], dtype=b.h.dtype, device=batch.labels.device)
            for name, b in by_name.items()
        }

        def on_use(name: str, h: Tensor, _: Tensor, sums: dict[str, Tensor] = sums) -> Receive:
            basis = by_name[name]
            of_h = h.to(basis.h.dtype) @ basis.h

            def receive(output: int, g: Tensor) -> None:
                g = g.to(basis.g.dtype)
                sums[name][:, output] += (g @ basis.g).mT @ of_h
                if output == 0:  # ‖Σ_t g_t h_tᵀ‖² = Σ_tu (g_t · g_u)(h_t · h_u)
                    whole[number[name]] += float(((g @ g.mT) * (h.to(g.dtype) @ h.to(g.dtype).mT)).sum())

            return receive

        losses = pass_sequences(adapted, batch, draws, on_use, seed=seed)
        for name, total in sums.items():
            check_finite(f"the gradients of module {name!r}", total)
            held[number[name]] += float(total[:, 0].double().square().sum())
            parts.sketches[number[name]].append(total.to(storage))
        parts.rows.append(batch.rows.cpu())
        parts.place.append(batch.rows.to(losses.place.device)[losses.place])
        parts.target_losses.append(losses.target_losses)
        parts.right.append(losses.right)
    return parts


def join_sketches(
    sites: tuple[Site, ...], bases: Sequence[Basis], parts: Sequence[SketchParts], *, n: int
) -> SequenceSketches:
    """Join the sketches of all batches of a sample; the parts are used up.

    Args:
        sites: Adapted modules.
        bases: Directions of each.
        parts: From `sketch_parts`, together of every sequence once.
        n: Sequences in all.

    Returns:
        The sketches, sequences in the order of their rows.

    Raises:
        KernelError: If the rows are not 0 … n−1.
    """
    rows = [rows for part in parts for rows in part.rows]
    order = sample_order(torch.cat([torch.empty(0, dtype=torch.long), *rows]), n)
    where = torch.cat([place for part in parts for place in part.place])
    by_row = torch.argsort(where, stable=True)
    sketches = []
    for site in range(len(sites)):
        sketches.append(torch.cat([batch for part in parts for batch in part.sketches[site]])[order.to(where.device)])
        for part in parts:
            part.sketches[site].clear()
    held, whole = (torch.stack(sums).sum(0) for sums in zip(*((p.held, p.whole) for p in parts), strict=True))
    kept = held / whole.clamp(min=torch.finfo(torch.float64).tiny)
    return SequenceSketches(
        sites,
        tuple(bases),
        tuple(sketches),
        where[by_row],
        torch.cat([losses for part in parts for losses in part.target_losses])[by_row],
        torch.cat([right for part in parts for right in part.right])[by_row],
        tuple(kept.tolist()),
    )
