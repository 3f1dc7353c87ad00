"""The quick score of many candidates from the blocks of their modules alone: no candidate costs a pass or a run."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from foretune.arrays import Array
from foretune.errors import KernelError
from foretune.models.sites import Site
from foretune.ranking.candidates import Candidate
from foretune.report.provenance import usable_cores

SHARE = 0.01  # of the mean diagonal of all modules together at the largest rank: the ridge of every candidate
CHUNK = 32_000_000  # float64 numbers in memory at a time by all threads together


@dataclass(frozen=True)
class Blocks:
    """Kernels of every module between n samples, averaged over draws of A.

    Attributes:
        sites: Every module that can be adapted, at the largest rank.
        ranks: Increasing ranks that can be priced; the last is the largest.
        steps: M × P × n × n: module, and the part that the rows of A between one rank and the next add.
        residual: n × C targets less what the cross-fitted probe says, such as one-hot labels less its softmax.
    """

    sites: tuple[Site, ...]
    ranks: tuple[int, ...]
    steps: Array
    residual: Array

    def weights(self, candidates: Sequence[Candidate]) -> Array:
        """Say how much of each block is in each candidate's kernel.

        Args:
            candidates: Placements.

        Returns:
            (candidates) × (M·P): 0, or (R/r)^e for the rows of A that rank r keeps, R the largest rank and e the
            module's `rank_exponent`.

        Raises:
            KernelError: If a rank was not kept.
        """
        table = np.zeros((len(candidates), len(self.sites), len(self.ranks)))
        for row, candidate in zip(table, candidates, strict=True):
            if candidate.rank not in self.ranks:
                raise KernelError(f"rank {candidate.rank} was not kept, only {list(self.ranks)}")
            kept = self.ranks.index(candidate.rank) + 1
            for position in candidate.sites:
                site = self.sites[position]
                row[position, :kept] = (site.rank / candidate.rank) ** site.rank_exponent
        return table.reshape(len(candidates), -1)

    def kernels(self, candidates: Sequence[Candidate]) -> Array:
        """Add up the kernels of candidates.

        Args:
            candidates: Placements.

        Returns:
            (candidates) × n × n.
        """
        n = self.steps.shape[-1]
        return np.asarray((self.weights(candidates) @ self.steps.reshape(-1, n * n)).reshape(-1, n, n))


def quick_scores(blocks: Blocks, candidates: Sequence[Candidate]) -> Array:
    """Score candidates by the share of the probe's squared error that they predict away, each sample by the others.

    1 − Σ_i ‖e_i‖² / Σ_i ‖ỹ_i‖² with e_i = [G⁻¹ỹ]_i / [G⁻¹]_ii, G = K_S + δI and ỹ the residual of the cross-fitted
    probe. δ is a hundredth of the mean diagonal of the kernel of all modules at the largest rank, the same for every
    candidate: an adapter whose kernel is small against it moves the outputs little in a run of any given length.

    Args:
        blocks: Kernels of the modules.
        candidates: Placements.

    Returns:
        A score for each, at most 1; 0 for a kernel that predicts nothing.
    """
    n = blocks.steps.shape[-1]
    whole = Candidate(tuple(range(len(blocks.sites))), blocks.ranks[-1])
    ridge = SHARE * float(np.trace(blocks.kernels([whole])[0])) / n
    total = float(np.sum(blocks.residual**2))
    if ridge <= 0.0 or total == 0.0:
        return np.zeros(len(candidates))

    def score(part: slice) -> Array:
        return _share_predicted(blocks.kernels(candidates[part]), blocks.residual, ridge)

    threads = usable_cores()
    size = max(1, CHUNK // (3 * n * n * threads))
    parts = [slice(start, start + size) for start in range(0, len(candidates), size)]
    # One matrix to a thread: threads that share so small an inverse wait for each other far longer than they work,
    # a hundred times longer where another process wants the same cores.
    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        return np.concatenate([np.empty(0), *pool.map(score, parts)])


def kernel_scores(kernels: Array, residual: Array) -> Array:
    """Score kernels that are there, those of one method's placements, as `quick_scores` does those of modules.

    Args:
        kernels: (placements) × n × n.
        residual: n × C, as in `Blocks`.

    Returns:
        A score for each; δ is a hundredth of the largest of their mean diagonals, the same for all.
    """
    ridge = SHARE * float(np.trace(kernels, axis1=1, axis2=2).max()) / kernels.shape[-1]
    if ridge <= 0.0 or float(np.sum(residual**2)) == 0.0:
        return np.zeros(len(kernels))
    return _share_predicted(kernels.copy(), residual, ridge)


def _share_predicted(kernels: Array, residual: Array, ridge: float) -> Array:
    """1 − Σ_i ‖e_i‖² / Σ_i ‖ỹ_i‖² of every kernel, which the ridge is added to in place."""
    n = kernels.shape[-1]
    kernels[:, np.arange(n), np.arange(n)] += ridge
    inverse = np.linalg.inv(kernels)
    error = (inverse @ residual) / np.diagonal(inverse, axis1=1, axis2=2)[..., None]
    return np.asarray(1.0 - np.sum(error**2, axis=(1, 2)) / np.sum(residual**2))
