"""Search over sets of single modules under a budget, by any score that takes many candidates at once.

Every step scores all its new sets in one call; no set is scored twice.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foretune.errors import ConfigError, PlacementError
from foretune.models.sites import Site
from foretune.ranking.budget import Budget, misfit
from foretune.ranking.candidates import Candidate, check_ranks

Score = Callable[[Sequence[Candidate]], NDArray[np.float64]]

LIMIT = 20_000
PATIENCE = 3


@dataclass(frozen=True)
class Scored:
    """A candidate with its score.

    Attributes:
        candidate: Placement.
        score: Higher is better; −∞ where the score was no number.
    """

    candidate: Candidate
    score: float


@dataclass(frozen=True)
class SearchResult:
    """What a search has scored.

    Attributes:
        scored: Every candidate that was scored, all within the budget, best first; of equal scores the one with
            fewer parameters first, then the one whose modules come first.
        complete: Whether the search ended by itself, not at its limit of evaluations.
    """

    scored: tuple[Scored, ...]
    complete: bool

    @property
    def best(self) -> Scored:
        """The best candidate."""
        return self.scored[0]


class _Scores:
    # What was scored so far, and the only place that calls the score.
    def __init__(self, score: Score, sites: Sequence[Site], budget: Budget | None, limit: int) -> None:
        if limit < 1:
            raise ConfigError(f"limit = {limit}: must be at least 1 evaluation")
        self._score, self._sites, self._budget, self._limit = score, sites, budget, limit
        self._cost = [site.d_in + site.d_out for site in sites]
        self.of: dict[Candidate, float] = {}
        self.complete = True

    def size(self, candidate: Candidate) -> int:
        return candidate.rank * sum(self._cost[position] for position in candidate.sites)

    def fits(self, candidate: Candidate) -> bool:
        return self._budget is None or self.size(candidate) <= self._budget.parameters

    def order(self, candidate: Candidate) -> tuple[float, int, tuple[int, ...], int]:
        # best first
        return (-self.of[candidate], self.size(candidate), candidate.sites, candidate.rank)

    def evaluate(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        # Score what is new and fits, in one call; of what was asked for, return what has a score, best first.
        asked = list(dict.fromkeys(candidate for candidate in candidates if self.fits(candidate)))
        new = [candidate for candidate in asked if candidate not in self.of]
        room = self._limit - len(self.of)
        if len(new) > room:
            self.complete = False
            new = sorted(new, key=lambda candidate: (self.size(candidate), candidate.sites, candidate.rank))[:room]
        if new:
            scores = np.asarray(self._score(new), dtype=np.float64)
            if scores.shape != (len(new),):
                raise ValueError(f"score gave an array of shape {scores.shape} for {len(new)} candidates")
            self.of.update(zip(new, np.where(np.isnan(scores), -np.inf, scores).tolist(), strict=True))
        return sorted((candidate for candidate in asked if candidate in self.of), key=self.order)

    def result(self) -> SearchResult:
        ordered = sorted(self.of, key=self.order)
        return SearchResult(tuple(Scored(candidate, self.of[candidate]) for candidate in ordered), self.complete)


def _positions(sites: Sequence[Site]) -> range:
    if not sites:
        raise PlacementError("no module to search among: the model has none that can be adapted")
    return range(len(sites))


def _with_more(candidate: Candidate, positions: Sequence[int]) -> list[Candidate]:
    adapted = set(candidate.sites)
    return [Candidate((*candidate.sites, new), candidate.rank) for new in positions if new not in adapted]


def greedy(
    score: Score,
    sites: Sequence[Site],
    *,
    ranks: Sequence[int],
    budget: Budget | None = None,
    limit: int = LIMIT,
) -> SearchResult:
    """Add the best module again and again, then clean up by dropping, adding and swapping single modules.

    For each rank apart, and all ranks in the same calls of the score: the way up takes in each step the module with
    which the set scores best, and ends where nothing more fits or 3 steps in a row brought no better set. From the
    best set on the way, the clean-up goes to the best set that differs by one module more, less or another, as
    long as that is better.

    Args:
        score: Scores of many candidates, shape (number of candidates,); higher is better.
        sites: Every module that can be adapted.
        ranks: Ranks.
        budget: Budget; None for no bound on size.
        limit: Candidates that are scored at most; the smallest ones of the step in which it is reached.

    Returns:
        Every candidate that was scored.

    Raises:
        ConfigError: If nothing fits the budget, or the limit is below 1.
        PlacementError: If there is no module, or a rank is below 1 or above the width of a module.
    """
    positions = _positions(sites)
    wanted = check_ranks(ranks, sites)
    scores = _Scores(score, sites, budget, limit)
    first = [Candidate((position,), rank) for rank in wanted for position in positions]
    _check_fits(scores, first, sites, budget)
    front = _best_by_rank(scores, scores.evaluate(first))
    best, stale = dict(front), dict.fromkeys(front, 0)
    while front and scores.complete:
        expansions = [bigger for candidate in front.values() for bigger in _with_more(candidate, positions)]
        front = _best_by_rank(scores, scores.evaluate(expansions))
        for rank, candidate in list(front.items()):
            better = scores.of[candidate] > scores.of[best[rank]]
            stale[rank] = 0 if better else stale[rank] + 1
            best[rank] = candidate if better else best[rank]
            if stale[rank] == PATIENCE:
                del front[rank]
    _clean_up(scores, best, positions)
    return scores.result()


def _best_by_rank(scores: _Scores, ordered: Sequence[Candidate]) -> dict[int, Candidate]:
    best: dict[int, Candidate] = {}
    for candidate in ordered:
        best.setdefault(candidate.rank, candidate)
    return {rank: best[rank] for rank in sorted(best)}


def _clean_up(scores: _Scores, best: dict[int, Candidate], positions: Sequence[int]) -> None:
    active = dict(best)
    while active and scores.complete:
        neighbours = [near for candidate in active.values() for near in _neighbours(candidate, positions)]
        nearest = _best_by_rank(scores, scores.evaluate(neighbours))
        active = {
            rank: nearest[rank]
            for rank, candidate in active.items()
            if rank in nearest and scores.of[nearest[rank]] > scores.of[candidate]
        }


def _neighbours(candidate: Candidate, positions: Sequence[int]) -> list[Candidate]:
    near = _with_more(candidate, positions)
    for dropped in candidate.sites:
        rest = tuple(position for position in candidate.sites if position != dropped)
        if rest:
            near.append(Candidate(rest, candidate.rank))
        near += [
            Candidate((*rest, new), candidate.rank)
            for new in positions
            if new != dropped and new not in candidate.sites
        ]
    return near


def beam(
    score: Score,
    sites: Sequence[Site],
    *,
    ranks: Sequence[int],
    budget: Budget | None = None,
    width: int = 8,
    limit: int = LIMIT,
) -> SearchResult:
    """Keep the best sets of every size and rank, and add one module to each of them in all ways.

    With a width no smaller than the number of sets of any size it scores every set that fits.

    Args:
        score: Scores of many candidates, shape (number of candidates,); higher is better.
        sites: Every module that can be adapted.
        ranks: Ranks.
        budget: Budget; None for no bound on size.
        width: Sets of each size and rank that are carried on.
        limit: Candidates that are scored at most; the smallest ones of the step in which it is reached.

    Returns:
        Every candidate that was scored.

    Raises:
        ConfigError: If nothing fits the budget, or width or limit is below 1.
        PlacementError: If there is no module, or a rank is below 1 or above the width of a module.
    """
    if width < 1:
        raise ConfigError(f"width = {width}: must be at least 1 set of each size")
    positions = _positions(sites)
    wanted = check_ranks(ranks, sites)
    scores = _Scores(score, sites, budget, limit)
    step = [Candidate((position,), rank) for rank in wanted for position in positions]
    _check_fits(scores, step, sites, budget)
    while step and scores.complete:
        ordered = scores.evaluate(step)
        kept = [c for rank in wanted for c in [entry for entry in ordered if entry.rank == rank][:width]]
        step = [bigger for candidate in kept for bigger in _with_more(candidate, positions)]
    return scores.result()


def _check_fits(scores: _Scores, first: Sequence[Candidate], sites: Sequence[Site], budget: Budget | None) -> None:
    if budget is not None and not any(scores.fits(candidate) for candidate in first):
        raise ConfigError(misfit(first, sites, budget))
