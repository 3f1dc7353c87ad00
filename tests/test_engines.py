"""Who does jobs: what comes of them is the same, what goes wrong is told, and nothing stays behind."""

import os
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import foretune.engines as engines
from foretune.engines import Processes, Work, choose_engine, fitted, on_ray, serial
from foretune.errors import ConfigError, DataError, StoreError


@dataclass
class Held:
    """What jobs have in common, and how often it was used."""

    weight: torch.Tensor
    used: int = 0


class Odd(Exception):
    """Not made from its arguments, so that it does not go from process to process."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def weigh(held, job, tell):
    held.used += 1
    if tell is not None:
        tell(job)
    (Path(tempfile.mkdtemp()) / "left").write_text("behind", encoding="utf-8")
    return job, float(held.weight.sum()) * job, held.used, os.getpid(), torch.get_num_threads()


def fail(_, job, tell):
    if job == "refused":
        raise DataError("row 3 is none")
    if job == "odd":
        raise Odd("a", "fault")
    os._exit(3)


def sleep(folder, job, tell):
    (folder / str(os.getpid())).touch()
    time.sleep(job)
    return job


def nobody(*_):
    raise AssertionError("nobody sees the work")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_this_process_does_one_job_after_the_other():
    begun, told = [], []

    def jobs():
        for job in range(3):
            begun.append(job)
            yield job

    work = Work(weigh, Held(torch.ones(2)), "job")
    for done in serial(work, jobs(), told.append):
        assert begun[-1] == told[-1] == done[0] == done[2] - 1
        assert done[1] == 2 * done[0]


def test_processes_hold_what_is_common_once_and_leave_nothing(temporary, monkeypatch):
    monkeypatch.setattr(engines, "usable_cores", lambda: 6)
    held = Held(torch.arange(4.0))
    done = list(Processes(2)(Work(weigh, held, "job"), range(8), nobody))
    assert sorted((job, weight) for job, weight, *_ in done) == [(job, 6.0 * job) for job in range(8)]
    by_process = {pid: [used for *_, used, other, _ in done if other == pid] for *_, pid, _ in done}
    assert all(sorted(used) == list(range(1, 1 + len(used))) for used in by_process.values())
    assert os.getpid() not in by_process
    assert held.used == 0
    assert {threads for *_, threads in done} == {3}
    assert not [*temporary.iterdir()]


@pytest.mark.parametrize(
    ("job", "kind", "words"),
    [
        ("refused", DataError, "row 3 is none"),
        ("odd", RuntimeError, "Odd: a fault"),
        ("dead", StoreError, "a worker process died, perhaps for lack of memory: finished jobs are kept, lower"),
    ],
)
def test_what_goes_wrong_elsewhere_is_raised_here(job, kind, words, temporary):
    with pytest.raises(kind, match=words) as caught:
        list(Processes(1)(Work(fail, 1.0, "job"), [job], nobody))
    assert job == "dead" or "in fail" in str(caught.value.__cause__)
    assert not [*temporary.iterdir()]


def test_work_that_nobody_waits_for_ends(tmp_path, temporary):
    (tmp_path / "pids").mkdir()
    with closing(Processes(2)(Work(sleep, tmp_path / "pids", "job"), [0, 600], nobody)) as done:
        assert next(done) == 0
        while len(pids := [*(tmp_path / "pids").iterdir()]) < 1:
            time.sleep(0.05)
    assert not [pid for pid in pids if Path(f"/proc/{pid.name}").exists()]
    assert [path.name for path in temporary.iterdir()] == ["pids"]


def test_what_does_not_go_into_other_processes_is_refused(temporary):
    with pytest.raises(ConfigError, match=r"what the jobs need does not go into other processes \(.*lambda.*leave out"):
        list(Processes(2)(Work(weigh, lambda: 0, "job"), [1], nobody))
    assert not [*temporary.iterdir()]


def test_no_more_processes_than_jobs():
    assert fitted(Processes(4), 9) == fitted(Processes(4), 4) == Processes(4)
    assert fitted(Processes(4), 2) == Processes(2)
    assert fitted(Processes(4), 1) is fitted(Processes(4), 0) is serial
    assert fitted(on_ray, 1) is on_ray


def test_engines_that_make_no_sense(monkeypatch):
    assert choose_engine("local", 1) is serial
    assert choose_engine("local", 3) == Processes(3)
    with pytest.raises(ConfigError, match="workers = 0"):
        choose_engine("local", 0)
    with pytest.raises(ConfigError, match="workers = 1025: must be at most 1,024"):
        choose_engine("local", 1025)
    with pytest.raises(ConfigError, match="the cluster decides"):
        choose_engine("ray", 2)
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--engine ray needs Ray: pip install 'foretune\[ray\]'"):
        choose_engine("ray", 1)
