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

from foretune.config import ScoreSettings
from foretune.data import Task, load_task
from foretune.forecasting.calibration import case_values
from foretune.forecasting.outlook import Outlook, outlooks
from foretune.forecasting.recipe import recipe_of
from foretune.forecasting.simulation import Start
from foretune.forecasting.survey import Survey, survey
from foretune.models import Classifier, load_model
from foretune.placement import adapted_names, lora_config
from foretune.plan import Plan, prepare
from foretune.store import finite, make_folder, read_json, write_json, write_whole
from foretune.study.grid import Cell
from foretune.study.keys import cell_key
from foretune.study.rivals import data_quantities, lazy_quantities, placement_quantities
from foretune.study.work import OUTLOOKS

SCHEMA = 1
POINTS = 6
OnNews = Callable[[str, int, int], None]


@dataclass(frozen=True)
class OutlookSettings:
    """How outlooks are made.

    Attributes:
        samples: Labelled training examples, at most: fewer where there are fewer.
        eval_samples: Labelled evaluation examples, at most.
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
            (cell_key(cell), cell)
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
    held = read_json(path)
    return held.get("schema") == SCHEMA and held.get("settings") == asdict(settings)


def _records(group: _Group) -> list[dict[str, Any]]:
    clock = time.perf_counter()
    classifier = _load(group)
    plan, held = _survey(group, classifier)
    seconds = {"survey": time.perf_counter() - clock}
    starts = _starts(group, classifier, held)
    recipe = recipe_of(group.first.train, len(group.task.train.labels))
    clock = time.perf_counter()
    alone, *found = outlooks(held, [held.start([]), *starts], recipe, points=POINTS)
    seconds["simulate"] = time.perf_counter() - clock
    clock = time.perf_counter()
    shared = data_quantities(held, seed=group.first.train.seed)
    shared["head_alone_accuracy"] = alone.end.eval_accuracy
    own = placement_quantities(plan, held, starts)
    seconds["baselines"] = time.perf_counter() - clock
    if group.settings.comparisons:
        for values, more in zip(own, _comparisons(group, classifier, held, starts), strict=True):
            values.update(more)
    each = {name: value / len(starts) for name, value in seconds.items()}
    return [
        {
            "quantities": {**case_values(outlook), **_areas(outlook), **shared, **values},
            "course": _course(outlook),
            "output": plan.reduction.name,
            "samples": outlook.samples,
            "train_rows": outlook.train_rows,
            "seconds": each,
        }
        for outlook, values in zip(found, own, strict=True)
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
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = False
        module._is_hf_initialized = False
        model._init_weights(module)


def _survey(group: _Group, classifier: Classifier, *, probe: bool = True) -> tuple[Plan, Survey]:
    first, task = group.first, group.task
    adapter = replace(
        first.adapter, target_modules=("all-linear",), layers=None, r=max(cell.adapter.r for cell in group.cells)
    )
    score = ScoreSettings(
        samples=min(group.settings.samples, len(task.train.labels)),
        eval_samples=group.settings.eval_samples,
        draws=1,
        reduction="margin" if task.n_classes == 2 else "full",
        max_length=first.train.max_length,
        batch_size=first.train.batch_size,
        seed=first.train.seed,
    )
    plan = prepare(classifier, task, lora_config(classifier.model, adapter), score)
    return plan, survey(plan, probe=probe, autocast=torch.bfloat16 if first.train.bf16 else None)


def _starts(group: _Group, classifier: Classifier, held: Survey) -> list[Start]:
    places = {site.name: index for index, site in enumerate(held.sites)}
    starts = []
    for cell in group.cells:
        names = adapted_names(classifier.model, lora_config(classifier.model, cell.adapter))
        known = [places[name] for name in names if name in places]  # no output depends on the others
        starts.append(held.start(known, cell.adapter.r))
    return starts


def _comparisons(group: _Group, classifier: Classifier, held: Survey, starts: list[Start]) -> list[dict[str, Any]]:
    """The same simulation with one thing changed at a time."""
    recipe = recipe_of(group.first.train, len(group.task.train.labels))
    lazy = outlooks(held, starts, recipe, train_a=False)
    kernels = lazy_quantities(held, starts)
    _, at_random_head = _survey(group, classifier, probe=False)
    random_head = outlooks(at_random_head, _starts(group, classifier, at_random_head), recipe)
    del at_random_head
    labels = np.random.default_rng([group.first.train.seed, 1]).permutation(group.task.train.labels)
    task = replace(group.task, train=replace(group.task.train, labels=labels))
    permuted = _simulated(replace(group, task=task), classifier)
    random = _simulated(group, _load(group, backbone=group.first.train.seed))
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


def _simulated(group: _Group, classifier: Classifier) -> tuple[Outlook, ...]:
    _, held = _survey(group, classifier)
    recipe = recipe_of(group.first.train, len(group.task.train.labels))
    return outlooks(held, _starts(group, classifier, held), recipe)


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
