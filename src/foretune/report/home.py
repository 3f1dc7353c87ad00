"""Where foretune keeps what outlives a run."""

import os
from pathlib import Path


def home() -> Path:
    """Find foretune's own folder.

    Returns:
        The environment variable FORETUNE_HOME, or `~/.foretune`; it need not exist.
    """
    return Path(os.environ.get("FORETUNE_HOME") or "~/.foretune").expanduser()
