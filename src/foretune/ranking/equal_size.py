"""Adapters of one size: every placement gets the rank that brings it nearest to a number of parameters.

All adapters are then compared where their sizes say nothing. The kernels of every rank are kept beside each other, so
the ranks of all placements together are few.
"""

from collections.abc import Sequence

import numpy as np

from foretune.arrays import Array
from foretune.errors import ConfigError
from foretune.models.sites import Site
from foretune.ranking.budget import n_parameters
from foretune.ranking.candidates import Candidate, label

NEAR = 0.15  # of the size, at most, that a placement misses it by
MOST_RANK = 64
MOST_RANKS = 12  # different ones: a block of kernels for each


def equal_sizes(placements: Sequence[Candidate], sites: Sequence[Site], size: int) -> tuple[Candidate, ...]:
    """Give every placement the rank that brings it nearest to a number of parameters.

    Where the nearest ranks are more than 12 different ones, those that are missed least are given up one by one, and
    their placements take the nearest that is left.

    Args:
        placements: Placements; their own ranks do not count.
        sites: Every module that can be adapted.
        size: Trainable parameters.

    Returns:
        Those that come within 15 % of the size at a rank from 1 to 64 that all their modules can carry, in their
        order.

    Raises:
        ConfigError: If there is none, naming the nearest.
    """
    costs = np.array([n_parameters(Candidate(one.sites, 1), sites) for one in placements])
    widths = np.array([min(min(sites[at].d_in, sites[at].d_out) for at in one.sites) for one in placements])
    ranks = np.arange(1, MOST_RANK + 1)
    error = np.abs(costs[:, None] * ranks / size - 1.0)
    error[ranks > widths[:, None]] = np.inf
    reachable = error.min(axis=1) <= NEAR
    if not reachable.any():
        raise ConfigError(_nothing(placements, sites, error, size))
    error[error > NEAR] = np.inf
    kept = _few(error[reachable])
    chosen = np.array(kept)[error[:, kept].argmin(axis=1)]
    within = np.isfinite(error[:, kept].min(axis=1))
    return tuple(
        Candidate(one.sites, int(ranks[at])) for one, at, near in zip(placements, chosen, within, strict=True) if near
    )


def missed(left_out: int, listed: int, size: int) -> tuple[str, ...]:
    """Say how many placements cannot be brought to a size.

    Args:
        left_out: How many.
        listed: Of how many.
        size: Trainable parameters.

    Returns:
        One sentence; none where none is left out.
    """
    if left_out == 0:
        return ()
    verb = "comes" if left_out == 1 else "come"
    return (
        f"Left out: {left_out:,} of {listed:,} placements {verb} within {NEAR:.0%} of {size:,} parameters at no rank "
        f"from 1 to {MOST_RANK} that is priced.",
    )


def _few(error: Array) -> list[int]:
    """Columns to keep: those of the least errors, given up one by one where they are more than `MOST_RANKS`."""
    kept = sorted(set(error.argmin(axis=1).tolist()))
    rows, counts = np.unique(error, axis=0, return_counts=True)

    def lost(column: int) -> tuple[float, float]:
        best = rows[:, [other for other in kept if other != column]].min(axis=1)
        out = ~np.isfinite(best)
        return float(counts[out].sum()), float(counts[~out] @ best[~out])

    while len(kept) > MOST_RANKS:
        kept.remove(min(kept, key=lost))
    return kept


def _nothing(placements: Sequence[Candidate], sites: Sequence[Site], error: Array, size: int) -> str:
    at, column = np.unravel_index(int(error.argmin()), error.shape)
    nearest = Candidate(placements[int(at)].sites, int(column) + 1)
    return (
        f"equal_size = {size:,} parameters: no placement comes within {NEAR:.0%} of it at a rank from 1 to {MOST_RANK} "
        f"that its modules can carry; the nearest, {label(nearest, sites)!r}, has {n_parameters(nearest, sites):,}"
    )
