"""Data sets: load through `datasets`, find columns and classes."""

import glob
import hashlib
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from foretune.columns import (
    Columns,
    LabelMap,
    csv_header,
    find_columns,
    holds_text,
    label_map,
    read_labels,
    read_texts,
    two_classes,
)
from foretune.config import DataConfig
from foretune.errors import DataError

# Loader of `datasets` and its options for each suffix. The text "NA" or "null" is a text; without `index_col` pandas
# takes the first column of rows longer than the header for an index and shifts the others.
_TEXT_TABLE = {"keep_default_na": False, "index_col": False}
FORMATS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".csv": ("csv", _TEXT_TABLE),
    ".tsv": ("csv", {**_TEXT_TABLE, "sep": "\t"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}
EVAL_SPLITS = ("validation", "valid", "val", "dev", "eval", "validation_matched", "test")
# `train`, or a shard of it: `train-00000-of-00002`, with a hash behind in some exports, `train_1`.
_SPLIT_FILE = re.compile(rf"(?P<split>train|{'|'.join(EVAL_SPLITS)})(?P<shard>[-_]\d+(-of-\d+)?(-[0-9a-f]+)?)?")


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
    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
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
    path = Path(source).expanduser()
    with _quiet():
        if path.exists():
            if config.config_name is not None:
                raise DataError(f"config_name {config.config_name!r} is for the hub, but {source!r} is a local path")
            splits = _load_path(path, config)
        elif path.is_absolute() or source.startswith((".", "~")) or path.suffix.lower() in FORMATS:
            raise DataError(f"data set {source!r} does not exist: give a folder, a file or a hub id")
        else:
            splits = _load_hub(source, config.config_name)
    return _task(splits, config)


def _load_path(path: Path, config: DataConfig) -> Mapping[str, datasets.Dataset]:
    if path.is_file():
        return _load_files({"train": [path]}, config)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:
            raise DataError(f"cannot read data set {str(path)!r}: {_reason(error)}") from error
        return loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    for folder in (path, path / "data"):
        files = sorted(file for file in folder.glob("*") if file.suffix.lower() in FORMATS)
        by_split: dict[str, list[Path]] = {}
        whole = set()
        for file in files:
            match = _SPLIT_FILE.fullmatch(file.stem.lower())
            if match:
                by_split.setdefault(match["split"], []).append(file)
                if match["shard"] is None:
                    whole.add(match["split"])
        for split, paths in by_split.items():
            if len(paths) > 1 and (split in whole or len({path.suffix.lower() for path in paths}) > 1):
                held = ", ".join(path.name for path in paths)
                raise DataError(f"folder {str(folder)!r} holds split {split!r} more than once ({held}): keep one")
        if by_split:
            return _load_files(by_split, config)
        if len(files) == 1:
            return _load_files({"train": files}, config)
    held = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
    raise DataError(f"folder {str(path)!r} holds no train.csv, .tsv, .jsonl, .json or .parquet (it holds {held})")


def _load_files(files: Mapping[str, Sequence[Path]], config: DataConfig) -> Mapping[str, datasets.Dataset]:
    splits = {}
    for split in filter(None, _split_names(files, config)):  # no others: they may be large, or broken
        paths = files[split]
        suffix = paths[0].suffix.lower()
        if suffix not in FORMATS:
            raise DataError(f"file {str(paths[0])!r} has no known format: use {', '.join(FORMATS)}")
        try:
            splits[split] = _read_files(paths, *FORMATS[suffix])
        except DataError:
            raise
        except Exception as error:  # each reader fails in its own way
            raise DataError(f"cannot read {str(paths[0])!r}: {_reason(error)}") from error
    return splits


def _read_files(paths: Sequence[Path], loader: str, options: Mapping[str, Any]) -> datasets.Dataset:
    if loader == "csv":
        # Types that are guessed turn the text 007 into 7.0, and differ from chunk to chunk.
        header = csv_header(paths, separator=options.get("sep", ","))
        options = {**options, "features": datasets.Features({name: datasets.Value("string") for name in header})}
    files = [glob.escape(str(path.resolve())) for path in paths]
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would log what is raised
    try:
        # A cache of its own: the common one is keyed by modification time, which a changed file may share.
        with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
            warnings.filterwarnings("error", message="Length of header")  # pandas, of rows longer than that
            return datasets.load_dataset(
                loader, data_files={"train": files}, split="train", cache_dir=cache, keep_in_memory=True, **options
            )
    finally:
        datasets.logging.set_verbosity(verbosity)


def _load_hub(source: str, config_name: str | None) -> Mapping[str, datasets.Dataset]:
    try:
        loaded = datasets.load_dataset(source, config_name)
    except Exception as error:
        remedy = "unset HF_HUB_OFFLINE" if datasets.config.HF_HUB_OFFLINE else "check the id"
        raise DataError(
            f"data set {source!r} is no local path and cannot be loaded from the hub: {_reason(error)}; "
            f"{remedy} or give a local folder"
        ) from error
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


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
    return _task(splits, DataConfig("memory", text_column=text, label_column=label_column))


def _split_names(splits: Mapping[str, Any], config: DataConfig) -> tuple[str, str | None]:
    names = ", ".join(splits)
    for split, flag in ((config.train_split, "--train-split"), (config.eval_split, "--eval-split")):
        if split is not None and split not in splits:
            raise DataError(f"split {split!r} does not exist: the data set has {names}; set {flag}")
    rest = (name for name in EVAL_SPLITS if name in splits and name != config.train_split)
    eval_name = config.eval_split or next(rest, None)
    if eval_name == config.train_split:
        raise DataError(f"split {eval_name!r} cannot serve for training and evaluation: name two splits")
    return config.train_split, eval_name


def _task(splits: Mapping[str, datasets.Dataset], config: DataConfig) -> Task:
    train_name, eval_name = _split_names(splits, config)
    train = splits[train_name]
    for name in filter(None, (train_name, eval_name)):
        if len(splits[name]) == 0:
            raise DataError(f"split {name!r} has no rows")
    typed = [name for name, held in train.features.items() if getattr(held, "dtype", "") in ("string", "large_string")]
    first = train.select(range(min(len(train), 1000)))
    strings = [name for name in typed if holds_text(_column(first, name, train_name))]
    columns = find_columns(train.column_names, strings, text=config.text_column, label=config.label_column)
    held = _column(train, columns.label, train_name)
    stated = getattr(train.features[columns.label], "names", None)
    classes = label_map(held, split=train_name, column=columns.label, names=stated)
    train_split = _split(train, train_name, columns, classes)
    evaluation = None if eval_name is None else _split(splits[eval_name], eval_name, columns, classes)
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


def _column(split: datasets.Dataset, column: str, name: str) -> list[Any]:
    if column not in split.column_names:
        raise DataError(f"column {column!r} does not exist in split {name!r}: it has {', '.join(split.column_names)}")
    values: list[Any] = split.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    return values


def _split(split: datasets.Dataset, name: str, columns: Columns, classes: LabelMap) -> TextSplit:
    texts, *pairs = (read_texts(_column(split, text, name), split=name, column=text) for text in columns.text)
    labels = read_labels(_column(split, columns.label, name), classes, split=name, column=columns.label)
    return TextSplit(name, texts, pairs[0] if pairs else None, labels)


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
