"""Run folders: written whole or not at all, never over an older run."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foretune.errors import StoreError

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
    elif folder.exists():
        raise StoreError(f"output {str(folder)!r} is a file: name a folder")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    if not os.access(parent, os.W_OK):
        raise StoreError(f"output folder {str(folder)!r} cannot be created: {str(parent)!r} is not writable")


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


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON that every reader takes: no NaN, no infinity.

    Args:
        path: File.
        value: JSON-ready values.
    """
    path.write_text(to_json(value) + "\n", encoding="utf-8")


def to_json(value: Mapping[str, Any]) -> str:
    """Encode as JSON with two blanks of indentation.

    Args:
        value: JSON-ready values.

    Returns:
        Text.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
