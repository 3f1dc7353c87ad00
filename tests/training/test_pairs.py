"""Fine-tunes of encoder-decoders: steps and adapters are those of transformers' Seq2SeqTrainer."""

import copy
import math

import datasets
import pytest
import torch
import transformers as tf

import pairs
from finetunes import weights
from foretune.training.fit import fit

SETTINGS = pairs.SETTINGS


@pytest.mark.parametrize("name", sorted(pairs.FAMILIES))
def test_steps_are_those_of_the_trainer_of_transformers(name, tmp_path):
    plan = pairs.plan_of(name)
    model, tokenizer = copy.deepcopy(plan.placed), plan.tokenizer
    fitted = fit(plan, tmp_path / "ours")
    arguments = tf.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        num_train_epochs=SETTINGS.epochs,
        learning_rate=SETTINGS.learning_rate,
        per_device_train_batch_size=SETTINGS.train_batch_size,
        per_device_eval_batch_size=7,
        weight_decay=SETTINGS.weight_decay,
        warmup_steps=SETTINGS.warmup_ratio,
        lr_scheduler_type=SETTINGS.scheduler,
        logging_steps=1,
        save_strategy="no",
        seed=0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    def encoded(rows):
        read = tokenizer([row["prompt"] for row in rows], max_length=SETTINGS.max_length, truncation=True)
        written = tokenizer(
            text_target=[row["completion"] for row in rows], max_length=SETTINGS.max_length, truncation=True
        )
        return datasets.Dataset.from_dict({**read, "labels": written["input_ids"]})

    theirs = tf.Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=encoded(pairs.rows(14)),
        eval_dataset=encoded(pairs.rows(7, 100)),
        data_collator=tf.DataCollatorForSeq2Seq(tokenizer, model=model.get_base_model()),
    )
    theirs.train()
    losses = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert [step.loss for step in fitted.history.steps] == pytest.approx(losses, abs=1e-5)
    expected = weights(theirs.model)
    for key, value in weights(plan.placed).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5)
    last = fitted.history.epochs[-1]
    loss = theirs.evaluate()["eval_loss"]  # one batch: the mean over its targets
    assert last.eval_loss == pytest.approx(loss, rel=1e-5)
    assert last.metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_the_evaluation_counts_every_target_once(tmp_path):
    plan = pairs.plan_of()
    fitted = fit(plan, tmp_path)
    total, right, count = 0.0, 0, 0
    plan.placed.eval()
    for feature in plan.evaluation.features:
        batch = plan.language.collate([feature])
        labels = batch.pop("labels")[0]
        with torch.no_grad():
            log_p = torch.log_softmax(plan.placed(**batch).logits[0].double(), -1)
        total -= float(log_p[torch.arange(len(labels)), labels].sum())
        right += int((log_p.argmax(-1) == labels).sum())
        count += len(labels)
    last = fitted.history.epochs[-1]
    assert last.eval_loss == pytest.approx(total / count, rel=1e-5)
    assert last.metrics["token_accuracy"] == pytest.approx(right / count)
    assert plan.describe()["data"]["task"] == "seq2seq"
    assert plan.describe()["data"]["eval_targets"] == count
