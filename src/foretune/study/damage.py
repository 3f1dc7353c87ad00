"""What a study's files must hold to be as foretune wrote them: a disk, an editor or a person may have changed them."""

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from foretune.errors import StoreError, reason, shown
from foretune.report.texts import printable

Value = float | None
Row = TypeVar("Row")


@contextmanager
def undamaged(what: str, remedy: str) -> Iterator[None]:
    """Say of whatever goes wrong that a file is not as foretune wrote it.

    Args:
        what: The file, or the cell that it belongs to.
        remedy: What to do about it.

    Yields:
        Nothing.

    Raises:
        StoreError: `what is damaged: reason; remedy`.
    """
    try:
        yield
    except Exception as error:  # each way of being damaged has its own
        lacks = f"lacks {error.args[0]!r}" if isinstance(error, KeyError) and error.args else reason(error)
        raise StoreError(f"{what} is damaged: {lacks}; {remedy}") from error


def same(value: Any, expected: Any, name: str) -> None:
    """Refuse a value that contradicts another.

    Args:
        value: Value.
        expected: What it must be.
        name: Its name.

    Raises:
        ValueError: If they differ.
    """
    if value != expected:
        raise ValueError(f"{name} is {shown(value)} instead of {shown(expected)}")


def integer(value: Any, name: str) -> int:
    """Take a whole number.

    Args:
        value: Value.
        name: Its name.

    Returns:
        The number.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}")
    return value


def text(value: Any, name: str) -> str:
    """Take a text.

    Args:
        value: Value.
        name: Its name.

    Returns:
        The text as it can be printed.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}")
    return printable(value)


def numbers(values: Mapping[str, Any], names: Iterable[str] | None = None) -> dict[str, Value]:
    """Take finite numbers by name; None stands for one that is not known.

    Args:
        values: Values by name.
        names: Which to take; None takes all.

    Returns:
        The numbers.

    Raises:
        ValueError: If one is something else.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"numbers by name are wanted, not {shown(values)}")
    taken = {name: values[name] for name in (values if names is None else names)}
    for name, value in taken.items():
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"{name} is {shown(value)}")
    return taken


def check_losses(losses: Sequence[tuple[int, float]], total: Value, diverged: bool, where: str) -> None:
    """Check that a run that did not diverge has finite losses up to its last step.

    Args:
        losses: Steps and losses.
        total: Steps of the run.
        diverged: Whether it diverged.
        where: Where the losses are from.

    Raises:
        ValueError: If there are none, some are missing at the end, or one is no number.
    """
    if not losses:
        raise ValueError(f"{where} is empty")
    if diverged:
        return
    same(losses[-1][0], total, f"last step of {where}")
    if not all(math.isfinite(loss) for _, loss in losses):
        raise ValueError(f"{where} holds a loss that is no number")


def read_rows(path: Path, read: Callable[[Mapping[str, str]], Row], needed: Iterable[str]) -> tuple[Row, ...]:
    """Read a CSV file that is whole.

    Args:
        path: File.
        read: Reads one row.
        needed: Columns that it must have.

    Returns:
        What it gives for each row.

    Raises:
        ValueError: If the file is cut off, lacks a column, or a row is not as long as the header.
    """
    content = path.read_text(encoding="utf-8-sig")
    table = csv.DictReader(StringIO(content, newline=""), strict=True)
    missing = [name for name in needed if name not in (table.fieldnames or ())]
    if missing:
        raise ValueError(f"{path.name} has no column {missing[0]!r}")
    if not content.endswith("\n"):
        raise ValueError(f"{path.name} is cut off")
    rows = []
    for row in table:
        if None in row or None in row.values():
            raise ValueError(f"a row of {path.name} has {'more' if None in row else 'fewer'} cells than the header")
        rows.append(read(row))
    return tuple(rows)
