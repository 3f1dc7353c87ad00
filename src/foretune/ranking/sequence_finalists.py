"""Which adapters of a language model are simulated: placements of every kind and size, screened to first order."""

from collections.abc import Sequence
from itertools import zip_longest
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray

from foretune.forecasting.sequence_simulation import LinearisedSequences
from foretune.models.sites import Site
from foretune.ntk.sketches import SequenceSketches
from foretune.ranking.budget import n_parameters
from foretune.ranking.candidates import Candidate
from foretune.ranking.finalists import Quick, is_whole


def gradient_scores(linearised: LinearisedSequences, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
    """Score adapters by how much a step along their first gradient lowers the loss of the sequences to predict.

    B = 0 has the gradient s G A for the mean gradient G = Σ_i C_i0 / Σ_i T_i of a module on the sequences that train,
    and E on those to predict. To first order a step of gradient descent lowers the loss by its rate times
    Σ_m s² ⟨G_m Q_hᵀA_mᵀ, E_m Q_hᵀA_mᵀ⟩; divided by √parameters, a large adapter is no better for its size alone.
    It knows nothing of what comes after the first step: it screens, and the simulated runs put into order.

    Args:
        linearised: The model after the pass over the sequences.
        candidates: Placements, of ranks up to that of the pass.

    Returns:
        One score for each, comparable on one model and data set alone; below 0 the step raises the loss.
    """
    train, evaluation = linearised.train.sketches, linearised.evaluation.sketches
    gains: dict[tuple[int, int], float] = {}
    for site in sorted({position for candidate in candidates for position in candidate.sites}):
        ranks = sorted({candidate.rank for candidate in candidates if site in candidate.sites})
        of_train, to_predict = _mean_gradient(train, site), _mean_gradient(evaluation, site)
        h = train.bases[site].h.to(of_train)
        for rank in ranks:
            start = linearised.start([site], rank)
            rows = start.a[0].to(of_train) @ h
            gains[site, rank] = start.scaling[0] ** 2 * float(((of_train @ rows.T) * (to_predict @ rows.T)).sum())
    sites = linearised.sites
    return np.array(
        [
            sum(gains[site, candidate.rank] for site in candidate.sites) / sqrt(n_parameters(candidate, sites))
            for candidate in candidates
        ]
    )


def _mean_gradient(sketches: SequenceSketches, site: int) -> torch.Tensor:
    return sketches.sketches[site][:, 0].float().sum(0) / float(sketches.targets.sum())


def choose_spread(quick: Sequence[Quick], sites: Sequence[Site], count: int) -> list[Quick]:
    """Choose the adapters of a language model whose run is simulated.

    Two thirds are whole module kinds and groups of them in all their layers, which is what most people train; where
    there are more, evenly along their sizes, the largest and the smallest among them. The others are ranges of layers
    and single modules, round the sets of kinds, that with the best score first: of each the best of every size, sizes
    apart by powers of 2, then its others; and whole kinds again where these do not suffice.

    Args:
        quick: All candidates with their score from `gradient_scores`.
        sites: Modules that they are made of.
        count: How many, at most.

    Returns:
        So many of them, or all where these are fewer.
    """
    whole = [entry for entry in quick if is_whole(entry.candidate, sites)]
    whole.sort(key=lambda entry: (-entry.parameters, -entry.score, entry.name))
    share = min(len(whole), (2 * count + 2) // 3)
    chosen = {whole[round(at)].candidate: whole[round(at)] for at in np.linspace(0, max(0, len(whole) - 1), share)}
    by_kinds: dict[frozenset[str], list[Quick]] = {}
    ranges = [entry for entry in quick if not is_whole(entry.candidate, sites)]
    for entry in sorted(ranges, key=lambda entry: (-entry.score, entry.parameters, entry.name)):
        kinds = frozenset(sites[position].kind for position in entry.candidate.sites)
        by_kinds.setdefault(kinds, []).append(entry)
    turns = zip_longest(*map(_sizes_first, by_kinds.values()))
    for entry in (*(entry for turn in turns for entry in turn if entry is not None), *whole):
        if len(chosen) < count:
            chosen.setdefault(entry.candidate, entry)
    return list(chosen.values())


def _sizes_first(entries: Sequence[Quick]) -> list[Quick]:
    """The best of every size, then the others, each by score."""
    seen: set[int] = set()
    first: list[Quick] = []
    others: list[Quick] = []
    for entry in entries:
        (others if entry.parameters.bit_length() in seen else first).append(entry)
        seen.add(entry.parameters.bit_length())
    return [*first, *others]
