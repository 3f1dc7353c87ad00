"""The checkpoints of a fine-tune: which of them a run may go on from."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from foretune.errors import StoreError, border
from foretune.report.folders import remove
from foretune.report.store import settle, write_text

SEAL = "whole.json"  # digests of its files, written when all the others are
OnNote = Callable[[str], None]


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder as the Trainer names them.

    Args:
        folder: Folder of the run.

    Returns:
        Folders, the last first.
    """
    checkpoints = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(checkpoints, key=lambda path: -int(path.name.partition("-")[2]))


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as whole, and give its files the mode that the umask asks for.

    Args:
        checkpoint: Folder, to which the Trainer has written all that the first process writes.
    """
    mode = checkpoint.stat().st_mode & 0o666
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    for path in files:
        settle(path, mode)
    write_text(checkpoint / SEAL, json.dumps({path.name: _digest(path) for path in files}))


def last_whole(folder: Path, *, clean: bool, on_note: OnNote | None = None) -> Path | None:
    """Find the checkpoint to go on from.

    Args:
        folder: Folder of the run.
        clean: Whether to remove those that cannot be read.
        on_note: Called with a sentence for each of these.

    Returns:
        The last one whose files are as they were written and can be loaded; None if there is none.
    """
    for path in checkpoints(folder) if folder.is_dir() else []:
        try:
            with border(StoreError, f"{path.name} cannot be used"):
                _check(path)
        except StoreError as error:
            if on_note is not None:
                on_note(f"{error}: it is thrown away, and the run goes on from the one before or begins again")
            if clean:
                remove(path)
            continue
        return path
    return None


def _check(checkpoint: Path) -> None:
    if not (checkpoint / SEAL).exists():
        raise StoreError(f"{checkpoint.name} was not written to its end")
    for name, digest in json.loads((checkpoint / SEAL).read_text(encoding="utf-8")).items():
        if _digest(checkpoint / name) != digest:
            raise StoreError(f"{checkpoint.name} holds a {name} that is not as it was written")
    core = np._core.multiarray  # type: ignore[attr-defined]  # what NumPy's random state is made of
    with torch.serialization.safe_globals([core._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]):
        for path in checkpoint.glob("*.pt*"):  # other versions of the libraries may not read what these wrote
            torch.load(path, map_location="cpu", weights_only=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
