"""Adapters of one size: ranks that bring every placement to a number of parameters."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretune.cli import run
from foretune.errors import ConfigError
from foretune.models.sites import Site, split_name
from foretune.ranking.budget import n_parameters, parse_parameters
from foretune.ranking.candidates import Candidate
from foretune.ranking.equal_size import MOST_RANK, MOST_RANKS, equal_sizes, missed

import cases
import domains


def sites_of(shapes):
    names = [f"layer.{index}.query" for index in range(len(shapes))]
    return tuple(
        Site(name, *split_name(name), *shape, rank=1, scaling=1.0) for name, shape in zip(names, shapes, strict=True)
    )


def reached(placement, sites, size):
    """Every rank within 15 % that the modules carry, with what it misses the size by: one by one."""
    width = min(min(sites[at].d_in, sites[at].d_out) for at in placement.sites)
    of_rank = {rank: n_parameters(Candidate(placement.sites, rank), sites) for rank in range(1, MOST_RANK + 1)}
    missing = {rank: abs(count / size - 1) for rank, count in of_rank.items() if rank <= width}
    return {rank: error for rank, error in missing.items() if error <= 0.15 + 1e-12}


WIDTHS = st.sampled_from([2, 7, 16, 48, 384, 768, 3072])


@st.composite
def placed(draw):
    sites = sites_of(draw(st.lists(st.tuples(WIDTHS, WIDTHS), min_size=1, max_size=12)))
    positions = st.sets(st.integers(0, len(sites) - 1), min_size=1)
    sets = draw(st.lists(positions.map(lambda some: tuple(sorted(some))), min_size=1, max_size=40, unique=True))
    return sites, [Candidate(some, 1) for some in sets], draw(st.integers(1, 10**6))


@settings(deadline=None)
@given(placed())
def test_every_placement_comes_to_the_size_or_is_left_out(case):
    sites, placements, size = case
    known = {placement.sites: reached(placement, sites, size) for placement in placements}
    if not any(known.values()):
        with pytest.raises(ConfigError, match=f"equal_size = {size:,}"):
            equal_sizes(placements, sites, size)
        return
    found = equal_sizes(placements, sites, size)
    ranks = {candidate.rank for candidate in found}
    assert 1 <= len(ranks) <= MOST_RANKS
    assert all(candidate.rank in known[candidate.sites] for candidate in found)
    best = {some: min(errors, key=lambda rank: (errors[rank], rank)) for some, errors in known.items() if errors}
    assert [candidate.sites for candidate in found] == [one.sites for one in placements if one.sites in best] or (
        len(set(best.values())) > MOST_RANKS
    )
    for candidate in found:  # of the ranks that were kept, the nearest
        errors = known[candidate.sites]
        assert errors[candidate.rank] == pytest.approx(min(errors[rank] for rank in ranks & errors.keys()))
    if len(set(best.values())) <= MOST_RANKS:
        assert all(
            known[one.sites][one.rank] == pytest.approx(known[one.sites][best[one.sites]]) for one in found
        )  # nothing given up


def test_many_ranks_become_few_and_lose_next_to_nothing():
    """A placement for each nearest rank from 5 to 60: twelve ranks are near enough to all of them."""
    size = 60 * 1000
    sites = sites_of([(500, round(size / rank) - 500) for rank in range(5, 61)])
    placements = [Candidate((at,), 1) for at in range(len(sites))]
    found = equal_sizes(placements, sites, size)
    assert len(found) == len(placements)
    assert len({candidate.rank for candidate in found}) == MOST_RANKS
    missing = [abs(n_parameters(candidate, sites) / size - 1) for candidate in found]
    assert max(missing) <= 0.15
    assert np.mean(missing) < 0.06


def test_a_placement_that_no_rank_of_its_own_width_brings_there():
    sites = sites_of([(8, 8), (100, 100)])
    (only,) = equal_sizes([Candidate((0,), 1), Candidate((1,), 1)], sites, 2000)
    assert (only.sites, only.rank) == ((1,), 10)  # the other would need rank 125, and is 8 wide
    with pytest.raises(ConfigError, match=r"'query · layer 0 · r 8', has 128"):
        equal_sizes([Candidate((0,), 1)], sites, 2000)


@pytest.mark.parametrize(("text", "size"), [("500k", 500_000), ("1.2M", 1_200_000), ("1_000", 1000), ("2e3", 2000)])
def test_sizes_in_words(text, size):
    assert parse_parameters("equal_size", text) == size


def test_what_is_left_out_is_counted():
    assert missed(0, 10, 500) == ()
    (note,) = missed(3, 10, 500_000)
    assert "3 of 10 placements come within 15% of 500,000 parameters at no rank from 1 to 64" in note


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equal")
    model = cases.save(folder / "model")
    calibration = domains.write(folder / "calibration.json", model)
    dataset = cases.write_reviews(folder / "reviews")
    return ["rank", "--model", model, "--dataset", dataset, "--calibration", calibration, "--samples", "16",
            "--eval-samples", "10", "--draws", "2", "--epochs", "1", "--train-batch-size", "8"]  # fmt: skip


def rows_of(folder, name):
    with (folder / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_ranking_of_equal_sizes(common, tmp_path):
    """A module of the tiny model has 32 to 40 parameters for each rank; at most 16, its width, can be had."""
    out, again = tmp_path / "out", tmp_path / "again"
    assert run([*common, "--equal-size", "0.4k", "--finalists", "8", "--output", str(out)]) == 0
    rows = rows_of(out, "candidates.csv")
    assert len(rows) > 20
    assert all(340 <= int(row["parameters"]) <= 460 for row in rows)
    assert len({row["rank"] for row in rows}) > 3
    held = json.loads((out / "result.json").read_text(encoding="utf-8"))
    (ranking,) = held["rankings"]
    assert ranking["equal_size"] == 400
    caption = (out / "ranking.md").read_text(encoding="utf-8").split("\n\n")[0]
    assert "Sizes are equal within 15%: 400 parameters" in caption
    assert any("placements come within 15% of 400 parameters" in note for note in ranking["notes"])
    chosen = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    (best,) = (row for row in ranking["rows"] if row["recommended"])
    assert chosen["r"] == best["rank"]
    alike = [row for row in ranking["rows"] if row["tie"] or row is ranking["rows"][0]]
    assert best["step_cost"] == min(row["step_cost"] for row in alike)
    assert run(["rank", "--config", str(out / "config.yaml"), "--output", str(again)]) == 0
    assert (again / "ranking.csv").read_bytes() == (out / "ranking.csv").read_bytes()


def test_a_row_of_equal_sizes_is_that_of_its_rank(common, tmp_path):
    """One placement of 32 parameters for each rank: a ranking of that rank says the same."""
    flags = ["--target-modules", "query", "--layers", "0", "--learning-rate", "1e-3"]
    out, alone = tmp_path / "out", tmp_path / "alone"
    assert run([*common, *flags, "--equal-size", "128", "--output", str(out)]) == 0
    assert run([*common, *flags, "--ranks", "4", "--output", str(alone)]) == 0
    assert (out / "ranking.csv").read_bytes() == (alone / "ranking.csv").read_bytes()
    assert "Sizes are equal" not in (alone / "ranking.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--equal-size", "0"], ["equal_size = '0'", "500k"]),
        (["--equal-size", "-5"], ["equal_size = '-5'", "500k"]),
        (["--equal-size", "2MB"], ["'2MB'", "'MB'", "500k"]),
        (["--equal-size", "a lot"], ["'a lot'", "1.2M"]),
        (["--equal-size", "500M"], ["500,000,000 parameters", "no placement", "nearest"]),
        (["--equal-size", "3"], ["no placement", "r 1"]),
        (["--equal-size", "400", "--ranks", "4"], ["equal_size = '400'", "ranks = [4]", "leave"]),
        (["--equal-size", "400", "--budget", "1k"], ["equal_size = '400'", "budget = '1k'", "leave"]),
    ],
)
def test_odd_sizes_are_refused_and_nothing_is_written(common, flags, words, tmp_path, capsys):
    out = tmp_path / "refused"
    assert run([*common, *flags, "--output", str(out)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    for word in words:
        assert word in message
    assert not out.exists()
