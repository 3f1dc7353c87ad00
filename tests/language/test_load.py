import json
import logging

import datasets
import pandas as pd
import pytest

from foretune.errors import ConfigError, DataError
from foretune.language.load import holds_language, language_task_from_datasets, load_language_task
from foretune.language.rows import Chat, Completion, Message, Text
from foretune.settings.groups import DataConfig
from foretune.tasks.sources import splits_in_memory


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def load(source, **options):
    return load_language_task(DataConfig(str(source), **options))


def memory(rows, **options):
    return language_task_from_datasets(datasets.Dataset.from_list(rows), **options)


def write(path, rows):
    """Lists stay lists in jsonl and parquet; csv spells them as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path, index=False)
    else:
        flat = [{name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()} for row in rows]
        pd.DataFrame(flat).to_csv(path, index=False)
    return path


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


def said(*contents):
    return tuple(Message(one["role"], one["content"]) for one in turns(*contents))


FORMATS = {
    "text": ([{"text": 'a "film", ünïcödé\nand a line'}, {"text": "b"}], "text",
             [Text('a "film", ünïcödé\nand a line'), Text("b")]),
    "completion": ([{"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": "[d]"}], "prompt-completion",
                   [Completion("a", " b"), Completion("c", "[d]")]),
    "chat": ([{"prompt": turns("a"), "completion": turns("b", first="assistant")}] * 2, "prompt-completion",
             [Chat(said("a"), said("a", "b")[1:])] * 2),
    "messages": ([{"messages": turns("a", "b")}, {"messages": turns("c", "d", "e", "f")}], "messages",
                 [Chat((), said("a", "b")), Chat((), said("c", "d", "e", "f"))]),
    "sharegpt": ([{"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
                                     {"from": "gpt", "value": "b"}]}], "messages",
                 [Chat((), (Message("system", "s"), *said("a", "b")))]),
    "alpaca": ([{"instruction": "do", "input": "", "output": "x"}, {"instruction": "do", "input": "it", "output": "y"}],
               "instruction", [Completion("do", "x"), Completion("do\n\nit", "y")]),
    "alpaca without input": ([{"instruction": "do", "output": "x"}], "instruction", [Completion("do", "x")]),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_every_file(name, suffix, tmp_path):
    rows, form, expected = FORMATS[name]
    path = write(tmp_path / f"rows{suffix}", rows)
    task = load(path)
    assert task.format == form
    assert list(task.train.rows) == expected
    assert task.columns == tuple(rows[0])
    assert (task.train.name, task.evaluation, task.config_name, task.source) == ("train", None, None, str(path))
    assert task.fingerprint == memory(rows).fingerprint


@pytest.mark.parametrize("name", FORMATS)
def test_columns_of_other_names_are_named(name, tmp_path):
    rows, _, expected = FORMATS[name]
    if len(rows[0]) > 2:
        return
    other = [{f"my_{column}": cell for column, cell in row.items()} for row in rows]
    task = load(write(tmp_path / "rows.jsonl", other), text_column=tuple(other[0]))
    assert list(task.train.rows) == expected


def test_a_column_named_messages_spells_them_and_another_is_a_text(tmp_path):
    spelled = json.dumps(turns("a", "b"))
    path = write(tmp_path / "rows.csv", [{"conversations": spelled, "body": spelled}])
    assert load(path, text_column=("conversations",)).train.rows == (Chat((), said("a", "b")),)
    assert load(path, text_column=("body",)).train.rows == (Text(spelled),)


def test_columns_of_several_formats_go_as_in_trl():
    both = {"text": "t", "instruction": "i", "output": "o"}
    assert memory([both]).train.rows == (Text("t"),)
    assert memory([{**both, "messages": turns("a", "b")}]).format == "messages"
    assert (
        memory([{**both, "messages": turns("a", "b"), "prompt": "p", "completion": "c"}]).format == "prompt-completion"
    )
    assert memory([{"prompt": "p", "messages": turns("a", "b")}]).format == "messages"
    assert memory([{"Text": "t"}]).columns == ("Text",)


def test_splits_folders_and_saved_sets(tmp_path):
    rows = [{"text": f"train {i}"} for i in range(10)]
    write(tmp_path / "set" / "train.jsonl", rows)
    write(tmp_path / "set" / "validation.jsonl", [{"other": "x"}])
    write(tmp_path / "set" / "test.jsonl", [{"text": "held"}])
    task = load(tmp_path / "set")
    assert task.evaluation.name == "test"
    assert task.evaluation.rows == (Text("held"),)
    with pytest.raises(DataError, match="split 'validation' has no column 'text': name another with --eval-split"):
        load(tmp_path / "set", eval_split="validation")
    with pytest.raises(DataError, match="split 'dev' does not exist: the data set has test, train, validation"):
        load(tmp_path / "set", train_split="dev")
    few = load(tmp_path / "set", max_train=4)
    assert len(few.train.rows) == 4
    assert set(few.train.rows) < set(task.train.rows)
    assert few == load(tmp_path / "set", max_train=4)
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved").train.rows == task.train.rows
    with pytest.raises(DataError, match="does not exist: give a folder, a file or a hub id"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is no local path and cannot be loaded from the hub"):
        load("no/such")


def test_splits_in_memory():
    train, held = (datasets.Dataset.from_list([{"text": text}]) for text in ("a", "b"))
    task = language_task_from_datasets(train, held)
    assert task.evaluation.rows == (Text("b"),)
    assert language_task_from_datasets(datasets.DatasetDict(train=train, test=held)).evaluation.name == "test"
    assert language_task_from_datasets(train, text_column="text").source == "memory"
    other = datasets.Dataset.from_list([{"words": "b"}])
    with pytest.raises(DataError, match="split 'validation' has no column 'text'"):
        language_task_from_datasets(train, other)
    with pytest.raises(DataError, match=r"split 'train' is a list: give a datasets.Dataset"):
        language_task_from_datasets(["a"])


def test_a_split_that_hides_what_is_to_be_learnt_is_left_out(caplog):
    train = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])
    hidden = datasets.Dataset.from_list([{"prompt": "a", "completion": " "}])
    with caplog.at_level(logging.WARNING):
        task = language_task_from_datasets(datasets.DatasetDict(train=train, test=hidden))
    assert task.evaluation is None
    assert (
        "split 'test' is left out: it has nothing to learn (column 'completion' is empty in every row)" in caplog.text
    )


def test_content_has_a_fingerprint():
    one = memory([{"prompt": "a", "completion": "b"}])
    same = memory([{"instruction": "a", "output": "b"}])
    assert one.fingerprint == same.fingerprint
    others = [
        memory([{"prompt": "ab", "completion": "b"}]),
        memory([{"text": "a"}, {"text": "b"}]),
        memory([{"text": "ab"}]),
        memory([{"messages": turns("a", "b")}]),
        memory([{"prompt": turns("a"), "completion": turns("b", first="assistant")}]),
        language_task_from_datasets(*(datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}]),) * 2),
    ]
    assert len({task.fingerprint for task in (one, *others)}) == 1 + len(others)


def test_empty_rows_are_left_out_and_counted(caplog, tmp_path):
    rows = [{"text": "a"}, {"text": " \n"}, {"text": None}, {"text": "b"}]
    with caplog.at_level(logging.WARNING):
        task = load(write(tmp_path / "rows.jsonl", rows))
    assert task.train.rows == (Text("a"), Text("b"))
    assert "split 'train': 2 empty rows left out, first row 1 of rows.jsonl" in caplog.text
    kept = memory([{"messages": turns("a", "b")}, {"messages": []}, {"messages": None}]).train.rows
    assert kept == (Chat((), said("a", "b")),)
    # nothing given is no empty row
    assert memory([{"prompt": None, "completion": "b"}]).train.rows == (Completion("", "b"),)


def test_what_else_messages_say_is_left_out_with_a_warning(caplog):
    messages = [{**one, "weight": 1, "tool_calls": None} for one in turns("a", "b")]
    with caplog.at_level(logging.WARNING):
        assert memory([{"messages": messages}]).train.rows == (Chat((), said("a", "b")),)
    assert "column 'messages' of split 'train': messages are read for role and content; left out: weight" in caplog.text


def chat(**message):
    return [{"messages": [{"role": "user", "content": "a"}, message]}]


FAULTS = [
    ([{"a": "x", "b": "y"}], {}, r"no columns of a language model's data found among a, b: known are text, prompt"),
    ([{"prompt": "a"}], {}, r"found among prompt: known are"),
    ([{"chosen": "a", "rejected": "b", "prompt": "c"}], {},
     r"this is preference data \(chosen, rejected in split 'train'\): give prompt and completion"),
    ([{"prompt": "a", "completion": "b", "label": True}], {},
     r"this is preference data \(true or false in column 'label' of split 'train'\): keep the rows that are true"),
    ([{"text": "a"}], {"text_column": "txt"}, r"column 'txt' does not exist .did you mean 'text'.*set --text-column"),
    ([{"a": "a", "b": "b", "c": "c"}], {"text_column": ("a", "b", "c")}, r"text columns a, b, c: --text-column takes"),
    ([{"text": ["a", "b"]}], {}, r"holds list values, no text"),
    ([{"text": " "}, {"text": None}], {}, r"split 'train' has no rows but 2 empty ones: fill text"),
    ([{"prompt": turns("a"), "completion": "b"}], {},
     r"row 0 of column 'completion' of split 'train' is a text where others are messages"),
    ([{"messages": "hello"}], {}, r"row 0 of column 'messages' of split 'train' is no list of messages \('hello'\)"),
    ([{"messages": {"role": "user", "content": "a"}}], {}, r"holds dict, no list of messages"),
    ([{"messages": ["a", "b"]}], {}, r"message 0 is 'a', no record: give it a role and a content"),
    (chat(role="bot", content="b"), {},
     r"message 1 has the unknown role 'bot': use system, user, assistant, tool"),
    (chat(content="b"), {}, r"message 1 has no role: use system"),
    (chat(role="assistant"), {}, r"message 1 \(assistant\) has no content: give it a text, or drop the row"),
    (chat(role="assistant", content="b", tool_calls=[{"name": "f"}]), {}, r"message 1 has tool_calls, which are not"),
    ([{"messages": turns("a", "b"), "tools": '[{"name": "f"}]'}], {}, r"column 'tools' of split 'train' is not"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "options", "message"), FAULTS)
def test_faults_are_told_in_one_line(rows, options, message):
    with pytest.raises(DataError, match=message) as error:
        memory(rows, **options)
    assert "\n" not in str(error.value)


def test_faults_of_files(tmp_path):
    write(tmp_path / "parts.jsonl", [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}])
    with pytest.raises(
        DataError, match=r"row 0 of column 'messages' .*the content of message 0 \(user\) is a list, no"
    ):
        load(tmp_path / "parts.jsonl")
    (tmp_path / "half.jsonl").write_text('{"messages": [{"role": "user", "content": "\\ud83d"}]}\n')
    with pytest.raises(DataError, match="half of a surrogate pair"):
        load(tmp_path / "half.jsonl")
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud83d"}\n')
    with pytest.raises(DataError, match="half of a surrogate pair"):
        load(tmp_path / "half.jsonl")
    write(tmp_path / "rows.csv", [{"prompt": "a", "completion": "b", "label": True}])
    with pytest.raises(DataError, match="this is preference data"):
        load(tmp_path / "rows.csv")
    assert load(tmp_path / "rows.csv", text_column=("prompt", "completion")).train.rows == (Completion("a", "b"),)


@pytest.mark.parametrize(
    "setting",
    [{"label_column": ("label",)}, {"task": "regression"}, {"positive_from": 2}],
    ids=lambda one: next(iter(one)),
)
def test_settings_of_labels_are_refused(setting, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(ConfigError, match="data of a language model has no labels; leave it out"):
        load(path, **setting)


TALK = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
KINDS = [
    ({"messages": [TALK]}, {}, True),
    ({"messages": [TALK], "category": ["open"]}, {}, True),
    ({"prompt": ["a"], "completion": ["b"]}, {}, True),
    ({"instruction": ["a"], "input": ["c"], "output": ["b"], "category": ["open"]}, {}, True),
    ({"talk": [TALK]}, {"text_column": ("talk",)}, True),
    ({"text": ["a"]}, {}, None),
    ({"body": ["a"]}, {"text_column": ("body",)}, None),
    ({"first": ["a"], "second": ["b"]}, {"text_column": ("first", "second")}, None),
    ({"text": ["a"], "label": [0]}, {}, False),
    ({"text": ["a"], "label": [0]}, {"task": "causal-lm"}, True),
    ({"text": ["a"], "label": [0], "prompt": ["a"], "completion": ["b"]}, {}, False),
    ({"first": ["a"], "second": ["b"], "label": [0]}, {"text_column": ("first", "second")}, False),
    ({"text": ["a"], "kind": [0]}, {"label_column": ("kind",)}, False),
    ({"text": ["a"], "kind": [0]}, {"positive_from": 1}, False),
    ({"messages": [TALK]}, {"task": "classification"}, False),
    ({"messages": [TALK]}, {"train_split": "none"}, False),
    ({"chosen": ["a"], "rejected": ["b"]}, {}, None),  # to be refused by that name
    ({"chosen": ["a"], "rejected": ["b"], "text": ["c"], "label": [0]}, {}, False),
    ({"anything": ["a"]}, {}, False),
]


@pytest.mark.parametrize(("columns", "options", "expected"), KINDS)
def test_data_tells_whether_it_is_for_language_models(columns, options, expected):
    """The model is asked where `expected` is None, and only there."""
    splits = splits_in_memory(datasets.Dataset.from_dict(columns))
    asked = []

    def is_causal():
        asked.append(True)
        return len(asked) == 1

    assert holds_language(splits, DataConfig("memory", **options), is_causal=is_causal) == (expected in (True, None))
    assert bool(asked) == (expected is None)
    if expected is None:
        assert not holds_language(splits, DataConfig("memory", **options), is_causal=is_causal)
