"""Output folders of every command: one run at a time, whole or not at all, nothing left behind."""

import json
import os
import subprocess
import sys
import threading

import pytest
from filelock import FileLock
from safetensors import SafetensorError

from foretune.cli import run
from foretune.errors import StoreError
from foretune.report.folders import LOCK, PART, beside, disk, hold, lock_file, place_of
from foretune.report.store import check_free, check_writable, write_json, write_run, write_text, write_whole

import cases

FILES = {
    "b.txt": lambda path: path.write_text("b"),
    "result.json": lambda path: write_json(path, {}),
    "a.txt": lambda path: path.write_text("a"),
}
TRAINING = ["--target-modules", "query", "--epochs", "1", "--train-batch-size", "8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    return cases.save(folder / "model"), cases.write_reviews(folder / "reviews", 24, 8)


@pytest.fixture(scope="module")
def commands(place):
    common = ["--model", place[0], "--dataset", place[1]]
    few = ["--samples", "8", "--eval-samples", "6", "--draws", "1"]
    return {
        "score": ["score", *common, *few, "--target-modules", "query"],
        "tune": ["tune", *common, *TRAINING],
        "rank": ["rank", *common, *few, "--target-modules", "query", "--ranks", "2", "--epochs", "1"],
        "demo": ["demo", "--samples", "4"],
    }


def error_of(captured):
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured.err
    return line


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("command", ["score", "tune", "rank", "demo"])
@pytest.mark.parametrize("existing", [False, True])
def test_two_runs_in_one_folder_are_one_too_many(commands, tmp_path, capsys, command, existing):
    out = tmp_path / "out"
    if existing:
        out.mkdir()
    with FileLock(lock_file(place_of(out))):  # as another process holds it
        assert run([*commands[command], "--output", str(out)]) == 2
    assert f"{str(out)!r} is in use by another run" in error_of(capsys.readouterr())
    assert everything(tmp_path) == [f".out{LOCK}", *(["out"] if existing else [])]


def test_two_processes_of_a_fine_tune(commands, tmp_path):
    """The second is refused while the first goes on, and the first is not disturbed."""
    out = tmp_path / "out"
    tokens = [*commands["tune"][:-4], "--epochs", "400", "--train-batch-size", "8", "--output", str(out)]
    first = subprocess.Popen([sys.executable, "-m", "foretune", *tokens], stderr=subprocess.DEVNULL)
    try:
        while not (out / "config.yaml").exists():
            assert first.poll() is None
        assert run(tokens) == 2
        assert run([*commands["rank"], "--output", str(out)]) == 2
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert (tmp_path / f".out{LOCK}").exists()
    with hold(out):  # a lock ends with its process
        pass
    assert not (tmp_path / f".out{LOCK}").exists()


def test_a_lock_is_for_all_names_of_a_folder_and_for_one_thread(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    refused = []

    def second(name):
        try:
            with hold(name):
                pass
        except StoreError as error:
            refused.append(str(error))

    with hold(tmp_path / "out"), hold(tmp_path / "out"):
        for name in (tmp_path / "link", tmp_path / "out" / ".." / "out", place_of(tmp_path).relative_to("/")):
            if name.is_absolute():
                thread = threading.Thread(target=second, args=(name,))
                thread.start()
                thread.join()
    assert len(refused) == 2
    assert everything(tmp_path) == ["link", "out"]


def test_a_folder_above_that_is_read_only_has_the_lock_inside(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and real(path, mode))
    with hold(tmp_path / "out"):
        assert everything(tmp_path) == ["out", f"out/{LOCK}"]
        check_free(tmp_path / "out")
    write_run(tmp_path / "out", FILES)
    assert everything(tmp_path) == ["out", "out/a.txt", "out/b.txt", "out/result.json"]


NAMES = ["[a]x", "[red]", "[bold", "üñí ☃", "new\nline", "n" * 250, "-x", "a'b\"c", "*?", " ", "%s{0}", "x.tar.gz"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("existing", [False, True])
def test_folders_of_any_name(tmp_path, name, existing):
    if existing:
        (tmp_path / name).mkdir()
    write_run(tmp_path / name, FILES)
    assert os.listdir(tmp_path) == [name]
    assert sorted(os.listdir(tmp_path / name)) == ["a.txt", "b.txt", "result.json"]


@pytest.mark.parametrize("given", [".", "./", "new", "new/", "deep/er/new", "../here/other", "~/new", "link", "$HOME"])
def test_folders_however_they_are_named(tmp_path, monkeypatch, given):
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere") if given == "link" else None
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "elsewhere"))
    from pathlib import Path

    write_run(Path(given), FILES)
    expected = {"~/new": tmp_path / "elsewhere" / "new", "link": tmp_path / "elsewhere"}
    assert (expected.get(given, Path(given)) / "result.json").is_file()
    assert Path("result.json").is_file() == (given in (".", "./"))  # the working folder is still the same one
    assert not [name for name in everything(tmp_path) if LOCK in name or PART in name]


def refused(tmp_path, kind):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "run",
        "deep below a file": tmp_path / "file" / "deep" / "run",
        "a long name": tmp_path / ("n" * 300),
        "a long path": tmp_path.joinpath(*["n" * 200] * 30),
        "not empty": tmp_path / "full",
        "a dangling link": tmp_path / "nowhere",
        "a loop": tmp_path / "loop",
        "below a loop": tmp_path / "loop" / "run",
        "nobody's home": "~nobody-of-that-name/run",
    }[kind]


REFUSED = ["a file", "below a file", "deep below a file", "a long name", "a long path", "not empty", "a dangling link"]
REFUSED += ["a loop", "below a loop", "nobody's home"]


@pytest.mark.parametrize("command", ["score", "tune", "rank", "demo"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_an_output_is_refused_before_the_work(commands, tmp_path, capsys, monkeypatch, command, kind):
    monkeypatch.chdir(tmp_path)
    output = refused(tmp_path, kind)
    before = everything(tmp_path)
    monkeypatch.setattr("foretune.tasks.load.load_task", lambda *_: pytest.fail("the work has begun"))
    assert run([*commands[command], "--output", str(output)]) == 2
    assert len(error_of(capsys.readouterr())) < 8000
    assert everything(tmp_path) == before
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "mine").read_text() == "mine"


@pytest.mark.parametrize("check", [check_free, check_writable])
def test_a_folder_that_nothing_can_be_made_in(tmp_path, monkeypatch, check):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StoreError, match="not writable"):
        check(tmp_path / "run")


def killed(monkeypatch, at):
    """Raise at the n-th rename, and leave everything as it is then, as a kill does."""
    import pathlib

    calls, real = [0], pathlib.Path.replace

    def replace(self, target):
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", replace)
    monkeypatch.setattr("foretune.report.store.remove", lambda path: None)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_what_a_killed_run_left_is_swept_by_the_next(tmp_path, at, existing):
    out = tmp_path / "out"
    if existing:
        out.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        killed(patch, at if existing else 1)
        with pytest.raises(KeyboardInterrupt):
            write_run(out, FILES)
    assert not (out / "result.json").exists()
    check_free(out)
    write_run(out, FILES)
    assert everything(tmp_path) == ["out", "out/a.txt", "out/b.txt", "out/result.json"]


def test_the_users_files_are_never_swept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("mine", ".out.abcdefgh", f"x{PART}", ".1.mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    (tmp_path / f".out{PART}").symlink_to(tmp_path / "mine")  # a link is not followed
    (out / PART).symlink_to(tmp_path / "mine")
    before = everything(tmp_path / "mine")
    write_run(out, FILES)
    write_run(tmp_path / "new", FILES)
    assert everything(tmp_path / "mine") == before
    assert sorted(os.listdir(out)) == ["a.txt", "b.txt", "result.json"]
    with pytest.raises(StoreError, match="already holds a run"):
        write_run(out, FILES)
    (tmp_path / "torn" / PART).mkdir(parents=True)
    (tmp_path / "torn" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="not empty"):
        write_run(tmp_path / "torn", FILES)


FAULTS = [
    OSError(28, "No space left on device"),
    OSError(30, "Read-only file system"),
    PermissionError(13, "Permission denied"),
    OSError("no number"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    RuntimeError("basic_ios::clear: iostream error"),
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest.mark.parametrize("existing", [False, True])
def test_a_fault_of_the_disk_is_one_line_and_leaves_nothing(tmp_path, fault, existing):
    if existing:
        (tmp_path / "out").mkdir()

    def fail(path):
        path.write_text("half")
        raise fault

    for write in (
        lambda: write_run(tmp_path / "out", {**FILES, "z.txt": fail}),
        lambda: write_whole(tmp_path / "file.txt", fail),
    ):
        with pytest.raises(StoreError) as caught:
            write()
        assert "\n" not in str(caught.value)
        assert everything(tmp_path) == (["out"] if existing else [])


@pytest.mark.parametrize("fault", [ValueError("ours"), KeyError("ours"), RuntimeError("ours"), ZeroDivisionError()])
def test_a_fault_of_ours_stays_one(fault):
    with pytest.raises(type(fault)), disk("cannot write"):
        raise fault


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o027, 0o077])
def test_modes_follow_the_umask(commands, tmp_path, umask):
    def private(path):
        path.write_text("x")
        path.chmod(0o600)

    (tmp_path / "old").mkdir()
    before = os.umask(umask)
    try:
        write_run(tmp_path / "old", {"result.json": private})
        write_run(tmp_path / "new", {"result.json": private})
        write_whole(tmp_path / "file", private)
        if umask in (0o000, 0o027):
            assert run([*commands["tune"], "--output", str(tmp_path / "tuned")]) == 0
            assert run([*commands["rank"], "--output", str(tmp_path / "ranked")]) == 0
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        if path != tmp_path / "old":
            mode = path.stat().st_mode & 0o777
            assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, (path, oct(mode))


def test_a_whole_file_replaces_a_link_and_sweeps_its_own_leftovers(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "file").symlink_to(tmp_path / "mine")
    (tmp_path / ".4999999.file").write_text("half")  # of a process that is gone
    (tmp_path / ".4999999.other").write_text("another file's")
    (tmp_path / f".{os.getppid()}.file").write_text("of a process that lives")
    (tmp_path / f".{os.getpid()}.file").symlink_to(tmp_path / "mine")
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()
    assert everything(tmp_path) == sorted([".4999999.other", f".{os.getppid()}.file", "file", "mine"])


def test_names_beside_a_folder_fit_on_the_disk(tmp_path):
    for name in ("x", "n" * 255, "ü" * 120):
        assert len(os.fsencode(beside(tmp_path / name, LOCK).name)) <= 255
    assert beside(tmp_path / ("n" * 255), LOCK) != beside(tmp_path / ("n" * 254 + "m"), LOCK)


@pytest.mark.parametrize("command", ["score", "rank"])
def test_a_full_disk_after_the_work_is_one_line(commands, tmp_path, capsys, monkeypatch, command):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert run([*commands[command], "--output", str(tmp_path / "out")]) == 2
    assert "No space left on device" in error_of(capsys.readouterr())
    assert everything(tmp_path) == []


@pytest.mark.parametrize("flags", [["--eval-samples", "0"], ["--samples", "2"], ["--samples", "4", "--seed", "3"]])
def test_a_forecast_finds_out_before_the_work(commands, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.setattr(
        "foretune.forecasting.forecast.run_forecast", lambda *_, **__: pytest.fail("the work has begun")
    )
    tokens = ["forecast", *commands["score"][1:], *flags, "--output", str(tmp_path / "out")]
    for flag in ("--eval-samples", "--samples", "--draws"):  # those of the score, and draws a forecast has none
        if flag in flags or flag == "--draws":
            at = tokens.index(flag)
            del tokens[at : at + 2]
    assert run(tokens) == 2
    assert "samples" in error_of(capsys.readouterr())
    assert everything(tmp_path) == []


def test_json_that_cannot_be_read_is_one_line(tmp_path):
    from foretune.report.store import read_json

    for number, content in enumerate([b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"nul", b"9" * 10_000]):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        with pytest.raises(StoreError, match=rf"{number}\.json"):
            read_json(path)
    with pytest.raises(StoreError, match=r"none\.json"):
        read_json(tmp_path / "none.json")
    assert json.loads('{"a": 1}') == {"a": 1}
