"""The terminal: one console for results, one for everything else, and a progress bar.

What goes through them is data: no markup is read, and what a terminal would obey is written out.
"""

import codecs
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from foretune.report.texts import for_json, printable

_ASCII = {
    "α": "alpha",
    "δ": "delta",
    "ε": "epsilon",
    "κ": "kappa",
    "λ": "lambda",
    "ρ": "rho",
    "σ": "sigma",
    "τ": "tau",
    "±": "+/-",
    "×": "x",
    "−": "-",
    "–": "-",
    "…": "...",
    "•": "*",
    "·": "-",
    "√": "sqrt",
    "∞": "inf",
    "≥": ">=",
    "≤": "<=",
    "≈": "~",
}
_ERRORS = "foretune.ascii"


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Say a character that the stream's encoding lacks in letters that it has."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    said = (_ASCII.get(character) or character.encode("unicode_escape").decode("ascii") for character in missing)
    return "".join(said), error.end


def open_streams() -> None:
    """Let stdout and stderr take every character, whatever their encoding."""
    codecs.register_error(_ERRORS, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a stream that was put in its place may have none
        if reconfigure is not None:
            reconfigure(errors=_ERRORS)


def close_stream(stream: IO[str] | None) -> None:
    """Write what is left, and send to nowhere what nobody reads.

    Args:
        stream: stdout or stderr; None if it was closed before the start.

    Raises:
        OSError: If the disk refuses.
    """
    try:
        if stream is not None:
            stream.flush()
    except OSError as error:
        with suppress(OSError, ValueError):  # not every stream is a file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno() if stream is not None else nowhere)
            os.close(nowhere)
        if not isinstance(error, BrokenPipeError):
            raise


class Screen(Console):
    """A console to which everything is data, and that goes on when nobody reads it any more."""

    def __init__(self, *, stderr: bool = False, file: IO[str] | None = None, width: int | None = None) -> None:
        super().__init__(
            stderr=stderr,
            file=file,
            width=width,
            quiet=not is_first_process(),
            markup=False,
            emoji=False,
            highlight=False,
        )

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render, with control characters of texts written out.

        Args:
            renderable: What to print.
            options: Options.

        Yields:
            Segments.
        """
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text, keep="\n")
            yield segment if text == segment.text else Segment(text, segment.style)

    def on_broken_pipe(self) -> None:
        """Go on in silence: the work is worth more than the words."""
        self.quiet = True
        close_stream(sys.stderr if self.stderr else sys.stdout)


def is_first_process() -> bool:
    """Tell whether this is the first of the processes that a launcher started.

    Returns:
        Whether it is the one that prints.
    """
    return os.environ.get("RANK", "0") == "0"


def console(*, stderr: bool = False) -> Console:
    """Make a console. Terminals have their own width; a file or a pipe gets room for the whole table.

    Args:
        stderr: Whether it is for messages rather than results.

    Returns:
        The console, silent in all processes but the first.
    """
    made = Screen(stderr=stderr)
    return made if made.is_terminal else Screen(stderr=stderr, width=120)


def print_json(text: str) -> None:
    """Print JSON to stdout, as it is but for characters that a terminal would obey or cannot show.

    Args:
        text: JSON.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(for_json(text, only_ascii=not encoding.lower().startswith("utf")))  # noqa: T201  # the result itself
    except BrokenPipeError:
        close_stream(sys.stdout)


@contextmanager
def progress(log: Console, title: str, total: int | None) -> Iterator[Any]:
    """Show a progress bar with the time left.

    Args:
        log: Where to.
        title: What is counted.
        total: How many there are, None if that is not known yet.

    Yields:
        Rich's `update` of the bar.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    # a file or a pipe would get an empty line and nothing else
    with Progress(*columns, console=log, transient=True, disable=not log.is_interactive) as bar:
        task = bar.add_task(title, total=total, note="")

        def update(*, advance: int = 0, completed: int | None = None, total: int | None = None, note: str = "") -> None:
            bar.update(task, advance=advance or None, completed=completed, total=total, note=note)

        yield update


def print_facts(log: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Print facts, one in a line.

    Args:
        log: Where to.
        rows: Name and value; an empty name goes on with the fact above.
    """
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, Text(printable(value)))
    log.print(grid)
