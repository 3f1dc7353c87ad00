"""`foretune score`."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from foretune.commands.loading import (
    in_processes,
    is_language,
    load,
    load_language,
    open_data,
    read_adapter,
    say_where,
)
from foretune.settings.commands import Configuration, ScoreSettings, one_adapter
from foretune.settings.groups import AdapterConfig, DataConfig, ModelConfig

if TYPE_CHECKING:
    from foretune.processes.group import Processes
    from foretune.readers.folder import Splits


def _flat(title: str) -> Parameter:
    return Parameter(name="*", group=Group(title))


def score(
    *,
    model: Annotated[ModelConfig, _flat("Model")],
    data: Annotated[DataConfig, _flat("Data")],
    adapter: Annotated[AdapterConfig | None, _flat("Adapter")] = None,
    adapter_config: Annotated[Path | None, Parameter(group=Group("Adapter"))] = None,
    settings: Annotated[ScoreSettings | None, _flat("Score")] = None,
    output: Annotated[Path | None, Parameter(group="Run")] = None,
    config: Annotated[Path | None, Parameter(group="Run")] = None,
    json: Annotated[bool, Parameter(group="Run")] = False,
) -> None:
    """Score one adapter configuration: spectrum of its tangent kernel, risk bounds and kernel regression.

    Example: foretune score --model ./MiniLM --dataset ./sst2 --target-modules query value --layers 0 5 --output run

    Flags answer to Hugging Face's long names too (--model_name_or_path, --dataset_name, --lora_r, …).

    Args:
        model: Model.
        data: Data set.
        adapter: Adapter.
        adapter_config: peft's adapter_config.json, or the folder that holds it, instead of the adapter's flags.
        settings: How to score.
        output: New folder for result.json, kernel.safetensors, config.yaml and spectrum.png.
        config: YAML file with any of these flags by name; the command line wins.
        json: Print result.json to stdout instead of the table.
    """
    described = one_adapter(adapter, adapter_config)
    run_config = Configuration(model, data, described, settings or ScoreSettings())
    score_command(run_config, output, as_json=json)


def score_command(config: Configuration[ScoreSettings], output: Path | None, *, as_json: bool) -> None:
    """Load, plan, run, save and print one score.

    Args:
        config: All settings.
        output: Folder of the run, or None to save nothing.
        as_json: Whether to print JSON instead of the table.
    """
    from foretune.report.store import to_json
    from foretune.report.terminal import console, print_json

    content = make_score(config, output)
    if content is None:
        return
    if as_json:
        print_json(to_json(content))
        return
    if content["kernel_regression"] is None:
        from foretune.scoring.sequence_report import print_sequence_score

        print_sequence_score(console(), content)
        return
    from foretune.scoring.report import print_result

    print_result(console(), content)


def make_score(
    config: Configuration[ScoreSettings], output: Path | None, *, brief: bool = False
) -> dict[str, Any] | None:
    """Load, plan, run and save one score; to stderr goes what was understood and how far it is.

    Args:
        config: All settings.
        output: Folder of the run, or None to save nothing.
        brief: Whether only the progress is shown.

    Returns:
        What `result.json` holds; None in all processes of a run but the first.
    """
    with in_processes("score", config.to_dict(), output) as processes:
        splits = open_data(config.data)
        if is_language(config.model, config.data, splits):
            return _score_language(config, output, splits, processes, brief=brief)
        return _score(config, output, splits, processes, brief=brief)


def _score(
    config: Configuration[ScoreSettings],
    output: Path | None,
    splits: "Splits",
    processes: "Processes",
    *,
    brief: bool,
) -> dict[str, Any] | None:
    """Score, and save to a free folder that no other run writes to."""
    from foretune.report.terminal import console, progress

    log = console(stderr=True)
    start = time.perf_counter()
    with log.status("loading"):
        from foretune.problem import describe, prepare
        from foretune.scoring.files import save_score, score_content
        from foretune.scoring.report import print_plan
        from foretune.scoring.score import run_score

        given = read_adapter(config)
        loaded = load(config, given, seed=config.settings.seed, splits=splits)
        plan = prepare(loaded.classifier, loaded.task, loaded.lora, config.settings, inplace=True)
        plan = replace(plan, processes=processes)
    seconds_load = time.perf_counter() - start
    if not brief:
        print_plan(log, describe(plan), loaded.words)
    with processes.until_handed_over(), progress(log, "texts through the model", plan.n_passes) as update:
        result = run_score(plan, seconds_load=seconds_load, on_batch=lambda count: update(advance=count), output=output)
    if not processes.is_main:
        return None
    if output is not None:
        save_score(result, output, config, given)
    if not brief:
        say_where(log, output)
    return score_content(result)


def _score_language(
    config: Configuration[ScoreSettings],
    output: Path | None,
    splits: "Splits",
    processes: "Processes",
    *,
    brief: bool,
) -> dict[str, Any] | None:
    """The same of a language model."""
    from foretune.report.terminal import console, progress

    log = console(stderr=True)
    start = time.perf_counter()
    with log.status("loading"):
        from foretune.scoring.files import save_score, score_content
        from foretune.scoring.sequence_plan import (
            check_language_settings,
            describe_sequence_score,
            prepare_sequence_score,
        )
        from foretune.scoring.sequence_report import print_sequence_score_plan
        from foretune.scoring.sequence_score import run_sequence_score

        check_language_settings(config.settings)
        given = read_adapter(config, language=True)
        loaded = load_language(config, given, splits)
        plan = prepare_sequence_score(loaded.language, loaded.task, loaded.lora, config.settings, inplace=True)
        plan = replace(plan, placed=replace(plan.placed, processes=processes))
    seconds_load = time.perf_counter() - start
    if not brief:
        print_sequence_score_plan(log, describe_sequence_score(plan), loaded.words, plan.kernel)
    with processes.until_handed_over(), progress(log, "sequences through the model", plan.n_passes) as update:
        result = run_sequence_score(plan, seconds_load=seconds_load, on_batch=lambda count: update(advance=count))
    if not processes.is_main:
        return None
    if output is not None:
        save_score(result, output, config, given)
    if not brief:
        say_where(log, output)
    return score_content(result)
