"""Columns of a data set for language models: which format they follow, and the rows that they hold."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from foretune.errors import DataError, few, shown
from foretune.language.messages import read_messages, spells_messages
from foretune.language.rows import Chat, Completion, FormatName, Row, Text
from foretune.readers.table import Split, is_missing
from foretune.tasks.columns import write_out

_LOG = logging.getLogger(__name__)
_PREFERENCE = ("chosen", "rejected")
_MESSAGES = ("messages", "conversations")
_KNOWN = (
    "text, prompt with completion, messages or conversations (lists of role and content), "
    "instruction with output (and input)"
)
# Columns that trl writes into the prompt of a conversation.
_OF_TEMPLATES = ("tools", "chat_template_kwargs")
_BOOLEANS = ("true", "false")


@dataclass(frozen=True)
class Format:
    """What the columns of a split hold.

    Attributes:
        name: text, prompt-completion, messages or instruction.
        columns: Columns in use: the text or the messages; prompt and completion; instruction, input if there is one,
            and output.
    """

    name: FormatName
    columns: tuple[str, ...]


def find_format(split: Split, text_column: Sequence[str] | None = None) -> Format:
    """Find out what a split holds, by the names that TRL knows and those of Alpaca and ShareGPT.

    Where columns of several formats stand, those of TRL go first, as they do there: prompt with completion, messages,
    conversations, text; then instruction with output.

    Args:
        split: Split.
        text_column: One column, of texts or of messages, or two, prompt and completion; None finds them.

    Returns:
        The format.

    Raises:
        DataError: If no columns are known, one that is named is missing, or the rows are preferences.
    """
    names = split.table.names
    if text_column is not None:
        return _given(split, tuple(text_column))
    lower = {name.lower(): name for name in reversed(names)}

    def found(*words: str) -> tuple[str, ...] | None:
        return tuple(lower[word] for word in words) if all(word in lower for word in words) else None

    _refuse_preferences(split, lower)
    completion = found("prompt", "completion")
    if completion is not None:
        return Format("prompt-completion", completion)
    for word in (*_MESSAGES, "text"):
        column = found(word)
        if column is not None:
            return Format("text" if word == "text" else "messages", column)
    instruction = found("instruction", "input", "output") or found("instruction", "output")
    if instruction is not None:
        return Format("instruction", instruction)
    raise DataError(
        f"no columns of a language model's data found among {few(names)}: known are {_KNOWN}; rename them, or name "
        f"one (text) or two (prompt, completion) with --text-column{split.table.where_names_stand}"
    )


def _given(split: Split, columns: tuple[str, ...]) -> Format:
    names = split.table.names
    for name in columns:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f" (did you mean {shown(near[0])}?)" if near else ""
            raise DataError(
                f"column {shown(name)} does not exist{hint}: the data set has {few(names)}; set --text-column"
            )
    if len(columns) == 2 and columns[0] != columns[1]:
        return Format("prompt-completion", columns)
    if len(columns) != 1:
        raise DataError(
            f"text columns {few(columns) or 'none'}: --text-column takes one (text or messages), or two (prompt, "
            "completion)"
        )
    # a text that happens to be JSON stays a text, unless the name of its column says what it is
    values = split.values(columns[0])
    named = columns[0].lower() in _MESSAGES
    lists = any(isinstance(value, list) for value in values)
    return Format("messages" if named or lists else "text", columns)


def holds_preferences(split: Split) -> bool:
    """Tell whether a split holds pairs of a chosen and a rejected answer.

    Args:
        split: Split.

    Returns:
        Whether it has both columns.
    """
    return {name.lower() for name in split.table.names}.issuperset(_PREFERENCE)


def _refuse_preferences(split: Split, lower: dict[str, str]) -> None:
    remedy = "give prompt and completion, or name the columns to learn with --text-column"
    if all(word in lower for word in _PREFERENCE):
        pair = few(lower[word] for word in _PREFERENCE)
        raise DataError(f"this is preference data ({pair} in split {shown(split.name)}): {remedy}")
    if all(word in lower for word in ("prompt", "completion", "label")):
        label = lower["label"]
        held = [value for value in split.values(label) if not is_missing(value)]
        if held and all(isinstance(one, bool) or str(one).strip().lower() in _BOOLEANS for one in held):
            raise DataError(
                f"this is preference data (true or false in column {shown(label)} of split {shown(split.name)}): keep "
                f"the rows that are true and drop the column, or name the columns to learn with --text-column"
            )


def lacks(split: Split, form: Format) -> str:
    """Say why a split cannot stand beside another.

    Args:
        split: Split.
        form: Format of the other.

    Returns:
        What it lacks, in words that follow its name; nothing if it may serve.
    """
    missing = next((name for name in form.columns if not split.has(name)), None)
    if missing is not None:
        return f"has no column {shown(missing)}"
    learnt = form.columns[-1]
    if all(is_missing(one) or one == [] or (isinstance(one, str) and not one.strip()) for one in split.values(learnt)):
        return f"has nothing to learn (column {shown(learnt)} is empty in every row)"
    return ""


def read_rows(split: Split, form: Format) -> tuple[Row, ...]:
    """Read the rows of a split; empty ones are left out, with a warning that counts them.

    A row is empty where its text, its completion, its output or its list of messages is missing or blank.

    Args:
        split: Split.
        form: What its columns hold.

    Returns:
        Rows, in their order.

    Raises:
        DataError: If a cell is not what the format says, or no row is left.
    """
    rows = _rows(split, form)
    kept = tuple(row for row in rows if not _is_empty(row))
    where = f"split {shown(split.name)}"
    if not kept:
        raise DataError(
            f"{where} has no rows" + (f" but {len(rows)} empty ones: fill {few(form.columns)}" if rows else "")
        )
    if len(kept) < len(rows):
        first = next(index for index, row in enumerate(rows) if _is_empty(row))
        place = split.place(form.columns[-1])
        _LOG.warning("%s: %d empty rows left out, first %s", where, len(rows) - len(kept), place.cell(first))
    return kept


def _rows(split: Split, form: Format) -> Sequence[Row]:
    if form.name == "text":
        return [Text(text) for text in _texts(split, form.columns[0])]
    if form.name == "instruction":
        return [_instructed(*cells) for cells in zip(*(_texts(split, name) for name in form.columns), strict=True)]
    if form.name == "messages":
        _refuse_extras(split)
        return [Chat((), messages) for messages in _messages(split, form.columns[0])]
    prompt, completion = (split.values(name) for name in form.columns)
    chats = [spells_messages(prompt), spells_messages(completion)]
    lists = [any(isinstance(value, list) for value in values) for values in (prompt, completion)]
    if any(lists) or all(chats):
        for values, is_chat, name in zip((prompt, completion), chats, form.columns, strict=True):
            if not is_chat:
                row = next((i for i, one in enumerate(values) if not isinstance(one, list) and not is_missing(one)), 0)
                raise DataError(
                    f"{split.place(name).row(row)} is a text where others are messages: make prompt and completion "
                    "both texts, or both lists of messages, in every row"
                )
        _refuse_extras(split)
        pairs = zip(*(_messages(split, name) for name in form.columns), strict=True)
        return [Chat(before, after) for before, after in pairs]
    return [Completion(*cells) for cells in zip(*(_texts(split, name) for name in form.columns), strict=True)]


def _texts(split: Split, name: str) -> list[str]:
    return write_out(split.values(name), place=split.place(name))


def _messages(split: Split, name: str) -> Iterable[Any]:
    return read_messages(split.values(name), place=split.place(name))


def _refuse_extras(split: Split) -> None:
    """Refuse columns that change what a chat template writes."""
    for name in _OF_TEMPLATES:
        if split.has(name) and any(not is_missing(value) and value not in ("", [], {}) for value in split.values(name)):
            raise DataError(f"column {shown(name)} of split {shown(split.name)} is not supported: drop it")


def _instructed(instruction: str, *others: str) -> Completion:
    *given, output = others
    parts = (instruction, *(one for one in given if one.strip()))
    return Completion("\n\n".join(parts), output)


def _is_empty(row: Row) -> bool:
    if isinstance(row, Chat):
        return not row.completion
    return not (row.text if isinstance(row, Text) else row.completion).strip()
