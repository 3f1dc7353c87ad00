"""Errors that foretune raises on purpose.

Every message names the value that was wrong and what to do about it, on one line; the command line
prints it without a traceback and exits with code 2.
"""


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
