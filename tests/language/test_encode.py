import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chats import CHATML, ENDED, ENDED_MARKED, FORGETFUL, MARKED, make_tokenizer
from foretune.errors import DataError
from foretune.language.encode import NO_LOSS, collate, encode_rows
from foretune.language.rows import Chat, Completion, Message, Text

PLAIN, CHATTING, MARKING = make_tokenizer(), make_tokenizer(CHATML), make_tokenizer(MARKED)
BEGINNING = make_tokenizer(CHATML, begins=True)
texts = st.text(st.characters(codec="utf-8"), max_size=12)
messages = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), texts), max_size=4)
rows = st.one_of(
    st.builds(Text, texts),
    st.builds(Completion, texts, texts),
    st.builds(Chat, messages.map(tuple), messages.map(tuple).filter(len)),
)


@given(
    rows=st.lists(rows, min_size=1, max_size=5),
    loss_on=st.sampled_from([None, "all"]),
    max_length=st.integers(2, 40),
    tokenizer=st.sampled_from([CHATTING, BEGINNING]),
    side=st.sampled_from(["right", "left"]),
)
def test_batches_keep_ids_and_masks(rows, loss_on, max_length, tokenizer, side):
    rows = [*rows, Text("one that is never emptied")]
    encoded = encode_rows(rows, tokenizer, max_length=max_length, loss_on=loss_on)
    assert len(encoded.features) + encoded.n_emptied == len(rows)
    assert list(encoded.kept) == sorted(set(encoded.kept))
    whole = encode_rows(rows, tokenizer, max_length=10**6, loss_on=loss_on)
    batch = collate(encoded.features, tokenizer.pad_token_id, side)
    longest = max(len(feature["input_ids"]) for feature in encoded.features)
    assert {name: (values.shape, values.dtype) for name, values in batch.items()} == {
        name: ((len(encoded.features), longest), torch.int64) for name in ("input_ids", "attention_mask", "labels")
    }
    n_longer = 0
    for index, (position, feature) in enumerate(zip(encoded.kept, encoded.features, strict=True)):
        ids, labels = feature["input_ids"], feature["labels"]
        uncut = whole.features[whole.kept.index(position)]
        assert (ids, labels) == (uncut["input_ids"][:max_length], uncut["labels"][:max_length])
        n_longer += len(uncut["input_ids"]) > max_length
        assert all(label in (token, NO_LOSS) for token, label in zip(ids, labels, strict=True))
        assert encoded.n_targets[index] == sum(label != NO_LOSS for label in labels[1:]) > 0
        there = batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][there].tolist() == ids
        assert batch["labels"][index][there].tolist() == labels
        assert set(batch["input_ids"][index][~there].tolist()) <= {tokenizer.pad_token_id}
        assert set(batch["labels"][index][~there].tolist()) <= {NO_LOSS}
        # the mask is one run at its side
        run = [1] * len(ids) + [0] * (longest - len(ids))
        assert batch["attention_mask"][index].tolist() == (run if side == "right" else run[::-1])
    assert n_longer <= encoded.n_truncated <= n_longer + encoded.n_emptied


@given(messages=st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), texts), min_size=1, max_size=5))
def test_prefixes_tell_what_a_template_marks(messages):
    rows = [Chat((), tuple(messages)), Chat((), (Message("user", "a"), Message("assistant", "b")))]
    by_prefixes, by_marks = (
        encode_rows(rows, tokenizer, max_length=10**6, loss_on="assistant") for tokenizer in (CHATTING, MARKING)
    )
    assert by_prefixes == by_marks


def test_an_end_behind_all_is_of_the_last_turn():
    talk = Chat((), (Message("user", "a"), Message("assistant", "b")) * 2)
    by_prefixes, by_marks = (
        encode_rows([talk], make_tokenizer(template), max_length=99, loss_on="assistant")
        for template in (ENDED, ENDED_MARKED)
    )
    assert by_prefixes == by_marks
    assert spelled(PLAIN, by_marks.features[0]) == "b<|im_end|>\nb<|im_end|>\n<|end|>"


def spelled(tokenizer, feature):
    """What carries loss."""
    return tokenizer.decode([label for label in feature["labels"] if label != NO_LOSS])


def test_what_carries_loss():
    talk = (Message("user", "why?"), Message("assistant", "good"), Message("user", "a"), Message("assistant", "blue"))

    def learnt(row, tokenizer, loss_on=None):
        return spelled(tokenizer, encode_rows([row], tokenizer, max_length=99, loss_on=loss_on).features[0])

    assert learnt(Text("good"), PLAIN) == "good<|end|>"
    assert learnt(Text("good<|end|>"), PLAIN) == "good<|end|>"
    assert learnt(Completion("why?", "good"), PLAIN) == "good<|end|>"
    assert learnt(Completion("why?", "good"), PLAIN, "all") == "why?good<|end|>"
    assert learnt(Chat(talk[:1], talk[1:2]), CHATTING) == "good<|im_end|>\n"
    whole = "".join(f"<|im_start|>{one.role}\n{one.content}<|im_end|>\n" for one in talk)
    assert learnt(Chat((), talk), CHATTING) == whole
    assert learnt(Chat((), talk), CHATTING, "assistant") == "good<|im_end|>\nblue<|im_end|>\n"
    assert learnt(Chat(talk[:2], talk[2:]), CHATTING, "assistant") == "blue<|im_end|>\n"
    assert learnt(Chat(talk[:3], talk[3:]), MARKING, "assistant") == "blue<|im_end|>\n"


def test_rows_that_lose_all_labels_are_counted():
    rows = [Completion("a" * 9, "b"), Completion("a", "b"), Text("ab"), Completion("c" * 8, "dd")]
    encoded = encode_rows(rows, PLAIN, max_length=3)
    assert (encoded.kept, encoded.n_emptied, encoded.n_truncated, encoded.max_length) == ((1, 2), 2, 2, 3)
    # one token, which has nothing before it
    assert encode_rows([Text("<|end|>"), Text("a")], PLAIN, max_length=3).kept == (1,)
    many = encode_rows([Text(f"a{i}") for i in range(2050)], PLAIN, max_length=30)
    assert many.kept == tuple(range(2050))
    assert spelled(PLAIN, many.features[2049]) == "a2049<|end|>"


def test_nothing_long_is_warned_of(caplog):
    tokenizer = make_tokenizer(CHATML, model_max_length=4)
    encode_rows([Text("a" * 99), Chat((), (Message("user", "b" * 99),))], tokenizer, max_length=8)
    assert not caplog.text


TALK = Chat((), (Message("user", "a"), Message("assistant", "b")))
FAULTS = [
    ([Text("ab")], PLAIN, {"max_length": 1}, r"max_length = 1: a row needs 2 tokens"),
    ([Completion("a" * 9, "b")], PLAIN, {"max_length": 4},
     r"none of 1 rows has a token that carries loss after the cut to max_length = 4 tokens, which 1 exceed: raise"),
    ([Text("<|end|>")], PLAIN, {}, r"none of 1 rows has a token that carries loss: give longer texts"),
    ([Text("a")], make_tokenizer(eos_token=None), {}, r"tokenizer '.*' has no end-of-text token: set tokenizer\.eos"),
    ([TALK], PLAIN, {}, r"tokenizer '.*' has no chat template: take an instruct model's"),
    ([Text("a")], PLAIN, {"loss_on": "assistant"}, r"loss_on = 'assistant', but row 0 is no conversation"),
    ([Text("a")], PLAIN, {"loss_on": "completion"}, r"loss_on = 'completion', but row 0 has no prompt .*: use all"),
    ([TALK], CHATTING, {"loss_on": "completion"}, r"row 0 has no prompt before a completion: use assistant or all"),
    ([Text("a"), Text("good")], PLAIN, {"vocab_size": 100}, r"the token '.*' of row \d has the id \d+, and the"),
    ([Chat((), TALK.completion * 2)], make_tokenizer(FORGETFUL), {"loss_on": "assistant"},
     r"cannot tell what the assistant says in row 0: the chat template writes message 1 otherwise .*generation"),
    ([TALK], make_tokenizer("{{ raise_exception('no\nchat') }}"), {}, r"cannot write row 0: no chat; mend the row"),
    ([Chat((), TALK.completion[1:])], make_tokenizer("{{ messages[0]['role'] + 'x' }}"), {"loss_on": "assistant"},
     r"cannot tell what the assistant says in row 0, which begins with it: begin with the user"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "tokenizer", "options", "message"), FAULTS)
def test_faults_are_told_in_one_line(rows, tokenizer, options, message):
    with pytest.raises(DataError, match=message) as error:
        encode_rows(rows, tokenizer, **{"max_length": 99, **options})
    assert "\n" not in str(error.value)


def test_the_model_embeds_the_largest_token():
    largest = max(encode_rows([Text("good")], PLAIN, max_length=9).features[0]["input_ids"])
    assert encode_rows([Text("good")], PLAIN, max_length=9, vocab_size=largest + 1).kept == (0,)
    with pytest.raises(DataError, match=f"has the id {largest}, and the model embeds {largest}"):
        encode_rows([Text("good")], PLAIN, max_length=9, vocab_size=largest)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(DataError, match="no rows to put into a batch"):
        collate([], 0)
