"""Whose an output folder is: where it lies, one run at a time in it, and nothing left behind that nobody wants.

While a command works on a folder NAME it holds the file `.NAME.foretune-lock` beside it (in it, where the folder above
is read-only). The lock is the operating system's: it ends with the process, so that a file left by a killed one blocks
nobody, and the next run in that folder takes the file away.
"""

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from foretune.errors import StoreError, border, reason

LOCK = ".foretune-lock"
PART = ".foretune-part"  # a run that is being written
_LONGEST_NAME = 255  # bytes
_HELD: set[tuple[int, Path]] = set()  # by thread


@contextmanager
def disk(what: str, remedy: str = "") -> Iterator[None]:
    """Turn a fault of the disk into one error of ours, whichever library met it; all other faults pass as they are.

    Args:
        what: What could not be done, with the name of the thing: `cannot write 'x.csv'`.
        remedy: What to do about it.

    Yields:
        Nothing.

    Raises:
        StoreError: If the disk refuses.
        Exception: Whatever else was raised.
    """
    end = f"; {remedy}" if remedy else ""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{what}: {error.strerror or reason(error)}{end}") from error
    except Exception as error:
        if not _is_writer(error):
            raise
        why = reason(error) if isinstance(error, SafetensorError) else "torch could not write all of it: is it full?"
        raise StoreError(f"{what}: {why}{end}") from error


def _is_writer(error: Exception) -> bool:
    """Writers in other languages know no OSError: safetensors in Rust, torch.save in C++."""
    words = str(error)
    of_torch = any(
        part in words for part in ("PytorchStreamWriter", "inline_container", "iostream", "Parent directory")
    )
    return isinstance(error, SafetensorError) or (isinstance(error, RuntimeError) and of_torch)


def place_of(folder: Path) -> Path:
    """Find out where a folder lies.

    Args:
        folder: As given: relative, with `~`, or a link to a folder.

    Returns:
        Its absolute path without links.

    Raises:
        StoreError: If it is a link that leads nowhere, or has no home.
    """
    with border(StoreError, f"cannot write to {str(folder)!r}", remedy="name another folder"):
        expanded = folder.expanduser()
        place = Path(os.path.realpath(expanded))
        if expanded.is_symlink() and not place.exists():
            raise StoreError(f"output {str(folder)!r} is a link that leads nowhere: name a folder")
    return place


def beside(place: Path, ending: str) -> Path:
    """Name a hidden file beside a folder.

    Args:
        place: From `place_of`.
        ending: `LOCK` or `PART`.

    Returns:
        `.NAME` with the ending; a digest instead of a name that is too long for the disk with it.
    """
    name = f".{place.name}{ending}"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(place.name)).hexdigest()[:16]}{ending}"
    return place.with_name(name) if place.name else place / name


def lock_file(place: Path) -> Path:
    """Say where the lock of a folder lies.

    Args:
        place: From `place_of`.

    Returns:
        Beside the folder; in it, if nothing can be made beside it.
    """
    return beside(place, LOCK) if os.access(place.parent, os.W_OK) or not place.is_dir() else place / LOCK


@contextmanager
def hold(folder: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[Path]:
    """Keep all other runs out of a folder; within one thread it may be held several times over.

    The folders above are made, and those that are still empty in the end are taken away again.

    Args:
        folder: Output folder, existing or not.
        on_wait: Called if another run holds it, whose end is then waited for; None to refuse it instead.

    Yields:
        Where it lies, without links.

    Raises:
        StoreError: If another run holds it and is not waited for, or nothing can be written there.
    """
    place = place_of(folder)
    mine = (threading.get_ident(), place)
    if mine in _HELD:
        yield place
        return
    what = f"cannot write to {str(folder)!r}"
    with disk(what):
        made = [path for path in (place, *place.parents) if not path.exists()]
    try:
        with disk(what):
            place.parent.mkdir(parents=True, exist_ok=True)
            path = lock_file(place)
            lock = FileLock(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if on_wait is None:
                    raise StoreError(
                        f"output folder {str(folder)!r} is in use by another run: wait until it has ended, or name "
                        "another"
                    ) from None
                on_wait()
                lock.acquire()
        _HELD.add(mine)
        try:
            yield place
        finally:
            _HELD.discard(mine)
            with suppress(OSError):
                path.unlink()  # while it is held: whoever waits for it finds out
            lock.release()
    finally:
        for empty in made:
            with suppress(OSError):
                empty.rmdir()


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link; what a link leads to stays.

    Args:
        path: Path; nothing is done where there is none.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
