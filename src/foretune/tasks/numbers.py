"""Labels that are numbers: columns of one each, or a column of lists."""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretune.errors import DataError, few, shown
from foretune.readers.table import Place, Split, is_missing, is_number, number
from foretune.tasks.labels import HIDDEN, hidden, leading_number
from foretune.tasks.regression import Regression

_LOG = logging.getLogger(__name__)
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_COMMA = re.compile(r"[+-]?\d*,\d+", re.ASCII)
_NO_NUMBER = ("", "nan", "inf", "+inf", "-inf", "infinity", "-infinity")  # what stands where a number lacks
_LARGEST = float(np.finfo(np.float32).max)  # models are trained on targets in single precision


def is_fraction(value: Any) -> bool:
    """Tell a number that is not whole.

    Args:
        value: Cell; text files spell their numbers.

    Returns:
        Whether it is one.
    """
    if isinstance(value, str):
        return _DECIMAL.fullmatch(value.strip()) is not None and math.isfinite(float(value)) and float(value) % 1 != 0
    return isinstance(value, float | Decimal) and math.isfinite(value) and value % 1 != 0


def may_be_number(value: Any) -> bool:
    """Tell what may stand in a column of numbers, also where one is missing.

    Args:
        value: Cell.

    Returns:
        Whether it is a number, says that there is none, or is empty.
    """
    if isinstance(value, str):
        return _DECIMAL.fullmatch(value.strip()) is not None or value.strip().lower() in _NO_NUMBER
    return value is None or (isinstance(value, int | float | Decimal) and not isinstance(value, bool))


@dataclass(frozen=True)
class NumberCoding:
    """Columns that are read as targets of a regression.

    Attributes:
        columns: Label columns.
        objective: What is regressed on.
        in_lists: Whether the one column holds a list for each text.
    """

    columns: tuple[str, ...]
    objective: Regression
    in_lists: bool

    def read(self, split: Split) -> NDArray[np.float64]:
        """Read the label columns of a split.

        Args:
            split: Split.

        Returns:
            n × C finite numbers.

        Raises:
            DataError: If one is missing or no number, or a list is shorter or longer than those of training.
        """
        if not self.in_lists:
            return np.column_stack([_column(split, column) for column in self.columns])
        return read_lists(split, self.columns[0], _number, width=len(self.objective.names))


def number_coding(train: Split, columns: tuple[str, ...]) -> NumberCoding:
    """Take label columns for numbers.

    Args:
        train: Training split.
        columns: Label columns.

    Returns:
        How they are read.

    Raises:
        DataError: If a value is no number, a column has one and the same everywhere, or −1 seems to hide labels.
    """
    first = train.values(columns[0])
    in_lists = len(columns) == 1 and any(isinstance(value, list | tuple) for value in first)
    names = columns
    if in_lists:
        width = next(len(value) for value in first if isinstance(value, list | tuple))
        names = tuple(str(index) for index in range(width))
        if not width:
            raise DataError(f"{train.place(columns[0])} holds empty lists: regression needs numbers")
    coding = NumberCoding(columns, Regression(names), in_lists)
    targets = coding.read(train)
    for index, name in enumerate(names):
        place, values = train.place(columns[0 if in_lists else index]), targets[:, index]
        which = f"{place}, entry {name}," if in_lists else str(place)
        if np.ptp(values) == 0:
            raise DataError(f"{which} is {values[0]:g} in every row: there is nothing to learn")
        _check_hidden(values, which, place)
    return coding


def _check_hidden(values: NDArray[np.float64], which: str, place: Place) -> None:
    negative = np.flatnonzero(values < 0)
    if not len(negative) or not (values[negative] == HIDDEN).all():
        return
    if values.max() > 1:
        raise DataError(
            f"label -1 in {place.row(int(negative[0]))} is the only negative number: hidden labels? drop these rows; "
            "if it is meant, add 1 to all labels"
        )
    if values.min() == HIDDEN and len(np.unique(values)) == 3:
        _LOG.warning("%s: -1 is taken for a number; if it marks rows without a label, drop them", which)


def read_lists(
    split: Split, column: str, read: Callable[[Any, int, Place], float], *, width: int
) -> NDArray[np.float64]:
    """Read a column of lists that are as long as each other.

    Args:
        split: Split.
        column: Column.
        read: Takes an entry, its row and the place of the column for messages.
        width: Length of each list.

    Returns:
        n × width numbers.
    """
    values, place = split.values(column), split.place(column)
    rows = _same_length(values, place, width=width)
    numbers = [[read(value, row, place) for value in cells] for row, cells in enumerate(rows)]
    return np.array(numbers, dtype=np.float64).reshape(len(rows), width)


def _same_length(values: Sequence[Any], place: Place, *, width: int) -> list[Sequence[Any]]:
    rows: list[Sequence[Any]] = []
    for row, value in enumerate(values):
        if is_missing(value):
            raise DataError(f"label in {place.row(row)} is missing: drop the row")
        if not isinstance(value, list | tuple):
            raise DataError(f"{place} mixes lists and single values, first in {place.cell(row)}: make all of one kind")
        if len(value) != width:
            raise DataError(
                f"label in {place.row(row)} is a list of {len(value)} numbers, that of the first row of training has "
                f"{width}: make them as long as each other"
            )
        rows.append(value)
    return rows


def _column(split: Split, column: str) -> NDArray[np.float64]:
    values, place, names = split.values(column), split.place(column), split.table.class_names(column)
    if names is None:
        return np.array([_number(value, row, place) for row, value in enumerate(values)], dtype=np.float64)
    return _of_names(values, place, names)


def _of_names(values: Sequence[Any], place: Place, names: Sequence[str]) -> NDArray[np.float64]:
    """Numbers that the names of classes begin with, such as `4 stars`."""
    by_code: Mapping[int, float | None] = {code: _of_name(name) for code, name in enumerate(names)}
    if None in by_code.values() or len(set(by_code.values())) < len(names):
        raise DataError(f"{place} holds classes that are called {few(names)}, no numbers: use --task classification")
    numbers = []
    for row, value in enumerate(values):
        if is_missing(value):
            raise DataError(f"label in {place.row(row)} is missing: drop the row")
        number = by_code.get(value)
        if number is None:
            raise DataError(hidden(value, row, place))
        numbers.append(number)
    return np.array(numbers, dtype=np.float64)


def _of_name(name: str) -> float | None:
    if is_number(name):
        return float(number(name))
    leading = leading_number(name)
    return None if leading is None else float(leading)


def _number(value: Any, row: int, place: Place) -> float:
    if is_missing(value):
        raise DataError(f"label in {place.row(row)} is missing: drop the row")
    if isinstance(value, str):
        text = value.strip()
        if not text:
            raise DataError(f"label in {place.row(row)} is empty: drop the row")
        if _DECIMAL.fullmatch(text) is None:
            raise DataError(f"label {shown(value)} in {place.row(row)} is no {_why_no_number(text)}")
        number = float(text)
    elif isinstance(value, list | tuple):
        raise DataError(f"{place} mixes lists and single values, first in {place.cell(row)}: make all of one kind")
    elif isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise DataError(
            f"{place} holds {type(value).__name__} values, no numbers, first in {place.cell(row)}: name another with "
            "--label-column, or set --task classification"
        )
    else:
        number = math.inf if isinstance(value, int) and abs(value) > _LARGEST else float(value)
    if not abs(number) <= _LARGEST:
        raise DataError(
            f"label {shown(value)} in {place.row(row)} is not finite in single precision: drop the row, or rescale"
        )
    return number


def _why_no_number(text: str) -> str:
    if text.lower() in _NO_NUMBER:
        return "finite number: drop the row"
    if _COMMA.fullmatch(text):
        return "number, for a comma separates its decimals: write a point"
    return "number: mend it, name another column with --label-column, or set --task classification"
