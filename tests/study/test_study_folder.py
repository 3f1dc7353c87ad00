"""The folder of a study: damaged cells, links, and what killed runs leave."""

import os
import stat

import pytest
import yaml

import foretune.evaluation.simulations as simulations
import foretune.study.cell as study_cell
import foretune.study.runs as runs
from foretune.cli import run
from foretune.study.cell import cell_folder
from foretune.study.grid import read_grid
from foretune.study.jobs import Job, run_job
from stored import CONTENTS, FILES, write_cell

KEY = "0123456789abcdef0123"


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """A grid of two cells whose work is only written down."""
    path = tmp_path / "grid.yaml"
    content = {"models": ["m"], "datasets": ["[/a]d"], "placements": [{}], "seeds": [0, 1]}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    monkeypatch.setattr(runs, "stored_key", lambda cell, _: f"{cell.train.seed}{KEY[1:]}")
    worked = []

    def fake(cell, key, part, on_progress):
        worked.append(key)
        written = write_cell(part / "new", key, seed=cell.train.seed)
        for child in written.iterdir():
            child.replace(part / child.name)
        for folder in (written, written.parent, written.parent.parent):
            folder.rmdir()

    monkeypatch.setattr(study_cell, "_run_stages", fake)
    return path, tmp_path / "[/b]store", worked


def study(grid, *more):
    return run(["study", str(grid[0]), "--output", str(grid[1]), *more])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in CONTENTS.items()])
def test_a_damaged_cell_is_named_kept_and_computed_again(grid, file, content, capsys):
    assert study(grid) == 0
    first = cell_folder(grid[1], f"0{KEY[1:]}")
    (first / file).write_bytes(content)
    assert study(grid, "--plan") == 0
    planned = capsys.readouterr().out
    assert planned.count("damaged") == 1
    assert "1 of them finished" in planned
    del grid[2][:]
    assert study(grid) == 0
    assert grid[2] == [first.name]  # and the other one is not done again
    error = capsys.readouterr().err
    assert f"cell {first.name}" in error
    assert f"{first.name}.damaged" in error
    assert (first.with_name(f"{first.name}.damaged") / file).read_bytes() == content
    assert study(grid) == 0
    assert "2 of them finished" in capsys.readouterr().err


def test_what_a_killed_run_left_is_swept_and_the_rest_kept(grid):
    part = cell_folder(grid[1], f"0{KEY[1:]}.part")
    (part / ".score.abc").mkdir(parents=True)
    (part / ".score.abc" / "kernel.safetensors").write_bytes(b"half")
    (part / ".123.result.json").write_bytes(b"half")
    (part / "score").mkdir()
    (part / "score" / "mine").write_bytes(b"whole")
    assert study(grid) == 0
    final = cell_folder(grid[1], f"0{KEY[1:]}")
    assert sorted(os.listdir(final)) == ["result.json", "score", "tune"]
    assert (final / "score" / "mine").read_bytes() == b"whole"


@pytest.mark.parametrize("where", ["part", "score", "tune", "lock", "cells", "damaged"])
def test_a_link_in_the_folder_is_not_followed(grid, where, tmp_path, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"x")
    cells = grid[1] / "cells"
    key = f"0{KEY[1:]}"
    if where == "cells":
        grid[1].mkdir(parents=True)
        cells.symlink_to(outside)
    else:
        (cells / f"{key}.part").mkdir(parents=True)
        name = {"part": f"{key}.part", "lock": f".{key}.lock", "damaged": f"{key}.damaged"}.get(
            where, f"{key}.part/{where}"
        )
        if where == "part":
            (cells / name).rmdir()
        (cells / name).symlink_to(outside / "precious" if where == "lock" else outside)
    code = study(grid)
    assert code == (2 if where in ("lock", "cells") else 0)
    assert ("is a link" in capsys.readouterr().err) == (code == 2)
    if where == "damaged":
        (cells / key / "result.json").write_bytes(b"")
        assert study(grid) == 0
        assert not (cells / f"{key}.damaged").is_symlink()
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == {"precious": b"x"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
    ids=repr,
)
def test_a_full_disk_is_one_in_every_librarys_words(grid, error, monkeypatch, capsys):
    def full(*_):
        raise error

    monkeypatch.setattr(study_cell, "_run_stages", full)
    assert study(grid) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "0 finished cells are kept" in message
    assert not (grid[1] / "failed").exists()


def test_no_memory_for_one_cell_is_not_the_end_of_the_others(grid, monkeypatch):
    monkeypatch.setattr(study_cell, "_run_stages", lambda *_: (_ for _ in ()).throw(MemoryError()))
    report = run_job(Job(read_grid(grid[0])[0], KEY, grid[1]))
    assert (report.fatal, report.fault) == (False, False)
    assert report.error.startswith("not enough memory")


def test_a_stage_whose_result_is_damaged_is_done_again(tmp_path):
    for content in CONTENTS.values():
        folder = tmp_path / "score"
        folder.mkdir(exist_ok=True)
        (folder / "result.json").write_bytes(content)
        done = study_cell._finished(folder)
        assert done == (content == b"{}")
        assert folder.exists() == done


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(grid, umask):
    before = os.umask(umask)
    try:
        assert study(grid) == 0
    finally:
        os.umask(before)
    cells = grid[1] / "cells"
    for folder in (grid[1], cells, *(path for path in cells.iterdir() if path.is_dir())):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("workers", ["0", "-1", "99999999"])
def test_an_absurd_number_of_workers(grid, workers, capsys):
    assert study(grid, "--workers", workers) == 2
    assert "workers = " in capsys.readouterr().err


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in CONTENTS.items()])
def test_a_damaged_simulation_is_made_again(content, tmp_path):
    (tmp_path / "outlooks").mkdir()
    (tmp_path / "outlooks" / f"{KEY}.json").write_bytes(content)
    assert not simulations._is_made(tmp_path, KEY, simulations.SimulationSettings())
