"""What the demos do alike: a folder that is taken away if they fail, and the commands that they print."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from foretune.settings.commands import Configuration

if TYPE_CHECKING:
    from rich.console import Console

    from foretune.tasks.demo import DemoTask


@contextmanager
def folders_of_demo(output: Path | None, task: "DemoTask") -> Iterator[tuple[Path, Path]]:
    """Make the folder of a demo, and that of its texts.

    Args:
        output: New folder of the demo; None keeps nothing.
        task: Which demo.

    Yields:
        The demo's folder and the data set's; both are removed again if the demo made them and fails.
    """
    from foretune.report.folders import disk, remove
    from foretune.report.store import make_folder
    from foretune.tasks.demo import data_of_demo

    with ExitStack() as stack:
        data = stack.enter_context(data_of_demo(output, task))
        if output is None:
            with disk("cannot make a temporary folder"):
                folder = Path(stack.enter_context(TemporaryDirectory()))
            yield folder, data
            return
        make_folder(output)
        try:
            yield output, data
        except BaseException:
            with disk(f"cannot remove {str(output)!r}"):
                remove(output)
            raise


def near(path: Path) -> str:
    """Write a path as a person in the working folder would.

    Args:
        path: Path.

    Returns:
        The same, relative to the working folder if it lies there.
    """
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def say_command(command: str, config: Configuration[Any], output: Path, forecast: Path | None = None) -> None:
    """Print the command that does what is done now.

    Args:
        command: Its name.
        config: Its configuration.
        output: Its folder.
        forecast: Folder of the forecast that is drawn beside it, or None.
    """
    from foretune.report.terminal import console

    tokens = ["foretune", command, *flags_of(config), *([] if forecast is None else ["--forecast", str(forecast)])]
    console(stderr=True).print(f"$ {shlex.join([*tokens, '--output', str(output)])}", soft_wrap=True, markup=False)


def flags_of(config: Configuration[Any]) -> list[str]:
    """Write a configuration as flags.

    Args:
        config: Configuration of a command.

    Returns:
        Flags and values, those that differ from the defaults.
    """
    tokens: list[str] = []
    for group in (config.model, config.data, config.adapter, config.settings):
        for name, value in vars(group).items():
            if value != getattr(type(group), name, None):
                values = value if isinstance(value, tuple) else (value,)
                tokens += [f"--{name.replace('_', '-')}", *map(str, values)]
    return tokens


def print_end(screen: "Console", forecast: Mapping[str, Any], output: Path | None, drawn: str) -> None:
    """Print what stands below the tables: the notes of the forecast, and where the figure lies.

    Args:
        screen: Where to.
        forecast: As in its `result.json`.
        output: The demo's folder; None if nothing is kept.
        drawn: What the figure shows.
    """
    for note in forecast["notes"]:
        screen.print(f"• {note}", style="yellow", markup=False, highlight=False)
    if output is not None:
        screen.print(f"{drawn}: {output / 'tuned' / 'loss.png'}", style="dim", markup=False, highlight=False)
