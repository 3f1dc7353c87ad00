"""Run folders: written whole or not at all, never over an older run."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from foretune.errors import ForetuneError, StoreError, border

RESULT = "result.json"


def check_free(folder: Path) -> None:
    """Refuse a folder that a run cannot be written to, before the work starts.

    Args:
        folder: Folder that is to hold the run.

    Raises:
        StoreError: If it holds anything, is a file, or cannot be created.
    """
    if folder.is_dir():
        if (folder / RESULT).exists():
            raise StoreError(f"output folder {str(folder)!r} already holds a run: name another or remove it")
        if any(folder.iterdir()):
            raise StoreError(f"output folder {str(folder)!r} is not empty: name a new one")
    check_writable(folder)


def check_writable(folder: Path) -> None:
    """Refuse a folder that nothing can be written to, whatever it holds.

    Args:
        folder: Folder, existing or not.

    Raises:
        StoreError: If it is a file or cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"output {str(folder)!r} is a file: name a folder")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    if not os.access(parent, os.W_OK):
        raise StoreError(f"output folder {str(folder)!r} cannot be created: {str(parent)!r} is not writable")


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Args:
        folder: Folder.

    Raises:
        StoreError: If the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from error


def write_run(folder: Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Write the files of a run into a temporary folder beside it, then rename it: a crash leaves no half run.

    Args:
        folder: New or empty folder of the run.
        writers: For each file name a function that writes it to the path that it is given.

    Raises:
        StoreError: If the folder holds anything, or the disk refuses.
    """
    check_free(folder)
    folder = folder.absolute()
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        for name, write in writers.items():
            write(temporary / name)
            (temporary / name).chmod(0o666 & ~umask)  # some writers make their files private
        temporary.replace(folder)  # replaces an empty folder too
    except OSError as error:
        raise StoreError(f"cannot write the run to {str(folder)!r}: {error.strerror or error}") from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside its place, then rename it: whoever reads finds the old file or the new one, whole.

    Args:
        path: File.
        write: Writes it to the path that it is given, whose suffix is the same.

    Raises:
        StoreError: If the disk refuses.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise StoreError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all.

    Args:
        path: File.
        text: UTF-8 text.
    """
    write_whole(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, at any depth: JSON has no NaN.

    Args:
        value: JSON-ready values.

    Returns:
        The same without NaN and infinities.
    """
    if isinstance(value, Mapping):
        return {name: finite(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON that every reader takes: no NaN, no infinity.

    Args:
        path: File.
        value: JSON-ready values.
    """
    path.write_text(to_json(value) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: File.

    Returns:
        Its values by name.

    Raises:
        StoreError: If it cannot be read or holds no object.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {str(path)!r}: {' '.join(str(error).split())}") from error
    if not isinstance(held, dict):
        raise StoreError(f"{str(path)!r} holds no JSON object")
    return held


LARGEST_YAML = 100_000  # values, each alias counted as often as it stands for something


def read_yaml(path: Path, *, kind: type[ForetuneError] = StoreError) -> Any:
    """Read a YAML file that somebody else may have written.

    Args:
        path: File.
        kind: Error to raise.

    Returns:
        Its plain values; None where it is empty.

    Raises:
        ForetuneError: Of the kind, if it cannot be read, is no YAML, or its aliases stand for more than 100,000
            values (a few lines of them can stand for gigabytes).
    """
    with border(kind, f"cannot read {str(path)!r}"):
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8-sig"))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()


def _check_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Count the values below a node as if every alias were written out; one inside itself has no end."""
    known = sizes.get(id(node))
    if known is None:
        sizes[id(node)] = LARGEST_YAML + 1  # until it is counted
        below = node.value if isinstance(node.value, list) else []
        parts = [part for item in below for part in (item if isinstance(item, tuple) else (item,))]
        known = sizes[id(node)] = 1 + sum(_check_size(part, sizes) for part in parts)
    if known > LARGEST_YAML:
        raise yaml.YAMLError(f"its aliases stand for more than {LARGEST_YAML:,} values")
    return known


def to_json(value: Mapping[str, Any]) -> str:
    """Encode as JSON with two blanks of indentation.

    Args:
        value: JSON-ready values.

    Returns:
        Text.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
