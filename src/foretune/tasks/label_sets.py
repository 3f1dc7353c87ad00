"""Several labels for each text: lists of labels, zeros and ones, or labels joined in one text."""

import ast
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretune.errors import DataError, border, few, shown
from foretune.readers.table import Place, Split, is_missing
from foretune.tasks.labels import HIDDEN, LabelMap, label_map, read_labels
from foretune.tasks.multi_label import MultiLabel
from foretune.tasks.numbers import read_lists

_LOG = logging.getLogger(__name__)
SEPARATORS = "|;,"  # the first of these that a column holds separates its labels
_FLAGS: Mapping[Any, float] = {0: 0.0, 1: 1.0, "0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}


@dataclass(frozen=True)
class _ListPlace(Place):
    """A column of lists, of which each entry counts as a cell of the row that it stands in."""

    rows: tuple[int, ...] = ()

    def cell(self, index: int) -> str:
        """Name the row of an entry."""
        return super().cell(self.rows[index])

    def row(self, index: int) -> str:
        """Name the row of an entry with all around it."""
        return super().row(self.rows[index])


@dataclass(frozen=True)
class SetCoding:
    """A column that holds the labels of each text, in a list or joined.

    Attributes:
        column: Label column.
        labels: All labels, from the training split.
        objective: What is predicted.
        lists_of: Makes lists of the cells, as the training split has them.
    """

    column: str
    labels: LabelMap
    objective: MultiLabel
    lists_of: Callable[[Sequence[Any], Place], list[Sequence[Any]]]

    def read(self, split: Split) -> NDArray[np.float64]:
        """Read the label column of a split.

        Args:
            split: Split.

        Returns:
            n × C zeros and ones.

        Raises:
            DataError: If a list is missing, or holds a label twice or one that training has not.
        """
        place = split.place(self.column)
        lists = self.lists_of(split.values(self.column), place)
        entries, where = _flat(lists, place)
        names = split.table.class_names(self.column)
        columns = read_labels(entries, self.labels, place=where, names=names) if entries else np.array([], np.int64)
        targets = np.zeros((len(lists), len(self.labels.names)))
        for entry, (row, column) in enumerate(zip(where.rows, columns, strict=True)):
            if targets[row, column]:
                raise DataError(f"label {shown(entries[entry])} stands twice in {place.row(row)}: name each once")
            targets[row, column] = 1.0
        return targets


@dataclass(frozen=True)
class FlagCoding:
    """Zeros and ones: a column for each label, or a list of one for each.

    Attributes:
        columns: Label columns.
        objective: What is predicted.
        in_lists: Whether the one column holds a list for each text.
    """

    columns: tuple[str, ...]
    objective: MultiLabel
    in_lists: bool

    def read(self, split: Split) -> NDArray[np.float64]:
        """Read the label columns of a split.

        Args:
            split: Split.

        Returns:
            n × C zeros and ones.

        Raises:
            DataError: If a cell is missing or something else, or a list is shorter or longer than those of training.
        """
        if self.in_lists:
            return read_lists(split, self.columns[0], _flag, width=len(self.objective.names))
        columns = []
        for column in self.columns:
            place = split.place(column)
            columns.append([_flag(value, row, place) for row, value in enumerate(split.values(column))])
        return np.column_stack([np.array(column, dtype=np.float64) for column in columns])


def is_flag(value: Any) -> bool:
    """Tell a cell that says whether a label is there.

    Args:
        value: Cell.

    Returns:
        Whether it is 0 or 1, or true or false, also as a text.
    """
    return _as_flag(value) is not None


def _as_flag(value: Any) -> float | None:
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower())
    return _FLAGS.get(value) if isinstance(value, int | float) else None


def flag_coding(train: Split, columns: tuple[str, ...]) -> FlagCoding:
    """Take label columns for labels that are there (1) or not (0).

    Args:
        train: Training split.
        columns: Label columns; one may hold lists.

    Returns:
        How they are read.

    Raises:
        DataError: If a cell is neither, a column is 0 everywhere, or no label tells texts apart.
    """
    first = train.values(columns[0])[0]
    in_lists = len(columns) == 1 and isinstance(first, list | tuple)
    names = tuple(map(str, range(len(first)))) if in_lists else columns
    coding = FlagCoding(columns, MultiLabel(names), in_lists)
    targets = coding.read(train)
    never = [name for name, there in zip(names, targets.max(0), strict=True) if not there]
    if never and not in_lists:
        raise DataError(
            f"column {shown(never[0])} of split {shown(train.name)} is 0 in every row: leave it out of --label-column"
        )
    _check_occurrence(targets, names, train.place(columns[0]))
    return coding


def set_coding(train: Split, column: str) -> SetCoding:
    """Take a label column for sets of labels.

    Strings are split at the first of `|`, `;` and `,` that the column holds; cells that all are lists as JSON or Python
    writes them are read as such.

    Args:
        train: Training split.
        column: Label column.

    Returns:
        How it is read.

    Raises:
        DataError: If a cell is none, or no label tells texts apart.
    """
    values, place, names = train.values(column), train.place(column), train.table.class_names(column)
    lists_of = _reader_of(values)
    entries, where = _flat(lists_of(values, place), place)
    labels = label_map(entries, place=where, names=names, least=1)
    coding = SetCoding(column, labels, MultiLabel(labels.names), lists_of)
    _check_occurrence(coding.read(train), labels.names, place)
    return coding


def _check_occurrence(targets: NDArray[np.float64], names: Sequence[str], place: Place) -> None:
    share = targets.mean(0)
    if not ((share > 0) & (share < 1)).any():
        raise DataError(f"{place} tells no texts apart: every label is there in all rows, or in none")
    for word, those in (("no", share == 0), ("every", share == 1)):
        if those.any():
            which = few([name for name, one in zip(names, those, strict=True) if one])
            _LOG.warning("%s: %s row has the label %s: nothing is learnt of it", place, word, which)


def _flag(value: Any, row: int, place: Place) -> float:
    flag = _as_flag(value)
    if flag is not None:
        return flag
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        raise DataError(f"label in {place.row(row)} is missing: drop the row")
    words = f"label {shown(value)} in {place.row(row)}"
    if value == HIDDEN or (isinstance(value, str) and value.strip() == str(HIDDEN)):
        raise DataError(f"{words} is neither 0 nor 1: hidden labels? drop these rows, or use another split")
    raise DataError(f"{words} is neither 0 nor 1: mend it, or set --task regression if these are numbers")


def _flat(lists: Sequence[Sequence[Any]], place: Place) -> tuple[list[Any], _ListPlace]:
    rows = tuple(row for row, entries in enumerate(lists) for _ in entries)
    return [entry for entries in lists for entry in entries], _ListPlace(place.split, place.column, place.files, rows)


def _reader_of(values: Sequence[Any]) -> Callable[[Sequence[Any], Place], list[Sequence[Any]]]:
    if any(isinstance(value, list | tuple) for value in values):
        return _lists
    texts = [value.strip() for value in values if isinstance(value, str) and value.strip()]
    if texts and all(text.startswith("[") and text.endswith("]") for text in texts):
        return _spelled
    separator = next((mark for mark in SEPARATORS if any(mark in text for text in texts)), None)
    return lambda cells, place: [_split(cell, row, place, separator) for row, cell in enumerate(cells)]


def _lists(values: Sequence[Any], place: Place) -> list[Sequence[Any]]:
    for row, value in enumerate(values):
        if is_missing(value):
            raise DataError(f"label in {place.row(row)} is missing: drop the row, or write [] for no label")
        if not isinstance(value, list | tuple):
            raise DataError(f"{place} mixes lists and single values, first in {place.cell(row)}: make all of one kind")
    return list(values)


def _spelled(values: Sequence[Any], place: Place) -> list[Sequence[Any]]:
    """Lists as JSON or Python writes them, in the cells of a text file."""
    lists = []
    for row, value in enumerate(values):
        text = value.strip() if isinstance(value, str) else value
        what = f"label {shown(value)} in {place.row(row)} is no list"
        with border(DataError, what, remedy="mend it"), warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of a backslash in a label
            lists.append([] if text == "" else ast.literal_eval(text))
    return _lists(lists, place)


def _split(value: Any, row: int, place: Place, separator: str | None) -> Sequence[Any]:
    if is_missing(value):
        raise DataError(f"label in {place.row(row)} is missing: drop the row, or leave the text empty for no label")
    if not isinstance(value, str):
        return [value]
    if not value.strip():
        return []
    parts = [part.strip() for part in value.split(separator)] if separator else [value.strip()]
    if not all(parts):
        raise DataError(f"labels {shown(value)} in {place.row(row)} hold an empty one: mend the separators")
    return parts
