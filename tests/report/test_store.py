import json
import os

import pytest

from foretune.errors import StoreError
from foretune.report.store import check_free, to_json, write_files, write_json, write_run


def writers(**more):
    return {"result.json": lambda path: write_json(path, {"κ": 1.5}), **more}


def test_writes_all_files_and_nothing_beside(tmp_path):
    run = tmp_path / "deep" / "run"
    write_run(run, writers(**{"a.txt": lambda path: path.write_text("a")}))
    assert sorted(os.listdir(run)) == ["a.txt", "result.json"]
    assert json.loads((run / "result.json").read_text(encoding="utf-8")) == {"κ": 1.5}
    assert os.listdir(tmp_path / "deep") == ["run"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", writers())
    assert (tmp_path / "run" / "result.json").exists()


def test_an_older_run_is_never_overwritten(tmp_path):
    run = tmp_path / "run"
    write_run(run, writers())
    before = (run / "result.json").read_bytes()
    with pytest.raises(StoreError, match="already holds a run"):
        write_run(run, writers())
    assert (run / "result.json").read_bytes() == before


def test_what_cannot_be_a_run_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file"):
        check_free(tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(StoreError, match="not empty"):
        check_free(tmp_path / "full")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_behind(tmp_path, error):
    def fail(path):
        path.write_text("half")
        raise error

    with pytest.raises((StoreError, KeyboardInterrupt)):
        write_run(tmp_path / "run", writers(**{"b.txt": fail}))
    assert os.listdir(tmp_path) == []


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    def private(path):
        path.write_text("x")
        path.chmod(0o600)

    before = os.umask(0o022)
    try:
        write_run(tmp_path / "run", writers(kernel=private))
    finally:
        os.umask(before)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "run" / "kernel").stat().st_mode & 0o777 == 0o644


def test_json_refuses_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"x": float("nan")})


def test_a_set_of_files_takes_the_place_of_an_earlier_one(tmp_path):
    folder = tmp_path / "report"
    for text in ("old", "new"):
        paths = write_files(folder, {name: lambda path, text=text: path.write_text(text) for name in ("a.csv", "b.md")})
        (folder / "mine.txt").write_text("stays")
    assert paths == [folder / "a.csv", folder / "b.md"]
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "a.csv": "new",
        "b.md": "new",
        "mine.txt": "stays",
    }
    assert os.listdir(tmp_path) == ["report"]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_set_of_files_that_cannot_be_written_leaves_the_earlier_one(tmp_path, fault):
    folder = tmp_path / "report"
    write_files(folder, {name: lambda path: path.write_text("old") for name in ("a.csv", "b.md")})

    def fail(path):
        path.write_text("half")
        raise fault

    with pytest.raises((StoreError, KeyboardInterrupt)):
        write_files(folder, {"a.csv": lambda path: path.write_text("new"), "b.md": fail})
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a.csv": "old", "b.md": "old"}


def test_what_a_killed_report_left_is_swept_away(tmp_path):
    folder = tmp_path / "report"
    (folder / ".foretune-part").mkdir(parents=True)
    (folder / ".foretune-part" / "a.csv").write_text("half")
    write_files(folder, {"b.md": lambda path: path.write_text("whole")})
    assert os.listdir(folder) == ["b.md"]
