"""The command line: parse, load, call the library, print. Results to stdout, everything else to stderr.

Exit codes: 0 done, 1 a fault of foretune or its libraries, 2 wrong input, 130 interrupted. Heavy imports wait
until the input has been parsed.
"""

import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.config import Yaml

from foretune.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    ScoreConfig,
    ScoreSettings,
    TuneSettings,
    one_adapter,
)
from foretune.errors import ConfigError, ForetuneError, border, reason, shown
from foretune.faults import fault_of_outside
from foretune.forecasting.training import CurveWanted, Training
from foretune.paper.command import paper
from foretune.ranking.command import rank
from foretune.ranking.settings import Candidates, RankSample
from foretune.store import read_yaml
from foretune.study.command import study
from foretune.tuning.command import tune

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
_SETTINGS = {
    "score": (AdapterConfig, ScoreSettings, Training),
    "tune": (AdapterConfig, TuneSettings),
    "rank": (Candidates, RankSample, Training),
}

app = App(
    name="foretune",
    help="Know how a fine-tune will go before you run it.",
    default_parameter=Parameter(consume_multiple=True, negative=()),
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `run` says what became of the work
)


app.command(tune)
app.command(rank)
app.command(study)
app.command(paper)


def _flat(title: str) -> Parameter:
    return Parameter(name="*", group=Group(title))


@app.command
def score(
    *,
    model: Annotated[ModelConfig, _flat("Model")],
    data: Annotated[DataConfig, _flat("Data")],
    adapter: Annotated[AdapterConfig | None, _flat("Adapter")] = None,
    adapter_config: Annotated[Path | None, Parameter(group=Group("Adapter"))] = None,
    settings: Annotated[ScoreSettings | None, _flat("Score")] = None,
    curve: Annotated[bool, Parameter(group="Forecast")] = False,
    training: Annotated[Training | None, _flat("Forecast")] = None,
    calibration: Annotated[Path | None, Parameter(group="Forecast")] = None,
    output: Annotated[Path | None, Parameter(group="Run")] = None,
    config: Annotated[Path | None, Parameter(group="Run")] = None,
    json: Annotated[bool, Parameter(group="Run")] = False,
) -> None:
    """Score one LoRA configuration: spectrum of its tangent kernel, risk bounds and a first forecast.

    Example: foretune score --model ./MiniLM --dataset ./sst2 --target-modules query value --layers 0 5 --output run

    Flags answer to Hugging Face's long names too (--model_name_or_path, --dataset_name, --lora_r, …).

    Args:
        model: Model.
        data: Data set.
        adapter: Adapter.
        adapter_config: peft's adapter_config.json, or the folder that holds it, instead of the adapter's flags.
        settings: How to score.
        curve: Forecast the course of the run with these settings too: losses and accuracy over its steps.
        training: The run that --curve forecasts.
        calibration: Calibration of that forecast, from a study's report; without it the one that comes with foretune.
        output: New folder for result.json, kernel.safetensors, config.yaml, spectrum.png and the curve.
        config: YAML file with any of these flags by name; the command line wins.
        json: Print result.json to stdout instead of the table.

    Raises:
        ConfigError: If a run is described and not forecast.
    """
    if (training is not None or calibration is not None) and not curve:
        raise ConfigError(
            "settings of a run such as --epochs and --calibration shape the forecast of --curve: add it, or leave them"
        )
    described = one_adapter(adapter, adapter_config)
    run_config = ScoreConfig(model, data, described, settings or ScoreSettings(), adapter_config)
    wanted = CurveWanted(training or Training(), calibration) if curve else None
    score_command(run_config, output, curve=wanted, as_json=json)


@app.command
def demo(
    *,
    output: Annotated[Path | None, Parameter(group="Run")] = None,
    samples: Annotated[int, Parameter(group="Run")] = 32,
    json: Annotated[bool, Parameter(group="Run")] = False,
) -> None:
    """Score an adapter on real weights and real text that come with the extra `demo`: MiniLM and BBC news.

    Args:
        output: New folder for the run; the texts are written beside it, to OUTPUT-data.
        samples: Training samples of the kernel.
        json: Print result.json to stdout instead of the table.
    """
    import shlex

    from foretune.demo import data_of_demo, model_folder
    from foretune.terminal import console

    with data_of_demo(output) as folder:
        tokens = ["score", "--model", str(model_folder()), "--dataset", str(folder)]
        tokens += ["--target-modules", "query", "value", "--layers", "0", "2", "5"]
        tokens += ["--samples", str(samples), "--max-length", "128"]
        tokens += [] if output is None else ["--output", str(output)]
        tokens += ["--json"] if json else []
        command = f"$ {shlex.join(['foretune', *tokens])}"
        console(stderr=True).print(command, soft_wrap=True)
        app(tokens, exit_on_error=False, print_error=False)  # what was printed is what runs


def score_command(config: ScoreConfig, output: Path | None, *, curve: CurveWanted | None = None, as_json: bool) -> None:
    """Load, plan, run, save and print one score.

    Args:
        config: All settings.
        output: Folder of the run, or None to save nothing.
        curve: The run whose course is forecast, None for no such forecast.
        as_json: Whether to print JSON instead of the table.
    """
    from foretune.folders import hold
    from foretune.store import check_free

    with ExitStack() as stack:
        if output is not None:
            stack.enter_context(hold(output))
            check_free(output)
        _score(config, output, curve, as_json=as_json)


def _score(config: ScoreConfig, output: Path | None, wanted: CurveWanted | None, *, as_json: bool) -> None:
    """Score, save to a free folder that no other run writes to, and print."""
    from foretune.store import to_json
    from foretune.terminal import console, placement_in_words, print_json, progress

    log = console(stderr=True)
    start = time.perf_counter()
    with log.status("loading"):
        from foretune.data import load_task
        from foretune.forecasting.calibration import read_calibration
        from foretune.forecasting.curve import RunCurve, forecast_run
        from foretune.forecasting.survey import check_survey
        from foretune.models import load_model
        from foretune.placement import lora_config
        from foretune.plan import describe, prepare
        from foretune.ranking.adapter_file import adapter_from_file, adapter_in_words
        from foretune.report import print_plan, print_result
        from foretune.save import save_score, score_content
        from foretune.scores import run as run_plan

        calibration = None if wanted is None else read_calibration(wanted.calibration)
        given = None if config.adapter_config is None else adapter_from_file(config.adapter_config)
        task = load_task(config.data)
        classifier = load_model(config.model, task.label_names, config.settings.seed)
        lora = lora_config(classifier.model, config.adapter) if given is None else given
        plan = prepare(classifier, task, lora, config.settings, inplace=True)
        if wanted is not None:
            check_survey(plan)
    seconds_load = time.perf_counter() - start
    print_plan(log, describe(plan), placement_in_words(config.adapter) if given is None else adapter_in_words(given))
    with progress(log, "texts through the model", plan.n_passes) as update:
        result = run_plan(plan, seconds_load=seconds_load, on_batch=lambda count: update(advance=count))
    curve = None
    if wanted is not None and calibration is not None:
        with progress(log, "steps of the simulated run", None) as update:
            course = forecast_run(
                plan, wanted.training, calibration, on_step=lambda done, total: update(completed=done, total=total)
            )
        curve = RunCurve(wanted.training, course, None if wanted.calibration is None else calibration)
    if output is not None:
        save_score(result, output, config, given, curve)
        log.print(f"saved to {output}")
    else:
        log.print("nothing saved: name a folder with --output", style="dim")
    content = score_content(result, curve)
    if as_json:
        print_json(to_json(content))
    else:
        print_result(console(), content)


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

    foreign: frozenset[str] = frozenset()
    without_curve: frozenset[str] = frozenset()  # passed over too, unless the file asks for a curve

    def _load_config(self, path: Path) -> dict[str, Any]:
        content = read_yaml(path, kind=ConfigError)
        if not isinstance(content, dict):
            raise ConfigError(f"--config {str(path)!r} must hold a mapping of flags to values")
        named = _named_flags(content)
        for name in {"adapter-config", "calibration"} & named.keys():  # a run folder holds this file, wherever it lies
            beside = path.parent / str(named[name])
            named[name] = str(beside if beside.exists() else named[name])
        passed = self.foreign if named.get("curve") else self.foreign | self.without_curve
        return {name: value for name, value in named.items() if name not in passed}


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


def _use_config(tokens: Sequence[str]) -> None:
    """Let the file named by --config fill in what the command line leaves open."""
    paths = [tokens[i + 1] for i, token in enumerate(tokens[:-1]) if token == "--config"]
    paths += [token.partition("=")[2] for token in tokens if token.startswith("--config=")]
    for path in paths:
        with border(ConfigError, f"cannot read --config {shown(path)}"):
            if not Path(path).is_file():
                raise ConfigError(f"--config {shown(path)} does not exist: name a YAML file of flags")
    files = [_ConfigFile(Path(path), use_commands_as_keys=False) for path in paths[-1:]]
    passed = _foreign(tokens[0])
    if any(token.partition("=")[0] == "--adapter-config" for token in tokens):  # it wins over the file's adapter
        passed |= {_canonical_name(field.name) for field in fields(AdapterConfig)}
    for file in files:
        file.foreign = passed
        if tokens[0] == "score" and "--curve" not in tokens:  # a fine-tune's file describes a run, a score need not
            file.without_curve = frozenset(_canonical_name(field.name) for field in fields(Training)) | {"calibration"}
    app.config = tuple(files)


def _foreign(command: str) -> frozenset[str]:
    """Settings that only other commands have: score, tune and rank read each other's run files."""
    names = {
        name: {_canonical_name(field.name) for kind in kinds for field in fields(kind)}
        for name, kinds in _SETTINGS.items()
    }
    for name in ("score", "tune"):
        names[name].add("adapter-config")
    names["score"] |= {"curve", "calibration"}
    names["rank"] |= {"calibration", "choose"}
    return frozenset(set().union(*names.values()) - names.get(command, names["score"]))


def run(tokens: Sequence[str]) -> int:
    """Run one command line.

    Args:
        tokens: Arguments without the program's name.

    Returns:
        Exit code.
    """
    from foretune.terminal import close_stream

    try:
        parsed = _bare(canonical(tokens))
        _use_config(parsed)
        code = app(parsed, exit_on_error=False, print_error=False)
        close_stream(sys.stdout)
    except KeyboardInterrupt as interrupt:
        _say(str(interrupt) or "interrupted: nothing was saved")
        return 130
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


def _bare(tokens: list[str]) -> list[str]:
    """Show the help to who names no command, or a command of commands and nothing more."""
    for token in tokens:
        if "\0" in token:
            raise ConfigError(f"argument {shown(token)} holds a NUL character")
    return [*tokens, "--help"] if tokens in ([], ["study"]) else tokens


def _say(message: str, *, fault: bool = False) -> None:
    """Print to stderr: one line of bounded length; a fault of foretune whole, and from every process."""
    from foretune.terminal import console

    log = console(stderr=True)
    if fault:
        log.quiet = False
    else:
        message = " ".join(message.split())
        if len(message) > LONGEST_MESSAGE:  # begin and end: what is wrong, and the remedy
            message = f"{message[:650]} … {message[-300:]}"
    log.print(message, style="red", soft_wrap=True)
