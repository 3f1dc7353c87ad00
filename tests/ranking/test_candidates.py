from itertools import product

import hypothesis.strategies as st
import pytest
from hypothesis import given

from foretune.errors import ConfigError, PlacementError
from foretune.models.sites import Site, split_name
from foretune.ranking.budget import Budget, fitting, n_parameters, parse_budget
from foretune.ranking.candidates import Candidate, enumerate_candidates, label, short_kinds

KINDS = {
    "attention.self.query": (16, 16),
    "attention.self.key": (16, 16),
    "attention.self.value": (16, 16),
    "attention.output.dense": (16, 16),
    "intermediate.dense": (16, 24),
    "output.dense": (24, 16),
}


def site(name, d_in=16, d_out=16):
    layer, kind = split_name(name)
    return Site(name, layer, kind, d_in, d_out, rank=1, scaling=1.0)


def bert(n_layers=6, pooler=True):
    sites = [site(f"bert.encoder.layer.{i}.{kind}", *KINDS[kind]) for i in range(n_layers) for kind in KINDS]
    return tuple([*sites, site("bert.pooler.dense")] if pooler else sites)


BERT = bert()


def where(*pairs, sites=BERT):
    """Positions of (layer, kind) pairs; kinds by their ends as in BERT's short names."""
    short = short_kinds(sites)
    return tuple(i for i, held in enumerate(sites) if (held.layer, short[held.kind]) in pairs)


def grid(kinds, layers):
    return where(*product(layers, kinds))


def test_candidates_are_sets():
    assert Candidate((3, 1, 3), 8) == Candidate((1, 3), 8)
    assert hash(Candidate((3, 1), 8)) == hash(Candidate((1, 3), 8))
    assert Candidate((1, 3), 8).sites == (1, 3)
    assert Candidate((1, 3), 8) != Candidate((1, 3), 4)
    assert n_parameters(Candidate(grid(["query", "output.dense"], [0]), 4), BERT) == 4 * (32 + 40)
    for bad in ((), 1), ((-1,), 1), ((0,), 0):
        with pytest.raises(PlacementError):
            Candidate(*bad)


def test_short_kinds_stay_distinguishable():
    short = short_kinds(BERT)
    assert short == {
        "attention.self.query": "query",
        "attention.self.key": "key",
        "attention.self.value": "value",
        "attention.output.dense": "attention.output.dense",
        "intermediate.dense": "intermediate.dense",
        "output.dense": "output.dense",
        "bert.pooler.dense": "pooler.dense",
    }
    gpt2 = short_kinds(site(f"transformer.h.0.{k}") for k in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
    assert list(gpt2.values()) == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]


LABELS = [
    (grid(["query", "value"], range(6)), 8, "query, value · all layers · r 8"),
    (grid(["query", "value"], range(5)), 8, "query, value · layers 0–4 · r 8"),
    (grid(["query"], [0, 2, 3, 5]), 8, "query · layers 0, 2–3, 5 · r 8"),
    (tuple(range(len(BERT))), 4, "all modules · all layers · r 4"),
    (tuple(range(len(BERT) - 1)), 4, "all modules · layers 0–5 · r 4"),
    (grid(short_kinds(BERT).values(), [2]), 4, "all modules · layer 2 · r 4"),
    (grid(["output.dense"], [3]), 16, "output.dense · layer 3 · r 16"),
    (grid(["attention.output.dense"], [3]), 16, "attention.output.dense · layer 3 · r 16"),
    ((len(BERT) - 1,), 2, "pooler.dense · r 2"),
    (where((0, "query"), (0, "value"), (2, "value"), (5, "value")), 8, "query 0, value 0 2 5 · r 8"),
    ((*grid(["query"], range(3)), len(BERT) - 1), 1, "query 0–2, pooler.dense · r 1"),
]


@pytest.mark.parametrize(("positions", "rank", "expected"), LABELS, ids=[case[2] for case in LABELS])
def test_labels(positions, rank, expected):
    assert label(Candidate(positions, rank), BERT) == expected


# encoder and decoder share numbers and kinds, layers differ, and something lies outside
ODD = tuple(
    site(name)
    for name in [
        *("encoder.block.0.q", "encoder.block.0.v", "encoder.block.1.q", "decoder.block.0.q", "decoder.block.0.x.q"),
        *("decoder.block.2.v", "pooler.q", "pooler.v"),
    ]
)


@given(
    st.sets(st.integers(0, len(ODD) - 1), min_size=1),
    st.sets(st.integers(0, len(ODD) - 1), min_size=1),
    st.sampled_from([1, 2]),
)
def test_different_candidates_have_different_labels(first, second, rank):
    one, other = Candidate(tuple(first), 1), Candidate(tuple(second), rank)
    assert (label(one, ODD) == label(other, ODD)) == (one == other)


def test_every_label_of_a_small_model_is_its_own():
    sites = bert(2)
    candidates = {Candidate(tuple(i for i in range(13) if bits >> i & 1), 1) for bits in range(1, 2**13)}
    assert len({label(candidate, sites) for candidate in candidates}) == 2**13 - 1


def test_the_usual_placements_are_enumerated():
    found = {candidate.sites for candidate in enumerate_candidates(BERT, ranks=[4])}
    attention = ["query", "key", "value", "attention.output.dense"]
    forward = ["intermediate.dense", "output.dense"]
    for group in [[k] for k in attention + forward] + [["query", "value"], attention, forward, attention + forward]:
        for first in range(6):
            for last in range(first, 6):
                assert grid(group, range(first, last + 1)) in found
    singles = {(i,) for i in range(len(BERT))}
    assert singles <= found
    assert tuple(range(len(BERT))) in found
    # 6 kinds and 4 groups on 21 ranges, 36 of them single modules already; the pooler, and everything
    assert len(found) == 10 * 21 + 2
    assert not any(len(BERT) - 1 in held for held in found if len(held) not in (1, len(BERT)))


def test_enumeration_is_deterministic_and_without_repetition():
    candidates = enumerate_candidates(BERT, ranks=[8, 2, 8])
    assert candidates == enumerate_candidates(BERT, ranks=(2, 8))
    assert len(set(candidates)) == len(candidates)
    half = len(candidates) // 2
    assert [c.rank for c in candidates] == [2] * half + [8] * half
    assert [c.sites for c in candidates[:half]] == [c.sites for c in candidates[half:]]


def test_listed_kinds_and_layers_restrict():
    layers, kinds = [1, 2, 5], [["query", "key"], "value"]
    candidates = enumerate_candidates(BERT, kinds=kinds, layers=layers, ranks=[1])
    names = {(BERT[i].layer, BERT[i].kind.rsplit(".", 1)[-1]) for c in candidates for i in c.sites}
    assert names == set(product(layers, ["query", "key", "value"]))
    found = {candidate.sites for candidate in candidates}
    # neighbours in the list make a range; the listed group is there beside the usual ones
    assert grid(["query", "key"], [2, 5]) in found
    assert grid(["query", "value"], [1, 2, 5]) in found
    assert grid(["query", "key", "value"], [1, 2]) in found
    assert grid(["query"], [1, 5]) not in found
    assert len(found) == (3 + 1 + 1 + 1) * 6


def test_names_mean_kinds():
    def kinds_of(*names):
        candidates = enumerate_candidates(BERT, kinds=[names], layers=[0], ranks=[1])
        return {BERT[i].kind for c in candidates for i in c.sites}

    assert kinds_of("output.dense") == {"output.dense"}  # as a label writes it, not by its end alone
    assert kinds_of("attention.output.dense") == {"attention.output.dense"}
    assert kinds_of("dense") == {"attention.output.dense", "intermediate.dense", "output.dense"}
    assert kinds_of("all-linear") == set(KINDS)
    assert enumerate_candidates(BERT, kinds=["pooler.dense"], ranks=[1]) == (Candidate((len(BERT) - 1,), 1),)


def test_a_listed_group_keeps_its_modules_outside_the_layers():
    found = {c.sites for c in enumerate_candidates(BERT, kinds=[["query", "pooler.dense"], "key"], ranks=[1])}
    assert (*grid(["query"], range(6)), len(BERT) - 1) in found
    assert (*grid(["query", "key"], range(6)), len(BERT) - 1) in found


def test_kinds_of_other_architectures():
    llama = [f"model.layers.{i}.{k}" for i in (0, 1) for k in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]
    labels = {label(c, ls) for ls in [tuple(map(site, llama))] for c in enumerate_candidates(ls, ranks=[1])}
    assert {"q_proj, v_proj · all layers · r 1", "q_proj · layer 1 · r 1", "up_proj · all layers · r 1"} <= labels
    fused = tuple(map(site, ["h.0.attn.c_attn", "h.0.mlp.c_fc"]))
    assert {c.sites for c in enumerate_candidates(fused, ranks=[1])} == {(0,), (1,), (0, 1)}
    flat = tuple(map(site, ["first", "second"]))
    assert [c.sites for c in enumerate_candidates(flat, ranks=[1])] == [(0,), (1,), (0, 1)]


REFUSED = [
    ({"ranks": [4, 17]}, r"rank 17 is above the width 16 of module 'bert.encoder.layer.0.attention.self.query'"),
    ({"ranks": [0]}, "rank 0"),
    ({"ranks": []}, "name at least one"),
    ({"ranks": [1], "kinds": ["quer"]}, r"'quer' matches nothing \(did you mean 'query'\?\).*pooler.dense"),
    ({"ranks": [1], "kinds": []}, "no module is left.*leave the restriction out"),
    ({"ranks": [1], "layers": [6]}, "layer 6 is out of range: the model has 6 layers, 0 to 5"),
    ({"ranks": [1], "layers": []}, "no module is left"),
    ({"ranks": [1], "kinds": ["pooler.dense"], "layers": [0]}, r"no module is left.*pooler.dense.*\[0\]"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_placed_is_refused(options, message):
    with pytest.raises(PlacementError, match=message):
        enumerate_candidates(BERT, **options)


def test_a_rank_is_checked_on_the_modules_that_are_taken():
    sites = (site("layer.0.narrow", 2, 16), site("layer.0.wide"))
    with pytest.raises(PlacementError, match=r"width 2 of module 'layer\.0\.narrow'"):
        enumerate_candidates(sites, ranks=[3])
    assert len(enumerate_candidates(sites, kinds=["wide"], ranks=[3])) == 1
    assert enumerate_candidates(sites, ranks=[2])


def test_no_sites():
    with pytest.raises(PlacementError, match="no module is left"):
        enumerate_candidates((), ranks=[1])


BUDGETS = [
    ("500000", 500_000),
    ("500_000", 500_000),
    ("500k", 500_000),
    ("1.2M", 1_200_000),
    ("2.3m", 2_300_000),  # 2.3e6 in floats is a little less
    ("1e6", 1_000_000),
    ("1.5G", 1_500_000_000),
    ("2MB", 500_000),
    ("2 mb", 500_000),
    ("500KB", 125_000),
    ("1.5MiB", 393_216),
    ("1GiB", 2**28),
    ("7.9", 7),
]


@pytest.mark.parametrize(("text", "parameters"), BUDGETS)
def test_budgets(text, parameters):
    assert parse_budget(text) == Budget(parameters, text)


def test_bytes_of_a_parameter():
    assert parse_budget("2MB", bytes_per_parameter=2).parameters == 1_000_000
    assert parse_budget("2M", bytes_per_parameter=2).parameters == 2_000_000


@pytest.mark.parametrize("text", ["", "many", "-5k", "5T", "500B", "k", "0", "3KB4", "1,5M", "0.1KiB5", "3 B", "nan"])
def test_bad_budgets(text):
    with pytest.raises(ConfigError, match=r"budget = .*500k or 1.2M.*1.5MiB") as error:
        parse_budget(text)
    assert repr(text) in str(error.value)


@given(st.integers(1, 10**12), st.sampled_from(["", "k", "M", "KB", "KiB", "MB"]))
def test_any_number_is_read_exactly(number, unit):
    factor = {"": 1, "k": 10**3, "M": 10**6, "KB": 250, "KiB": 256, "MB": 250_000}[unit]
    assert parse_budget(f"{number}{unit}").parameters == number * factor


def test_fitting_keeps_what_fits():
    candidates = enumerate_candidates(BERT, ranks=[1, 2])
    kept = fitting(candidates, BERT, parse_budget("64"))
    assert kept == tuple(c for c in candidates if n_parameters(c, BERT) <= 64)
    assert Candidate(grid(["query"], [0]), 2) in kept  # exactly 64
    assert Candidate(grid(["output.dense"], [0]), 2) not in kept


def test_a_budget_that_nothing_fits_names_the_smallest():
    candidates = enumerate_candidates(BERT, ranks=[4, 8])
    with pytest.raises(
        ConfigError, match=r"budget = '127' \(127 parameters\).*'query · layer 0 · r 4', has 128 parameters \(0.5 KB\)"
    ):
        fitting(candidates, BERT, parse_budget("127"))
    with pytest.raises(ConfigError, match="no candidate"):
        fitting([], BERT, parse_budget("127"))
