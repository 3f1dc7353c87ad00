"""Commands in two processes, started as a launcher starts them: the results of one, and one end for all."""

import json
import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import language
from foretune.cli import run

import cases

# Runs command after command, each at a port of its own; what is patched is patched in the test's process alone.
WORKER = """
import json, os, signal, sys
import foretune.forecasting.linearise as linearise
import foretune.stream as stream
from foretune.cli import run
from foretune.errors import KernelError

jobs, report, fate = json.loads(sys.argv[1])
rank = int(os.environ["RANK"])
seen, batches, token_parts = [0], stream.batches, linearise.token_parts

def counted(*given, **options):
    for batch in batches(*given, **options):
        seen[0] += 1
        yield batch

def doomed(*given, **options):
    if fate == "raise":
        raise KernelError("the gradients of module 'x' are not finite")
    os.kill(os.getpid(), signal.SIGKILL)

stream.batches, ended = counted, []
for number, (port, tokens) in enumerate(jobs):
    os.environ["MASTER_PORT"] = str(port)
    if fate is not None and rank == 1 and number == len(jobs) - 1:
        linearise.token_parts = doomed
    if "DIFFERENT" in tokens:
        tokens[tokens.index("DIFFERENT")] = str(10 + rank)
    seen[0] = 0
    ended.append((run(tokens), seen[0]))
    with open(f"{report}.{rank}", "w") as file:
        json.dump(ended, file)
"""
SIZES = ["--dtype", "float64", "--samples", "24", "--batch-size", "4"]
RUN = ["--epochs", "1", "--train-batch-size", "8"]


def free_port():
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(jobs, report, fate=None):
    """Run commands in two processes; gives the two, and what each said of every command: code and batches."""
    given = json.dumps(([(free_port(), tokens) for tokens in jobs], str(report), fate))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error::ResourceWarning", "-c", WORKER, given],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=250) for process in started]
    assert "Traceback" not in said[0][1] + said[1][1], said
    reports = [Path(f"{report}.{rank}") for rank in range(2)]
    ended = [json.loads(path.read_text()) if path.exists() else [] for path in reports]
    return [process.returncode for process in started], said, ended


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def same(one, other, where=""):
    """Compare results but for what time they took; numbers to 1e-12."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one.keys() - {"seconds", "made", "hash"}:
            same(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, f"{where}/{index}")
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-12), where
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    cases.save(folder / "model", dtype=torch.float64)
    cases.write_reviews(folder / "reviews")
    cases.write_scores(folder / "scores")
    language.save_chat(folder / "language")
    (folder / "rows").mkdir()
    for name, numbers in (("train", range(12)), ("validation", range(100, 104))):
        rows = [{"prompt": f"colour {'of it ' * (n % 3)}?", "completion": ("blue", "the plot")[n % 2]} for n in numbers]
        (folder / "rows" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def tokens_of(command, inputs):
    """Flags of small runs: every policy that a pass takes a turn by."""
    classifier = ["--model", str(inputs / "model"), *SIZES]
    reviews, scores = (["--dataset", str(inputs / name)] for name in ("reviews", "scores"))
    of_language = ["--model", str(inputs / "language"), "--dataset", str(inputs / "rows"), *SIZES, *RUN]
    kernel = ["--draws", "2", "--repeats", "2", "--reduction", "full", "--ntk-params", "adapter+head"]
    return {
        "score": ["score", *classifier, *reviews, *kernel, "--head", "probe"],
        "score average": ["score", *classifier, *reviews, "--head", "average", "--heads", "2"],
        "forecast": ["forecast", *classifier, *scores, *RUN, "--rows", "32"],
        "rank": ["rank", *classifier, *reviews, *RUN, "--ranks", "2", "4", "--finalists", "2"],
        "score language": ["score", *of_language[:-4], "--repeats", "2", "--reduction", "fisher", "--max-length", "32"],
        "forecast language": ["forecast", *of_language, "--max-length", "32"],
    }[command]


COMMANDS = ("score", "score average", "forecast", "rank", "score language", "forecast language")


@pytest.fixture(scope="module")
def shared(inputs, tmp_path_factory):
    """All commands in two processes, and last a forecast of which one process cannot do its part."""
    folder = tmp_path_factory.mktemp("shared")
    jobs = [[*tokens_of(name, inputs), "--output", str(folder / name)] for name in COMMANDS]
    jobs.append([*tokens_of("forecast", inputs), "--output", str(folder / "failed")])
    return folder, *launch(jobs, folder / "report", "raise")


@pytest.mark.parametrize("command", COMMANDS)
def test_two_processes_give_the_result_of_one(shared, inputs, tmp_path, capsys, command):
    folder, _, _, ended = shared
    assert [of_rank[COMMANDS.index(command)][0] for of_rank in ended] == [0, 0]
    assert run([*tokens_of(command, inputs), "--output", str(tmp_path / "one")]) == 0
    capsys.readouterr()
    same(result_of(tmp_path / "one"), result_of(folder / command))
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (folder / command).iterdir()}
    if "score" in command:
        one, other = (load_file(path / "kernel.safetensors") for path in (tmp_path / "one", folder / command))
        for name in one.keys() | other.keys():
            np.testing.assert_allclose(other[name], one[name], rtol=1e-12, atol=1e-12 * np.abs(one[name]).max())


def test_the_work_is_shared_and_one_process_speaks(shared):
    _, _, said, ended = shared
    for command in ("score", "forecast", "rank"):
        mine, others = (of_rank[COMMANDS.index(command)][1] for of_rank in ended)
        assert min(mine, others) > 0.35 * (mine + others), command
    assert "saved to" in said[0][1]
    assert said[0][0].count("• new: classifier from seed 0") == 1
    assert said[1] == ("", "")


def test_what_one_process_raises_ends_all_with_one_line(shared):
    folder, _, said, ended = shared
    assert [of_rank[-1][0] for of_rank in ended] == [2, 2]
    assert said[0][1].rstrip().endswith("error: the gradients of module 'x' are not finite")
    assert not (folder / "failed").exists()


def test_a_lost_process_ends_the_others_and_the_same_command_goes_on(inputs, tmp_path):
    """Before that, processes with other settings are refused; after it torchrun itself starts the command again."""
    wanted = [*tokens_of("forecast", inputs), "--output", str(tmp_path / "out")]
    codes, said, ended = launch([[*wanted, "--seed", "DIFFERENT"], wanted], tmp_path / "report", "kill")
    assert [of_rank[0][0] for of_rank in ended] == [2, 2]
    assert "error: process 0 has seed = 10 and process 1 11: start every process with the same" in said[0][1]
    assert (codes[1], ended[0][1][0]) == (-9, 2)
    assert "error: process 0 of 2 lost another one, which ended or was ended: see what that one" in said[0][1]
    assert not (tmp_path / "out").exists()
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "foretune", *wanted],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "out")["samples"] == 24
    assert done.stderr.count("saved to") == 1
