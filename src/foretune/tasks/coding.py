"""Which kind of task the label columns of a data set pose, and how they are read."""

import logging
from collections.abc import Sequence
from typing import Any, Protocol, get_args

from foretune.errors import DataError, few, shown
from foretune.readers.table import Split
from foretune.settings.groups import DataConfig, LabelKind
from foretune.tasks.label_sets import flag_coding, is_flag, set_coding
from foretune.tasks.labels import class_coding
from foretune.tasks.metrics import Kind
from foretune.tasks.numbers import is_fraction, may_be_number, number_coding
from foretune.tasks.objective import Objective, Targets

_LOG = logging.getLogger(__name__)


class Coding(Protocol):
    """How label columns are read as the targets of an objective, by what the training split holds."""

    @property
    def objective(self) -> Objective:
        """What is learnt."""

    def read(self, split: Split) -> Targets:
        """Read the label columns of a split.

        Args:
            split: Split.

        Returns:
            n classes, or n × C numbers.
        """


def coding_of(train: Split, columns: tuple[str, ...], config: DataConfig) -> Coding:
    """Take the label columns for what the settings say, or for what they look like.

    Args:
        train: Training split.
        columns: Label columns.
        config: Settings of the data set.

    Returns:
        How they are read.

    Raises:
        DataError: If they do not hold such labels, or `positive_from` is set for another kind than classes.
    """
    kind = next((known for known in get_args(LabelKind) if known == config.task), None)  # no language model's
    if kind is None:
        kind = _kind_of(train, columns)
        if kind != "classification":
            _LOG.info("%s: %s", train.place(columns[0]), kind)
    if kind != "classification" and config.positive_from is not None:
        raise DataError(f"positive_from = {config.positive_from} makes two classes: leave it out with --task {kind}")
    if kind == "regression":
        return number_coding(train, columns)
    if kind == "multi-label":
        values = train.values(columns[0])
        flags = len(columns) > 1 or _holds_flags(values, stated=train.table.class_names(columns[0]) is not None)
        return flag_coding(train, columns) if flags else set_coding(train, columns[0])
    if len(columns) > 1:
        raise DataError(
            f"{len(columns)} label columns ({few(columns)}): a class for each text is one column; set --task "
            "regression for several numbers, or multi-label for several labels"
        )
    return class_coding(train, columns[0], positive_from=config.positive_from)


def _kind_of(train: Split, columns: tuple[str, ...]) -> Kind:
    if len(columns) > 1:
        return _kind_of_several(train, columns)
    values = train.values(columns[0])
    stated = train.table.class_names(columns[0]) is not None
    if any(isinstance(value, list | tuple) for value in values):
        return _kind_of_lists(values, stated=stated)
    if not stated and all(map(may_be_number, values)) and any(map(is_fraction, values)):
        return "regression"
    return "classification"


def _kind_of_several(train: Split, columns: tuple[str, ...]) -> Kind:
    """Zeros and ones are labels, other numbers are numbers; hidden and missing ones are named when they are read."""
    every = {column: train.values(column) for column in columns}
    if all(is_flag(value) or value is None or _is_hidden(value) for values in every.values() for value in values):
        return "multi-label"
    for column, values in every.items():
        row = next((row for row, value in enumerate(values) if not may_be_number(value)), None)
        if row is not None:
            raise DataError(
                f"label {shown(values[row])} in {train.place(column).row(row)} is no number: several label columns "
                "hold numbers, or 0 and 1 for labels that are there or not"
            )
    return "regression"


def _is_hidden(value: Any) -> bool:
    return str(value).strip() in ("-1", "-1.0", "")


def _kind_of_lists(values: Sequence[Any], *, stated: bool) -> Kind:
    if stated or _holds_flags(values, stated=False):
        return "multi-label"
    entries = [entry for value in values if isinstance(value, list | tuple) for entry in value]
    numeric = bool(entries) and all(map(may_be_number, entries))
    return "regression" if numeric and any(map(_is_float, entries)) else "multi-label"


def _is_float(value: Any) -> bool:
    """Whether a number is written with a point, as those of a JSON file are told apart."""
    return isinstance(value, float) or is_fraction(value) or (isinstance(value, str) and "." in value)


def _holds_flags(values: Sequence[Any], *, stated: bool) -> bool:
    """Whether zeros and ones say which labels are there: alone, or in lists of one for each label."""
    known = [value for value in values if value is not None]
    if stated or not known:
        return False
    if not any(isinstance(value, list | tuple) for value in known):
        return all(map(is_flag, known))
    if not all(isinstance(value, list | tuple) for value in known) or len({len(value) for value in known}) > 1:
        return False
    entries = [entry for value in known for entry in value]
    # lists of one integer each name a class
    return bool(entries) and all(map(is_flag, entries)) and (len(known[0]) > 1 or any(map(_is_float, entries)))
