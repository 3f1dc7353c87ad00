"""A finished cell as it lies on the disk: read whole, or named as damaged."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

from foretune.errors import shown
from foretune.forecasting.schedule import schedule_of
from foretune.report.curves import Step
from foretune.report.store import RESULT, read_json
from foretune.settings.groups import RUN_SETTINGS, Recipe, Scheduler
from foretune.study.damage import Value, check_losses, integer, numbers, read_rows, same, text, undamaged
from foretune.tasks.metrics import METRICS, Kind, main_metric

T = TypeVar("T")
NAMES = ("model", "dataset", "placement", "r", "seed")
LOSSES = ("train_loss", "train_loss_eval_mode", "eval_loss")
# Losses and the metrics of every kind of task; a cell has those of its own.
MEASURED = (*LOSSES, *dict.fromkeys(metric.name for metrics in METRICS.values() for metric in metrics))
FACTS = ("train_rows", "eval_rows", "classes", "majority_accuracy", "head_parameters", "steps", "diverged")
# Of the settings, a scheduler as its place among `Scheduler`; the tables of earlier versions lack them.
RECIPE = RUN_SETTINGS
UPDATE_RATE = "update_rate"  # mean learning rate times s·r
DIGITS = 6  # of a loss, so that a report from its CSV files is the same
# What earlier versions called numbers that cells of theirs hold: kernel regression was a forecast too.
FORMER_NAMES = {
    "forecast_train_loss": "kernel_regression_train_loss",
    "forecast_eval_loss": "kernel_regression_eval_loss",
    "forecast_eval_accuracy": "kernel_regression_eval_accuracy",
    "seconds_forecast": "seconds_kernel_regression",
}


@dataclass(frozen=True)
class StoredCell:
    """What the files of a finished cell say.

    Attributes:
        key: Content key.
        names: Model, data set, placement, rank and seed.
        family: Name that versions of one data set share; empty where the grid gave none.
        kind: Kind of its task.
        facts: Rows, classes, parameters, steps, and what `RECIPE` names.
        outcomes: Numbers after training.
        quantities: Numbers at initialisation.
        seconds: Time of each stage.
        steps: Training loss over steps.
        epochs: Step, loss and main metric on the evaluation rows after each epoch.
    """

    key: str
    names: Mapping[str, str | int]
    family: str
    kind: Kind
    facts: Mapping[str, Value]
    outcomes: Mapping[str, Value]
    quantities: Mapping[str, Value]
    seconds: Mapping[str, Value]
    steps: tuple[Step, ...]
    epochs: tuple[tuple[int, float, float], ...]


def measured(kind: Kind) -> tuple[str, ...]:
    """Name the outcomes of a cell.

    Args:
        kind: Kind of its task.

    Returns:
        Losses and metrics.
    """
    return (*LOSSES, *(metric.name for metric in METRICS[kind]))


def kind_of(word: Any) -> Kind:
    """Take the kind of a task; files of earlier versions have none, for there were classes alone.

    Args:
        word: What the file says, None or empty for nothing.

    Returns:
        The kind.

    Raises:
        ValueError: If it is none.
    """
    kind = next((kind for kind in METRICS if kind == (word or "classification")), None)
    if kind is None:
        raise ValueError(f"task is {shown(word)}")
    return kind


def read_stored(path: Path) -> StoredCell:
    """Read the files of a finished cell.

    Args:
        path: Its folder.

    Returns:
        What they say.

    Raises:
        StoreError: Naming the cell if one of its files is missing, cut off or holds what foretune does not write.
    """
    store = path.parent.parent
    with undamaged(f"cell {path.name} of {str(store)!r}", "the same foretune study command computes it again"):
        result = read_json(path / RESULT)
        same(result["key"], path.name, "key")
        facts, kind = numbers(result["facts"], FACTS), kind_of(result.get("task"))
        settings = result.get("settings", {})
        facts = {**facts, **_recipe(settings.get("train", {})), UPDATE_RATE: _update_rate(settings, facts)}
        main = f"eval_{main_metric(kind).name}"
        stored = StoredCell(
            path.name,
            _names(result["names"]),
            text(result.get("family", ""), "family"),
            kind,
            facts,
            numbers(result["outcomes"], measured(kind)),
            with_present_names(numbers(result["quantities"])),
            with_present_names(numbers(result["seconds"]), prefix="seconds_"),
            tuple(read_rows(path / "tune" / "steps.csv", step_of, ("step", "loss"))),
            tuple(read_rows(path / "tune" / "history.csv", partial(_epoch, main), ("step", "eval_loss", main))),
        )
        total, diverged = facts["steps"], bool(facts["diverged"])
        check_losses([(step.step, step.loss) for step in stored.steps], total, diverged, "steps.csv")
        check_losses([(step, loss) for step, loss, _ in stored.epochs], total, diverged, "history.csv")
    return stored


def _update_rate(settings: Mapping[str, Any], facts: Mapping[str, Value]) -> float | None:
    """Mean learning rate times s·r, as `reach.Run` has it."""
    train, adapter, rows = settings.get("train"), settings.get("adapter"), facts["train_rows"]
    if train is None or adapter is None or rows is None:
        return None
    recipe = Recipe(**{field.name: train[field.name] for field in fields(Recipe)})
    rates = schedule_of(recipe, int(rows), seed=0).rates()
    return float(rates.mean() * adapter["alpha"] * (adapter["r"] ** 0.5 if adapter["rslora"] else 1.0))


def _recipe(settings: Mapping[str, Any]) -> dict[str, Value]:
    scheduler = settings.get("scheduler")
    place = None if scheduler is None else get_args(Scheduler).index(scheduler)
    return numbers({name: settings.get(name) for name in RECIPE} | {"scheduler": place})


def with_present_names(stored: Mapping[str, T], *, prefix: str = "") -> dict[str, T]:
    """Give numbers that an earlier version stored the names that they have now.

    Args:
        stored: Values by name.
        prefix: What stands before the names in `cells.csv`.

    Returns:
        The same values; one that is there under its present name too keeps that.
    """
    present = {name: FORMER_NAMES.get(prefix + name, prefix + name).removeprefix(prefix) for name in stored}
    return {
        present[name]: value for name, value in stored.items() if present[name] == name or present[name] not in stored
    }


def _names(stored: Mapping[str, Any]) -> dict[str, str | int]:
    return {name: integer(stored[name], name) if name in ("r", "seed") else text(stored[name], name) for name in NAMES}


def step_of(row: Mapping[str, str]) -> Step:
    """Read one step of a training run.

    Args:
        row: Row of `steps.csv`, or of a report's `curves.csv`, which has step and loss alone.

    Returns:
        The step, its loss to six digits.
    """
    norm = row.get("grad_norm") or None
    return Step(
        int(row["step"]),
        float(f"{float(row['loss']):.{DIGITS}g}"),
        float(row.get("learning_rate") or "nan"),
        None if norm is None else float(norm),
        float(row.get("seconds") or "nan"),
    )


def _epoch(main: str, row: Mapping[str, str]) -> tuple[int, float, float]:
    # step, loss and main metric on the evaluation rows
    return int(row["step"]), float(row["eval_loss"]), float(row[main])
