"""Data sets: a local path or a hub id, their splits, and the task of telling texts apart that they pose."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from foretune.errors import DataError, border, few, reason, shown
from foretune.readers.arrow import splits_of
from foretune.readers.folder import EVAL_SPLITS, Splits, is_table, open_path
from foretune.readers.table import Split
from foretune.settings.groups import DataConfig
from foretune.tasks.classification import Classification
from foretune.tasks.columns import Columns, find_columns, holds_text, read_texts
from foretune.tasks.labels import LabelMap, label_map, read_labels, two_classes, without_labels
from foretune.tasks.objective import Objective

_LOG = logging.getLogger(__name__)
_LOOKED_AT = 1000  # rows that tell whether a column holds texts


@dataclass(frozen=True)
class TextSplit:
    """Texts and labels of one split.

    Attributes:
        name: Name of the split.
        texts: One text for each row.
        pairs: The second text for each row, None without.
        labels: Classes from 0.
    """

    name: str
    texts: Sequence[str]
    pairs: Sequence[str] | None
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Task:
    """A text classification task.

    Attributes:
        source: Path, hub id, or a word for data from memory.
        train: Split that samples come from.
        evaluation: Split that the forecast is for, None if there is none.
        text_columns: One or two text columns.
        label_column: Label column.
        label_names: Names of the C classes.
        fingerprint: SHA-256 of texts, labels and class names of both splits.
        config_name: Configuration of a hub data set.
    """

    source: str
    train: TextSplit
    evaluation: TextSplit | None
    text_columns: tuple[str, ...]
    label_column: str
    label_names: tuple[str, ...]
    fingerprint: str
    config_name: str | None = None

    @property
    def objective(self) -> Objective:
        """What is known of its kind."""
        return Classification(self.label_names)

    @property
    def n_classes(self) -> int:
        """Number of classes C."""
        return len(self.label_names)

    def class_counts(self, split: TextSplit) -> NDArray[np.int64]:
        """Count the rows of each class.

        Args:
            split: One of the task's splits.

        Returns:
            C counts.
        """
        return np.bincount(split.labels, minlength=self.n_classes).astype(np.int64)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no log of what is raised anyway."""
    disabled, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not disabled:
            datasets.enable_progress_bars()


def load_task(config: DataConfig) -> Task:
    """Load a data set from a folder, a file or the hub.

    A local path wins over a hub id. A folder holds `train.csv`, `validation.csv` and the like (csv, tsv, jsonl,
    json, parquet; also in shards and under `data/`), or what `save_to_disk` wrote. No code of a data set runs.
    Local files are read anew each time, never from a cache. Rows count from 0 in every message.

    Args:
        config: Which data set, columns and splits.

    Returns:
        The task.

    Raises:
        DataError: If it cannot be found or read, or is no classification data set.
    """
    source = config.dataset
    if not source.strip():
        raise DataError("the data set has no name: give a folder, a file or a hub id")
    with _quiet():
        with border(DataError, f"data set {shown(source, 120)} cannot be a path"):
            path = Path(source).expanduser()
            exists = path.exists()
        if exists:
            if config.config_name is not None:
                raise DataError(f"config_name {config.config_name!r} is for the hub, but {source!r} is a local path")
            splits = open_path(path)
        elif path.is_absolute() or source.startswith((".", "~")) or is_table(path):
            state = "is a link to nothing" if path.is_symlink() else "does not exist"
            raise DataError(f"data set {shown(source, 120)} {state}: give a folder, a file or a hub id")
        else:
            splits = splits_of(_load_hub(source, config.config_name))
        return _task(splits, config)


def _load_hub(source: str, config_name: str | None) -> Any:
    try:
        return datasets.load_dataset(source, config_name)
    except Exception as error:
        remedy = "unset HF_HUB_OFFLINE" if datasets.config.HF_HUB_OFFLINE else "check the id"
        raise DataError(
            f"data set {shown(source, 120)} is no local path and cannot be loaded from the hub: {reason(error)}; "
            f"{remedy} or give a local folder"
        ) from error


def task_from_datasets(
    train: datasets.Dataset | datasets.DatasetDict,
    evaluation: datasets.Dataset | None = None,
    *,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
) -> Task:
    """Make a task of the user's own `datasets.Dataset` objects.

    Args:
        train: Training split, or all splits by name.
        evaluation: Evaluation split; without it one of the splits by name, else rows are held out of training.
        text_column: One text column, or two for pairs; None finds them.
        label_column: Label column; None finds it.

    Returns:
        The task.

    Raises:
        DataError: If these are no data sets, or no classification data sets.
    """
    if isinstance(train, datasets.DatasetDict):
        if evaluation is not None:
            raise DataError("evaluation split given beside a DatasetDict: put it into the dictionary")
        splits = dict(train)
    else:
        splits = {"train": train} if evaluation is None else {"train": train, "validation": evaluation}
    for name, split in splits.items():
        if not isinstance(split, datasets.Dataset):
            raise DataError(f"split {name!r} is a {type(split).__name__}: give a datasets.Dataset")
    text = (text_column,) if isinstance(text_column, str) else text_column
    text = None if text is None else tuple(text)
    eval_split = None if evaluation is None else "validation"  # given by hand, it must have labels
    return _task(
        splits_of(splits), DataConfig("memory", text_column=text, label_column=label_column, eval_split=eval_split)
    )


def _open(splits: Splits, name: str) -> Split:
    split = Split(name, splits[name]())
    if split.table.n_rows == 0:
        raise DataError(f"split {shown(name)} has no rows")
    return split


def _check_names(splits: Splits, config: DataConfig) -> None:
    for split, flag in ((config.train_split, "--train-split"), (config.eval_split, "--eval-split")):
        if split is not None and split not in splits:
            raise DataError(f"split {shown(split)} does not exist: the data set has {few(splits)}; set {flag}")
    if config.eval_split == config.train_split:
        raise DataError(f"split {config.eval_split!r} cannot serve for training and evaluation: name two splits")


def _task(splits: Splits, config: DataConfig) -> Task:
    _check_names(splits, config)
    train = _open(splits, config.train_split)
    table = train.table
    strings = (name for name in table.names if holds_text(table.values(name, _LOOKED_AT)))
    try:
        columns = find_columns(table.names, strings, text=config.text_column, label=config.label_column)
    except DataError as error:
        raise DataError(f"{error}{table.where_names_stand}") from None
    place, stated = train.place(columns.label), table.class_names(columns.label)
    classes = label_map(train.values(columns.label), place=place, names=stated)
    train_split = _split(train, columns, classes)
    held = _evaluation(splits, config, columns, table.names)
    evaluation = None if held is None else _split(held, columns, classes)
    names = classes.names
    if config.positive_from is not None:
        names, merged = two_classes(classes, config.positive_from)
        train_split = replace(train_split, labels=merged[train_split.labels])
        evaluation = None if evaluation is None else replace(evaluation, labels=merged[evaluation.labels])
    if config.max_train is not None and config.max_train < len(train_split.labels):
        train_split = _take(train_split, config.max_train)
    return Task(
        source=config.dataset,
        train=train_split,
        evaluation=evaluation,
        text_columns=columns.text,
        label_column=columns.label,
        label_names=names,
        fingerprint=_fingerprint(names, train_split, evaluation),
        config_name=config.config_name,
    )


def _evaluation(splits: Splits, config: DataConfig, columns: Columns, trained: Sequence[str]) -> Split | None:
    """The first split with labels, of those that may serve; they are read one at a time, for others may be broken."""
    if config.eval_split is not None:
        split = _open(splits, config.eval_split)
        lacks = _lacks_labels(split, columns, trained)
        if lacks:
            raise DataError(
                f"split {shown(split.name)} {lacks}: name another with --eval-split, or none to hold rows out"
            )
        return split
    for name in EVAL_SPLITS:
        if name in splits and name != config.train_split:
            split = _open(splits, name)
            lacks = _lacks_labels(split, columns, trained)
            if not lacks:
                return split
            _LOG.warning("split %r is left out: it %s; without another, rows are held out of training", name, lacks)
    return None


def _lacks_labels(split: Split, columns: Columns, trained: Sequence[str]) -> str:
    """Say how a split hides its labels, as those of competitions do; nothing if it has some."""
    if not split.has(columns.label):
        # beside a column that training lacks it may only have another name
        return f"has no column {shown(columns.label)}" if set(split.table.names) <= set(trained) else ""
    if without_labels(split.values(columns.label)):
        return f"has no labels (column {shown(columns.label)} is -1 or empty in every row)"
    return ""


def _split(split: Split, columns: Columns, classes: LabelMap) -> TextSplit:
    texts, *pairs = (read_texts(split.values(text), place=split.place(text)) for text in columns.text)
    values, place = split.values(columns.label), split.place(columns.label)
    labels = read_labels(values, classes, place=place, names=split.table.class_names(columns.label))
    return TextSplit(split.name, texts, pairs[0] if pairs else None, labels)


def _take(split: TextSplit, n: int) -> TextSplit:
    """Keep n random rows in their order, the same whatever the seed of a run."""
    rows = np.sort(np.random.default_rng(0).choice(len(split.labels), n, replace=False))
    pairs = None if split.pairs is None else [split.pairs[row] for row in rows]
    return TextSplit(split.name, [split.texts[row] for row in rows], pairs, split.labels[rows])


def _fingerprint(label_names: Sequence[str], train: TextSplit, evaluation: TextSplit | None) -> str:
    digest = hashlib.sha256()

    def add(texts: Sequence[str] | None) -> None:
        # With the lengths in front, no two lists of texts give the same bytes.
        lengths = [-1] if texts is None else [len(texts), *map(len, texts)]
        digest.update(np.array(lengths, dtype="<i8").tobytes())
        digest.update("".join(texts or ()).encode("utf-8", "surrogatepass"))

    add(label_names)
    for split in (train, evaluation):
        add(None if split is None else split.texts)
        if split is not None:
            add(split.pairs)
            digest.update(split.labels.astype("<i8").tobytes())
    return digest.hexdigest()
