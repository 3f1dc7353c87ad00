"""Progress of a study on the terminal: a table of cells, and the time left."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from foretune.study.grid import Cell
from foretune.study.stored import kind_of
from foretune.tasks.metrics import main_metric

SHOWN = 12
HEADER = ("model", "data set", "placement", "r", "seed", "κ", "kernel regression", "outcome", "time")


class Progress:
    """Shows what is done. On a terminal a table is kept up to date; elsewhere each finished cell gives a line."""

    def __init__(self, log: Console, cells: Sequence[Cell], *, waiting: int, workers: int) -> None:
        self._log = log
        self._n_cells, self._waiting, self._workers = len(cells), waiting, workers
        self._rows: list[list[str]] = []
        self._seconds: list[float] = []
        self._start = time.perf_counter()
        self._status = ""
        self._live = Live(console=log, get_renderable=self._draw, refresh_per_second=2, transient=False)

    def __enter__(self) -> "Progress":
        """Start to draw, on a terminal."""
        if self._log.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop to draw."""
        if self._log.is_terminal:
            self._live.stop()

    def show_status(self, words: str) -> None:
        """Say what is done now.

        Args:
            words: In a word or two.
        """
        self._status = words

    def add_finished(self, cell: Cell, record: dict[str, Any] | None, seconds: float, error: str | None) -> None:
        """Enter a cell that has ended.

        Args:
            cell: Cell.
            record: Its numbers, None if it failed.
            seconds: Time that it took.
            error: What went wrong, None if nothing did.
        """
        self._waiting -= 1
        self._seconds.append(seconds)
        row = [*map(str, cell.names.values())]
        if record is None:
            row += ["failed", "", "", f"{seconds:.0f} s"]
        else:
            metric = main_metric(kind_of(record.get("task")))
            predicted = record["quantities"][f"kernel_regression_eval_{metric.name}"]
            row += [
                f"{record['quantities']['condition_number']:.4g}",
                metric.written(predicted),
                f"{metric.label} {metric.written(record['outcomes'][metric.name])}",
                f"{seconds:.0f} s",
            ]
        self._rows.append(row)
        if not self._log.is_terminal:
            self._log.print(Text(f"{' · '.join(row)} · {self._left()}"), soft_wrap=True)
        if error is not None:
            self._log.print(Text(f"failed: {' · '.join(map(str, cell.names.values()))}: {error}"), style="red")

    def _left(self) -> str:
        done = self._n_cells - self._waiting
        if not self._waiting:
            return f"{done} of {self._n_cells} cells"
        if not self._seconds:
            return (
                f"{done} of {self._n_cells} cells, {self._status}"
                if self._status
                else f"{done} of {self._n_cells} cells"
            )
        left = sum(self._seconds) / len(self._seconds) * self._waiting / self._workers
        hours, minutes = divmod(round(left / 60), 60)
        return f"{done} of {self._n_cells} cells, about {hours}:{minutes:02d} h left" + (
            f", {self._status}" if self._status and self._log.is_terminal else ""
        )

    def _draw(self) -> Group:
        table = Table(show_edge=False, pad_edge=False)
        for name in HEADER:
            table.add_column(name, no_wrap=True)
        for row in self._rows[-SHOWN:]:
            table.add_row(*row)
        return Group(table, Text(self._left(), style="bold"))
