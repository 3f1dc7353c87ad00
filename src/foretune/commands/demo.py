"""`foretune demo`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from foretune.commands.demo_language import demo_language
from foretune.commands.demo_steps import folders_of_demo, near, print_end, say_command
from foretune.commands.forecast import make_forecast
from foretune.commands.score import make_score
from foretune.commands.tune import make_tune
from foretune.errors import ConfigError
from foretune.settings.commands import Configuration, ForecastSettings, ScoreSettings, TuneSettings
from foretune.settings.groups import AdapterConfig, DataConfig, ModelConfig, Recipe

if TYPE_CHECKING:
    from rich.table import Table

MODULES = ("query", "value")
RECIPE = Recipe(epochs=5, learning_rate=5e-3)  # 80 steps: what the calibration that comes with foretune has seen
LAYERS = (3, 4, 5)
MAX_LENGTH = 32
EVAL_SAMPLES = 256
SPECTRUM = (
    ("condition_number", "κ"),
    ("lambda_max", "λ_max"),
    ("lambda_min", "λ_min"),
    ("trace", "trace"),
    ("effective_dimension", "effective dimension"),
    ("alignment", "kernel-target alignment"),
)


def demo(
    *,
    task: Annotated[Literal["classification", "causal-lm"], Parameter(group="Run")] = "classification",
    output: Annotated[Path | None, Parameter(group="Run")] = None,
    samples: Annotated[int | None, Parameter(group="Run")] = None,
    json: Annotated[bool, Parameter(group="Run")] = False,
) -> None:
    """Forecast a fine-tune of MiniLM on BBC news, then run it, and print both side by side.

    Real weights and real text come with the extra `demo`. Above the two stands the spectrum of the adapter's tangent
    kernel; the commands that do the same are printed to stderr. With --task causal-lm it is SmolLM2-135M-Instruct, of
    the extra `demo-lm`, without the spectrum.

    Args:
        task: What is learnt: topics (classification), or the next token (causal-lm).
        output: New folder for score, forecast and fine-tune; the texts are written beside it, to OUTPUT-data.
        samples: Training samples of the kernel whose spectrum is shown; by default 32.
        json: Print all results as JSON to stdout instead of the tables.

    Raises:
        ConfigError: If a kernel is asked of a language model.
    """
    from foretune.report.store import to_json
    from foretune.report.terminal import console, print_json
    from foretune.tasks.demo import model_folder

    if task == "causal-lm":
        if samples is not None:
            raise ConfigError(f"samples = {samples}: no kernel of a causal language model is shown yet, leave it out")
        demo_language(output, as_json=json)
        return
    n = ScoreSettings.samples if samples is None else samples
    kernel = ScoreSettings(samples=n, eval_samples=0, max_length=MAX_LENGTH)
    with folders_of_demo(output, task) as (folder, data):
        results = _run(ModelConfig(near(model_folder())), DataConfig(near(data)), kernel, folder)
    if json:
        print_json(to_json(results))
        return
    screen = console()
    screen.print(_spectrum(results["score"]))
    screen.print()
    screen.print(_side_by_side(results["forecast"], results["tune"]))
    drawn = "both curves" if results["forecast"]["points"] else "the run"
    print_end(screen, results["forecast"], output, drawn)


def _run(model: ModelConfig, data: DataConfig, kernel: ScoreSettings, folder: Path) -> dict[str, Any]:
    """Score, forecast and fine-tune one adapter, each as the command that is printed does it."""
    adapter = AdapterConfig(target_modules=MODULES, layers=LAYERS)
    known = ForecastSettings(eval_samples=EVAL_SAMPLES, max_length=MAX_LENGTH, **vars(RECIPE))
    trained = TuneSettings(eval_samples=EVAL_SAMPLES, max_length=MAX_LENGTH, train_eval_samples=0, **vars(RECIPE))
    of_score = Configuration(model, data, adapter, kernel)
    of_forecast = Configuration(model, data, adapter, known)
    of_tune = Configuration(model, data, adapter, trained)
    say_command("score", of_score, folder / "score")
    score = make_score(of_score, folder / "score", brief=True)
    say_command("forecast", of_forecast, folder / "forecast")
    forecast = make_forecast(of_forecast, folder / "forecast", brief=True)
    assert score is not None  # a demo runs in one process
    assert forecast is not None
    curve = folder / "forecast" if forecast["points"] else None
    say_command("tune", of_tune, folder / "tuned", curve)
    tune = make_tune(of_tune, folder / "tuned", forecast=curve, brief=True)
    return {"score": score, "forecast": forecast, "tune": tune}


def _spectrum(score: Mapping[str, Any]) -> "Table":
    """The numbers of the kernel's spectrum, with their spread over draws of A."""
    from rich.table import Table

    kernel, draws = score["kernel"], score["spread"]["draws_of_a"]
    table = Table(title=f"Tangent kernel of {score['n']} texts, before training", title_justify="left", show_edge=False)
    table.add_column("quantity")
    table.add_column("this adapter", justify="right")
    table.add_column(f"{score['settings']['draws']} draws of A", justify="right")
    for name, label in SPECTRUM:
        spread = draws[name]
        several = "–" if spread is None else f"{spread['mean']:.3g} ± {spread['standard_deviation']:.2g}"
        value = "–" if kernel[name] is None else f"{kernel[name]:.4g}"
        table.add_row(f"κ (σ = {kernel['sigma']:g})" if name == "condition_number" else label, value, several)
    return table


def _side_by_side(forecast: Mapping[str, Any], tune: Mapping[str, Any]) -> "Table":
    """What was forecast beside what the fine-tune gave."""
    from rich.table import Table

    from foretune.tasks.metrics import main_metric

    metric = main_metric(forecast["details"]["objective"]["kind"])
    end, final, count = forecast["end"] or {}, tune["final"], forecast["placement"]["trainable_parameters"]
    placed = f"{', '.join(MODULES)} of layers {', '.join(map(str, LAYERS))}"
    title = (
        f"MiniLM on BBC news: {forecast['train_rows']} texts train, {forecast['eval_rows']} evaluate,\n"
        f"{placed} ({count:,} parameters), {forecast['steps']} steps"
    )
    table = Table(title=title, title_justify="left", show_edge=False)
    table.add_column("after the last epoch")
    for name in ("forecast", "90% interval", "fine-tune", "inside"):
        table.add_column(name, justify="right")
    rows = ((metric.label, metric.name, f"eval_{metric.name}"), ("evaluation loss", "eval_loss", "eval_loss"))
    for label, name, measured in (*rows, ("training loss", "train_loss", "train_loss")):
        write = metric.written if name == metric.name else "{:.3f}".format
        value, real = end.get(name), final[measured]
        interval = ("withheld", "–", "–")
        if value is not None:
            inside = "yes" if real is not None and value["low"] <= real <= value["high"] else "no"
            interval = (write(value["value"]), f"{write(value['low'])} to {write(value['high'])}", inside)
        table.add_row(label, interval[0], interval[1], "–" if real is None else write(real), interval[2])
    seconds = (forecast["seconds"]["forecast"], tune["seconds"]["train"] + tune["seconds"]["evaluate"])
    table.add_row("seconds", f"{seconds[0]:.1f}", "", f"{seconds[1]:.1f}", "")
    return table
