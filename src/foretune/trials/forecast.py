"""The forecast of one configuration's run, with the trials that its spend buys."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from peft import LoraConfig

from foretune.forecasting.calibration import Calibration
from foretune.forecasting.calibration_file import shipped_calibration
from foretune.forecasting.forecast import ForecastResult, prepare_forecast, run_forecast
from foretune.forecasting.sequence_forecast import SequenceForecast
from foretune.models.classifier import Classifier, own_classifier
from foretune.sequence_plan import SequencePlan
from foretune.settings.commands import ForecastSettings
from foretune.settings.spend import parse_spend
from foretune.tasks.load import Task
from foretune.trials.bench import Bench, Candidate, LanguageBench, bench_of
from foretune.trials.carry import OnProgress, run_trials
from foretune.trials.plan import TrialPlan, plan_trials
from foretune.trials.run import Tried
from foretune.trials.store import Store, open_store

Forecast = TypeVar("Forecast", ForecastResult, SequenceForecast)


@dataclass(frozen=True)
class Bought:
    """The trials of one configuration that a spend buys.

    Attributes:
        bench: Model, data and rows.
        candidate: The configuration.
        plan: Its trials.
        store: Where they are kept.
    """

    bench: Bench
    candidate: Candidate
    plan: TrialPlan
    store: Store


def buy_trials(
    classifier: Classifier, task: Task, config: LoraConfig | None, settings: ForecastSettings, *, name: str = "adapter"
) -> Bought | None:
    """Plan the trials of a forecast; nothing is trained yet.

    Args:
        classifier: Model and tokenizer; trials leave it as it is.
        task: Data.
        config: peft's configuration; None if the model is a peft model already.
        settings: The run, what is known of the data, and the spend.
        name: The adapter in words.

    Returns:
        The trials; None for a spend of 0.

    Raises:
        ConfigError: If the spend is none, or buys no trial.
    """
    share = parse_spend(settings.spend)
    if not share:
        return None
    bench = bench_of(classifier, task, settings, eval_samples=settings.eval_samples)
    return _bought(bench, Candidate(name, config, settings), settings, share)


def buy_sequence_trials(
    ready: SequencePlan, config: LoraConfig | None, settings: ForecastSettings, *, name: str = "adapter"
) -> Bought | None:
    """Plan the trials of a language model's forecast; nothing is trained yet.

    Args:
        ready: Plan of the forecast, whose adapters lie on a copy of the model.
        config: peft's configuration; None if the model is a peft model already.
        settings: The run, what is known of the data, and the spend.
        name: The adapter in words.

    Returns:
        The trials; None for a spend of 0.

    Raises:
        ConfigError: If the spend is none, or buys no trial.
    """
    share = parse_spend(settings.spend)
    if not share:
        return None
    bench = LanguageBench(ready.language, ready.task, ready.rows, settings)
    return _bought(bench, Candidate(name, config, settings), settings, share)


def _bought(bench: Bench, candidate: Candidate, settings: ForecastSettings, share: float) -> Bought:
    plan = plan_trials([settings], bench.extent(), share, seed=settings.seed)
    return Bought(bench, candidate, plan, open_store(bench))


def make_trials(
    bought: Bought | None, *, on_progress: OnProgress | None = None, on_note: Callable[[str], None] | None = None
) -> tuple[Tried, ...]:
    """Make the trials of a forecast, but those that are kept.

    Args:
        bought: From `buy_trials`.
        on_progress: Called with the sample passes done and those in all.
        on_note: Called with a sentence on a kept trial that is damaged.

    Returns:
        The trials, those with the fewest rows first.
    """
    if bought is None:
        return ()
    (tried,) = run_trials(
        bought.bench, [bought.candidate], bought.plan, bought.store, on_progress=on_progress, on_note=on_note
    )
    return tried


def with_trials(result: Forecast, tried: tuple[Tried, ...]) -> Forecast:
    """Lay the trials down beside the forecast that was made with them.

    Args:
        result: The forecast.
        tried: Its trials.

    Returns:
        The same with them, and with the seconds that making them took, this time or before.
    """
    if not tried:
        return result
    seconds = {**result.seconds, "trials": sum(one.seconds for one in tried)}
    return dataclasses.replace(result, trials=tuple(map(record, tried)), seconds=seconds)


def record(tried: Tried) -> Mapping[str, Any]:
    """Lay a trial out as in `result.json`.

    Args:
        tried: Trial.

    Returns:
        JSON-ready values, but for numbers that are not finite.
    """
    return {**dataclasses.asdict(tried.shown), "passes": tried.passes, "seconds": tried.seconds}


def forecast(
    model: Any,
    tokenizer: Any,
    config: LoraConfig | None,
    task: Task,
    *,
    settings: ForecastSettings | None = None,
    calibration: Calibration | None = None,
) -> ForecastResult:
    """Forecast the run that fine-tunes a LoRA configuration of the user's own model; the model is left as it is.

    Args:
        model: transformers sequence classifier in eval mode, or a peft model with its adapter.
        tokenizer: Its tokenizer.
        config: peft's configuration; None if the model is a peft model already.
        task: Data, from `load_task` or `task_from_datasets`.
        settings: The run, what is known of the data, and what may be spent on trials; None takes the defaults.
        calibration: Calibration of the forecast; None takes the one that comes with foretune.

    Returns:
        The forecast: `result.curve.end` by outcome with 90% intervals, `result.curve.points` on the way,
        `result.trials` what the trials showed.
    """
    wanted = settings or ForecastSettings()
    classifier = own_classifier(model, tokenizer, task.objective, bare=config is not None)
    plan = prepare_forecast(classifier, task, config, wanted)
    tried = make_trials(buy_trials(classifier, task, config, wanted))
    shown = [one.shown for one in tried]
    return with_trials(run_forecast(plan, wanted, calibration or shipped_calibration(), shown=shown), tried)
