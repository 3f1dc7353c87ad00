"""`foretune tune`."""

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter
from rich.text import Text

from foretune.commands.ledger import note_outcome
from foretune.commands.loading import is_language, load, load_language, open_data, read_adapter, say_where
from foretune.errors import ConfigError
from foretune.settings.commands import Configuration, TuneSettings, one_adapter
from foretune.settings.groups import AdapterConfig, DataConfig, ModelConfig

if TYPE_CHECKING:
    from peft import PeftConfig

    from foretune.readers.folder import Splits
    from foretune.training.trainable import Trainable


def tune(
    *,
    model: Annotated[ModelConfig, Parameter(name="*", group=Group("Model"))],
    data: Annotated[DataConfig, Parameter(name="*", group=Group("Data"))],
    adapter: Annotated[AdapterConfig | None, Parameter(name="*", group=Group("Adapter"))] = None,
    adapter_config: Annotated[Path | None, Parameter(group=Group("Adapter"))] = None,
    settings: Annotated[TuneSettings | None, Parameter(name="*", group=Group("Training"))] = None,
    forecast: Annotated[Path | None, Parameter(group="Run")] = None,
    output: Annotated[Path | None, Parameter(group="Run")] = None,
    config: Annotated[Path | None, Parameter(group="Run")] = None,
    json: Annotated[bool, Parameter(group="Run")] = False,
) -> None:
    """Fine-tune one adapter configuration for real: the run that `foretune forecast` forecasts with the same flags.

    Language models too: causal ones on conversations, prompts with completions, or texts (--task causal-lm),
    encoder-decoders on prompts with completions (--task seq2seq).

    Example: foretune tune --config forecast/config.yaml --epochs 5 --learning-rate 5e-3 --output tuned

    The defaults are those of the paper. A run that was cut off goes on from its last epoch when the same command
    is given again. Several GPUs: accelerate launch -m foretune tune …

    Args:
        model: Model.
        data: Data set.
        adapter: Adapter.
        adapter_config: peft's adapter_config.json, or the folder that holds it, instead of the adapter's flags.
        settings: How to train.
        forecast: Folder of a forecast that loss.png shows beside the run, and that foretune ledger compares with it; or
            its curve.csv alone, for the figure only.
        output: Folder for result.json, history.csv, steps.csv, config.yaml, loss.png and the adapter.
        config: YAML file with any of these flags by name, or the config.yaml of another command; the command line wins.
        json: Print result.json to stdout instead of the table.
    """
    described = one_adapter(adapter, adapter_config)
    run_config = Configuration(model, data, described, settings or TuneSettings())
    tune_command(run_config, output, forecast=forecast, as_json=json)


def tune_command(
    config: Configuration[TuneSettings], output: Path | None, *, forecast: Path | None = None, as_json: bool
) -> None:
    """Load, plan, train, save and print one fine-tune.

    Args:
        config: All settings.
        output: Folder of the run, or None to save nothing.
        forecast: Forecast curve, or None.
        as_json: Whether to print JSON instead of the table.
    """
    from foretune.report.store import to_json
    from foretune.report.terminal import console, print_json

    content = make_tune(config, output, forecast=forecast)
    if content is None:
        return
    if as_json:
        print_json(to_json(content))
        return
    from foretune.training.report import print_tune

    print_tune(console(), content)


def make_tune(
    config: Configuration[TuneSettings], output: Path | None, *, forecast: Path | None = None, brief: bool = False
) -> dict[str, Any] | None:
    """Load, plan, train and save one fine-tune; to stderr goes what was understood and how far it is.

    Args:
        config: All settings.
        output: Folder of the run, or None to save nothing.
        forecast: Forecast curve, or None.
        brief: Whether only the progress is shown, and nothing comes into the ledger: as part of another command.

    Returns:
        What `result.json` holds; None in all processes of a run but the first.

    Raises:
        ConfigError: If a curve is to be drawn and nothing is saved.
    """
    from foretune.report.folders import disk, hold, place_of
    from foretune.report.terminal import is_first_process

    if output is None:
        if forecast is not None:
            raise ConfigError(f"--forecast {str(forecast)!r} is drawn into loss.png: name a folder with --output")
        with ExitStack() as stack:
            with disk("cannot make a temporary folder"):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            return _tune(config, folder, None, None, brief=brief)
    if is_first_process():  # it alone writes, and holds the folder for all processes of the run
        with hold(output) as folder:
            return _tune(config, folder, output, forecast, brief=brief)
    return _tune(config, place_of(output), output, forecast, brief=brief)


def _plan(config: Configuration[TuneSettings], given: "PeftConfig | None", splits: "Splits") -> "tuple[Trainable, str]":
    """The plan of a classifier's fine-tune, and its adapter in words."""
    from foretune.training.plan import prepare_tune

    loaded = load(config, given, seed=config.settings.seed, splits=splits)
    return prepare_tune(loaded.classifier, loaded.task, loaded.lora, config.settings, inplace=True), loaded.words


def _plan_language(
    config: Configuration[TuneSettings], given: "PeftConfig | None", splits: "Splits"
) -> "tuple[Trainable, str]":
    """The plan of a language model's fine-tune, and its adapter in words."""
    from foretune.training.language import prepare_language

    loaded = load_language(config, given, splits)
    return prepare_language(loaded.language, loaded.task, loaded.lora, config.settings, inplace=True), loaded.words


def _tune(
    config: Configuration[TuneSettings], folder: Path, output: Path | None, forecast: Path | None, *, brief: bool
) -> dict[str, Any] | None:
    """Tune in a folder that no other run writes to, `output` if that is given."""
    from foretune.report.terminal import console, is_first_process, progress

    log = console(stderr=True)
    start = time.perf_counter()
    with log.status("loading"):
        from foretune.training.fit import Hooks
        from foretune.training.folder import begun, claim, close_folder, read_forecast, start_of, write_history
        from foretune.training.report import print_tune_plan
        from foretune.training.tune import run_tune

        flags = config.to_dict()
        splits = open_data(config.data)
        language = is_language(config.model, config.data, splits)
        given = read_adapter(config, language=language)
        writes = output is not None and is_first_process()
        goes_on = writes and claim(folder, flags, given)
        drawn = read_forecast(folder, forecast)
        plan, words = _plan_language(config, given, splits) if language else _plan(config, given, splits)
        del splits  # with the tables that were read
    seconds_load = time.perf_counter() - start
    if not brief:
        print_tune_plan(log, plan.describe(), words)
    if goes_on:
        log.print(f"going on with the run in {output}", style="yellow")
    if drawn is not None and drawn.statement is None:
        log.print(
            Text(
                "the forecast is a curve alone, without time and hash: it is drawn, and does not come into the "
                "ledger (name the folder of a forecast)"
            ),
            style="yellow",
            soft_wrap=True,
        )
    with ExitStack() as stack:
        if writes:
            stack.enter_context(begun(folder, flags, given, forecast=drawn))
        update = stack.enter_context(progress(log, "steps", None))

        def on_step(done: int, total: int, loss: float | None) -> None:
            update(completed=done, total=total, note="" if loss is None else f"loss {loss:.4f}")

        def on_note(note: str) -> None:
            log.print(Text(note), style="yellow", soft_wrap=True)

        on_record = None if output is None else lambda history: write_history(history, folder)
        hooks = Hooks(on_step, on_record, on_note)
        try:
            result = run_tune(plan, folder, seconds_load=seconds_load, hooks=hooks)
        except KeyboardInterrupt as error:
            kept = "nothing was saved" if output is None else "the same command goes on from the last whole epoch"
            raise KeyboardInterrupt(f"interrupted: {kept}") from error
    if not result.is_main:
        return None
    content = result.to_dict()
    if output is not None:
        if drawn is not None and not brief:
            # before the run counts as finished, so that one that is cut off here comes by again
            note_outcome(drawn, content, start_of(folder), log)
        close_folder(result, folder, forecast=drawn)
    if not brief:
        say_where(log, output)
    return content
