"""The command line: parse, load, call the library, print. Results to stdout, everything else to stderr.

Exit codes: 0 done, 1 a fault of foretune or its libraries, 2 wrong input, 130 interrupted. Heavy imports wait
until the input has been parsed.
"""

import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from cyclopts import App, ArgumentCollection, CycloptsError, Parameter, UnknownOptionError
from cyclopts.config import Yaml

from foretune.commands.demo import demo
from foretune.commands.forecast import forecast
from foretune.commands.ledger import ledger
from foretune.commands.paper import paper
from foretune.commands.rank import rank
from foretune.commands.score import score
from foretune.commands.study import study
from foretune.commands.tune import tune
from foretune.errors import ConfigError, ForetuneError, border, reason, shown
from foretune.faults import fault_of_outside
from foretune.processes.group import launched
from foretune.report.store import read_yaml
from foretune.settings.groups import AdapterConfig

# Names that Hugging Face's scripts give the same things; `-` and `_` are alike everywhere.
ALIASES = {
    "model-name-or-path": "model",
    "dataset-name": "dataset",
    "dataset-config-name": "config-name",
    "text-column-name": "text-column",
    "text-column-names": "text-column",
    "label-column-name": "label-column",
    "train-split-name": "train-split",
    "validation-split-name": "eval-split",
    "lora-target-modules": "target-modules",
    "layers-to-transform": "layers",
    "lora-r": "r",
    "lora-alpha": "alpha",
    "use-rslora": "rslora",
    "init-lora-weights": "init",
    "num-samples": "samples",
    "max-eval-samples": "eval-samples",
    "max-seq-length": "max-length",
    "per-device-eval-batch-size": "batch-size",
    "torch-dtype": "dtype",
    "output-dir": "output",
    "max-train-samples": "max-train",
    "num-train-epochs": "epochs",
    "per-device-train-batch-size": "train-batch-size",
    "lr-scheduler-type": "scheduler",
}

LONGEST_MESSAGE = 1000  # characters; what is longer hides what matters
_REPLAYED = ("score", "forecast", "tune", "rank")  # commands with --config, each of which reads the files of all
_BESIDE = frozenset({"adapter-config", "calibration", "forecast"})  # a run folder holds these, wherever it lies
_SEVERAL = frozenset({"model", "dataset", "epochs", "learning-rate"})  # of which a ranking takes several
_FORMER = frozenset({"curve"})  # flags of earlier versions, in their config.yaml

app = App(
    name="foretune",
    help="Know how a fine-tune will go before you run it.",
    default_parameter=Parameter(consume_multiple=True, negative=()),
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `run` says what became of the work
)


app.command(score)
app.command(forecast)
app.command(demo)
app.command(tune)
app.command(ledger)
app.command(rank)
app.command(study)
app.command(paper)


def canonical(tokens: Sequence[str]) -> list[str]:
    """Translate Hugging Face's flag names and underscores to foretune's own flags.

    Args:
        tokens: Command line.

    Returns:
        The same with every `--flag` or `--flag=value` in foretune's spelling.

    Example:
        >>> canonical(["--lora_r", "4", "--max_seq_length=64"])
        ['--r', '4', '--max-length=64']
    """
    return [_canonical_flag(token) if token.startswith("--") else token for token in tokens]


def _canonical_flag(token: str) -> str:
    name, equals, value = token[2:].partition("=")
    return f"--{_canonical_name(name)}{equals}{value}"


def _canonical_name(name: str) -> str:
    name = name.replace("_", "-")
    return ALIASES.get(name, name)


class _ConfigFile(Yaml):
    """YAML with the same spellings as the command line; what concerns another command only is passed over."""

    command: str = ""
    foreign: frozenset[str] = frozenset()
    given: frozenset[str] = frozenset()  # on the command line, which wins

    def _load_config(self, path: Path) -> dict[str, Any]:
        content = read_yaml(path, kind=ConfigError)
        if not isinstance(content, dict):
            raise ConfigError(f"--config {str(path)!r} must hold a mapping of flags to values")
        named = _named_flags(content)
        for name in (_BESIDE & named.keys()) - self.foreign:
            beside = path.parent / str(named[name])
            named[name] = str(beside if beside.exists() else named[name])
        for name in (_SEVERAL & named.keys()) - self.foreign:
            value = named[name]
            if self.command == "rank" or not isinstance(value, list):
                continue
            if len(value) > 1 and name not in self.given:
                raise ConfigError(
                    f"--config {str(path)!r} has several of {name}, {shown(value)}, and foretune {self.command} takes "
                    f"one: give --{name}, or the chosen.yaml of the ranking"
                )
            named[name] = value[0]
        # under the command's name: cyclopts drops what is called like a command beside it, such as tune's forecast
        return {self.command: {name: value for name, value in named.items() if name not in self.foreign}}


def _named_flags(content: Mapping[Any, Any]) -> dict[str, Any]:
    """The flags of a file in foretune's spelling; what is left open there is left out."""
    named: dict[str, Any] = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise ConfigError(f"--config: {shown(key)} is no name of a flag: put it in quotes, or remove it")
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, list) or not isinstance(one, str | int | float | None):
                raise ConfigError(
                    f"--config: {shown(key)} = {shown(value)}: must be a text, a number or a list of them"
                )
            if one is None and isinstance(value, list):
                raise ConfigError(f"--config: {shown(key)} = {shown(value)}: a list has no empty entries")
            if isinstance(one, str) and "\0" in one:
                raise ConfigError(f"--config: {shown(key)} = {shown(value)}: holds a NUL character")
        if value is None or value == []:
            continue
        name = _canonical_name(key)
        if name in named:
            raise ConfigError(f"--config: {shown(key)} sets --{name} a second time: give it once")
        named[name] = value
    return named


def _whole_numbers(_app: App, _commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse fractions where whole numbers are counted: cyclopts would round them, of the line and of a file alike."""
    for argument in arguments:
        if _counts(argument.hint):
            for token in argument.tokens:
                if "." in token.value and not _is_whole(token.value):
                    name = argument.name.removeprefix("--").replace("-", "_")
                    raise ConfigError(f"{name} = {shown(float(token.value))}: must be a whole number")


def _counts(hint: Any) -> bool:
    """Whether a flag takes whole numbers, one or several, or none."""
    if get_origin(hint) is Annotated:
        return _counts(get_args(hint)[0])
    return hint is int or any(map(_counts, get_args(hint)))


def _is_whole(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:  # no number: cyclopts says so
        return True


def _use_config(tokens: Sequence[str]) -> None:
    """Let the file named by --config fill in what the command line leaves open."""
    paths = [tokens[i + 1] for i, token in enumerate(tokens[:-1]) if token == "--config"]
    paths += [token.partition("=")[2] for token in tokens if token.startswith("--config=")]
    for path in paths:
        with border(ConfigError, f"cannot read --config {shown(path)}"):
            if not Path(path).is_file():
                raise ConfigError(f"--config {shown(path)} does not exist: name a YAML file of flags")
    app.config = (_whole_numbers,)
    if not paths or tokens[0] not in _REPLAYED:
        return
    file = _ConfigFile(Path(paths[-1]))
    file.command = tokens[0]
    passed = _foreign(tokens[0])
    if any(token.partition("=")[0] == "--adapter-config" for token in tokens):  # it wins over the file's adapter
        passed |= {_canonical_name(field.name) for field in fields(AdapterConfig)}
    file.foreign = passed
    file.given = frozenset(token.partition("=")[0].removeprefix("--") for token in tokens if token.startswith("--"))
    app.config = (file, _whole_numbers)


@cache
def flags_of(command: str) -> frozenset[str]:
    """List the flags of a command.

    Args:
        command: Its name.

    Returns:
        Names without dashes.
    """
    arguments = app[command].assemble_argument_collection()
    names = {name for argument in arguments for name in argument.names if name not in argument.negatives}
    return frozenset(name.removeprefix("--") for name in names if name.startswith("--"))


def _foreign(command: str) -> frozenset[str]:
    """Settings that only other commands have: they read each other's run files."""
    everything = frozenset[str]().union(*map(flags_of, _REPLAYED)) | _FORMER
    return everything - flags_of(command)


def _unknown(command: str, error: UnknownOptionError) -> str:
    """Say of a flag that a command lacks which command takes it."""
    name = (error.token.keyword or "").removeprefix("--") if error.token is not None else ""
    takers = ["forecast"] if name in _FORMER else [one for one in _REPLAYED if name in flags_of(one)]
    if not takers or command not in _REPLAYED:
        return str(error)
    if name in _FORMER:
        return f"foretune {command} has no --{name} any more: foretune forecast forecasts a run and its curve"
    return f"foretune {command} has no --{name}: foretune {' and '.join(takers)} {'take' if takers[1:] else 'takes'} it"


def run(tokens: Sequence[str]) -> int:
    """Run one command line.

    Args:
        tokens: Arguments without the program's name.

    Returns:
        Exit code.
    """
    from foretune.report.terminal import close_stream

    try:
        parsed = _bare(canonical(tokens))
        _check_launch(parsed)
        _use_config(parsed)
        code = app(parsed, exit_on_error=False, print_error=False)
        close_stream(sys.stdout)
    except KeyboardInterrupt as interrupt:
        _say(str(interrupt) or "interrupted: nothing was saved")
        return 130
    except UnknownOptionError as error:
        _say(f"error: {_unknown(parsed[0], error)}")
        return 2
    except (ForetuneError, CycloptsError) as error:
        wrapped = isinstance(error, CycloptsError) and isinstance(error.__cause__, ForetuneError)  # of a --config file
        _say(f"error: {error.__cause__ if wrapped else error}")
        return 2
    except Exception as error:  # nothing may end in a traceback alone
        outside = fault_of_outside(error)
        if outside is not None:
            _say(f"error: {outside}")
            return 2
        _say("".join(traceback.format_exception(error)), fault=True)
        what = "foretune failed, by a fault of its own or of a library and not of the input"
        _say(f"{what}: {type(error).__name__}: {reason(error)}")
        return 1
    return code if isinstance(code, int) else 0


def _check_launch(tokens: Sequence[str]) -> None:
    """Refuse commands that several processes would each do in whole, under a launcher of several."""
    world = launched()[1]
    if world > 1 and tokens[0] not in _REPLAYED and not {"--help", "-h", "--version"} & set(tokens):
        raise ConfigError(
            f"foretune {shown(tokens[0])[1:-1]} runs in one process, and {world} were launched: give it without "
            f"torchrun or accelerate launch; several share {', '.join(_REPLAYED)}"
        )


def _bare(tokens: list[str]) -> list[str]:
    """Show the help to who names no command, or a command of commands and nothing more."""
    for token in tokens:
        if "\0" in token:
            raise ConfigError(f"argument {shown(token)} holds a NUL character")
    return [*tokens, "--help"] if tokens in ([], ["study"]) else tokens


def _say(message: str, *, fault: bool = False) -> None:
    """Print to stderr: one line of bounded length; a fault of foretune whole, and from every process."""
    from foretune.report.terminal import console

    log = console(stderr=True)
    if fault:
        log.quiet = False
    else:
        message = " ".join(message.split())
        if len(message) > LONGEST_MESSAGE:  # begin and end: what is wrong, and the remedy
            message = f"{message[:650]} … {message[-300:]}"
    log.print(message, style="red", soft_wrap=True)
