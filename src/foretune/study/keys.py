"""Content keys: the same settings, data and weights give the same key, wherever the files lie."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from foretune.errors import ModelError, border
from foretune.models.loading import model_files, shown
from foretune.settings.groups import DataConfig
from foretune.study.grid import Cell
from foretune.tasks.load import load_task

SCHEMA = 1
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
    paths = model_files(source)
    with border(ModelError, f"cannot read the files of model {shown(source)}"):
        return hash_files(paths)


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
