"""Typed tables: parquet files, and the data sets of `datasets`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretune.errors import DataError, border, shown
from foretune.readers.plain import check_kind
from foretune.readers.table import Table, named

if TYPE_CHECKING:
    import datasets

_TOP = 1000


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, and no log of what is raised anyway."""
    import datasets

    disabled, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not disabled:
            datasets.enable_progress_bars()


class DatasetTable(Table):
    """A `datasets.Dataset`."""

    def __init__(self, dataset: "datasets.Dataset") -> None:
        self.names, self.n_rows = tuple(dataset.column_names), len(dataset)
        self._dataset = dataset

    def values(self, name: str, first: int | None = None) -> list[Any]:
        """Read a column."""
        with border(DataError, f"cannot read column {shown(name)}"):
            if first is not None and first <= _TOP:
                top: list[Any] = self._top.column(name).slice(0, first).to_pylist()
                return top
            rows = self._dataset.select_columns([name]).with_format("arrow")[:first]
            values: list[Any] = rows.column(name).to_pylist()
        return values

    @cached_property
    def _top(self) -> Any:
        """The first rows of all columns, since to select each of thousands takes its time."""
        return self._dataset.with_format("arrow")[:_TOP]

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """Names of a ClassLabel, or of those in lists."""
        return _class_names(self._dataset.features[name])


class ParquetTable(Table):
    """A parquet file; class names are those that `datasets` writes into it."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        with path.open("rb") as file:
            head = file.read(256)
        if not head:
            raise DataError(f"file {named(path)} has no rows: it is empty")
        if not head.startswith(b"PAR1"):
            check_kind(path, head)
        with pyarrow.parquet.ParquetFile(path) as file:  # not read_table, which makes columns of folders called a=b
            self._table = file.read()
            stated = file.metadata.num_rows
        self.names, self.n_rows = tuple(self._table.column_names), self._table.num_rows
        self.files = ((path.name, self.n_rows),)
        if stated != self.n_rows:
            raise DataError(f"{named(path)} states {stated} rows and holds {self.n_rows}: fetch it again")
        twice = next((name for name in self.names if len(self._table.schema.get_all_field_indices(name)) > 1), None)
        if twice is not None:
            raise DataError(f"file {named(path)} has two columns {shown(twice)}: rename one")

    def values(self, name: str, first: int | None = None) -> list[Any]:
        """Read a column."""
        column = self._table.column(name)
        values: list[Any] = (column if first is None else column.slice(0, first)).to_pylist()
        return values

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """Names of a ClassLabel, or of those in lists."""
        import pyarrow as pa
        from datasets import Features

        field = self._table.schema.field(name)
        kind = field.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
        if not pa.types.is_integer(kind):
            return None
        alone = pa.schema([field], metadata=self._table.schema.metadata)
        with border(DataError, f"cannot read the class names of column {shown(name)} in {self.files[0][0]}"):
            return _class_names(Features.from_arrow_schema(alone)[name])


def _class_names(feature: Any) -> tuple[str, ...] | None:
    import datasets

    while isinstance(feature, datasets.List | datasets.LargeList):
        feature = feature.feature
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def read_parquet(path: Path) -> Table:
    """Read a parquet file.

    Args:
        path: File.

    Returns:
        Its columns.

    Raises:
        DataError: If it is none, is damaged, or names a column twice.
    """
    with border(DataError, f"cannot read {named(path)}", remedy="fetch it again"):
        return ParquetTable(path)


def read_saved(path: Path) -> Mapping[str, Callable[[], Table]]:
    """Read what `save_to_disk` wrote.

    Args:
        path: Folder.

    Returns:
        Its splits.

    Raises:
        DataError: If it is damaged.
    """
    import datasets

    with border(DataError, f"cannot read data set {named(path)}", remedy="save it again"), quiet():
        loaded = datasets.load_from_disk(str(path))
        return splits_of(loaded)


def splits_of(loaded: Any) -> Mapping[str, Callable[[], Table]]:
    """Name the splits of what a loader gave.

    Args:
        loaded: One data set, or several by name.

    Returns:
        A reader for each split; a single one is for training.
    """
    splits = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    return {name: partial(DatasetTable, split) for name, split in splits.items()}
