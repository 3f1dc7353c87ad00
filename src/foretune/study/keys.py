"""Content keys: the same settings, data and weights give the same key, wherever the files lie."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from foretune.errors import ModelError, border
from foretune.models.loading import model_files
from foretune.models.source import shown_source
from foretune.settings.groups import DataConfig
from foretune.study.grid import Cell
from foretune.tasks.load import load_task

SCHEMA = 2
FORMER = 1  # its keys hashed every setting, so that a new one would have made every cell a new one
_ELSEWHERE = ("model", "dataset", "device", "report_to", "trust_remote_code", "memory", "scratch")
# What a key counts from: the settings of schema 1 with their defaults as they were then. Frozen: where a default of
# today changes, a cell that was made with the former one keeps its key.
BASE: Mapping[str, Mapping[str, Any]] = {
    "model": {"dtype": "float32"},
    "adapter": {
        "target_modules": None,
        "layers": None,
        "r": 8,
        "alpha": 8,
        "rslora": False,
        "init": "default",
    },
    "score": {
        "samples": 32,
        "eval_samples": 128,
        "repeats": 1,
        "draws": 5,
        "reduction": None,
        "head": "random",
        "heads": 4,
        "ntk_params": "adapter",
        "sigma": 1e-4,
        "ridge": None,
        "max_length": 512,
        "batch_size": 32,
        "seed": 0,
    },
    "train": {
        "epochs": 10,
        "learning_rate": 4e-4,
        "train_batch_size": 32,
        "weight_decay": 0.0,
        "warmup_ratio": 0.06,
        "scheduler": "linear",
        "max_length": 512,
        "batch_size": 32,
        "eval_samples": None,
        "train_eval_samples": 2000,
        "bf16": False,
        "seed": 0,
    },
}


def cell_key(cell: Cell) -> str:
    """Hash what determines a cell's result.

    Only settings that differ from the defaults count, so that a new one with a default leaves every key as it is.
    Paths, names, device and trackers do not count; data and weights count by their content.

    Args:
        cell: Cell.

    Returns:
        20 hexadecimal digits of a SHA-256.
    """
    return _hash(cell, SCHEMA, {group: _changed(cell, group) for group in BASE})


def former_key(cell: Cell) -> str | None:
    """Hash a cell as schema 1 did, to find what was stored then.

    Args:
        cell: Cell.

    Returns:
        The key; None if a setting that schema 1 did not have is not at its default.
    """
    settings = {group: dict(names) for group, names in BASE.items()}
    for group, names in settings.items():
        changed = _changed(cell, group)
        if changed.keys() - names.keys():
            return None
        names.update(changed)
    plain = {group: {name: _plain(value) for name, value in names.items()} for group, names in settings.items()}
    return _hash(cell, FORMER, plain)


def _changed(cell: Cell, group: str) -> dict[str, Any]:
    """Settings of a group that are not as in `BASE` or, where they are newer, not at their default."""
    settings, changed = getattr(cell, group), {}
    for field in fields(settings):
        if field.name not in _ELSEWHERE:
            value = getattr(settings, field.name)
            if value != BASE[group].get(field.name, field.default):
                changed[field.name] = _plain(value)
    return changed


def _hash(cell: Cell, schema: int, settings: Mapping[str, Any]) -> str:
    content = {"schema": schema, **settings, "data": _data(cell.data), "weights": _weights(cell.model.model)}
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
    with border(ModelError, f"cannot read the files of model {shown_source(source)}"):
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
