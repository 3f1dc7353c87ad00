"""Tokens of conversations, and which of them an assistant says."""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from foretune.errors import DataError, border, shown
from foretune.language.rows import Message

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REMEDY = (
    "mark what the assistant says with {% generation %} in the tokenizer's chat template, as trl's "
    "get_training_chat_template has it for many models, or learn all tokens"
)


class Renderer:
    """Writes conversations with the chat template of a tokenizer.

    Args:
        tokenizer: Tokenizer.

    Raises:
        DataError: If it has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        template = getattr(tokenizer, "chat_template", None)
        if not template:
            raise DataError(
                f"tokenizer {shown(str(tokenizer.name_or_path))} has no chat template: take an instruct model's, "
                "set tokenizer.chat_template, or give prompt and completion as texts"
            )
        self._tokenizer = tokenizer
        template = template.get("default", "") if isinstance(template, dict) else template
        # where characters end up among the tokens is known of fast tokenizers only
        self._marks = tokenizer.is_fast and _MARK.search(template) is not None

    def ids(self, messages: Sequence[Message], where: str, *, opened: bool = False) -> list[int]:
        """Tokens of a conversation.

        Args:
            messages: Its messages.
            where: What to call it in messages of errors.
            opened: Whether to open the turn of the assistant at the end.

        Returns:
            Token ids.

        Raises:
            DataError: If the chat template refuses them.
        """
        ids: list[int] = self._apply(messages, where, add_generation_prompt=opened)["input_ids"]
        return ids

    def said(self, messages: Sequence[Message], where: str) -> list[bool]:
        """Tell which tokens of a conversation the assistant says.

        Where the chat template marks them with `{% generation %}`, those. Else for each message k of the assistant
        those that the conversation up to it has more than the conversation before it with the turn opened: the end
        of the turn, and what stands between turns, with them.

        Args:
            messages: Its messages.
            where: What to call it in messages of errors.

        Returns:
            One truth value for each token of `ids(messages)`.

        Raises:
            DataError: If the template marks nothing, and its turns cannot be told apart.
        """
        if self._marks:
            masks = self._apply(messages, where, return_assistant_tokens_mask=True)["assistant_masks"]
            return [bool(one) for one in masks]
        whole = self.ids(messages, where)
        said = [False] * len(whole)
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            upto = self.ids(messages[: number + 1], where)
            before = self.ids(messages[:number], where, opened=True) if number else self._opening(where)
            if whole[: len(upto)] != upto and upto[-1:] == [self._tokenizer.eos_token_id]:
                upto = upto[:-1]  # some templates end with it whatever stands last
            if whole[: len(upto)] != upto or upto[: len(before)] != before:
                raise DataError(
                    f"cannot tell what the assistant says in {where}: the chat template writes message {number} "
                    f"otherwise when it is the last; {_REMEDY}"
                )
            said[len(before) : len(upto)] = [True] * (len(upto) - len(before))
        return said

    def _opening(self, where: str) -> list[int]:
        """The opened turn where nothing stands before it; some templates cannot write it."""
        try:
            ids: list[int] = self._apply([], where, add_generation_prompt=True)["input_ids"]
        except DataError as error:
            what = f"cannot tell what the assistant says in {where}, which begins with it"
            raise DataError(f"{what}: begin with the user; or {_REMEDY}") from error
        return ids

    def _apply(self, messages: Sequence[Message], where: str, **options: Any) -> dict[str, Any]:
        records: list[Any] = [{"role": one.role, "content": one.content} for one in messages]
        with border(DataError, f"the chat template of the tokenizer cannot write {where}", remedy="mend the row"):
            written = self._tokenizer.apply_chat_template(
                records or [records],  # transformers takes an empty conversation only as one of several
                tokenize=True,
                return_dict=True,
                tokenizer_kwargs={"verbose": False},  # no word of sequences that are cut later
                **options,
            )
            return {name: values if records else values[0] for name, values in written.items()}


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Count how far two lists of tokens agree.

    Args:
        first: Tokens.
        second: Others.

    Returns:
        Number of equal tokens at the start.
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
