"""The finished cells of a study, from its store or from the CSV files of a report."""

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from foretune.errors import StoreError
from foretune.store import RESULT, read_json, write_whole
from foretune.study.early import early_quantities
from foretune.study.grid import Cell
from foretune.study.keys import cell_key
from foretune.study.quantities import HELD
from foretune.study.work import CELLS, OUTLOOKS, cell_folder
from foretune.tuning.curves import Step, running_mean, steps_to_reach

NAMES = ("model", "dataset", "placement", "r", "seed")
MEASURED = ("train_loss", "train_loss_eval_mode", "eval_loss", "accuracy", "matthews", "macro_f1")
AREAS = ("train_area", "eval_area")  # under the curves over the steps, divided by the steps
FACTS = ("train_rows", "eval_rows", "classes", "majority_accuracy", "head_parameters", "steps", "diverged")
SECONDS = ("load", "kernel", "spectrum", "forecast", "fine_tune", "evaluate", "survey", "simulate", "baselines")
CELLS_CSV, CURVES_CSV = "cells.csv", "curves.csv"
DIGITS = 6  # of a loss in curves.csv, and everywhere, so that a report from it is the same
Value = float | None


@dataclass(frozen=True)
class Record:
    """A finished cell.

    Attributes:
        key: Content key.
        model: Name of the model.
        dataset: Name of the data set.
        placement: Name of the placement.
        r: Rank.
        seed: Seed.
        quantities: Numbers at initialisation.
        outcomes: Numbers after training.
        facts: Rows, classes, parameters, steps.
        seconds: Time of each stage.
        steps: Training loss over steps.
        family: Name that versions of one data set share.
    """

    key: str
    model: str
    dataset: str
    placement: str
    r: int
    seed: int
    quantities: Mapping[str, Value]
    outcomes: Mapping[str, Value]
    facts: Mapping[str, Value]
    seconds: Mapping[str, Value]
    steps: tuple[Step, ...]
    family: str = ""

    def __post_init__(self) -> None:
        """Make a data set that is alone a family of its own."""
        object.__setattr__(self, "family", self.family or self.dataset)

    @property
    def group(self) -> tuple[str, str]:
        """Model and data set: placements are compared within one."""
        return self.model, self.dataset

    @property
    def kin(self) -> tuple[str, str]:
        """Model and family of the data set: what no two independent groups share."""
        return self.model, self.family

    @property
    def unit(self) -> tuple[str, str, str, int]:
        """All but the seed."""
        return self.model, self.dataset, self.placement, self.r


def read_records(folder: Path, cells: Sequence[Cell] | None = None) -> tuple[Record, ...]:
    """Read the finished cells of a study.

    Args:
        folder: A study's folder, or one with the `cells.csv` (and `curves.csv`) of a report.
        cells: Cells of a grid to take, by their content and under the grid's names; None takes all there are.

    Returns:
        Records, by data set, placement and seed, with the outcome `steps_to_loss` added.

    Raises:
        StoreError: If there are none, or two differ in their settings alone.
    """
    if (folder / CELLS).is_dir():
        if cells is None:
            paths = sorted(path for path in (folder / CELLS).iterdir() if path.suffix == "" and path.name[0] != ".")
            records = [_from_folder(path) for path in paths]
        else:
            named = [(cell_folder(folder, cell_key(cell)), cell) for cell in cells]
            records = [_from_folder(path, cell) for path, cell in named if path.is_dir()]
    elif (folder / CELLS_CSV).is_file():
        records = _from_csv(folder)
    else:
        raise StoreError(f"{str(folder)!r} holds no study: name the --output of foretune study")
    if not records:
        raise StoreError(f"study {str(folder)!r} holds no finished cell yet: run foretune study first")
    seen: dict[tuple[Any, ...], Record] = {}
    for record in records:
        name = (*record.unit, record.seed)
        if name in seen:
            raise StoreError(
                f"cells {seen[name].key} and {record.key} of {str(folder)!r} have the same names "
                f"({' · '.join(map(str, name))}) and other settings: choose with --grid GRID.yaml"
            )
        seen[name] = record
    ordered = sorted(
        records, key=lambda record: (record.model, record.dataset, record.placement, record.r, record.seed)
    )
    return _with_steps_to_loss(ordered)


def _from_folder(path: Path, cell: Cell | None = None) -> Record:
    held = read_json(path / RESULT)
    names: Mapping[str, Any] = held["names"] if cell is None else cell.names
    facts = {name: held["facts"][name] for name in FACTS}
    steps = _read_rows(path / "tune" / "steps.csv", _step)
    epochs = _read_rows(path / "tune" / "history.csv", _epoch)
    outlook = path.parent.parent / OUTLOOKS / f"{held['key']}.json"
    seen = read_json(outlook) if outlook.is_file() else {"quantities": {}, "seconds": {}}
    trained, simulated = int(facts["train_rows"]), seen.get("train_rows")
    if simulated not in (None, trained):  # versions before chose other rows where there is no evaluation split
        raise StoreError(
            f"cell {held['key']} was trained on {trained} rows and its outlook simulated on {simulated}: make the "
            f"outlook anew with foretune study outlook; if they still differ, delete {str(path)!r} and run the study"
        )
    quantities = {**held["quantities"], **seen["quantities"], **early_quantities(steps, epochs, int(facts["steps"]))}
    return Record(
        **{name: names[name] for name in NAMES},
        key=held["key"],
        quantities={name: quantities.get(name) for name in HELD},
        outcomes={name: held["outcomes"][name] for name in MEASURED} | _areas(steps, epochs),
        facts=facts,
        seconds={name: held["seconds"].get(name, seen["seconds"].get(name)) for name in SECONDS},
        steps=steps,
        family=held.get("family", "") if cell is None else cell.family,
    )


Row = TypeVar("Row")


def _read_rows(path: Path, read: Callable[[Mapping[str, str]], Row]) -> tuple[Row, ...]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return tuple(read(row) for row in csv.DictReader(file))
    except OSError as error:
        raise StoreError(f"cannot read {str(path)!r}: {error.strerror or error}") from error


def _step(row: Mapping[str, str]) -> Step:
    norm = row.get("grad_norm") or None
    return Step(
        int(row["step"]),
        float(f"{float(row['loss']):.{DIGITS}g}"),
        float(row.get("learning_rate") or "nan"),
        None if norm is None else float(norm),
        float(row.get("seconds") or "nan"),
    )


def _epoch(row: Mapping[str, str]) -> tuple[int, float, float]:
    # step, loss and accuracy on the evaluation rows
    return int(row["step"]), float(row["eval_loss"]), float(row["eval_accuracy"])


def _areas(steps: Sequence[Step], epochs: Sequence[tuple[int, float, float]]) -> dict[str, Value]:
    losses = [step.loss for step in steps]
    at, values = [step for step, _, _ in epochs], [loss for _, loss, _ in epochs]
    return {
        "train_area": float(np.mean(losses)) if losses else None,
        "eval_area": float(np.trapezoid(values, at)) / at[-1] if at and at[-1] else None,
    }


def _with_steps_to_loss(records: Sequence[Record]) -> tuple[Record, ...]:
    targets = target_losses(records)
    return tuple(
        replace(record, outcomes={**record.outcomes, "steps_to_loss": _steps_to(record, targets.get(record.group))})
        for record in records
    )


def _window(record: Record) -> int:
    return max(1, record.steps[-1].step // 20)


def _steps_to(record: Record, target: float | None) -> Value:
    if target is None or not record.steps:
        return None
    reached = steps_to_reach(record.steps, target, window=_window(record))
    return None if reached is None else float(reached)


def target_losses(records: Sequence[Record]) -> dict[tuple[str, str], float]:
    """Choose for each model and data set the training loss that all its runs reach.

    The loss is the mean over the last twentieth of all steps; the target is the largest over the runs of the least
    that each one reaches.

    Args:
        records: Cells.

    Returns:
        Target by group; groups with a run that reaches no finite loss are left out.
    """
    least: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        means = (
            [mean for mean in running_mean(record.steps, window=_window(record)) if mean is not None]
            if (record.steps)
            else []
        )
        finite = [mean for mean in means if math.isfinite(mean)]
        least[record.group].append(min(finite) if finite else math.nan)
    return {group: max(values) for group, values in least.items() if not any(map(math.isnan, values))}


def write_records(records: Sequence[Record], folder: Path) -> None:
    """Write `cells.csv`, one row for each cell, and `curves.csv`, the training losses over steps.

    Args:
        records: Cells.
        folder: Existing folder.
    """
    header = ["key", *NAMES, "family", *HELD, *MEASURED, *AREAS, *FACTS, *(f"seconds_{name}" for name in SECONDS)]

    def cells(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for record in records:
                names = [record.model, record.dataset, record.placement, record.r, record.seed, record.family]
                values = [record.quantities.get(name) for name in HELD]
                values += [record.outcomes.get(name) for name in (*MEASURED, *AREAS)]
                values += [record.facts[name] for name in FACTS]
                values += [record.seconds.get(name) for name in SECONDS]
                writer.writerow([record.key, *names, *(_written(value) for value in values)])

    def curves(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["key", "step", "loss"])
            writer.writerows(
                [record.key, step.step, f"{step.loss:.{DIGITS}g}"] for record in records for step in record.steps
            )

    write_whole(folder / CELLS_CSV, cells)
    write_whole(folder / CURVES_CSV, curves)


def _written(value: Value) -> str:
    if value is None:
        return ""
    return str(int(value)) if float(value).is_integer() else repr(value)


def _from_csv(folder: Path) -> list[Record]:
    curves: dict[str, list[Step]] = defaultdict(list)
    if (folder / CURVES_CSV).is_file():
        with (folder / CURVES_CSV).open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                curves[row["key"]].append(_step(row))
    try:
        with (folder / CELLS_CSV).open(newline="", encoding="utf-8") as file:
            return [_from_row(row, curves) for row in csv.DictReader(file)]
    except (KeyError, ValueError) as error:
        raise StoreError(f"{str(folder / CELLS_CSV)!r} is no table of cells: {error}") from error


def _from_row(row: Mapping[str, str], curves: Mapping[str, Sequence[Step]]) -> Record:
    def values(names: Iterable[str], prefix: str = "") -> dict[str, Value]:
        # a table of an earlier version lacks columns
        held = {name: row.get(prefix + name, "") for name in names}
        return {name: None if value == "" else float(value) for name, value in held.items()}

    return Record(
        row["key"],
        row["model"],
        row["dataset"],
        row["placement"],
        int(row["r"]),
        int(row["seed"]),
        quantities=values(HELD),
        outcomes=values((*MEASURED, *AREAS)),
        facts=values(FACTS),
        seconds=values(SECONDS, "seconds_"),
        steps=tuple(curves.get(row["key"], ())),
        family=row.get("family", ""),
    )
