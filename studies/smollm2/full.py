"""Full fine-tunes of SmolLM2 beside the adapters': `python studies/smollm2/full.py MODEL DATA OUTPUT [NAME …]`.

The rows, steps, schedule and evaluation of run.py on 64 rows, with every weight trained.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from run import KNOWN, recipe, task_of
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from foretune.models.language_model import own_language_model
from foretune.sequence_plan import choose_rows
from foretune.training.language_trainer import LanguageTrainer, make_collator, measure

RATES = (1e-5, 3e-5, 1e-4, 3e-4)


def main(source: str, data: Path, output: Path, names: list[str]) -> None:
    """Train and evaluate each."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    for name in names:
        path = output / f"full-{name}.json"
        found = json.loads(path.read_text()) if path.exists() else []
        for rate in RATES:
            if any(one["rate"] == rate for one in found):
                continue
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            language = own_language_model(model, tokenizer, bare=True)
            settings = recipe(name)
            rows = choose_rows(language, task_of(data, name, KNOWN), settings["max_length"], eval_samples=None, seed=0)
            with tempfile.TemporaryDirectory() as folder:
                arguments = TrainingArguments(
                    output_dir=folder,
                    num_train_epochs=settings["epochs"],
                    learning_rate=rate,
                    per_device_train_batch_size=settings["train_batch_size"],
                    per_device_eval_batch_size=settings["batch_size"],
                    warmup_steps=0.06,
                    seed=0,
                    report_to="none",
                    save_strategy="no",
                    remove_unused_columns=False,
                    label_names=["labels"],
                    disable_tqdm=True,
                )
                trainer = LanguageTrainer(
                    model=language.model,
                    args=arguments,
                    data_collator=make_collator(language),
                    train_dataset=rows.train.records(),
                    eval_dataset=rows.evaluation.records(by_length=True),
                    compute_metrics=measure,
                )
                trainer.train()
                found.append({"set": name, "rate": rate, "eval_loss": trainer.evaluate()["eval_loss"]})
            path.write_text(json.dumps(found))
            print(found[-1], flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
