"""Trials that were made are kept: one file for each, named by the content of all that its outcome hangs on."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from foretune.errors import ForetuneError, StoreError
from foretune.forecasting.outcomes import LOSSES
from foretune.forecasting.shown import Shown
from foretune.models.adapter_file import plain
from foretune.report.folders import disk
from foretune.report.home import home
from foretune.report.provenance import versions
from foretune.report.store import finite, make_folder, read_json, write_json, write_whole
from foretune.settings.commands import fields_of
from foretune.settings.groups import Recipe, TaskKind
from foretune.trials.bench import Bench, Candidate, adapter_of, measures
from foretune.trials.plan import Trial
from foretune.trials.run import Tried

SCHEMA = 1  # counted up where the same settings would train or evaluate otherwise
_PLACES = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")  # of peft's


@dataclass(frozen=True)
class Store:
    """Kept trials of one model.

    Attributes:
        folder: Where they lie.
        model: Hash of weights and tokenizer.
    """

    folder: Path
    model: str


def open_store(bench: Bench, folder: Path | None = None) -> Store:
    """Find the trials of a model.

    Args:
        bench: Model, data and rows.
        folder: Where trials are kept; None for `trials` in foretune's home.

    Returns:
        The store; nothing is made yet.
    """
    digest = hashlib.sha256(hash_weights(bench.model).encode())
    digest.update(_tokenizer(bench.tokenizer).encode())
    return Store(home() / "trials" if folder is None else folder, digest.hexdigest())


def hash_weights(model: nn.Module) -> str:
    """Hash the kind of a model with the names, types, shapes and numbers of its parameters and buffers.

    Args:
        model: Model, with its head and whatever adapters it carries.

    Returns:
        SHA-256 in hexadecimal; wherever its files and its tensors lie.
    """
    config: Any = getattr(model, "config", None)
    digest = hashlib.sha256(f"{type(model).__name__} {_settings(config)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        numbers = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(numbers.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _settings(config: Any) -> str:
    """A model's settings without where it came from and which version wrote them."""
    held = config.to_dict() if hasattr(config, "to_dict") else {}
    return _json({name: value for name, value in held.items() if name not in ("_name_or_path", "transformers_version")})


def _tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.update(truncation=None, padding=None)  # of the last call
    else:
        rules = tokenizer.get_vocab()
    return _json({"kind": type(tokenizer).__name__, "rules": rules, "special": tokenizer.special_tokens_map,
                  "side": tokenizer.truncation_side})  # fmt: skip


def trial_key(store: Store, bench: Bench, candidate: Candidate, trial: Trial) -> str:
    """Hash what the outcome of a trial hangs on.

    Names, places and devices do not count; weights, texts, labels and the tokenizer count by their content.

    Args:
        store: With the hash of the model.
        bench: Data and rows.
        candidate: Adapter and recipe.
        trial: Rows and seed.

    Returns:
        20 hexadecimal digits of a SHA-256.
    """
    config = adapter_of(bench, candidate, trial)
    adapter = None if config is None else {k: v for k, v in plain(config).items() if k not in _PLACES}
    content = {
        "schema": SCHEMA,
        "model": store.model,
        **bench.content(trial),
        "adapter": adapter,
        "recipe": fields_of(candidate.recipe, Recipe),
        "rows": trial.rows,
        "seed": trial.seed,
        "evaluations": trial.evaluations,
        "max_length": bench.batching.max_length,
    }
    return hashlib.sha256(_json(content).encode()).hexdigest()[:20]


def _json(content: Any) -> str:
    return json.dumps(_one_spelling(content), sort_keys=True, default=str)


def _one_spelling(value: Any) -> Any:
    """One spelling for 8 and 8.0, for sets whatever their order, and for what a library counts as not set."""
    if isinstance(value, Mapping):
        return {str(name): _one_spelling(one) for name, one in value.items() if one is not None}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_one_spelling(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def find(store: Store, key: str, kind: TaskKind, *, on_note: Callable[[str], None] | None = None) -> Tried | None:
    """Look for a trial.

    Args:
        store: Where.
        key: Key of the trial.
        kind: Kind of its task.
        on_note: Called with a sentence if its file is damaged.

    Returns:
        The trial; None where it is not there or damaged, so that it has to be made.
    """
    path = place_of_trial(store, key)
    if not path.exists():
        return None
    try:
        return _read(path, key, kind)
    except (ForetuneError, KeyError, ValueError, TypeError, RecursionError) as error:
        if on_note is not None:
            why = str(error) if isinstance(error, ForetuneError) else "it does not hold what foretune writes"
            on_note(f"the kept trial {str(path)!r} is damaged ({why}): it is made again")
        return None


def place_of_trial(store: Store, key: str) -> Path:
    """Say where a trial lies.

    Args:
        store: Store.
        key: Key of the trial.

    Returns:
        Its file, whether it is there or not.
    """
    return store.folder / f"{key}.json"


def _read(path: Path, key: str, kind: TaskKind) -> Tried:
    content = read_json(path)
    if content["schema"] != SCHEMA or content["key"] != key:
        raise StoreError(f"it is of schema {content['schema']!r} and key {content['key']!r}")
    held = content["shown"]
    outcomes = {name: _float(held["outcomes"][name]) for name in (*LOSSES, *(one.name for one in measures(kind)))}
    for name in ("rows", "seed", "eval_rows", "best_epoch"):
        if type(held[name]) is not int or held[name] < 0:
            raise StoreError(f"its {name} is {held[name]!r}")
    if type(held["diverged"]) is not bool:
        raise StoreError(f"its diverged is {held['diverged']!r}")
    if held["diverged"] is False and not all(map(math.isfinite, (outcomes["train_loss"], outcomes["eval_loss"]))):
        raise StoreError("a loss is missing")
    shown = Shown(**{**{field.name: held[field.name] for field in dataclasses.fields(Shown)},
                     "outcomes": outcomes, "best": _float(held["best"])})  # fmt: skip
    return Tried(shown, float(content["passes"]), float(content["seconds"]))


def _float(value: Any) -> float:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise StoreError(f"{value!r} stands for a number")
    return math.nan if value is None else float(value)


def keep(store: Store, key: str, tried: Tried, about: Mapping[str, Any]) -> None:
    """Keep a trial, whole or not at all.

    Args:
        store: Where.
        key: Key of the trial.
        tried: What came of it.
        about: What a person would want to know of it; nothing that is read again.
    """
    content = finite({"schema": SCHEMA, "key": key, **dataclasses.asdict(tried), "about": dict(about),
                      "versions": versions()})  # fmt: skip
    write_whole(place_of_trial(store, key), lambda path: write_json(path, content))


@contextmanager
def turn(store: Store, key: str) -> Iterator[None]:
    """Let processes that want the same trial take turns; the lock dies with its process.

    Args:
        store: Where.
        key: Key of the trial.

    Yields:
        Nothing.

    Raises:
        StoreError: If nothing can be written there.
    """
    make_folder(store.folder)
    path = store.folder / f".{key}.lock"
    with disk(f"cannot write to {str(store.folder)!r}", "name another folder by FORETUNE_HOME"):
        lock = FileLock(path)
        lock.acquire()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever waits for it finds out
        lock.release()
