import csv
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import foretune as ft
from foretune.cli import run
from foretune.errors import ConfigError, ModelError, StoreError
from foretune.models.classifier import load_classifier
from foretune.models.form import resolve_device
from foretune.models.placement import lora_config, place
from foretune.report.terminal import console
from foretune.settings.commands import TuneSettings
from foretune.settings.groups import AdapterConfig, DataConfig
from foretune.tasks.load import load_task
from foretune.tasks.sampling import split
from foretune.training.fit import Hooks, fit
from foretune.training.folder import claim, open_folder
from foretune.training.plan import prepare_tune
from foretune.training.report import print_tune
from foretune.training.trainable import trainable
from foretune.training.tune import run_tune, tune

import cases

SETTINGS = TuneSettings(epochs=3, learning_rate=2e-2, train_batch_size=8)
ADAPTER = AdapterConfig(("query", "value"), layers=(0,))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cases.write_reviews(tmp_path_factory.mktemp("reviews"))


def plan_of(model, dataset, settings=SETTINGS, adapter=ADAPTER):
    task = load_task(DataConfig(dataset))
    classifier = load_classifier(model, label_names=task.label_names, seed=settings.seed)
    return prepare_tune(classifier, task, lora_config(classifier.model, adapter), settings, inplace=True)


@pytest.fixture(scope="module")
def undisturbed(model, dataset, tmp_path_factory):
    plan = plan_of(model, dataset)
    return fit(plan, tmp_path_factory.mktemp("run")), plan


FLAGS = ["--target-modules", "query", "value", "--layers", "0", "--epochs", "3", "--learning-rate", "2e-2"]
FLAGS += ["--train-batch-size", "8"]


@pytest.fixture(scope="module")
def tuned(model, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    assert run(["tune", "--model", model, "--dataset", dataset, *FLAGS, "--output", str(folder)]) == 0
    return folder


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def without_seconds(history):
    return [dataclasses.replace(epoch, seconds=0.0) for epoch in history.epochs], [
        dataclasses.replace(step, seconds=0.0) for step in history.steps
    ]


def weights(plan):
    return {name: p.detach().clone() for name, p in plan.placed.named_parameters() if p.requires_grad}


def slow_metrics(model, plan, rows):
    """Loss and predictions one row at a time."""
    losses, predicted = [], []
    for record in rows.records():
        inputs = {name: torch.tensor([value]) for name, value in record.items() if name != "labels"}
        with torch.no_grad():
            logits = model(**inputs).logits[0].double()
        losses.append(float(torch.logsumexp(logits, 0) - logits[record["labels"]]))
        predicted.append(int(logits.argmax()))
    return float(np.mean(losses)), np.array(predicted)


def test_metrics_are_those_of_the_trained_model(undisturbed):
    fitted, plan = undisturbed
    last = fitted.history.epochs[-1]
    loss, predicted = slow_metrics(plan.placed, plan, plan.evaluation)
    labels = plan.evaluation.labels
    assert last.eval_loss == pytest.approx(loss, rel=1e-5)
    assert last.metrics["accuracy"] == pytest.approx(np.mean(predicted == labels))
    assert last.metrics["matthews"] == pytest.approx(matthews_corrcoef(labels, predicted))
    assert last.metrics["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    loss, predicted = slow_metrics(plan.placed, plan, plan.train_eval)
    assert last.train_loss_eval_mode == pytest.approx(loss, rel=1e-5)
    assert last.train_metric == pytest.approx(np.mean(predicted == plan.train_eval.labels))


def test_the_course_is_complete(undisturbed):
    fitted, plan = undisturbed
    history = fitted.history
    per_epoch = math.ceil(60 / 8)
    assert [epoch.step for epoch in history.epochs] == [0, per_epoch, 2 * per_epoch, 3 * per_epoch]
    assert [step.step for step in history.steps] == list(range(1, 3 * per_epoch + 1))
    for before, epoch in zip(history.epochs, history.epochs[1:], strict=False):
        losses = [step.loss for step in history.steps if before.step < step.step <= epoch.step]
        assert epoch.train_loss == pytest.approx(np.mean(losses))
    assert history.epochs[-1].train_loss < history.epochs[1].train_loss
    assert not plan.placed.training


def test_few_records_give_the_same_epochs(model, dataset, tmp_path, monkeypatch):
    """Windows of 4 steps do not fit into 9 steps an epoch; none holds steps of two epochs."""
    import foretune.training.fit as fit_module

    settings = dataclasses.replace(SETTINGS, train_batch_size=7, epochs=2)
    fine = fit(plan_of(model, dataset, settings), tmp_path / "fine").history
    monkeypatch.setattr(fit_module, "RECORDS_PER_EPOCH", 2)
    coarse = fit(plan_of(model, dataset, settings), tmp_path / "coarse").history
    assert [step.step for step in coarse.steps] == [4, 8, 9, 12, 16, 18]
    for first, second in zip(fine.epochs, coarse.epochs, strict=True):
        assert first.eval_loss == second.eval_loss
        assert first.train_loss is None or first.train_loss == pytest.approx(second.train_loss, rel=1e-5)


def test_learning_rate_warms_up_and_comes_down(undisturbed):
    rates = [step.learning_rate for step in undisturbed[0].history.steps]
    assert rates[0] == 0.0
    assert max(rates) == pytest.approx(2e-2, rel=0.1)
    peak = int(np.argmax(rates))
    assert peak <= math.ceil(0.06 * len(rates)) + 1
    assert np.all(np.diff(rates[peak:]) < 0)


def test_it_trains_what_was_scored(model, dataset, tmp_path):
    """Same adapter, head and rows: before training the loss is that of the score's initial outputs."""
    assert run(["score", "--model", model, "--dataset", dataset, "--target-modules", "query", "--seed", "3",
                "--eval-samples", "9", "--samples", "8", "--output", str(tmp_path / "s")]) == 0  # fmt: skip
    config = ["--config", str(tmp_path / "s" / "config.yaml"), "--epochs", "1"]
    assert run(["tune", *config, "--output", str(tmp_path / "t")]) == 0
    score, tune_ = result_of(tmp_path / "s"), result_of(tmp_path / "t")
    before = score["kernel_regression"]["baselines"]["f0_loss"]
    assert tune_["before_training"]["eval_loss"] == pytest.approx(before, rel=1e-5)
    assert tune_["details"]["data"]["eval_rows"] == 9
    assert tune_["settings"]["seed"] == 3
    assert tune_["details"]["data"]["fingerprint"] == score["details"]["data"]["fingerprint"]
    for name in ("target_modules", "layers", "r", "alpha", "trainable_parameters", "head_parameters"):
        assert tune_["placement"][name] == score["placement"][name]


def test_adapter_and_head_train_and_nothing_else(model, dataset, tmp_path):
    plan = plan_of(model, dataset)
    task = plan.task
    again = load_classifier(model, label_names=task.label_names, seed=0)
    reference = place(again.model, lora_config(again.model, ADAPTER), seed=0)
    start = dict(reference.named_parameters())
    for name, parameter in plan.placed.named_parameters():
        assert torch.equal(parameter, start[name]), name
    fit(plan, tmp_path)
    for name, parameter in plan.placed.named_parameters():
        moves = "lora_" in name or "modules_to_save" in name
        assert torch.equal(parameter, start[name]) != moves, name  # A moves once B is no longer zero
    assert trainable(plan.placed) == {"adapter": 2 * 8 * (16 + 16), "head": 2 * 16 + 2}


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [3, 8, 9, 17, 23])
def test_a_run_that_was_cut_off_ends_with_the_same_numbers(model, dataset, tmp_path, undisturbed, at):
    def cut(done, total, loss):
        if done == at:
            raise Stop

    with pytest.raises(Stop):
        fit(plan_of(model, dataset), tmp_path, hooks=Hooks(on_step=cut))
    plan = plan_of(model, dataset)
    resumed = fit(plan, tmp_path)
    reference, reference_plan = undisturbed
    assert without_seconds(resumed.history) == without_seconds(reference.history)
    expected = weights(reference_plan)
    assert all(torch.equal(value, expected[name]) for name, value in weights(plan).items())
    seconds = [step.seconds for step in resumed.history.steps]
    assert seconds == sorted(seconds)


def test_half_a_checkpoint_is_thrown_away(model, dataset, tmp_path, undisturbed):
    def cut(done, total, loss):
        if done == 9:
            raise Stop

    with pytest.raises(Stop):
        fit(plan_of(model, dataset), tmp_path, hooks=Hooks(on_step=cut))
    half = tmp_path / "checkpoint-16"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    (half / "trainer_state.json").write_text('{"global_step": 16, "log_hist', encoding="utf-8")
    resumed = fit(plan_of(model, dataset), tmp_path)
    assert without_seconds(resumed.history) == without_seconds(undisturbed[0].history)


def test_the_run_folder(tuned, undisturbed):
    assert sorted(os.listdir(tuned)) == [
        "adapter",
        "config.yaml",
        "history.csv",
        "loss.png",
        "result.json",
        "steps.csv",
    ]
    result, history = result_of(tuned), undisturbed[0].history
    assert result["final"]["eval_loss"] == history.epochs[-1].eval_loss  # the command does what the function does
    assert result["placement"]["trainable_parameters"] == 512
    assert result["placement"]["head_parameters"] == 34
    assert (result["world_size"], result["batch_size_total"], result["steps"]) == (1, 8, 24)
    assert result["seconds"].keys() == {"load", "train", "evaluate", "total"}
    assert len(result["epochs"]) == 4
    assert not result["diverged"]
    with (tuned / "history.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["eval_accuracy"]) for row in rows] == [epoch.metrics["accuracy"] for epoch in history.epochs]
    with (tuned / "steps.csv").open(encoding="utf-8") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [step.loss for step in history.steps]
    assert (tuned / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_peft_loads_the_adapter_and_it_scores_the_same(tuned, model, dataset):
    plan = plan_of(model, dataset)
    torch.manual_seed(123)  # the head must come from the adapter's file, not from luck
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    loaded = PeftModel.from_pretrained(base, str(tuned / "adapter")).eval()
    loss, predicted = slow_metrics(loaded, plan, plan.evaluation)
    final = result_of(tuned)["final"]
    assert final["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert final["eval_accuracy"] == pytest.approx(np.mean(predicted == plan.evaluation.labels))
    auto = AutoPeftModelForSequenceClassification.from_pretrained(str(tuned / "adapter"), num_labels=2).eval()
    assert slow_metrics(auto, plan, plan.evaluation)[0] == pytest.approx(loss, rel=1e-6)
    assert AutoTokenizer.from_pretrained(str(tuned / "adapter"))("good").input_ids
    names = load_file(tuned / "adapter" / "adapter_model.safetensors")
    assert any("lora_A" in name for name in names)


def test_a_finished_run_is_not_overwritten(tuned, model, dataset, capsys):
    assert run(["tune", "--model", model, "--dataset", dataset, *FLAGS, "--output", str(tuned)]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_run_goes_on_with_the_same_settings_only(tmp_path):
    flags = {"epochs": 3, "learning_rate": 1e-3}
    folder = tmp_path / "run"
    assert not claim(folder, flags)
    open_folder(folder, flags)
    assert claim(folder, flags)
    with pytest.raises(StoreError, match="epochs = 3 instead of 4"):
        claim(folder, {**flags, "epochs": 4})
    (folder / "config.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(StoreError, match="something else"):
        claim(folder, flags)


def test_interrupted_command_says_what_was_kept_and_goes_on(model, dataset, tmp_path, monkeypatch, capsys, tuned):
    import foretune.training.tune as outcome

    def interrupted(plan, folder, *, hooks=None):
        def cut(done, total, loss):
            if done == 12:
                raise KeyboardInterrupt

        return fit(plan, folder, hooks=dataclasses.replace(hooks, on_step=cut))

    tokens = ["tune", "--model", model, "--dataset", dataset, *FLAGS, "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(outcome, "fit", interrupted)
        assert run(tokens) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len((tmp_path / "run" / "history.csv").read_text(encoding="utf-8").splitlines()) == 3  # header, 0, 1
    assert run(tokens) == 0
    assert "going on" in capsys.readouterr().err
    first, again = result_of(tuned), result_of(tmp_path / "run")
    strip = ("seconds", "epochs", "final", "before_training")
    assert {k: v for k, v in first.items() if k not in strip} == {k: v for k, v in again.items() if k not in strip}
    assert again["final"]["eval_loss"] == first["final"]["eval_loss"]


def test_config_yaml_replays(tuned, tmp_path):
    held = yaml.safe_load((tuned / "config.yaml").read_text(encoding="utf-8"))
    assert held["learning_rate"] == 2e-2
    assert run(["tune", "--config", str(tuned / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert result_of(tmp_path / "again")["final"]["eval_loss"] == result_of(tuned)["final"]["eval_loss"]


def test_a_score_reads_the_config_of_a_fine_tune(tuned, tmp_path):
    tokens = ["score", "--config", str(tuned / "config.yaml"), "--samples", "8", "--output", str(tmp_path / "s")]
    assert run(tokens) == 0


def test_json_goes_to_stdout(model, dataset, capsys):
    assert run(["tune", "--model", model, "--dataset", dataset, "--epochs", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == 2
    assert "nothing saved" in captured.err


def test_objects_in_python(model, dataset):
    task = load_task(DataConfig(dataset))
    classifier = load_classifier(model, label_names=task.label_names, seed=0)
    before = {name: p.clone() for name, p in classifier.model.named_parameters()}
    config = lora_config(classifier.model, ADAPTER)
    result = ft.tune(classifier.model, classifier.tokenizer, config, task, settings=SETTINGS)
    assert all(torch.equal(p, before[name]) for name, p in classifier.model.named_parameters())
    assert result.last.epoch == 3
    assert result.last.eval_loss < result.history.epochs[0].eval_loss


def test_rows_held_out_do_not_train(model, tmp_path):
    cases.write_reviews(tmp_path / "one", n_train=50)
    (tmp_path / "one" / "validation.csv").unlink()
    plan = plan_of(model, str(tmp_path / "one"))
    assert plan.held_out
    assert len(plan.evaluation.labels) == 10
    assert not set(plan.train.indices) & set(plan.evaluation.indices)
    assert len(plan.train.labels) == 40
    some = plan_of(model, str(tmp_path / "one"), dataclasses.replace(SETTINGS, eval_samples=7))
    assert set(some.train.indices) == set(plan.train.indices)  # fewer rows to evaluate on are no more to train on
    assert len(some.evaluation.labels) == 7
    score = split(some.task, samples=8, eval_samples=7, seed=0)
    assert set(score.eval_indices) == set(some.evaluation.indices) <= set(plan.evaluation.indices)
    assert set(score.train_indices) <= set(some.train.indices)
    every = plan_of(model, str(tmp_path / "one"), dataclasses.replace(SETTINGS, eval_samples=50))
    assert set(every.evaluation.indices) == set(plan.evaluation.indices)


def test_divergence_is_said(model, dataset, tmp_path, capsys):
    plan = plan_of(model, dataset, dataclasses.replace(SETTINGS, epochs=1))
    with torch.no_grad():
        next(p for name, p in plan.placed.named_parameters() if "lora_B" in name).fill_(float("inf"))
    result = run_tune(plan, tmp_path)
    content = result.to_dict()
    assert content["diverged"]
    json.dumps(content, allow_nan=False)
    print_tune(console(), content)
    assert "diverged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("train_batch_size", 0),
        ("weight_decay", -1.0),
        ("warmup_ratio", 1.0),
        ("eval_samples", 0),
        ("train_eval_samples", -1),
        ("scheduler", "square"),
    ],
)
def test_settings_out_of_range(setting, value):
    with pytest.raises(ConfigError, match=setting):
        TuneSettings(**{setting: value})


def test_trackers_and_devices_that_are_not_there(model, dataset, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="report_to = nothing"):
        fit(plan_of(model, dataset, dataclasses.replace(SETTINGS, report_to=("nothing",))), tmp_path)
    with pytest.raises(ModelError, match="cuda:7"):
        resolve_device("cuda:7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert resolve_device("auto") == torch.device("cuda", 2)


def test_tensorboard_stays_in_the_run_folder(model, dataset, tmp_path):
    tokens = ["tune", "--model", model, "--dataset", dataset, "--epochs", "1", "--report-to", "tensorboard"]
    assert run([*tokens, "--output", str(tmp_path / "run")]) == 0
    assert list((tmp_path / "run" / "runs").rglob("events.*"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_without_training_rows_in_eval_mode(model, dataset, tmp_path):
    plan = plan_of(model, dataset, dataclasses.replace(SETTINGS, epochs=1, train_eval_samples=0))
    history = fit(plan, tmp_path).history
    assert history.epochs[-1].train_loss_eval_mode is None
    assert history.epochs[-1].eval_loss > 0


def test_bfloat16(model, dataset, tmp_path):
    plan = plan_of(model, dataset, dataclasses.replace(SETTINGS, epochs=1, bf16=True))
    assert math.isfinite(fit(plan, tmp_path).history.epochs[-1].eval_loss)


@pytest.mark.parametrize("name", ["roberta", "distilbert", "mpnet", "gpt2", "llama"])
def test_other_architectures(name, dataset, tmp_path):
    folder = cases.save(tmp_path / "model", name)
    adapter = AdapterConfig(tuple(cases.TARGETS[name]))
    plan = plan_of(folder, dataset, dataclasses.replace(SETTINGS, epochs=1), adapter)
    history = fit(plan, tmp_path / "run").history
    loss, _ = slow_metrics(plan.placed, plan, plan.evaluation)
    assert history.epochs[-1].eval_loss == pytest.approx(loss, rel=1e-4)


def test_two_processes_share_the_work(model, dataset, tmp_path):
    """torchrun needs no code of our own; one process prints and writes."""
    tokens = ["tune", "--model", model, "--dataset", dataset, "--epochs", "1", "--train-batch-size", "8"]
    tokens += ["--output", str(tmp_path / "run")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, "-m", "foretune", *tokens], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "run")
    assert (result["world_size"], result["batch_size_total"], result["steps"]) == (2, 16, 4)
    assert done.stdout.count("eval loss") == 1
    assert Path(tmp_path / "run" / "adapter" / "adapter_config.json").exists()


@pytest.mark.real
def test_minilm_learns_bbc_news(tmp_path):
    from foretune.tasks.demo import export_bbc_news, model_folder

    topics = ("business", "entertainment", "politics", "sports", "tech")
    task = load_task(DataConfig(str(export_bbc_news(tmp_path, topics=topics, train_rows=1780)), max_train=96))
    classifier = load_classifier(str(model_folder()), label_names=task.label_names, seed=0)
    config = lora_config(classifier.model, AdapterConfig(("query", "value"), layers=(5,)))
    settings = TuneSettings(epochs=3, learning_rate=5e-3, train_batch_size=8, max_length=32, eval_samples=64)
    result = tune(classifier.model, classifier.tokenizer, config, task, settings=settings)
    assert result.last.eval_loss < result.history.epochs[0].eval_loss - 0.2
    assert result.last.metrics["accuracy"] > 0.4  # five classes, a quarter of the texts in the largest
