"""What was simulated for a cell: from the usual number of known rows, and beside it from others."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from foretune.errors import StoreError
from foretune.evaluation.predictors import calibrated
from foretune.forecasting.reach import RUN
from foretune.report.store import read_json
from foretune.report.tables import Table
from foretune.report.texts import from_spreadsheet, printable
from foretune.study.cell import SIMULATIONS, USUAL_SAMPLES, simulation_file
from foretune.study.damage import Value, numbers, read_rows, undamaged
from foretune.tasks.metrics import METRICS

VARIANTS_CSV = "simulations.csv"
NUMBERS = (*dict.fromkeys(name for kind in METRICS for name in calibrated(kind)), *RUN, "run_kind")
Values = Mapping[str, Value]


def read_simulations(cell: Path, trained: Value) -> tuple[Values, Values, tuple[Values, ...]]:
    """Read the simulations of a cell.

    Args:
        cell: Its folder.
        trained: Rows that it was trained on.

    Returns:
        Quantities and seconds of the one from the usual number of known rows, or else from the most; what a
        calibration takes of the others. Nothing where there are none.

    Raises:
        StoreError: Naming the file that is damaged, or of other rows than were trained.
    """
    store, key = cell.parent.parent, cell.name
    usual = simulation_file(store, key, USUAL_SAMPLES)
    others = sorted((store / SIMULATIONS).glob(f"{key}-*.json"), key=_samples, reverse=True)
    paths = [*([usual] if usual.is_file() else []), *others]
    if not paths:
        return {}, {}, ()
    (quantities, seconds), *rest = (_read(path, cell, trained) for path in paths)
    return quantities, seconds, tuple({name: values.get(name) for name in NUMBERS} for values, _ in rest)


def _samples(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isascii() and digits.isdecimal() else 0


def _read(path: Path, cell: Path, trained: Value) -> tuple[Values, Values]:
    with undamaged(f"simulation {str(path)!r}", "remove the file, and foretune study outlook makes it again"):
        content = read_json(path)
        quantities, seconds = numbers(content["quantities"]), numbers(content["seconds"])
        simulated = content.get("train_rows")
    if simulated not in (None, trained):  # versions before chose other rows where there is no evaluation split
        raise StoreError(
            f"cell {cell.name} was trained on {trained or 0:.0f} rows, its run simulated on {simulated}: simulate it "
            f"anew with foretune study outlook; if they still differ, delete {str(cell)!r} and run the study"
        )
    return quantities, seconds


def variants_table(variants: Sequence[tuple[str, Sequence[Values]]]) -> Table:
    """Lay out `simulations.csv`, one row for each simulation from another number of known rows.

    Args:
        variants: By the cell's key.

    Returns:
        The table.
    """
    rows = [
        (key, *("" if values.get(name) is None else repr(values[name]) for name in NUMBERS))
        for key, several in variants
        for values in several
    ]
    return Table("Simulations from other numbers of known rows.", ("key", *NUMBERS), tuple(rows))


def variants_from(path: Path) -> dict[str, tuple[Values, ...]]:
    """Read `simulations.csv`.

    Args:
        path: File.

    Returns:
        Simulations by the cell's key.
    """
    found: dict[str, list[Values]] = {}
    for key, values in read_rows(path, _variant, ("key",)):
        found.setdefault(key, []).append(values)
    return {key: tuple(several) for key, several in found.items()}


def _variant(row: Mapping[str, str]) -> tuple[str, Values]:
    cells = {name: row.get(name) or None for name in NUMBERS}
    return printable(from_spreadsheet(row["key"])), numbers(
        {name: None if value is None else float(value) for name, value in cells.items()}
    )
