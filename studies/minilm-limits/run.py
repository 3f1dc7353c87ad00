"""Fine-tunes outside of what the shipped calibration has seen, beside their forecasts.

Run from a folder with MiniLM and data: `python run.py` adds the runs that lack to runs.csv, `python run.py judge`
judges them. A run is forecast from 512 known rows, by a calibration fitted on the other data sets of
studies/minilm-forecast.
"""

import csv
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from foretune.evaluation.held_out import calibration_cases
from foretune.evaluation.records import read_records
from foretune.forecasting.calibration import apply_calibration
from foretune.forecasting.calibration_fit import fit_calibration
from foretune.forecasting.linearise import linearise
from foretune.forecasting.outcomes import OUTCOMES, scale
from foretune.forecasting.reach import reach, run_from, run_values
from foretune.forecasting.schedule import schedule_of
from foretune.forecasting.simulated_runs import case_values, kind_of, runs_of, simulate_runs
from foretune.models.classifier import load_model
from foretune.models.placement import adapted_names, lora_config
from foretune.problem import prepare
from foretune.settings.commands import ScoreSettings, TuneSettings
from foretune.settings.groups import AdapterConfig, DataConfig, ModelConfig
from foretune.tasks.load import load_task
from foretune.training.plan import prepare_tune
from foretune.training.tune import run_tune

HERE = Path(__file__).parent
RUNS = HERE / "runs.csv"
OUTPUTS = ("margin", "full")  # of two classes and of more
KNOWN, LENGTH = 512, 48
# name: rows, epochs, learning rate
SETTINGS = {
    "more epochs": (512, 8, 4e-3),
    "lower rate": (512, 5, 2e-3),
    "far lower rate": (512, 5, 1e-3),
    "higher rate": (512, 5, 1e-2),
    "twice the rows": (1024, 4, 5e-3),
    "four times the rows": (2000, 3, 5e-3),
}
PLACEMENTS = {"query, value": ("query", "value"), "all-linear": ("all-linear",)}
DATA = ("sst2", "mr", "trec", "yelp", "imdb", "bbc")


def rows() -> list[dict[str, str]]:
    """Read the finished runs."""
    if not RUNS.exists():
        return []
    with RUNS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def forecasts(name: str, setting: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Simulate and fine-tune every placement of one data set and recipe."""
    n_rows, epochs, rate = SETTINGS[setting]
    task = load_task(DataConfig(f"data/{name}", max_train=n_rows))
    tune = TuneSettings(epochs=epochs, learning_rate=rate, max_length=LENGTH, eval_samples=500, train_eval_samples=0)
    score = ScoreSettings(
        samples=min(KNOWN, len(task.train.labels)),
        eval_samples=500,
        draws=1,
        reduction=task.objective.simulated().name,
        max_length=LENGTH,
    )
    base = load_model(ModelConfig("MiniLM"), task.objective, 0)
    plan = prepare(base, task, lora_config(base.model, AdapterConfig(("all-linear",))), score)
    linearised = linearise(plan)
    places = {site.name: index for index, site in enumerate(linearised.sites)}
    configs = [lora_config(base.model, AdapterConfig(modules)) for modules in PLACEMENTS.values()]
    starts = [linearised.start([places[module] for module in adapted_names(base.model, config)]) for config in configs]
    schedule = schedule_of(tune, plan.train_rows, seed=tune.seed)
    kinds = runs_of(kind_of(plan, schedule), starts)
    for placement, config, kind, simulated in zip(
        PLACEMENTS, configs, kinds, simulate_runs(linearised, starts, schedule), strict=True
    ):
        fresh = load_model(ModelConfig("MiniLM"), task.objective, 0)
        with tempfile.TemporaryDirectory() as folder:
            result = run_tune(prepare_tune(fresh, task, config, tune, inplace=True), Path(folder))
        real = {"train_loss": result.last.train_loss, "eval_loss": result.last.eval_loss}
        yield (
            placement,
            {**run_values(kind), **case_values(simulated), **real, "accuracy": result.last.main},
        )


def add() -> None:
    """Make the runs that lack."""
    done = {(row["dataset"], row["setting"]) for row in rows()}
    for setting in SETTINGS:
        for name in DATA:
            if (name, setting) in done or not Path("data", name).exists():
                continue
            for placement, values in forecasts(name, setting):
                record = {"dataset": name, "setting": setting, "placement": placement, **values}
                new = not RUNS.exists()
                with RUNS.open("a", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, list(record))
                    if new:
                        writer.writeheader()
                    writer.writerow(record)
                print(record, flush=True)


def judge() -> None:
    """Say how many outcomes lay within their intervals, as wide as inside and as wide as they are given."""
    finished = calibration_cases(read_records(HERE.parent / "minilm-forecast"))
    whole = fit_calibration(finished, OUTPUTS, "all")
    found: dict[tuple[str, str, str], list[tuple[float, bool | None]]] = defaultdict(list)
    for row in rows():
        values = {name: float(value) for name, value in row.items() if name not in ("dataset", "setting", "placement")}
        rest = [case for case in finished if case.group != row["dataset"]]
        plain = apply_calibration(fit_calibration(rest, OUTPUTS, "rest"), values, "margin").levels or {}
        kind, domain = run_from(values), whole.domain
        assert kind is not None
        assert domain is not None
        away = reach(domain, kind)
        for name in OUTCOMES:
            away_from_all = away.withheld or (name == "train_loss" and bool(away.reasons))
            value, high = (scale(name, getattr(plain[name], end)) for end in ("value", "high"))
            missed = abs(scale(name, values[name]) - value) / (high - value)
            given = None if away_from_all else missed <= away.widening
            found[row["setting"], "two classes" if kind.classes == 2 else "more classes", name].append((missed, given))
    print(asdict(whole.domain) if whole.domain else "")
    for (setting, classes, name), seen in found.items():
        shown = [given for _, given in seen if given is not None]
        held = "withheld" if not shown else f"{sum(shown)} of {len(shown)}"
        narrow = sum(missed <= 1.0 for missed, _ in seen)
        print(
            f"| {setting} | {classes} | {name.replace('_', ' ')} | {len(seen)} | {narrow} | {held} | "
            f"{max(missed for missed, _ in seen):.1f} |"
        )


if __name__ == "__main__":
    judge() if sys.argv[1:] == ["judge"] else add()
