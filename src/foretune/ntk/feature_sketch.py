"""Sketches of tangent features: a random projection of all of a kernel row's features onto few numbers.

Every coordinate of the features is added, with a random sign, to one number of each half of the sketch (Charikar, Chen
and Farach-Colton 2004; Weinberger et al. 2009). With S the matrix of these signs, E[S Sᵀ] = I and

    K̂ = φ S Sᵀ φᵀ,        E[K̂] = K,        Var[K̂_ij] ≤ (K_ii K_jj + K_ij²) / k

The two halves are independent, and their kernels tell how far K̂ is from K without K: E‖K̂ − K‖² = E‖K̂_1 − K̂_2‖² / 4.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from foretune.models.sites import Site
from foretune.ntk.features import TangentFeatures


def feature_width(sites: Iterable[Site], *, of_a: bool, outputs: int) -> int:
    """Count the features of one row of the kernel.

    Args:
        sites: Adapted modules.
        of_a: Whether there are gradients with respect to A.
        outputs: Scalar outputs whose features one row joins: k, but 1 where each keeps its own row.

    Returns:
        Numbers for each draw of A.
    """
    one = sum(site.rank * (site.d_out + (site.d_in if of_a else 0)) + site.others for site in sites)
    return one * outputs


def sketch_sites(sites: Iterable[Site], width: int) -> tuple[Site, ...]:
    """Describe the two halves of a sketch as sites of a kernel.

    Args:
        sites: The adapted modules.
        width: Numbers k of the sketch.

    Returns:
        Two sites of rank 1.
    """
    count = len(tuple(sites))
    return tuple(
        Site(f"half {half} of a sketch of {count} modules", None, "sketch", 0, width // 2, 1, 1.0) for half in (1, 2)
    )


def sketched(features: TangentFeatures, width: int, *, seed: int) -> TangentFeatures:
    """Replace the features of the sites by their sketch; those of the head stay.

    Args:
        features: Features of n examples.
        width: Numbers k of the sketch, even.
        seed: Of buckets and signs.

    Returns:
        Features with two sites, whose kernels add up to K̂ and are, doubled, the kernels of the two halves.
    """
    halves = tuple(_half(features, width // 2, seed, half) / 2**0.5 for half in (0, 1))
    none = (None, None)
    return replace(features, sites=sketch_sites(features.sites, width), b=halves, a=none, v=none)


def _half(features: TangentFeatures, width: int, seed: int, half: int) -> Tensor:
    """Sketch of half of the width: k × n × D × width for a block kernel, else k joined into the first of k outputs."""
    first = features.logits
    block, k, n = features.reduction.block, features.reduction.n_outputs, features.n
    dtype = torch.promote_types(first.dtype, torch.float32)  # sums of many numbers
    total = first.new_zeros(k if block else 1, n, features.draws, width, dtype=dtype)
    for index, site in enumerate(features.sites):
        of_draws = features.b[index].unflatten(2, (features.draws, site.rank)).flatten(3)
        parts = (of_draws, _shared(features.a[index]), _shared(features.v[index]))
        for kind, part in enumerate(parts):
            if part is None or part.numel() == 0:
                continue
            rows = part if block else part.permute(1, 2, 0, 3).flatten(2)[None]  # the outputs of a row are joined
            total += _scattered(rows.to(dtype), width, generator_of(seed, half, index, kind)).to(total.device)
    return total if block else torch.cat([total, total.new_zeros(k - 1, *total.shape[1:])])


def _shared(part: Tensor | None) -> Tensor | None:
    """Lay gradients that all draws of A share out as those of one."""
    return None if part is None else part.flatten(2).unsqueeze(2)


def _scattered(rows: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Add every column, with its sign, to the column of its bucket."""
    columns = rows.shape[-1]
    buckets = torch.randint(width, (columns,), generator=generator).to(rows.device)
    target = rows.new_zeros(*rows.shape[:-1], width)
    return target.index_add_(rows.ndim - 1, buckets, rows * signs(generator, columns).to(rows))


def signs(generator: torch.Generator, count: int) -> Float[Tensor, " count"]:
    """Draw random signs.

    Args:
        generator: Source.
        count: How many.

    Returns:
        −1 and 1.
    """
    return (2 * torch.randint(2, (count,), generator=generator) - 1).float()


def generator_of(seed: int, half: int, index: int, kind: int) -> torch.Generator:
    """Make the source of the random numbers of one place of a sketch.

    Args:
        seed: Of the sketch.
        half: 0 or 1.
        index: Number of the site.
        kind: Which of its parts, 0 … 3.

    Returns:
        A generator of its own for every place; torch takes seeds of 64 bits.
    """
    return torch.Generator().manual_seed(((seed * 2 + half) * 2**20 + index) * 4 + kind)


def sketch_error(parts: Iterable[TangentFeatures]) -> tuple[float, ...]:
    """Estimate ‖K̂ − K‖ / ‖K̂‖ in Frobenius norm from the two halves of a sketch.

    Args:
        parts: Sketched features of all examples, in tiles.

    Returns:
        One estimate for each draw of A.
    """
    grams: Tensor | None = None
    for features in parts:
        both = torch.stack([half.movedim(2, 0).flatten(1, 2) for half in features.b]).double()  # 2 × D × rows × width
        if not features.reduction.block:
            both = both[:, :, : features.n]  # all else is 0
        found = torch.einsum("adrp,bdrq->dabpq", both, both)
        grams = found if grams is None else grams + found
    assert grams is not None
    squares = grams.square().sum((-1, -2))
    apart = squares[:, 0, 0] + squares[:, 1, 1] - squares[:, 0, 1] - squares[:, 1, 0]
    whole = squares.sum((1, 2))
    return tuple((apart.clamp(min=0.0) / whole.clamp(min=torch.finfo(torch.float64).tiny)).sqrt().tolist())
