"""What every reader gives: columns of one split, and words for the place of a cell in it."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from foretune.errors import DataError, few, shown

# A number as text files have it; 007 is a code.
_NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d*)?([eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"[+-]?\d{1,300}", re.ASCII)


def is_number(text: str) -> bool:
    """Tell whether a text spells a number, as csv files hold them.

    Args:
        text: Cell.

    Returns:
        Whether it does.
    """
    return _NUMBER.fullmatch(text.strip()) is not None


def number(text: str) -> int | float:
    """Read a number.

    Args:
        text: What `is_number` holds for.

    Returns:
        An integer where the number is one, however it is spelled.
    """
    if _WHOLE.fullmatch(text.strip()):
        return int(text)  # exact: a float would merge long ids
    value = float(text)
    return int(value) if value.is_integer() else value


def is_missing(value: Any) -> bool:
    """Tell whether a cell holds nothing.

    Args:
        value: Cell.

    Returns:
        Whether it is null or NaN.
    """
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_unicode(text: str) -> bool:
    """Tell whether a text can be written down: JSON may hold half of a surrogate pair.

    Args:
        text: Cell.

    Returns:
        Whether UTF-8 has it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def named(path: Path) -> str:
    """Write a path for a message.

    Args:
        path: File or folder.

    Returns:
        In quotes, the end of it where it is very long.
    """
    text = str(path)
    return repr(text) if len(text) <= 120 else repr("…" + text[-120:])


@dataclass(frozen=True)
class Place:
    """A column of a split, for messages.

    Attributes:
        split: Name of the split.
        column: Name of the column.
        files: Name and number of rows of each file that the split was read from; none for data from memory.
    """

    split: str
    column: str
    files: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return self._in(few((name for name, _ in self.files), most=2))

    def _in(self, files: str) -> str:
        return f"column {shown(self.column)} of split {shown(self.split)}" + (f" ({files})" if files else "")

    def _file(self, index: int) -> tuple[str, int]:
        before = 0
        for name, n_rows in self.files:
            if index < before + n_rows:
                return few([name]), index - before
            before += n_rows
        return "", index

    def cell(self, index: int) -> str:
        """Name a row.

        Args:
            index: Row in the split, from 0.

        Returns:
            The row, and its file if there is one: it counts in that file.
        """
        file, row = self._file(index)
        return f"row {row}" + (f" of {file}" if file else "")

    def row(self, index: int) -> str:
        """Name a row with all around it.

        Args:
            index: Row in the split, from 0.

        Returns:
            Row, column, split and file; of several files the row in its own.
        """
        file, row = self._file(index)
        return f"row {row} of {self._in(file)}"


class Table(ABC):
    """Columns of one split.

    Attributes:
        names: Column names.
        n_rows: Number of rows.
        files: Name and number of rows of each file; empty for data from memory.
        where_names_stand: What to say where a column is not found.
    """

    where_names_stand = ""
    names: tuple[str, ...]
    n_rows: int
    files: tuple[tuple[str, int], ...] = ()

    @abstractmethod
    def values(self, name: str, first: int | None = None) -> list[Any]:
        """Read a column.

        Args:
            name: Its name.
            first: How many rows from the top, None for all.

        Returns:
            Cells as they were written: a number of a text file is the text that spells it.
        """

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """Names of the classes that the numbers of a column, or of its lists, stand for.

        Args:
            name: Name of the column.

        Returns:
            The names by number; None where the column states none.
        """
        return None


class RowTable(Table):
    """Rows of cells, as in csv files."""

    where_names_stand = "; the first line (header) must name the columns"

    def __init__(self, path: Path, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.names, self.n_rows, self.files = tuple(names), len(rows), ((path.name, len(rows)),)
        self._rows = rows
        self._at = {name: index for index, name in enumerate(self.names)}

    def values(self, name: str, first: int | None = None) -> list[Any]:
        """Read a column."""
        at = self._at[name]
        return [row[at] for row in self._rows[:first]]


class RecordTable(Table):
    """Records with names, as in json files; what a record does not name is null."""

    def __init__(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        self.names = tuple(dict.fromkeys(name for record in records for name in record))
        self.n_rows, self.files = len(records), ((path.name, len(records)),)
        self._records = records

    def values(self, name: str, first: int | None = None) -> list[Any]:
        """Read a column."""
        return [record.get(name) for record in self._records[:first]]


class JoinedTable(Table):
    """The files of one split, one after the other."""

    def __init__(self, tables: Sequence[Table]) -> None:
        first = tables[0]
        for table in tables[1:]:
            # a record need not name every column
            if not isinstance(table, RecordTable) and set(table.names) != set(first.names):
                columns = f"{few(first.names)} in {first.files[0][0]}, {few(table.names)} in {table.files[0][0]}"
                raise DataError(f"the files of one split have different columns: {columns}; make them the same")
        self.names = tuple(dict.fromkeys(name for table in tables for name in table.names))
        self.n_rows = sum(table.n_rows for table in tables)
        self.files = tuple(file for table in tables for file in table.files)
        self.where_names_stand = first.where_names_stand
        self._tables = tables

    def values(self, name: str, first: int | None = None) -> list[Any]:
        """Read a column."""
        cells: list[Any] = []
        for table in self._tables:
            cells += table.values(name, None if first is None else max(0, first - len(cells)))
        return cells

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """Names of the classes, which the files must have in common.

        Returns:
            The names by number; None where the files state none.

        Raises:
            DataError: If they differ.
        """
        stated = [table.class_names(name) for table in self._tables]
        other = next((index for index, names in enumerate(stated) if names != stated[0]), None)
        if other is not None:
            files = f"{self._tables[0].files[0][0]} and {self._tables[other].files[0][0]}"
            raise DataError(f"column {shown(name)} has other class names in {files}: write the labels as words")
        return stated[0]


@dataclass(frozen=True)
class Split:
    """A split and what it was read from.

    Attributes:
        name: Name of the split.
        table: Its columns.
    """

    name: str
    table: Table

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.table.names)

    def place(self, column: str) -> Place:
        """Name a column of it.

        Args:
            column: Name of the column.

        Returns:
            Its place.
        """
        return Place(self.name, column, self.table.files)

    def has(self, column: str) -> bool:
        """Tell whether it has a column.

        Args:
            column: Name of the column.

        Returns:
            Whether it does.
        """
        return column in self._names

    def values(self, column: str) -> list[Any]:
        """Read a column.

        Args:
            column: Name of the column.

        Returns:
            Its cells.

        Raises:
            DataError: If there is no such column.
        """
        if not self.has(column):
            names = few(self.table.names)
            raise DataError(f"column {shown(column)} does not exist in split {self.name!r}: it has {names}; rename it")
        return self.table.values(column)
