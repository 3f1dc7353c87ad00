"""Tokens, labels and losses are those of TRL's SFTTrainer on the same rows."""

import pathlib

import datasets
import pytest
import torch
import trl
from transformers import LlamaConfig, LlamaForCausalLM

from chats import CHATML, MARKED, make_tokenizer
from foretune.language.encode import collate, encode_rows
from foretune.language.load import language_task_from_datasets

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # trl 1.16 on 5.23
]


def turn(role, content):
    return {"role": role, "content": content}


TEXTS = [{"text": "the film was good"}, {"text": "what is the colour of the sky? " * 3}, {"text": "ended<|end|>"}]
COMPLETIONS = [
    {"prompt": "the film ", "completion": "was good"},
    {"prompt": "the film was go", "completion": "od and thin"},  # tokens merge across the border
    {"prompt": "", "completion": "ünïcödé 🎬"},
    {"prompt": "a", "completion": "b<|end|>"},
    {"prompt": "what is the colour of the sky? " * 9, "completion": "blue"},  # nothing is left of the completion
]
TALKS = [
    [turn("user", "what is the colour?"), turn("assistant", "it is blue")],
    [turn("system", "be good"), turn("user", "why?"), turn("assistant", "thin"), turn("user", "a\n"),
     turn("assistant", "the plot was thin")],
    [turn("user", "the film? " * 9), turn("assistant", "good " * 9)],
]  # fmt: skip
MESSAGES = [{"messages": talk} for talk in TALKS]
CHATS = [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in TALKS]
SEVERAL = [{"prompt": talk[:1], "completion": talk[1:]} for talk in TALKS]
SHAREGPT = [
    {"conversations": [{"from": one["role"], "value": one["content"]} for one in talk]} for talk in TALKS
]  # fmt: skip

CASES = {
    "texts": (TEXTS, None, {}),
    "completions": (COMPLETIONS, None, {}),
    "completions, all": (COMPLETIONS, "all", {"completion_only_loss": False}),
    "messages": (MESSAGES, None, {}),
    "messages, assistant": (MESSAGES, "assistant", {"assistant_only_loss": True}),
    "chats": (CHATS, None, {}),
    "chats, all": (CHATS, "all", {"completion_only_loss": False}),
    "chats, assistant": (CHATS, "assistant", {"assistant_only_loss": True}),
    "several turns": (SEVERAL, "completion", {}),
    "several turns, assistant": (SEVERAL, "assistant", {"assistant_only_loss": True}),
    "conversations": (SHAREGPT, None, {}),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def trainer_on(rows, model, tokenizer, folder, **options):
    arguments = trl.SFTConfig(output_dir=folder, report_to="none", use_cpu=True, packing=False, **options)
    train = datasets.Dataset.from_list(rows)
    return trl.SFTTrainer(model=model, args=arguments, train_dataset=train, processing_class=tokenizer)


def batch_of(trainer):
    # what the trainer hands to its collator
    columns = trainer.train_dataset.select_columns(["input_ids", "labels"])
    return trainer.data_collator(list(columns))


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("max_length", [24, 200])
@pytest.mark.parametrize("case", CASES)
def test_tokens_and_labels_are_those_of_trl(case, max_length, begins, model, tmp_path):
    rows, loss_on, options = CASES[case]
    theirs = trainer_on(rows, model, make_tokenizer(MARKED, begins=begins), tmp_path, max_length=max_length, **options)
    tokenizer = make_tokenizer(MARKED, begins=begins)
    task = language_task_from_datasets(datasets.Dataset.from_list(rows))
    ours = encode_rows(task.train.rows, tokenizer, max_length=max_length, loss_on=loss_on)
    assert [feature["input_ids"] for feature in ours.features] == [
        list(ids) for ids in theirs.train_dataset["input_ids"]
    ]
    assert [feature["labels"] for feature in ours.features] == [list(ids) for ids in theirs.train_dataset["labels"]]
    batch, expected = collate(ours.features, tokenizer.pad_token_id), batch_of(theirs)
    assert set(batch) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(batch[name], values, rtol=0, atol=0)
    if max_length == 24:
        assert ours.n_truncated > 0
    assert len(ours.kept) == len(rows) - ours.n_emptied


def test_some_rows_are_emptied_by_the_cut(model, tmp_path):
    tokenizer = make_tokenizer()
    theirs = trainer_on(COMPLETIONS, model, make_tokenizer(), tmp_path, max_length=24)
    task = language_task_from_datasets(datasets.Dataset.from_list(COMPLETIONS))
    ours = encode_rows(task.train.rows, tokenizer, max_length=24)
    assert ours.kept == (0, 1, 2, 3)
    assert ours.n_emptied == 1
    assert len(theirs.train_dataset) == 4


def test_turns_told_by_prefixes_are_those_that_a_template_marks(model, tmp_path):
    theirs = trainer_on(MESSAGES, model, make_tokenizer(MARKED), tmp_path, max_length=200, assistant_only_loss=True)
    task = language_task_from_datasets(datasets.Dataset.from_list(MESSAGES))
    ours = encode_rows(task.train.rows, make_tokenizer(CHATML), max_length=200, loss_on="assistant")
    assert [feature["labels"] for feature in ours.features] == [list(ids) for ids in theirs.train_dataset["labels"]]


@pytest.mark.parametrize("case", ["texts", "completions", "chats", "messages, assistant"])
def test_the_loss_is_that_of_trl(case, model, tmp_path):
    rows, loss_on, options = CASES[case]
    tokenizer = make_tokenizer(MARKED)
    theirs = trainer_on(rows, model, make_tokenizer(MARKED), tmp_path, max_length=48, **options)
    with torch.no_grad():
        expected = theirs.compute_loss(theirs.model, batch_of(theirs))
    task = language_task_from_datasets(datasets.Dataset.from_list(rows))
    ours = encode_rows(task.train.rows, tokenizer, max_length=48, loss_on=loss_on)
    batch = collate(ours.features, tokenizer.pad_token_id)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:]
    known = targets != -100
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    assert int(known.sum()) == sum(ours.n_targets)
    loss = -(chosen * known).sum() / sum(ours.n_targets)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


TEMPLATES = pathlib.Path(trl.__file__).parent / "chat_templates"


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "gemma", "phi3", "deepseekv3"])
def test_templates_of_models_are_written_as_trl_writes_them(name, model, tmp_path):
    plain = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    marked = (TEMPLATES / f"{name}_training.jinja").read_text(encoding="utf-8")
    of_users = [talk for talk in TALKS if talk[0]["role"] == "user"]  # gemma has no system
    whole, parted = (
        [{"messages": talk} for talk in of_users],
        [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in of_users],
    )
    for rows, template, loss_on, options in (
        (whole, plain, None, {}),
        (parted, plain, None, {}),
        (whole, marked, "assistant", {"assistant_only_loss": True}),
    ):
        theirs = trainer_on(rows, model, make_tokenizer(template, begins=True), tmp_path, max_length=200, **options)
        task = language_task_from_datasets(datasets.Dataset.from_list(rows))
        tokenizer = make_tokenizer(template, begins=True)
        ours = encode_rows(task.train.rows, tokenizer, max_length=200, loss_on=loss_on)
        for key in ("input_ids", "labels"):
            assert [feature[key] for feature in ours.features] == [list(ids) for ids in theirs.train_dataset[key]]
