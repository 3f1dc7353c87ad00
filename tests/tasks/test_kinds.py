"""Numbers and sets of labels are found, read alike from every format, or refused by name."""

import json
import logging

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretune.errors import DataError
from foretune.settings.groups import DataConfig
from foretune.tasks.load import load_task, task_from_datasets

TEXT = datasets.Value("string")


def rows(labels, **columns):
    """A split in memory; what has no type of its own is typed as `datasets` does."""
    texts = [f"t{index}" for index in range(len(labels))]
    return datasets.Dataset.from_dict({"text": texts, "label": labels, **columns})


def named(labels, names=("a", "b", "c")):
    kind = datasets.List(datasets.ClassLabel(names=list(names)))
    features = datasets.Features({"text": TEXT, "label": kind})
    return datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(len(labels))], "label": labels}, features)


def read(labels, **options):
    return task_from_datasets(rows(labels), **options)


def write(folder, frame, suffix):
    """A training split as a file of one of the formats."""
    folder.mkdir(exist_ok=True)
    path = folder / f"train{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path, index=False)
    elif suffix == ".csv":
        frame.to_csv(path, index=False)
    elif suffix == ".tsv":
        frame.to_csv(path, index=False, sep="\t")
    else:
        path.write_text("\n".join(json.dumps(row) for row in frame.to_dict("records")) + "\n")
    return path


def frame_of(labels, name="label"):
    return pd.DataFrame({"text": [f"t{i}" for i in range(len(labels))], name: labels})


NUMBERS = [0.0, 2.25, 5.0, -1.5]
SETS = [["b", "a"], [], ["a"], ["c"]]
IN_COLUMNS = [[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]]


# ---- what is found by itself


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_numbers_with_a_fraction_are_regression_in_every_format(tmp_path, suffix):
    task = load_task(DataConfig(str(write(tmp_path, frame_of(NUMBERS), suffix))))
    assert (task.objective.kind, task.label_names) == ("regression", ("label",))
    assert task.train.labels.dtype == np.float64
    assert task.train.labels.tolist() == [[value] for value in NUMBERS]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_lists_of_labels_are_several_labels_in_every_format(tmp_path, suffix):
    task = load_task(DataConfig(str(write(tmp_path, frame_of(SETS), suffix))))
    assert (task.objective.kind, task.label_names) == ("multi-label", ("a", "b", "c"))
    assert task.train.labels.dtype == np.float64
    assert task.train.labels.tolist() == IN_COLUMNS


FOUND = [
    ([0.5, 1.0, 0.0], "regression", ("label",), [[0.5], [1.0], [0.0]]),
    (["2.5", "1.0", "-0"], "regression", ("label",), [[2.5], [1.0], [0.0]]),
    ([".5", "1", "1e1"], "regression", ("label",), [[0.5], [1.0], [10.0]]),
    ([1.0, 0.0, 2.0], "classification", ("0", "1", "2"), [1, 0, 2]),
    ([1, 5, 3], "classification", ("1", "3", "5"), [0, 2, 1]),
    (["1.10", "2.0", "beta"], "classification", ("1.10", "2.0", "beta"), [0, 1, 2]),
    ([["a"], ["b", "a"], []], "multi-label", ("a", "b"), [[1, 0], [1, 1], [0, 0]]),
    ([[3], [10, 3], []], "multi-label", ("3", "10"), [[1, 0], [1, 1], [0, 0]]),
    ([["3"], ["10", "3"], []], "multi-label", ("3", "10"), [[1, 0], [1, 1], [0, 0]]),
    ([[1], [0], [1]], "multi-label", ("0", "1"), [[0, 1], [1, 0], [0, 1]]),
    ([[1, 0, 1], [0, 0, 0], [0, 1, 0]], "multi-label", ("0", "1", "2"), [[1, 0, 1], [0, 0, 0], [0, 1, 0]]),
    ([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], "multi-label", ("0", "1"), [[1, 0], [0, 0], [0, 1]]),
    ([[1.0], [0.0], [0.0]], "multi-label", ("0",), [[1], [0], [0]]),
    ([[True, False], [False, False], [False, True]], "multi-label", ("0", "1"), [[1, 0], [0, 0], [0, 1]]),
    ([[0, 1], [1], [0]], "multi-label", ("0", "1"), [[1, 1], [0, 1], [1, 0]]),
    ([[0.5, 2.0], [1.0, 3.0], [0.0, 4.0]], "regression", ("0", "1"), [[0.5, 2.0], [1.0, 3.0], [0.0, 4.0]]),
    ([[5.0, 2.0], [1.0, 3.0], [0.0, 4.0]], "regression", ("0", "1"), [[5.0, 2.0], [1.0, 3.0], [0.0, 4.0]]),
]


@pytest.mark.parametrize(("labels", "kind", "names", "targets"), FOUND)
def test_the_kind_is_found_from_the_labels(labels, kind, names, targets):
    task = read(labels)
    assert (task.objective.kind, task.label_names) == (kind, names)
    assert task.train.labels.tolist() == targets


@pytest.mark.parametrize(
    ("labels", "kind", "names", "targets"), [case for case in FOUND if case[1] != "classification"]
)
def test_json_tells_the_same_kinds(tmp_path, labels, kind, names, targets):
    task = load_task(DataConfig(str(write(tmp_path, frame_of(labels), ".jsonl"))))
    assert (task.objective.kind, task.label_names) == (kind, names)
    assert task.train.labels.tolist() == targets


def test_parquet_and_saved_sets_keep_the_names_of_labels(tmp_path):
    split = named([[2, 0], [], [1]])
    split.to_parquet(str(tmp_path / "train.parquet"))
    datasets.DatasetDict({"train": split}).save_to_disk(str(tmp_path / "saved"))
    for source in (tmp_path / "train.parquet", tmp_path / "saved"):
        task = load_task(DataConfig(str(source)))
        assert (task.objective.kind, task.label_names) == ("multi-label", ("a", "b", "c"))
        assert task.train.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({"toxic": [0, 1, 0], "insult": [1, 1, 0]}, "multi-label"),
        ({"toxic": [False, True, True], "insult": ["1", "0", "0"]}, "multi-label"),
        ({"valence": [0.5, 1.0, 0.0], "arousal": [1, 2, 3]}, "regression"),
        ({"valence": [1, 2, 3], "arousal": ["1", "0", "1"]}, "regression"),
    ],
)
def test_several_label_columns_are_labels_or_numbers(columns, kind):
    task = task_from_datasets(rows([0, 1, 2], **columns), label_column=list(columns))
    assert (task.objective.kind, task.label_names, task.label_columns) == (kind, tuple(columns), tuple(columns))
    expected = np.column_stack([[float(value) for value in values] for values in columns.values()])
    assert task.train.labels.tolist() == expected.tolist()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_several_label_columns_in_every_format(tmp_path, suffix):
    frame = pd.DataFrame({"text": list("abcd"), "x": [1, 0, 1, 0], "y": [0, 0, 1, 1]})
    task = load_task(DataConfig(str(write(tmp_path, frame, suffix)), label_column=("x", "y")))
    assert task.train.labels.tolist() == [[1, 0], [0, 0], [1, 1], [0, 1]]


def test_one_label_column_may_be_given_as_a_text(tmp_path):
    assert DataConfig("d", label_column="y") == DataConfig("d", label_column=("y",))
    path = write(tmp_path, frame_of([0, 1], "y"), ".csv")
    assert load_task(DataConfig(str(path), label_column="y")).label_column == "y"


# ---- what is asked for


@pytest.mark.parametrize(
    "labels", [[0, 5, 3], [0.0, 5.0, 3.0], ["0", "5.0", " 3 "], [[0], [5], [3]], [["0"], ["5"], ["3"]]]
)
def test_whole_numbers_are_numbers_where_regression_is_asked_for(labels):
    task = read(labels, task="regression")
    assert task.train.labels.tolist() == [[0.0], [5.0], [3.0]]


def test_names_of_classes_that_begin_with_numbers_are_numbers_where_regression_is_asked_for():
    features = datasets.Features({"text": TEXT, "label": datasets.ClassLabel(names=["2 stars", "1 star", "5 stars"])})
    split = datasets.Dataset.from_dict({"text": list("abc"), "label": [0, 1, 2]}, features)
    assert task_from_datasets(split, task="regression").train.labels.tolist() == [[2.0], [1.0], [5.0]]
    other = split.cast_column("label", datasets.ClassLabel(names=["low", "middle", "high"]))
    with pytest.raises(DataError, match=r"called low, middle, high, no numbers: use --task classification"):
        task_from_datasets(other, task="regression")


JOINED = [
    (["b|a", "", "a", "c"], ("a", "b", "c"), IN_COLUMNS),
    (["b, a", " ", "a", "c"], ("a", "b", "c"), IN_COLUMNS),
    (["b; a", "", "a", "c"], ("a", "b", "c"), IN_COLUMNS),
    (["b|a", "", "a", "c, d"], ("a", "b", "c, d"), IN_COLUMNS),
    (["['b', 'a']", "[]", '["a"]', "['c']"], ("a", "b", "c"), IN_COLUMNS),
    (["a", "b", "a", "b"], ("a", "b"), [[1, 0], [0, 1], [1, 0], [0, 1]]),
    ([3, 7, 3, 7], ("3", "7"), [[1, 0], [0, 1], [1, 0], [0, 1]]),
    ([0, 1, 1, 0], ("label",), [[0], [1], [1], [0]]),
]


@pytest.mark.parametrize(("labels", "names", "targets"), JOINED)
def test_joined_labels_are_split_where_several_are_asked_for(labels, names, targets):
    task = read(labels, task="multi-label")
    assert (task.label_names, task.train.labels.tolist()) == (names, targets)


def test_joined_labels_are_classes_unless_several_are_asked_for():
    assert read(["b|a", "a", "c"]).label_names == ("a", "b|a", "c")


def test_the_separator_is_that_of_training():
    test = rows(["a, b", "c"])
    task = task_from_datasets(rows(["a, b|c", "c"]), test, task="multi-label")
    assert task.label_names == ("a, b", "c")
    assert task.evaluation.labels.tolist() == [[1, 0], [0, 1]]


def test_a_kind_that_does_not_fit_is_refused():
    with pytest.raises(DataError, match=r"2 label columns \(label, x\): a class for each text is one column"):
        task_from_datasets(rows([0, 1], x=[1, 0]), label_column=["label", "x"], task="classification")
    with pytest.raises(DataError, match=r"label 0\.5 in row 0 .*--task regression"):
        read([0.5, 1.0], task="classification")
    with pytest.raises(DataError, match=r"holds list values, no labels"):
        read([["a"], ["b"]], task="classification")
    for kind, labels in (("regression", [1, 2, 4]), ("multi-label", ["a", "b"])):
        with pytest.raises(DataError, match=f"positive_from = 3 makes two classes: leave it out with --task {kind}"):
            from_memory(labels, DataConfig("memory", task=kind, positive_from=3))


def from_memory(labels, config):
    from foretune.readers.arrow import splits_of
    from foretune.tasks import load

    return load.task_of(splits_of(rows(labels)), config)


# ---- faults


FAULTS = [
    ([0.5, None, 1.0], None, r"label in row 1 of column 'label' of split 'train' is missing: drop the row"),
    (["0.5", "", "1"], None, r"label in row 1 .*is empty: drop the row"),
    (["0.5", "nan", "1"], None, r"label 'nan' in row 1 .*is no finite number: drop the row"),
    (["0.5", "inf", "1"], None, r"label 'inf' in row 1 .*is no finite number"),
    ([0.5, float("inf"), 1.0], None, r"label inf in row 1 .*is not finite in single precision"),
    ([0.5, 1e39, 1.0], None, r"label 1e\+39 in row 1 .*is not finite in single precision: drop the row, or rescale"),
    (["0.5", "1e999", "1"], None, r"label '1e999' in row 1 .*is not finite"),
    (["3,5", "2,0", "1"], "regression", r"label '3,5' in row 0 .*a comma separates its decimals: write a point"),
    (["good", "2", "1"], "regression", r"label 'good' in row 0 .*no number: .*--task classification"),
    ([True, False, True], "regression", r"holds bool values, no numbers, first in row 0"),
    ([2, 2, 2], "regression", r"column 'label' of split 'train' is 2 in every row: there is nothing to learn"),
    ([[0.5, 1.0], [1.5, 1.0]], None, r"entry 1, is 1 in every row"),
    ([0.0, -1.0, 3.5], None, r"label -1 in row 1 .*only negative number: hidden labels\? .*add 1 to all"),
    ([[0.5, 1.5], [1.0]], None, r"row 1 .*is a list of 1 numbers, that of the first row of training has 2"),
    ([[0.5, 1.5], None], None, r"label in row 1 .*is missing"),
    ([["a", "a"], ["b"]], None, r"label 'a' stands twice in row 0 .*: name each once"),
    ([[1, 0, 1], [0]], None, r"label 1 stands twice in row 0"),
    ([["a"], None], None, r"label in row 1 .*is missing: drop the row, or write \[\] for no label"),
    ([["a", None], ["b"]], None, r"label in row 0 .*is missing"),
    ([["a", " "], ["b"]], None, r"label in row 0 .*is empty"),
    ([[0, 2], [1], [-1]], None, r"label -1 in row 2 .*hidden labels"),
    ([[[1]], [[0]]], None, r"holds list values, no labels"),
    ([["a"], ["a"]], None, r"tells no texts apart: every label is there in all rows, or in none"),
    ([[], ["a"], [], []], None, None),
    ([[0.0, 0.0], [0.0, 0.0]], None, r"tells no texts apart"),
    (["a|", "b"], "multi-label", r"labels 'a\|' in row 0 .*hold an empty one: mend the separators"),
    (["['a'", "['b']"], "multi-label", None),
    (["['a', b]", "['b']"], "multi-label", r"label \"?'\['a', b\]'?\"? in row 0 .*is no list"),
    (["", ""], "multi-label", r"holds no label in any row"),
]


@pytest.mark.parametrize(("labels", "kind", "message"), FAULTS)
def test_what_is_no_number_and_no_set_of_labels_is_named(labels, kind, message):
    if message is None:
        assert len(read(labels, task=kind).train.labels) == len(labels)
        return
    with pytest.raises(DataError, match=message) as error:
        read(labels, task=kind)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


JSON_FAULTS = [
    (["0.5", "NaN"], r"label in row 1 .*is missing"),
    (["0.5", "Infinity"], r"label inf in row 1 .*is not finite"),
    (["0.5", "true"], r"mixes booleans and others|holds bool values"),
    (["0.5", "{}"], r"holds dict values"),
    (['["a"]', '"b"'], r"mixes lists and single values, first in row 1 of train.jsonl"),
    (["[0.5]", "0.5"], r"mixes lists and single values, first in row 1 of train.jsonl"),
    (['["a"]', '[{"b": 1}]'], r"holds dict values"),
    (['["a", 1]', '["b"]'], r"is no class|mixes"),
    (['["a", true]', '["b"]'], r"mixes booleans and others"),
    (['["\\ud800"]', '["b"]'], r"row 0 .*surrogate"),
]


@pytest.mark.parametrize(("labels", "message"), JSON_FAULTS)
def test_faults_of_json_are_named_with_their_file(tmp_path, labels, message):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(f'{{"text": "a", "label": {label}}}' for label in labels))
    if labels[0] == '["a", 1]':  # numbers keep their spelling in json, so that 1 is the label "1"
        assert load_task(DataConfig(str(path))).label_names == ("1", "a", "b")
        return
    with pytest.raises(DataError, match=message) as error:
        load_task(DataConfig(str(path)))
    assert "train.jsonl" in str(error.value)


COLUMN_FAULTS = [
    (
        {"x": [0, 1, 0], "y": [0, 0, 0]},
        r"column 'y' of split 'train' is 0 in every row: leave it out of",
    ),
    ({"x": [0, 1, 0], "y": [0, None, 1]}, r"label in row 1 of column 'y' .*is missing"),
    ({"x": [0, 1, 0], "y": [0, -1, 1]}, r"label -1 in row 1 of column 'y' .*neither 0 nor 1: hidden labels"),
    ({"x": [0.5, 1, 0], "y": ["a", "b", "c"]}, r"label 'a' in row 0 of column 'y' .*several label columns"),
    ({"x": [0.5, 1, 0], "y": [2, 2, 2]}, r"column 'y' of split 'train' is 2 in every row"),
]


@pytest.mark.parametrize(("columns", "message"), COLUMN_FAULTS)
def test_faults_of_several_label_columns_are_named_with_their_column(columns, message):
    with pytest.raises(DataError, match=message):
        task_from_datasets(rows([0, 1, 2], **columns), label_column=list(columns))


def test_label_columns_are_named_once_and_exist():
    with pytest.raises(DataError, match="column 'x' is named twice in --label-column"):
        task_from_datasets(rows([0, 1], x=[0, 1]), label_column=["x", "x"])
    with pytest.raises(DataError, match="column 'y' does not exist"):
        task_from_datasets(rows([0, 1], x=[0, 1]), label_column=["x", "y"])
    test = rows([0, 1], z=[0, 1])
    with pytest.raises(DataError, match="column 'x' does not exist in split 'validation'"):
        task_from_datasets(rows([0, 1], x=[0, 1]), test, label_column=["label", "x"])


def test_many_distinct_integers_suggest_regression():
    labels = list(range(100))
    with pytest.raises(DataError, match=r"100 distinct values in 100 rows: set --task regression if they are numbers"):
        read(labels)
    assert read(labels, task="regression").train.labels[:, 0].tolist() == labels
    with pytest.raises(DataError, match=r"100 distinct values in 100 rows: name a label column"):
        read([f"c{label}" for label in labels])


def test_minus_one_among_opinions_is_a_number(caplog):
    assert read([-1, 0, 1], task="regression").train.labels.min() == -1
    assert "-1 is taken for a number" in caplog.text
    caplog.clear()
    assert read([-1.0, 0.25, -0.5], task="regression").train.labels.min() == -1
    assert not caplog.text


# ---- evaluation


def test_labels_that_training_has_not_are_refused_in_the_evaluation_split():
    with pytest.raises(DataError, match=r"label 'z' in row 1 of column 'label' of split 'validation'.*they are a, b"):
        task_from_datasets(rows([["a"], ["b"]]), rows([["a"], ["b", "z"]]))
    with pytest.raises(DataError, match=r"row 0 .*'validation' is a list of 3 numbers.*has 2"):
        task_from_datasets(rows([[0.5, 1.0], [1.0, 0.0]]), rows([[0.5, 1.0, 2.0]]))
    with pytest.raises(DataError, match=r"label 2 in row 0 .*'validation' is neither 0 nor 1"):
        task_from_datasets(rows([0, 1], x=[1, 0]), rows([2, 0], x=[1, 0]), label_column=["label", "x"])
    with pytest.raises(DataError, match=r"label 2.5 in row 0 .*'validation' is no class: for numbers set --task"):
        task_from_datasets(rows([0, 1]), rows([2.5, 1.0]))


def test_names_of_labels_are_matched_between_splits():
    task = task_from_datasets(named([[0], [1, 2], []]), named([[0], [2, 1]], names=("c", "b", "a")))
    assert task.evaluation.labels.tolist() == [[0, 0, 1], [1, 1, 0]]


def test_an_evaluation_split_may_be_constant_and_whole():
    task = task_from_datasets(rows([0.5, 1.0]), rows([1, 1]))
    assert task.evaluation.labels.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("train", "hidden", "columns"),
    [
        (rows([0.5, 1.0]), rows([-1.0, -1.0]), None),
        (rows([["a"], ["b"]]), rows([[], []]), None),
        (rows([["a"], ["b"]]), rows([["-1"], []]), None),
        (rows([0, 1], x=[1, 0]), rows([-1, -1], x=[-1, -1]), ["label", "x"]),
    ],
)
def test_a_split_that_hides_its_labels_is_left_out(train, hidden, columns, caplog):
    splits = datasets.DatasetDict({"train": train, "test": hidden})
    assert task_from_datasets(splits, label_column=columns).evaluation is None
    assert "-1 or empty in every row" in caplog.text


def test_a_label_on_no_row_or_on_all_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        task_from_datasets(named([[0, 2], [2]]))
    assert "no row has the label b: nothing is learnt of it" in caplog.text
    assert "every row has the label c" in caplog.text


# ---- contents


def test_fingerprints_tell_kinds_and_targets_apart():
    tasks = [
        read([0, 1]),
        read([0, 1], task="regression"),
        read([0.0, 1.5]),
        read([0, 1], task="multi-label"),
        read([[0], [1]]),
        read([[0], [1, 0]]),
    ]
    assert len({task.fingerprint for task in tasks}) == len(tasks)


def test_fingerprints_of_classes_are_those_of_earlier_versions():
    expected = "365a463a0d7219c53e2a8f6ebc7345b434b2b3ff121ff9f580ff72721aeefac4"
    assert read(["x", "y"]).fingerprint == expected


def test_rows_that_are_kept_keep_their_targets(tmp_path):
    path = write(tmp_path, frame_of([index / 7 for index in range(50)]), ".csv")
    task = load_task(DataConfig(str(path), max_train=10))
    assert task.train.labels.shape == (10, 1)
    for text, (target,) in zip(task.train.texts, task.train.labels, strict=True):
        assert target == pytest.approx(int(text[1:]) / 7)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=8, unique=True))
def test_every_spelling_of_a_number_gives_the_same_target(values):
    values = [*values, 0.5, -2.5]
    spelled = [repr(value) for value in values]
    for labels in (values, spelled, [f" {word} " for word in spelled], [f"{value:.17e}" for value in values]):
        assert read(labels).train.labels[:, 0].tolist() == values


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sets(st.sampled_from("abcde")), min_size=1, max_size=8))
def test_sets_come_out_as_they_went_in(sets):
    sets = [{"a"}, set(), *sets]
    lists = [sorted(one) for one in sets]
    for labels, kind in ((lists, None), (["|".join(one) for one in lists], "multi-label")):
        task = read(labels, task=kind)
        back = [{task.label_names[at] for at in np.flatnonzero(row)} for row in task.train.labels]
        assert back == sets
