"""Where a model comes from: looked at before anything of its size is made.

A folder or a hub id, its config.json and its files. No code of a repository runs, and nobody is asked whether it may,
unless the caller trusts it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from foretune.errors import ModelError, border, reason

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
WEIGHTS = "model.safetensors"
_UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size")
_ABSURD_SIZE, _ABSURD_LAYERS = 1_000_000, 10_000
_LONGEST_NAME = 150


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' loading report and bar away: the caller says what was loaded.

    Yields:
        Nothing.
    """
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def shown_source(source: str) -> str:
    """Quote the name of a model for a message.

    Args:
        source: As given.

    Returns:
        Its end, where it is very long.
    """
    return repr(source if len(source) <= _LONGEST_NAME else f"…{source[-_LONGEST_NAME:]}")


def locate(source: str) -> str:
    """Say where a model lies.

    Args:
        source: Local folder or hub id.

    Returns:
        Path of the folder, or the hub id as given.

    Raises:
        ModelError: If it is a file, a folder that is not there, or a folder without a model.
    """
    with border(ModelError, f"cannot look for model {shown_source(source)}"):
        path = Path(source).expanduser()
        if path.is_dir() and source:
            _check_folder(path, source)
            return str(path)
        if path.exists() and source:
            raise ModelError(f"model {shown_source(source)} is a file: give the folder that holds it with config.json")
        if not source or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
            raise ModelError(
                f"model folder {shown_source(source)} does not exist: give a folder with config.json, or a hub id"
            )
    return source


def _check_folder(path: Path, source: str) -> None:
    """The faults of a folder that have a remedy of their own."""
    if (path / ADAPTER).exists() or (path / CONFIG).exists():
        return
    inner = sorted(child for child in path.iterdir() if (child / ADAPTER).exists() or (child / CONFIG).exists())
    packed = sorted(path.glob("*.gguf"))
    hint = f": give {shown_source(str(inner[0]))}" if inner else ": give the folder that save_pretrained wrote"
    if packed and not inner:
        hint = (
            f", but {packed[0].name!r}: make safetensors of it once, with foretune.models.gguf.save_gguf(file, folder)"
        )
    raise ModelError(f"cannot load model {shown_source(source)}: the folder holds no config.json{hint}")


def refuse_adapter(location: str, source: str) -> None:
    """Refuse a saved adapter: transformers would load its base, from wherever the adapter says, and adapt it.

    Args:
        location: Where it lies.
        source: Name of the model.

    Raises:
        ModelError: If it is one.
    """
    try:
        adapter_config = find_adapter_config_file(location)
    except Exception:  # a hub that cannot be reached is reported by the load itself
        return
    if adapter_config is None:
        return
    try:
        content = json.loads(Path(adapter_config).read_text(encoding="utf-8"))
        base = content.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    named = f"give its base model {shown_source(base)}" if isinstance(base, str) and base else "give its base model"
    raise ModelError(
        f"{shown_source(source)} is a saved adapter, not a model: {named} as the model, "
        "and this folder as --adapter-config for the adapter's placement"
    )


@contextmanager
def reading(source: str, what: str, remedy: str = "") -> Iterator[None]:
    """Put the border around transformers, with the remedy that fits the fault.

    Args:
        source: Name of the model.
        what: What of it is loaded.
        remedy: What to do about a fault that has no remedy of its own.

    Yields:
        Nothing.

    Raises:
        ModelError: Whatever was raised, on one line.
    """
    begun = f"cannot load {what} {shown_source(source)}"
    with border(ModelError, begun, remedy=remedy):
        try:
            yield
        except ModelError:
            raise
        except SafetensorError as error:
            raise ModelError(
                f"{begun}: its safetensors cannot be read ({reason(error)}): fetch them again (git lfs pull)"
            ) from error
        except Exception as error:
            words = " ".join(str(error).split())
            if "trust_remote_code" in words or "custom code" in words:
                raise ModelError(
                    f"{begun}: it brings code of its own, which does not run unless --trust-remote-code is given"
                ) from error
            if "couldn't connect" in words or "offline" in words.lower():
                offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
                raise ModelError(
                    f"{begun}: it is no local folder, and the hub cannot be reached{offline}: "
                    "download it and give its folder"
                ) from error
            raise


def check_numbers(content: Any, source: str) -> None:
    """Refuse numbers that would fill the memory before anything else could look at them.

    Args:
        content: What config.json holds.
        source: Name of the model.

    Raises:
        ModelError: Naming the first, or if it holds something else than names and values.
    """
    if not isinstance(content, dict):
        raise ModelError(f"config.json of model {shown_source(source)} holds no mapping of names to values")
    for name in ("num_labels", "max_position_embeddings", "n_positions"):
        value = content.get(name)
        if isinstance(value, int) and value > _ABSURD_SIZE * 100:
            raise ModelError(f"config.json of model {shown_source(source)} says {name} = {value}: set it right")


def check_config(config: Any, source: str, *, trust_remote_code: bool) -> None:
    """Refuse what transformers takes from a config.json without a word.

    Args:
        config: transformers' configuration.
        source: Name of the model.
        trust_remote_code: Whether code from the hub may run.

    Raises:
        ModelError: If it asks for code as its attention kernel, or has no layers or absurdly many.
    """
    kernel = getattr(config, "_attn_implementation", None)
    if isinstance(kernel, str) and "/" in kernel and not trust_remote_code:
        raise ModelError(
            f"config.json of model {shown_source(source)} asks for the attention kernel {shown_source(kernel)}, which "
            "is code from the hub: remove attn_implementation, or give --trust-remote-code"
        )
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and not 1 <= layers <= _ABSURD_LAYERS:
        raise ModelError(f"config.json of model {shown_source(source)} says num_hidden_layers = {layers}: set it right")


def check_weights(location: str, config: Any, source: str) -> None:
    """Look at the files before anything of their size is made.

    Args:
        location: Folder; a hub id is passed over.
        config: transformers' configuration.
        source: Name of the model.

    Raises:
        ModelError: If there are no safetensors, they cannot be read, or a size of the configuration is absurd.
    """
    folder = Path(location)
    if not folder.is_dir():
        return
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        other = sorted(path.name for pattern in _UNSAFE for path in folder.glob(pattern))
        if other:
            raise ModelError(
                f"cannot load model {shown_source(source)}: it has its weights in {other[0]!r}, and only safetensors "
                "are read, for nothing is unpickled: convert it with model.save_pretrained(folder)"
            )
        raise ModelError(f"cannot load model {shown_source(source)}: the folder holds no {WEIGHTS}")
    dimensions = {dimension for path in paths for dimension in _dimensions(path, source)}
    for name in _SIZES:
        size = getattr(config, name, None)
        if isinstance(size, int) and size > _ABSURD_SIZE and size not in dimensions:
            raise ModelError(
                f"config.json of model {shown_source(source)} says {name} = {size}, and no weight has that size: "
                "set it right"
            )


def _dimensions(path: Path, source: str) -> set[int]:
    begun = f"cannot read the weights {path.name!r} of model {shown_source(source)}"
    again = "fetch the safetensors again (git lfs pull)"
    with border(ModelError, begun, remedy=again):
        if not path.is_file():
            raise ModelError(f"{begun}: it is no file; {again}")
        with path.open("rb") as file:
            if file.read(20).startswith(b"version https://git-"):
                raise ModelError(f"{begun}: it is the pointer of git-lfs, not the safetensors: run git lfs pull")
        with safe_open(path, framework="pt") as content:
            return {size for name in content.keys() for size in content.get_slice(name).get_shape()}  # noqa: SIM118
