"""Where rows come from: a local path, the hub or memory; which splits train and evaluate, and which rows are kept."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from foretune.errors import DataError, border, few, reason, shown
from foretune.readers.arrow import quiet, splits_of
from foretune.readers.folder import EVAL_SPLITS, Splits, is_table, open_path
from foretune.readers.table import Split
from foretune.settings.groups import DataConfig

if TYPE_CHECKING:
    import datasets


_LOG = logging.getLogger(__name__)


def open_source(config: DataConfig) -> Splits:
    """Find the splits of a data set; a local path wins over a hub id.

    Args:
        config: Which data set.

    Returns:
        A reader for each split.

    Raises:
        DataError: If it cannot be found or read.
    """
    source = config.dataset
    if not source.strip():
        raise DataError("the data set has no name: give a folder, a file or a hub id")
    with border(DataError, f"data set {shown(source, 120)} cannot be a path"):
        path = Path(source).expanduser()
        exists = path.exists()
    if exists:
        if config.config_name is not None:
            raise DataError(f"config_name {config.config_name!r} is for the hub, but {source!r} is a local path")
        return open_path(path)
    if path.is_absolute() or source.startswith((".", "~")) or is_table(path):
        state = "is a link to nothing" if path.is_symlink() else "does not exist"
        raise DataError(f"data set {shown(source, 120)} {state}: give a folder, a file or a hub id")
    return splits_of(_load_hub(source, config.config_name))


def _load_hub(source: str, config_name: str | None) -> Any:
    import datasets

    try:
        with quiet():
            return datasets.load_dataset(source, config_name)
    except Exception as error:
        remedy = "unset HF_HUB_OFFLINE" if datasets.config.HF_HUB_OFFLINE else "check the id"
        raise DataError(
            f"data set {shown(source, 120)} is no local path and cannot be loaded from the hub: {reason(error)}; "
            f"{remedy} or give a local folder"
        ) from error


def splits_in_memory(
    train: "datasets.Dataset | datasets.DatasetDict", evaluation: "datasets.Dataset | None" = None
) -> Splits:
    """Name the splits of the user's own `datasets.Dataset` objects.

    Args:
        train: Training split, or all splits by name.
        evaluation: Evaluation split.

    Returns:
        A reader for each split: train and validation where they have no names of their own.

    Raises:
        DataError: If these are no data sets.
    """
    import datasets

    if isinstance(train, datasets.DatasetDict):
        if evaluation is not None:
            raise DataError("evaluation split given beside a DatasetDict: put it into the dictionary")
        splits = dict(train)
    else:
        splits = {"train": train} if evaluation is None else {"train": train, "validation": evaluation}
    for name, split in splits.items():
        if not isinstance(split, datasets.Dataset):
            raise DataError(f"split {name!r} is a {type(split).__name__}: give a datasets.Dataset")
    return splits_of(splits)


def open_split(splits: Splits, name: str) -> Split:
    """Read a split.

    Args:
        splits: All of them.
        name: Its name.

    Returns:
        The split.

    Raises:
        DataError: If it has no rows.
    """
    split = Split(name, splits[name]())
    if split.table.n_rows == 0:
        raise DataError(f"split {shown(name)} has no rows")
    return split


def check_names(splits: Splits, config: DataConfig) -> None:
    """Check that the splits that are asked for exist.

    Args:
        splits: All of them.
        config: Which of them train and evaluate.

    Raises:
        DataError: If one is missing, or serves for both.
    """
    for split, flag in ((config.train_split, "--train-split"), (config.eval_split, "--eval-split")):
        if split is not None and split not in splits:
            raise DataError(f"split {shown(split)} does not exist: the data set has {few(splits)}; set {flag}")
    if config.eval_split == config.train_split:
        raise DataError(f"split {config.eval_split!r} cannot serve for training and evaluation: name two splits")


def evaluation_split(splits: Splits, config: DataConfig, lacks: Callable[[Split], str]) -> Split | None:
    """Find the split to evaluate on; splits are read one at a time, for others may be broken.

    Args:
        splits: All of them.
        config: Which is asked for, and which trains.
        lacks: Says what a split lacks, in words that follow its name; nothing if it may serve.

    Returns:
        The one asked for, else the first of the usual names that may serve; None if there is none.

    Raises:
        DataError: If the one asked for cannot serve.
    """
    if config.eval_split is not None:
        split = open_split(splits, config.eval_split)
        lacking = lacks(split)
        if lacking:
            raise DataError(
                f"split {shown(split.name)} {lacking}: name another with --eval-split, or none to hold rows out"
            )
        return split
    for name in EVAL_SPLITS:
        if name in splits and name != config.train_split:
            split = open_split(splits, name)
            lacking = lacks(split)
            if not lacking:
                return split
            _LOG.warning("split %r is left out: it %s; without another, rows are held out of training", name, lacking)
    return None


def random_rows(n_rows: int, n: int) -> NDArray[np.int64]:
    """Draw random rows, the same whatever the seed of a run.

    Args:
        n_rows: How many there are.
        n: How many to keep.

    Returns:
        Their numbers, in their order.
    """
    return np.sort(np.random.default_rng(0).choice(n_rows, n, replace=False)).astype(np.int64)
