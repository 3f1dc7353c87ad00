"""Messages of conversations as data sets hold them: lists of records, or JSON that spells such a list."""

import json
import logging
from collections.abc import Sequence
from typing import Any, NoReturn

from foretune.errors import DataError, few, shown
from foretune.language.rows import ROLES, Message
from foretune.readers.table import Place, is_missing, is_unicode

_LOG = logging.getLogger(__name__)
_SHAREGPT = {"human": "user", "gpt": "assistant"}
# Chat templates write these into the tokens: to leave them out would train on another text.
_RENDERED = ("tool_calls", "reasoning_content", "thinking")
_KNOWN = {"role", "content", "from", "value", *_RENDERED}


def spells_messages(values: Sequence[Any]) -> bool:
    """Tell a column of messages from one of texts.

    Args:
        values: Its cells.

    Returns:
        Whether all cells are lists, or JSON that spells lists of records with role and content or from and value;
        missing cells do not count.
    """
    held = [value for value in values if not _is_empty(value)]
    return bool(held) and all(isinstance(value, list) or _is_spelled(value) for value in held)


def _is_empty(cell: Any) -> bool:
    return is_missing(cell) or (isinstance(cell, str) and not cell.strip())


def _is_spelled(cell: Any) -> bool:
    if not isinstance(cell, str) or not cell.lstrip().startswith("["):
        return False
    try:
        content = json.loads(cell)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, list) and all(
        isinstance(one, dict) and ({"role", "content"} <= one.keys() or {"from", "value"} <= one.keys())
        for one in content
    )


def read_messages(values: Sequence[Any], *, place: Place) -> list[tuple[Message, ...]]:
    """Read a column of messages.

    Args:
        values: Its cells: lists of records with role and content, or with from and value as ShareGPT has them (human
            is user, gpt is assistant), or JSON of such a list. What else a record says is left out.
        place: Where it stands, for messages.

    Returns:
        Messages of each row; none where the cell is missing or blank.

    Raises:
        DataError: If a cell is no such list, a role is unknown, or a message has no text or more than a text.
    """
    left_out: set[str] = set()
    rows = [_read(value, place, index, left_out) for index, value in enumerate(values)]
    if left_out:
        _LOG.warning("%s: messages are read for role and content; left out: %s", place, few(sorted(left_out)))
    return rows


def _read(cell: Any, place: Place, index: int, left_out: set[str]) -> tuple[Message, ...]:
    if _is_empty(cell):
        return ()
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            raise DataError(
                f"{place.row(index)} is no list of messages ({shown(cell)}): write JSON, "
                '[{"role": "user", "content": "…"}, …], or set --text-column'
            ) from None
    if not isinstance(cell, list):
        _refuse(place, index, f"holds {type(cell).__name__}, no list of messages ({shown(cell)})", "make it a list")
    return tuple(_message(one, place, index, number, left_out) for number, one in enumerate(cell))


def _message(record: Any, place: Place, index: int, number: int, left_out: set[str]) -> Message:
    which = f"message {number}"
    if not isinstance(record, dict):
        _refuse(place, index, f"{which} is {shown(record)}, no record", "give it a role and a content")
    own = {name: value for name, value in record.items() if value is not None}
    rendered = next((name for name in _RENDERED if own.get(name)), None)
    if rendered is not None:
        _refuse(place, index, f"{which} has {rendered}, which are not supported", "write them into content, or drop it")
    left_out |= own.keys() - _KNOWN
    role = own.get("role", own.get("from"))
    role = _SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        said = "no role" if role is None else f"the unknown role {shown(role)}"
        _refuse(place, index, f"{which} has {said}", f"use {', '.join(ROLES)}")
    content = own.get("content", own.get("value"))
    if content is None:
        _refuse(place, index, f"{which} ({role}) has no content", "give it a text, or drop the row")
    if not isinstance(content, str):
        said = f"the content of {which} ({role}) is a {type(content).__name__}, no text ({shown(content)})"
        _refuse(place, index, said, "write it as one text; images and the like are not supported")
    if not is_unicode(content):
        _refuse(place, index, f"{which} ({role}) holds half of a surrogate pair", "mend it, or drop the row")
    return Message(str(role), content)


def _refuse(place: Place, index: int, what: str, remedy: str) -> NoReturn:
    raise DataError(f"{place.row(index)}: {what}: {remedy}")
