"""Simulated runs of a study's cells: one pass over the samples of each data set and seed serves all its placements.

They lie beside the cells, as STUDY/outlooks/KEY.json or, from other than 512 samples, KEY-SAMPLES.json, and hold
nothing that was fitted on finished runs: the report calibrates them, each data set by the others.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foretune.errors import StoreError
from foretune.evaluation.comparisons import kernel_accuracies, permuted_task, redraw_weights
from foretune.evaluation.metric_inputs import MetricInputs
from foretune.evaluation.predictors import SIMULATED_AREAS, predictors_of
from foretune.forecasting.linear_model import Start
from foretune.forecasting.linearise import Linearised, linearise
from foretune.forecasting.reach import run_values
from foretune.forecasting.schedule import Schedule, schedule_of
from foretune.forecasting.simulated_runs import SimulatedRun, case_values, kind_of, runs_of, simulate_runs
from foretune.models.classifier import Classifier, load_model
from foretune.models.placement import adapted_names, lora_config
from foretune.problem import Plan, prepare, settings_of_pass
from foretune.report.store import finite, make_folder, read_json, write_json, write_whole
from foretune.settings.groups import AdapterConfig, Sample
from foretune.study.cell import SIMULATIONS, USUAL_SAMPLES, simulation_file, stored_key
from foretune.study.grid import Cell
from foretune.tasks.load import Task, load_task
from foretune.tasks.sampling import n_training

# 1: without an evaluation split samples and run were of other rows than were trained, and no kind of run was said
# 2: the best of the run over its halves of epochs was not kept
SCHEMA = 4
POINTS = 6
OnProgress = Callable[[str, int, int], None]  # what is done now, groups done, groups in all


@dataclass(frozen=True)
class SimulationSettings:
    """How runs are simulated.

    Attributes:
        samples: Labelled training examples, at most: all rows that train where these are fewer.
        eval_samples: Labelled rows to predict, at most, of the evaluation split or of the rows held out.
        comparisons: Whether to simulate with A fixed and at the random head, and the controls: with permuted labels
            and with a random backbone. Costs three more passes.
    """

    samples: int = USUAL_SAMPLES
    eval_samples: int = 256
    comparisons: bool = False


@dataclass(frozen=True)
class _Group:
    """Cells that differ in placement and rank alone, and what they share."""

    cells: tuple[Cell, ...]
    task: Task
    settings: SimulationSettings

    @property
    def first(self) -> Cell:
        return self.cells[0]

    @property
    def schedule(self) -> Schedule:
        train = self.first.train
        return schedule_of(train, n_training(self.task), seed=train.seed)


def simulate_cells(
    cells: Sequence[Cell], store: Path, settings: SimulationSettings, *, on_progress: OnProgress | None = None
) -> int:
    """Simulate the runs of a study that were not simulated yet, and compute the metrics of others for them.

    Args:
        cells: Its cells, finished or not.
        store: Its folder.
        settings: How; what was simulated otherwise is simulated again.
        on_progress: Called with what is done now, groups done and groups in all.

    Returns:
        How many cells were simulated.
    """
    groups: dict[tuple[Any, ...], list[tuple[str, Cell]]] = defaultdict(list)
    for cell in cells:
        adapter = cell.adapter
        groups[cell.model, cell.data, cell.train, adapter.alpha, adapter.rslora, adapter.init].append(
            (stored_key(cell, store), cell)
        )
    waiting = [keyed for keyed in groups.values() if not all(_is_made(store, key, settings) for key, _ in keyed)]
    make_folder(store / SIMULATIONS)
    made = 0
    for done, keyed in enumerate(waiting):
        first = keyed[0][1]
        if on_progress is not None:
            on_progress(f"{first.data_name} · seed {first.train.seed}", done, len(waiting))
        group = _Group(tuple(cell for _, cell in keyed), load_task(first.data), settings)
        for (key, _), record in zip(keyed, _records(group), strict=True):
            content = finite({"schema": SCHEMA, "key": key, "settings": asdict(settings), **record})
            write_whole(simulation_file(store, key, settings.samples), partial(_write, content))
            made += 1
    return made


def _write(content: dict[str, Any], path: Path) -> None:
    write_json(path, content)


def _is_made(store: Path, key: str, settings: SimulationSettings) -> bool:
    path = simulation_file(store, key, settings.samples)
    if not path.is_file():
        return False
    try:
        content = read_json(path)
    except (StoreError, RecursionError):  # damaged: it is made again
        return False
    return content.get("schema") == SCHEMA and content.get("settings") == asdict(settings)


def _records(group: _Group) -> list[dict[str, Any]]:
    clock = time.perf_counter()
    classifier = _load(group)
    plan, linearised = _linearise(group, classifier)
    seconds = {"survey": time.perf_counter() - clock}
    names = _module_names(group, classifier)
    starts = _starts(group, names, linearised)
    clock = time.perf_counter()
    adapters = [linearised.start([]), *starts]
    alone, *simulated = simulate_runs(linearised, adapters, group.schedule, points=POINTS)
    seconds["simulate"] = time.perf_counter() - clock
    clock = time.perf_counter()
    metrics = _metrics(MetricInputs(plan, linearised, starts, alone.end, group.first.train.seed))
    seconds["baselines"] = time.perf_counter() - clock
    if group.settings.comparisons:
        for values, more in zip(metrics, _comparisons(group, classifier, linearised, names), strict=True):
            values.update(more)
    each = {name: value / len(starts) for name, value in seconds.items()}
    return [
        {
            "quantities": {**case_values(outlook), **run_values(run), **_areas(outlook), **values},
            "course": _trajectory(outlook),
            "output": plan.reduction.name,
            "samples": outlook.samples,
            "train_rows": outlook.train_rows,
            "seconds": each,
        }
        for outlook, run, values in zip(simulated, runs_of(kind_of(plan, group.schedule), starts), metrics, strict=True)
    ]


def _metrics(inputs: MetricInputs) -> list[dict[str, float]]:
    """Every predictor that is computed from the pass, for each placement."""
    entries = predictors_of(inputs.plan.task.objective.kind)
    columns = {entry.name: entry.compute(inputs) for entry in entries if entry.compute is not None}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _load(group: _Group, *, redrawn: bool = False) -> Classifier:
    seed = group.first.train.seed
    classifier = load_model(group.first.model, group.task.objective, seed)
    if redrawn:
        redraw_weights(classifier.model, seed)
    return classifier


def _linearise(group: _Group, classifier: Classifier, *, probe: bool = True) -> tuple[Plan, Linearised]:
    first, task = group.first, group.task
    adapter = replace(
        first.adapter, target_modules=("all-linear",), layers=None, r=max(cell.adapter.r for cell in group.cells)
    )
    known = Sample(
        samples=group.settings.samples,
        eval_samples=group.settings.eval_samples,
        max_length=first.train.max_length,
        batch_size=first.train.batch_size,
        seed=first.train.seed,
    )
    plan = prepare(classifier, task, lora_config(classifier.model, adapter), settings_of_pass(task, known))
    return plan, linearise(plan, probe=probe, autocast=torch.bfloat16 if first.train.bf16 else None)


def _module_names(group: _Group, classifier: Classifier) -> list[tuple[str, ...]]:
    """Modules of each cell; peft names them on a copy of the model, so once for all ranks of a placement."""
    names: dict[AdapterConfig, tuple[str, ...]] = {}
    for adapter in (replace(cell.adapter, r=1) for cell in group.cells):
        if adapter not in names:
            names[adapter] = adapted_names(classifier.model, lora_config(classifier.model, adapter))
    return [names[replace(cell.adapter, r=1)] for cell in group.cells]


def _starts(group: _Group, names: Sequence[Sequence[str]], linearised: Linearised) -> list[Start]:
    positions = {site.name: index for index, site in enumerate(linearised.sites)}
    starts = []
    for cell, modules in zip(group.cells, names, strict=True):
        reached = [positions[name] for name in modules if name in positions]  # no output depends on the others
        starts.append(linearised.start(reached, cell.adapter.r))
    return starts


def _comparisons(
    group: _Group, classifier: Classifier, linearised: Linearised, names: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """The same simulation with one thing changed at a time."""
    objective = group.task.objective
    starts = _starts(group, names, linearised)
    lazy = simulate_runs(linearised, starts, group.schedule, train_a=False)
    kernels = kernel_accuracies(linearised, starts) if objective.kind == "classification" else [{} for _ in starts]
    _, at_random_head = _linearise(group, classifier, probe=False)
    random_head = simulate_runs(at_random_head, _starts(group, names, at_random_head), group.schedule)
    del at_random_head
    permuted = _simulated(replace(group, task=permuted_task(group.task, group.first.train.seed)), classifier, names)
    random = _simulated(group, _load(group, redrawn=True), names)
    return [
        {
            f"lazy_{objective.metric.name}": a.end.eval_metric,
            "lazy_eval_loss": a.end.eval_loss,
            f"random_head_{objective.metric.name}": b.end.eval_metric,
            f"permuted_{objective.metric.name}": c.end.eval_metric,
            f"random_backbone_{objective.metric.name}": d.end.eval_metric,
            **kernel,
        }
        for a, b, c, d, kernel in zip(lazy, random_head, permuted, random, kernels, strict=True)
    ]


def _simulated(group: _Group, classifier: Classifier, names: Sequence[Sequence[str]]) -> tuple[SimulatedRun, ...]:
    _, linearised = _linearise(group, classifier)
    return simulate_runs(linearised, _starts(group, names, linearised), group.schedule)


def _areas(outlook: SimulatedRun) -> dict[str, float]:
    """Areas under the simulated curves, divided by the steps."""
    run = outlook.trajectory
    areas = float(np.mean(run.batch_loss)), float(np.trapezoid(run.eval_loss, run.steps)) / run.steps[-1]
    return dict(zip(SIMULATED_AREAS, areas, strict=True))


def _trajectory(outlook: SimulatedRun) -> dict[str, Any]:
    run = outlook.trajectory
    return {
        "steps": run.steps,
        "eval_loss": run.eval_loss,
        f"eval_{outlook.metric.name}": run.eval_metric,
        "batch_loss": [float(f"{loss:.4g}") for loss in run.batch_loss],
    }
