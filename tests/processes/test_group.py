"""Shares of work, values on their way, and what is refused before anything starts."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foretune.cli import run
from foretune.commands.loading import one_process
from foretune.errors import ConfigError, ProcessError
from foretune.processes.group import ALONE, HandedOver, Processes, launched, together
from foretune.processes.parcels import fetch, post


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 7))
def test_shares_are_a_partition_and_nearly_even(costs, world):
    shares = [Processes(rank, world).share(costs) for rank in range(world)]
    assert sorted(piece for share in shares for piece in share) == list(range(len(costs)))
    loads = [sum(costs[piece] for piece in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


@given(st.lists(st.integers(1, 9), max_size=9), st.integers(1, 4))
def test_progress_comes_to_the_total(counts, more):
    total = sum(counts) * more
    assert sum(Processes(0, more).progress(counts, total)) == total
    assert ALONE.progress(counts, sum(counts)) == counts


def through(value, device=None):
    sent = []
    post(value, lambda part: sent.append(part.clone()))
    return fetch(lambda part: part.copy_(sent.pop(0)), device)


def test_values_keep_their_bits_and_what_they_share():
    big = torch.arange(12).reshape(3, 4).double().T  # not contiguous
    value = {"a": [big, big], "b": (torch.tensor(0.1, dtype=torch.bfloat16), torch.empty(0, 3)), "c": "text", "d": None}
    got = through(value)
    assert got["c"] == "text"
    assert got["d"] is None
    assert got["a"][0] is got["a"][1]
    torch.testing.assert_close(got["a"][0], big, rtol=0, atol=0)
    assert got["b"][0].dtype == torch.bfloat16
    assert got["b"][0] == value["b"][0]
    assert got["b"][1].shape == (0, 3)


def test_long_values_go_in_pieces(monkeypatch):
    monkeypatch.setattr("foretune.processes.parcels.CHUNK", 5)
    value = [torch.randn(7), torch.tensor([True, False])]
    for one, other in zip(value, through(value), strict=True):
        assert torch.equal(one, other)


def test_alone_nothing_is_exchanged():
    assert ALONE.collect("mine") == ["mine"]
    assert ALONE.hand_over("mine") == ["mine"]
    assert ALONE.spread("mine") == "mine"
    ALONE.agree()
    with together(lambda: pytest.fail("asked for nothing")) as processes:
        assert processes == ALONE
    with ALONE.until_handed_over():
        raise HandedOver
    assert dataclasses.replace(ALONE, rank=1, world=2) != ALONE


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK = 'x' is no number of a process"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = 2, and WORLD_SIZE = 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR or MASTER_PORT is not set"),
    ],
)
def test_environments_that_no_launcher_makes(monkeypatch, environment, message):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match=message):
        launched()


def test_commands_that_are_not_shared_are_refused_under_a_launcher(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run(["study", "grid.yaml"]) == 2
    assert "foretune study runs in one process, and 2 were launched" in " ".join(capsys.readouterr().err.split())
    assert run(["study", "--help"]) == 0


def test_trials_are_refused_in_several_processes():
    one_process(ALONE, "5%")
    one_process(Processes(0, 2), "0")
    with pytest.raises(ConfigError, match="spend = '5%': 2 processes share the pass"):
        one_process(Processes(0, 2), "5%")
