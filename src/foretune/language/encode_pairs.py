"""Prompts and completions as an encoder-decoder takes them: tokens of the one to read, of the other to write."""

from collections.abc import Iterator, Sequence
from typing import Any

from foretune.errors import ConfigError, DataError, border
from foretune.language.encode import AT_ONCE, EncodedRows, check_ids
from foretune.language.rows import Completion, Row, Text
from foretune.settings.groups import LossOn

_REMEDY = "give the columns prompt and completion, or name the two with --text-column"


def encode_pairs(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    loss_on: LossOn | None = None,
    vocab_size: int | None = None,
) -> EncodedRows:
    """Tokenise prompts and completions as transformers' examples of sequence-to-sequence models do.

    `input_ids` is `tokenizer(prompt)` and `labels` is `tokenizer(text_target=completion)`, both with the special tokens
    that the tokenizer puts there, and cut to `max_length` tokens as it cuts them: an end token stays at the end. Every
    label carries loss. A row of whose completion nothing but special tokens is left is left out.

    Args:
        rows: Rows.
        tokenizer: Tokenizer of transformers.
        max_length: Most tokens of a prompt, and of a completion.
        loss_on: None or completion.
        vocab_size: How many tokens the model embeds; None does not ask.

    Returns:
        Tokens of the rows that carry loss.

    Raises:
        ConfigError: If loss is asked for on other tokens.
        DataError: If a row is no prompt with a completion, a prompt gives no token, no row carries loss, or the
            tokenizer has tokens that the model does not have.
    """
    if loss_on not in (None, "completion"):
        raise ConfigError(
            f"loss_on = {loss_on!r}: of a sequence-to-sequence model the completion carries loss, leave it out"
        )
    if max_length < 2:
        raise DataError(f"max_length = {max_length}: a completion needs 2 tokens, its last one is its end; raise it")
    pairs = [_pair(row, position) for position, row in enumerate(rows)]
    added = tokenizer.num_special_tokens_to_add(pair=False)
    features, kept, n_truncated = [], [], 0
    read = _ids([prompt for prompt, _ in pairs], tokenizer, max_length, as_target=False)
    written = _ids([completion for _, completion in pairs], tokenizer, max_length, as_target=True)
    for position, ((ids, longer), (labels, cut)) in enumerate(zip(read, written, strict=True)):
        for each in (ids, labels):
            check_ids(each, tokenizer, vocab_size, position)
        if not ids:  # nothing to attend to: what the decoder reads would depend on the padding
            raise DataError(f"the prompt of row {position} is empty, and the tokenizer puts no token there: fill it")
        n_truncated += longer or cut
        if len(labels) > added:
            features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
            kept.append(position)
    if not features:
        remedy = "raise max_length" if n_truncated else "give completions that the tokenizer knows"
        raise DataError(f"no completion of {len(rows)} rows has a token that carries loss: {remedy}")
    return EncodedRows(tuple(features), n_truncated, len(rows) - len(features), tuple(kept), max_length, "seq2seq")


def _pair(row: Row, position: int) -> tuple[str, str]:
    if not isinstance(row, Completion):
        held = "a text" if isinstance(row, Text) else "a conversation"
        raise DataError(
            f"row {position} is {held}, and a sequence-to-sequence model reads a prompt and writes a completion: "
            f"{_REMEDY}"
        )
    return row.prompt, row.completion


def _ids(texts: Sequence[str], tokenizer: Any, max_length: int, *, as_target: bool) -> Iterator[tuple[list[int], bool]]:
    """Tokens of each text, and whether it was longer."""
    for start in range(0, len(texts), AT_ONCE):
        some = list(texts[start : start + AT_ONCE])
        for text, ids in zip(some, _encoded(some, tokenizer, None, as_target=as_target), strict=True):
            if len(ids) <= max_length:
                yield ids, False
            else:
                yield _encoded([text], tokenizer, max_length, as_target=as_target)[0], True


def _encoded(texts: list[str], tokenizer: Any, max_length: int | None, *, as_target: bool) -> list[list[int]]:
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
    given = {"text_target" if as_target else "text": texts}
    with border(DataError, "the tokenizer cannot read the texts"):
        ids: list[list[int]] = tokenizer(**given, **cut, return_attention_mask=False, verbose=False)["input_ids"]
        return ids
