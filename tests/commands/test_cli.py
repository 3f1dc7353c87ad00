import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from foretune.cli import ALIASES, canonical, run

import cases

FEW = ["--samples", "12", "--eval-samples", "8", "--draws", "3", "--target-modules", "query", "value"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cases.write_reviews(tmp_path_factory.mktemp("reviews"))


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def scored(model, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    tokens = ["score", "--model", model, "--dataset", dataset, "--layers", "0", "1", "--output", str(folder)]
    assert run([*tokens, *FEW, "--repeats", "2"]) == 0
    return folder


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_the_run_folder(scored):
    assert sorted(os.listdir(scored)) == ["config.yaml", "kernel.safetensors", "result.json", "spectrum.png"]
    assert (scored / "spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_result_has_what_the_documentation_promises(scored, model, dataset):
    result = result_of(scored)
    assert result["model"] == model
    assert result["dataset"] == dataset
    assert result["placement"]["target_modules"] == ["query", "value"]
    assert result["placement"]["layers"] == [0, 1]
    assert (result["placement"]["r"], result["placement"]["alpha"]) == (8, 8)
    assert result["placement"]["trainable_parameters"] == 4 * 8 * (16 + 16)
    assert result["placement"]["head_parameters"] == 2 * 16 + 2
    assert (result["n"], result["output"], result["seed"]) == (12, "margin", 0)
    for key in ("lambda_max", "lambda_min", "condition_number", "sigma", "trace", "effective_dimension", "alignment"):
        assert isinstance(result["kernel"][key], float), key
    assert isinstance(result["kernel"]["lambda_min_resolved"], bool)
    for form in ("printed", "tight"):
        assert result["bounds"][form]["lower"] <= result["bounds"][form]["upper"]
    assert (
        result["bounds"]["tight"]["lower"] <= result["bounds"]["empirical_risk"] <= result["bounds"]["tight"]["upper"]
    )
    assert {"train_loss", "eval_loss", "eval_accuracy"} <= result["kernel_regression"].keys()
    assert 0 <= result["kernel_regression"]["eval_accuracy"] <= 1
    parts = {"passes", "products", "files"}  # of kernel
    assert {"load", "kernel", *parts, "spectrum", "kernel_regression", "total"} == result["seconds"].keys()
    assert result["versions"].keys() >= {"foretune", "torch", "transformers", "peft"}
    assert result["spread"]["draws_of_a"]["trace"]["count"] == 3
    assert result["spread"]["repeats"]["trace"]["count"] == 2


def test_the_kernel_file_is_the_kernel_of_the_result(scored):
    tensors, result = load_file(scored / "kernel.safetensors"), result_of(scored)
    assert tensors["K"].shape == (12, 12)
    assert tensors["K"].dtype == np.float64
    values = np.linalg.eigvalsh(tensors["K"])
    assert result["kernel"]["lambda_max"] == pytest.approx(values[-1])
    assert result["kernel"]["trace"] == pytest.approx(np.trace(tensors["K"]))
    assert np.array_equal(tensors["K_draws"][0], tensors["K"])
    assert tensors["K_eval"].shape == (3, 8, 12)
    assert sorted(set(tensors["labels"])) == [0, 1]
    assert len(set(tensors["indices"])) == 12
    with safe_open(scored / "kernel.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["foretune"])["output"] == "margin"


def test_config_yaml_replays_the_run(scored, tmp_path):
    assert run(["score", "--config", str(scored / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    first, again = result_of(scored), result_of(tmp_path / "again")
    for volatile in ("seconds",):
        first.pop(volatile), again.pop(volatile)
    assert first == again


def test_the_command_line_wins_over_the_file(scored, tmp_path):
    out = str(tmp_path / "again")
    assert run(["score", "--config", str(scored / "config.yaml"), "--lora_r=2", "--repeats", "1", "--output", out]) == 0
    result = result_of(tmp_path / "again")
    assert result["placement"]["r"] == 2
    assert result["spread"]["repeats"] is None


def test_hugging_face_names_and_underscores(model, dataset, tmp_path):
    tokens = ["score", "--model_name_or_path", model, "--dataset_name", dataset, "--lora_r", "4", "--lora_alpha", "16"]
    tokens += ["--target_modules", "query", "--max_seq_length", "16", "--num_samples", "10", "--max_eval_samples", "4"]
    assert run([*tokens, "--output_dir", str(tmp_path / "run")]) == 0
    result = result_of(tmp_path / "run")
    assert (result["placement"]["r"], result["placement"]["alpha"], result["n"]) == (4, 16, 10)
    assert result["details"]["data"]["max_length"] == 16
    assert result["kernel_regression"]["n_eval"] == 4


def test_every_alias_names_a_flag():
    from foretune.cli import app

    commands = (app["score"], app["tune"])
    flags = {name for c in commands for argument in c.assemble_argument_collection() for name in argument.names}
    assert {f"--{name}" for name in ALIASES.values()} <= flags
    assert canonical(["--per_device_eval_batch_size", "a_b"]) == ["--batch-size", "a_b"]


def test_json_alone_on_stdout(model, dataset, capsys):
    assert run(["score", "--model", model, "--dataset", dataset, *FEW, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["n"] == 12
    assert "samples" in captured.err


def test_the_table_names_what_it_shows(model, dataset, capsys):
    assert run(["score", "--model", model, "--dataset", dataset, *FEW]) == 0
    out = capsys.readouterr().out
    for word in (
        "kernel regression: eval accuracy",
        "κ (σ = 0.0001)",
        "λ_max",
        "bounds, tight form",
        "empirical risk at σ",
    ):
        assert word in out


@pytest.mark.parametrize("options", [["--head", "probe"], ["--head", "average", "--heads", "2"]])
@pytest.mark.parametrize("extra", [[], ["--ntk-params", "adapter+head"], ["--reduction", "full"]])
def test_head_policies(model, dataset, tmp_path, options, extra):
    tokens = ["score", "--model", model, "--dataset", dataset, *FEW, *options, *extra]
    assert run([*tokens, "--output", str(tmp_path / "run")]) == 0
    assert result_of(tmp_path / "run")["details"]["head"]["policy"] == options[1]


def test_without_evaluation(model, dataset, tmp_path):
    tokens = ["score", "--model", model, "--dataset", dataset, "--samples", "8", "--eval-samples", "0"]
    assert run([*tokens, "--output", str(tmp_path / "run")]) == 0
    forecast = result_of(tmp_path / "run")["kernel_regression"]
    assert forecast["eval_accuracy"] is None
    assert forecast["train_loss"] > 0


BAD = [
    (["--model", "/no/such"], "/no/such"),
    (["--model", "nobody/nothing"], "nobody/nothing.*hub cannot be reached"),
    (["--dataset", "/no/such.csv"], "/no/such.csv"),
    (["--text-column", "txt"], "'txt'.*text"),
    (["--label-column", "nope"], "'nope'.*label"),
    (["--samples", "5000"], "5000.*60"),
    (["--samples", "1"], "samples = 1"),
    (["--target-modules", "qwery"], "'qwery' matches nothing.*query"),
    (["--layers", "0", "9"], "layer 9 is out of range.*0 to 1"),
    (["--r", "0"], "r = 0"),
    (["--sigma", "0"], "sigma"),
    (["--reduction", "margins"], "'margins'"),
    (["--reduction", "class:2"], "class:2"),
    (["--dtype", "int4"], "int4"),
    (["--device", "cuda:99"], "cuda:99"),
    (["--head", "best"], "best"),
    (["--flag-that-is-none", "3"], "--flag-that-is-none"),
    (["--config", "/no/such.yaml"], "/no/such.yaml"),
    (["--eval-split", "nosplit"], "nosplit"),
    (["--max-length", "0"], "max_length = 0"),
    (["--batch-size", "0"], "batch_size = 0"),
]


def test_a_sketch_says_its_error(model, dataset, tmp_path, capsys):
    tokens = [
        "score",
        "--model",
        model,
        "--dataset",
        dataset,
        *FEW,
        "--sketch",
        "64",
        "--output",
        str(tmp_path / "run"),
    ]
    assert run(tokens) == 0
    out, result = capsys.readouterr().out.replace("│", " "), result_of(tmp_path / "run")
    said = f"{result['sketch']['relative_error']:.1%}"
    assert result["sketch"]["width"] == 64
    assert f"error of the sketch {said} of ‖K̂‖" in " ".join(out.split())
    assert f"a random sketch of width 64: in Frobenius norm it is off by about {said}" in " ".join(out.split())
    assert any(said in note for note in result["notes"])


@pytest.mark.parametrize(("options", "message"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(model, dataset, tmp_path, capsys, options, message):
    tokens = {
        "--model": [model],
        "--dataset": [dataset],
        "--target-modules": ["query"],
        "--output": [str(tmp_path / "run")],
    }
    tokens[options[0]] = options[1:]
    flat = [part for name, values in tokens.items() for part in (name, *values)]
    assert run(["score", *flat]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert os.listdir(tmp_path) == []


def test_unknown_keys_of_a_config_file_are_refused(model, dataset, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": model, "dataset": dataset, "lora_rank": 4}))
    assert run(["score", "--config", str(path)]) == 2
    assert "lora-rank" in capsys.readouterr().err
    path.write_text("- a list\n")
    assert run(["score", "--config", str(path)]) == 2
    path.write_text("a: [1\n")
    assert run(["score", "--config", str(path)]) == 2


def test_an_output_folder_with_a_run_is_refused_before_the_work(scored, model, dataset, capsys):
    before = {name: (scored / name).read_bytes() for name in os.listdir(scored)}
    assert run(["score", "--model", "/never/looked/at", "--dataset", dataset, "--output", str(scored)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert {name: (scored / name).read_bytes() for name in os.listdir(scored)} == before


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "foretune", "score"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


BAD_ROWS = [
    ("good film,positive\nbad film,positive\n", "single class, 'positive'"),
    ("good film,positive\n ,negative\n", "1 empty texts? in column 'text', first in row 1"),
    ("good film,1\nbad film,-1\na film,0\nthe film,2\n", "label -1 in row 1 .* no class"),
    ("good film,positive\nbad film,negative\n", "12 samples asked for, but there are 2 rows"),
]


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS, ids=[message for _, message in BAD_ROWS])
def test_bad_data_is_one_line_and_exit_code_2(model, tmp_path, capsys, rows, message):
    (tmp_path / "train.csv").write_text("text,label\n" + rows)
    out = tmp_path / "run"
    assert run(["score", "--model", model, "--dataset", str(tmp_path), *FEW, "--output", str(out)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line
    assert not out.exists()


def test_weights_that_are_not_finite(dataset, tmp_path, capsys):
    source = tmp_path / "model"
    cases.save(source)
    weights = load_file(source / "model.safetensors")
    weights["encoder.layer.0.attention.self.query.weight"][0, 0] = np.nan
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert run(["score", "--model", str(source), "--dataset", dataset, *FEW]) == 2
    assert "layer.0.attention.self.query.weight" in capsys.readouterr().err


def test_sentence_pairs_without_evaluation_split(model, tmp_path):
    lines = ["premise,hypothesis,label"]
    lines += [f"{cases.review(i)[0]},{cases.review(i + 1)[0]},{i % 2}" for i in range(40)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "run"
    assert run(["score", "--model", model, "--dataset", str(tmp_path / "pairs.csv"), *FEW, "--output", str(out)]) == 0
    result = result_of(out)
    assert result["details"]["data"]["text_columns"] == ["premise", "hypothesis"]
    assert result["details"]["data"]["eval_split"] == "train (held out)"
    tensors = load_file(out / "kernel.safetensors")
    assert not set(tensors["indices"]) & set(tensors["indices_eval"])


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtypes(model, dataset, tmp_path, dtype):
    tokens = ["score", "--model", model, "--dataset", dataset, *FEW, "--dtype", dtype]
    assert run([*tokens, "--output", str(tmp_path / "run")]) == 0
    result = result_of(tmp_path / "run")
    assert result["details"]["dtype"] == dtype
    epsilon = {"float64": 2.2e-16, "bfloat16": 7.8e-3}[dtype]
    assert result["kernel"]["floor"] == pytest.approx(12 * epsilon * result["kernel"]["lambda_max"], rel=0.02)


def test_a_saturated_condition_number_is_said_to_be_one(model, dataset, capsys):
    assert run(["score", "--model", model, "--dataset", dataset, *FEW, "--sigma", "1e6"]) == 0
    assert "κ is saturated" in capsys.readouterr().out


def test_an_interrupt_leaves_nothing(model, dataset, tmp_path, monkeypatch, capsys):
    import foretune.scoring.passes

    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(foretune.scoring.passes, "batch_features", interrupt)
    tokens = ["score", "--model", model, "--dataset", dataset, *FEW, "--output", str(tmp_path / "run")]
    assert run(tokens) == 130
    assert os.listdir(tmp_path) == []
    assert "interrupted" in capsys.readouterr().err
