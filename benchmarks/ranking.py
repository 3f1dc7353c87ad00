"""Seconds to price 10,000 candidates from the blocks of a 12-layer model's 72 linear modules, after the pass."""

import os
import time

import numpy as np

from foretune.models.sites import Site
from foretune.ranking.candidates import Candidate
from foretune.ranking.quick_score import Blocks, quick_scores

LAYERS, COUNT, RANKS = 12, 10_000, (2, 4, 8, 16)
KINDS = {"query": (768, 768), "key": (768, 768), "value": (768, 768), "out": (768, 768), "up": (768, 3072)}
KINDS |= {"down": (3072, 768)}


def main() -> None:
    """Time the quick scores of random sets of modules at random ranks, for three sample sizes."""
    sites = tuple(
        Site(f"layer.{layer}.{kind}", layer, kind, d_in, d_out, RANKS[-1], 1.0)
        for layer in range(LAYERS)
        for kind, (d_in, d_out) in KINDS.items()
    )
    random = np.random.default_rng(0)
    candidates = [
        Candidate(tuple(random.choice(len(sites), size=random.integers(1, len(sites)), replace=False)), int(rank))
        for rank in random.choice(RANKS, size=COUNT)
    ]
    print(f"{COUNT:,} candidates, {len(sites)} modules, ranks {RANKS}, {os.cpu_count()} cores")
    for n in (32, 128, 256):
        factors = random.normal(size=(len(sites), len(RANKS), n, 16))
        blocks = Blocks(sites, RANKS, factors @ factors.swapaxes(-1, -2), random.normal(size=(n, 2)))
        start = time.perf_counter()
        quick_scores(blocks, candidates)
        print(f"{n:4d} samples  {time.perf_counter() - start:6.2f} s")


if __name__ == "__main__":
    main()
