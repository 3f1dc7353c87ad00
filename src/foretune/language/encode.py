"""Rows as tokens with labels, as TRL's SFTTrainer makes them, and batches of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from foretune.errors import DataError, border, shown
from foretune.language.rows import Chat, Completion, Row, Text
from foretune.language.spans import Renderer, common_prefix
from foretune.settings.groups import LanguageKind, LossOn

NO_LOSS = -100  # what losses of torch and transformers leave out
SHIFT: dict[LanguageKind, int] = {"causal-lm": 1, "seq2seq": 0}  # a label at t is the target of position t − shift
AT_ONCE = 1000  # texts that a tokenizer takes in one call


@dataclass(frozen=True)
class EncodedRows:
    """Tokens of rows.

    Attributes:
        features: For each kept row `input_ids`, `attention_mask` (all 1) and `labels`: the token's id where it carries
            loss, -100 where not. Logits at position t are held against the label at t + `SHIFT[kind]`.
        n_truncated: Rows that were longer than `max_length`, kept or not.
        n_emptied: Rows without a target, which are left out.
        kept: Positions of the others among the rows.
        max_length: Most tokens of a row.
        kind: Kind of the model that they are for.
    """

    features: tuple[dict[str, list[int]], ...]
    n_truncated: int
    n_emptied: int
    kept: tuple[int, ...]
    max_length: int
    kind: LanguageKind = "causal-lm"

    @property
    def n_targets(self) -> tuple[int, ...]:
        """How many tokens of each kept row carry loss."""
        return count_targets(self.features, SHIFT[self.kind])


def count_targets(features: Sequence[Mapping[str, Sequence[int]]], shift: int) -> tuple[int, ...]:
    """Count the tokens that carry loss.

    Args:
        features: Rows, with `labels`.
        shift: Labels at the front that no logits stand before.

    Returns:
        How many of each row.
    """
    return tuple(sum(label != NO_LOSS for label in feature["labels"][shift:]) for feature in features)


def targets_of(labels: Tensor, shift: int) -> Tensor:
    """Put each label to the position whose logits are held against it.

    Args:
        labels: rows × T.
        shift: The label at t is the target of position t − shift.

    Returns:
        rows × T, −100 where a position has no target.
    """
    ends = torch.full_like(labels[:, :shift], NO_LOSS)
    return torch.cat([labels[:, shift:], ends], dim=1)


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    loss_on: LossOn | None = None,
    vocab_size: int | None = None,
) -> EncodedRows:
    """Tokenise rows and label the tokens that carry loss: ids and labels are those of TRL 1.16's SFTTrainer.

    A text, or a completion that is a text, ends with the end-of-text token. A conversation is written by the
    tokenizer's chat template. The completion begins where the tokens of the prompt alone (of a conversation: with the
    turn of the assistant opened) and those of the whole part. What is longer than `max_length` loses its end. Labels of
    - all: every token;
    - completion: the tokens of the completion;
    - assistant: what the assistant says, as the template marks it, or else as its turns tell; in a row with a prompt
      only within the completion. For models whose template marks nothing TRL has templates of its own, which may
      draw the border of a turn elsewhere (Qwen2.5: a token earlier).
    TRL keeps rows that only their first token gives a label, which has nothing before it and never carries loss.

    Args:
        rows: Rows.
        tokenizer: Tokenizer of transformers.
        max_length: Most tokens of a row.
        loss_on: Which tokens carry loss; None for the completion where a row has a prompt, else all.
        vocab_size: How many tokens the model embeds; None does not ask.

    Returns:
        Tokens of the rows that carry loss.

    Raises:
        DataError: If no row does, `loss_on` does not fit a row, or the tokenizer has no end-of-text token, no chat
            template, or tokens that the model does not have.
    """
    if max_length < 2:
        raise DataError(f"max_length = {max_length}: a row needs 2 tokens, one to go on from the other; raise it")
    _check_fit(rows, loss_on)
    features, kept, n_truncated = [], [], 0
    for position, (ids, carries) in enumerate(_tokens(rows, tokenizer, loss_on)):
        check_ids(ids, tokenizer, vocab_size, position)
        n_truncated += len(ids) > max_length
        ids, carries = ids[:max_length], carries[:max_length]
        if any(carries[1:]):
            labels = [token if loss else NO_LOSS for token, loss in zip(ids, carries, strict=True)]
            features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
            kept.append(position)
    if not features:
        cut = f" after the cut to max_length = {max_length} tokens, which {n_truncated} exceed" if n_truncated else ""
        remedy = "raise max_length" if n_truncated else "give longer texts, or other loss_on"
        raise DataError(f"none of {len(rows)} rows has a token that carries loss{cut}: {remedy}")
    return EncodedRows(tuple(features), n_truncated, len(rows) - len(features), tuple(kept), max_length)


def _check_fit(rows: Sequence[Row], loss_on: LossOn | None) -> None:
    for position, row in enumerate(rows):
        if loss_on == "assistant" and not isinstance(row, Chat):
            raise DataError(
                f"loss_on = 'assistant', but row {position} is no conversation: give messages, or leave loss_on out"
            )
        if loss_on == "completion" and (isinstance(row, Text) or (isinstance(row, Chat) and not row.prompt)):
            other = "use assistant or all" if isinstance(row, Chat) else "use all"
            raise DataError(f"loss_on = 'completion', but row {position} has no prompt before a completion: {other}")


def _tokens(rows: Sequence[Row], tokenizer: Any, loss_on: LossOn | None) -> Iterator[tuple[list[int], list[bool]]]:
    """Ids of each row, and which of them carry loss, before the cut."""
    renderer = Renderer(tokenizer) if any(isinstance(row, Chat) for row in rows) else None
    if not all(isinstance(row, Chat) for row in rows) and not tokenizer.eos_token:
        raise DataError(
            f"tokenizer {shown(str(tokenizer.name_or_path))} has no end-of-text token: set tokenizer.eos_token"
        )
    for start in range(0, len(rows), AT_ONCE):
        some = rows[start : start + AT_ONCE]
        plain = [row for row in some if not isinstance(row, Chat)]
        wholes = iter(_ids([_whole(row, tokenizer.eos_token) for row in plain], tokenizer))
        prompts = iter(_ids([row.prompt for row in plain if isinstance(row, Completion)], tokenizer))
        for position, row in enumerate(some, start):
            if isinstance(row, Chat):
                assert renderer is not None
                yield _chat(row, renderer, loss_on, f"row {position}")
                continue
            ids = next(wholes)
            given = common_prefix(next(prompts), ids) if isinstance(row, Completion) else 0
            yield ids, _after(0 if loss_on == "all" else given, ids)


def _whole(row: Text | Completion, eos: str) -> str:
    before, after = ("", row.text) if isinstance(row, Text) else (row.prompt, row.completion)
    return before + after + ("" if after.endswith(eos) else eos)


def _ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    if not texts:
        return []
    with border(DataError, "the tokenizer cannot read the texts"):
        ids: list[list[int]] = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        return ids


def _after(start: int, ids: Sequence[int]) -> list[bool]:
    return [position >= start for position in range(len(ids))]


def _chat(row: Chat, renderer: Renderer, loss_on: LossOn | None, where: str) -> tuple[list[int], list[bool]]:
    messages = (*row.prompt, *row.completion)
    ids = renderer.ids(messages, where)
    start = 0
    if row.prompt and loss_on != "all":
        start = common_prefix(renderer.ids(row.prompt, where, opened=True), ids)
    carries = _after(start, ids)
    if loss_on == "assistant":
        carries = [one and said for one, said in zip(carries, renderer.said(messages, where), strict=True)]
    return ids, carries


def check_ids(ids: Sequence[int], tokenizer: Any, vocab_size: int | None, position: int) -> None:
    """Refuse a token that the model does not have.

    Args:
        ids: Tokens of a row.
        tokenizer: Tokenizer of transformers.
        vocab_size: How many tokens the model embeds; None does not ask.
        position: Of the row.

    Raises:
        DataError: Naming the token and the row.
    """
    largest = max(ids, default=0)
    if vocab_size is not None and largest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise DataError(
            f"the token {shown(token)} of row {position} has the id {largest}, and the model embeds {vocab_size}: take "
            "the tokenizer that belongs to the model, or call model.resize_token_embeddings(len(tokenizer)) and save"
        )


def collate(
    features: Sequence[Mapping[str, Sequence[int]]],
    pad_token_id: int,
    padding_side: Literal["right", "left"] = "right",
) -> dict[str, Tensor]:
    """Put rows into one batch, padded to the longest.

    Args:
        features: Rows, as `encode_rows` gives them.
        pad_token_id: Token that fills `input_ids`; `attention_mask` is filled with 0, `labels` with -100.
        padding_side: Where; right is what TRL trains with.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each rows × its longest, int64.

    Raises:
        DataError: If there are no rows.
    """
    if not features:
        raise DataError("no rows to put into a batch: give at least one")
    batch = {}
    for name, filler in (("input_ids", pad_token_id), ("attention_mask", 0), ("labels", NO_LOSS)):
        longest = max(len(feature[name]) for feature in features)
        filled = torch.full((len(features), longest), filler)
        for row, feature in zip(filled, features, strict=True):
            values = torch.tensor(feature[name])
            (row[: len(values)] if padding_side == "right" else row[longest - len(values) :]).copy_(values)
        batch[name] = filled
    return batch
