"""Outlooks of a study's cells: one pass over the samples of each data set and seed prices all its placements.

They lie beside the cells, as STUDY/outlooks/KEY.json, and hold nothing that was fitted on finished runs: the report
calibrates them, each data set by the others.
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
from foretune.evaluation.rivals import data_quantities, lazy_quantities, placement_quantities
from foretune.forecasting.linearise import Survey, survey
from foretune.forecasting.reach import run_values
from foretune.forecasting.recipe import recipe_of
from foretune.forecasting.runs import Outlook, case_values, kind_of, outlooks, runs_of
from foretune.forecasting.simulate import Start
from foretune.models.classifier import Classifier, load_model
from foretune.models.placement import adapted_names, lora_config
from foretune.problem import Plan, prepare
from foretune.report.store import finite, make_folder, read_json, write_json, write_whole
from foretune.settings.commands import ScoreSettings
from foretune.settings.groups import AdapterConfig
from foretune.study.cell import OUTLOOKS, stored_key
from foretune.study.grid import Cell
from foretune.tasks.load import Task, load_task
from foretune.tasks.sampling import n_training, split

# 1: without an evaluation split samples and run were of other rows than were trained, and no kind of run was said
SCHEMA = 2
POINTS = 6
OnNews = Callable[[str, int, int], None]


@dataclass(frozen=True)
class OutlookSettings:
    """How outlooks are made.

    Attributes:
        samples: Labelled training examples, at most: all rows that train where these are fewer.
        eval_samples: Labelled rows to predict, at most, of the evaluation split or of the rows held out.
        comparisons: Whether to simulate with A fixed and at the random head, and the controls: with permuted labels
            and with a random backbone. Costs three more passes.
    """

    samples: int = 512
    eval_samples: int = 256
    comparisons: bool = False


@dataclass(frozen=True)
class _Group:
    """Cells that differ in placement and rank alone, and what they share."""

    cells: tuple[Cell, ...]
    task: Task
    settings: OutlookSettings

    @property
    def first(self) -> Cell:
        return self.cells[0]


def make_outlooks(
    cells: Sequence[Cell], store: Path, settings: OutlookSettings, *, on_news: OnNews | None = None
) -> int:
    """Make the outlooks that a study lacks.

    Args:
        cells: Its cells, finished or not.
        store: Its folder.
        settings: How; an outlook that was made otherwise is made again.
        on_news: Called with what is done now, groups done and groups in all.

    Returns:
        How many were made.
    """
    groups: dict[tuple[Any, ...], list[tuple[str, Cell]]] = defaultdict(list)
    for cell in cells:
        adapter = cell.adapter
        groups[cell.model, cell.data, cell.train, adapter.alpha, adapter.rslora, adapter.init].append(
            (stored_key(cell, store), cell)
        )
    waiting = [held for held in groups.values() if not all(_is_made(store, key, settings) for key, _ in held)]
    make_folder(store / OUTLOOKS)
    made = 0
    for done, held in enumerate(waiting):
        first = held[0][1]
        if on_news is not None:
            on_news(f"{first.data_name} · seed {first.train.seed}", done, len(waiting))
        group = _Group(tuple(cell for _, cell in held), load_task(first.data), settings)
        for (key, _), record in zip(held, _records(group), strict=True):
            content = finite({"schema": SCHEMA, "key": key, "settings": asdict(settings), **record})
            write_whole(store / OUTLOOKS / f"{key}.json", partial(_write, content))
            made += 1
    return made


def _write(content: dict[str, Any], path: Path) -> None:
    write_json(path, content)


def _is_made(store: Path, key: str, settings: OutlookSettings) -> bool:
    path = store / OUTLOOKS / f"{key}.json"
    if not path.is_file():
        return False
    try:
        held = read_json(path)
    except (StoreError, RecursionError):  # damaged: it is made again
        return False
    return held.get("schema") == SCHEMA and held.get("settings") == asdict(settings)


def _records(group: _Group) -> list[dict[str, Any]]:
    clock = time.perf_counter()
    classifier = _load(group)
    plan, held = _survey(group, classifier)
    seconds = {"survey": time.perf_counter() - clock}
    names = _module_names(group, classifier)
    starts = _starts(group, names, held)
    recipe = recipe_of(group.first.train, plan.train_rows, seed=group.first.train.seed)
    clock = time.perf_counter()
    alone, *found = outlooks(held, [held.start([]), *starts], recipe, points=POINTS)
    seconds["simulate"] = time.perf_counter() - clock
    clock = time.perf_counter()
    shared = data_quantities(held, seed=group.first.train.seed)
    shared["head_alone_accuracy"] = alone.end.eval_accuracy
    own = placement_quantities(plan, held, starts)
    seconds["baselines"] = time.perf_counter() - clock
    if group.settings.comparisons:
        for values, more in zip(own, _comparisons(group, classifier, held, names), strict=True):
            values.update(more)
    each = {name: value / len(starts) for name, value in seconds.items()}
    return [
        {
            "quantities": {**case_values(outlook), **run_values(run), **_areas(outlook), **shared, **values},
            "course": _course(outlook),
            "output": plan.reduction.name,
            "samples": outlook.samples,
            "train_rows": outlook.train_rows,
            "seconds": each,
        }
        for outlook, run, values in zip(found, runs_of(kind_of(plan, recipe), starts), own, strict=True)
    ]


def _load(group: _Group, *, backbone: int | None = None) -> Classifier:
    classifier = load_model(group.first.model, group.task.label_names, group.first.train.seed)
    if backbone is not None:
        with torch.random.fork_rng():
            torch.manual_seed(backbone)
            _draw_again(classifier.model)
    return classifier


def _draw_again(model: Any) -> None:
    # as the model's own initialisation does; transformers passes over what it thinks was loaded
    kept = {name: bias.detach().clone() for name, bias in model.named_parameters() if name.endswith("bias")}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = False
        module._is_hf_initialized = False
        model._init_weights(module)
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if name in kept and "pooler" in name:  # a pooler whose bias is 0 counts as new, and would train as a whole
                bias.copy_(kept[name])


def _survey(group: _Group, classifier: Classifier, *, probe: bool = True) -> tuple[Plan, Survey]:
    first, task = group.first, group.task
    adapter = replace(
        first.adapter, target_modules=("all-linear",), layers=None, r=max(cell.adapter.r for cell in group.cells)
    )
    score = ScoreSettings(
        samples=min(group.settings.samples, n_training(task)),
        eval_samples=group.settings.eval_samples,
        draws=1,
        reduction="margin" if task.n_classes == 2 else "full",
        max_length=first.train.max_length,
        batch_size=first.train.batch_size,
        seed=first.train.seed,
    )
    plan = prepare(classifier, task, lora_config(classifier.model, adapter), score)
    return plan, survey(plan, probe=probe, autocast=torch.bfloat16 if first.train.bf16 else None)


def _module_names(group: _Group, classifier: Classifier) -> list[tuple[str, ...]]:
    """Modules of each cell; peft names them on a copy of the model, so once for all ranks of a placement."""
    found: dict[AdapterConfig, tuple[str, ...]] = {}
    for adapter in (replace(cell.adapter, r=1) for cell in group.cells):
        if adapter not in found:
            found[adapter] = adapted_names(classifier.model, lora_config(classifier.model, adapter))
    return [found[replace(cell.adapter, r=1)] for cell in group.cells]


def _starts(group: _Group, names: Sequence[Sequence[str]], held: Survey) -> list[Start]:
    places = {site.name: index for index, site in enumerate(held.sites)}
    starts = []
    for cell, own in zip(group.cells, names, strict=True):
        known = [places[name] for name in own if name in places]  # no output depends on the others
        starts.append(held.start(known, cell.adapter.r))
    return starts


def _comparisons(
    group: _Group, classifier: Classifier, held: Survey, names: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """The same simulation with one thing changed at a time."""
    starts = _starts(group, names, held)
    recipe = recipe_of(group.first.train, n_training(group.task), seed=group.first.train.seed)
    lazy = outlooks(held, starts, recipe, train_a=False)
    kernels = lazy_quantities(held, starts)
    _, at_random_head = _survey(group, classifier, probe=False)
    random_head = outlooks(at_random_head, _starts(group, names, at_random_head), recipe)
    del at_random_head
    permuted = _simulated(replace(group, task=permuted_task(group.task, group.first.train.seed)), classifier, names)
    random = _simulated(group, _load(group, backbone=group.first.train.seed), names)
    return [
        {
            "lazy_accuracy": a.end.eval_accuracy,
            "lazy_eval_loss": a.end.eval_loss,
            "random_head_accuracy": b.end.eval_accuracy,
            "permuted_accuracy": c.end.eval_accuracy,
            "random_backbone_accuracy": d.end.eval_accuracy,
            **kernel,
        }
        for a, b, c, d, kernel in zip(lazy, random_head, permuted, random, kernels, strict=True)
    ]


def permuted_task(task: Task, seed: int) -> Task:
    """Permute the labels of the rows that train, and of no others: those to predict keep theirs.

    Args:
        task: Data.
        seed: Seed of the run, which chooses the rows too.

    Returns:
        Data.
    """
    rows = split(task, samples=0, eval_samples=None, seed=seed).training
    labels = task.train.labels.copy()
    labels[rows] = np.random.default_rng([seed, 1]).permutation(labels[rows])
    return replace(task, train=replace(task.train, labels=labels))


def _simulated(group: _Group, classifier: Classifier, names: Sequence[Sequence[str]]) -> tuple[Outlook, ...]:
    plan, held = _survey(group, classifier)
    recipe = recipe_of(group.first.train, plan.train_rows, seed=group.first.train.seed)
    return outlooks(held, _starts(group, names, held), recipe)


def _areas(outlook: Outlook) -> dict[str, float]:
    """Areas under the simulated curves, divided by the steps."""
    course = outlook.course
    return {
        "simulated_train_area": float(np.mean(course.batch_loss)),
        "simulated_eval_area": float(np.trapezoid(course.eval_loss, course.steps)) / course.steps[-1],
    }


def _course(outlook: Outlook) -> dict[str, Any]:
    course = outlook.course
    return {
        "steps": course.steps,
        "eval_loss": course.eval_loss,
        "eval_accuracy": course.eval_accuracy,
        "batch_loss": [float(f"{loss:.4g}") for loss in course.batch_loss],
    }
