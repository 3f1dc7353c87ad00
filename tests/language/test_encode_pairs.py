"""Rows of encoder-decoders: tokens are those of transformers' examples, batches those of DataCollatorForSeq2Seq."""

import logging

import pytest
import torch
import transformers as tf

import pairs
from foretune.errors import ConfigError, DataError
from foretune.language.encode import targets_of
from foretune.language.encode_pairs import encode_pairs
from foretune.language.rows import Chat, Completion, Message, Text

ROWS = [Completion(row["prompt"], row["completion"]) for row in pairs.rows(8)]


def expected(tokenizer, max_length):
    """As transformers' run_summarization and run_translation."""
    model_inputs = tokenizer([row.prompt for row in ROWS], max_length=max_length, truncation=True)
    labels = tokenizer(text_target=[row.completion for row in ROWS], max_length=max_length, truncation=True)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(
            model_inputs["input_ids"], model_inputs["attention_mask"], labels["input_ids"], strict=True
        )
    ]


@pytest.mark.parametrize("name", pairs.FAMILIES)
@pytest.mark.parametrize("max_length", [8, 64])
def test_batches_are_those_of_the_collator_of_transformers(name, max_length):
    language = pairs.own(name)
    encoded = encode_pairs(ROWS, language.tokenizer, max_length=max_length, vocab_size=pairs.VOCABULARY)
    rows = expected(language.tokenizer, max_length)
    assert list(encoded.features) == rows
    tokenizer = language.tokenizer
    cut = [
        max(len(tokenizer(row.prompt)["input_ids"]), len(tokenizer(row.completion)["input_ids"])) > max_length
        for row in ROWS
    ]
    assert (encoded.n_truncated, encoded.n_emptied, encoded.kind) == (sum(cut), 0, "seq2seq")
    assert any(cut) == (max_length == 8)
    assert encoded.n_targets == tuple(len(row["labels"]) for row in rows)
    collator = tf.DataCollatorForSeq2Seq(language.tokenizer, model=language.model)
    theirs, ours = collator(rows), language.collate(encoded.features)
    assert set(ours) == set(theirs) == {"input_ids", "attention_mask", "labels", "decoder_input_ids"}
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with torch.no_grad():
        loss = language.model(**theirs).loss
        logits = language.model(**{key: value for key, value in ours.items() if key != "labels"}).logits
    own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets_of(ours["labels"], 0).flatten())
    torch.testing.assert_close(own, loss)


def test_no_call_grows_with_the_rows():
    tokenizer = pairs.tokenizer_of()
    many = encode_pairs([Completion("a", "b")] * 2050, tokenizer, max_length=8)
    assert len(many.features) == 2050


def test_no_warning_of_long_rows(caplog):
    with caplog.at_level(logging.WARNING):
        encode_pairs([Completion("a" * 99, "b" * 99)], pairs.tokenizer_of(), max_length=8)
    assert not caplog.records


def test_rows_without_a_token_to_learn_are_left_out():
    tokenizer = pairs.tokenizer_of("bart")
    short = encode_pairs([Completion("a", "b"), Completion("a", "")], tokenizer, max_length=8)
    assert (short.kept, short.n_emptied) == ((0,), 1)
    with pytest.raises(DataError, match="no completion of 1 rows has a token that carries loss: raise max_length"):
        encode_pairs([Completion("a", "b")], tokenizer, max_length=2)  # begin and end alone


CHAT = Chat((), (Message("user", "a"), Message("assistant", "b")))


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            Text("a"),
            {},
            "row 0 is a text, and a sequence-to-sequence model reads a prompt and writes a completion: give",
        ),
        (CHAT, {}, "row 0 is a conversation, and .* give the columns prompt and completion"),
        (Completion("a", ""), {}, "no completion of 1 rows .* give completions that the tokenizer knows"),
        (Completion("a", "b"), {"max_length": 1}, "a completion needs 2 tokens"),
        (Completion("a", "b"), {"vocab_size": 5}, "take the tokenizer that belongs to the model"),
    ],
)
def test_what_cannot_be_learnt_is_refused(row, options, message):
    with pytest.raises(DataError, match=message):
        encode_pairs([row], pairs.tokenizer_of(), **{"max_length": 9, **options})


def test_an_empty_prompt_needs_a_token():
    bare = pairs.tokenizer_of()
    assert encode_pairs([Completion("", "b")], bare, max_length=9).features[0]["input_ids"] == [0]
    bare.backend_tokenizer.post_processor = None
    with pytest.raises(DataError, match="the prompt of row 1 is empty, and the tokenizer puts no token there: fill it"):
        encode_pairs([Completion("a", "b"), Completion("", "b")], bare, max_length=9)


@pytest.mark.parametrize("loss_on", ["all", "assistant"])
def test_the_completion_alone_carries_loss(loss_on):
    with pytest.raises(ConfigError, match="of a sequence-to-sequence model the completion carries loss, leave it out"):
        encode_pairs(ROWS, pairs.tokenizer_of(), max_length=9, loss_on=loss_on)
    assert encode_pairs(ROWS, pairs.tokenizer_of(), max_length=9, loss_on="completion").n_emptied == 0
