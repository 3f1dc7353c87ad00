"""`foretune forecast` of causal language models, and the run that it was of."""

import csv
import json

import pytest

import language
from foretune.cli import run
from foretune.report.home import home

FLAGS = ["--epochs", "2", "--learning-rate", "1e-3", "--train-batch-size", "4", "--max-length", "48", "--lora-r", "4"]


def row(number, kind):
    asked, answer = f"what is the colour {'of it ' * (number % 3)}?", ("it is blue", "the plot was thin")[number % 2]
    said = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {
        "messages": {"messages": said},
        "prompt-completion": {"prompt": asked + " ", "completion": answer},
        "text": {"text": f"{asked} {answer}"},
    }[kind]


def write(folder, kind, n_train=16, n_eval=5):
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in (("train", range(n_train)), ("validation", range(100, 100 + n_eval))):
        lines = [json.dumps(row(number, kind)) for number in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return language.save_chat(tmp_path_factory.mktemp("model"))


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["messages", "prompt-completion", "text"])
def test_rows_of_every_format_are_forecast(model, tmp_path, capsys, kind):
    out = tmp_path / "out"
    tokens = ["forecast", "--model", model, "--dataset", write(tmp_path / "data", kind), *FLAGS]
    assert run([*tokens, "--samples", "8", "--eval-samples", "4", "--output", str(out)]) == 0
    said, written = capsys.readouterr(), result_of(out)
    assert "Simulated run, not calibrated: no forecast" in said.out
    assert "no run of this model" in " ".join(said.out.split())
    assert f"({kind}); loss on: {'completion' if kind == 'prompt-completion' else 'all'}" in said.err
    assert written["details"]["data"]["format"] == kind
    assert (written["samples"], written["train_rows"], written["eval_rows"], written["steps"]) == (8, 16, 4, 8)
    with (out / "curve.csv").open(newline="") as file:
        curve = list(csv.DictReader(file))
    assert [int(point["step"]) for point in curve] == [0, 4, 8]
    assert float(curve[-1]["eval_loss"]) == pytest.approx(written["simulated_end"]["eval_loss"], rel=1e-4)
    assert (out / "curve.png").stat().st_size > 0


def test_json_and_replay_give_the_same_numbers(model, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    tokens = ["forecast", "--model", model, "--dataset", write(tmp_path / "data", "text"), *FLAGS]
    assert run([*tokens, "--json", "--output", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert run(["forecast", "--config", str(out / "config.yaml"), "--output", str(again)]) == 0
    assert printed["simulated"] == result_of(out)["simulated"] == result_of(again)["simulated"]


def test_the_run_draws_the_forecast_and_both_come_into_the_ledger(model, tmp_path, capsys):
    forecast, tuned = tmp_path / "forecast", tmp_path / "tuned"
    tokens = ["--model", model, "--dataset", write(tmp_path / "data", "messages"), *FLAGS]
    assert run(["forecast", *tokens, "--output", str(forecast)]) == 0
    assert (
        run(["tune", "--config", str(forecast / "config.yaml"), "--forecast", str(forecast), "--output", str(tuned)])
        == 0
    )
    assert "does not count: withheld" in " ".join(capsys.readouterr().err.split())
    said, real = result_of(forecast), result_of(tuned)
    assert said["base"]["eval_loss"] == pytest.approx(real["before_training"]["eval_loss"], abs=1e-5)
    change = real["final"]["eval_loss"] - real["before_training"]["eval_loss"]
    assert said["simulated_end"]["eval_loss"] == pytest.approx(real["final"]["eval_loss"], abs=0.25 * abs(change))
    assert run(["ledger", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lines"] == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--spend", "2%"],
            "spend = 2%: the smallest trial takes 32 rows, and a run of 16 rows has trials of 8 at most",
        ),
        (["--spend", "much"], "spend = 'much': give a share of one full run"),
        (
            ["--calibration", "there"],
            "--calibration 'there': language models are forecast by the one that comes with foretune",
        ),
        (["--memory", "much"], "memory = 'much': give an amount of memory, such as 2GB or 500MB"),
        (["--memory", "1kB"], "raise the memory, or lower the samples"),
    ],
)
def test_what_does_not_fit_is_refused(model, tmp_path, capsys, more, said):
    tokens = ["forecast", "--model", model, "--dataset", write(tmp_path / "data", "text"), *FLAGS, *more]
    assert run([*tokens, "--output", str(tmp_path / "out")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_spend_buys_trials_and_they_are_kept(model, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    data = write(tmp_path / "data", "messages", n_train=80)
    tokens = ["forecast", "--model", model, "--dataset", data, *FLAGS, "--samples", "8", "--eval-samples", "4"]
    assert run([*tokens, "--spend", "10%"]) == 2
    refused = " ".join(capsys.readouterr().err.split())
    assert "spend = 10% buys no trial: the smallest, 32 rows and an evaluation on 4, costs 42% of the run" in refused
    assert run([*tokens, "--output", str(tmp_path / "without")]) == 0
    assert run([*tokens, "--spend", "60%", "--output", str(out)]) == 0
    said, written, without = capsys.readouterr(), result_of(out), result_of(tmp_path / "without")
    assert "of 60% asked for, of the 160 sample passes of one run of 80 rows" in " ".join(said.err.split())
    assert "to make" in said.err
    (trial,) = written["trials"]
    assert set(trial["outcomes"]) == {"train_loss", "eval_loss", "perplexity", "token_accuracy"}
    assert 32 <= trial["rows"] <= 40
    assert written["spend"] == pytest.approx(trial["passes"] / 160)
    assert 0.4 < written["spend"] <= 0.6
    assert written["seconds"]["trials"] == trial["seconds"] > 0
    assert f"trained on {trial['rows']} rows: eval perplexity" in " ".join(said.out.split())
    assert written["simulated"] == without["simulated"]  # trials leave the model as it is
    assert (without["trials"], without["spend"]) == ([], 0.0)
    assert "trials" not in without["seconds"]
    assert run(["forecast", "--config", str(out / "config.yaml"), "--output", str(again)]) == 0
    assert "to make" not in capsys.readouterr().err
    assert result_of(again)["trials"] == written["trials"]
    assert len([*(home() / "trials").glob("*.json")]) == 1


@pytest.mark.parametrize("command", ["forecast", "tune"])
def test_preferences_are_refused_by_that_name(model, tmp_path, capsys, command):
    (tmp_path / "train.jsonl").write_text('{"chosen": "it is blue", "rejected": "it is thin"}\n' * 6)
    assert run([command, "--model", model, "--dataset", str(tmp_path / "train.jsonl")]) == 2
    assert "this is preference data (chosen, rejected in split 'train')" in capsys.readouterr().err


def test_a_folder_of_gguf_says_what_to_do(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny.gguf").write_bytes(b"GGUF")
    tokens = ["--model", str(tmp_path / "model"), "--dataset", write(tmp_path / "data", "messages")]
    assert run(["forecast", *tokens]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "holds no config.json, but 'tiny.gguf': make safetensors of it once, with foretune.models.gguf" in said
