"""Which candidates are simulated: the quick score of all, and the finalists among them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from peft import PeftConfig

from foretune.errors import ConfigError
from foretune.models.sites import Site
from foretune.ranking.budget import fitting, n_parameters, parse_budget
from foretune.ranking.candidates import Candidate
from foretune.ranking.quick_score import Blocks, quick_scores
from foretune.ranking.search import beam, greedy
from foretune.settings.commands import METHOD_ROWS, Search
from foretune.settings.groups import MethodName

BEAM_WIDTH = 4
SEARCH_LIMIT = 5_000
RANKED_METHODS: frozenset[MethodName] = frozenset({"lora", "dora", "adalora", "loha", "lokr"})  # sized by a rank


@dataclass(frozen=True)
class Quick:
    """A candidate with its quick score.

    Attributes:
        candidate: Placement; all modules where a method beside LoRA sits on others.
        name: Its name.
        parameters: Trainable parameters of the adapters.
        score: From `quick_scores`; comparable on one model, data set and method alone.
        method: Adapter method.
        config: peft's configuration; None of LoRA, where the candidate says all.
        modules: Names of the modules that a method beside LoRA sits on; empty for the whole model.
    """

    candidate: Candidate
    name: str
    parameters: int
    score: float
    method: MethodName = "lora"
    config: PeftConfig | None = None
    modules: tuple[str, ...] = ()

    @property
    def rank(self) -> int | None:
        """Rank of the adapters; None of a method whose size no rank sets."""
        return self.candidate.rank if self.method in RANKED_METHODS else None


def price_candidates(
    wanted: Search, blocks: Blocks, candidates: Sequence[Candidate], name: Callable[[Candidate], str]
) -> list[Quick]:
    """Score everything that was listed, and under a budget what a search finds.

    Args:
        wanted: What the user asked for.
        blocks: Kernels of the modules.
        candidates: Listed placements, at least one of which fits the budget.
        name: Names a placement.

    Returns:
        Every placement within the budget once, in no order.
    """
    sites = blocks.sites
    if wanted.budget is None:
        scored = dict(zip(candidates, quick_scores(blocks, candidates).tolist(), strict=True))
    else:
        budget = parse_budget(wanted.budget)
        candidates = fitting(candidates, sites, budget)
        scored = dict(zip(candidates, quick_scores(blocks, candidates).tolist(), strict=True))

        def score(some: Sequence[Candidate]) -> NDArray[np.float64]:
            return quick_scores(blocks, some)

        searched = (
            greedy(score, sites, ranks=wanted.ranks, budget=budget, limit=SEARCH_LIMIT),
            beam(score, sites, ranks=wanted.ranks, budget=budget, width=BEAM_WIDTH, limit=SEARCH_LIMIT),
        )
        scored |= {entry.candidate: entry.score for search in searched for entry in search.scored}
    return [
        Quick(candidate, name(candidate), n_parameters(candidate, sites), score) for candidate, score in scored.items()
    ]


def choose_finalists(quick: Sequence[Quick], sites: Sequence[Site], count: int) -> list[Quick]:
    """Choose the candidates whose run is simulated.

    Args:
        quick: All candidates with their quick scores.
        sites: Modules that they are made of.
        count: How many, at most.

    Returns:
        A third along the front of size and score, a third whole module kinds, the others the best scores.
    """
    # A third along the front, those that no smaller one equals; a third whole kinds; the others by quick score. That
    # alone would leave out large adapters: its ridge is the same for all, and it stops rising before a run of many
    # steps does. Module kinds over all layers are what most people train.
    by_score = sorted(quick, key=lambda entry: (-entry.score, entry.parameters, entry.name))
    front: list[Quick] = []
    for entry in sorted(quick, key=lambda entry: (entry.parameters, -entry.score, entry.name)):
        if not front or entry.score > front[-1].score:
            front.append(entry)
    third = count // 3
    spread = [front[round(at)] for at in np.linspace(0, len(front) - 1, min(len(front), third))]
    whole = [entry for entry in by_score if is_whole(entry.candidate, sites)]
    chosen: dict[Candidate, Quick] = {}
    for group, limit in ((spread, third), (whole, 2 * third), (by_score, count)):
        for entry in group:
            if len(chosen) < limit:
                chosen.setdefault(entry.candidate, entry)
    return list(chosen.values())


def is_whole(candidate: Candidate, sites: Sequence[Site]) -> bool:
    """Tell whether a placement takes in all modules of its kinds.

    Args:
        candidate: Placement.
        sites: Modules that placements are made of.

    Returns:
        Whether it does.
    """
    kinds = {sites[position].kind for position in candidate.sites}
    return len(candidate.sites) == sum(site.kind in kinds for site in sites)


def best_of_method(scored: Sequence[Quick], budget: str | None) -> list[int]:
    """Choose the rows of a method beside LoRA.

    Args:
        scored: Placements of one method.
        budget: As `parse_budget` reads it; None for none.

    Returns:
        Positions of the METHOD_ROWS with the best quick scores within the budget, the best first.

    Raises:
        ConfigError: If the budget fits none.
    """
    most = None if budget is None else parse_budget(budget).parameters
    kept = [at for at, entry in enumerate(scored) if most is None or entry.parameters <= most]
    if not kept:
        smallest = min(scored, key=lambda entry: entry.parameters)
        raise ConfigError(
            f"budget = {budget!r} fits no placement of {smallest.method}: the smallest, {smallest.name!r}, has "
            f"{smallest.parameters:,} parameters"
        )
    return sorted(kept, key=lambda at: (-scored[at].score, scored[at].parameters, scored[at].name))[:METHOD_ROWS]
