"""The terminal: one console for results, one for everything else, and a progress bar."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from foretune.config import AdapterConfig


def is_first_process() -> bool:
    """Tell whether this is the first of the processes that a launcher started.

    Returns:
        Whether it is the one that prints.
    """
    return os.environ.get("RANK", "0") == "0"


def console(*, stderr: bool = False) -> Console:
    """Make a console. Terminals have their own width; a file or a pipe gets room for the whole table.

    Args:
        stderr: Whether it is for messages rather than results.

    Returns:
        The console, silent in all processes but the first.
    """
    quiet = not is_first_process()
    made = Console(stderr=stderr, quiet=quiet)
    return made if made.is_terminal else Console(stderr=stderr, width=120, quiet=quiet)


@contextmanager
def progress(log: Console, title: str, total: int | None) -> Iterator[Any]:
    """Show a progress bar with the time left.

    Args:
        log: Where to.
        title: What is counted.
        total: How many there are, None if that is not known yet.

    Yields:
        Rich's `update` of the bar.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=log, transient=True) as bar:
        task = bar.add_task(title, total=total, note="")

        def update(*, advance: int = 0, completed: int | None = None, total: int | None = None, note: str = "") -> None:
            bar.update(task, advance=advance or None, completed=completed, total=total, note=note)

        yield update


def print_facts(log: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Print facts, one in a line.

    Args:
        log: Where to.
        rows: Name and value; an empty name goes on with the fact above.
    """
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, Text(value))
    log.print(grid)


def placement_in_words(adapter: AdapterConfig) -> str:
    """Describe an adapter as it was asked for.

    Args:
        adapter: Settings.

    Returns:
        Modules, layers, rank, α and initialisation.
    """
    modules = "peft's default modules" if adapter.target_modules is None else ", ".join(adapter.target_modules)
    layers = "all layers" if adapter.layers is None else f"layers {', '.join(map(str, adapter.layers))}"
    return f"{modules} of {layers}, r = {adapter.r}, α = {adapter.alpha:g}, init {adapter.init}"
