"""Rows that a language model learns from, in one form whatever the columns were, and the task that they pose."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from foretune.settings.groups import LanguageKind, LossOn

ROLES = ("system", "user", "assistant", "tool")
FormatName = Literal["text", "prompt-completion", "messages", "instruction"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: system, user, assistant or tool.
        content: What is said.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Text:
    """A text, all of which is learnt.

    Attributes:
        text: It.
    """

    text: str


@dataclass(frozen=True)
class Completion:
    """A text and how it goes on.

    Attributes:
        prompt: What is given; may be empty.
        completion: What is learnt.
    """

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        prompt: Messages that are given; none where the row is one list of messages.
        completion: The messages after them, or all.
    """

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]


Row = Text | Completion | Chat


@dataclass(frozen=True)
class LanguageSplit:
    """Rows of one split.

    Attributes:
        name: Name of the split.
        rows: Its rows, all of one format and none of them empty.
    """

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class LanguageTask:
    """What a language model is to learn.

    Attributes:
        source: Path, hub id, or a word for data from memory.
        train: Split that trains.
        evaluation: Split that the forecast is for, None if there is none.
        columns: Columns in use.
        format: What they hold.
        fingerprint: SHA-256 of the rows.
        config_name: Configuration of a hub data set.
        loss_on: Which tokens carry loss; None for the completion where a row has a prompt, else all.
        kind: What was asked for; None leaves it to the model.
    """

    source: str
    train: LanguageSplit
    evaluation: LanguageSplit | None
    columns: tuple[str, ...]
    format: FormatName
    fingerprint: str
    config_name: str | None = None
    loss_on: LossOn | None = None
    kind: LanguageKind | None = None


def fingerprint(train: Sequence[Row], evaluation: Sequence[Row] | None) -> str:
    """Name the content of a task.

    Args:
        train: Rows of the training split.
        evaluation: Those of the evaluation split, if there is one.

    Returns:
        SHA-256 of kinds and texts of the rows, in hexadecimal.
    """
    digest = hashlib.sha256()
    for rows in (train, evaluation):
        # JSON on lines of their own: no two lists of rows give the same bytes
        digest.update(b"null\n" if rows is None else b"%d\n" % len(rows))
        for row in rows or ():
            digest.update(json.dumps([type(row).__name__, *_parts(row)]).encode() + b"\n")
    return digest.hexdigest()


def _parts(row: Row) -> list[object]:
    if isinstance(row, Text):
        return [row.text]
    if isinstance(row, Completion):
        return [row.prompt, row.completion]
    return [[[one.role, one.content] for one in messages] for messages in (row.prompt, row.completion)]
