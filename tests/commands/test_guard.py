"""What becomes of an error, an interrupt and a stream that nobody reads."""

import errno
import os
import subprocess
import sys

import pytest
import yaml
from cyclopts import CycloptsError

import foretune.cli as cli
from foretune.cli import run
from foretune.errors import ConfigError, StoreError


@pytest.mark.parametrize("tokens", [[], ["study"]])
def test_without_arguments_there_is_help(tokens, capsys):
    assert run(tokens) == 0
    captured = capsys.readouterr()
    assert "Usage: foretune" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(
    "tokens", [["score"], ["tune"], ["rank"], ["paper"], ["study", "report"], ["study", "outlook"]]
)
def test_a_command_without_what_it_needs_says_so(tokens, capsys):
    assert run(tokens) == 2
    assert capsys.readouterr().err.count("\n") == 1


def raising(error):
    def app(*_, **__):
        raise error

    return app


def wrapped(error):
    try:
        raise RuntimeError("while saving") from error
    except RuntimeError as outer:
        return outer


OUTSIDE = [
    *(
        OSError(getattr(errno, name), "refused", "x")
        for name in ("ENOSPC", "EACCES", "EROFS", "ENAMETOOLONG", "EIO", "EMFILE")
    ),
    wrapped(OSError(errno.ENOSPC, "No space left on device")),
    RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    ConfigError("a = 1: must be 2"),
    StoreError("x"),
    CycloptsError(msg="Invalid"),
]


@pytest.mark.parametrize("error", OUTSIDE, ids=repr)
def test_faults_of_the_outside_are_one_line_and_exit_code_2(error, monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", raising(error))
    assert run(["score"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "error", [KeyError("x"), ValueError("y"), RecursionError(), FileNotFoundError(2, "z"), AttributeError()]
)
def test_other_faults_keep_their_traceback_and_are_called_our_own(error, monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", raising(error))
    assert run(["score"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("Traceback")
    last = message.strip().rsplit("\n", 1)[-1]
    assert last.startswith("foretune failed, by a fault of its own or of a library")
    assert type(error).__name__ in last


def test_an_interrupt(monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", raising(KeyboardInterrupt()))
    assert run(["score"]) == 130
    assert capsys.readouterr().err == "interrupted: nothing was saved\n"


@pytest.mark.parametrize("kind", [ConfigError, StoreError, lambda text: CycloptsError(msg=text)])
def test_a_message_is_never_longer_than_a_few_lines(kind, monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", raising(kind(f"begin {'x' * 50_000}\n\n{'y' * 50_000} end")))
    assert run(["score"]) == 2
    message = capsys.readouterr().err
    assert len(message) <= 1000
    assert message.startswith("error: begin xxx")
    assert message.endswith("yyy end\n")


@pytest.mark.parametrize(
    "text", ["[/a]x", "[red]x[/red]", "a\x1b[31mb", "a\x9bb", "a\u202eb", "a\udc80b", "a\x00b", "a\x7fb"]
)
@pytest.mark.parametrize("where", ["error", "fault", "interrupt", "argument"])
def test_what_a_message_holds_is_data(text, where, monkeypatch, capsys):
    if where == "argument":
        run(["score", "--nosuch", text, text])
    else:
        error = {"error": ConfigError(text), "fault": ValueError(text), "interrupt": KeyboardInterrupt(text)}[where]
        monkeypatch.setattr(cli, "app", raising(error))
        run(["score"])
    message = capsys.readouterr().err
    assert all(character.isprintable() or character == "\n" for character in message)
    if where != "argument":
        assert text.encode("unicode_escape").decode().replace("\\\\", "\\") in message or text in message


PRINT = """
import sys
from foretune.report.terminal import *
from foretune.report.tables import Table
open_streams()
console(stderr=True).print("κ ± σ … on stderr")
console().print("κ ≥ λ_max × ∞ ☃")
Table("Spearman's ρ – •", ("κ", "λ"), (("a · b" * 9, "√2"),)).show(console())
print_json('{"κ": "☃"}')
console(stderr=True).print("done")
for stream in (sys.stdout, sys.stderr):
    close_stream(stream)  # as the command does at its end
"""


def printed(tmp_path, command="{python} {script}", **environment):
    script = tmp_path / "script.py"
    script.write_text(PRINT, encoding="utf-8")
    held = {**os.environ, "PYTHONIOENCODING": "", **environment}
    line = command.format(python=sys.executable, script=script)
    return subprocess.run(["bash", "-c", line], capture_output=True, env=held, check=False)


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "cp1252"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"LC_ALL": "POSIX"},
        {"COLUMNS": "20"},
        {"COLUMNS": "1"},
        {"TERM": "dumb"},
        {"FORCE_COLOR": "1", "COLUMNS": "20"},
    ],
    ids=str,
)
def test_every_stream_and_every_width_can_be_printed_to(environment, tmp_path):
    done = printed(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert b"done" in done.stderr
    if environment.get("PYTHONIOENCODING") == "ascii":
        assert b"kappa >= lambda_max x inf \\u2603" in done.stdout
        assert b'"\\u03ba": "\\u2603"' in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "set -o pipefail; {python} {script} | head -c 1",
        "set -o pipefail; {python} {script} | true",
        "set -o pipefail; {python} {script} 2> >(true)",
        "{python} {script} >&-",
        "{python} {script} 2>&-",
        "{python} {script} >&- 2>&-",
    ],
)
def test_streams_that_nobody_reads(command, tmp_path):
    done = printed(tmp_path, command)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr


def test_a_full_disk_behind_stdout_is_said(tmp_path):
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m foretune --help > /dev/full"], capture_output=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: the disk takes no more")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("content", ["a: 1", "- a", "models: [m]\nmodles: [n]"])
def test_a_grid_that_is_none(content, tmp_path, capsys):
    path = tmp_path / "[/a" / "b] grid.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    assert yaml.safe_load(content)
    for tokens in (["study", str(path), "--output", "x"], ["study", "outlook", str(path), "--output", "x"]):
        assert run(tokens) == 2
        assert capsys.readouterr().err.startswith("error: study")
