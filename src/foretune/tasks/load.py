"""Data sets: a local path or a hub id, their splits, and the task that they pose."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from foretune.errors import ConfigError, DataError, few, shown
from foretune.readers.folder import Splits
from foretune.readers.table import Split
from foretune.settings.groups import LANGUAGE_KINDS, DataConfig
from foretune.tasks.classification import Classification
from foretune.tasks.coding import Coding, coding_of
from foretune.tasks.columns import Columns, find_columns, holds_text, read_texts
from foretune.tasks.labels import without_labels
from foretune.tasks.metrics import Kind
from foretune.tasks.objective import Objective, Targets
from foretune.tasks.sources import (
    check_names,
    evaluation_split,
    open_source,
    open_split,
    random_rows,
    splits_in_memory,
)

if TYPE_CHECKING:
    import datasets


LOOKED_AT = 1000  # rows that tell whether a column holds texts


@dataclass(frozen=True)
class TextSplit:
    """Texts and targets of one split.

    Attributes:
        name: Name of the split.
        texts: One text for each row.
        pairs: The second text for each row, None without.
        labels: n classes from 0 (int64), or n × C numbers (float64).
    """

    name: str
    texts: Sequence[str]
    pairs: Sequence[str] | None
    labels: Targets


@dataclass(frozen=True)
class Task:
    """What is to be learnt of texts.

    Attributes:
        source: Path, hub id, or a word for data from memory.
        train: Split that samples come from.
        evaluation: Split that the forecast is for, None if there is none.
        text_columns: One or two text columns.
        label_columns: Label column, or several.
        objective: What is known of its kind, and the names of its C outputs.
        fingerprint: SHA-256 of texts, targets and names of the outputs.
        config_name: Configuration of a hub data set.
    """

    source: str
    train: TextSplit
    evaluation: TextSplit | None
    text_columns: tuple[str, ...]
    label_columns: tuple[str, ...]
    objective: Objective
    fingerprint: str
    config_name: str | None = None

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the C outputs: classes, labels, or columns of numbers."""
        return self.objective.names

    @property
    def label_column(self) -> str:
        """The label columns in words."""
        return ", ".join(self.label_columns)

    @property
    def n_classes(self) -> int:
        """Number of classes C, of a classification.

        Raises:
            DataError: If the task has no classes.
        """
        if not isinstance(self.objective, Classification):
            raise DataError(f"the labels are no classes ({self.objective.kind}): this needs --task classification")
        return len(self.label_names)

    def class_counts(self, split: TextSplit) -> NDArray[np.int64]:
        """Count the rows of each class.

        Args:
            split: One of the task's splits.

        Returns:
            C counts.
        """
        return np.bincount(split.labels, minlength=self.n_classes).astype(np.int64)


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
        DataError: If it cannot be found or read, or does not hold texts with labels.
        ConfigError: If a setting is about language models.
    """
    return task_of(open_source(config), config)


def task_from_datasets(
    train: "datasets.Dataset | datasets.DatasetDict",
    evaluation: "datasets.Dataset | None" = None,
    *,
    text_column: str | Sequence[str] | None = None,
    label_column: str | Sequence[str] | None = None,
    task: Kind | None = None,
) -> Task:
    """Make a task of the user's own `datasets.Dataset` objects.

    Args:
        train: Training split, or all splits by name.
        evaluation: Evaluation split; without it one of the splits by name, else rows are held out of training.
        text_column: One text column, or two for pairs; None finds them.
        label_column: Label column, or several; None finds one.
        task: What the labels are; None finds it, as `foretune.DataConfig` says.

    Returns:
        The task.

    Raises:
        DataError: If these are no data sets, or do not hold texts with labels.
    """
    splits = splits_in_memory(train, evaluation)
    text = (text_column,) if isinstance(text_column, str) else text_column
    text = None if text is None else tuple(text)
    label = (label_column,) if isinstance(label_column, str) else label_column
    label = None if label is None else tuple(label)
    eval_split = None if evaluation is None else "validation"  # given by hand, it must have labels
    config = DataConfig("memory", text_column=text, label_column=label, task=task, eval_split=eval_split)
    return task_of(splits, config)


def task_of(splits: Splits, config: DataConfig) -> Task:
    """Take splits for texts with labels.

    Args:
        splits: All of them.
        config: Columns and splits in use.

    Returns:
        The task.

    Raises:
        DataError: If they do not hold texts with labels.
        ConfigError: If a setting is about language models.
    """
    if config.task in LANGUAGE_KINDS:
        raise ConfigError(f"task = {config.task!r}: texts with labels are read here; use foretune.load_language_task")
    if config.loss_on is not None:
        raise ConfigError(
            f"loss_on = {config.loss_on!r}: is for causal language models; leave it out, or set --task causal-lm"
        )
    check_names(splits, config)
    train = open_split(splits, config.train_split)
    table = train.table
    strings = (name for name in table.names if holds_text(table.values(name, LOOKED_AT)))
    try:
        columns = find_columns(table.names, strings, text=config.text_column, label=config.label_column)
    except DataError as error:
        raise DataError(f"{error}{table.where_names_stand}") from None
    coding = coding_of(train, columns.labels, config)
    train_split = _split(train, columns, coding)
    labelled = evaluation_split(splits, config, lambda split: _lacks_labels(split, columns, table.names))
    evaluation = None if labelled is None else _split(labelled, columns, coding)
    if config.max_train is not None and config.max_train < len(train_split.labels):
        train_split = take(train_split, random_rows(len(train_split.labels), config.max_train))
    return Task(
        source=config.dataset,
        train=train_split,
        evaluation=evaluation,
        text_columns=columns.text,
        label_columns=columns.labels,
        objective=coding.objective,
        fingerprint=fingerprint(coding.objective, train_split, evaluation),
        config_name=config.config_name,
    )


def _lacks_labels(split: Split, columns: Columns, trained: Sequence[str]) -> str:
    """Say how a split hides its labels, as those of competitions do; nothing if it has some."""
    lacking = next((label for label in columns.labels if not split.has(label)), None)
    if lacking is not None:
        # beside a column that training lacks it may only have another name
        return f"has no column {shown(lacking)}" if set(split.table.names) <= set(trained) else ""
    if all(without_labels(split.values(label)) for label in columns.labels):
        which = f"column {shown(columns.labels[0])} is" if len(columns.labels) == 1 else f"{few(columns.labels)} are"
        return f"has no labels ({which} -1 or empty in every row)"
    return ""


def _split(split: Split, columns: Columns, coding: Coding) -> TextSplit:
    texts, *pairs = (read_texts(split.values(text), place=split.place(text)) for text in columns.text)
    return TextSplit(split.name, texts, pairs[0] if pairs else None, coding.read(split))


def take(split: TextSplit, rows: NDArray[np.int64]) -> TextSplit:
    """Keep some rows of a split.

    Args:
        split: Split.
        rows: Their numbers, in the order that they shall have.

    Returns:
        A split of the same name.
    """
    pairs = None if split.pairs is None else [split.pairs[row] for row in rows]
    return TextSplit(split.name, [split.texts[row] for row in rows], pairs, split.labels[rows])


def fingerprint(objective: Objective, train: TextSplit, evaluation: TextSplit | None) -> str:
    """Name the content of a task.

    Args:
        objective: What is known of its kind, and the names of its outputs.
        train: Training split.
        evaluation: Evaluation split, if there is one.

    Returns:
        SHA-256 of texts, targets and names, in hexadecimal.
    """
    digest = hashlib.sha256()
    classes = isinstance(objective, Classification)
    if not classes:
        digest.update(objective.kind.encode())

    def add(texts: Sequence[str] | None) -> None:
        # With the lengths in front, no two lists of texts give the same bytes.
        lengths = [-1] if texts is None else [len(texts), *map(len, texts)]
        digest.update(np.array(lengths, dtype="<i8").tobytes())
        digest.update("".join(texts or ()).encode("utf-8", "surrogatepass"))

    add(objective.names)
    for split in (train, evaluation):
        add(None if split is None else split.texts)
        if split is not None:
            add(split.pairs)
            digest.update(split.labels.astype("<i8" if classes else "<f8").tobytes())
    return digest.hexdigest()
