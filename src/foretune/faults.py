"""Faults of the machine that no single call can foresee: a full disk, a path too long, no memory left."""

import errno

from foretune.errors import reason

# What a disk or an operating system refuses, whoever asks; a missing file is not among them: that may be our own fault.
_REFUSALS = {
    getattr(errno, name)
    for name in (
        "EACCES",
        "EDQUOT",
        "EFBIG",
        "EIO",
        "ELOOP",
        "EMFILE",
        "ENAMETOOLONG",
        "ENFILE",
        "ENOMEM",
        "ENOSPC",
        "EPERM",
        "EROFS",
        "ESTALE",
    )
    if hasattr(errno, name)
}
# Libraries that write by themselves put the reason into words of their own.
_FULL = (
    "No space left on device",
    "os error 28",
    "Disk quota exceeded",
    "PytorchStreamWriter failed",
    "inline_container",
)
_NO_MEMORY = ("can't allocate memory", "out of memory", "Unable to allocate")


def disk_is_full(error: BaseException) -> bool:
    """Tell whether a disk that takes no more is behind an error.

    Args:
        error: What was raised.

    Returns:
        Whether it, or what it was raised from, says so.
    """
    return any(
        (isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT)) or any(w in str(one) for w in _FULL)
        for one in _chain(error)
    )


def fault_of_outside(error: BaseException) -> str | None:
    """Say what the machine refused.

    Args:
        error: What was raised.

    Returns:
        One line with a remedy; None if it is no fault of the machine.
    """
    if disk_is_full(error):
        return f"the disk takes no more: {reason(error)}; make room and give the same command again"
    for one in _chain(error):
        if isinstance(one, MemoryError) or any(words in str(one) for words in _NO_MEMORY):
            return f"not enough memory: {reason(one)}; lower the batch size, the samples or the length"
        if isinstance(one, OSError) and one.errno in _REFUSALS:
            where = "" if one.filename is None else f" {str(one.filename)!r}"
            return f"cannot use{where or ' a file'}: {one.strerror or reason(one)}; name another path"
    return None


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, the first one last."""
    found: list[BaseException] = []
    held: BaseException | None = error
    while held is not None and held not in found:
        found.append(held)
        held = held.__cause__ or held.__context__
    return found
