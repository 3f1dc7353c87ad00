import json
import logging
import os

import datasets
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretune.errors import DataError
from foretune.readers.table import Place
from foretune.settings.groups import DataConfig
from foretune.tasks.columns import find_columns
from foretune.tasks.labels import label_map, read_labels
from foretune.tasks.load import load_task, task_from_datasets

ROWS = [("a good film", 1), ("NA", 0), ('with "quotes", commas\nand a line', 1), ("null", 0), ("ünïcödé", 1), ("42", 0)]
FRAME = pd.DataFrame(ROWS, columns=["text", "label"])


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def load(source, **options):
    return load_task(DataConfig(str(source), **options))


def write(path, frame=FRAME):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    elif path.suffix == ".tsv":
        frame.to_csv(path, index=False, sep="\t")
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in frame.to_dict("records")) + "\n")
    return path


def dataset(**columns):
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_format_gives_the_same_texts(tmp_path, suffix):
    folder = tmp_path / "set"
    write(folder / f"train{suffix}")
    write(folder / f"validation{suffix}", FRAME[::-1])
    task = load(folder)
    assert list(task.train.texts) == [text for text, _ in ROWS]
    assert task.train.labels.tolist() == [label for _, label in ROWS]
    assert list(task.evaluation.texts) == [text for text, _ in ROWS[::-1]]
    assert task.label_names == ("0", "1")
    alone = load(folder / f"train{suffix}")
    assert list(alone.train.texts) == list(task.train.texts)
    assert alone.evaluation is None


@pytest.mark.parametrize(
    ("files", "evaluation"),
    [
        (["train.csv", "test.csv"], "test"),
        (["train.csv", "test.csv", "dev.csv"], "dev"),
        (["train.csv", "validation_matched.csv", "validation_mismatched.csv"], "validation_matched"),
        (["train-00000-of-00002.csv", "train-00001-of-00002.csv"], None),
        (["data/train.csv", "data/validation.csv"], "validation"),
        (["reviews.csv"], None),
        (["Train.csv", "Valid.csv"], "valid"),
    ],
)
def test_splits_are_found_by_file_names(tmp_path, files, evaluation):
    for name in files:
        write(tmp_path / "set" / name)
    task = load(tmp_path / "set")
    shards = sum("of-00002" in name for name in files) or 1
    assert len(task.train.texts) == shards * len(ROWS)
    assert (task.evaluation and task.evaluation.name) == evaluation


def test_splits_by_name(tmp_path):
    for name in ("train", "validation", "test"):
        write(tmp_path / f"{name}.csv")
    assert load(tmp_path, eval_split="test").evaluation.name == "test"
    assert load(tmp_path, train_split="validation").evaluation.name == "test"
    with pytest.raises(DataError, match=r"split 'extra' does not exist.*train, validation"):
        load(tmp_path, eval_split="extra")
    with pytest.raises(DataError, match="training and evaluation"):
        load(tmp_path, eval_split="train")


def test_save_to_disk(tmp_path):
    train, test = dataset(text=["a", "b"], label=[0, 1]), dataset(text=["c"], label=[1])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "both"))
    train.save_to_disk(str(tmp_path / "one"))
    assert load(tmp_path / "both").evaluation.labels.tolist() == [1]
    assert load(tmp_path / "one").evaluation is None


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "train.csv")
    first = load(path)
    write(path, FRAME.assign(text=FRAME["text"] + "!"))
    second = load(path)
    assert second.train.texts[0] == "a good film!"
    assert first.fingerprint != second.fingerprint
    assert load(path).fingerprint == second.fingerprint


def test_a_local_path_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "imdb" / "train.csv")
    assert load("imdb").train.texts[0] == "a good film"


def test_a_changed_file_of_the_same_time_is_read_again(tmp_path):
    path = tmp_path / "train.csv"
    for text in ("old", "new"):
        path.write_text(f"text,label\n{text},0\nb,1\n")
        os.utime(path, (1e9, 1e9))
        assert load(path).train.texts[0] == text


def test_local_files_leave_nothing_in_the_cache(tmp_path):
    load(write(tmp_path / "train.csv"))
    assert not list(datasets.config.HF_DATASETS_CACHE.rglob("*.arrow"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_numeric_texts_keep_their_spelling(tmp_path, suffix):
    texts = ["007", "1.10", "1e3"]
    path = write(tmp_path / f"train{suffix}", pd.DataFrame({"text": texts, "label": [0, 1, 1]}))
    assert list(load(path).train.texts) == texts


def test_types_that_change_late_in_a_csv_file(tmp_path):
    n = 25_000  # pandas reads and guesses 10,000 rows at a time
    frame = pd.DataFrame({"text": [str(i) for i in range(n)], "label": ["0", "1"] * (n // 2)})
    frame.loc[n - 1] = ["word", "other"]
    task = load(write(tmp_path / "train.csv", frame))
    assert task.label_names == ("0", "1", "other")
    assert task.train.texts[-2:] == [str(n - 2), "word"]


def test_labels_of_csv_files_are_checked_as_numbers(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,label\na,0.25\nb,1\n")
    with pytest.raises(DataError, match=r"label 0\.25 in row 0 .*regression"):
        load(path, task="classification")
    path.write_text("text,label\na,\nb,1\n")
    with pytest.raises(DataError, match=r"label in row 0 .*empty"):
        load(path)
    path.write_text("text,label\na,11\nb,2\n")
    assert load(path).label_names == ("2", "11")


def test_the_only_column_of_texts_in_a_csv_file(tmp_path, caplog):
    path = tmp_path / "train.csv"
    path.write_text("id,message,label\n1,a,0\n2,b,1\n")
    with caplog.at_level(logging.INFO, logger="foretune"):
        assert load(path).text_columns == ("message",)
    assert "'message'" in caplog.text


def test_paths_with_wildcards_suffixes_in_capitals_and_byte_order_marks(tmp_path):
    path = tmp_path / "my [set] *" / "TRAIN.CSV"
    path.parent.mkdir()
    path.write_bytes(b"\xef\xbb\xbf" + write(tmp_path / "plain.csv").read_bytes())
    assert load(path).train.texts[0] == "a good film"
    assert load(path.parent).train.texts[0] == "a good film"


def test_a_pandas_index_column_is_no_text(tmp_path):
    FRAME.rename(columns={"text": "words"}).to_csv(tmp_path / "train.csv")
    assert load(tmp_path).text_columns == ("words",)


CSV_FAULTS = [
    ("", "has no rows"),
    ("text,label\n\n", "has no rows"),
    ("text,label,text\na,0,b\n", "two columns 'text'"),
    ("text,label\na,0\nb,1,2\n", r"row 1 of .*line 3\) has 3 cells for 2 columns.*quotes"),
    ("text,label\na,0,9\nb,1,9\n", r"row 0 of .*line 2\) has 3 cells for 2 columns"),
    ('text,label\n"a,0\nb,1\n', "EOF inside string"),
    ("text,label\ncaf\xe9,0\nb,1\n", "line 2.*latin-1.*save it as UTF-8"),
]


@pytest.mark.parametrize(("content", "message"), CSV_FAULTS)
def test_faulty_csv_files(tmp_path, capfd, caplog, monkeypatch, content, message):
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    (tmp_path / "train.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path)
    assert "train.csv" in str(error.value)
    assert "\n" not in str(error.value)
    assert (capfd.readouterr(), caplog.messages) == (("", ""), [])


def test_files_of_one_split_that_do_not_fit_together(tmp_path):
    write(tmp_path / "a" / "train.csv")
    write(tmp_path / "a" / "train.bak.csv", FRAME[:2])
    assert len(load(tmp_path / "a").train.texts) == len(ROWS)
    write(tmp_path / "a" / "train.jsonl")
    with pytest.raises(DataError, match=r"split 'train' more than once \(train.csv, train.jsonl\)"):
        load(tmp_path / "a")
    write(tmp_path / "b" / "train.csv")
    write(tmp_path / "b" / "train-00000-of-00001.csv")
    with pytest.raises(DataError, match="more than once"):
        load(tmp_path / "b")
    write(tmp_path / "c" / "train_0.csv")
    write(tmp_path / "c" / "train_1.csv", FRAME.rename(columns={"text": "words"}))
    with pytest.raises(DataError, match=r"different columns: text, label in train_0.csv, words, label in train_1.csv"):
        load(tmp_path / "c")


def test_splits_not_in_use_are_not_read(tmp_path):
    for name in ("train", "validation"):
        write(tmp_path / f"{name}.csv")
    (tmp_path / "test.csv").write_text("")
    assert load(tmp_path).evaluation.name == "validation"
    with pytest.raises(DataError, match=r"test.csv' has no rows"):
        load(tmp_path, eval_split="test")


def test_a_configuration_is_for_the_hub_alone(tmp_path):
    write(tmp_path / "train.csv")
    with pytest.raises(DataError, match=r"config_name 'sst2'.*local path"):
        load(tmp_path, config_name="sst2")


def test_failures_of_the_hub_take_one_line(monkeypatch):
    def fail(source, config_name):
        raise ValueError(f"BuilderConfig {config_name!r} not found.\nAvailable: ['cola', 'sst2']")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match=r"'glue' .*BuilderConfig 'colaa' not found. Available: \['cola', 'sst2'\]"
    ) as error:
        load("glue", config_name="colaa")
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("unset HF_HUB_OFFLINE or give a local folder")


def test_splits_of_the_hub(monkeypatch):
    splits = datasets.DatasetDict(
        train=dataset(text=["a", "b"], label=[0, 1]), validation_matched=dataset(text=["c"], label=[1])
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda source, config_name: splits)
    task = load("glue", config_name="mnli")
    assert (task.source, task.config_name, task.evaluation.name) == ("glue", "mnli", "validation_matched")


def test_what_cannot_be_found(tmp_path):
    with pytest.raises(DataError, match=r"'/no/such/folder' does not exist"):
        load("/no/such/folder")
    with pytest.raises(DataError, match=r"'reviews.csv' does not exist"):
        load("reviews.csv")
    with pytest.raises(DataError, match=r"'nobody/nothing'.*HF_HUB_OFFLINE"):
        load("nobody/nothing")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no train.csv.*notes.txt"):
        load(tmp_path)
    with pytest.raises(DataError, match="no known format"):
        load(tmp_path / "notes.txt")
    (tmp_path / "train.jsonl").write_text("{not json")
    with pytest.raises(DataError, match="cannot read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("names", "text", "label"),
    [
        (["idx", "sentence", "label"], ("sentence",), "label"),
        (["Text", "Label"], ("Text",), "Label"),
        (["question1", "question2", "label", "text"], ("question1", "question2"), "label"),
        (["premise", "hypothesis", "label"], ("premise", "hypothesis"), "label"),
        (["text", "fine_label", "coarse_label"], ("text",), "coarse_label"),
        (["message", "stars"], ("message",), "stars"),
        (["text", "text_b", "category"], ("text",), "category"),
    ],
)
def test_columns_by_the_usual_names(names, text, label):
    strings = [name for name in names if name not in (label, "idx")]
    found = find_columns(names, strings)
    assert (found.text, found.labels) == (text, (label,))


def test_missing_columns():
    with pytest.raises(DataError, match=r"'txt' does not exist \(did you mean 'text'\?\).*--text-column"):
        find_columns(["text", "label"], ["text"], text=["txt"])
    with pytest.raises(DataError, match=r"'y' does not exist.*--label-column"):
        find_columns(["text", "label"], ["text"], label="y")
    with pytest.raises(DataError, match=r"no label column found among text, points: .*--label-column"):
        find_columns(["text", "points"], ["text"])
    with pytest.raises(DataError, match=r"no text column found among a, b, label: .*--text-column"):
        find_columns(["a", "b", "label"], ["a", "b"])
    with pytest.raises(DataError, match="3 text columns"):
        find_columns(["a", "b", "c", "label"], ["a"], text=["a", "b", "c"])
    with pytest.raises(DataError, match="'body' is named for the text and for the label"):
        find_columns(["body", "label"], ["body"], text=["body"], label="body")
    assert find_columns(["label", "topic"], ["label"], text="label").labels == ("topic",)
    with pytest.raises(DataError, match=r"'label' does not exist in split 'validation'"):
        task_from_datasets(dataset(text=["a", "b"], label=[0, 1]), dataset(text=["a"], y=[0]))


def test_pairs():
    task = task_from_datasets(dataset(premise=["a", "b"], hypothesis=["c", "d"], label=[0, 1]))
    assert task.text_columns == ("premise", "hypothesis")
    assert (list(task.train.texts), list(task.train.pairs)) == (["a", "b"], ["c", "d"])


def test_own_splits_and_columns():
    train, test = dataset(words=["a", "b"], y=[0, 1]), dataset(words=["c"], y=[1])
    named = {"text_column": "words", "label_column": "y"}
    task = task_from_datasets(datasets.DatasetDict(train=train, test=test), **named)
    assert (task.text_columns, task.evaluation.name, task.source) == (("words",), "test", "memory")
    assert task.class_counts(task.evaluation).tolist() == [0, 1]
    assert task.fingerprint == task_from_datasets(train, test, **named).fingerprint
    with pytest.raises(DataError, match="beside a DatasetDict"):
        task_from_datasets(datasets.DatasetDict(train=train), test)
    with pytest.raises(DataError, match="split 'train' is a DataFrame"):
        task_from_datasets(FRAME)
    with pytest.raises(DataError, match="split 'validation' has no rows"):
        task_from_datasets(train, test.select([]), **named)


DIFFERENT = [
    {"text": ["ab", "c"], "label": ["x", "y"]},
    {"text": ["a", "bc"], "label": ["x", "y"]},
    {"text": ["a\0b", "c"], "label": ["x", "y"]},
    {"text": ["a", "b\0c"], "label": ["x", "y"]},
    {"text": ["ab", "c"], "label": ["y", "x"]},
    {"text": ["ab", "c"], "label": ["x", "z"]},
    {"text1": ["ab", "c"], "text2": ["ab", "c"], "label": ["x", "y"]},
]


def test_fingerprints_tell_contents_apart():
    tasks = [task_from_datasets(dataset(**columns)) for columns in DIFFERENT]
    tasks.append(task_from_datasets(dataset(**DIFFERENT[0]), dataset(**DIFFERENT[0])))
    assert len({task.fingerprint for task in tasks}) == len(tasks)
    assert tasks[0].fingerprint == task_from_datasets(dataset(**DIFFERENT[0])).fingerprint


KINDS = [
    (["neg", "pos", "neg"], ("neg", "pos"), [0, 1, 0]),
    ([" pos", "neg", "pos "], ("neg", "pos"), [1, 0, 1]),
    ([1, 5, 3], ("1", "3", "5"), [0, 2, 1]),
    ([True, False, True], ("False", "True"), [1, 0, 1]),
    ([1.0, 0.0, 1.0], ("0", "1"), [1, 0, 1]),
    (["10", "2", " 2"], ("2", "10"), [1, 0, 0]),
    (["1.0", "0.0", "1"], ("0", "1"), [1, 0, 1]),
    (["10", "2", "x"], ("10", "2", "x"), [0, 1, 2]),
    (["007", "7", "7"], ("007", "7"), [0, 1, 1]),
    ([-1, 0, 1], ("-1", "0", "1"), [0, 1, 2]),
    (["1", "-1", "-1"], ("-1", "1"), [1, 0, 0]),
    ([-1.0, 1.0, 1.0], ("-1", "1"), [0, 1, 1]),
    ([-2, 2, -1], ("-2", "-1", "2"), [0, 2, 1]),
]


@pytest.mark.parametrize(("values", "names", "labels"), KINDS)
def test_kinds_of_labels(values, names, labels):
    task = task_from_datasets(dataset(text=["a", "b", "c"], label=values))
    assert task.label_names == names
    assert task.train.labels.tolist() == labels


def test_class_labels_keep_names_and_absent_classes():
    feature = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y", "z"])})
    train = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [2, 0]}, features=feature)
    task = task_from_datasets(train)
    assert task.label_names == ("x", "y", "z")
    assert task.train.labels.tolist() == [2, 0]


BAD_LABELS = [
    ([0, 1, -1, 2], r"label -1 in row 2 .*hidden labels.*words"),
    ([0, 1, None], "label in row 2 .*missing"),
    (["a", " ", "b"], "label in row 1 .*empty"),
    ([float("nan"), 1.0, 0.0], "label in row 0 .*missing"),
    ([float("inf"), 1.0, 0.0], "label inf in row 0 .*regression"),
    (["0", "1", "-1", "2"], "label -1 in row 2 .*hidden labels"),
    (["0", None, "1"], "label in row 1 .*missing"),
    (["0", "1", ""], "label in row 2 .*empty"),
    ([1, 1, 1], "single class, 1"),
]


@pytest.mark.parametrize(("values", "message"), BAD_LABELS)
def test_labels_that_are_no_classes(values, message):
    with pytest.raises(DataError, match=message):
        task_from_datasets(dataset(text=["a", "b", "c", "d"][: len(values)], label=values))


def test_other_bad_labels():
    with pytest.raises(DataError, match=r"label 'meh' in row 1 of column 'label' of split 'validation' is no class"):
        task_from_datasets(dataset(text=["a", "b"], label=["x", "y"]), dataset(text=["a", "b"], label=["x", "meh"]))
    with pytest.raises(DataError, match=r"label 'x' in row 1 of column 'label' of split 'validation' .* they are 0, 1"):
        task_from_datasets(dataset(text=["a", "b"], label=[0, 1]), dataset(text=["a", "b"], label=["0", "x"]))
    ids = list(range(200))
    with pytest.raises(DataError, match="200 distinct values in 200 rows"):
        task_from_datasets(dataset(text=[f"t{i}" for i in ids], label=ids))
    with pytest.raises(DataError, match="mixes"):
        label_map(["a", 1], place=Place("train", "label"))


def test_empty_texts_are_counted():
    with pytest.raises(DataError, match=r"split 'train' has 2 empty texts in column 'text', first in row 1"):
        task_from_datasets(dataset(text=["a", "  ", None], label=[0, 1, 0]))
    with pytest.raises(DataError, match=r"split 'train' has 1 empty text in column 'text', first in row 2"):
        task_from_datasets(dataset(text=["a", "b", "\t"], label=[0, 1, 0]))
    with pytest.raises(DataError, match="'text' of split 'train' holds list values"):
        task_from_datasets(dataset(text=[["a"], ["b"]], label=[0, 1]))
    with pytest.raises(DataError, match="no rows"):
        task_from_datasets(dataset(text=[], label=[]))


def test_a_shuffled_dataset_is_read_in_its_order():
    whole = dataset(text=[f"t{i}" for i in range(20)], label=[i % 2 for i in range(20)])
    part = whole.shuffle(seed=1).select(range(5))
    assert list(task_from_datasets(part).train.texts) == part["text"][:]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.one_of(st.integers(0, 9)), min_size=2, max_size=40).filter(lambda values: len(set(values)) > 1))
def test_labels_map_back_to_their_values(values):
    classes = label_map(values, place=Place("s", "c"))
    labels = read_labels(values, classes, place=Place("s", "c"))
    assert [classes.values[label] for label in labels] == values
    assert set(labels) == set(range(len(classes.names)))
    assert list(classes.values) == sorted(classes.values)


def test_progress_bars_and_log_level_are_left_as_they_were(tmp_path):
    path = write(tmp_path / "train.csv")
    before = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    load(path)
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == before
