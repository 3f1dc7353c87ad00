"""`foretune forecast`."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from foretune.commands.loading import (
    in_processes,
    is_language,
    load,
    load_language,
    one_process,
    open_data,
    read_adapter,
    say_where,
)
from foretune.errors import ConfigError
from foretune.settings.commands import Configuration, ForecastSettings, one_adapter
from foretune.settings.groups import AdapterConfig, DataConfig, ModelConfig, Pair, Recipe, Sample, Spending

if TYPE_CHECKING:
    from rich.console import Console

    from foretune.processes.group import Processes
    from foretune.readers.folder import Splits
    from foretune.trials.forecast import Bought
    from foretune.trials.run import Tried


def forecast(
    *,
    model: Annotated[ModelConfig, Parameter(name="*", group=Group("Model"))],
    data: Annotated[DataConfig, Parameter(name="*", group=Group("Data"))],
    adapter: Annotated[AdapterConfig | None, Parameter(name="*", group=Group("Adapter"))] = None,
    adapter_config: Annotated[Path | None, Parameter(group=Group("Adapter"))] = None,
    sample: Annotated[Sample | None, Parameter(name="*", group=Group("Sample"))] = None,
    recipe: Annotated[Recipe | None, Parameter(name="*", group=Group("Training"))] = None,
    rows: Annotated[tuple[Pair, ...] | None, Parameter(group="Training")] = None,
    memory: Annotated[str | None, Parameter(group="Run")] = ForecastSettings.memory,
    trials: Annotated[Spending | None, Parameter(name="*", group=Group("Trials"))] = None,
    calibration: Annotated[Path | None, Parameter(group="Run")] = None,
    output: Annotated[Path | None, Parameter(group="Run")] = None,
    config: Annotated[Path | None, Parameter(group="Run")] = None,
    json: Annotated[bool, Parameter(group="Run")] = False,
) -> None:
    """Forecast the run of `foretune tune` with the same flags: its end with 90% intervals, and the course there.

    Of a language model (--task causal-lm, seq2seq): the simulated run, plugged into the model, with an interval where
    the calibration has seen runs of the model.

    Example: foretune forecast --model ./MiniLM --dataset ./sst2 --target-modules query value --epochs 5 --output run

    Then: foretune tune --config run/config.yaml --forecast run --output tuned

    Args:
        model: Model.
        data: Data set.
        adapter: Adapter.
        adapter_config: peft's adapter_config.json, or the folder that holds it, instead of the adapter's flags.
        sample: What is known of the data.
        recipe: The run that is forecast.
        rows: Numbers of training rows, rising, for which the run is forecast as well: how many are enough?
        memory: Memory that what the pass over the samples keeps may take, such as 4GB; by default half of what is free,
            of a language model 2GB. What does not fit of a classifier goes through files.
        trials: What may be trained before it.
        calibration: The calibration.json of a study's report, from finished runs of your own; without it foretune's.
        output: New folder for result.json, curve.csv, curve.png and config.yaml; with --rows rows.csv and rows.png.
        config: YAML file with any of these flags by name; the command line wins.
        json: Print result.json to stdout instead of the table.
    """
    groups = (sample or Sample(), recipe or Recipe(), trials or Spending())
    known = {name: value for group in groups for name, value in vars(group).items()}
    settings = ForecastSettings(**known, rows=rows, memory=memory)
    run_config = Configuration(model, data, one_adapter(adapter, adapter_config), settings)
    forecast_command(run_config, output, calibration, as_json=json)


def forecast_command(
    config: Configuration[ForecastSettings], output: Path | None, calibration: Path | None = None, *, as_json: bool
) -> None:
    """Load, plan, simulate, save and print one forecast.

    Args:
        config: All settings.
        output: Folder of the run, or None to save nothing.
        calibration: Calibration of the forecast, or None for the one that comes with foretune.
        as_json: Whether to print JSON instead of the table.
    """
    from foretune.report.store import to_json
    from foretune.report.terminal import console, print_json

    content = make_forecast(config, output, calibration)
    if content is None:
        return
    if as_json:
        print_json(to_json(content))
        return
    from foretune.forecasting.report import print_forecast

    print_forecast(console(), content)


def make_forecast(
    config: Configuration[ForecastSettings],
    output: Path | None,
    calibration: Path | None = None,
    *,
    brief: bool = False,
) -> dict[str, Any] | None:
    """Load, plan, simulate and save one forecast; to stderr goes what was understood and how far it is.

    Args:
        config: All settings.
        output: Folder of the run, or None to save nothing.
        calibration: Calibration of the forecast, or None for the one that comes with foretune.
        brief: Whether only the progress is shown.

    Returns:
        What `result.json` holds; None in all processes of a run but the first.
    """
    with in_processes("forecast", {**config.to_dict(), "calibration": calibration}, output) as processes:
        one_process(processes, config.settings.spend)
        splits = open_data(config.data)
        wanted = _Wanted(output, calibration, brief)
        if is_language(config.model, config.data, splits):
            return _forecast_language(config, wanted, splits, processes)
        return _forecast(config, wanted, splits, processes)


@dataclass(frozen=True)
class _Wanted:
    """What becomes of a forecast, whatever is forecast."""

    output: Path | None
    calibration: Path | None
    brief: bool


def _forecast(
    config: Configuration[ForecastSettings], wanted: _Wanted, splits: "Splits", processes: "Processes"
) -> dict[str, Any] | None:
    """Forecast, and save to a free folder that no other run writes to."""
    from foretune.report.terminal import console, progress

    output, calibration = wanted.output, wanted.calibration
    log = console(stderr=True)
    start = time.perf_counter()
    with log.status("loading"):
        from foretune.forecasting.calibration_file import read_calibration
        from foretune.forecasting.files import save_forecast
        from foretune.forecasting.forecast import prepare_forecast, run_forecast
        from foretune.forecasting.report import print_forecast_plan
        from foretune.problem import describe
        from foretune.settings.spend import parse_spend

        settings = config.settings
        trains = parse_spend(settings.spend) > 0  # trials need the model as it is
        calibrated = read_calibration(calibration)
        given = read_adapter(config)
        loaded = load(config, given, seed=settings.seed, splits=splits)
        bought = None
        if trains:
            from foretune.trials.forecast import buy_trials

            bought = buy_trials(loaded.classifier, loaded.task, loaded.lora, settings, name=loaded.words)
        plan = prepare_forecast(loaded.classifier, loaded.task, loaded.lora, settings, inplace=not trains)
        plan = replace(plan, processes=processes)
    seconds_load = time.perf_counter() - start
    if not wanted.brief:
        print_forecast_plan(log, describe(plan), loaded.words)
    tried = _try(bought, log)
    title = "steps of the simulated runs" if config.settings.rows else "steps of the simulated run"
    with processes.until_handed_over(), progress(log, title, None) as update:
        result = run_forecast(
            plan,
            settings,
            calibrated,
            shown=[one.shown for one in tried],
            seconds_load=seconds_load,
            on_step=lambda done, total: update(completed=done, total=total),
        )
    if not processes.is_main:
        return None
    if tried:
        from foretune.trials.forecast import with_trials

        result = with_trials(result, tried)
    if output is not None:
        own = None if calibration is None else calibrated
        save_forecast(result, output, config.to_dict(), adapter=given, calibration=own)
    if not wanted.brief:
        say_where(log, output)
    return result.to_dict()


def _forecast_language(
    config: Configuration[ForecastSettings], wanted: _Wanted, splits: "Splits", processes: "Processes"
) -> dict[str, Any] | None:
    """The same of a causal language model."""
    from foretune.report.terminal import console, progress

    settings, output, calibration = config.settings, wanted.output, wanted.calibration
    if calibration is not None:
        raise ConfigError(
            f"--calibration {str(calibration)!r}: language models are forecast by the one that comes with foretune, "
            "leave it out"
        )
    log = console(stderr=True)
    start = time.perf_counter()
    with log.status("loading"):
        from foretune.forecasting.files import save_sequence_forecast
        from foretune.forecasting.report import print_sequence_plan
        from foretune.forecasting.sequence_forecast import forecast_sequences
        from foretune.forecasting.sequence_simulation import n_passed
        from foretune.sequence_plan import describe_sequences, prepare_sequences
        from foretune.settings.spend import parse_spend

        trains = parse_spend(settings.spend) > 0  # trials need the model as it is
        given = read_adapter(config, language=True)
        loaded = load_language(config, given, splits)
        plan = prepare_sequences(loaded.language, loaded.task, loaded.lora, settings, inplace=not trains)
        plan = replace(plan, processes=processes)
        bought = None
        if trains:
            from foretune.trials.forecast import buy_sequence_trials

            bought = buy_sequence_trials(plan, loaded.lora, settings, name=loaded.words)
    seconds_load = time.perf_counter() - start
    if not wanted.brief:
        print_sequence_plan(log, describe_sequences(plan), loaded.words)
    tried = _try(bought, log)
    n_sequences = n_passed(plan, settings)
    with processes.until_handed_over(), progress(log, "sequences through the model", n_sequences) as update:
        result = forecast_sequences(
            plan,
            settings,
            shown=[one.shown for one in tried],
            seconds_load=seconds_load,
            on_batch=lambda n: update(advance=n),
        )
    if not processes.is_main:
        return None
    if tried:
        from foretune.trials.forecast import with_trials

        result = with_trials(result, tried)
    if output is not None:
        save_sequence_forecast(result, output, config.to_dict(), adapter=given)
    if not wanted.brief:
        say_where(log, output)
    return result.to_dict()


def _try(bought: "Bought | None", log: "Console") -> "tuple[Tried, ...]":
    """Show what the spend buys, and make it."""
    if bought is None:
        return ()
    from foretune.report.terminal import progress
    from foretune.trials.carry import describe_plan, seconds_per_pass
    from foretune.trials.forecast import make_trials

    expected = seconds_per_pass(bought.bench)
    describe_plan(bought.bench, [bought.candidate], bought.plan, bought.store, seconds_per_pass=expected).show(log)
    with progress(log, "sample passes of the trials", None) as update:
        return make_trials(
            bought,
            on_progress=lambda done, total: update(completed=round(done), total=round(total)),
            on_note=lambda note: log.print(note, style="yellow"),
        )
