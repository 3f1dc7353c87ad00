"""The folder of a fine-tune: checkpoints, kills, full disks, links, refusals."""

import json
import os
import shutil
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import TrainerState

from foretune.cli import run
from foretune.errors import ConfigError, StoreError
from foretune.report import store
from foretune.training import checkpoints as checkpoints_module
from foretune.training import folder as folder_module
from foretune.training.checkpoints import checkpoints, last_whole
from foretune.training.folder import BEGUN, FILES, claim, open_folder, read_forecast

import cases

FLAGS = ["--target-modules", "query", "--epochs", "3", "--learning-rate", "2e-2", "--train-batch-size", "8"]
STRIP = ("seconds", "epochs", "final", "before_training")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune-folder")
    return [
        "tune",
        "--model",
        cases.save(folder / "model"),
        "--dataset",
        cases.write_reviews(folder / "r", 24, 8),
        *FLAGS,
    ]


def plain(value):
    if isinstance(value, dict):
        return {name: plain(held) for name, held in value.items() if name != "seconds"}
    return [plain(held) for held in value] if isinstance(value, list) else value


def numbers(folder):
    """All that a run says but for the time that it took."""
    result = plain(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    tables = [
        [line.rsplit(",", 1)[0] for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("history.csv", "steps.csv")
    ]
    return result, tables, sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def whole(tokens, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run([*tokens, "--output", str(out)]) == 0
    return numbers(out)


def forked(work):
    """Run in a process of its own, whose exit code is returned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's, of threads beside a fork
        pid = os.fork()
    if not pid:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module")
def cut(tokens, tmp_path_factory):
    """A run that was killed in its third epoch."""
    out = tmp_path_factory.mktemp("cut") / "out"

    def work():
        import foretune.commands.tune as command
        from foretune.training import tune as outcome

        real = outcome.fit

        def fit(plan, folder, *, hooks=None):
            def kill(done, total, loss):
                if done == 8:
                    os._exit(77)

            return real(plan, folder, hooks=folder_module.dataclasses.replace(hooks, on_step=kill))

        assert command
        outcome.fit = fit
        return run([*tokens, "--output", str(out)])

    assert forked(work) == 77
    assert [path.name for path in checkpoints(out)] == ["checkpoint-6", "checkpoint-3"]
    return out


def copy_of(cut, tmp_path):
    shutil.copytree(cut, tmp_path / "out")
    return tmp_path / "out"


def test_a_run_that_was_killed_goes_on_and_leaves_nothing(tokens, cut, whole, tmp_path):
    out = copy_of(cut, tmp_path)
    for name in (".4999.history.csv", ".4999.config.yaml"):
        (out / name).write_text("half")
    (out / ".adapter").mkdir()
    (out / "notes.txt").write_text("the user's")
    (out / ".4999.mine").write_text("the user's")
    assert run([*tokens, "--output", str(out)]) == 0
    for name in ("notes.txt", ".4999.mine"):
        (out / name).unlink()
    assert numbers(out) == whole
    assert os.listdir(tmp_path) == ["out"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bit turned": flip,
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
PARTS = [
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "whole.json",
]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_thrown_away(cut, tmp_path, part, damage):
    out, notes = copy_of(cut, tmp_path), []
    DAMAGE[damage](out / "checkpoint-6" / part)
    assert last_whole(out, clean=True, on_note=notes.append) == out / "checkpoint-3"
    assert len(notes) == 1
    assert notes[0].startswith("checkpoint-6 ")
    assert "\n" not in notes[0]
    assert not (out / "checkpoint-6").exists()
    assert last_whole(out, clean=True, on_note=notes.append) == out / "checkpoint-3"


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"global_step": 6}', '{"global_step": "x", "log_history": []}', "null"]
)
def test_another_state_in_a_checkpoint_is_not_believed(cut, tmp_path, content):
    out = copy_of(cut, tmp_path)
    (out / "checkpoint-6" / "trainer_state.json").write_text(content)
    assert last_whole(out, clean=False) == out / "checkpoint-3"
    (out / "checkpoint-3" / "whole.json").write_text(content)
    assert content in ("{}",) or last_whole(out, clean=False) is None
    assert (out / "checkpoint-3").exists()


@pytest.mark.parametrize("damaged", [["checkpoint-6"], ["checkpoint-6", "checkpoint-3"]])
def test_a_run_goes_on_from_the_checkpoint_before_or_begins_again(tokens, cut, whole, tmp_path, capsys, damaged):
    out = copy_of(cut, tmp_path)
    for name in damaged:
        flip(out / name / "adapter_model.safetensors")
    assert run([*tokens, "--output", str(out)]) == 0
    said = capsys.readouterr().err
    assert all(f"{name} holds" in said and "thrown away" in said for name in damaged)
    assert numbers(out) == whole


def test_a_checkpoint_that_these_libraries_cannot_load(cut, tmp_path, monkeypatch):
    def refuse(path, **_options):
        raise RuntimeError(f"cannot\nload {path}")

    monkeypatch.setattr(checkpoints_module.torch, "load", refuse)
    notes = []
    assert last_whole(copy_of(cut, tmp_path), clean=True, on_note=notes.append) is None
    assert len(notes) == 2
    assert not any("\n" in note for note in notes)


def at_event(n, act):
    """Call something at the n-th time that Python changes a file below a folder, in this process for good."""
    import sys

    count = [0]

    def hook(event, args):
        if event == "open":
            path, _, flags = args
            changes = isinstance(path, str) and "/out" in path and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") and "/out" in str(args[0])
        if changes:
            count[0] += 1
            if count[0] == n:
                act()

    sys.addaudithook(hook)


def full():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", ["kill", "full disk"])
@pytest.mark.parametrize("at", [2, 5, 40, 90, 110, 150, 200, 230, 250, 270])
def test_killed_or_out_of_disk_anywhere_then_run_again(tokens, whole, tmp_path, fault, at):
    command = [*tokens, "--output", str(tmp_path / "out")]

    def work():
        at_event(at, full if fault == "full disk" else lambda: os._exit(77))
        return run(command)

    # some of what a full disk refuses is no loss, such as the removal of a file
    assert forked(work) in ((77, 0) if fault == "kill" else (0, 2))
    finished = (tmp_path / "out" / "result.json").exists()
    assert run(command) == (2 if finished else 0)
    assert numbers(tmp_path / "out") == whole
    assert os.listdir(tmp_path) == ["out"]


def failing(name, monkeypatch):
    def fail(*_args, **_options):
        raise OSError(28, "No space left on device")

    def torch_fails(*_args, **_options):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    where = {
        "history": (folder_module, "_write_csv", fail),
        "figure": (folder_module, "loss_figure", fail),
        "result": (folder_module, "write_json", fail),
        "weights": (PeftModel, "save_pretrained", fail),
        "optimizer": (torch, "save", torch_fails),
        "state": (TrainerState, "save_to_json", fail),
        "settings": (store, "plain_text", fail),
    }
    monkeypatch.setattr(*where[name])


@pytest.mark.parametrize("where", ["history", "figure", "result", "weights", "optimizer", "state", "settings"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tokens, whole, tmp_path, monkeypatch, capsys, where):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing(where, patch)
        assert run([*tokens, "--output", str(out)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "No space left" in line or "is it full" in line
    assert run([*tokens, "--output", str(out)]) == 0
    assert numbers(out) == whole


def test_a_fault_of_ours_in_a_run_stays_one(tokens, tmp_path, monkeypatch, capsys):
    def fail(*_args, **_options):
        raise KeyError("ours")

    monkeypatch.setattr(folder_module, "_write_csv", fail)
    assert run([*tokens, "--output", str(tmp_path / "out")]) == 1
    assert "KeyError: 'ours'" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*FILES, "adapter", ".adapter", "runs", "checkpoint-8", ".77.history.csv"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_link_among_the_files_of_a_run_is_refused(tmp_path, name, begun):
    out, mine = tmp_path / "out", tmp_path / "mine"
    out.mkdir()
    mine.mkdir()
    (mine / "file").write_text("mine")
    if begun and name != "config.yaml":
        open_folder(out, {"epochs": 1})
    (out / name).symlink_to(mine)
    with pytest.raises(StoreError, match="holds a link"):
        claim(out, {"epochs": 1})
    assert (mine / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a: [1",
        b"- 1",
        b"a: &a [*a]",
        b"\xff\xfe\x00",
        b"3",
        b"? [1]\n: 2",
        b"!!python/object:os.system {}",
        b"\t",
    ],
)
def test_a_broken_config_in_the_folder_is_one_line(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    (tmp_path / "history.csv").write_text("x")
    with pytest.raises(StoreError) as caught:
        claim(tmp_path, {"epochs": 1})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "history.csv"]


CURVE = "step,train_loss,eval_loss,eval_accuracy\n0,,0.7,0.5\n"
NO_CURVES = [
    "",
    CURVE.splitlines()[0],
    "a,b\n1,2\n",
    CURVE + "1,x,0.5,0.5\n",
    CURVE + "1,0.5\n",
    CURVE + "1,nan,0.5,0.5\n",
]
NO_CURVES += [CURVE + "1,0.5,inf,0.5\n", CURVE + '"' + "x" * 200_000, "\0\0\0", CURVE + "1.5,1,1,1\n"]


@pytest.mark.parametrize("content", [*NO_CURVES, None])
def test_a_forecast_that_is_none_is_refused_and_nothing_is_left(tokens, tmp_path, capsys, content):
    curve = tmp_path / "curve.csv"
    if content is not None:
        curve.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_forecast(tmp_path, curve)
    assert "\n" not in str(caught.value)
    (tmp_path / "out").mkdir()
    for out in (tmp_path / "out", tmp_path / "new" / "out"):
        assert run([*tokens, "--forecast", str(curve), "--output", str(out)]) == 2
        assert "forecast curve" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == (["out"] if content is None else ["curve.csv", "out"])
    assert os.listdir(tmp_path / "out") == []


REFUSED = [
    ["--report-to", "nothing"],
    ["--target-modules", "qwery"],
    ["--adapter-config", "none.json"],
    ["--eval-split", "none"],
    ["--model", "/no/such"],
    ["--dataset", "/no/such.csv"],
    ["--layers", "9"],
    ["--init", "pissa", "--r", "0"],
]


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
@pytest.mark.parametrize("existing", [False, True])
def test_nothing_is_left_behind_by_a_refusal(tokens, tmp_path, flags, existing):
    out = tmp_path / "deep" / "out"
    if existing:
        out.mkdir(parents=True)
    given, skip = [], False
    for token in tokens:
        skip = (
            token in flags or (token == "--target-modules" and "--adapter-config" in flags) if token[0] == "-" else skip
        )
        given += [] if skip else [token]
    assert run([*given, *flags, "--output", str(out)]) == 2
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == (["deep", "deep/out"] if existing else [])


def test_the_checkpoints_of_a_finished_run_are_swept_even_if_it_was_killed_then(tokens, cut, whole, tmp_path, capsys):
    out = copy_of(cut, tmp_path)
    assert run([*tokens, "--output", str(out)]) == 0
    shutil.copytree(cut / "checkpoint-6", out / "checkpoint-6")
    (out / ".99.result.json").write_text("{")
    assert run([*tokens, "--output", str(out)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert numbers(out) == whole


def test_a_run_begins_with_what_it_may_take_back():
    assert set(BEGUN) < set(FILES)
