from itertools import combinations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from foretune.errors import ConfigError, PlacementError
from foretune.models.sites import Site
from foretune.ranking.budget import Budget, n_parameters
from foretune.ranking.candidates import Candidate
from foretune.ranking.search import beam, greedy


def sites_of(widths):
    return tuple(Site(f"layer.{i}.m", i, "m", width, width, 1, 1.0) for i, width in enumerate(widths))


def budget(parameters):
    return Budget(parameters, str(parameters))


def brute_force(sites, ranks, limit):
    positions = range(len(sites))
    every = [
        Candidate(held, rank) for size in range(1, len(sites) + 1) for held in combinations(positions, size)
        for rank in ranks
    ]  # fmt: skip
    return [candidate for candidate in every if n_parameters(candidate, sites) <= limit]


class Recorder:
    """Any function of one candidate as a score of many, with a book of what was asked."""

    def __init__(self, function):
        self.function, self.asked, self.calls = function, [], 0

    def __call__(self, candidates):
        assert len(candidates) > 0
        self.asked += candidates
        self.calls += 1
        return np.array([self.function(candidate) for candidate in candidates])


def additive(values):
    return lambda candidate: float(sum(values[i] for i in candidate.sites))


def coverage(groups):
    """Submodular: how many things the modules cover together."""
    return lambda candidate: float(len(set().union(*(groups[i] for i in candidate.sites))))


def interacting(seed):
    """Nothing in particular: an own number for every set."""
    return lambda candidate: float(np.random.default_rng([seed, candidate.rank, *candidate.sites]).normal())


def check(found, recorder, sites, allowed):
    """What every search owes: nothing twice, nothing too large, all that was scored, in order."""
    assert len(set(recorder.asked)) == len(recorder.asked)
    assert all(n_parameters(candidate, sites) <= allowed for candidate in recorder.asked)
    assert {s.candidate: s.score for s in found.scored} == {c: recorder.function(c) for c in recorder.asked}
    keys = [(-s.score, n_parameters(s.candidate, sites), s.candidate.sites) for s in found.scored]
    assert keys == sorted(keys)
    assert found.best == found.scored[0]


values = st.lists(st.integers(-5, 20), min_size=1, max_size=7)


@given(values, st.integers(1, 7))
def test_greedy_is_exact_for_additive_scores_of_equal_modules(worth, size):
    sites, recorder = sites_of([4] * len(worth)), Recorder(additive(worth))
    found = greedy(recorder, sites, ranks=[2], budget=budget(16 * size))
    check(found, recorder, sites, 16 * size)
    assert found.complete
    assert found.best.score == max(map(additive(worth), brute_force(sites, [2], 16 * size)))


@given(st.lists(st.sets(st.integers(0, 9)), min_size=1, max_size=7), st.integers(1, 5))
def test_greedy_keeps_its_guarantee_for_submodular_scores(groups, size):
    sites, recorder = sites_of([4] * len(groups)), Recorder(coverage(groups))
    found = greedy(recorder, sites, ranks=[1], budget=budget(8 * size))
    best = max(map(coverage(groups), brute_force(sites, [1], 8 * size)))
    assert found.best.score >= (1 - 1 / np.e) * best
    check(found, recorder, sites, 8 * size)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 99), st.integers(0, 60))
def test_a_wide_beam_is_brute_force(widths, seed, extra):
    sites, recorder = sites_of(widths), Recorder(interacting(seed))
    allowed = 2 * min(widths) + extra
    found = beam(recorder, sites, ranks=[1], budget=budget(allowed), width=20)
    check(found, recorder, sites, allowed)
    assert {s.candidate for s in found.scored} == set(brute_force(sites, [1], allowed))


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(0, 99), st.sampled_from([[1], [1, 2]]), st.sampled_from([None, 30, 45]))
def test_the_end_of_greedy_cannot_be_bettered_by_one_change(n, seed, ranks, allowed):
    sites, recorder = sites_of([3, 4, 3, 5, 3, 4][:n]), Recorder(interacting(seed))
    found = greedy(recorder, sites, ranks=ranks, budget=None if allowed is None else budget(allowed))
    check(found, recorder, sites, allowed or 10**9)
    best = found.best.candidate
    for other in brute_force(sites, [best.rank], allowed or 10**9):
        if len(set(other.sites) - set(best.sites)) <= 1 and len(set(best.sites) - set(other.sites)) <= 1:
            assert recorder.function(other) <= found.best.score
    again = greedy(Recorder(interacting(seed)), sites, ranks=ranks, budget=None if allowed is None else budget(allowed))
    assert again == found


@settings(max_examples=40)
@given(st.integers(0, 99), st.integers(1, 60), st.integers(1, 4))
def test_a_limit_is_kept(seed, limit, width):
    sites = sites_of([4] * 6)
    for search, options in ((greedy, {}), (beam, {"width": width})):
        recorder = Recorder(interacting(seed))
        found = search(recorder, sites, ranks=[1, 2], limit=limit, **options)
        assert len(recorder.asked) <= limit
        whole = search(Recorder(interacting(seed)), sites, ranks=[1, 2], **options)
        assert found.complete == (len(whole.scored) <= limit)
        check(found, recorder, sites, 10**9)


def test_at_the_limit_the_smallest_are_scored():
    for search in (greedy, beam):
        recorder = Recorder(lambda _: 1.0)
        search(recorder, sites_of([6, 4, 5]), ranks=[1], limit=2)
        assert [candidate.sites for candidate in recorder.asked] == [(1,), (2,)]


def test_swaps_leave_a_local_trap():
    """Module 0 is best alone, 1 and 2 only together: forward steps never drop 0."""
    pairs = {(0,): 3.0, (1,): 1.0, (2,): 1.0, (0, 1): 3.5, (0, 2): 3.25, (1, 2): 5.0}
    found = greedy(Recorder(lambda c: pairs[c.sites]), sites_of([4] * 3), ranks=[1], budget=budget(16))
    assert found.best.candidate.sites == (1, 2)


def test_the_way_up_crosses_a_plateau():
    """Accuracy is counted in whole texts: one module more often changes nothing."""
    steps = [0, 0, 0, 1, 1, 2]
    found = greedy(Recorder(lambda c: float(steps[len(c.sites) - 1])), sites_of([4] * 6), ranks=[1])
    assert found.best.score == 2


def test_what_the_way_up_began_with_is_dropped_if_the_rest_is_better_alone():
    scores = {(0,): 3, (1,): 2, (2,): 1, (0, 1): 4, (0, 2): 3, (1, 2): 6, (0, 1, 2): 5}
    result = greedy(Recorder(lambda c: float(scores[c.sites])), sites_of([4] * 3), ranks=[1])
    assert result.best.candidate.sites == (1, 2)


def test_one_call_of_the_score_in_each_step():
    recorder = Recorder(additive([1, 2, 3, 4]))
    beam(recorder, sites_of([4] * 4), ranks=[1, 2], width=3)
    assert recorder.calls == 4
    recorder = Recorder(additive([1, 2, 3, 4]))
    greedy(recorder, sites_of([4] * 4), ranks=[1, 2])
    assert recorder.calls == 5  # four sizes, one clean-up


def test_ties_go_to_fewer_parameters_then_to_the_first_modules():
    sites = sites_of([5, 4, 4])
    for search in (greedy, beam):
        found = search(Recorder(lambda _: 1.0), sites, ranks=[2, 1])
        assert [s.candidate for s in found.scored][:4] == [
            Candidate((1,), 1), Candidate((2,), 1), Candidate((0,), 1), Candidate((1,), 2)
        ]  # fmt: skip


def test_a_narrow_beam_keeps_the_best_of_each_rank():
    recorder = Recorder(lambda c: additive([4, 3, 2, 1])(c) * c.rank)
    found = beam(recorder, sites_of([4] * 4), ranks=[1, 2], width=1)
    pairs = {(s.candidate.sites, s.candidate.rank) for s in found.scored if len(s.candidate.sites) == 2}
    assert pairs == {((0, i), rank) for i in (1, 2, 3) for rank in (1, 2)}


def test_scores_that_are_no_numbers_come_last():
    score = Recorder(lambda c: np.nan if 0 in c.sites else float(len(c.sites)))
    found = greedy(score, sites_of([4] * 3), ranks=[1])
    assert found.best.candidate.sites == (1, 2)
    assert found.scored[-1].score == -np.inf


def test_what_cannot_be_searched_is_refused():
    sites, score = sites_of([4] * 3), Recorder(additive([1, 2, 3]))
    for search in (greedy, beam):
        with pytest.raises(ConfigError, match=r"fits no candidate: the smallest, 'm · layer 0 · r 1', has 8 para"):
            search(score, sites, ranks=[1, 2], budget=budget(7))
        with pytest.raises(PlacementError, match="rank 5 is above the width 4"):
            search(score, sites, ranks=[5])
        with pytest.raises(PlacementError, match="no module to search among"):
            search(score, [], ranks=[1])
        with pytest.raises(ConfigError, match="limit = 0"):
            search(score, sites, ranks=[1], limit=0)
        with pytest.raises(ValueError, match="shape"):
            search(lambda _: np.zeros(1), sites, ranks=[1])
    with pytest.raises(ConfigError, match="width = 0"):
        beam(score, sites, ranks=[1], width=0)
    assert score.calls == 0
