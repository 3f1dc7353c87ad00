"""Run the cells of a study that are not finished."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from foretune.engines import choose_engine
from foretune.errors import ConfigError, StoreError
from foretune.report.store import RESULT, check_writable, read_json
from foretune.report.tables import Table
from foretune.settings.commands import EngineName
from foretune.study.cell import cell_folder, set_aside, stored_key
from foretune.study.grid import Cell
from foretune.study.jobs import CELL_WORK, Job
from foretune.study.progress import Progress
from foretune.study.stored import read_stored


@dataclass(frozen=True)
class Failures:
    """What went wrong in a run.

    Attributes:
        cells: Cells that failed.
        faults: Those among them that are no wrong input, but a fault of foretune or a library.
    """

    cells: int
    faults: int

    def settle(self, log: Console) -> int:
        """Say it and choose the exit code.

        Args:
            log: Where to.

        Returns:
            0 if nothing went wrong, 1 after a fault.

        Raises:
            ConfigError: If cells failed by wrong input alone.
        """
        if not self.cells:
            return 0
        message = f"{self.cells} cells failed, see above: the same command tries them again"
        if not self.faults:
            raise ConfigError(message)
        log.print(message, style="red")
        return 1


def run_cells(
    cells: Sequence[Cell],
    store: Path,
    *,
    workers: int,
    engine_name: EngineName,
    log: Console,
) -> Failures:
    """Run the cells that the store does not hold.

    Args:
        cells: The grid.
        store: Folder of the results.
        workers: Processes on this machine.
        engine_name: Who runs the cells.
        log: Where progress goes.

    Returns:
        How many cells failed.

    Raises:
        StoreError: If the disk refuses; finished cells are kept.
        KeyboardInterrupt: With what became of the work.
    """
    engine = choose_engine(engine_name, workers)
    check_writable(store)
    store = store.absolute()  # workers may have another working directory
    with log.status("looking at data and weights"):
        by_key = {stored_key(cell, store): _absolute(cell) for cell in cells}
    for key in by_key:
        damage = _damage(store, key)
        if damage is not None:
            log.print(f"{damage} (the damaged one is kept as {set_aside(store, key).name})", style="yellow")
    jobs = [Job(cell, key, store) for key, cell in by_key.items() if not cell_folder(store, key).is_dir()]
    done = len(by_key) - len(jobs)
    log.print(f"{len(by_key)} cells, {done} of them finished")
    failed = faults = 0
    try:
        with (
            Progress(log, list(by_key.values()), waiting=len(jobs), workers=workers) as progress,
            closing(engine(CELL_WORK, jobs, progress.show_status)) as reports,
        ):
            for report in reports:
                record = None if report.error else read_json(cell_folder(store, report.key) / RESULT)
                progress.add_finished(by_key[report.key], record, report.seconds, report.error)
                failed += report.error is not None
                faults += report.fault
                done += report.error is None
                if report.fatal:
                    raise StoreError(f"{report.error}; {done} finished cells are kept")
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"interrupted: {done} of {len(by_key)} cells are finished and kept, the same command goes on"
        ) from interrupt
    return Failures(failed, faults)


def _damage(store: Path, key: str) -> str | None:
    """What is wrong with a finished cell; None if nothing is, or it is not finished."""
    folder = cell_folder(store, key)
    if not folder.is_dir():
        return None
    try:
        read_stored(folder)
    except StoreError as error:
        return str(error)
    return None


def _absolute(cell: Cell) -> Cell:
    def path(source: str) -> str:
        local = Path(source).expanduser()
        return str(local.absolute()) if local.exists() else source

    model = replace(cell.model, model=path(cell.model.model))
    return replace(cell, model=model, data=replace(cell.data, dataset=path(cell.data.dataset)))


def list_cells(cells: Sequence[Cell], store: Path) -> Table:
    """List the cells of a grid and which of them are finished.

    Args:
        cells: The grid.
        store: Folder of the results; need not exist.

    Returns:
        A table with a row for each cell.
    """
    rows = []
    for cell in cells:
        key = stored_key(cell, store)
        state = "finished" if cell_folder(store, key).is_dir() else "to do"
        state = state if _damage(store, key) is None else "damaged"
        rows.append((key, *map(str, cell.names.values()), state))
    done = sum(row[-1] == "finished" for row in rows)
    header = ("key", "model", "data set", "placement", "r", "seed", "state")
    return Table(f"{len(rows)} cells, {done} of them finished.", header, tuple(rows), right_from=len(header))
