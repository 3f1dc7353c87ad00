"""Runs of adapter methods beside LoRA."""

import numpy as np
import torch
from peft import AdaLoraConfig

from foretune.models.classifier import batches
from foretune.settings.commands import TuneSettings
from foretune.settings.groups import DataConfig
from foretune.tasks.load import load_task
from foretune.training.tune import tune

import cases


def loss_of(model, plan):
    outputs = np.zeros((len(plan.evaluation.labels), 2))
    with torch.no_grad():
        for batch in batches(plan.evaluation.encoded, plan.classifier, batch_size=4):
            outputs[batch.rows] = model(**batch.inputs).logits.numpy()
    return plan.task.objective.mean_loss(outputs, plan.evaluation.labels)


def test_adalora_gives_ranks_away_and_its_penalty_is_in_no_evaluation(tmp_path):
    task = load_task(DataConfig(cases.write_reviews(tmp_path / "reviews")))
    config = AdaLoraConfig(  # ranks are given away after the last of 16 steps, and at no other
        task_type="SEQ_CLS", init_r=4, target_r=2, total_step=16, deltaT=16, target_modules=["query", "value"]
    )
    base = cases.tiny("bert", dtype=torch.float32)
    settings = TuneSettings(epochs=2, train_batch_size=8, learning_rate=2e-2)
    result = tune(base, cases.tokenizer(), config, task, settings=settings)
    plan, placed, before = result.plan, result.plan.placed, result.history.epochs[0]
    assert result.last.step == 16
    kept = placed.active_peft_config.rank_pattern
    assert sum(map(sum, kept.values())) == 2 * 4  # of four modules
    for name, parameter in placed.named_parameters():
        if "lora_E" in name:
            assert torch.equal(parameter.flatten() != 0, torch.tensor(kept[name.removeprefix("base_model.model.")]))
    assert placed.active_peft_config.orth_reg_weight == 0.5
    np.testing.assert_allclose(before.eval_loss, loss_of(base, plan), rtol=1e-5)
    np.testing.assert_allclose(result.last.eval_loss, loss_of(placed, plan), rtol=1e-5)
