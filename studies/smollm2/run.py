"""Forecasts of fine-tunes of SmolLM2, and the fine-tunes themselves.

python studies/smollm2/run.py MODEL DATA OUTPUT [--minutes M] [--sets NAME …]: MODEL is the folder of SmolLM2 as
safetensors, DATA holds yelp, cola, imdb, mr, trec and sst2, each with train.csv and validation.csv that have the
columns `text` and `label`. Every piece of work is a file in OUTPUT, claimed by another, so that several processes share
it and a stopped one is gone on with (delete `*.claim` first). A forecast knows the pretrained model and the known rows
alone.
"""

import argparse
import csv
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import foretune as ft
from foretune.forecasting.schedule import schedule_of
from foretune.forecasting.sequence_simulation import linearise_sequences, simulate_sequences
from foretune.models.language_model import own_language_model
from foretune.models.placement import lora_config
from foretune.sequence_plan import SequencePlan, prepare_sequences, sequence_batches
from foretune.settings.commands import ForecastSettings, TuneSettings
from foretune.settings.groups import AdapterConfig

ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
EVERY = ("all-linear",)
PLACEMENTS = {
    "all": AdapterConfig(EVERY, r=8, alpha=16),
    "attention": AdapterConfig(ATTENTION, r=8, alpha=16),
    "feed-forward": AdapterConfig(FEED_FORWARD, r=8, alpha=16),
    "low": AdapterConfig(EVERY, tuple(range(10)), r=8, alpha=16),
    "high": AdapterConfig(EVERY, tuple(range(20, 30)), r=8, alpha=16),
    "all-r4": AdapterConfig(EVERY, r=4, alpha=8),
    "all-r32": AdapterConfig(EVERY, r=32, alpha=64),
}
KINDS = ("description", "entity", "abbreviation", "person", "number", "location")
MOODS = ("negative", "positive")
SETS = ("trec-kind", "sst2-mood", "cola", "mr", "yelp", "imdb")
RATES, FURTHER = (3e-4, 1e-3), (1e-4, 3e-3)  # the further ones with all modules alone
KNOWN, TRIAL, LARGE, EVAL_ROWS = 64, 12, 256, 32
LARGER = [("all", 3e-4), ("attention", 3e-4), ("all", 1e-3)]
MEMORY = 2 * 10**9


def recipe(name: str) -> dict[str, int]:
    """What all runs of a set have in common."""
    return {"epochs": 3, "train_batch_size": 8, "max_length": 64 if "-" in name else 32, "batch_size": 8}


def grid() -> list[tuple[str, float]]:
    """Adapters with their rates."""
    return [*((name, rate) for rate in RATES for name in PLACEMENTS), *(("all", rate) for rate in FURTHER)]


def row_of(name: str, text: str, label: int) -> dict[str, str]:
    """A text as it is, or as a prompt with the word of its class."""
    if name == "trec-kind":
        return {"prompt": f"Question: {text}\nThe answer is of the kind:", "completion": f" {KINDS[label]}"}
    if name == "sst2-mood":
        return {"prompt": f"Review: {text}\nThe mood of the review is", "completion": f" {MOODS[label]}"}
    return {"text": text}


def task_of(data: Path, name: str, count: int) -> Any:
    """The first of the rows that are drawn, and the rows to predict."""
    parts = []
    for split, first, most in (("train", KNOWN, count), ("validation", EVAL_ROWS, EVAL_ROWS)):
        with (data / name.split("-")[0] / f"{split}.csv").open(newline="", encoding="utf-8") as file:
            rows = [(row["text"], int(row["label"])) for row in csv.DictReader(file)]
        random = np.random.default_rng(0)
        chosen = random.choice(len(rows), first, replace=False)
        others = random.permutation(np.setdiff1d(np.arange(len(rows)), chosen))
        drawn = np.concatenate([chosen, others])[:most]
        parts.append(Dataset.from_list([row_of(name, *rows[index]) for index in drawn]))
    return ft.language_task_from_datasets(*parts)


def positions_of(plan: SequencePlan, adapter: AdapterConfig) -> list[int]:
    """Modules of an adapter among all linear ones."""
    kinds = None if adapter.target_modules == EVERY else adapter.target_modules
    return [
        index
        for index, site in enumerate(plan.adapted.sites)
        if (adapter.layers is None or site.layer in adapter.layers) and (kinds is None or site.name.endswith(kinds))
    ]


def rivals(plan: SequencePlan) -> dict[str, dict[str, float]]:
    """Of each adapter what needs no training: parameters, ‖∇_B L‖ before training, and PLoP's ratio.

    The latter is ‖W h‖ √d_in / (‖W‖ ‖h‖), the mean over positions and modules: low where a module's inputs do not lie
    along its weight, which is where PLoP puts adapters.

    Returns:
        Numbers by adapter.
    """
    ratios: dict[str, list[float]] = {site.name: [] for site in plan.adapted.sites}
    hooks = []
    for name, module in plan.placed.get_base_model().named_modules():
        if name in ratios:

            def look(layer: Any, inputs: Any, _: Any, name: str = name) -> None:
                weight, h = layer.base_layer.weight, inputs[0]
                out = (h @ weight.mT).norm(dim=-1) * weight.shape[1] ** 0.5
                ratios[name].append(float((out / (weight.norm() * h.norm(dim=-1))).nanmean().detach()))

            hooks.append(module.register_forward_hook(look))
    plan.placed.zero_grad()
    for batch in sequence_batches(plan, plan.known):
        with torch.enable_grad():
            logits = plan.placed(**batch.inputs).logits[:, :-1].flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(logits, batch.labels[:, 1:].flatten(), reduction="sum")
            (loss / plan.known.n_targets).backward()
    for hook in hooks:
        hook.remove()
    squares = {
        name: float(p.grad.double().square().sum())
        for name, p in plan.placed.named_parameters()
        if "lora_B" in name and p.grad is not None
    }
    plan.placed.zero_grad()
    found = {}
    for name, adapter in PLACEMENTS.items():
        sites = [plan.adapted.sites[index] for index in positions_of(plan, adapter)]
        gradient = sum(value for key, value in squares.items() if any(f".{site.name}." in key for site in sites))
        found[name] = {
            "parameters": sum(site.d_in + site.d_out for site in sites) * adapter.r,
            "gradient_norm": gradient**0.5,
            "plop": sum(sum(ratios[site.name]) / len(ratios[site.name]) for site in sites) / len(sites),
        }
    return found


def forecast(load: Callable[[], Any], data: Path, name: str, size: int, cells: list[tuple[str, float]]) -> list[Any]:
    """Forecasts of runs on `size` rows, of which 64 are known."""
    model, tokenizer = load()
    language = own_language_model(model, tokenizer, bare=True)
    base = ForecastSettings(samples=KNOWN, eval_samples=EVAL_ROWS, **recipe(name))
    started = time.time()
    largest = lora_config(model, AdapterConfig(EVERY, r=32, alpha=64))
    plan = prepare_sequences(language, task_of(data, name, KNOWN), largest, base)
    linearised = linearise_sequences(plan, MEMORY)
    spent, of_rivals, found = time.time() - started, rivals(plan), []
    for rate in sorted({rate for _, rate in cells}):
        names = [adapter for adapter, of_cell in cells if of_cell == rate]
        starts = []
        for adapter in names:
            start = linearised.start(positions_of(plan, PLACEMENTS[adapter]), PLACEMENTS[adapter].r)
            starts.append(replace(start, scaling=tuple(2.0 for _ in start.scaling)))  # α/r of all of them
        schedule = schedule_of(replace(base, learning_rate=rate), size, seed=0)
        started = time.time()
        runs = simulate_sequences(plan, linearised, starts, schedule)
        for adapter, run in zip(names, runs, strict=True):
            trajectory = run.run.trajectory
            found.append(
                {
                    "set": name,
                    "known": KNOWN,
                    "rows": size,
                    "adapter": adapter,
                    "rate": rate,
                    "steps": trajectory.steps,
                    "eval_loss": trajectory.eval_loss,
                    "accuracy": run.token_accuracy,
                    "linear": run.linear_loss,
                    "train_loss": trajectory.train_loss,
                    "movement": trajectory.movement,
                    "kept": linearised.train.sketches.shares,
                    "seconds": (time.time() - started) / len(names),
                    "pass_seconds": spent,
                    "targets": plan.known.n_targets,
                    **of_rivals[adapter],
                }
            )
    return found


def fine_tune(load: Callable[[], Any], data: Path, name: str, cell: tuple[int, str, float]) -> dict[str, Any]:
    """One run, on the Trainer."""
    count, adapter, rate = cell
    model, tokenizer = load()
    settings = TuneSettings(eval_samples=EVAL_ROWS, train_eval_samples=0, learning_rate=rate, **recipe(name))
    config = lora_config(model, PLACEMENTS[adapter])
    history = ft.tune(model, tokenizer, config, task_of(data, name, count), settings=settings).history
    return {
        "set": name,
        "rows": count,
        "adapter": adapter,
        "rate": rate,
        "epochs": [epoch.to_dict() for epoch in history.epochs],
        "batch_losses": [[step.step, step.loss] for step in history.steps],
        "seconds": history.seconds_train,
    }


def pieces(sets: list[str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Names of all pieces of work."""
    answers, texts = [[one for one in sets if ("-" in one) == kind] for kind in (True, False)]
    for name in sets:
        yield f"forecast-{name}-{KNOWN}", ("forecast", name, KNOWN, grid())
    cells = [(KNOWN, *cell) for cell in grid()]
    order = [(name, (rows, *cell)) for rows in (TRIAL, LARGE) for cell in LARGER for name in sets]
    order += [(name, cell) for cell in cells for name in (*answers, *texts)]
    for name, cell in order:
        yield f"run-{name}-{cell[0]}-{cell[1]}-{cell[2]:g}", ("run", name, cell)
    for name in sets:  # with the known rows again and again
        yield f"forecast-{name}-{LARGE}", ("forecast", name, LARGE, LARGER)


def claim(path: Path) -> bool:
    """Take a piece of work, unless it is taken."""
    try:
        os.close(os.open(path.with_suffix(".claim"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return not path.exists()


def main() -> None:
    """Work through the pieces."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model"), parser.add_argument("data", type=Path), parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    end = time.time() + 60 * given.minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    load = lambda: (loaded, tokenizer)  # noqa: E731
    for name, what in pieces(given.sets):
        path = given.output / f"{name}.json"
        if time.time() > end or path.exists() or not claim(path):
            continue
        if what[0] == "forecast":
            said: Any = forecast(load, given.data, *what[1:])
        else:
            said = fine_tune(load, given.data, *what[1:])
        path.write_text(json.dumps(said))
        print(f"{time.time() - end + 60 * given.minutes:6.0f} s", name, flush=True)


if __name__ == "__main__":
    main()
