"""Errors that foretune raises on purpose, and the border where the faults of the outside become such errors.

Every message names the value that was wrong and what to do about it, on one line; the command line
prints it without a traceback and exits with code 2.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from reprlib import Repr

LONGEST_REASON = 300
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80
_LONGEST_NAME = 40
_MOST_NAMES = 8
_LONGEST_LIST = 80
_PANIC = "PanicException"  # what libraries in Rust raise, and derive from BaseException


class ForetuneError(Exception):
    """Base of all errors that a user's input can cause."""


class ConfigError(ForetuneError):
    """A setting is unknown, out of range or contradicts another."""


class DataError(ForetuneError):
    """A data set cannot be used: missing, wrong columns, wrong labels, too few rows."""


class ModelError(ForetuneError):
    """A model cannot be loaded or has weights that are not finite."""


class PlacementError(ForetuneError):
    """An adapter configuration does not fit the model."""


class KernelError(ForetuneError):
    """A kernel cannot be computed or is not symmetric, finite and positive semi-definite."""


class StoreError(ForetuneError):
    """A run folder cannot be written or read."""


class ProcessError(ForetuneError):
    """Processes that share the work were not started alike, or one of them failed or is gone."""


def reason(error: BaseException) -> str:
    r"""Say in one short line why a library gave up.

    Args:
        error: What it raised; the innermost cause counts.

    Returns:
        At most 300 characters without line breaks; the name of the error where it has no words.

    Example:
        >>> reason(ValueError("two\n  lines"))
        'two lines'
        >>> reason(MemoryError())
        'MemoryError'
    """
    while error.__cause__ is not None:
        error = error.__cause__
    words = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        words = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    if len(words) > LONGEST_REASON:
        words = words[: LONGEST_REASON - 1] + "…"
    return words or type(error).__name__


def shown(value: object, longest: int = _LONGEST_NAME) -> str:
    r"""Write a value of the user's for a message: on one line, cut where it is long, control characters spelled out.

    Args:
        value: A name, or a cell of a table.
        longest: Characters to show.

    Returns:
        Strings in quotes, everything else as Python writes it, shortened.

    Example:
        >>> shown("a\nb")
        "'a\\nb'"
        >>> shown("x" * 99, 5)
        "'xxxxx…'"
    """
    if isinstance(value, str):
        words = repr(value[: longest + 1])[1:-1]
    else:
        try:
            words = _SHORT.repr(value)
        except ValueError:  # Python writes out no integer of more than 4,300 digits
            return "a number of thousands of digits"
    if len(words) > longest:
        words = words[:longest] + "…"
    return f"'{words}'" if isinstance(value, str) else words


def few(names: Iterable[str], most: int = _MOST_NAMES) -> str:
    r"""List names for a message: the first of them where there are many, each on one line and cut where it is long.

    Args:
        names: Such as those of columns, classes or files.
        most: How many to write out.

    Returns:
        The names without quotes.

    Example:
        >>> few(["text", "label"])
        'text, label'
        >>> few((f"c{i}" for i in range(3000)), most=2)
        'c0, c1 and 2,998 more'
    """
    held = list(names)
    written: list[str] = []
    for name in held[:most]:
        written.append(shown(name)[1:-1])
        if sum(map(len, written)) > _LONGEST_LIST:
            break
    rest = len(held) - len(written)
    return ", ".join(written) + (f" and {rest:,} more" if rest else "")


@contextmanager
def border(kind: type[ForetuneError], what: str, *, remedy: str = "") -> Iterator[None]:
    """Turn whatever a file, a library or the disk raises into one error of ours.

    For the calls that touch what foretune did not make: loading, reading, writing. Errors of ours pass as they are;
    an interrupt is none.

    Args:
        kind: Error to raise instead.
        what: What could not be done, with the name of the thing: `cannot read 'x.csv'`.
        remedy: What to do about it; empty where the reason says it.

    Yields:
        Nothing.

    Raises:
        ForetuneError: Of the kind, `what: reason; remedy` on one line.
    """
    try:
        yield
    except ForetuneError:
        raise
    except BaseException as error:  # each library fails in its own way
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        why = reason(error)
        if isinstance(error, OSError) and error.strerror and str(error.filename) in what:
            why = error.strerror  # the file is named already
        raise kind(f"{what}: {why}" + (f"; {remedy}" if remedy else "")) from error
