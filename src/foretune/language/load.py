"""Data sets for language models, from a folder, a file, the hub or memory."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from foretune.errors import ConfigError, DataError
from foretune.language.formats import find_format, holds_preferences, lacks, read_rows
from foretune.language.rows import LanguageSplit, LanguageTask, fingerprint
from foretune.readers.folder import Splits
from foretune.settings.groups import LANGUAGE_KINDS, DataConfig, LossOn
from foretune.tasks.columns import find_columns, holds_text
from foretune.tasks.load import LOOKED_AT
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

_OF_LABELS = ("label_column", "positive_from")


def load_language_task(config: DataConfig) -> LanguageTask:
    """Load texts, prompts with completions or conversations from a folder, a file or the hub.

    Files, folders and splits are found as `foretune.tasks.load.load_task` finds them.

    Args:
        config: Which data set, splits and columns: one of texts or messages, two for prompt and completion, or none
            to find them by their names.

    Returns:
        The task; without an evaluation split where there is none with the columns of training.

    Raises:
        DataError: If it cannot be found or read, or holds no rows that a language model learns from.
        ConfigError: If a setting is about labels.
    """
    return language_task_of(open_source(config), config)


def language_task_from_datasets(
    train: "datasets.Dataset | datasets.DatasetDict",
    evaluation: "datasets.Dataset | None" = None,
    *,
    text_column: str | Sequence[str] | None = None,
    loss_on: LossOn | None = None,
) -> LanguageTask:
    """Make a task of the user's own `datasets.Dataset` objects.

    Args:
        train: Training split, or all splits by name.
        evaluation: Evaluation split; without it one of the splits by name, if one has the columns.
        text_column: One column of texts or messages, or two for prompt and completion; None finds them.
        loss_on: Which tokens carry loss; None for the completion where a row has a prompt, else all.

    Returns:
        The task.

    Raises:
        DataError: If these are no data sets, or hold no rows that a language model learns from.
    """
    splits = splits_in_memory(train, evaluation)
    text = (text_column,) if isinstance(text_column, str) else text_column
    eval_split = None if evaluation is None else "validation"  # given by hand, it must have the columns
    columns = None if text is None else tuple(text)
    config = DataConfig("memory", text_column=columns, eval_split=eval_split, loss_on=loss_on)
    return language_task_of(splits, config)


def holds_language(splits: Splits, config: DataConfig, *, is_causal: Callable[[], bool]) -> bool:
    """Tell whether a data set is for a language model, by its columns where the settings do not say it.

    It is where they hold conversations, prompts with completions, or instructions with outputs; plain texts, and two
    text columns that are named, are where no column holds labels and the model is one. A text column with a label
    column is for a classifier, whatever else there is.

    Args:
        splits: All of them.
        config: Columns and splits in use.
        is_causal: Asked where it decides whether the model is a language model.

    Returns:
        Whether it is.
    """
    if config.task is not None:
        return config.task in LANGUAGE_KINDS
    if config.label_column is not None or config.positive_from is not None or config.train_split not in splits:
        return False
    form = None
    try:
        train = open_split(splits, config.train_split)
    except DataError:  # refused in a classifier's words
        return False
    try:
        form = find_format(train, config.text_column)
    except DataError:  # as a classifier's data it may be right
        if not holds_preferences(train):
            return False
    table = train.table
    strings = (name for name in table.names if holds_text(table.values(name, LOOKED_AT)))
    with suppress(DataError):
        find_columns(table.names, strings, text=config.text_column)
        return False
    if form is None:  # preferences: refused by that name
        return is_causal()
    named = config.text_column is not None and form.name != "messages"
    return is_causal() if form.name == "text" or named else True


def language_task_of(splits: Splits, config: DataConfig) -> LanguageTask:
    """Take splits for rows that a language model learns from.

    Args:
        splits: All of them.
        config: Columns and splits in use.

    Returns:
        The task.

    Raises:
        DataError: If they do not hold such rows.
        ConfigError: If a setting is about labels.
    """
    kind = next((known for known in LANGUAGE_KINDS if known == config.task), None)
    if config.task != kind:
        raise ConfigError(f"task = {config.task!r}: data of a language model has no labels; leave it out")
    for name in _OF_LABELS:
        value = getattr(config, name)
        if value is not None:
            raise ConfigError(f"{name} = {value!r}: data of a language model has no labels; leave it out")
    check_names(splits, config)
    train = open_split(splits, config.train_split)
    form = find_format(train, config.text_column)
    rows = read_rows(train, form)
    held = evaluation_split(splits, config, partial(lacks, form=form))
    evaluation = None if held is None else LanguageSplit(held.name, read_rows(held, form))
    if config.max_train is not None and config.max_train < len(rows):
        rows = tuple(rows[row] for row in random_rows(len(rows), config.max_train))
    return LanguageTask(
        source=config.dataset,
        train=LanguageSplit(train.name, rows),
        evaluation=evaluation,
        columns=form.columns,
        format=form.name,
        fingerprint=fingerprint(rows, None if evaluation is None else evaluation.rows),
        config_name=config.config_name,
        loss_on=config.loss_on,
        kind=kind,
    )
