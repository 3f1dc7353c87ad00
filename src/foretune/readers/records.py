"""Records in JSON: one in a line, a list of them, or columns; numbers keep their spelling, as in a csv file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from foretune.errors import DataError, few, reason, shown
from foretune.readers.plain import read_plain
from foretune.readers.table import RecordTable, named


class _TwiceError(ValueError):
    """An object names a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(
            f"key {shown(next(name for name in names if names.count(name) > 1))} stands twice in a record"
        )
    return record


# str: the text 1.10 stays what it is, and a number of a thousand digits is no work
_TURNS = ({"role", "content"}, {"from", "value"})
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, object_pairs_hook=_object)


def read_records(path: Path) -> RecordTable:
    """Read a json or jsonl file; what it holds decides how, not its suffix.

    Args:
        path: File: records in lines, a list of records, a list under `data`, or columns.

    Returns:
        Its records; a text or a number is the text that was written.

    Raises:
        DataError: If it is no JSON, or holds no records.
    """
    text = read_plain(path)
    try:
        content = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if _is_lines(text, error):
            return _table(path, _lines(path, text))
        _refuse(path, error.lineno, error)
    except (ValueError, RecursionError) as error:
        if _is_lines(text, error):
            return _table(path, _lines(path, text))
        _refuse(path, None, error)
    return _table(path, _records(path, content))


def _is_lines(text: str, error: Exception) -> bool:
    """Whether the first line is for itself: JSON that goes on, or nothing that spans lines."""
    if isinstance(error, json.JSONDecodeError) and error.msg.startswith("Extra data"):
        return True
    first = next(line for line in text.split("\n") if line.strip()).strip()
    return first.startswith("{") and first.endswith("}") and len(first) < len(text.strip())


def _lines(path: Path, text: str) -> list[Any]:
    records = []
    for index, line in enumerate(text.split("\n")):  # not splitlines, which breaks at U+2028 in a text
        if not line.strip():
            continue
        try:
            record = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            _refuse(path, index + 1, error)
        if not isinstance(record, dict):
            raise DataError(
                f"line {index + 1} of {named(path)} holds {_kind(record)}, no record: write one object in a line"
            )
        records.append(record)
    return records


def _refuse(path: Path, line: int | None, error: Exception) -> NoReturn:
    where = "" if line is None else f" (line {line})"
    if isinstance(error, RecursionError):
        words = "nested too deeply, write flat records"
    elif isinstance(error, _TwiceError):
        words = str(error)
    elif isinstance(error, json.JSONDecodeError):
        at = f"{error.msg} (column {error.colno})"
        hint = "; JSON takes double quotes" if error.doc[error.pos : error.pos + 1] == "'" else ""
        cut = "; was the file cut?" if not error.doc[error.pos :].strip() or "Unterminated" in error.msg else ""
        words = f"no JSON, {at}{hint}{cut}"
    else:
        words = reason(error)
    raise DataError(f"cannot read {named(path)}{where}: {words}") from error


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {dict: "an object", list: "a list", bool: "a boolean", str: "a bare value"}
    return kinds.get(type(value), "a bare number")


def _is_talk(value: Any) -> bool:
    """Whether a list holds the turns of a conversation, which are a cell and no records."""
    turns = value if isinstance(value, list) else ()
    return bool(turns) and all(isinstance(one, dict) and any(keys <= one.keys() for keys in _TURNS) for one in turns)


def _records(path: Path, content: Any) -> Sequence[Any]:
    """Find the records of a file that is one JSON value."""
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        raise DataError(f"{named(path)} holds {_kind(content)}, no records: write a list of objects, or one in a line")
    if any(map(_is_talk, content.values())):
        return [content]
    data = content.get("data")
    columns = content.get("columns")
    if isinstance(data, list) and isinstance(columns, list) and all(isinstance(row, list) for row in data):
        return [dict(zip(columns, row, strict=True)) for row in _whole(path, data, columns)]  # pandas' "split"
    lists = {name: value for name, value in content.items() if isinstance(value, list)}
    tables = {name: value for name, value in lists.items() if value and all(isinstance(row, dict) for row in value)}
    if "data" in tables:
        return tables["data"]
    if len(lists) == len(content) > 1 and not tables:
        return _from_columns(path, lists)
    if len(tables) > 1:
        raise DataError(f"{named(path)} holds several lists of records ({few(tables)}): write one file for each")
    if tables:
        return next(iter(tables.values()))
    keyed = {name: value for name, value in content.items() if isinstance(value, dict)}
    if len(keyed) == len(content) > 1 and len({tuple(value) for value in keyed.values()}) == 1:
        if all(name.isdigit() for name in keyed) and not all(name.isdigit() for name in next(iter(keyed.values()))):
            return list(keyed.values())  # pandas' "index"
        return _from_columns(path, {name: list(value.values()) for name, value in keyed.items()})  # pandas' "columns"
    nested = sum(isinstance(value, list | dict) for value in content.values())
    if nested > 1 or (nested and not any(isinstance(value, str) for value in content.values())):
        raise DataError(f"{named(path)} holds an object without records ({few(content)}): write a list of objects")
    return [content]


def _whole(path: Path, rows: Sequence[Sequence[Any]], columns: Sequence[Any]) -> Sequence[Sequence[Any]]:
    bad = next((index for index, row in enumerate(rows) if len(row) != len(columns)), None)
    if bad is not None:
        raise DataError(f"row {bad} of {named(path)} has {len(rows[bad])} cells for {len(columns)} columns")
    return rows


def _from_columns(path: Path, columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    lengths = {name: len(values) for name, values in columns.items()}
    first, *others = lengths
    other = next((name for name in others if lengths[name] != lengths[first]), None)
    if other is not None:
        raise DataError(
            f"columns {shown(first)} and {shown(other)} of {named(path)} have {lengths[first]} and {lengths[other]} "
            "values: make them as long as each other"
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _table(path: Path, records: Sequence[Any]) -> RecordTable:
    bad = next((index for index, record in enumerate(records) if not isinstance(record, dict)), None)
    if bad is not None:
        raise DataError(f"row {bad} of {named(path)} is {_kind(records[bad])}, no record: drop it, or write an object")
    if not records:
        raise DataError(f"file {named(path)} has no rows: its list is empty")
    table = RecordTable(path, records)
    if not table.names:
        raise DataError(f"file {named(path)} has no columns: its records are empty")
    odd = next((name for name in table.names if not isinstance(name, str)), None)
    if odd is not None:
        raise DataError(f"{named(path)} names a column {shown(odd)}: column names are strings")
    return table
