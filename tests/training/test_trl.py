"""Steps and adapters are those of TRL's SFTTrainer with the same recipe and seed."""

import copy

import datasets
import pytest
import torch
import trl

from chats import MARKED, make_tokenizer
from finetunes import FORMATS, SETTINGS, plan_of, task_of, weights
from foretune.training.fit import fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # trl 1.16 on 5.23
]


@pytest.mark.parametrize("form", FORMATS)
def test_steps_are_those_of_trl(form, tmp_path):
    made, _, options = FORMATS[form]
    plan = plan_of(task_of(form))
    model = copy.deepcopy(plan.placed)
    fitted = fit(plan, tmp_path / "ours")
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "theirs"),
        num_train_epochs=3,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        warmup_steps=SETTINGS.warmup_ratio,
        lr_scheduler_type="linear",
        max_length=40,
        logging_steps=1,
        save_strategy="no",
        seed=0,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    train = datasets.Dataset.from_list(made(14))
    theirs = trl.SFTTrainer(model=model, args=arguments, train_dataset=train, processing_class=make_tokenizer(MARKED))
    theirs.train()
    losses = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert [step.loss for step in fitted.history.steps] == pytest.approx(losses, abs=1e-5)
    expected = weights(theirs.model)
    for name, value in weights(plan.placed).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)
