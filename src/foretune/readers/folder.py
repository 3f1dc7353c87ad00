"""Files of a data set: which split each belongs to, and who reads it."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from foretune.errors import DataError, border, few
from foretune.readers.arrow import read_parquet, read_saved
from foretune.readers.records import read_records
from foretune.readers.separated import read_separated
from foretune.readers.table import JoinedTable, Table, named

Splits = Mapping[str, Callable[[], Table]]
READERS: Mapping[str, Callable[[Path], Table]] = {
    ".csv": partial(read_separated, separator=","),
    ".tsv": partial(read_separated, separator="\t"),
    ".jsonl": read_records,
    ".json": read_records,
    ".parquet": read_parquet,
}
_PACKED = ".gz"
EVAL_SPLITS = ("validation", "valid", "val", "dev", "eval", "validation_matched", "test")
# `train`, or a shard of it: `train-00000-of-00002`, with a hash behind in some exports, `train_1`.
_SPLIT_FILE = re.compile(rf"(?P<split>train|{'|'.join(EVAL_SPLITS)})(?P<shard>[-_]\d+(-of-\d+)?(-[0-9a-f]+)?)?")


def is_table(path: Path) -> bool:
    """Tell whether the name of a file is one of a table.

    Args:
        path: File.

    Returns:
        Whether a reader knows its suffix.
    """
    return _suffix(path) in READERS


def _suffix(path: Path) -> str:
    """The suffix without regard to capitals, nor to that of a compressed text file."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == _PACKED else suffix


def _stem(path: Path) -> str:
    return (Path(path.stem).stem if path.suffix.lower() == _PACKED else path.stem).lower()


def open_path(path: Path) -> Splits:
    """Find the splits of a file or a folder; each is read when it is asked for, for others may be large or broken.

    Args:
        path: File, folder of files, or what `save_to_disk` wrote.

    Returns:
        A reader for each split.

    Raises:
        DataError: If it holds no tables, or a split more than once.
    """
    if path.is_file():
        return {"train": partial(_read, [path])}
    if not path.is_dir():
        raise DataError(f"data set {named(path)} is neither a file nor a folder: save it to a file")
    with border(DataError, f"cannot read folder {named(path)}"):
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return read_saved(path)
        for folder in (path, path / "data"):
            splits = _in_folder(folder)
            if splits:
                return splits
        files = few(sorted(file.name for file in path.iterdir())) or "nothing"
    raise DataError(f"folder {named(path)} holds no train.csv, .tsv, .jsonl, .json or .parquet (it holds {files})")


def _in_folder(folder: Path) -> Splits:
    inside = folder.iterdir() if folder.is_dir() else ()
    files = sorted(file for file in inside if is_table(file) and not file.name.startswith("."))  # as macOS leaves them
    by_split: dict[str, list[Path]] = {}
    whole = set()
    for file in files:
        match = _SPLIT_FILE.fullmatch(_stem(file))
        if match:
            by_split.setdefault(match["split"], []).append(file)
            if match["shard"] is None:
                whole.add(match["split"])
    for split, paths in by_split.items():
        if len(paths) > 1 and (split in whole or len({_suffix(path) for path in paths}) > 1):
            twice = few(path.name for path in paths)
            raise DataError(f"folder {named(folder)} holds split {split!r} more than once ({twice}): keep one")
    if not by_split and len(files) == 1:
        by_split["train"] = files
    return {split: partial(_read, paths) for split, paths in by_split.items()}


def _read(paths: Sequence[Path]) -> Table:
    tables = []
    for path in paths:
        reader = READERS.get(_suffix(path))
        if reader is None:
            raise DataError(f"file {named(path)} has no known format: use {', '.join(READERS)}")
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "a link to nothing" if path.is_symlink() else "no regular file"
            raise DataError(f"{named(path)} is {kind}: put the table itself there")
        with border(DataError, f"cannot read {named(path)}"):
            tables.append(reader(path))
    return tables[0] if len(tables) == 1 else JoinedTable(tables)
