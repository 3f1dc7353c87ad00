"""The finished cells of a study, from its store or from the CSV files of a report."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from foretune.errors import StoreError
from foretune.evaluation.early_stop import RunLog
from foretune.evaluation.predictors import QUANTITIES, predictors_of, quantities_of
from foretune.evaluation.variants import VARIANTS_CSV, read_simulations, variants_from, variants_table
from foretune.report.curves import Step, running_mean, steps_to_reach
from foretune.report.store import Writer
from foretune.report.tables import Table
from foretune.report.texts import from_spreadsheet, printable
from foretune.study.cell import CELLS, cell_folder, stored_key
from foretune.study.damage import Value, check_losses, numbers, read_rows, same, undamaged
from foretune.study.grid import Cell
from foretune.study.stored import (
    DIGITS,
    FACTS,
    MEASURED,
    NAMES,
    RECIPE,
    UPDATE_RATE,
    kind_of,
    measured,
    read_stored,
    step_of,
    with_present_names,
)
from foretune.tasks.metrics import METRICS, Kind

AREAS = ("train_area", "eval_area")  # under the curves over the steps, divided by the steps
SECONDS = (
    "load",
    "kernel",
    "spectrum",
    "kernel_regression",
    "fine_tune",
    "evaluate",
    "survey",
    "simulate",
    "baselines",
)
CELLS_CSV, CURVES_CSV = "cells.csv", "curves.csv"


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
        quantities: Numbers known before training, by the names of `QUANTITIES`.
        outcomes: Numbers after training.
        facts: Rows, classes, parameters, steps.
        seconds: Time of each stage.
        steps: Training loss over steps.
        family: Name that versions of one data set share.
        kind: Kind of its task.
        variants: Of simulations from other numbers of known rows, what a calibration takes.
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
    kind: Kind = "classification"
    variants: tuple[Mapping[str, Value], ...] = ()

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
        named: Iterable[tuple[Path, Cell | None]]
        if cells is None:
            paths = sorted((folder / CELLS).iterdir())
            named = [(path, None) for path in paths if path.suffix == "" and path.name[0] != "."]
        else:
            named = [(cell_folder(folder, stored_key(cell, folder)), cell) for cell in cells]
        records = _whole_records([(path, cell) for path, cell in named if path.is_dir()])
    elif (folder / CELLS_CSV).is_file():
        records = _from_csv(folder)
    else:
        raise StoreError(f"{str(folder)!r} holds no study: name the --output of foretune study")
    if not records:
        raise StoreError(f"study {str(folder)!r} holds no finished cell yet: run foretune study first")
    by_name: dict[tuple[Any, ...], Record] = {}
    for record in records:
        name = (*record.unit, record.seed)
        if name in by_name:
            raise StoreError(
                f"cells {by_name[name].key} and {record.key} of {str(folder)!r} have the same names "
                f"({' · '.join(map(str, name))}) and other settings: choose with --grid GRID.yaml"
            )
        by_name[name] = record
    ordered = sorted(
        records, key=lambda record: (record.model, record.dataset, record.placement, record.r, record.seed)
    )
    return _with_steps_to_loss(ordered)


def _whole_records(named: Sequence[tuple[Path, Cell | None]]) -> list[Record]:
    """Read cells; a report that passes over damaged ones would be of another study."""
    records, damaged = [], []
    for path, cell in named:
        try:
            records.append(read_cell(path, cell))
        except StoreError as error:
            damaged.append(error)
    if damaged:
        more = "" if len(damaged) == 1 else f" ({len(damaged)} cells are damaged)"
        raise StoreError(f"{damaged[0]}{more}") from damaged[0]
    return records


def read_cell(path: Path, cell: Cell | None = None) -> Record:
    """Read a finished cell.

    Args:
        path: Its folder.
        cell: The cell, whose names are taken; None takes those in the folder.

    Returns:
        The record, without `steps_to_loss`.

    Raises:
        StoreError: Naming the cell or its simulation if a file is missing, cut off or not as foretune writes it.
    """
    stored = read_stored(path)
    simulated, seconds, variants = read_simulations(path, stored.facts["train_rows"])
    log = RunLog(stored.steps, stored.epochs, int(stored.facts["steps"] or 0))
    from_log = {entry.name: entry.from_log(log) for entry in predictors_of(stored.kind) if entry.from_log is not None}
    quantities = {**stored.quantities, **simulated, **from_log}
    return Record(
        **(stored.names if cell is None else cell.names),  # type: ignore[arg-type]
        key=stored.key,
        quantities={name: quantities.get(name) for name in QUANTITIES},
        outcomes={**dict.fromkeys(MEASURED), **stored.outcomes, **_areas(stored.steps, stored.epochs)},
        facts=stored.facts,
        seconds={name: stored.seconds.get(name, seconds.get(name)) for name in SECONDS},
        steps=stored.steps,
        family=stored.family if cell is None else cell.family,
        kind=stored.kind,
        variants=variants,
    )


def _curve_row(row: Mapping[str, str]) -> tuple[str, Step]:
    return printable(from_spreadsheet(row["key"])), step_of(row)


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
        means = running_mean(record.steps, window=_window(record)) if record.steps else []
        finite = [mean for mean in means if mean is not None and math.isfinite(mean)]
        least[record.group].append(min(finite) if finite else math.nan)
    return {group: max(values) for group, values in least.items() if not any(map(math.isnan, values))}


def by_kind(records: Sequence[Record]) -> dict[Kind, list[Record]]:
    """Part cells of different kinds of task: neither their metrics nor their losses are comparable.

    Args:
        records: Cells.

    Returns:
        Cells of each kind that there is.
    """
    parts = {kind: [record for record in records if record.kind == kind] for kind in METRICS}
    return {kind: part for kind, part in parts.items() if part}


def record_writers(records: Sequence[Record]) -> dict[str, Writer]:
    """Lay out `cells.csv`, one row for each cell, and `curves.csv`, the training losses over steps.

    And `simulations.csv`, where cells were simulated from other numbers of known rows too.

    A metric that a cell's kind of task does not have is left blank; columns of kinds that no cell is of are left out.

    Args:
        records: Cells.

    Returns:
        A writer for each file.
    """
    writers: dict[str, Writer] = {
        CELLS_CSV: _cells_table(records).write_csv,
        CURVES_CSV: _curves_table(records).write_csv,
    }
    variants = variants_table([(record.key, record.variants) for record in records])
    return {**writers, VARIANTS_CSV: variants.write_csv} if variants.rows else writers


def _cells_table(records: Sequence[Record]) -> Table:
    kinds: set[Kind] = {"classification", *(record.kind for record in records)}
    present = [name for name in MEASURED if any(name in measured(kind) for kind in kinds)]
    outcomes, several = (*present, *AREAS), len(kinds) > 1
    words = ("key", *NAMES, "family", *(["task"] if several else []))
    quantities = [name for name in QUANTITIES if any(name in quantities_of(kind) for kind in kinds)]
    header = (*words, *quantities, *outcomes, *FACTS, *RECIPE, UPDATE_RATE, *(f"seconds_{name}" for name in SECONDS))
    rows = []
    for record in records:
        values = [record.quantities.get(name) for name in quantities]
        values += [record.outcomes.get(name) for name in outcomes]
        values += [record.facts.get(name) for name in (*FACTS, *RECIPE, UPDATE_RATE)]
        values += [record.seconds.get(name) for name in SECONDS]
        names = (record.key, record.model, record.dataset, record.placement, str(record.r), str(record.seed))
        rows.append((*names, record.family, *([record.kind] if several else []), *map(_written, values)))
    return Table("Cells.", header, tuple(rows))


def _curves_table(records: Sequence[Record]) -> Table:
    rows = [(record.key, str(step.step), f"{step.loss:.{DIGITS}g}") for record in records for step in record.steps]
    return Table("Training losses over steps.", ("key", "step", "loss"), tuple(rows))


def _written(value: Value) -> str:
    if value is None:
        return ""
    return str(int(value)) if float(value).is_integer() else repr(value)


def _from_csv(folder: Path) -> list[Record]:
    again = "take the files of a report, or the folder of the study itself"
    curves: dict[str, list[Step]] = defaultdict(list)
    if (folder / CURVES_CSV).is_file():
        with undamaged(f"table {str(folder / CURVES_CSV)!r}", again):
            for key, step in read_rows(folder / CURVES_CSV, _curve_row, ("key", "step", "loss")):
                curves[key].append(step)
    variants: Mapping[str, tuple[Mapping[str, Value], ...]] = {}
    if (folder / VARIANTS_CSV).is_file():
        with undamaged(f"table {str(folder / VARIANTS_CSV)!r}", again):
            variants = variants_from(folder / VARIANTS_CSV)
    with undamaged(f"table {str(folder / CELLS_CSV)!r}", again):
        needed = ("key", *NAMES, *measured("classification"), *FACTS)
        records = list(read_rows(folder / CELLS_CSV, lambda row: _from_row(row, curves, variants), needed))
        keys = [record.key for record in records]
        same(len(set(keys)), len(keys), "number of different keys")
    with undamaged(f"table {str(folder / CURVES_CSV)!r}", again):
        for record in records:
            if record.steps:
                losses = [(step.step, step.loss) for step in record.steps]
                check_losses(losses, record.facts["steps"], bool(record.facts["diverged"]), f"cell {record.key}")
    return records


def _from_row(
    row: Mapping[str, str],
    curves: Mapping[str, Sequence[Step]],
    variants: Mapping[str, tuple[Mapping[str, Value], ...]],
) -> Record:
    row = with_present_names(row)

    def values(names: Iterable[str], prefix: str = "") -> dict[str, Value]:
        # a table of an earlier version lacks columns
        cells = {name: row.get(prefix + name, "") for name in names}
        return numbers({name: None if value == "" else float(value) for name, value in cells.items()})

    words = {name: printable(from_spreadsheet(row[name])) for name in ("key", "model", "dataset", "placement")}
    return Record(
        **words,
        r=int(row["r"]),
        seed=int(row["seed"]),
        quantities=values(QUANTITIES),
        outcomes=values((*MEASURED, *AREAS)),
        facts=values((*FACTS, *RECIPE, UPDATE_RATE)),
        seconds=values(SECONDS, "seconds_"),
        steps=tuple(curves.get(words["key"], ())),
        family=printable(from_spreadsheet(row.get("family", ""))),
        kind=kind_of(row.get("task")),
        variants=variants.get(words["key"], ()),
    )
