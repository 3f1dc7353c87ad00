"""`foretune tune` of causal language models: which configurations are ones, run folders, kills, and what is refused."""

import csv
import json
import os
import warnings

import pytest

import language
from foretune.cli import run

import cases

FLAGS = ["--epochs", "2", "--learning-rate", "1e-2", "--train-batch-size", "4", "--max-length", "48", "--lora-r", "4"]
ANSWERS = ("it is blue", "the plot was thin and the film was not good", "thin")


def turn(role, content):
    return {"role": role, "content": content}


def row(number, kind):
    asked, answer = f"what is the colour {'of it ' * (number % 3)}?", ANSWERS[number % 3]
    return {
        "messages": {"messages": [turn("user", asked), turn("assistant", answer)]},
        "prompt-completion": {"prompt": asked + " ", "completion": answer},
        "instruction": {"instruction": asked, "input": "", "output": answer, "source": "made"},
        "text": {"text": f"{asked} {answer}"},
        "labelled": {"text": f"{asked} {answer}", "label": number % 2},
    }[kind]


def write(folder, kind, n_train=16, n_eval=5):
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in (("train", range(n_train)), ("validation", range(100, 100 + n_eval))):
        lines = [json.dumps(row(number, kind)) for number in numbers]
        if lines:
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return language.save_chat(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return cases.save(tmp_path_factory.mktemp("encoder"))


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def tune(model, data, out, *more):
    return run(["tune", "--model", model, "--dataset", data, *FLAGS, "--output", str(out), *more])


def error_of(capsys):
    said = capsys.readouterr().err.strip()
    assert len([line for line in said.splitlines() if line.startswith("error:")]) == 1
    return said


@pytest.mark.parametrize(
    ("kind", "more", "columns"),
    [
        ("messages", ["--loss-on", "assistant"], ["messages"]),
        ("prompt-completion", [], ["prompt", "completion"]),
        ("instruction", [], ["instruction", "input", "output"]),
        ("text", [], ["text"]),
        ("labelled", ["--task", "causal-lm"], ["text"]),
    ],
)
def test_each_format_makes_a_run_folder(model, tmp_path, capsys, kind, more, columns):
    out = tmp_path / "out"
    assert tune(model, write(tmp_path / "data", kind), out, *more) == 0
    printed = capsys.readouterr()
    assert "perplexity" in printed.out
    assert "token accuracy" in printed.out
    assert "rows truncated" in printed.err
    assert sorted(os.listdir(out)) == ["adapter", "config.yaml", "history.csv", "loss.png", "result.json", "steps.csv"]
    result = result_of(out)
    data = result["details"]["data"]
    assert (data["task"], data["text_columns"]) == ("causal-lm", columns)
    assert data["format"] == ("text" if kind == "labelled" else kind)
    assert (data["train_rows"], data["eval_rows"], data["eval_split"]) == (16, 5, "validation")
    assert result["final"]["eval_loss"] < result["before_training"]["eval_loss"]
    with (out / "history.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [list(one) for one in rows] == [list(epoch) for epoch in result["epochs"]]
    assert {"train_perplexity", "eval_perplexity", "eval_token_accuracy"} <= rows[0].keys()
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "CAUSAL_LM"
    kinds = {name.rsplit(".", 1)[-1] for name in adapter["target_modules"]}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_run_is_replayed_from_its_config_and_from_its_adapter(model, tmp_path):
    data = write(tmp_path / "data", "messages", n_eval=0)
    assert tune(model, data, tmp_path / "first", "--loss-on", "assistant") == 0
    assert run(["tune", "--config", str(tmp_path / "first" / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    first, again = result_of(tmp_path / "first"), result_of(tmp_path / "again")
    assert first["final"]["eval_loss"] == again["final"]["eval_loss"]
    assert again["details"]["data"]["loss_on"] == "assistant"
    assert again["details"]["data"]["eval_split"] == "train (held out)"
    tokens = ["tune", "--model", model, "--dataset", data, *FLAGS[:-2], "--loss-on", "assistant"]
    tokens += ["--adapter-config", str(tmp_path / "first" / "adapter"), "--output", str(tmp_path / "third")]
    assert run(tokens) == 0
    assert result_of(tmp_path / "third")["final"]["eval_loss"] == first["final"]["eval_loss"]


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


def plain(value):
    if isinstance(value, dict):
        return {name: plain(held) for name, held in value.items() if name != "seconds"}
    return [plain(held) for held in value] if isinstance(value, list) else value


def test_a_run_that_was_killed_goes_on(model, tmp_path, capsys):
    data = write(tmp_path / "data", "messages")
    adapter = tmp_path / "adapter_config.json"
    adapter.write_text(
        json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]})
    )
    tokens = ["tune", "--model", model, "--dataset", data, *FLAGS[:-2], "--adapter-config", str(adapter)]

    def work():
        from foretune.training import tune as outcome

        real = outcome.fit

        def fit(plan, folder, *, hooks=None):
            def kill(done, total, loss):
                if done == 6:
                    os._exit(77)

            return real(plan, folder, hooks=outcome.Hooks(kill, hooks.on_record, hooks.on_note))

        outcome.fit = fit
        return run([*tokens, "--output", str(tmp_path / "cut")])

    assert forked(work) == 77
    assert (tmp_path / "cut" / "checkpoint-4" / "whole.json").exists()
    assert run([*tokens, "--output", str(tmp_path / "cut")]) == 0
    assert "going on with the run" in capsys.readouterr().err
    assert run([*tokens, "--output", str(tmp_path / "whole")]) == 0
    assert plain(result_of(tmp_path / "cut")) == plain(result_of(tmp_path / "whole"))
    assert sorted(os.listdir(tmp_path / "cut")) == sorted(os.listdir(tmp_path / "whole"))


def test_texts_with_labels_stay_a_classification(model, tmp_path):
    out = tmp_path / "out"
    assert tune(model, write(tmp_path / "data", "labelled"), out, "--target-modules", "q_proj") == 0
    assert result_of(out)["details"]["data"]["task"] == "classification"


def test_texts_without_labels_are_for_language_models_alone(encoder, tmp_path, capsys):
    assert tune(encoder, write(tmp_path / "data", "text"), tmp_path / "out") == 2
    assert "no label column found" in error_of(capsys)


def test_conversations_are_no_classification(model, tmp_path, capsys):
    assert tune(model, write(tmp_path / "data", "messages"), tmp_path / "out", "--task", "classification") == 2
    assert "no label column found" in error_of(capsys)


@pytest.mark.parametrize("kind", ["messages", "labelled"])
def test_an_encoder_is_refused(encoder, tmp_path, capsys, kind):
    assert tune(encoder, write(tmp_path / "data", kind), tmp_path / "out", "--task", "causal-lm") == 2
    assert "does not give the layer of the next token's logits" in error_of(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--task", "causal-lm", "--label-column", "label"], "label_column = ('label',): data of a language model has"),
        (["--task", "causal-lm", "--positive-from", "1"], "positive_from = 1: data of a language model has no labels"),
        (["--task", "causal-lm", "--loss-on", "assistant"], "loss_on = 'assistant', but row 0 is no conversation"),
        (["--task", "causal-lm", "--loss-on", "nothing"], "all"),
        (["--loss-on", "all"], "loss_on = 'all': is for causal language models; leave it out, or set --task causal-lm"),
        (["--task", "causal-lm", "--target-modules", "lm_head"], "lm_head"),
    ],
)
def test_settings_that_do_not_fit_are_refused(model, tmp_path, capsys, more, said):
    assert tune(model, write(tmp_path / "data", "labelled"), tmp_path / "out", *more) == 2
    assert said in " ".join(error_of(capsys).split())
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_classifier_is_refused(model, tmp_path, capsys):
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 2}))
    tokens = ["tune", "--model", model, "--dataset", write(tmp_path / "data", "messages")]
    assert run([*tokens, "--adapter-config", str(file)]) == 2
    assert "task_type 'SEQ_CLS': only 'CAUSAL_LM' is supported" in error_of(capsys)


def test_a_study_says_that_it_does_not_take_them(model, tmp_path, capsys):
    grid = tmp_path / "grid.yaml"
    data = write(tmp_path / "data", "labelled")
    grid.write_text(
        f"models: [{model}]\ndatasets: [{{dataset: {data}, task: causal-lm}}]\n"
        "placements: [{target_modules: [q_proj]}]\n"
    )
    assert run(["study", str(grid), "--output", str(tmp_path / "out")]) == 2
    assert "foretune study does not take language models yet: foretune forecast, rank and tune do" in error_of(capsys)
