"""Run folders and their files: written whole or not at all, never over an older run."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from foretune.errors import ForetuneError, StoreError, border
from foretune.report.folders import LOCK, PART, beside, disk, hold, place_of, remove

RESULT = "result.json"
Writer = Callable[[Path], None]  # writes a file to the path that it is given, whose suffix is that of its place
_NAMES = ".names"  # in a part: what it is about to put into a folder


def check_free(folder: Path, *, leftovers: Iterable[str] = ()) -> None:
    """Refuse a folder that a run cannot be written to, before the work starts.

    Args:
        folder: Folder that is to hold the run.
        leftovers: Names in it that count for nothing, beside those that a killed run left.

    Raises:
        StoreError: If it holds anything, is a file, or cannot be created.
    """
    place = place_of(folder)
    with disk(f"cannot write to {str(folder)!r}"):
        if place.is_dir():
            if (place / RESULT).exists() and not _torn(place):
                raise StoreError(f"output folder {str(folder)!r} already holds a run: name another or remove it")
            if set(os.listdir(place)).difference({LOCK, PART}, _torn(place), leftovers):
                raise StoreError(f"output folder {str(folder)!r} is not empty: name a new one")
    check_writable(folder)


def check_writable(folder: Path) -> None:
    """Refuse a folder that nothing can be written to, whatever it holds.

    Args:
        folder: Folder, existing or not.

    Raises:
        StoreError: If it is a file, lies below one, or cannot be written to.
    """
    place = place_of(folder)
    with disk(f"cannot write to {str(folder)!r}"):
        nearest = next(path for path in (place, *place.parents) if path.exists())
        if not nearest.is_dir():
            below = "is a file" if nearest == place else f"lies below the file {str(nearest)!r}"
            raise StoreError(f"output {str(folder)!r} {below}: name a folder")
        if not os.access(nearest, os.W_OK):
            raise StoreError(f"output folder {str(folder)!r} cannot be created: {str(nearest)!r} is not writable")


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Args:
        folder: Folder.

    Raises:
        StoreError: If the disk refuses.
    """
    with disk(f"cannot write to {str(folder)!r}"):
        folder.mkdir(parents=True, exist_ok=True)


def write_run(folder: Path, writers: Mapping[str, Writer]) -> None:
    """Write the files of a run, all or none, whenever the work is cut off.

    A new folder is written under another name beside its place and renamed. A folder that is there stays the same
    folder: the files are written to a folder in it and moved up, `result.json` last; what a run that was cut off
    there has moved is known, does not count, and is removed by the next.

    Args:
        folder: New or empty folder of the run.
        writers: For each file name a function that writes it to the path that it is given.

    Raises:
        StoreError: If the folder holds anything, another run holds it, or the disk refuses.
    """
    with hold(folder) as place, disk(f"cannot write the run to {str(folder)!r}"):
        check_free(folder)
        names = sorted(writers, key=lambda name: name == RESULT)
        inside = place.is_dir()
        part = place / PART if inside else beside(place, PART)
        for name in _torn(place):
            remove(place / name)
        remove(part)
        try:
            _write_part(part, {name: writers[name] for name in names})
            if inside:
                write_text(part / _NAMES, json.dumps(names))
                for name in names:
                    (part / name).replace(place / name)
                remove(part)
            else:
                part.replace(place)
        except BaseException:
            with suppress(OSError):
                for name in _torn(place):
                    remove(place / name)
                remove(part)
            raise


def write_folder(folder: Path, write: Writer) -> None:
    """Write a folder by a function that writes all of its files at once, all or none.

    Args:
        folder: New or empty folder.
        write: Writes to the new folder that it is given, which is then renamed.

    Raises:
        StoreError: If the folder holds anything, another run holds it, or the disk refuses.
    """
    with hold(folder) as place, disk(f"cannot write to {str(folder)!r}"):
        check_free(folder)
        part = beside(place, PART)
        remove(part)
        try:
            part.mkdir()
            mode = part.stat().st_mode & 0o666  # as the umask says
            write(part)
            for path in part.iterdir():
                settle(path, mode)
            if place.is_dir():
                place.rmdir()
            part.replace(place)
        except BaseException:
            with suppress(OSError):
                remove(part)
            raise


def write_files(folder: Path, writers: Mapping[str, Writer]) -> list[Path]:
    """Write files into a folder that may hold others and earlier ones of the same names.

    They are written to a folder in it, and moved up when all are there: a fault leaves the earlier files.

    Args:
        folder: Folder, made unless it is there.
        writers: For each file name a function that writes it to the path that it is given.

    Returns:
        The files.

    Raises:
        StoreError: If another run holds the folder, or the disk refuses; then the earlier files are as they were.
    """
    with hold(folder) as place, disk(f"cannot write to {str(folder)!r}"):
        place.mkdir(exist_ok=True)
        part = place / PART
        remove(part)
        try:
            _write_part(part, writers)
            for name in writers:
                (part / name).replace(place / name)
        finally:
            with suppress(OSError):
                remove(part)
    return [folder / name for name in writers]


def _write_part(part: Path, writers: Mapping[str, Writer]) -> None:
    part.mkdir()
    mode = part.stat().st_mode & 0o666  # as the umask says
    for name, write in writers.items():
        write(part / name)
        settle(part / name, mode)


def _torn(place: Path) -> frozenset[str]:
    """Names that a run which was cut off meant to put into a folder; none where no run was, or it was done."""
    part = place / PART
    try:
        names = json.loads((part / _NAMES).read_text(encoding="utf-8"))
        return frozenset(names) if (part / RESULT).exists() else frozenset()
    except (OSError, ValueError, TypeError):
        return frozenset()


def settle(path: Path, mode: int) -> None:
    """Give a file the mode that the umask asks for (some writers make theirs private), and bring it to the disk.

    Args:
        path: File.
        mode: Mode.
    """
    if path.stat().st_mode & 0o777 != mode:
        path.chmod(mode)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_whole(path: Path, write: Writer, *, durable: bool = True) -> None:
    """Write a file beside its place, then rename it: whoever reads finds the old file or the new one, whole.

    What a killed process left of the same file is removed; a link is replaced, not followed.

    Args:
        path: File.
        write: Writes it to the path that it is given, whose suffix is the same.
        durable: Whether to wait until it is on the disk, so that it outlives a failure of power.

    Raises:
        StoreError: If the disk refuses.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    with disk(f"cannot write {str(path)!r}"):
        _sweep(path)
        temporary.unlink(missing_ok=True)
        try:
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            mode = os.fstat(descriptor).st_mode & 0o777  # as the umask says
            os.close(descriptor)
            write(temporary)
            if durable:
                settle(temporary, mode)
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def temporary_of(name: str) -> re.Match[str] | None:
    """Tell whether a file is one that `write_whole` was writing.

    Args:
        name: Name of the file.

    Returns:
        None if it is not; else a match with the groups `pid`, its process, and `name`, the file that it was to be.
    """
    return re.fullmatch(r"\.(?P<pid>\d+)\.(?P<name>.+)", name, re.DOTALL)


def _sweep(path: Path) -> None:
    for name in os.listdir(path.parent):
        temporary = temporary_of(name)
        if temporary and temporary["name"] == path.name and not psutil.pid_exists(int(temporary["pid"])):
            (path.parent / name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all.

    Args:
        path: File.
        text: UTF-8 text.
    """
    write_whole(path, lambda temporary: plain_text(temporary, text))


def plain_text(path: Path, text: str) -> None:
    """Write a text to a file that nobody reads yet.

    Args:
        path: File.
        text: UTF-8 text.
    """
    path.write_text(text, encoding="utf-8", newline="")


def finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, at any depth: JSON has no NaN.

    Args:
        value: JSON-ready values.

    Returns:
        The same without NaN and infinities.
    """
    if isinstance(value, Mapping):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
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
    with border(StoreError, f"cannot read {str(path)!r}"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise StoreError(f"{str(path)!r} holds no JSON object")
    return content


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
