"""The file only grows: whole lines, once each, whoever else writes, whatever happened to it."""

import os
import subprocess
import sys

import pytest

from foretune.errors import StoreError
from foretune.ledger import files
from foretune.ledger.entries import COLUMNS
from foretune.ledger.files import append, own_ledger, read_ledger
from made_entries import LINE, line

OTHER = line(run="2" * 20)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "ledger.csv"


def test_the_own_ledger_is_that_of_the_home(foretune_home, monkeypatch):
    assert own_ledger() == foretune_home / "ledger.csv"
    assert read_ledger() == ()
    append([LINE], own_ledger())
    assert read_ledger() == (LINE,)
    monkeypatch.setenv("HOME", str(foretune_home / "user"))
    monkeypatch.setenv("FORETUNE_HOME", "~/mine")
    assert own_ledger() == foretune_home / "user" / "mine" / "ledger.csv"
    monkeypatch.delenv("FORETUNE_HOME")
    assert own_ledger() == foretune_home / "user" / ".foretune" / "ledger.csv"


def test_a_line_is_added_once(path):
    assert append([LINE, LINE], path) == 1
    first = path.read_bytes()
    assert append([LINE], path) == 0
    assert path.read_bytes() == first
    assert append([OTHER, LINE, line(hash="3" * 64)], path) == 2
    assert path.read_bytes().startswith(first)
    assert path.read_text(encoding="utf-8").count("made,") == 1
    assert read_ledger(path) == (LINE, OTHER, line(hash="3" * 64))


DAMAGE = {
    "cut off": lambda row: row[:-40],
    "a cell too many": lambda row: row + ",x",
    "no number": lambda row: row.replace("0.85", "O.85"),
    "no state": lambda row: row.replace(",ok,", ",fine,"),
    "a quote that never ends": lambda row: '"' + row,
    "something else": lambda _: "hello",
    "bytes": lambda _: "\udcff\udcfe",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("last", [False, True])
def test_a_damaged_line_is_passed_over_with_a_word_and_stays(path, damage, last):
    append([LINE], path)
    row = path.read_text(encoding="utf-8").splitlines()[1]
    with path.open("ab") as file:
        file.write(os.fsencode(damage(row)) + (b"" if last else b"\n"))
    before = path.read_bytes()
    notes = []
    assert read_ledger(path, on_note=notes.append) == (LINE,)
    assert len(notes) == 1
    assert "line 3" in notes[0]
    assert append([OTHER], path) == 1
    assert path.read_bytes().startswith(before)
    with pytest.warns(UserWarning, match="line 3 cannot be read"):
        assert read_ledger(path) == (LINE, OTHER)


def test_a_line_that_lacks_only_its_end_is_one(path):
    append([LINE], path)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    append([OTHER], path)
    assert read_ledger(path) == (LINE, OTHER)


@pytest.mark.parametrize("content", ["", "\n", "\ufeff"])
def test_an_empty_file_gets_its_header(path, content):
    path.parent.mkdir()
    path.write_text(content, encoding="utf-8")
    assert read_ledger(path) == ()
    append([LINE], path)
    assert read_ledger(path) == (LINE,)


def test_columns_of_a_later_version_stay_where_they_are(path):
    path.parent.mkdir()
    path.write_text(",".join(["mood", *COLUMNS[::-1]]) + "\r\n", encoding="utf-8")
    append([LINE], path)
    assert path.read_text(encoding="utf-8").splitlines()[1].startswith(",,ok,")
    assert read_ledger(path) == (LINE,)


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "made,began\n", "\0\0", "# notes\n", "x" * 200_000])
def test_something_else_is_no_ledger_and_stays_as_it_is(path, content):
    path.parent.mkdir()
    path.write_text(content, encoding="utf-8")
    for act in (lambda: read_ledger(path), lambda: append([LINE], path)):
        with pytest.raises(StoreError, match="no ledger") as caught:
            act()
        assert len(str(caught.value)) < 400
    assert path.read_text(encoding="utf-8") == content


def test_a_folder_is_no_ledger(tmp_path):
    for act in (lambda: read_ledger(tmp_path), lambda: append([LINE], tmp_path)):
        with pytest.raises(StoreError, match="cannot read the ledger"):
            act()


def test_a_full_disk_leaves_the_ledger_as_it_was(path, monkeypatch):
    append([LINE], path)
    before, write = path.read_bytes(), os.write
    calls = []

    def fail(descriptor, data):
        calls.append(data)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:7])

    monkeypatch.setattr(files.os, "write", fail)
    with pytest.raises(StoreError, match="No space left"):
        append([OTHER], path)
    assert path.read_bytes() == before


def test_processes_write_one_after_the_other(path):
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path; from made_entries import line;"
        "from foretune.ledger.files import append;"
        "[append([line(run=f'{sys.argv[2]}-{i}'), line(run=f'all-{i}')], Path(sys.argv[1])) for i in range(20)]"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(path), str(n)]) for n in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    runs = [entry.run for entry in read_ledger(path)]
    assert len(runs) == 80
    assert set(runs) == {f"{n}-{i}" for n in (0, 1, 2, "all") for i in range(20)}


def test_a_ledger_that_is_held_too_long_is_said_to_be(path, monkeypatch):
    append([LINE], path)
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    with (
        files.FileLock(files.beside(path, files.LOCK)),
        pytest.raises(StoreError, match="in use by another run"),
    ):
        append([OTHER], path)
