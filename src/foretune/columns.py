"""Columns of a classification data set: which hold the texts and the labels, and what the labels mean."""

import csv
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretune.errors import DataError

_LOG = logging.getLogger(__name__)
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
TEXTS = (
    "text",
    "sentence",
    "content",
    "review",
    "review_text",
    "review_body",
    "comment",
    "document",
    "tweet",
    "utterance",
    "question",
    "body",
    "title",
)
LABELS = (
    "label",
    "labels",
    "target",
    "class",
    "category",
    "coarse_label",
    "label_text",
    "sentiment",
    "intent",
    "topic",
    "stars",
    "rating",
)
# A number as csv files have it; 007 is a code.
_NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d*)?([eE][+-]?\d+)?", re.ASCII)
_LEADING_NUMBER = re.compile(r"\s*-?\d+")
# More classes than this, on more than half of the rows, is a column of something else.
_MANY = 50


@dataclass(frozen=True)
class Columns:
    """Names of the columns in use.

    Attributes:
        text: One text column, or two for pairs.
        label: The label column.
    """

    text: tuple[str, ...]
    label: str


def find_columns(
    names: Sequence[str], strings: Sequence[str], *, text: Sequence[str] | None = None, label: str | None = None
) -> Columns:
    """Find text and label columns by the usual names, unless they are given.

    Args:
        names: All columns.
        strings: Those that hold strings.
        text: One or two text columns, None to find them.
        label: Label column, None to find it.

    Returns:
        The columns.

    Raises:
        DataError: If one is missing, with those that exist.
    """
    text = (text,) if isinstance(text, str) else text
    for given, flag in ((text or (), "--text-column"), ((label,) if label else (), "--label-column")):
        for name in given:
            if name not in names:
                raise DataError(_missing(name, names, flag))
    if text is not None and not 1 <= len(text) <= 2:
        raise DataError(f"{len(text)} text columns given: --text-column takes one, or two for pairs of texts")
    if text is not None and label in text:
        raise DataError(f"column {label!r} is named for the text and for the label: set --text-column, --label-column")
    lower = {name.lower(): name for name in reversed(names)}
    found_label = label or next(
        (lower[name] for name in LABELS if name in lower and lower[name] not in (text or ())), None
    )
    if found_label is None:
        raise DataError(f"no label column found among {', '.join(names)}: name it with --label-column")
    if text is not None:
        return Columns(tuple(text), found_label)
    lower.pop(found_label.lower(), None)
    for pair in PAIRS:
        if all(name in lower for name in pair):
            return Columns(tuple(lower[name] for name in pair), found_label)
    for name in TEXTS:
        if name in lower:
            return Columns((lower[name],), found_label)
    rest = [name for name in strings if name != found_label]
    if len(rest) == 1:
        _LOG.info("text column %r: the only one that holds text", rest[0])
        return Columns((rest[0],), found_label)
    raise DataError(f"no text column found among {', '.join(names)}: name it with --text-column")


def _missing(name: str, names: Sequence[str], flag: str) -> str:
    near = get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"column {name!r} does not exist{hint}: the data set has {', '.join(names)}; set {flag}"


def csv_header(paths: Sequence[Path], *, separator: str) -> list[str]:
    """Read the column names of csv files that belong together.

    Args:
        paths: Files.
        separator: What stands between columns.

    Returns:
        Column names; those without are called as pandas does.

    Raises:
        DataError: If a file has no rows or names a column twice, or the files' columns differ.
    """
    first: list[str] = []
    for path in paths:
        with path.open(encoding="utf-8-sig", newline="") as file:
            row = next(filter(None, csv.reader(file, delimiter=separator)), [])
            if not any(line.strip() for line in file):
                raise DataError(f"file {str(path)!r} has no rows")
        header = [name or f"Unnamed: {index}" for index, name in enumerate(row)]
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"file {str(path)!r} has two columns {twice!r}: rename one")
        first = first or header
        if set(header) != set(first):
            held = f"{', '.join(first)} in {paths[0].name}, {', '.join(header)} in {path.name}"
            raise DataError(f"the files of one split have different columns: {held}")
    return first


def read_texts(values: Sequence[Any], *, split: str, column: str) -> list[str]:
    """Read a text column.

    Args:
        values: Its values; what is no string is written out.
        split: Name of the split, for messages.
        column: Name of the column, for messages.

    Returns:
        Texts.

    Raises:
        DataError: If texts are missing or blank.
    """
    other = next((value for value in values if isinstance(value, list | dict | bytes)), None)
    if other is not None:
        raise DataError(f"column {column!r} of split {split!r} holds {type(other).__name__} values: set --text-column")
    texts = ["" if value is None else str(value) for value in values]
    empty = [row for row, text in enumerate(texts) if not text or text.isspace()]
    if empty:
        count = "1 empty text" if len(empty) == 1 else f"{len(empty)} empty texts"
        raise DataError(f"split {split!r} has {count} in column {column!r}, first in row {empty[0]}: drop these rows")
    return texts


@dataclass(frozen=True)
class LabelMap:
    """The classes of a label column.

    Attributes:
        values: Value of each class in the column, in the order of the classes.
        names: Name of each class.
    """

    values: tuple[Any, ...]
    names: tuple[str, ...]


def label_map(values: Sequence[Any], *, split: str, column: str, names: Sequence[str] | None = None) -> LabelMap:
    """Find the classes of a label column: class labels of `datasets`, integers from 0, booleans or strings.

    Integers need not be consecutive; classes are in the order of their values. Strings that all spell numbers are
    numbers, since csv files have nothing else. More than 50 classes on more than half of the rows are refused.

    Args:
        values: The column in the training split.
        split: Name of the split, for messages.
        column: Name of the column, for messages.
        names: Class names that the data set states; None reads them off the values.

    Returns:
        The classes.

    Raises:
        DataError: If a value is no class, or all rows are of one.
    """
    where = f"column {column!r} of split {split!r}"
    if all(value is None or (isinstance(value, str) and _is_number(value)) for value in values):
        values = [None if value is None else _number(value) for value in values]
    for row, value in enumerate(values):
        _check_label(value, row, where)
    distinct = set(map(_plain, values))
    if len({type(value) for value in distinct}) > 1:
        raise DataError(f"{where} mixes numbers and strings: make all labels of one kind")
    if len(distinct) < 2:
        raise DataError(f"{where} holds a single class, {next(iter(distinct), None)!r}: a classifier needs two")
    if names is not None:
        return LabelMap(tuple(range(len(names))), tuple(names))
    if len(distinct) > _MANY and len(distinct) > len(values) / 2:
        raise DataError(f"{where} has {len(distinct)} distinct values in {len(values)} rows: name a label column")
    ordered = tuple(sorted(distinct))
    if all(isinstance(value, bool) for value in values):
        return LabelMap(ordered, tuple(str(bool(value)) for value in ordered))
    return LabelMap(ordered, tuple(map(str, ordered)))


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
        match = _LEADING_NUMBER.match(name)
        if match is None:
            raise DataError(f"positive_from = {positive_from}: class {name!r} does not begin with a number")
        numbers.append(int(match[0]))
    merged = (np.array(numbers) >= positive_from).astype(np.int64)
    if len(set(merged.tolist())) < 2:
        raise DataError(f"positive_from = {positive_from} leaves one class of {', '.join(classes.names)}: move it")
    return (f"below {positive_from}", f"{positive_from} and above"), merged


def holds_text(values: Sequence[str | None]) -> bool:
    """Tell a column of texts from one of numbers written as strings.

    Args:
        values: Some of its values.

    Returns:
        Whether one of them is no number.
    """
    return not all(value is None or _is_number(value) for value in values)


def _is_number(value: str) -> bool:
    return _NUMBER.fullmatch(value.strip()) is not None


def _number(value: str) -> int | float:
    number = float(value)
    return int(number) if number.is_integer() else number


def _plain(value: Any) -> int | str:
    return value.strip() if isinstance(value, str) else int(value)


def _check_label(value: Any, row: int, where: str) -> None:
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"label in row {row} of {where} is empty: drop the row")
    elif value is None or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"label in row {row} of {where} is missing: drop the row")
    elif not isinstance(value, int | float):
        raise DataError(f"{where} holds {type(value).__name__} values, no labels: name another with --label-column")
    elif isinstance(value, float) and not value.is_integer():
        raise DataError(f"label {value!r} in row {row} of {where} is no class: regression is not supported")
    elif value < 0:
        raise DataError(f"label {value!r} in row {row} of {where} is no class: hidden labels? use another split")


def read_labels(values: Sequence[Any], classes: LabelMap, *, split: str, column: str) -> NDArray[np.int64]:
    """Number the labels by class.

    Args:
        values: Label column.
        classes: From the training split.
        split: Name of the split, for messages.
        column: Name of the column, for messages.

    Returns:
        Integers from 0 to C - 1.

    Raises:
        DataError: If a value is none of the classes.
    """
    where = f"column {column!r} of split {split!r}"
    number = {value: index for index, value in enumerate(classes.values)}
    labels = np.empty(len(values), dtype=np.int64)
    numeric = isinstance(classes.values[0], int)
    for row, value in enumerate(values):
        if numeric and isinstance(value, str) and _is_number(value):
            value = _number(value)
        _check_label(value, row, where)
        index = number.get(_plain(value))
        if index is None:
            raise DataError(f"label {value!r} in row {row} of {where} is no class: they are {', '.join(classes.names)}")
        labels[row] = index
    return labels
