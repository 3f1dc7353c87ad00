"""A forecast, the run that came of it, and what the ledger says of both."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

import foretune as ft
from foretune.cli import run
from foretune.forecasting.seal import HASH, content_hash
from foretune.ledger.entries import COLUMNS, Told
from foretune.ledger.files import append
from foretune.report.texts import printable
from made_entries import LINE, line

import cases
import domains

FEW = ["--samples", "20", "--eval-samples", "10"]
ADAPTER = ["--target-modules", "query", "value"]
RECIPE = ["--epochs", "2", "--learning-rate", "2e-2", "--train-batch-size", "8", "--max-length", "16"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Model and data set, as flags."""
    folder = tmp_path_factory.mktemp("ledger")
    domains.write(folder / "calibration.json", cases.save(folder / "model"))
    return ["--model", str(folder / "model"), "--dataset", cases.write_reviews(folder / "reviews", 40, 20)], folder


@pytest.fixture(scope="module")
def forecast(given):
    flags, folder = given
    out = folder / "forecast"
    tokens = ["forecast", *flags, *FEW, *ADAPTER, *RECIPE, "--calibration", str(folder / "calibration.json")]
    assert run([*tokens, "--output", str(out)]) == 0
    return out


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def tune(given, forecast, out, *more):
    return run(["tune", *given[0], *ADAPTER, *RECIPE, *more, "--forecast", str(forecast), "--output", str(out)])


def changed(forecast, tmp_path, *, sealed=True, **changes):
    """A copy of a forecast that says something else."""
    copy = tmp_path / "changed"
    shutil.copytree(forecast, copy)
    content = {**result_of(copy), **changes}
    if sealed:
        content[HASH] = content_hash(content)
    (copy / "result.json").write_text(json.dumps(content), encoding="utf-8")
    return copy


def test_a_forecast_carries_its_time_and_hash(forecast):
    said = result_of(forecast)
    assert said["made"].endswith("+00:00")
    assert said[HASH] == content_hash(said)
    assert len(said["weights"]) == 13


def test_what_came_of_a_forecast_is_noted_once(given, forecast, tmp_path, foretune_home, capsys):
    out = tmp_path / "tuned"
    assert tune(given, forecast, out) == 0
    assert f"added to the ledger {foretune_home / 'ledger.csv'}" in capsys.readouterr().err
    (entry,) = ft.read_ledger()
    said, real = result_of(forecast), result_of(out)
    assert (entry.state, entry.why, entry.command) == ("ok", "", "tune")
    assert (entry.made, entry.hash) == (said["made"], said[HASH])
    assert entry.made <= entry.began <= entry.ended
    assert (entry.model, entry.dataset, entry.task) == (real["model"], real["dataset"], "classification")
    assert (entry.rows, entry.known_rows, entry.spend, entry.metric) == (40, 20, 0.0, "accuracy")
    assert entry.adapter == "query, value of layers 0, 1, r = 8, α = 8"
    for told, name, measured in (
        (entry.main, "accuracy", "eval_accuracy"),
        (entry.eval_loss, "eval_loss", "eval_loss"),
    ):
        end = said["end"][name]
        assert told == Told(end["value"], end["low"], end["high"], real["final"][measured])
    before = (foretune_home / "ledger.csv").read_bytes()
    assert tune(given, forecast, out) == 2  # it is finished
    assert tune(given, forecast, tmp_path / "again") == 0  # the same run
    assert "in the ledger" in capsys.readouterr().err
    assert (foretune_home / "ledger.csv").read_bytes() == before
    # replayed: the run keeps the forecast
    assert run(["tune", "--config", str(out / "config.yaml"), "--epochs", "1", "--output", str(tmp_path / "new")]) == 0
    assert [(entry.state, entry.why) for entry in ft.read_ledger()] == [("ok", ""), ("other run", "epochs")]


def test_the_table_and_the_numbers(given, forecast, tmp_path, foretune_home, capsys):
    assert tune(given, forecast, tmp_path / "tuned") == 0
    capsys.readouterr()
    assert run(["ledger"]) == 0
    printed = capsys.readouterr()
    (entry,) = ft.read_ledger()
    error = abs(entry.main.forecast - entry.main.real)
    assert f"{100 * error:.1f} pts" in printed.out
    assert "1 lines" not in printed.out
    assert run(["ledger", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["lines"] == 1
    assert content["all"][0]["main"]["error"] == pytest.approx(error)
    assert content["groups"][0]["dataset"] == entry.dataset


def kill_before(name, monkeypatch):
    import foretune.training.folder as folder

    def stop(*_args, **_options):
        raise KeyboardInterrupt("cut off")

    monkeypatch.setattr(folder, name, stop)


@pytest.mark.parametrize("with_flag", [True, False])
def test_a_run_that_was_cut_off_at_its_end_is_noted_once(given, forecast, tmp_path, monkeypatch, with_flag):
    """The line comes before result.json, so that neither is without the other."""
    out = tmp_path / "tuned"
    with monkeypatch.context() as patch:
        kill_before("close_folder", patch)
        assert tune(given, forecast, out) == 130
    assert not (out / "result.json").exists()
    (entry,) = ft.read_ledger()
    again = ["--forecast", str(forecast)] if with_flag else []
    assert run(["tune", *given[0], *ADAPTER, *RECIPE, *again, "--output", str(out)]) == 0
    assert ft.read_ledger() == (entry,)
    assert entry.state == "ok"
    kept = json.loads((out / "forecast.json").read_text(encoding="utf-8"))
    assert kept == {"began": entry.began, "forecast": result_of(forecast)}


def test_a_forecast_that_comes_to_a_run_on_its_way_is_late(given, forecast, tmp_path, monkeypatch):
    out = tmp_path / "tuned"
    with monkeypatch.context() as patch:
        kill_before("close_folder", patch)
        assert run(["tune", *given[0], *ADAPTER, *RECIPE, "--output", str(out)]) == 130
    long_ago = 1_600_000_000
    os.utime(out / "config.yaml", (long_ago, long_ago))
    assert tune(given, forecast, out) == 0
    (entry,) = ft.read_ledger()
    assert (entry.state, entry.began) == ("late", "2020-09-13T12:26:40+00:00")


STATES = {
    "altered": ({"sealed": False, "train_rows": 41}, "altered", ""),
    "altered beyond reading": ({"sealed": False, "end": {"accuracy": 3, "eval_loss": {"value": "x", "low": True}},
                                "samples": "many", "made": ["\x1b[31m\n"]}, "altered", ""),
    "late": ({"made": "2999-01-01T00:00:00+00:00"}, "late", ""),
    "of another model": ({"weights": "0" * 13}, "other run", "model"),
    "of other rows": ({"train_rows": 41}, "other run", "rows"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "state", "why"), STATES.values(), ids=STATES)
def test_what_does_not_count_is_noted_with_its_reason(given, forecast, tmp_path, capsys, changes, state, why):
    assert tune(given, changed(forecast, tmp_path, **changes), tmp_path / "tuned") == 0
    (entry,) = ft.read_ledger()
    assert (entry.state, entry.why) == (state, why)
    assert f"which does not count: {state}" in capsys.readouterr().err
    assert run(["ledger"]) == 0
    assert "left out: 1 forecast" in capsys.readouterr().out


OTHER = [
    (["--learning-rate", "1e-3"], "learning_rate"),
    (["--seed", "3"], "seed"),
    (["--r", "4", "--alpha", "16"], "r, alpha"),
    (["--layers", "1"], "modules"),
    (["--max-train", "30"], "data, rows"),
    (["--epochs", "1", "--scheduler", "cosine"], "epochs, scheduler"),
]


@pytest.mark.parametrize(("flags", "why"), OTHER, ids=[why for _, why in OTHER])
def test_a_run_that_is_another_says_what_differs(given, forecast, tmp_path, flags, why):
    kept = [*RECIPE]
    if flags[0] in kept:
        kept[kept.index(flags[0]) : kept.index(flags[0]) + 2] = []
    tokens = ["tune", *given[0], *ADAPTER, *kept, *flags, "--forecast", str(forecast)]
    assert run([*tokens, "--output", str(tmp_path / "tuned")]) == 0
    (entry,) = ft.read_ledger()
    assert (entry.state, entry.why) == ("other run", why)


def test_all_that_a_forecast_leaves_out_is_no_other_run(given, tmp_path):
    """All linear modules: those that no output depends on carry an adapter in a run, and none in a forecast."""
    flags, folder = given
    tokens = [*flags, "--target-modules", "all-linear", *RECIPE]
    out = tmp_path / "forecast"
    calibration = ["--calibration", str(folder / "calibration.json")]
    assert run(["forecast", *tokens, *FEW, *calibration, "--output", str(out)]) == 0
    assert run(["tune", *tokens, "--forecast", str(out), "--output", str(tmp_path / "tuned")]) == 0
    assert [entry.state for entry in ft.read_ledger()] == ["ok"]


def test_a_withheld_level_is_noted_and_nothing_drawn(given, tmp_path, capsys):
    """The calibration that comes with foretune has seen no run of this model."""
    flags, _ = given
    out, tuned = tmp_path / "forecast", tmp_path / "tuned"
    assert run(["forecast", *flags, *FEW, *ADAPTER, *RECIPE, "--output", str(out)]) == 0
    assert tune(given, out, tuned) == 0
    (entry,) = ft.read_ledger()
    assert entry.state == "withheld"
    assert entry.main == Told(real=result_of(tuned)["final"]["eval_accuracy"])
    assert not (tuned / "forecast.csv").exists()
    assert yaml.safe_load((tuned / "config.yaml").read_text(encoding="utf-8"))["forecast"] == "forecast.json"
    capsys.readouterr()
    assert run(["ledger"]) == 0
    assert "1 forecast withheld" in capsys.readouterr().out
    assert run(["tune", "--config", str(tuned / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert "in the ledger" in capsys.readouterr().err
    assert len(ft.read_ledger()) == 1


def test_a_curve_alone_is_drawn_and_not_noted(given, forecast, tmp_path, capsys, foretune_home):
    assert tune(given, forecast / "curve.csv", tmp_path / "tuned") == 0
    assert capsys.readouterr().err.count("curve alone") == 1
    assert os.listdir(foretune_home) == []


def test_a_ledger_that_cannot_be_written_costs_no_run(given, forecast, tmp_path, foretune_home, capsys):
    (foretune_home / "ledger.csv").write_text("something else\n", encoding="utf-8")
    assert tune(given, forecast, tmp_path / "tuned") == 0
    assert "no line in the ledger" in capsys.readouterr().err
    assert (tmp_path / "tuned" / "result.json").exists()
    assert (foretune_home / "ledger.csv").read_text(encoding="utf-8") == "something else\n"


def test_an_empty_ledger_is_no_fault(tmp_path, foretune_home, capsys):
    (tmp_path / "empty.csv").touch()
    (tmp_path / "header.csv").write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    for file in ([], [str(tmp_path / "none.csv")], [str(tmp_path / "empty.csv")], [str(tmp_path / "header.csv")]):
        assert run(["ledger", *file]) == 0
        assert "No forecast is in the ledger" in capsys.readouterr().out
        assert run(["ledger", *file, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["all"] == []
    assert os.listdir(foretune_home) == []


def test_a_file_that_is_no_ledger_is_one_line(tmp_path, capsys):
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\0\0")
    for file in (tmp_path, tmp_path / "x.csv"):
        assert run(["ledger", str(file)]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("error: ")


def test_names_that_a_terminal_would_obey(tmp_path, capsys):
    append([line(model='a\x1b[31m,"b"\n', dataset="[red]=x", run="2"), LINE], tmp_path / "l.csv")
    with (tmp_path / "l.csv").open("ab") as file:
        file.write(b"\x1b[2J,half a li")
    assert run(["ledger", str(tmp_path / "l.csv")]) == 0
    printed = capsys.readouterr()
    assert "\\x1b[31m" in printed.out
    assert "[red]=x" in printed.out
    assert printable(printed.out + printed.err, keep="\n") == printed.out + printed.err
    assert "line 4 cannot be read" in printed.err


def test_torch_is_not_needed(tmp_path):
    append([LINE], tmp_path / "l.csv")
    code = (
        "import sys; from foretune.cli import run; code = run(['ledger', sys.argv[1]]);"
        "sys.exit(' '.join({'torch', 'transformers', 'peft', 'datasets', 'pydantic'} & set(sys.modules)) or code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "l.csv")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "5.0 pts" in done.stdout
