"""`foretune ledger`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from rich.console import Console

    from foretune.training.folder import Forecast


def ledger(file: Path | None = None, /, *, json: Annotated[bool, Parameter(group="Run")] = False) -> None:
    """Say how past forecasts did: error, bias and how often the intervals held, by model and data set.

    Example: foretune forecast … --output run && foretune tune … --forecast run --output tuned && foretune ledger

    Args:
        file: Ledger; by default your own, ledger.csv in ~/.foretune or the folder that FORETUNE_HOME names.
        json: Print the numbers as JSON instead of the tables.
    """
    from rich.text import Text

    from foretune.ledger.files import own_ledger, read_ledger
    from foretune.ledger.report import print_ledger
    from foretune.ledger.summary import summarise_ledger
    from foretune.report.store import to_json
    from foretune.report.terminal import console, print_json

    log, screen = console(stderr=True), console()
    place = own_ledger() if file is None else file
    notes: list[str] = []
    entries = read_ledger(place, on_note=notes.append)
    for note in notes:
        log.print(Text(note), style="yellow", soft_wrap=True)
    summary = summarise_ledger(entries)
    if json:
        print_json(to_json({"schema": 1, "ledger": str(place), "lines": len(entries), **summary.to_dict()}))
        return
    if not entries:
        words = (
            f"No forecast is in the ledger {str(place)!r} yet: foretune forecast --output FOLDER makes one, and "
            "foretune tune --forecast FOLDER adds it with what came of it."
        )
        screen.print(Text(words), soft_wrap=True)
        return
    print_ledger(screen, summary)
    log.print(f"{len(entries)} lines in {place}", style="dim", soft_wrap=True)


def note_outcome(forecast: "Forecast", tuned: Mapping[str, Any], began: str, log: "Console") -> None:
    """Add a forecast and the run that came of it to this user's ledger; a run is never lost over that.

    Args:
        forecast: What the run was given.
        tuned: `result.json` of the run.
        began: When it began.
        log: Where to say what was done.
    """
    from rich.text import Text

    from foretune.errors import StoreError, border
    from foretune.ledger.files import append, own_ledger
    from foretune.ledger.judgement import Times, entry_of
    from foretune.report.provenance import now

    if forecast.statement is None:
        return
    try:
        with border(StoreError, "forecast and run cannot be compared"):  # whatever a file of a forecast holds
            place = own_ledger()
            entry = entry_of(forecast.statement, tuned, Times(began, now()))
            added = append([entry], place)
    except StoreError as error:
        log.print(Text(f"no line in the ledger: {error}"), style="yellow", soft_wrap=True)
        return
    if not added:
        log.print(Text(f"forecast and run are in the ledger {place} already"), style="dim", soft_wrap=True)
        return
    why = "" if entry.state == "ok" else f", which does not count: {entry.state}{entry.why and f' ({entry.why})'}"
    log.print(Text(f"added to the ledger {place}{why}"), style="yellow" if why else "dim", soft_wrap=True)
