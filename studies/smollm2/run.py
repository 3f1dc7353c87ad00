"""Forecasts of fine-tunes of SmolLM2 on plain texts, each made before its run; then the runs. Goes on where it was cut.

python studies/smollm2/run.py MODEL DATA OUTPUT NAME …: MODEL is the folder of SmolLM2 as safetensors, DATA holds for
each NAME a folder with train.csv and validation.csv that have a column `text`; rows are drawn by a seed.
"""

import csv
import json
import sys
import time
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import foretune as ft
from foretune.forecasting.schedule import schedule_of
from foretune.forecasting.sequence_simulation import linearise_sequences, simulate_sequences
from foretune.models.language_model import own_language_model
from foretune.models.placement import lora_config
from foretune.sequence_plan import prepare_sequences
from foretune.settings.commands import ForecastSettings, TuneSettings
from foretune.settings.groups import AdapterConfig
from foretune.settings.sizes import parse_bytes

ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
PLACEMENTS = {
    "all": AdapterConfig(("all-linear",), alpha=16),
    "attention": AdapterConfig(ATTENTION, alpha=16),
    "feed-forward": AdapterConfig(FEED_FORWARD, alpha=16),
    "low": AdapterConfig(("all-linear",), tuple(range(10)), alpha=16),
    "high": AdapterConfig(("all-linear",), tuple(range(20, 30)), alpha=16),
}
RUNS = [
    ("all", 1e-4),
    ("all", 3e-4),
    ("all", 1e-3),
    *((name, 3e-4) for name in PLACEMENTS if name != "all"),
    ("low", 1e-3),
    ("high", 1e-3),
]
ROWS, EVAL_ROWS = 64, 32
RECIPE = {"epochs": 3, "train_batch_size": 8, "max_length": 32, "batch_size": 8}


def texts(data: Path, name: str) -> Dataset:
    """Texts of both splits, drawn."""
    found = []
    for split, count in (("train", ROWS), ("validation", EVAL_ROWS)):
        with (data / name / f"{split}.csv").open(newline="", encoding="utf-8") as file:
            rows = [row["text"] for row in csv.DictReader(file)]
        chosen = np.random.default_rng(0).choice(len(rows), count, replace=False)
        found.append(Dataset.from_dict({"text": [rows[index] for index in chosen]}))
    return found


def forecasts(model, tokenizer, task, path: Path) -> dict:
    """Every run's forecast from one pass over all linear modules."""
    language = own_language_model(model, tokenizer, bare=True)
    settings = ForecastSettings(samples=ROWS, eval_samples=EVAL_ROWS, **RECIPE)
    started = time.time()
    plan = prepare_sequences(language, task, lora_config(model, PLACEMENTS["all"]), settings)
    linearised = linearise_sequences(plan, parse_bytes("memory", "2GB"))
    seconds, sites, said = time.time() - started, plan.adapted.sites, {}
    for name, rate in RUNS:
        started, placement = time.time(), PLACEMENTS[name]
        kinds = None if placement.target_modules == ("all-linear",) else placement.target_modules
        positions = [
            index
            for index, site in enumerate(sites)
            if (placement.layers is None or site.layer in placement.layers)
            and (kinds is None or site.name.endswith(kinds))
        ]
        recipe = ForecastSettings(samples=ROWS, eval_samples=EVAL_ROWS, learning_rate=rate, **RECIPE)
        schedule = schedule_of(recipe, plan.train_rows, seed=recipe.seed)
        (run,) = simulate_sequences(plan, linearised, [linearised.start(positions)], schedule)
        said[f"{name}-{rate:g}"] = {
            "base": run.run.probe_loss,
            "forecast": run.run.end.eval_loss,
            "linear": run.linear_loss,
            "train": run.run.end.train_loss,
            "token_accuracy": run.token_accuracy[-1],
            "parameters": sum(sites[index].n_parameters for index in positions),
            "seconds": time.time() - started,
            "pass_seconds": seconds,
            "kept": float(np.mean(linearised.train.sketches.kept)),
        }
        print(path.name, name, rate, said[f"{name}-{rate:g}"], flush=True)
    path.write_text(json.dumps(said, indent=1))
    return said


def main(source: str, data: Path, output: Path, names: list[str]) -> None:
    """Forecasts and runs of each data set."""
    output.mkdir(parents=True, exist_ok=True)
    for name in names:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype="float32").eval()
        task = ft.language_task_from_datasets(*texts(data, name))
        said_path, real_path = output / f"{name}-forecasts.json", output / f"{name}-runs.json"
        if not said_path.exists():
            forecasts(model, tokenizer, task, said_path)
        real = json.loads(real_path.read_text()) if real_path.exists() else {}
        for place, rate in RUNS:
            key = f"{place}-{rate:g}"
            if key in real:
                continue
            settings = TuneSettings(eval_samples=EVAL_ROWS, train_eval_samples=0, learning_rate=rate, **RECIPE)
            result = ft.tune(model, tokenizer, lora_config(model, PLACEMENTS[place]), task, settings=settings)
            content = result.to_dict()
            real[key] = {
                "final": content["final"],
                "epochs": [epoch["eval_loss"] for epoch in content["epochs"]],
                "seconds": content["seconds"],
            }
            real_path.write_text(json.dumps(real, indent=1))
            print(name, key, content["final"], flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
