"""Data sets for causal language models, from a folder, a file, the hub or memory."""

from collections.abc import Sequence
from functools import partial

import datasets

from foretune.errors import ConfigError
from foretune.language.formats import find_format, lacks, read_rows
from foretune.language.rows import LanguageSplit, LanguageTask, fingerprint
from foretune.readers.folder import Splits
from foretune.settings.groups import DataConfig
from foretune.tasks.sources import (
    check_names,
    evaluation_split,
    open_source,
    open_split,
    quiet,
    random_rows,
    splits_in_memory,
)

_OF_LABELS = ("label_column", "task", "positive_from")


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
    with quiet():
        return _task(open_source(config), config)


def language_task_from_datasets(
    train: datasets.Dataset | datasets.DatasetDict,
    evaluation: datasets.Dataset | None = None,
    *,
    text_column: str | Sequence[str] | None = None,
) -> LanguageTask:
    """Make a task of the user's own `datasets.Dataset` objects.

    Args:
        train: Training split, or all splits by name.
        evaluation: Evaluation split; without it one of the splits by name, if one has the columns.
        text_column: One column of texts or messages, or two for prompt and completion; None finds them.

    Returns:
        The task.

    Raises:
        DataError: If these are no data sets, or hold no rows that a language model learns from.
    """
    splits = splits_in_memory(train, evaluation)
    text = (text_column,) if isinstance(text_column, str) else text_column
    eval_split = None if evaluation is None else "validation"  # given by hand, it must have the columns
    return _task(splits, DataConfig("memory", text_column=None if text is None else tuple(text), eval_split=eval_split))


def _task(splits: Splits, config: DataConfig) -> LanguageTask:
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
    )
