"""Content keys: the same settings, data and weights give the same key, wherever the files lie."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from foretune.config import DataConfig
from foretune.data import load_task
from foretune.errors import ModelError
from foretune.study.grid import Cell

SCHEMA = 1
_OF_MODEL = ("*.json", "*.safetensors", "*.txt", "*.model")
_ELSEWHERE = ("model", "dataset", "device", "report_to", "trust_remote_code")


def cell_key(cell: Cell) -> str:
    """Hash what determines a cell's result.

    Paths, names, device and trackers do not count; data and weights count by their content.

    Args:
        cell: Cell.

    Returns:
        20 hexadecimal digits of a SHA-256.
    """
    settings = {
        group: {
            name: _plain(value)
            for name, value in dataclasses.asdict(getattr(cell, group)).items()
            if name not in _ELSEWHERE
        }
        for group in ("model", "adapter", "score", "train")
    }
    content = {"schema": SCHEMA, **settings, "data": _data(cell.data), "weights": _weights(cell.model.model)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def _plain(value: Any) -> Any:
    """One spelling for 8 and 8.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@cache
def _data(config: DataConfig) -> str:
    return load_task(config).fingerprint


@cache
def _weights(source: str) -> str:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, allow_patterns=list(_OF_MODEL)))
        except Exception as error:  # each way of failing has its own class
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"model {source!r} is no local folder and cannot be had from the hub: {reason}") from error
    return hash_files(path for pattern in _OF_MODEL for path in folder.glob(pattern))


def hash_files(paths: Iterable[Path]) -> str:
    """Hash the names and contents of files.

    Args:
        paths: Files.

    Returns:
        SHA-256 in hexadecimal; the order of the paths does not matter.
    """
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name}\n{content}\n".encode())
    return digest.hexdigest()
