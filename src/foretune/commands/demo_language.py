"""`foretune demo --task causal-lm`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretune.commands.demo_steps import folders_of_demo, near, print_end, say_command
from foretune.commands.forecast import make_forecast
from foretune.commands.tune import make_tune
from foretune.errors import StoreError
from foretune.settings.commands import Configuration, ForecastSettings, TuneSettings
from foretune.settings.groups import AdapterConfig, DataConfig, ModelConfig, Recipe

if TYPE_CHECKING:
    from rich.table import Table

ADAPTER = AdapterConfig(("all-linear",), alpha=16)
RECIPE = Recipe(epochs=3, learning_rate=3e-4, train_batch_size=8)
MAX_LENGTH = 32


def demo_language(output: Path | None, *, as_json: bool) -> None:
    """Simulate a fine-tune of SmolLM2 on BBC news, then run it, and print both side by side.

    Args:
        output: New folder for forecast and fine-tune; None keeps nothing.
        as_json: Whether to print JSON instead of the table.
    """
    from foretune.report.store import to_json
    from foretune.report.terminal import console, print_json

    with folders_of_demo(output, "causal-lm") as (folder, data):
        model = _model()
        results = _run(ModelConfig(near(model)), DataConfig(near(data), task="causal-lm"), folder)
    if as_json:
        print_json(to_json(results))
        return
    screen = console()
    screen.print(_side_by_side(model.name, results["forecast"], results["tune"]))
    print_end(screen, results["forecast"], output, "both curves")


def _model() -> Path:
    """The folder of SmolLM2, which outlives the demo: to convert it takes as long as to train it."""
    from foretune.models.gguf import demo_language_model
    from foretune.report.home import home
    from foretune.report.terminal import console

    log = console(stderr=True)
    with log.status("making the model ready"):
        try:
            return demo_language_model(home() / "models", say=lambda words: log.print(words, soft_wrap=True))
        except StoreError as error:
            raise StoreError(f"{error}; FORETUNE_HOME names another folder for it") from error


def _run(model: ModelConfig, data: DataConfig, folder: Path) -> dict[str, Any]:
    """Forecast and fine-tune one adapter, each as the command that is printed does it."""
    known = ForecastSettings(max_length=MAX_LENGTH, **vars(RECIPE))
    trained = TuneSettings(max_length=MAX_LENGTH, train_eval_samples=0, **vars(RECIPE))
    of_forecast = Configuration(model, data, ADAPTER, known)
    of_tune = Configuration(model, data, ADAPTER, trained)
    say_command("forecast", of_forecast, folder / "forecast")
    forecast = make_forecast(of_forecast, folder / "forecast", brief=True)
    say_command("tune", of_tune, folder / "tuned", folder / "forecast")
    tune = make_tune(of_tune, folder / "tuned", forecast=folder / "forecast", brief=True)
    return {"forecast": forecast, "tune": tune}


def _side_by_side(model: str, forecast: Mapping[str, Any], tune: Mapping[str, Any]) -> "Table":
    """What was forecast beside what the fine-tune gave; as simulated what has no interval."""
    from rich.table import Table

    from foretune.forecasting.outcomes import LOSSES
    from foretune.tasks.metrics import metrics_of

    count = forecast["placement"]["trainable_parameters"]
    title = (
        f"{model} on BBC news: {forecast['train_rows']} texts train, {forecast['eval_rows']} evaluate,\n"
        f"{MAX_LENGTH} tokens of each, all linear modules ({count:,} parameters), {forecast['steps']} steps"
    )
    table = Table(title=title, title_justify="left", show_edge=False)
    table.add_column("after the last epoch")
    levels = forecast["end"] or {}
    for name in ("forecast, 90% interval" if levels else "simulated (not calibrated)", "fine-tune", "before training"):
        table.add_column(name, justify="right")
    measures: list[tuple[str, str, Callable[[float | None], str]]] = [("evaluation loss", "eval_loss", _loss)]
    measures += [(metric.label, f"eval_{metric.name}", metric.written) for metric in metrics_of("causal-lm")]
    columns = (forecast["simulated_end"], tune["final"], tune["before_training"])
    for label, name, written in (*measures, ("training loss", "train_loss", _loss)):
        said, *others = (written(column[name]) for column in columns)
        level = levels.get(name if name in LOSSES else name.removeprefix("eval_"))
        if level is not None:
            said = f"{written(level['value'])} [{written(level['low'])}, {written(level['high'])}]"
        elif levels:
            said = f"{said} (simulated)"
        table.add_row(label, said, *others)
    spent = (forecast["seconds"]["forecast"], tune["seconds"]["train"] + tune["seconds"]["evaluate"])
    table.add_row("seconds", *(f"{seconds:.1f}" for seconds in spent), "")
    return table


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
