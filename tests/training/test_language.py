"""Fine-tunes of causal language models: losses, metrics and steps, against loops by hand."""

import copy
import dataclasses
import json
import math

import datasets
import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModelForCausalLM

import foretune as ft
from chats import MARKED, make_tokenizer
from finetunes import SETTINGS, completions, model_of, plan_of, task_of, weights
from foretune.errors import DataError, ModelError
from foretune.language.encode import targets_of
from foretune.language.load import language_task_from_datasets
from foretune.report.terminal import console
from foretune.tasks.metrics import PERPLEXITY, TOKEN_ACCURACY, metric_named, metrics_of
from foretune.tasks.sampling import HELD_OUT, draw_indices
from foretune.training.fit import Hooks, fit
from foretune.training.folder import close_folder
from foretune.training.language_trainer import make_collator, token_sums
from foretune.training.report import print_tune, print_tune_plan
from foretune.training.tune import run_tune


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    plan = plan_of(task_of())
    return fit(plan, tmp_path_factory.mktemp("run")), plan


def without_seconds(history):
    return [dataclasses.replace(epoch, seconds=0.0) for epoch in history.epochs], [
        dataclasses.replace(step, seconds=0.0) for step in history.steps
    ]


def slow(model, rows):
    """Σ −log p of all targets over their number, and the share that is the likeliest token, a token at a time."""
    total, right, count = 0.0, 0, 0
    for feature in rows.features:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([feature["input_ids"]])).logits[0].double()
        for position, label in enumerate(feature["labels"][1:]):
            if label != -100:
                total -= float(torch.log_softmax(logits[position], 0)[label])
                right += int(logits[position].argmax()) == label
                count += 1
    return total / count, right / count


@pytest.mark.parametrize(("form", "name"), [("messages", "llama"), ("prompt-completion", "gpt2"), ("text", "qwen2")])
def test_metrics_count_every_target_of_the_evaluation_once(form, name, tmp_path):
    plan = plan_of(task_of(form), dataclasses.replace(SETTINGS, epochs=1), name)
    last = fit(plan, tmp_path).history.epochs[-1]
    loss, accuracy = slow(plan.placed, plan.evaluation)
    assert last.eval_loss == pytest.approx(loss, rel=1e-5)
    assert last.metrics == pytest.approx({"perplexity": math.exp(loss), "token_accuracy": accuracy}, rel=1e-5)
    loss, _ = slow(plan.placed, plan.train_eval)
    assert last.train_loss_eval_mode == pytest.approx(loss, rel=1e-5)
    assert last.train_metric == pytest.approx(math.exp(loss), rel=1e-5)


def test_the_course_is_complete(undisturbed):
    history = undisturbed[0].history
    assert [epoch.step for epoch in history.epochs] == [0, 4, 8, 12]
    assert [step.step for step in history.steps] == list(range(1, 13))
    assert history.epochs[-1].eval_loss < history.epochs[0].eval_loss - 0.15
    best = min(history.epochs[1:], key=lambda epoch: epoch.main)
    assert history.best == best  # the least perplexity


def test_steps_are_those_of_adamw_on_the_mean_over_targets(tmp_path):
    """One batch of all rows a step: targets count alike, however many a row has."""
    settings = dataclasses.replace(SETTINGS, train_batch_size=14, epochs=5, warmup_ratio=0.0, weight_decay=0.1)
    plan = plan_of(task_of(), settings)
    model = copy.deepcopy(plan.placed)
    fitted = fit(plan, tmp_path)
    batch = make_collator(plan.language)(plan.train.features)
    labels = batch.pop("labels")[:, 1:]
    asked = labels != -100
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    model.train()
    losses = []
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 5)
        said = torch.log_softmax(model(**batch).logits[:, :-1], -1)
        chosen = said.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        loss = -(chosen * asked).sum() / asked.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert [step.loss for step in fitted.history.steps] == pytest.approx(losses, abs=1e-5)
    expected = weights(model)
    for name, value in weights(plan.placed).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [3, 4, 11])
def test_a_run_that_was_cut_off_ends_with_the_same_numbers(tmp_path, undisturbed, at):
    def cut(done, total, loss):
        if done == at:
            raise Stop

    with pytest.raises(Stop):
        fit(plan_of(task_of()), tmp_path, hooks=Hooks(on_step=cut))
    plan = plan_of(task_of())
    resumed = fit(plan, tmp_path)
    reference, reference_plan = undisturbed
    assert without_seconds(resumed.history) == without_seconds(reference.history)
    expected = weights(reference_plan.placed)
    assert all(torch.equal(value, expected[name]) for name, value in weights(plan.placed).items())


def test_no_logits_outlive_their_batch():
    logits = torch.randn(2, 5, 7)
    labels = torch.tensor([[1, 2, -100, 3, 4], [-100, -100, -100, -100, -100]])
    sums = token_sums(logits, targets_of(labels, 1))
    assert sums.shape == (2, 3)
    log_p = torch.log_softmax(logits[0].double(), -1)
    assert float(sums[0, 0]) == pytest.approx(-float(log_p[0, 2] + log_p[2, 3] + log_p[3, 4]), rel=1e-6)
    assert sums[0, 2] == 3
    assert sums[1].tolist() == [0, 0, 0]


def test_rows_are_held_out_by_the_rule_of_classifiers():
    plan = plan_of(task_of(n_eval=0), dataclasses.replace(SETTINGS, seed=3))
    order = draw_indices(14, 14, seed=3)
    n_held_out = round(14 / HELD_OUT)
    assert plan.train.indices.tolist() == sorted(order[n_held_out:].tolist())
    assert plan.evaluation.indices.tolist() == order[:n_held_out].tolist()
    fewer = plan_of(task_of(n_eval=0), dataclasses.replace(SETTINGS, seed=3, eval_samples=2))
    assert fewer.evaluation.indices.tolist() == order[:2].tolist()
    assert fewer.train.features == plan.train.features
    facts = plan.describe()["data"]
    assert facts["eval_split"] == "train (held out)"
    assert facts["train_targets"] + facts["eval_targets"] == plan.train.n_targets + plan.evaluation.n_targets


def test_rows_that_are_cut_or_emptied_are_counted_and_told(capsys):
    rows = completions(12)
    rows[2]["prompt"] = "what is the colour of the sky? " * 9
    rows[5]["completion"] = "it is blue " * 20
    task = language_task_from_datasets(
        datasets.Dataset.from_list(rows), datasets.Dataset.from_list(completions(3, 100))
    )
    plan = plan_of(task)
    facts = plan.describe()
    assert (facts["data"]["truncated_rows"], facts["data"]["emptied_rows"]) == (2, 1)
    assert facts["data"]["train_rows"] == 11
    assert 2 not in plan.train.indices
    print_tune_plan(console(), facts, "all-linear")
    said = " ".join(capsys.readouterr().out.split())
    assert "2 rows truncated" in said
    assert "1 left out" in said
    empty = language_task_from_datasets(datasets.Dataset.from_list(rows[:2]), datasets.Dataset.from_list(rows[2:3]))
    with pytest.raises(DataError, match="none of 1 rows has a token that carries loss after the cut"):
        plan_of(empty)


def test_held_out_rows_that_are_all_emptied_are_refused():
    rows = completions(5)
    rows[int(draw_indices(5, 5, seed=0)[0])]["prompt"] = "what is the colour of the sky? " * 9
    with pytest.raises(DataError, match="none of the rows to evaluate on has a token that carries loss"):
        plan_of(language_task_from_datasets(datasets.Dataset.from_list(rows)))


def test_no_row_is_longer_than_the_model_allows():
    rows = [{"text": "it is blue " * 40}, {"text": "why"}]
    task = language_task_from_datasets(datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows))
    plan = plan_of(task, dataclasses.replace(SETTINGS, max_length=512))
    assert plan.rows.max_length == 64
    assert max(len(feature["input_ids"]) for feature in plan.train.features) == 64


def test_a_run_that_diverges_says_so(tmp_path, capsys):
    plan = plan_of(task_of(), dataclasses.replace(SETTINGS, epochs=1))
    with torch.no_grad():
        next(p for name, p in plan.placed.named_parameters() if "lora_B" in name).fill_(float("inf"))
    content = run_tune(plan, tmp_path).to_dict()
    assert content["diverged"]
    assert content["best_epoch"] is None
    assert json.loads(json.dumps(content, allow_nan=False))["final"]["eval_perplexity"] is None
    print_tune(console(), content)
    assert "diverged" in capsys.readouterr().out


def test_a_perplexity_that_rises_is_told(undisturbed, tmp_path, capsys):
    content = run_tune(plan_of(task_of(), dataclasses.replace(SETTINGS, epochs=2)), tmp_path).to_dict()
    print_tune(console(), content)
    assert "was best" not in capsys.readouterr().out
    content["final"] = {**content["final"], "eval_perplexity": 1e6}
    content["best_epoch"] = 1
    print_tune(console(), content)
    assert "Perplexity was best after epoch 1" in capsys.readouterr().out


@pytest.mark.parametrize("option", [{"bf16": True}, {"train_eval_samples": 0}, {"train_eval_samples": 3}])
def test_settings_of_classifiers_hold(tmp_path, option):
    plan = plan_of(task_of(), dataclasses.replace(SETTINGS, epochs=1, **option))
    last = fit(plan, tmp_path).history.epochs[-1]
    assert math.isfinite(last.eval_loss)
    assert (last.train_metric is None) == (option.get("train_eval_samples") == 0)


@pytest.mark.parametrize(("course", "steps"), [("epochs", [4, 8, 12]), ("end", [12])])
def test_courses(tmp_path, undisturbed, course, steps):
    plan = dataclasses.replace(plan_of(task_of()), course=course)
    history = fit(plan, tmp_path).history
    assert [epoch.step for epoch in history.epochs] == steps
    assert history.epochs[-1].eval_loss == undisturbed[0].history.epochs[-1].eval_loss


def test_the_users_own_model_is_tuned_and_left_as_it_is(undisturbed):
    model, tokenizer = model_of(), make_tokenizer(MARKED)
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    result = ft.tune(model, tokenizer, config, task_of(), settings=SETTINGS)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert isinstance(result.plan.placed, PeftModelForCausalLM)
    assert config.task_type is None
    assert result.last.eval_loss == undisturbed[0].history.epochs[-1].eval_loss
    again = ft.tune(result.plan.placed, tokenizer, None, task_of(), settings=dataclasses.replace(SETTINGS, epochs=1))
    assert again.history.epochs[0].eval_loss == pytest.approx(result.last.eval_loss, rel=1e-6)


def test_a_classifier_is_refused():
    import cases

    with pytest.raises(ModelError, match="no layer that gives the logits of the next token"):
        ft.tune(cases.tiny("llama"), make_tokenizer(), None, task_of())


def test_the_adapter_is_that_of_the_last_epoch(undisturbed, tmp_path):
    model_of().save_pretrained(tmp_path / "model")
    plan = plan_of(task_of(), dataclasses.replace(SETTINGS, epochs=1))
    plan.placed.get_base_model().config._name_or_path = str(tmp_path / "model")
    plan.placed.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    result = run_tune(plan, tmp_path / "work")
    (tmp_path / "run").mkdir()
    close_folder(result, tmp_path / "run")
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "CAUSAL_LM"
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter").eval()
    assert slow(loaded, plan.evaluation)[0] == pytest.approx(result.last.eval_loss, rel=1e-5)


def test_metrics_are_declared():
    assert metrics_of("causal-lm") == (PERPLEXITY, TOKEN_ACCURACY)
    assert metrics_of("regression")[0].name == "spearman"
    assert metric_named("perplexity").better == -1
    for value in (1.0, 7.5, 3e4):
        assert PERPLEXITY.from_scale(PERPLEXITY.to_scale(value)) == pytest.approx(value)
    assert PERPLEXITY.to_scale(np.e) == pytest.approx(1.0)
