"""`python -m foretune`, and the entry point of the command."""

import os
import sys
from contextlib import suppress


def main() -> None:
    """Run the command line and exit with its code."""
    # before torch is loaded: a thread that waits by spinning holds the core that another thread waits for, and beside
    # other processes a pass takes many times as long
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from foretune.cli import run
    from foretune.report.terminal import close_stream, open_streams

    open_streams()
    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # it has been said; at the exit Python would say it again
            close_stream(stream)
    sys.exit(code)


if __name__ == "__main__":
    main()
