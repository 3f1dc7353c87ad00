"""Labels are matched by name, a split without labels is left out, and what is no class is named."""

import csv
import json
import logging

import datasets
import pytest

from foretune.errors import DataError
from foretune.settings.groups import DataConfig
from foretune.tasks.load import load_task, task_from_datasets

TEXT = datasets.Value("string")


def encoded(names, labels):
    """A split whose labels are numbers with names."""
    features = datasets.Features({"text": TEXT, "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(len(labels))], "label": labels}, features)


def plain(labels, kind=None):
    held = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(len(labels))], "label": labels})
    return held if kind is None else held.cast_column("label", datasets.Value(kind))


def save(splits, folder, form):
    """Write splits as one of the forms that keep class names."""
    if form == "saved":
        datasets.DatasetDict(splits).save_to_disk(str(folder))
    else:
        for name, split in splits.items():
            split.to_parquet(str(folder / f"{name}.parquet"))
    return load_task(DataConfig(str(folder)))


def from_memory(splits, folder, form):
    return task_from_datasets(datasets.DatasetDict(splits))


def from_hub(splits, folder, form, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda source, config_name: datasets.DatasetDict(splits))
    return load_task(DataConfig("some/set"))


@pytest.fixture(params=["saved", "parquet", "memory", "hub"])
def task_of(request, tmp_path, monkeypatch):
    """Make a task of splits, by each way in which they may come."""
    if request.param == "memory":
        return lambda **splits: from_memory(splits, tmp_path, "")
    if request.param == "hub":
        return lambda **splits: from_hub(splits, tmp_path, "", monkeypatch)
    return lambda **splits: save(splits, tmp_path, request.param)


ENCODED = ["neg", "neutral", "pos"]
OTHERS = [
    (encoded(ENCODED, [0, 2, 1]), [0, 2, 1]),
    (encoded(["pos", "neg", "neutral"], [0, 1, 2]), [2, 0, 1]),
    (encoded(["pos", "neg"], [0, 1, 1]), [2, 0, 0]),
    (encoded(["other", " pos", "neg"], [1, 2, 2]), [2, 0, 0]),  # a class that no row has may be unknown
    (plain(["pos", "neg", " neutral "]), [2, 0, 1]),
    (plain([2, 0, 1]), [2, 0, 1]),
    (plain([2.0, 0.0, 1.0]), [2, 0, 1]),
]


@pytest.mark.parametrize(("other", "labels"), OTHERS, ids=range(len(OTHERS)))
def test_classes_are_matched_by_name(task_of, other, labels):
    task = task_of(train=encoded(ENCODED, [2, 0, 0]), test=other)
    assert task.label_names == ("neg", "neutral", "pos")
    assert task.train.labels.tolist() == [2, 0, 0]
    assert task.evaluation.labels.tolist() == labels


@pytest.mark.parametrize(
    ("train", "names", "labels"),
    [
        (["b", "a"], ["b", "a"], [1, 0]),
        ([1, 2], ["2", "1"], [1, 0]),
        ([0, 1], ["neg", "pos"], [0, 1]),
        ([True, False], ["True", "False"], [1, 0]),
    ],
)
def test_classes_without_stated_names_are_matched_too(task_of, train, names, labels):
    assert task_of(train=plain(train), test=encoded(names, [0, 1])).evaluation.labels.tolist() == labels


DOUBTFUL = [
    (encoded(["neg", "pos"], [0, 1]), encoded(["neg", "positive"], [0, 1]), r"'positive' in row 1 .*they are neg, pos"),
    (encoded(["neg", "pos"], [0, 1]), encoded(["0", "1"], [0, 1]), r"label '0' in row 0 .*they are neg, pos"),
    (encoded(["neg", "pos"], [0, 1]), plain([0, 2]), r"label 2 in row 1 .*they are neg, pos"),
    (encoded(["1", "2", "3"], [0, 1]), plain([1, 2]), "whether 1 is a name or a position cannot be told"),
    (plain([1, 2]), encoded(["a", "b"], [0, 1]), r"label 'a' in row 0 .*they are 1, 2"),
    (plain(["a", "b"]), plain([0, 1]), r"label 0 in row 0 .*they are a, b"),
    (encoded(["neg", "pos"], [0, 1]), encoded(["neg", "pos"], [0, -1]), r"label -1 in row 1 .*hidden labels"),
    (encoded(["neg", "pos"], [0, 1, -1]), plain([0, 1]), r"label -1 in row 2 .*hidden labels"),
    (encoded(["neg", "pos"], [0, 1]), encoded(["neg", "pos"], [0, None]), r"label in row 1 .*missing"),
]


@pytest.mark.parametrize(("train", "test", "message"), DOUBTFUL, ids=range(len(DOUBTFUL)))
def test_labels_that_fit_no_class_are_refused(task_of, train, test, message):
    with pytest.raises(DataError, match=message) as error:
        task_of(train=train, test=test)
    assert len(str(error.value)) < 300


def test_shards_have_the_same_class_names(tmp_path):
    encoded(["a", "b"], [0, 1]).to_parquet(str(tmp_path / "train_0.parquet"))
    encoded(["b", "a"], [0, 1]).to_parquet(str(tmp_path / "train_1.parquet"))
    with pytest.raises(DataError, match=r"other class names in train_0.parquet and train_1.parquet"):
        load_task(DataConfig(str(tmp_path)))
    encoded(["a", "b"], [1, 1]).to_parquet(str(tmp_path / "train_1.parquet"))
    assert load_task(DataConfig(str(tmp_path))).train.labels.tolist() == [0, 1, 1, 1]


FORMS = [("csv", "csv"), ("jsonl", "csv"), ("csv", "jsonl")]


@pytest.mark.parametrize(("first", "second"), FORMS)
@pytest.mark.parametrize("names", [("neg", "pos"), ("0", "1"), ("-1", "1"), ("true", "false"), ("10", "9")])
def test_splits_of_two_formats_have_the_same_classes(tmp_path, first, second, names):
    for split, suffix in (("train", first), ("test", second)):
        path, rows = tmp_path / f"{split}.{suffix}", [("a", names[0]), ("b", names[1]), ("c", names[1])]
        if suffix == "csv":
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([("text", "label"), *rows])
        else:
            bare = ("true", "false", "0", "1", "-1", "10", "9")
            literal = [name if name in bare else f'"{name}"' for _, name in rows]
            lines = [f'{{"text": "{text}", "label": {label}}}' for (text, _), label in zip(rows, literal, strict=True)]
            path.write_text("\n".join(lines))
    task = load_task(DataConfig(str(tmp_path)))
    assert task.evaluation.labels.tolist() == task.train.labels.tolist()
    assert [task.label_names[label].lower() for label in task.train.labels] == [names[0], names[1], names[1]]


HIDDEN = [
    datasets.Dataset.from_dict({"text": ["c", "d"]}),
    plain([-1, -1]),
    plain([-1.0, -1.0]),
    plain(["-1", " -1"]),
    plain(["", " "]),
    plain([None, None], "int64"),
    plain([None, None], "string"),
    plain([float("nan"), float("nan")]),
    encoded(["neg", "pos"], [-1, -1]),
    encoded(["neg", "pos"], [None, -1]),
]


@pytest.mark.parametrize("hidden", HIDDEN, ids=range(len(HIDDEN)))
@pytest.mark.parametrize("train", [encoded(["neg", "pos"], [0, 1, 0]), plain(["neg", "pos", "neg"]), plain([-1, 1, 0])])
def test_a_split_that_hides_its_labels_is_left_out_and_noted(caplog, train, hidden):
    with caplog.at_level(logging.WARNING, logger="foretune"):
        task = task_from_datasets(datasets.DatasetDict(train=train, test=hidden))
    assert task.evaluation is None
    assert "split 'test' is left out" in caplog.text
    assert "held out of training" in caplog.text
    both = task_from_datasets(datasets.DatasetDict(train=train, validation=hidden, test=train))
    assert both.evaluation.name == "test"
    with pytest.raises(DataError, match=r"split 'validation' has no (labels|column 'label').*--eval-split"):
        task_from_datasets(train, hidden)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_the_folder_of_a_competition(tmp_path, suffix, caplog):
    def write(name, **columns):
        held = datasets.Dataset.from_dict(columns)
        path = str(tmp_path / f"{name}.{suffix}")
        if suffix == "parquet":
            held.to_parquet(path)
        elif suffix == "jsonl":
            held.to_json(path)
        else:
            held.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)

    write("train", id=[0, 1, 2], text=["a", "b", "c"], target=["x", "y", "x"])
    write("test", id=[3, 4], text=["d", "e"])
    write("sample_submission", id=[3, 4], target=["x", "x"])
    task = load_task(DataConfig(str(tmp_path)))
    assert (task.evaluation, len(task.train.texts)) == (None, 3)
    assert "split 'test' is left out: it has no column 'target'" in caplog.text
    with pytest.raises(DataError, match=r"split 'test' has no column 'target': name another with --eval-split"):
        load_task(DataConfig(str(tmp_path), eval_split="test"))
    write("test", id=[3, 4], text=["d", "e"], label=["x", "y"])  # the labels are there, under another name
    with pytest.raises(DataError, match=r"column 'target' does not exist in split 'test': it has id, text, label"):
        load_task(DataConfig(str(tmp_path)))


NEGATIVE = [([-1, 0, 1], True), ([-1, 1], True), ([-1, 0], True), ([-2, -1, 0, 1, 2], True), ([-5, 3], True)]
NEGATIVE += [([-1, 0, 1, 2], False), ([-1, 0, 1, 2, 3, 4], False)]


@pytest.mark.parametrize(("values", "classes"), NEGATIVE)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_negative_numbers_are_classes_unless_they_mark_hidden_labels(tmp_path, values, classes, suffix):
    labels = values * 3
    path = tmp_path / f"train.{suffix}"
    if suffix == "parquet":
        plain(labels).to_parquet(str(path))
    elif suffix == "csv":
        path.write_text("text,label\n" + "".join(f"a,{label}\n" for label in labels))
    else:
        path.write_text("\n".join(json.dumps({"text": "a", "label": label}) for label in labels))
    if classes:
        task = load_task(DataConfig(str(path)))
        assert task.label_names == tuple(map(str, sorted(values)))
        assert [int(task.label_names[label]) for label in task.train.labels] == labels
    else:
        with pytest.raises(DataError, match=r"label -1 in row 0 .*hidden labels\?.*words"):
            load_task(DataConfig(str(path)))


def test_long_numbers_stay_apart(tmp_path):
    names = ("12345678901234567890", "12345678901234567891")
    (tmp_path / "train.csv").write_text(f"text,label\na,{names[0]}\nb,{names[1]}\n")
    assert load_task(DataConfig(str(tmp_path))).label_names == names


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["true", "1"], "mixes booleans and others"),
        (["true", '"yes"'], "mixes booleans and others"),
        (['"\\ud800"', '"a"'], r"row 0 .*surrogate"),
        (["{}", "0"], r"dict values, no labels, first in row 0"),
        (["0", "[1]"], r"mixes lists and single values, first in row 0"),
        (["NaN", "0"], "row 0 .*missing"),
        (["0", "Infinity"], "row 1 .*regression"),
        (["0", "1e999"], "row 1 .*regression"),
    ],
)
def test_labels_of_json_that_are_no_classes(tmp_path, labels, message):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(f'{{"text": "a", "label": {label}}}' for label in labels))
    with pytest.raises(DataError, match=message) as error:
        load_task(DataConfig(str(path)))
    assert "train.jsonl" in str(error.value)
