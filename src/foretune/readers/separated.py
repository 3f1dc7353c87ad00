"""Tables with a separator: csv and tsv, with quotes as spreadsheets write them or without any, as old corpora do.

A quote that nobody closes swallows the rows up to the next one, without a word from any reader. So a file that holds
quotes is read both ways, with quotes and with every line for itself, and what the two tell decides.
"""

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from foretune.errors import DataError, few, shown
from foretune.readers.plain import read_plain
from foretune.readers.table import RowTable, is_number, named

if TYPE_CHECKING:
    import _csv

SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}
_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_LINES = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_DECLARED = re.compile(r"sep=(.)[ \t]*(\r\n|\r|\n)", re.IGNORECASE)
Rows = list[list[str]]


@dataclass(frozen=True)
class _Dialect:
    """How cells are told apart; without `quotes` every line is a row, whatever quotes it holds."""

    separator: str
    quotes: bool = True
    spaces: bool = False  # a space goes with each separator


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _reader(text: str, dialect: _Dialect) -> "_csv.Reader":
    return csv.reader(
        (line[0] for line in _LINES.finditer(text)),  # not splitlines, which breaks at U+2028 in a text
        delimiter=dialect.separator,
        quoting=csv.QUOTE_MINIMAL if dialect.quotes else csv.QUOTE_NONE,
        skipinitialspace=dialect.spaces,
        strict=True,
    )


def _is_blank(row: Sequence[str]) -> bool:
    return not row or (len(row) == 1 and not row[0].strip())


def read_separated(path: Path, separator: str) -> RowTable:
    """Read a csv or tsv file; its first line names the columns.

    Args:
        path: File.
        separator: What its suffix stands for; another is taken where only that one splits the first line.

    Returns:
        Its rows, every cell the text that was written.

    Raises:
        DataError: If it has no rows, names a column twice, or a row has not one cell for each column.
    """
    text = read_plain(path)
    with _long_cells():
        declared = _DECLARED.match(text)  # spreadsheets put this before the header
        if declared:
            text, separator = text[declared.end() :], declared[1]
        names, dialect = _header(path, text, separator)
        lines = _rows(path, text, dialect, names)
    header, rows = lines[0], lines[1:]
    if not rows:
        raise DataError(f"file {named(path)} has no rows: it holds a header alone")
    names = [name.strip() or f"Unnamed: {index}" for index, name in enumerate(header)]
    twice = _twice(names)
    if twice is not None:
        header_hint = "; or is the first line no header?" if is_number(twice) or len(twice) > 30 else ""
        raise DataError(f"file {named(path)} has two columns {shown(twice)}: rename one{header_hint}")
    return RowTable(path, names, rows)


def _twice(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _header(path: Path, text: str, separator: str) -> tuple[list[str], _Dialect]:
    """Names of the columns and the separator: another than asked for only if no one else splits the first line."""
    headers = {}
    for candidate in dict.fromkeys((separator, *SEPARATORS)):
        row = _first(text, _Dialect(candidate))
        if len(row) > 1:
            headers[candidate] = row
    if separator not in headers and len(headers) > 1:
        words = few(SEPARATORS[candidate] for candidate in headers)
        raise DataError(
            f"{named(path)} has no {SEPARATORS.get(separator, separator)} in its first line, but {words}: "
            f"separate columns by one of them, and save it as {path.stem}.csv with commas"
        )
    chosen = separator if separator in headers or not headers else next(iter(headers))
    row = headers.get(chosen) or _first(text, _Dialect(chosen))
    spaces = len(row) > 1 and chosen != "\t" and all(name.startswith(" ") for name in row[1:])
    return row, _Dialect(chosen, spaces=spaces)


def _first(text: str, dialect: _Dialect) -> list[str]:
    try:
        return next((row for row in _reader(text, dialect) if not _is_blank(row)), [])
    except csv.Error:
        literal = _Dialect(dialect.separator, quotes=False, spaces=dialect.spaces)
        return next((row for row in _reader(text, literal) if not _is_blank(row)), [])


def _rows(path: Path, text: str, dialect: _Dialect, names: Sequence[str]) -> Rows:
    """Header and rows, all of one length."""
    if '"' not in text:
        return _checked(path, text, dialect)
    if dialect.separator == "\t":
        return _tabbed(path, text, dialect)
    rows = _checked(path, text, dialect)
    swallowed = _swallowed(rows, dialect.separator)
    if swallowed:
        raise DataError(_opened(path, swallowed[0]))
    return rows


def _opened(path: Path, row: int) -> str:
    return (
        f"row {row} of {named(path)} holds other rows: a quote opens in it and closes some lines below; "
        "double the quotes that belong to a text, and put the text in quotes"
    )


def _tabbed(path: Path, text: str, dialect: _Dialect) -> Rows:
    """Rows of a file with tabs, where quotes may be quotes or mean nothing."""
    literal = _Dialect(dialect.separator, quotes=False)
    lines = _read(text, literal)
    try:
        rows = _read(text, dialect)
    except csv.Error:
        return _checked(path, text, literal)
    if _ragged(lines) is not None:
        if _ragged(rows) is not None:
            return _checked(path, text, literal)
        swallowed = _swallowed(rows, dialect.separator)
        if swallowed:
            raise DataError(_opened(path, swallowed[0]))
        return rows
    if _ragged(rows) is not None:
        return lines
    if len(rows) == len(lines):
        return rows if _quotes_count(path, lines) else lines
    swallowed = _swallowed(rows, dialect.separator)
    if not swallowed:
        return rows
    if len(swallowed) < sum(map(_is_broken, rows[1:])):
        raise DataError(_opened(path, swallowed[0]))
    return lines


def _read(text: str, dialect: _Dialect) -> Rows:
    """All rows but blank ones; empty cells behind the last column, in every row, are separators that end lines."""
    rows = [row for row in _reader(text, dialect) if not _is_blank(row)]
    longest, shortest = max(map(len, rows[1:]), default=len(rows[0])), min(map(len, rows[1:]), default=0)
    if longest < len(rows[0]) and not any(name.strip() for name in rows[0][longest:]):
        rows[0] = rows[0][:longest]
    width = len(rows[0])
    if shortest > width and not any(cell for row in rows[1:] for cell in row[width:]):
        return [row[:width] for row in rows]
    return rows


def _ragged(rows: Rows) -> int | None:
    """The first row without one cell for each column, from 0 without the header."""
    width = len(rows[0])
    return next((index for index, row in enumerate(rows[1:]) if len(row) != width), None)


def _checked(path: Path, text: str, dialect: _Dialect) -> Rows:
    try:
        rows = _read(text, dialect)
    except csv.Error as error:
        raise DataError(_bad_quote(path, text, dialect)) from error
    bad = _ragged(rows)
    if bad is None:
        return rows
    line = _line(text, dialect, bad + 1)
    n, width = len(rows[bad + 1]), len(rows[0])
    word = SEPARATORS.get(dialect.separator, dialect.separator)
    remedy = (
        f"put texts that hold a {word} in quotes"
        if n > width
        else "add the others, or put texts with line breaks in quotes"
    )
    columns = f"{width} column" + ("s" if width > 1 else "")
    cells = f"{n} cell" + ("s" if n > 1 else "")
    raise DataError(
        f"row {bad} of {named(path)} (line {line}) has {cells} for {columns}, separated by {word}: {remedy}"
    )


def _line(text: str, dialect: _Dialect, wanted: int) -> int:
    """Line in which a row begins, both from 1."""
    reader, index, start = _reader(text, dialect), -1, 1
    for row in reader:
        if not _is_blank(row):
            index += 1
            if index == wanted:
                break
        start = reader.line_num + 1
    return start


def _bad_quote(path: Path, text: str, dialect: _Dialect) -> str:
    reader, index, start = _reader(text, dialect), -1, 1
    try:
        for row in reader:
            index += not _is_blank(row)
            start = reader.line_num + 1
    except csv.Error as error:
        where = f"row {index}" if index >= 0 else "the header"
        if "unexpected end" in str(error):
            return (
                f"{where} of {named(path)} (line {start}) opens a quote that nothing closes before the end of the file "
                "(EOF inside string): double it and put the text in quotes, or fetch the file again if it was cut"
            )
        return (
            f"{where} of {named(path)} (line {start}) goes on behind a closing quote: put the whole text in quotes and "
            'double the quotes in it ("" for "; a backslash does nothing)'
        )
    raise AssertionError("no bad quote")  # the caller met one


def _swallowed(rows: Rows, separator: str) -> list[int]:
    """Rows of several lines that each look like a row: as many cells, one of which comes back in other lines."""
    indices, labels = [], None
    for index, row in enumerate(rows[1:]):
        if not _is_broken(row):
            continue
        lines = _lines(row, separator)
        if any(len(line) != len(row) for line in lines):
            continue
        labels = _labels(rows, separator) if labels is None else labels
        if labels and all(any(line[at].strip() in values for at, values in labels.items()) for line in lines):
            indices.append(index)
    return indices


def _is_broken(row: Sequence[str]) -> bool:
    return any("\n" in cell or "\r" in cell for cell in row)


def _lines(row: Sequence[str], separator: str) -> Rows:
    """A row as if every line were one."""
    return [line.split(separator) for line in _LINE_ENDS.split(separator.join(row))] if _is_broken(row) else [list(row)]


def _labels(rows: Rows, separator: str) -> dict[int, set[str]]:
    """Values that come back, in the columns that have few, as labels are."""
    width = len(rows[0])
    lines = [line for row in rows[1:] for line in _lines(row, separator) if len(line) == width]
    repeated = {}
    for at in range(width):
        counts = Counter(line[at].strip() for line in lines)
        if len(counts) <= len(lines) / 2:
            repeated[at] = {value for value, count in counts.items() if value and count > 1}
    return repeated


def _quotes_count(path: Path, lines: Rows) -> bool:
    """Whether quotes around cells were put there by who wrote the file: all of a column, or where they are needed.

    Lines and rows are the same here, so that no cell holds a tab or a line break.

    Returns:
        Whether they are not part of the cells.

    Raises:
        DataError: If there is no telling.
    """
    if any(_is_wrapped(name) for name in lines[0]):
        return True  # no name of a column has quotes of its own
    count = False
    for at in range(len(lines[0])):
        cells = [(index, line[at]) for index, line in enumerate(lines[1:]) if line[at]]
        wrapped = [(index, cell) for index, cell in cells if _is_wrapped(cell)]
        others = [cell for _, cell in cells if not _is_wrapped(cell)]
        if not wrapped:
            continue
        if others and not _needed(wrapped, others, '"') and not _needed(wrapped, others, '",'):
            # many in quotes, or quotes doubled as only a writer of quotes does
            doubled = next((index for index, cell in wrapped if '""' in cell[1:-1]), None)
            if doubled is not None or len(wrapped) > len(cells) / 2:
                row = wrapped[0][0] if doubled is None else doubled
                raise DataError(
                    f"whether quotes belong to the texts of {named(path)} cannot be told (row {row} stands in quotes, "
                    "others do not): put them around every cell of the column and double those within"
                )
            return False
        count = True
    return count


def _is_wrapped(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"'


def _needed(wrapped: Sequence[tuple[int, str]], others: Sequence[str], reasons: str) -> bool:
    """Whether just those cells are in quotes that hold one of some characters."""

    def holds(text: str) -> bool:
        return any(character in text for character in reasons)

    return all(holds(cell[1:-1]) for _, cell in wrapped) and not any(map(holds, others))
