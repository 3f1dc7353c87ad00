"""Errors that foretune raises on purpose, and the border where the faults of the outside become such errors.

Every message names the value that was wrong and what to do about it, on one line; the command line
prints it without a traceback and exits with code 2.
"""

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_REASON = 300
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
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        words = error.strerror
    else:
        words = " ".join(str(error).split())
    if len(words) > LONGEST_REASON:
        words = words[: LONGEST_REASON - 1] + "…"
    return words or type(error).__name__


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
        raise kind(f"{what}: {reason(error)}" + (f"; {remedy}" if remedy else "")) from error
