"""Which versions made a result."""

import importlib.metadata
import platform

PACKAGES = ("foretune", "torch", "transformers", "peft", "datasets", "accelerate", "numpy", "scipy", "scikit-learn")


def versions() -> dict[str, str]:
    """List the versions that a result depends on.

    Returns:
        Version of Python and of each package by name.
    """
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
