"""`foretune score`."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from foretune.errors import ConfigError
from foretune.settings.groups import AdapterConfig, DataConfig, ModelConfig, ScoreConfig, ScoreSettings, one_adapter
from foretune.settings.run import CurveWanted, Training


def _flat(title: str) -> Parameter:
    return Parameter(name="*", group=Group(title))


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


def score_command(config: ScoreConfig, output: Path | None, *, curve: CurveWanted | None = None, as_json: bool) -> None:
    """Load, plan, run, save and print one score.

    Args:
        config: All settings.
        output: Folder of the run, or None to save nothing.
        curve: The run whose course is forecast, None for no such forecast.
        as_json: Whether to print JSON instead of the table.
    """
    from foretune.report.folders import hold
    from foretune.report.store import check_free

    with ExitStack() as stack:
        if output is not None:
            stack.enter_context(hold(output))
            check_free(output)
        _score(config, output, curve, as_json=as_json)


def _score(config: ScoreConfig, output: Path | None, wanted: CurveWanted | None, *, as_json: bool) -> None:
    """Score, save to a free folder that no other run writes to, and print."""
    from foretune.models.adapter_file import placement_in_words
    from foretune.report.store import to_json
    from foretune.report.terminal import console, print_json, progress

    log = console(stderr=True)
    start = time.perf_counter()
    with log.status("loading"):
        from foretune.forecasting.calibration import read_calibration
        from foretune.forecasting.curve import RunCurve, forecast_run
        from foretune.forecasting.linearise import check_survey
        from foretune.models.adapter_file import adapter_from_file, adapter_in_words
        from foretune.models.classifier import load_model
        from foretune.models.placement import lora_config
        from foretune.problem import describe, prepare
        from foretune.scoring.files import save_score, score_content
        from foretune.scoring.report import print_plan, print_result
        from foretune.scoring.score import run as run_plan
        from foretune.tasks.load import load_task

        calibration = None if wanted is None else read_calibration(wanted.calibration)
        given = None if config.adapter_config is None else adapter_from_file(config.adapter_config)
        task = load_task(config.data)
        classifier = load_model(config.model, task.objective, config.settings.seed)
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
