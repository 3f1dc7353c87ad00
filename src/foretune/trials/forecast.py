"""The forecast of one configuration's run, with the trials that its spend buys."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from peft import PeftConfig

from foretune.errors import ConfigError
from foretune.forecasting.calibration import Calibration
from foretune.forecasting.calibration_file import shipped_calibration
from foretune.forecasting.forecast import ForecastResult, prepare_forecast, run_forecast
from foretune.forecasting.sequence_forecast import SequenceForecast, forecast_sequences
from foretune.language.rows import LanguageTask
from foretune.models.classifier import Classifier, own_classifier
from foretune.models.language_model import own_language_model
from foretune.sequence_plan import SequencePlan, prepare_sequences
from foretune.settings.commands import ForecastSettings
from foretune.settings.spend import parse_spend
from foretune.tasks.load import Task
from foretune.trials.bench import Bench, Candidate, bench_of, bench_of_plan
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
    classifier: Classifier, task: Task, config: PeftConfig | None, settings: ForecastSettings, *, name: str = "adapter"
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
    candidate = Candidate(name, config, settings)
    return _bought(
        lambda: bench_of(classifier, task, settings, eval_samples=settings.eval_samples), candidate, settings
    )


def buy_sequence_trials(
    ready: SequencePlan, config: PeftConfig | None, settings: ForecastSettings, *, name: str = "adapter"
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
    return _bought(lambda: bench_of_plan(ready), Candidate(name, config, settings), settings)


def _bought(bench_of_run: Callable[[], Bench], candidate: Candidate, settings: ForecastSettings) -> Bought | None:
    share = parse_spend(settings.spend)
    if not share:
        return None
    bench = bench_of_run()
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


@overload
def forecast(
    model: Any,
    tokenizer: Any,
    config: PeftConfig | None,
    task: Task,
    *,
    settings: ForecastSettings | None = None,
    calibration: Calibration | None = None,
) -> ForecastResult: ...


@overload
def forecast(
    model: Any,
    tokenizer: Any,
    config: PeftConfig | None,
    task: LanguageTask,
    *,
    settings: ForecastSettings | None = None,
    calibration: None = None,
) -> SequenceForecast: ...


def forecast(
    model: Any,
    tokenizer: Any,
    config: PeftConfig | None,
    task: Task | LanguageTask,
    *,
    settings: ForecastSettings | None = None,
    calibration: Calibration | None = None,
) -> ForecastResult | SequenceForecast:
    """Forecast the run that fine-tunes a LoRA configuration of the user's own model; the model is left as it is.

    Args:
        model: transformers sequence classifier in eval mode, or for language causal language model; or a peft model of
            one with its adapter.
        tokenizer: Its tokenizer.
        config: peft's configuration; None if the model is a peft model already.
        task: Data, from `load_task` or `task_from_datasets`, or `load_language_task` or `language_task_from_datasets`.
        settings: The run, what is known of the data, and what may be spent on trials; None takes the defaults.
        calibration: Calibration of a classifier's forecast; None takes the one that comes with foretune, as does every
            language model.

    Returns:
        The forecast: `result.curve.end` by outcome with 90% intervals, `result.curve.points` on the way,
        `result.trials` what the trials showed.

    Raises:
        ConfigError: If a calibration is given for a language model.
    """
    wanted = settings or ForecastSettings()
    if isinstance(task, LanguageTask):
        if calibration is not None:
            raise ConfigError("calibration: language models take the one that comes with foretune, leave it out")
        language = own_language_model(model, tokenizer, bare=config is not None)
        ready = prepare_sequences(language, task, config, wanted)
        tried = make_trials(buy_sequence_trials(ready, config, wanted))
        return with_trials(forecast_sequences(ready, wanted, shown=[one.shown for one in tried]), tried)
    classifier = own_classifier(model, tokenizer, task.objective, bare=config is not None)
    plan = prepare_forecast(classifier, task, config, wanted)
    tried = make_trials(buy_trials(classifier, task, config, wanted))
    shown = [one.shown for one in tried]
    return with_trials(run_forecast(plan, wanted, calibration or shipped_calibration(), shown=shown), tried)
