"""Where data lie: odd paths, folders and files that are none, and what `save_to_disk` left half or odd."""

import json
import os

import datasets
import pytest

from foretune.errors import DataError, ForetuneError
from foretune.settings.groups import DataConfig
from foretune.tasks.load import load_task

ROWS = "text,label\na,x\nb,y\n"


def load(source, **options):
    return load_task(DataConfig(str(source), **options))


def refused(source, **options):
    """The message, which takes one line of moderate length."""
    with pytest.raises(ForetuneError) as error:
        load(source, **options)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 600
    return message


@pytest.mark.parametrize("name", ["a b", "[set]", "*?", "über", "a=b", "-", "it's", '"', "%20", "$HOME", "{x}", "a\nb"])
def test_odd_names_of_folders_and_files(tmp_path, name):
    folder = tmp_path / name
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.csv").write_text(ROWS)
    (folder / f"{name}.csv").write_text(ROWS)
    for source in (f"{folder}/", f"{folder / name}.csv", f"{folder / name}.csv/", f"{folder}/./data//"):
        assert list(load(source).train.texts) == ["a", "b"]


def test_a_path_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "train.csv").write_text(ROWS)
    assert list(load("~/train.csv").train.texts) == ["a", "b"]
    assert "does not exist" in refused("~/test.csv")
    assert "cannot be a path" in refused("~nobody-of-this-name/train.csv")


@pytest.mark.parametrize("source", ["x" * 300, "/x" * 5000, "/tmp/" + "y" * 300 + ".csv", "a/b/c", "", " ", "a\0b.csv"])
def test_names_that_no_file_can_have(source):
    refused(source)


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.parquet", "train-00000-of-00001.tsv", "test.csv"])
@pytest.mark.parametrize("kind", ["folder", "link", "loop", "pipe"])
def test_what_is_no_file_is_named(tmp_path, name, kind):
    (tmp_path / "train.csv").write_text(ROWS)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "loop" else tmp_path / "nowhere")
    words = {"folder": "is a folder", "link": "is a link to nothing", "loop": "link|path", "pipe": "no regular file"}
    message = refused(tmp_path)
    assert name in message
    assert any(word in message for word in words[kind].split("|")) or "more than once" in message
    if kind != "folder":
        assert name in refused(path)


@pytest.mark.parametrize("source", ["/dev/null", "/dev/zero"])
def test_devices_are_no_data(source):
    assert "neither a file nor a folder" in refused(source)


def test_what_lies_beside_the_tables_does_not_matter(tmp_path):
    (tmp_path / "train.csv").write_text(ROWS)
    (tmp_path / "README.md").write_text("---\nconfigs: [{config_name: a, data_files: b}]\ndataset_info: 7\n---\n")
    (tmp_path / "dataset_infos.json").write_text("null")
    (tmp_path / "train.py").write_text("raise SystemExit(3)")
    (tmp_path / ".train.csv.swp").write_bytes(b"\0")
    (tmp_path / "set.py").write_text("raise SystemExit(3)")
    assert list(load(tmp_path).train.texts) == ["a", "b"]


def test_a_folder_of_many_other_files_is_listed_in_part(tmp_path):
    for index in range(500):
        (tmp_path / f"{'long name ' * 10}{index}.txt").write_text("x")
    message = refused(tmp_path)
    assert "holds no train.csv" in message
    assert "more" in message


@pytest.fixture
def saved(tmp_path):
    split = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    datasets.DatasetDict(train=split, test=split).save_to_disk(str(tmp_path / "both"))
    split.save_to_disk(str(tmp_path / "one"))
    assert load(tmp_path / "both").evaluation.name == "test"
    return tmp_path


CONTENTS = ["", "{", "null", "[]", "7", '"x"', "{}", '{"splits": 3}', '{"_data_files": 3}', "\0", "[" * 10**5]


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
@pytest.mark.parametrize(
    "file", ["one/state.json", "one/dataset_info.json", "both/dataset_dict.json", "both/train/state.json"]
)
def test_odd_files_of_a_saved_data_set(saved, file, content):
    path = saved / file
    path.write_text(content)
    source = saved / file.split("/")[0]
    try:
        load(source)
    except DataError as error:
        assert source.name in str(error)  # noqa: PT017
        assert str(error).isprintable()  # noqa: PT017


@pytest.mark.parametrize("change", ["missing", "empty", "cut", "folder", "other columns", "too many splits"])
def test_damaged_tables_of_a_saved_data_set(saved, change):
    (path,) = (saved / "one").glob("*.arrow")
    if change == "missing":
        path.unlink()
    elif change == "empty":
        path.write_bytes(b"")
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:300])
    elif change == "folder":
        path.unlink()
        path.mkdir()
    elif change == "other columns":
        info = saved / "one" / "dataset_info.json"
        content = json.loads(info.read_text())
        content["features"] = {"other": {"dtype": "int64", "_type": "Value"}}
        info.write_text(json.dumps(content))
    else:
        (saved / "both" / "dataset_dict.json").write_text('{"splits": ["train", "lost"]}')
        assert "'lost'" in refused(saved / "both", eval_split="lost") or "both" in refused(saved / "both")
        return
    assert "one" in refused(saved / "one")


@pytest.mark.parametrize("cut", [0, 3, 4, 20, 100, -1, -4, -8, -50])
def test_cut_parquet_files(tmp_path, cut):
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict({"text": ["a", "b"] * 50, "label": ["x", "y"] * 50}).to_parquet(str(path))
    path.write_bytes(path.read_bytes()[:cut])
    assert "train.parquet" in refused(path)


def test_an_unreadable_file(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(ROWS)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "Permission denied" in refused(tmp_path)
    path.chmod(0o600)
    tmp_path.chmod(0)
    assert "Permission denied" in refused(tmp_path)
    tmp_path.chmod(0o700)


@pytest.mark.timeout(120)
def test_a_large_table_is_read_whole(tmp_path):
    rows = [(f"text {index}, 'and' more of it", index % 7) for index in range(100_000)]
    lines = [f'"{text}",{label}\n' for text, label in rows]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(lines))
    records = [f'{{"text": "{text}", "label": {label}}}\n' for text, label in rows]
    (tmp_path / "b.jsonl").write_text("".join(records))
    assert [len(load(tmp_path / name).train.texts) for name in ("a.csv", "b.jsonl")] == [100_000] * 2
