"""Columns of a data set: which hold the texts and the labels."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from foretune.errors import DataError, few, shown
from foretune.readers.table import Place, is_missing, is_number, is_unicode

_LOG = logging.getLogger(__name__)
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
TEXTS = (
    "text",
    "sentence",
    "content",
    "review",
    "review_text",
    "review_body",
    "comment",
    "document",
    "tweet",
    "utterance",
    "question",
    "body",
    "title",
)
LABELS = (
    "label",
    "labels",
    "target",
    "class",
    "category",
    "coarse_label",
    "label_text",
    "sentiment",
    "intent",
    "topic",
    "stars",
    "rating",
    "score",
    "similarity_score",
    "tags",
)
_NO_TEXT = (bool, list, tuple, dict, bytes)


@dataclass(frozen=True)
class Columns:
    """Names of the columns in use.

    Attributes:
        text: One text column, or two for pairs.
        labels: The label column, or several.
    """

    text: tuple[str, ...]
    labels: tuple[str, ...]


def find_columns(
    names: Sequence[str],
    strings: Iterable[str],
    *,
    text: Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
) -> Columns:
    """Find text and label columns by the usual names, unless they are given.

    Args:
        names: All columns.
        strings: Those that hold texts; asked for only if no name is a usual one.
        text: One or two text columns, None to find them.
        label: Label column, or several; None to find one.

    Returns:
        The columns.

    Raises:
        DataError: If one is missing, with those that exist.
    """
    text = (text,) if isinstance(text, str) else text
    labels = (label,) if isinstance(label, str) else tuple(label or ())
    for given, flag in ((text or (), "--text-column"), (labels, "--label-column")):
        for name in given:
            if name not in names:
                raise DataError(_missing(name, names, flag))
    if text is not None and not 1 <= len(text) <= 2:
        raise DataError(f"{len(text)} text columns given: --text-column takes one, or two for pairs of texts")
    for name in labels:
        if name in (text or ()):
            raise DataError(
                f"column {name!r} is named for the text and for the label: set --text-column, --label-column"
            )
        if labels.count(name) > 1:
            raise DataError(f"column {name!r} is named twice in --label-column: name each once")
    lower = {name.lower(): name for name in reversed(names)}
    if not labels:
        usual = (lower[name] for name in LABELS if name in lower and lower[name] not in (text or ()))
        labels = tuple(usual)[:1]
    if not labels:
        raise DataError(_not_found("label", names))
    return Columns(tuple(text) if text is not None else _texts(names, lower, strings, labels), labels)


def _texts(
    names: Sequence[str], lower: Mapping[str, str], strings: Iterable[str], labels: Sequence[str]
) -> tuple[str, ...]:
    """The text columns by their usual names, else the only one with texts."""
    free = {word: name for word, name in lower.items() if name not in labels}
    for pair in PAIRS:
        if all(name in free for name in pair):
            return tuple(free[name] for name in pair)
    for name in TEXTS:
        if name in free:
            return (free[name],)
    rest = [name for name in strings if name not in labels]
    if len(rest) == 1:
        _LOG.info("text column %r: the only one that holds text", rest[0])
        return (rest[0],)
    raise DataError(_not_found("text", names))


def _not_found(kind: str, names: Sequence[str]) -> str:
    hint = "; it is the only one: separate columns by commas in .csv, by tabs in .tsv" if len(names) == 1 else ""
    return f"no {kind} column found among {few(names)}: name it with --{kind}-column{hint}"


def _missing(name: str, names: Sequence[str], flag: str) -> str:
    near = get_close_matches(name, names, n=1)
    hint = f" (did you mean {shown(near[0])}?)" if near else ""
    return f"column {shown(name)} does not exist{hint}: the data set has {few(names)}; set {flag}"


def holds_text(values: Sequence[Any]) -> bool:
    """Tell a column of texts from one of numbers, also written as strings, or of anything else.

    Args:
        values: Some of its values.

    Returns:
        Whether one of them is a string that spells no number.
    """
    return any(isinstance(value, str) and value and not is_number(value) for value in values)


def read_texts(values: Sequence[Any], *, place: Place) -> list[str]:
    """Read a text column that has a text in every row.

    Args:
        values: Its values; numbers and dates are written out.
        place: Where it stands, for messages.

    Returns:
        Texts.

    Raises:
        DataError: If texts are missing or blank, or a value is none.
    """
    texts = write_out(values, place=place)
    empty = [row for row, text in enumerate(texts) if not text or text.isspace()]
    if empty:
        count = "1 empty text" if len(empty) == 1 else f"{len(empty)} empty texts"
        where = f"split {shown(place.split)} has {count} in column {shown(place.column)}"
        raise DataError(f"{where}, first in {place.cell(empty[0])}: drop these rows")
    return texts


def write_out(values: Sequence[Any], *, place: Place) -> list[str]:
    """Write the values of a text column as texts.

    Args:
        values: Its values; numbers and dates are written out.
        place: Where it stands, for messages.

    Returns:
        Texts, empty where a value is missing.

    Raises:
        DataError: If a value is no text, or holds half of a surrogate pair.
    """
    kinds = {type(value) for value in values}
    if any(issubclass(kind, _NO_TEXT) for kind in kinds) or (float in kinds and any(map(_is_infinite, values))):
        row, value = next(
            (row, value) for row, value in enumerate(values) if isinstance(value, _NO_TEXT) or _is_infinite(value)
        )
        raise DataError(
            f"{place} holds {type(value).__name__} values, no text, first in {place.cell(row)} ({shown(value)}): "
            "write it as a text, drop the row, or set --text-column"
        )
    texts = ["" if is_missing(value) else str(value) for value in values]
    broken = next((row for row, text in enumerate(texts) if not text.isascii() and not is_unicode(text)), None)
    if broken is not None:
        raise DataError(f"text in {place.row(broken)} holds half of a surrogate pair: mend it, or drop the row")
    return texts


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and math.isinf(value)
