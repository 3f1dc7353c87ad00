"""The file of the ledger: lines are added whole, one process at a time, and none is ever changed."""

import csv
import os
import warnings
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path

from filelock import FileLock, Timeout

from foretune.errors import StoreError, border, few
from foretune.ledger.entries import COLUMNS, Entry, cells_of, entry_from
from foretune.report.folders import LOCK, beside, disk, place_of
from foretune.report.home import home

LEDGER = "ledger.csv"
PATIENCE = 60.0  # seconds; a line takes milliseconds
OnNote = Callable[[str], None]


def own_ledger() -> Path:
    """Say where this user's ledger lies.

    Returns:
        `ledger.csv` in foretune's own folder; it need not exist.
    """
    return home() / LEDGER


def append(entries: Sequence[Entry], path: Path) -> int:
    """Add lines to a ledger; it is begun where there is none.

    A line that is there already, by forecast and run, is not added again. All lines are written at once; what a killed
    process or a full disk has left unfinished ends with a line of its own.

    Args:
        entries: Lines.
        path: Ledger.

    Returns:
        How many were added.

    Raises:
        StoreError: If the file is something else than a ledger, another process holds it for a minute, or the disk
            refuses; then no line is added.
    """
    place = place_of(path)
    with disk(f"cannot write to the ledger {str(path)!r}"):
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(beside(place, LOCK))
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise StoreError(
                f"the ledger {str(path)!r} is in use by another run for more than {PATIENCE:g} s: try again"
            ) from None
        try:  # the lock stays where it is: who waits for it would wait for a file that is gone
            return _append(entries, place)
        finally:
            lock.release()


def _append(entries: Sequence[Entry], place: Path) -> int:
    content = _content(place)
    names = _header(content, place)
    known = {entry.key for entry in _lines(content, names)[0]}
    new = list({entry.key: entry for entry in entries if entry.key not in known}.values())
    if not new:
        return 0
    begin = _row(names) if not content else ""
    torn = "\n" if content and not content.endswith("\n") else ""
    text = torn + begin + "".join(_row([cells_of(entry).get(name, "") for name in names]) for entry in new)
    _add(text.encode("utf-8"), place)
    return len(new)


def _add(added: bytes, place: Path) -> None:
    """Write at the end of a file, all or nothing."""
    descriptor = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = 0
            while written < len(added):
                written += os.write(descriptor, added[written:])
            os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def read_ledger(path: Path | str | None = None, *, on_note: OnNote | None = None) -> tuple[Entry, ...]:
    """Read the forecasts that were made, beside what came of them.

    Args:
        path: Ledger; None for this user's own, `~/.foretune/ledger.csv` or that in FORETUNE_HOME.
        on_note: Called with a sentence if lines are damaged, which are passed over and stay where they are; None gives
            a warning.

    Returns:
        Its lines in order; none where there is no such file.

    Raises:
        StoreError: If it cannot be read, or is something else than a ledger.
    """
    place = own_ledger() if path is None else Path(path)
    content = _content(place_of(place))
    entries, damaged = _lines(content, _header(content, place))
    if damaged:
        which = few(map(str, damaged))
        note = f"ledger {str(place)!r}: line{'s' if damaged[1:] else ''} {which} cannot be read and is passed over"
        if on_note is None:
            warnings.warn(note, stacklevel=2)
        else:
            on_note(note)
    return tuple(entries)


def _content(place: Path) -> str:
    with border(StoreError, f"cannot read the ledger {str(place)!r}", remedy="name another file"):
        # a byte that is no UTF-8 damages its own line alone
        return place.read_bytes().decode("utf-8-sig", "surrogateescape").lstrip() if place.exists() else ""


def _header(content: str, place: Path) -> list[str]:
    """Columns in the order of the file; ours where it has none yet."""
    if not content:
        return list(COLUMNS)
    names = _cells(content.partition("\n")[0])
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise StoreError(f"{str(place)!r} is no ledger of this version (it has no column {missing[0]!r}): name another")
    return names


def _lines(content: str, names: Sequence[str]) -> tuple[list[Entry], list[int]]:
    """Entries, and the numbers of the lines that are none."""
    entries, damaged = [], []
    for number, line in enumerate(content.split("\n")[1:], start=2):
        if not line.strip():
            continue
        try:
            line.encode("utf-8")
            entries.append(entry_from(dict(zip(names, _cells(line), strict=True))))
        except (ValueError, csv.Error):
            damaged.append(number)
    return entries, damaged


def _cells(line: str) -> list[str]:
    try:
        rows = list(csv.reader([line.removesuffix("\r")], strict=True))
    except csv.Error:
        return []
    return rows[0] if rows else []


def _row(cells: Sequence[str]) -> str:
    file = StringIO()
    csv.writer(file, lineterminator="\n").writerow(cells)
    return file.getvalue()
