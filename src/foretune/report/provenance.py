"""Which versions made a result, when, and on how many cores."""

import importlib.metadata
import os
import platform
from datetime import UTC, datetime

PACKAGES = ("foretune", "torch", "transformers", "peft", "datasets", "accelerate", "numpy", "scipy", "scikit-learn")


def versions() -> dict[str, str]:
    """List the versions that a result depends on.

    Returns:
        Version of Python and of each package by name.
    """
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def now() -> str:
    """Tell the time.

    Returns:
        UTC to the second, in ISO 8601: `2026-03-01T12:00:00+00:00`.
    """
    return datetime.now(UTC).isoformat(timespec="seconds")


def usable_cores() -> int:
    """Count the cores that this process may run on, fewer than the machine has under taskset or a scheduler.

    Returns:
        1 at least.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
