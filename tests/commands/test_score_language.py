"""`foretune score` of causal language models: every format, every kernel, replays and refusals."""

import json

import numpy as np
import peft
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file

import language
from foretune.cli import run
from foretune.forecasting import factor_room

FLAGS = ["--samples", "6", "--draws", "3", "--max-length", "48", "--batch-size", "4", "--lora-r", "4"]


def row(number, kind):
    asked, answer = f"what is the colour {'of it ' * (number % 3)}?", f"it is {'blue ' * (number % 4)}{number}"
    said = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {
        "messages": {"messages": said},
        "prompt-completion": {"prompt": asked + " ", "completion": answer},
        "text": {"text": f"{asked} {answer}"},
        "labelled": {"text": f"{asked} {answer}", "label": number % 2},
    }[kind]


def write(folder, kind, n_train=12):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row(number, kind)) for number in range(n_train)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return language.save_chat(tmp_path_factory.mktemp("model"))


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("messages", ["--loss-on", "assistant"]),
        ("prompt-completion", []),
        ("text", []),
        ("labelled", ["--task", "causal-lm"]),
    ],
)
def test_rows_of_every_format_are_scored(model, tmp_path, capsys, kind, more):
    out = tmp_path / "out"
    tokens = ["score", "--model", model, "--dataset", write(tmp_path / "data", kind), *FLAGS, *more]
    assert run([*tokens, "--repeats", "2", "--output", str(out)]) == 0
    said, written = capsys.readouterr(), result_of(out)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.yaml",
        "kernel.safetensors",
        "result.json",
        "spectrum.png",
    ]
    assert "3 draws of A" in said.out
    assert "2 sample draws" in said.out
    assert said.out.count("not applicable") == 4  # three rows and a note
    assert "memory" in said.err
    assert "sequences with" in said.err
    assert (written["n"], written["output"], written["label_draws"]) == (6, "loss", None)
    assert written["bounds"] is written["kernel_regression"] is written["head_kernel"] is None
    assert written["kernel"]["alignment"] is None
    assert any("not applicable" in note for note in written["notes"])
    assert "T_i" in written["normalisation"]
    assert written["details"]["adapter"]["draws_of_a"] == 3
    arrays = load_file(out / "kernel.safetensors")
    assert arrays["K_draws"].shape == (3, 6, 6)
    values = np.linalg.eigvalsh(arrays["K"])
    assert written["kernel"]["lambda_max"] == pytest.approx(values[-1], rel=1e-9)
    kappa = (values[-1] + 1e-4) / (max(values[0], 0.0) + 1e-4)
    assert written["kernel"]["condition_number"] == pytest.approx(kappa, rel=1e-6)
    traces = [np.trace(k) for k in arrays["K_draws"]]
    assert written["spread"]["draws_of_a"]["trace"]["mean"] == pytest.approx(np.mean(traces))
    assert sum(site["trace"] for site in written["placement"]["sites"]) == pytest.approx(np.mean(traces))
    assert written["base"]["train_loss"] == pytest.approx(arrays["losses"].sum() / arrays["targets"].sum())
    assert len(set(arrays["indices"].tolist())) == 6


def test_kernels_go_together_and_replay(model, tmp_path, capsys):
    tokens = ["score", "--model", model, "--dataset", write(tmp_path / "data", "text"), *FLAGS]
    kernels = {}
    for name in ("loss", "loss-sum", "fisher"):
        out = tmp_path / name
        assert run([*tokens, "--reduction", name, "--output", str(out), "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["kernel"] == result_of(out)["kernel"]
        kernels[name] = load_file(out / "kernel.safetensors")
    targets = kernels["loss"]["targets"]
    np.testing.assert_allclose(kernels["loss-sum"]["K"] / np.outer(targets, targets), kernels["loss"]["K"], rtol=1e-9)
    fisher, written = kernels["fisher"]["K"], result_of(tmp_path / "fisher")
    assert fisher.shape == (24, 24)
    assert written["label_draws"] == 4
    assert written["kernel_centred"] is None
    assert any("divided by n = 6" in note for note in written["notes"])
    with safe_open(tmp_path / "fisher" / "kernel.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["foretune"])["rows_per_example"] == 4
    again = tmp_path / "again"
    assert run(["score", "--config", str(tmp_path / "fisher" / "config.yaml"), "--output", str(again)]) == 0
    assert result_of(again)["kernel"] == written["kernel"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--reduction", "margin"], "reduction = 'margin': a language model has loss, loss-sum or fisher"),
        (["--reduction", "class:1"], "reduction = 'class:1': a language model has"),
        (["--head", "probe"], "head = 'probe': no head trains in a language model, leave it out"),
        (["--heads", "2"], "heads = 2: no head trains in a language model, leave it out"),
        (["--ntk-params", "adapter+head"], "ntk_params = 'adapter+head': no head trains in a language model"),
        (["--ridge", "0.1"], "ridge = 0.1: no kernel regression is made of a language model, leave it out"),
    ],
)
def test_what_means_nothing_is_refused(model, tmp_path, capsys, more, said):
    tokens = ["score", "--model", model, "--dataset", write(tmp_path / "data", "text"), *FLAGS, *more]
    assert run([*tokens, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"error: {said}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_refused_before_the_work(model, tmp_path, capsys, monkeypatch):
    class Memory:
        available = 10_000

    monkeypatch.setattr(factor_room.psutil, "virtual_memory", Memory)
    tokens = ["score", "--model", model, "--dataset", write(tmp_path / "data", "text"), *FLAGS]
    assert run([*tokens, "--output", str(tmp_path / "out")]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "the score of 6 sequences needs about" in error
    assert "GiB are free: lower --samples, --draws, --lora-r or --batch-size" in error


def test_no_more_samples_are_taken_than_rows_train(model, tmp_path):
    out = tmp_path / "out"
    tokens = [
        "score",
        "--model",
        model,
        "--dataset",
        write(tmp_path / "data", "text", 5),
        *FLAGS,
        "--eval-samples",
        "0",
    ]
    assert run([*tokens, "--output", str(out)]) == 0
    assert result_of(out)["n"] == 4  # a fifth is held out, as of the fine-tune
    assert yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))["samples"] == 6


def test_the_file_of_an_adapter_is_kept(model, tmp_path):
    adapter = tmp_path / "adapter_config.json"
    adapter.write_text(
        json.dumps(
            {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        ),
        encoding="utf-8",
    )
    out = tmp_path / "out"
    flags = FLAGS[:6]
    tokens = ["score", "--model", model, "--dataset", write(tmp_path / "data", "text"), *flags]
    assert run([*tokens, "--adapter-config", str(adapter), "--output", str(out)]) == 0
    assert result_of(out)["placement"]["r"] == 2
    assert (out / "adapter_config.json").exists()


def test_an_adapter_that_does_not_start_from_zero_has_one_draw(model, tmp_path):
    out = tmp_path / "out"
    tokens = ["score", "--model", model, "--dataset", write(tmp_path / "data", "text"), *FLAGS, "--init", "pissa"]
    assert run([*tokens, "--output", str(out)]) == 0
    assert result_of(out)["details"]["adapter"]["draws_of_a"] == 1
    assert result_of(out)["spread"]["draws_of_a"] is None


@pytest.mark.parametrize("method", ["prompt", "oft"])
def test_a_file_of_a_method_without_a_closed_form(model, tmp_path, capsys, method):
    options = {"prompt": {"num_virtual_tokens": 3}, "oft": {"target_modules": ["q_proj"], "oft_block_size": 4, "r": 0}}
    made = {"prompt": peft.PromptTuningConfig, "oft": peft.OFTConfig}[method]
    made(task_type="CAUSAL_LM", **options[method]).save_pretrained(tmp_path / "adapter")
    out, flags = tmp_path / "out", ["--samples", "6", "--max-length", "48", "--batch-size", "4"]
    tokens = ["score", "--model", model, "--dataset", write(tmp_path / "data", "messages"), *flags]
    tokens += ["--adapter-config", str(tmp_path / "adapter"), "--reduction", "fisher", "--output", str(out)]
    assert run(tokens) == 0
    said, written = capsys.readouterr(), result_of(out)
    assert "gradients of the loss of labels drawn from the model" in said.out
    assert not any("foretune forecast" in note for note in written["notes"])  # which refuses it
    assert written["placement"]["method"] == {"prompt": "prompt tuning", "oft": "OFT"}[method]
    assert written["label_draws"] == 4
    assert load_file(out / "kernel.safetensors")["K"].shape == (24, 24)
