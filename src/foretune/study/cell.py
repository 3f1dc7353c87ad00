"""One cell from beginning to end: score, fine-tune, store. What is finished is never done again."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from foretune.errors import StoreError, border
from foretune.models.classifier import load_model
from foretune.models.placement import lora_config
from foretune.problem import prepare
from foretune.report.store import RESULT, finite, read_json, write_json, write_whole
from foretune.scoring.files import save_score
from foretune.scoring.score import run_score
from foretune.settings.commands import Configuration
from foretune.study.grid import Cell
from foretune.study.keys import cell_key, former_key
from foretune.study.stored import LOSSES, kind_of
from foretune.tasks.load import load_task
from foretune.tasks.metrics import METRICS, Kind, main_metric
from foretune.training.fit import Hooks
from foretune.training.folder import CONFIG, claim, close_folder, open_folder, write_history
from foretune.training.plan import prepare_tune
from foretune.training.tune import run_tune

SCHEMA = 1
CELLS = "cells"
SIMULATIONS = "outlooks"  # as foretune study outlook names them
USUAL_SAMPLES = 512  # known rows of a simulation that is named after its cell alone
_PART, _DAMAGED = ".part", ".damaged"
OnStatus = Callable[[str], None]


def cell_folder(store: Path, key: str) -> Path:
    """Say where a finished cell lies.

    Args:
        store: Folder of the study.
        key: Key of the cell.

    Returns:
        Folder; it exists once the cell is finished, and then never changes.
    """
    return store / CELLS / key


def simulation_file(store: Path, key: str, samples: int) -> Path:
    """Say where the simulation of a cell lies.

    Args:
        store: Folder of the study.
        key: Key of the cell.
        samples: Known rows that were asked for.

    Returns:
        The file.
    """
    return store / SIMULATIONS / (f"{key}.json" if samples == USUAL_SAMPLES else f"{key}-{samples}.json")


def stored_key(cell: Cell, store: Path) -> str:
    """Say under which key a store keeps a cell.

    Args:
        cell: Cell.
        store: Folder of the study; need not exist.

    Returns:
        The former key where the store has the cell or its simulation from then, finished or begun; else today's.
    """
    key, former = cell_key(cell), former_key(cell)
    if former is None or cell_folder(store, key).is_dir():
        return key
    final = cell_folder(store, former)
    places = (final, final.with_name(former + _PART), store / SIMULATIONS / f"{former}.json")
    return former if any(place.exists() for place in places) else key


def run_cell(cell: Cell, key: str, store: Path, *, on_status: OnStatus | None = None) -> None:
    """Score and fine-tune a cell, unless it is there already.

    The cell is worked on in `KEY.part`, which is renamed when all is written. A cell that was cut off keeps its
    score and its last whole epoch. Two processes that want the same cell take turns, by a lock that dies with them.

    Args:
        cell: Cell.
        key: Its key.
        store: Folder of the study.
        on_status: Called with a word on what is done now.

    Raises:
        StoreError: If the disk refuses.
    """
    final = cell_folder(store, key)
    part = final.with_name(key + _PART)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with _turn(final):
            if final.is_dir():
                return
            if part.is_symlink():  # what it leads to is not ours
                part.unlink()
            part.mkdir(exist_ok=True)
            _sweep(part)
            _run_stages(cell, key, part, on_status or (lambda _: None))
            part.rename(final)
    except OSError as error:
        raise StoreError(f"cannot write cell {key} to {str(store)!r}: {error.strerror or error}") from error


def _turn(final: Path) -> FileLock:
    """Lock of a cell, which dies with its process."""
    lock = final.with_name(f".{final.name}.lock")
    for path in (final.parent, lock):
        if path.is_symlink():
            raise StoreError(f"{str(path)!r} is a link, which a study does not follow: remove it")
    return FileLock(lock)


def _sweep(part: Path) -> None:
    """Remove what a killed run was writing, and links: nobody else is at work here."""
    for path in part.iterdir():
        if path.is_symlink() or (path.name.startswith(".") and path.is_file()):
            path.unlink()
        elif path.name.startswith("."):
            shutil.rmtree(path)


def set_aside(store: Path, key: str) -> Path:
    """Move a damaged cell out of the way, so that it is computed again.

    Args:
        store: Folder of the study.
        key: Key of the cell.

    Returns:
        Where it is kept, until another one of the same cell takes its place.

    Raises:
        StoreError: If the disk refuses.
    """
    final = cell_folder(store, key)
    kept = final.with_name(key + _DAMAGED)
    with _turn(final), border(StoreError, f"cannot move the damaged cell {key} of {str(store)!r} out of the way"):
        if kept.is_symlink():
            kept.unlink()
        if final.exists():
            shutil.rmtree(kept, ignore_errors=True)
            final.replace(kept)
    return kept


def _finished(folder: Path) -> bool:
    """Whether a stage is done; what is left of a damaged one is removed."""
    if not (folder / RESULT).exists():
        return False
    try:
        read_json(folder / RESULT)
    except (StoreError, RecursionError):
        shutil.rmtree(folder)
        return False
    return True


def _run_stages(cell: Cell, key: str, part: Path, on_status: OnStatus) -> None:
    on_status("loading")
    start = time.perf_counter()
    task = load_task(cell.data)
    score_folder, tune_folder = part / "score", part / "tune"
    classifier = load_model(cell.model, task.objective, cell.score.seed)
    seconds_load = time.perf_counter() - start
    lora = lora_config(classifier.model, cell.adapter)
    if not _finished(score_folder):
        on_status("scoring")
        plan = prepare(classifier, task, lora, cell.score)  # on a copy: the model itself is trained below
        config = Configuration(cell.model, cell.data, cell.adapter, cell.score)
        save_score(run_score(plan), score_folder, config)
        del plan
    if not _finished(tune_folder):
        flags = Configuration(cell.model, cell.data, cell.adapter, cell.train).to_dict()
        if (tune_folder / CONFIG).exists():
            try:
                claim(tune_folder, flags)
            except StoreError:  # cut off when model or data lay elsewhere
                shutil.rmtree(tune_folder)
        open_folder(tune_folder, flags)
        tune_plan = prepare_tune(classifier, task, lora, cell.train, inplace=True)
        hooks = Hooks(
            on_step=lambda done, total, _: on_status(f"step {done} of {total}"),
            on_record=lambda history: write_history(history, tune_folder),
            on_note=on_status,
        )
        close_folder(run_tune(tune_plan, tune_folder, seconds_load=seconds_load, hooks=hooks), tune_folder)
    with border(StoreError, f"what was done of cell {key} is damaged", remedy=f"remove {str(part)!r}"):
        record = cell_record(cell, key, read_json(score_folder / RESULT), read_json(tune_folder / RESULT))
    write_whole(part / RESULT, lambda path: write_json(path, record))


def cell_record(cell: Cell, key: str, score: Mapping[str, Any], tune: Mapping[str, Any]) -> dict[str, Any]:
    """Put the numbers of a cell together.

    Args:
        cell: Cell.
        key: Its key.
        score: `result.json` of the score.
        tune: `result.json` of the fine-tune.

    Returns:
        JSON-ready values: names, settings, facts, quantities at initialisation, outcomes, seconds, versions.
    """
    groups = ("model", "data", "adapter", "score", "train")
    content = {
        "schema": SCHEMA,
        "key": key,
        "names": cell.names,
        "family": cell.family,
        "task": _kind(tune),
        "settings": {group: dataclasses.asdict(getattr(cell, group)) for group in groups},
        "facts": _facts(tune),
        "quantities": {
            **_quantities(score, main_metric(_kind(tune)).name),
            "adapter_parameters": tune["placement"]["trainable_parameters"],
        },
        "outcomes": {
            **{name: tune["final"][name] for name in LOSSES},
            **{metric.name: tune["final"][f"eval_{metric.name}"] for metric in METRICS[_kind(tune)]},
        },
        "seconds": {
            "load": tune["seconds"]["load"],
            "kernel": score["seconds"]["kernel"],
            "spectrum": score["seconds"]["spectrum"],
            "kernel_regression": _kernel_regression(score["seconds"]),
            "fine_tune": tune["seconds"]["train"],
            "evaluate": tune["seconds"]["evaluate"],
        },
        "versions": tune["versions"],
    }
    record: dict[str, Any] = finite(content)
    return record


def _kind(tune: Mapping[str, Any]) -> Kind:
    """Kind of the task; a fine-tune that an earlier version finished does not say it."""
    return kind_of(tune["details"]["data"].get("task"))


def _majority(data: Mapping[str, Any]) -> float | None:
    """Share of the most frequent class of the evaluation rows; None where there are no classes."""
    counts = data.get("eval_class_counts")
    return None if counts is None else max(counts) / data["eval_rows"]


def _kernel_regression(result: Mapping[str, Any]) -> Any:
    """What a score says of kernel regression; a score that an earlier version finished calls it a forecast."""
    return result["kernel_regression" if "kernel_regression" in result else "forecast"]


def _facts(tune: Mapping[str, Any]) -> dict[str, Any]:
    data = tune["details"]["data"]
    return {
        "train_rows": data["train_rows"],
        "eval_rows": data["eval_rows"],
        "classes": len(data["label_names"]),
        "majority_accuracy": _majority(data),
        "adapter_parameters": tune["placement"]["trainable_parameters"],
        "head_parameters": tune["placement"]["head_parameters"],
        "steps": tune["steps"],
        "diverged": tune["diverged"],
        "device": tune["device"],
    }


def _quantities(score: Mapping[str, Any], metric: str) -> dict[str, Any]:
    kernel, regression = score["kernel"], _kernel_regression(score)
    head = {} if score["head_kernel"] is None else _kernel_regression(score["head_kernel"])
    spread = score["spread"]["draws_of_a"]
    mean_kappa = None if spread is None else spread["condition_number"]
    return {
        "condition_number": kernel["condition_number"],
        "condition_number_mean": None if mean_kappa is None else mean_kappa["mean"],
        "condition_number_relative": kernel["condition_number_relative"],
        "lambda_max": kernel["lambda_max"],
        "lambda_min": kernel["lambda_min"],
        "trace": kernel["trace"],
        "effective_dimension": kernel["effective_dimension"],
        "alignment": kernel["alignment"],
        "empirical_risk": score["bounds"]["empirical_risk"],
        "kernel_regression_train_loss": regression["train_loss"],
        "kernel_regression_eval_loss": regression["eval_loss"],
        f"kernel_regression_eval_{metric}": regression[f"eval_{metric}"],
        "loo_mse": regression["loo_mse"],
        f"loo_{metric}": regression[f"loo_{metric}"],
        "head_eval_loss": head.get("eval_loss"),
        f"head_eval_{metric}": head.get(f"eval_{metric}"),
    }
