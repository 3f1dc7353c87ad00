import csv
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import foretune.study.cell as study_cell
from foretune.cli import run
from foretune.errors import StoreError
from foretune.evaluation.correlations import correlation_table, regret_table, summarise
from foretune.evaluation.records import CELLS_CSV, CURVES_CSV, read_records
from foretune.evaluation.statistics import COEFFICIENTS, SCOPES
from foretune.report.provenance import usable_cores
from foretune.study.cell import cell_folder, cell_record
from foretune.study.grid import read_grid
from foretune.study.jobs import Job, run_job
from foretune.study.keys import cell_key
from foretune.study.stored import MEASURED

import cases

PLACEMENTS = [{"target_modules": ["query", "value"], "layers": [0]}, {"target_modules": ["query", "value"]}]


def write_grid(folder: Path, model: str, dataset: str, **changes) -> str:
    content = {
        "models": [{"model": model, "name": "tiny"}],
        "datasets": [{"dataset": dataset, "name": "reviews"}],
        "placements": PLACEMENTS,
        "seeds": [0, 1],
        "score": {"samples": 8, "eval_samples": 8, "draws": 2},
        "train": {"epochs": 3, "learning_rate": 2e-2, "train_batch_size": 4},
        **changes,
    }
    path = folder / f"grid-{len(list(folder.iterdir()))}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, cases.save(folder / "model"), cases.write_reviews(folder / "reviews")


@pytest.fixture(scope="module")
def grid(place):
    return write_grid(*place)


@pytest.fixture(scope="module")
def undisturbed(place, grid):
    store = place[0] / "undisturbed"
    assert run(["study", grid, "--output", str(store)]) == 0
    return store


def table(store: Path, out: Path) -> list[dict[str, str]]:
    """The cells as the report writes them, without the clock."""
    assert run(["study", "report", str(store), "--output", str(out), "--resamples", "100"]) == 0
    with (out / CELLS_CSV).open(encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if not k.startswith("seconds_")} for row in csv.DictReader(file)]


def kernel_regression(score):
    return score.get("kernel_regression", score.get("forecast"))


def test_every_cell_is_stored(undisturbed, grid, capsys):
    cells = read_grid(Path(grid))
    assert len(cells) == 4
    for cell in cells:
        folder = cell_folder(undisturbed, cell_key(cell))
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        assert record["names"] == cell.names
        score = json.loads((folder / "score" / "result.json").read_text(encoding="utf-8"))
        tune = json.loads((folder / "tune" / "result.json").read_text(encoding="utf-8"))
        assert record["quantities"]["condition_number"] == score["kernel"]["condition_number"]
        assert record["quantities"]["kernel_regression_eval_accuracy"] == kernel_regression(score)["eval_accuracy"]
        assert record["outcomes"]["accuracy"] == tune["final"]["eval_accuracy"]
        assert record["outcomes"]["train_loss"] == tune["final"]["train_loss"]
        assert record["seconds"]["load"] > 0
        assert (folder / "tune" / "adapter" / "adapter_config.json").exists()
    assert not list((undisturbed / "cells").glob("*.part"))
    assert run(["study", grid, "--output", str(undisturbed), "--plan"]) == 0
    assert capsys.readouterr().out.count("finished") == 5  # four cells and the caption


def test_a_cell_is_what_score_and_tune_give(undisturbed, place, tmp_path):
    """The same flags, one command at a time."""
    _, model, dataset = place
    common = ["--model", model, "--dataset", dataset, "--target-modules", "query", "value", "--seed", "1"]
    assert run(["score", *common, "--samples", "8", "--eval-samples", "8", "--draws", "2",
                "--output", str(tmp_path / "score")]) == 0  # fmt: skip
    assert run(["tune", *common, "--epochs", "3", "--learning-rate", "2e-2", "--train-batch-size", "4",
                "--output", str(tmp_path / "tune")]) == 0  # fmt: skip
    score = json.loads((tmp_path / "score" / "result.json").read_text(encoding="utf-8"))
    tune = json.loads((tmp_path / "tune" / "result.json").read_text(encoding="utf-8"))
    (record,) = (r for r in read_records(undisturbed) if (r.placement, r.seed) == ("query,value", 1))
    assert record.quantities["condition_number"] == score["kernel"]["condition_number"]
    assert record.quantities["kernel_regression_eval_loss"] == kernel_regression(score)["eval_loss"]
    assert record.outcomes["eval_loss"] == tune["final"]["eval_loss"]
    assert len(record.steps) == tune["steps"] == 45


@pytest.mark.parametrize("name", ["forecast", "kernel_regression"])
def test_a_score_under_the_former_and_the_present_name_gives_the_same_cell(undisturbed, grid, name):
    """A cell whose score an earlier version finished is completed."""
    cell = read_grid(Path(grid))[0]
    key = cell_key(cell)
    folder = cell_folder(undisturbed, key)
    score, tune, record = (
        json.loads((folder / path).read_text(encoding="utf-8"))
        for path in ("score/result.json", "tune/result.json", "result.json")
    )
    other = {"forecast": "kernel_regression", "kernel_regression": "forecast"}[name]
    for part in (score, score["seconds"], score["head_kernel"]):
        if part is not None and other in part:
            part[name] = part.pop(other)
    again = cell_record(cell, key, score, tune)
    for group in ("names", "facts", "quantities", "outcomes", "seconds"):
        assert again[group] == record[group], group


def test_what_is_finished_is_not_done_again(undisturbed, grid, monkeypatch, capsys):
    monkeypatch.setattr(study_cell, "_run_stages", lambda *_: pytest.fail("did a finished cell again"))
    assert run(["study", grid, "--output", str(undisturbed)]) == 0
    assert "4 cells, 4 of them finished" in capsys.readouterr().err


def test_a_changed_setting_is_a_new_cell(undisturbed, place, capsys):
    other = write_grid(*place, train={"epochs": 2, "learning_rate": 2e-2, "train_batch_size": 4})
    assert run(["study", other, "--output", str(undisturbed), "--plan"]) == 0
    assert capsys.readouterr().out.count("to do") == 4


def study_process(grid, store, *more):
    command = [sys.executable, "-W", "ignore", "-m", "foretune", "study", grid, "--output", str(store), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many threads as here: sums have the same order
    with open(f"{store}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def test_killed_at_random_points_it_ends_with_the_same_table(undisturbed, grid, tmp_path):
    store, rng = tmp_path / "store", random.Random(7)
    kills = 0
    for _ in range(3):
        process = study_process(grid, store)
        begun = time.monotonic()
        cells = store / "cells"
        before = len(list(cells.glob("*"))) if cells.exists() else 0
        while process.poll() is None and time.monotonic() - begun < 100:
            if cells.exists() and len(list(cells.glob("*"))) >= max(before, 1):
                break  # the imports are over
            time.sleep(0.02)
        time.sleep(rng.uniform(0.2, 2.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if cells.exists():  # whatever is finished can be read
            for folder in cells.iterdir():
                if folder.is_dir() and folder.suffix == "":
                    json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert kills
    last = study_process(grid, store)
    assert last.wait(timeout=200) == 0, Path(f"{store}.log").read_text(encoding="utf-8")
    assert table(store, tmp_path / "a") == table(undisturbed, tmp_path / "b")


def test_cut_off_between_any_two_files(grid, tmp_path, undisturbed, monkeypatch):
    """Every write of a cell fails once; each time the next start goes on."""
    import foretune.report.store as store_module

    cell = read_grid(Path(grid))[0]
    key = cell_key(cell)
    written, failed = [], set()
    replace = Path.replace

    def failing(self, target):
        target = Path(target)
        name = target.name
        if name not in failed:
            failed.add(name)
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(name)
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(store_module.Path, "replace", failing)
        for _ in range(20):
            report = run_job(Job(cell, key, tmp_path / "store"))
            if report.error is None:
                break
            assert report.fatal
            assert "No space left" in report.error
            assert not cell_folder(tmp_path / "store", key).exists()
    assert cell_folder(tmp_path / "store", key).is_dir()
    assert {"result.json", "adapter", "history.csv", "steps.csv", "score", "config.yaml", "loss.png"} <= failed
    (again,) = read_records(tmp_path / "store")
    (first,) = (r for r in read_records(undisturbed) if r.key == key)
    assert again.quantities == first.quantities
    assert {name: again.outcomes[name] for name in MEASURED} == {name: first.outcomes[name] for name in MEASURED}


def test_a_full_disk_ends_the_study_and_keeps_what_is_there(grid, tmp_path, monkeypatch, capsys):
    done = []
    finish = study_cell._run_stages

    def full(cell, key, part, on_progress):
        if done:
            raise OSError(errno.ENOSPC, "No space left on device")
        finish(cell, key, part, on_progress)
        done.append(key)

    monkeypatch.setattr(study_cell, "_run_stages", full)
    assert run(["study", grid, "--output", str(tmp_path / "store")]) == 2
    message = capsys.readouterr().err
    assert "No space left" in message
    assert "1 finished cells are kept" in message
    assert [record.key for record in read_records(tmp_path / "store")] == done


def test_interrupted_it_says_what_is_kept(grid, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(study_cell, "_run_stages", interrupted)
    assert run(["study", grid, "--output", str(tmp_path / "store")]) == 130
    assert "0 of 4 cells are finished and kept" in capsys.readouterr().err


def test_one_bad_cell_does_not_stop_the_others(place, tmp_path, capsys):
    placements = [{"target_modules": ["query"]}, {"target_modules": ["nothing"]}]
    bad = write_grid(*place, placements=placements, seeds=[0], train={"epochs": 1})
    assert run(["study", bad, "--output", str(tmp_path / "store")]) == 2
    message = capsys.readouterr().err
    assert "matches nothing" in message
    assert "1 cells failed" in message
    assert len(read_records(tmp_path / "store")) == 1


def test_a_fault_is_written_down_and_gives_exit_code_1(grid, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(study_cell, "_run_stages", broken)
    assert run(["study", grid, "--output", str(tmp_path / "store")]) == 1
    assert "ZeroDivisionError: a fault" in capsys.readouterr().err
    traces = list((tmp_path / "store" / "failed").glob("*.txt"))
    assert len(traces) == 4
    assert "Traceback" in traces[0].read_text(encoding="utf-8")


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 64


def test_several_processes_give_the_same_table(undisturbed, grid, tmp_path, monkeypatch):
    monkeypatch.setattr("foretune.engines.usable_cores", lambda: 2)  # one thread each, as here
    assert run(["study", grid, "--output", str(tmp_path / "store"), "--workers", "2"]) == 0
    assert table(tmp_path / "store", tmp_path / "a") == table(undisturbed, tmp_path / "b")


def test_workers_end_with_a_killed_parent(grid, tmp_path):
    process = study_process(grid, tmp_path / "store", "--workers", "2")
    cells = tmp_path / "store" / "cells"
    begun = time.monotonic()
    while not list(cells.glob("*.part")) and time.monotonic() - begun < 100 and process.poll() is None:
        time.sleep(0.05)
    workers = children(process.pid)
    assert workers
    process.kill()
    process.wait()
    begun = time.monotonic()
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() - begun < 20:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]


def test_ray_gives_the_same_table(undisturbed, place, grid, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default, which starves beside other tests
    ray.init(num_cpus=1, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    try:
        assert run(["study", grid, "--output", str(tmp_path / "store"), "--engine", "ray"]) == 0
    finally:
        ray.shutdown()
    assert table(tmp_path / "store", tmp_path / "a") == table(undisturbed, tmp_path / "b")


def test_a_store_that_is_a_file(grid, tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert run(["study", grid, "--output", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_the_report_of_a_study(undisturbed, tmp_path, capsys):
    rows = table(undisturbed, tmp_path / "report")
    assert [(row["placement"], row["seed"]) for row in rows] == [
        ("query,value", "0"), ("query,value", "1"), ("{0} query,value", "0"), ("{0} query,value", "1"),
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert "Spearman's ρ over all cells" in out
    assert "Accuracy lost by the placement" in out
    report = summarise(read_records(undisturbed), resamples=100)
    for coefficient in COEFFICIENTS:
        for scope in SCOPES:
            expected = correlation_table(report, coefficient, scope)
            file = tmp_path / "report" / f"{coefficient}-{scope}"
            assert file.with_suffix(".md").read_text(encoding="utf-8") == expected.markdown()
            assert file.with_suffix(".tex").read_text(encoding="utf-8") == expected.latex()
            with file.with_suffix(".csv").open(encoding="utf-8") as listed:
                assert [tuple(row) for row in csv.reader(listed)] == [expected.header, *expected.rows]
    assert (tmp_path / "report" / "regret.tex").read_text(encoding="utf-8") == regret_table(report).latex()
    with (tmp_path / "report" / CURVES_CSV).open(encoding="utf-8") as listed:
        losses = [(row["key"], int(row["step"]), float(row["loss"])) for row in csv.DictReader(listed)]
    assert losses == [(record.key, step.step, step.loss) for record in report.records for step in record.steps]


def test_a_report_can_be_made_from_its_own_csv(undisturbed, tmp_path):
    rows = table(undisturbed, tmp_path / "first")
    assert table(tmp_path / "first", tmp_path / "second") == rows
    for name in ("correlations.csv", "regret.csv", "curves.csv"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_a_store_with_two_grids_wants_one_named(undisturbed, place, grid, tmp_path, capsys):
    two = tmp_path / "two"
    for path in (undisturbed / "cells").iterdir():
        if path.is_dir():
            (two / "cells").mkdir(parents=True, exist_ok=True)
            (two / "cells" / path.name).symlink_to(path)
    other = write_grid(*place, seeds=[0], placements=PLACEMENTS[:1], train={"epochs": 1})
    assert run(["study", other, "--output", str(two)]) == 0
    assert run(["study", "report", str(two)]) == 2
    assert "choose with --grid" in capsys.readouterr().err
    assert run(["study", "report", str(two), "--grid", grid, "--resamples", "100"]) == 0
    assert len(read_records(two, read_grid(Path(grid)))) == 4


@pytest.mark.parametrize("more", [[], ["--resamples", "5"]])
def test_reports_of_nothing(tmp_path, more, capsys):
    assert run(["study", "report", str(tmp_path), *more]) == 2
    assert "resamples = 5" in capsys.readouterr().err or not more
    (tmp_path / "cells").mkdir()
    with pytest.raises(StoreError, match="no finished cell"):
        read_records(tmp_path)
