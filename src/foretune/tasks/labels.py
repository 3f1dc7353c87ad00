"""Labels: which classes a column holds, and the class of each row."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretune.errors import DataError, few, shown
from foretune.readers.table import Place, Split, is_missing, is_number, is_unicode, number
from foretune.tasks.classification import Classification

_LOG = logging.getLogger(__name__)
_LEADING_NUMBER = re.compile(r"\s*-?\d+")
# More classes than this, on more than half of the rows, is a column of something else.
_MANY = 50
_NAME_ANOTHER = "name a label column"
HIDDEN = -1  # what GLUE and others write where the label is kept secret


@dataclass(frozen=True)
class LabelMap:
    """The classes of a label column.

    Attributes:
        values: Value of each class in the column, in the order of the classes.
        names: Name of each class.
        stated: Whether the data set states the names, so that the values are numbers of classes and mean nothing else.
    """

    values: tuple[Any, ...]
    names: tuple[str, ...]
    stated: bool = False


def label_map(values: Sequence[Any], *, place: Place, names: Sequence[str] | None = None, least: int = 2) -> LabelMap:
    """Find the classes of a label column: class labels of `datasets`, integers, booleans or strings.

    Integers need not be consecutive and may be negative; classes are in the order of their values. Strings that all
    spell numbers are numbers, since csv files have nothing else. More than 50 classes on more than half of the rows
    are refused.

    Args:
        values: The column in the training split.
        place: Where it stands, for messages.
        names: Class names that the data set states; None reads them off the values.
        least: Classes that there must be, 1 or 2.

    Returns:
        The classes.

    Raises:
        DataError: If a value is no class, or all rows are of one.
    """
    if all(value is None or (isinstance(value, str) and is_number(value)) for value in values):
        values = [None if value is None else number(value) for value in values]
    for row, value in enumerate(values):
        _check_label(value, row, place)
    distinct = set(map(_plain, values))
    if len({isinstance(value, str) for value in distinct}) > 1 or len(set(map(_is_boolean, values))) > 1:
        kinds = "booleans and others" if any(map(_is_boolean, values)) else "numbers and strings"
        raise DataError(f"{place} mixes {kinds}: make all labels of one kind")
    if names is not None:
        for row, value in enumerate(values):
            if not 0 <= value < len(names):
                raise DataError(hidden(value, row, place) if value < 0 else _unknown(value, row, place, names))
    if len(distinct) < least:
        if not distinct:
            raise DataError(f"{place} holds no label in any row: name another with --label-column")
        raise DataError(f"{place} holds a single class, {_single(distinct)}: a classifier needs two")
    if names is not None:
        return LabelMap(tuple(range(len(names))), tuple(names), stated=True)
    if len(distinct) > _MANY and len(distinct) > len(values) / 2:
        numeric = not any(isinstance(value, str) for value in distinct)
        remedy = "set --task regression if they are numbers, or name a label column" if numeric else _NAME_ANOTHER
        raise DataError(f"{place} has {len(distinct)} distinct values in {len(values)} rows: {remedy}")
    ordered = tuple(sorted(distinct))
    if all(isinstance(value, bool) for value in values):
        return LabelMap(ordered, tuple(str(bool(value)) for value in ordered))
    if len(ordered) > 3 and ordered == tuple(range(HIDDEN, len(ordered) + HIDDEN)):
        # -1 beside 0, 1, 2, …, as SNLI has it; -1, 0, 1 and -2 … 2 are opinions
        raise DataError(hidden(HIDDEN, [*map(_plain, values)].index(HIDDEN), place))
    if ordered == (HIDDEN, 0, 1):
        _LOG.warning("%s: -1 is taken for a class; if it marks rows without a label, drop them", place)
    return LabelMap(ordered, tuple(map(str, ordered)))


def _single(distinct: set[int | str]) -> str:
    return shown(next(iter(distinct), None))


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool)


def hidden(value: Any, row: int, place: Place) -> str:
    """Say that a label is none, as where they are kept secret.

    Args:
        value: Label.
        row: Its row.
        place: Its column.

    Returns:
        Message with a remedy.
    """
    return (
        f"label {shown(value)} in {place.row(row)} is no class: hidden labels? drop these rows, use another split, "
        "or write the classes as words"
    )


def _unknown(value: Any, row: int, place: Place, names: Sequence[str]) -> str:
    return (
        f"label {shown(value)} in {place.row(row)} is no class: they are {few(names)}; drop the row or mend its label"
    )


def two_classes(classes: LabelMap, positive_from: int) -> tuple[tuple[str, str], NDArray[np.int64]]:
    """Make two classes of numbered ones: `positive_from` and above is class 1, below it class 0.

    The numbers are those that the class names begin with: `1 star` … `5 stars`, or 1 … 5. With 3 that is how the
    paper makes Yelp's reviews binary.

    Args:
        classes: From `label_map`.
        positive_from: Least number of class 1.

    Returns:
        Names of the two classes, and the new class of each old one.

    Raises:
        DataError: If a name begins with no number, or one of the two classes would be empty.
    """
    numbers = []
    for name in classes.names:
        leading = leading_number(name)
        if leading is None:
            raise DataError(f"positive_from = {positive_from}: class {shown(name)} does not begin with a number")
        numbers.append(leading)
    merged = (np.array(numbers) >= positive_from).astype(np.int64)
    if len(set(merged.tolist())) < 2:
        raise DataError(f"positive_from = {positive_from} leaves one class of {few(classes.names)}: move it")
    return (f"below {positive_from}", f"{positive_from} and above"), merged


def leading_number(name: str) -> int | None:
    """Read the number that a name begins with.

    Args:
        name: Such as `4 stars`.

    Returns:
        The number; None where it begins with none.
    """
    match = _LEADING_NUMBER.match(name)
    return None if match is None else int(match[0])


def _plain(value: Any) -> int | str:
    return value.strip() if isinstance(value, str) else int(value)


def _check_label(value: Any, row: int, place: Place) -> None:
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"label in {place.row(row)} is empty: drop the row")
        if not value.isascii() and not is_unicode(value):
            raise DataError(f"label {shown(value)} in {place.row(row)} holds half of a surrogate pair: mend it")
    elif is_missing(value):
        raise DataError(f"label in {place.row(row)} is missing: drop the row")
    elif not isinstance(value, int | float):
        kind = type(value).__name__
        raise DataError(
            f"{place} holds {kind} values, no labels, first in {place.cell(row)}: name another with --label-column"
        )
    elif isinstance(value, float) and not value.is_integer():
        raise DataError(f"label {value!r} in {place.row(row)} is no class: for numbers set --task regression")


def without_labels(values: Sequence[Any]) -> bool:
    """Tell whether a label column says nothing: all of it missing, blank, -1 or lists of these, as if kept secret.

    Args:
        values: The column.

    Returns:
        Whether it does.
    """

    def is_nothing(value: Any) -> bool:
        if isinstance(value, str):
            return not value.strip() or value.strip() in ("-1", "-1.0")
        if isinstance(value, list | tuple):
            return all(map(is_nothing, value))
        return is_missing(value) or (not isinstance(value, bool) and value == HIDDEN)

    return all(map(is_nothing, values))


def read_labels(
    values: Sequence[Any], classes: LabelMap, *, place: Place, names: Sequence[str] | None = None
) -> NDArray[np.int64]:
    """Number the labels by class: names by name, whatever numbers stand for them.

    Args:
        values: Label column.
        classes: From the training split.
        place: Where it stands, for messages.
        names: Class names that this split states for its numbers.

    Returns:
        Integers from 0 to C - 1.

    Raises:
        DataError: If a value is none of the classes.
    """
    if names is not None:
        return _of_names(values, classes, place, names)
    numbers = _numbers(values, classes, place)
    by_name = _by_name(classes.names)
    numeric = isinstance(classes.values[0], int)
    labels = np.empty(len(values), dtype=np.int64)
    for row, value in enumerate(values):
        _check_label(value, row, place)
        plain = _plain(value)
        index = None if isinstance(plain, str) and classes.stated else numbers.get(plain)
        if index is None:
            index = next((by_name[word] for word in _spellings(value) if word in by_name), None)
        if index is None and numeric and isinstance(plain, str) and is_number(plain):
            of_text = number(plain)
            if isinstance(of_text, float):
                _check_label(of_text, row, place)
            index = numbers.get(of_text)
        if index is None:
            secret = plain in (HIDDEN, str(HIDDEN))
            raise DataError(hidden(value, row, place) if secret else _unknown(value, row, place, classes.names))
        labels[row] = index
    return labels


def _by_name(names: Sequence[str]) -> dict[str, int]:
    return {name.strip(): index for index, name in enumerate(names)}


def _spellings(value: Any) -> tuple[str, ...]:
    """How a value may be written as a name: a boolean as Python does, or as JSON."""
    if isinstance(value, bool):
        return str(value), str(value).lower(), str(value).upper()
    plain = str(_plain(value))
    return (plain, plain.capitalize()) if plain in ("true", "false", "TRUE", "FALSE") else (plain,)


def _numbers(values: Sequence[Any], classes: LabelMap, place: Place) -> Mapping[Any, int]:
    """Class by value. Of stated classes the values are numbers of classes, if their names are no numbers themselves."""
    numbers = {value: index for index, value in enumerate(classes.values)}
    if not classes.stated:
        return numbers
    numeric = [not isinstance(value, str) or is_number(value) for value in values]
    named = {number(name): index for index, name in enumerate(classes.names) if is_number(name)}
    if not any(numeric) or all(value == index for value, index in named.items()):
        if all(numeric) and not named:
            _LOG.warning("labels of %s are numbers, those of training have names: taken in the order of names", place)
        return numbers
    raise DataError(
        f"labels of {place} are numbers, and the classes of training are called {few(classes.names)}: "
        "whether 1 is a name or a position cannot be told; give both splits the same names"
    )


def _of_names(values: Sequence[Any], classes: LabelMap, place: Place, names: Sequence[str]) -> NDArray[np.int64]:
    by_name = _by_name(classes.names)
    index_of = [by_name.get(name.strip()) for name in names]
    codes = tuple(range(len(names)))
    if not classes.stated and classes.values == codes and not any(name in by_name or is_number(name) for name in names):
        _LOG.warning("labels of %s have names, those of training are numbers: taken in the order of names", place)
        index_of = list(codes)
    labels = np.empty(len(values), dtype=np.int64)
    for row, value in enumerate(values):
        _check_label(value, row, place)
        if not 0 <= value < len(names):
            raise DataError(hidden(value, row, place) if value < 0 else _unknown(value, row, place, names))
        index = index_of[int(value)]
        if index is None:
            raise DataError(_unknown(names[int(value)], row, place, classes.names))
        labels[row] = index
    return labels


@dataclass(frozen=True)
class ClassCoding:
    """A column that is read as classes.

    Attributes:
        column: Label column.
        classes: From the training split.
        objective: What is classified, by the classes or the two that were made of them.
        merged: Class of the objective of each class of the column.
    """

    column: str
    classes: LabelMap
    objective: Classification
    merged: NDArray[np.int64]

    def read(self, split: Split) -> NDArray[np.int64]:
        """Read the label column of a split.

        Args:
            split: Split.

        Returns:
            n integers from 0 to C - 1.
        """
        values, names = split.values(self.column), split.table.class_names(self.column)
        return np.asarray(self.merged[read_labels(values, self.classes, place=split.place(self.column), names=names)])


def class_coding(train: Split, column: str, *, positive_from: int | None) -> ClassCoding:
    """Take a label column for classes.

    Args:
        train: Training split.
        column: Label column.
        positive_from: As `two_classes`; None keeps the classes as they are.

    Returns:
        How it is read.
    """
    names = train.table.class_names(column)
    classes = label_map(train.values(column), place=train.place(column), names=names)
    if positive_from is None:
        return ClassCoding(column, classes, Classification(classes.names), np.arange(len(classes.names)))
    two, merged = two_classes(classes, positive_from)
    return ClassCoding(column, classes, Classification(two), merged)
